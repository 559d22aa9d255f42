"""Decodes pictures whole, in a process of its own that has little memory and time. Run as a script, with no imports of
ours: a line of JSON for each picture on standard input, a line of JSON for each on standard output, in order.

    {"path": "/tmp/x/0"}  ->  {"format": "PNG", "width_px": 64, "height_px": 64}  or  {"problem": "unreadable"}

A picture that takes more than its share ends the process, and the missing line tells which one it was.
"""

from __future__ import annotations

import json
import resource
import struct
import sys
import warnings
from typing import Any

from PIL import Image

MEMORY_BYTES = 2 * 1024**3
CPU_S_PER_PICTURE = 20
PIXELS_MAX = 64_000_000
SIDE_MAX_PX = 16_384
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
# What Pillow's decoders raise for bytes that are not a picture; any of them means the same.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def decode(path: str) -> dict[str, Any]:
    """What the file holds, or why it is refused: "unreadable" or "too_large"."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            width_px, height_px = image.size
            if max(width_px, height_px) > SIDE_MAX_PX or width_px * height_px > PIXELS_MAX:
                return {"problem": "too_large"}
            image.load()
            return {"format": image.format, "width_px": width_px, "height_px": height_px}
    except DECODE_ERRORS:
        return {"problem": "unreadable"}


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Pillow's own size warning; the stricter limits above decide.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit_s = int(used.ru_utime + used.ru_stime) + CPU_S_PER_PICTURE
        resource.setrlimit(resource.RLIMIT_CPU, (limit_s, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        sys.stdout.write(json.dumps(decode(json.loads(line)["path"])) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
