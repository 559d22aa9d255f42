"""A peer of bench_api: the `runpod` package's own local API server, with a handler that does nothing."""

from typing import Any

import runpod


def handler(job: dict[str, Any]) -> dict[str, Any]:
    return dict(job["input"])


runpod.serverless.start({"handler": handler})
