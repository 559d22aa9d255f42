"""Ends an instance's processes when its supervisor dies without doing so: ``python -m serve_app.stack.watchdog HOME``.

The supervisor holds the other end of standard input. It writes ``done`` before an orderly end; end of file without
it means that the supervisor was killed.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from serve_app.stack.instance import Instance


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.stdin.read().strip() != "done":
        instance = Instance(Path(sys.argv[1]))
        instance.end_processes()
    return 0


if __name__ == "__main__":
    sys.exit(main())
