"""The state of a checkpoint, of which the other files' digests can be read without torch."""

from __future__ import annotations

import json

from train_jobs.errors import CheckpointInvalid

ADAPTER = "adapter.safetensors"
STATE = "state.json"
"""Written last: a checkpoint that has it is whole."""


def digests_in(state: bytes) -> dict[str, str]:
    """The SHA-256 (hex) of a checkpoint's other files by name; none in one of an earlier version.

    Raises CheckpointInvalid.
    """
    try:
        found = json.loads(state).get("sha256", {})
        return {str(name): str(digest) for name, digest in found.items()}
    except (ValueError, AttributeError):
        raise CheckpointInvalid("its state is damaged") from None
