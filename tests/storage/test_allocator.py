from __future__ import annotations

import subprocess
import sys

import pytest

# What a socket gives: a block of 256 KiB, of which what has come is kept.
SCRIPT = """
import os, resource, tempfile
from storage.allocator import keep_freed_memory
if not keep_freed_memory():
    raise SystemExit("refused")
with tempfile.TemporaryFile() as file:
    file.write(bytes(64 * 1024))
    file.flush()
    def read(count):
        for _ in range(count):
            os.pread(file.fileno(), 256 * 1024, 0)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    before = read(10)
    print(read(1000) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the setting is glibc's")
def test_memory_that_was_used_before_is_used_again() -> None:
    ran = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    # Mapped anew, each block would take 17 pages.
    assert int(ran.stdout) < 1000
