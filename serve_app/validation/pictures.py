"""Pictures of strangers, decoded by `serve_app.validation.decoder` and never in this process."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from serve_app.validation import decoder

logger = logging.getLogger(__name__)

START_S = 30.0
WALL_S_PER_PICTURE = 30.0
CHILDREN_MAX = 4

TOO_LARGE = f"the picture is over {decoder.PIXELS_MAX // 10**6} megapixels or {decoder.SIDE_MAX_PX} pixels wide"
UNREADABLE = "is not a picture that can be read"
TOO_COSTLY = "the picture takes too much memory or time to decode"
_REASONS = {"too_large": (TOO_LARGE, "too_large"), "unreadable": (UNREADABLE, "invalid_value")}


@dataclass(frozen=True)
class PictureFacts:
    format: str
    width_px: int
    height_px: int


@dataclass(frozen=True)
class PictureProblem:
    """`code` is "too_large" or "invalid_value"."""

    message: str
    code: str


def decode_pictures(paths: Sequence[Path]) -> list[PictureFacts | PictureProblem]:
    """One answer for each file, in order. Blocking, and slow: not for an event loop.

    A picture that ends its process is refused, and the rest go to another one; after CHILDREN_MAX such pictures the
    rest are refused with them.
    """
    answers: list[PictureFacts | PictureProblem] = []
    for _ in range(CHILDREN_MAX):
        answers += _decoded_by_one_child(paths[len(answers) :])
        if len(answers) == len(paths):
            return answers
        logger.warning("A picture ended the process that decoded it")
        answers.append(PictureProblem(TOO_COSTLY, "too_large"))
    return answers + [PictureProblem(TOO_COSTLY, "too_large")] * (len(paths) - len(answers))


def _decoded_by_one_child(paths: Sequence[Path]) -> list[PictureFacts | PictureProblem]:
    """As many answers as the child gave before it ended."""
    if not paths:
        return []
    questions = "".join(json.dumps({"path": str(path)}) + "\n" for path in paths)
    command = [sys.executable, "-I", decoder.__file__]
    try:
        done = subprocess.run(
            command,
            input=questions.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=START_S + WALL_S_PER_PICTURE * len(paths),
            check=False,
        )
        said = done.stdout
    except subprocess.TimeoutExpired as expired:
        said = expired.stdout or b""
    # A line without its end was being written when the child ended.
    return [_answer(line) for line in said.split(b"\n")[:-1]]


def _answer(line: bytes) -> PictureFacts | PictureProblem:
    said = json.loads(line)
    if "problem" in said:
        return PictureProblem(*_REASONS[said["problem"]])
    return PictureFacts(said["format"], said["width_px"], said["height_px"])
