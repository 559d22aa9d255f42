"""moto's S3 server, whose answers are closer to AWS' than the embedded server's, as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from storage.listening import free_port, url_of

HOST = "127.0.0.1"
START_WITHIN_S = 60.0
STOP_WITHIN_S = 10.0
LOOK_EVERY_S = 0.1


@contextmanager
def moto_server() -> Iterator[str]:
    """Its URL. Raises RuntimeError where it does not come up."""
    port = free_port(HOST)
    command = [sys.executable, "-m", "moto.server", "-H", HOST, "-p", str(port)]
    # What it says would fill a pipe that nobody reads.
    process = subprocess.Popen(command, env=_without_proxies(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = url_of(HOST, port)
        _wait_for(process, url)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(process: subprocess.Popen[bytes], url: str) -> None:
    until_s = time.monotonic() + START_WITHIN_S
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while process.poll() is None and time.monotonic() < until_s:
        try:
            opener.open(f"{url}/moto-api/", timeout=1).close()
        except OSError:
            time.sleep(LOOK_EVERY_S)
        else:
            return
    raise RuntimeError(f"moto's server did not come up, exit status {process.poll()}")


def _without_proxies() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
