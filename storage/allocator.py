"""What glibc's allocator does with memory that is free again: keep it for the next piece, or return it to the system.

By itself it maps each block above 128 KiB anew, and returns the top of its heap at once. A process through which bytes
stream in pieces then spends more time on new pages than on the bytes: a download of 1 GiB took twice as long.
"""

from __future__ import annotations

import ctypes
import logging

from storage.settings import MIB

logger = logging.getLogger(__name__)

# The numbers are those of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
MAPPED_BYTES_MIN = 4 * MIB
KEPT_BYTES_MAX = 64 * MIB


def keep_freed_memory() -> bool:
    """For the whole process: blocks below `MAPPED_BYTES_MIN` come from a heap that keeps `KEPT_BYTES_MAX` at its top.

    Returns whether the C library took it; others than glibc have no such setting.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    taken = all(
        mallopt(setting, size_bytes)
        for setting, size_bytes in ((_M_MMAP_THRESHOLD, MAPPED_BYTES_MIN), (_M_TRIM_THRESHOLD, KEPT_BYTES_MAX))
    )
    if not taken:
        logger.warning("The C library refused the allocator's settings; transfers will be slower")
    return taken
