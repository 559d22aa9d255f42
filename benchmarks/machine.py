"""What a result says of the machine that it was measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def processor() -> str:
    """The processor's own name, where the system tells it."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def cpu_name() -> str:
    """Names result files, such as ``2cpu-x86_64``."""
    return f"{os.cpu_count()}cpu-{platform.machine()}"
