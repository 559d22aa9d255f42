"""Storage against boto3, bare aiobotocore and obstore, on the embedded S3 server, with and without latency before it.

    make bench-storage [BENCH_ARGS="--repeats 5 --large-mib 2048"]

Every contestant does the same work in the same run, in turns; a ratio is of medians, and the spread of each is shown.
Ours goes through the storage actor and verifies what was stored; the others do neither. It moves whole objects by
obstore and parts of files by aiobotocore.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ray
from boto3.s3.transfer import TransferConfig
from botocore.exceptions import ClientError
from storage_peers import (
    ActorMemory,
    boto_client,
    cores_allowed,
    has_obstore,
    latency,
    machine,
    obstore_download,
    obstore_store,
)

from storage.actor import StorageClient, storage_actor_name
from storage.datasets import write_dataset
from storage.embedded import EmbeddedS3
from storage.keys import Keys
from storage.s3 import S3Store
from storage.s3_client import S3Clients
from storage.settings import MIB, BreakerSettings, S3Settings

HERE = Path(__file__).resolve().parent
LATENCY_MS = 30.0
FILES, FILE_BYTES = 500, 200_000
OBJECTS, OBJECT_BYTES = 64, MIB
SMALL_BYTES = 100
# The same store without the actor, and an actor's method that does nothing: what of the cost is Ray's.
IN_PROCESS, EMPTY_CALL = "raylora in process", "empty actor call"
PARTS = ("batch", "objects", "small", "large")
WHERE = ("near", "far")

OBSTORE_AHEAD_MIN = 1.5
OBSTORE_NOTE = (
    "obstore alone is more than 1.5x ahead of ours here. Ours calls it for whole objects, inside our attempts and with "
    "our digests, since it checks none; parts and ranges of files go through aiobotocore."
)

Timed = Callable[[str], Awaitable[float]]
"""Does the work once below a prefix of its own and returns the seconds it took."""


class Bench:
    """Runs contestants in turns and keeps what they took."""

    def __init__(self, repeats: int, large_repeats: int, small_calls: int, file: Path) -> None:
        self.repeats = repeats
        self.large_repeats = large_repeats
        self.small_calls = small_calls
        self._file = file

    def keep(self, result: dict[str, Any]) -> None:
        """Write it at once, in place of an earlier one of its name; what other runs measured stays."""
        about = {"command": " ".join(sys.argv), "at": datetime.now(UTC).isoformat(), "cores_allowed": cores_allowed()}
        earlier = json.loads(self._file.read_text())["results"] if self._file.exists() else []
        others = [other for other in earlier if other["name"] != result["name"]]
        text = json.dumps({"machine": machine(), "results": [*others, {**result, **about}]}, indent=1)
        self._file.write_text(text + "\n")

    async def compare(
        self, name: str, contestants: dict[str, Timed], *, base: str, target: str, repeats: int | None = None
    ) -> None:
        """`base` is the peer: the ratio is how many times faster ours is."""
        took: dict[str, list[float]] = {who: [] for who in contestants}
        for turn in range(repeats or self.repeats):
            # Every other turn in reverse: whoever comes second finds caches and disks in another state.
            for who, timed in list(contestants.items())[:: -1 if turn % 2 else 1]:
                took[who].append(await timed(f"bench/{abs(hash((name, who))):x}/{turn}"))
        median = {who: statistics.median(times) for who, times in took.items()}
        ratios = {who: median[base] / median[who] for who in contestants}
        ours = next(iter(contestants))
        note = ahead_note(median[ours], median.get(IN_PROCESS), median.get("obstore"))
        result = {"name": name, "base": base, "target": target, "seconds": took, "speed_against_base": ratios, **note}
        self.keep(result)
        print(f"\n{name} (target for ours: {target})")
        for who, times in took.items():
            spread = f"{min(times):.3f}-{max(times):.3f} s"
            print(f"  {who:22} median {median[who]:8.3f} s  ({spread})  {ratios[who]:6.2f}x of {base}", flush=True)


def ahead_note(ours_s: float, in_process_s: float | None, obstore_s: float | None) -> dict[str, str]:
    if obstore_s is None or ours_s <= OBSTORE_AHEAD_MIN * obstore_s:
        return {}
    of_the_actor = (
        ""
        if in_process_s is None
        else f" It is {in_process_s / obstore_s:.2f}x ahead of ours in one process; the rest is the way through the "
        "actor, which would stay."
    )
    return {"obstore": OBSTORE_NOTE + of_the_actor}


async def gathered(works: Iterator[Awaitable[Any]], at_once: int = 64) -> float:
    """Seconds for all, `at_once` together."""
    slots = asyncio.Semaphore(at_once)

    async def one(work: Awaitable[Any]) -> None:
        async with slots:
            await work

    started = time.perf_counter()
    await asyncio.gather(*(one(work) for work in works))
    return time.perf_counter() - started


async def batch(bench: Bench, settings: S3Settings, store: StorageClient, label: str, target: str) -> None:
    """A data set of many small files."""
    data = os.urandom(FILE_BYTES)
    files: list[tuple[str, bytes | Path, str | None]] = [(f"{n:04d}.png", data, "image/png") for n in range(FILES)]
    keys, client = Keys(settings.prefix, "bench"), boto_client(settings)

    async def ours(prefix: str) -> float:
        started = time.perf_counter()
        await write_dataset(store, keys, prefix.replace("/", "-"), files, now=datetime.now(UTC))
        return time.perf_counter() - started

    def sequential(prefix: str) -> float:
        started = time.perf_counter()
        for name, body, kind in files:
            client.put_object(Bucket=settings.bucket, Key=f"{prefix}/{name}", Body=body, ContentType=kind)
        return time.perf_counter() - started

    async def theirs(prefix: str) -> float:
        return await asyncio.to_thread(sequential, prefix)

    name = f"batch upload, {FILES} files of {FILE_BYTES // 1000} KB, {label}"
    await bench.compare(name, {"raylora": ours, "boto3 loop": theirs}, base="boto3 loop", target=target, repeats=2)


async def objects(
    bench: Bench, settings: S3Settings, store: StorageClient, local: S3Store, clients: S3Clients, label: str
) -> None:
    """Objects of 1 MiB, 64 at once, put and got."""
    data = os.urandom(OBJECT_BYTES)
    bare = await clients.internal()
    bucket = settings.bucket

    async def bare_put(key: str) -> None:
        try:
            await bare.put_object(Bucket=bucket, Key=key, Body=data)
        except ClientError:
            # rclone refuses a few of the first writes below a new prefix.
            await bare.put_object(Bucket=bucket, Key=key, Body=data)

    async def bare_get(key: str) -> None:
        answer = await bare.get_object(Bucket=bucket, Key=key)
        async with answer["Body"] as body:
            assert len(await body.read()) == OBJECT_BYTES

    puts: dict[str, Timed] = {
        "raylora actor": lambda p: gathered(store.put(f"{p}/{n}", data) for n in range(OBJECTS)),
        IN_PROCESS: lambda p: gathered(local.put(f"{p}/{n}", data) for n in range(OBJECTS)),
        "aiobotocore": lambda p: gathered(bare_put(f"{p}/{n}") for n in range(OBJECTS)),
    }
    source = f"bench/source-{label.replace(' ', '-')}"
    await gathered(store.put(f"{source}/{n}", data) for n in range(OBJECTS))
    gets: dict[str, Timed] = {
        "raylora actor": lambda _: gathered(store.get(f"{source}/{n}") for n in range(OBJECTS)),
        IN_PROCESS: lambda _: gathered(local.get(f"{source}/{n}") for n in range(OBJECTS)),
        "aiobotocore": lambda _: gathered(bare_get(f"{source}/{n}") for n in range(OBJECTS)),
    }
    if has_obstore():
        import obstore

        fast = obstore_store(settings)

        async def fast_get(key: str) -> None:
            found = await obstore.get_async(fast, key)
            assert len(await found.bytes_async()) == OBJECT_BYTES

        puts["obstore"] = lambda p: gathered(obstore.put_async(fast, f"{p}/{n}", data) for n in range(OBJECTS))
        gets["obstore"] = lambda _: gathered(fast_get(f"{source}/{n}") for n in range(OBJECTS))
    size = f"{OBJECTS} x {OBJECT_BYTES // MIB} MiB, {label}"
    await bench.compare(f"put {size}", puts, base="aiobotocore", target=">= 0.9")
    await bench.compare(f"get {size}", gets, base="aiobotocore", target=">= 0.9")


async def small(
    bench: Bench, settings: S3Settings, store: StorageClient, local: S3Store, clients: S3Clients, label: str
) -> None:
    """One call after another; what the actor adds at the median."""
    data, bucket = os.urandom(SMALL_BYTES), settings.bucket
    bare = await clients.internal()

    async def bare_get(key: str) -> None:
        answer = await bare.get_object(Bucket=bucket, Key=key)
        async with answer["Body"] as body:
            await body.read()

    calls: dict[str, dict[str, Callable[[str], Awaitable[Any]]]] = {
        "put": {
            "raylora actor": lambda key: store.put(key, data),
            IN_PROCESS: lambda key: local.put(key, data),
            "aiobotocore": lambda key: bare.put_object(Bucket=bucket, Key=key, Body=data),
        },
        "get": {"raylora actor": store.get, IN_PROCESS: local.get, "aiobotocore": bare_get},
    }
    handle = this_nodes_actor(f"bench-{label.replace(' ', '-')}")
    for operation, contestants in calls.items():
        took: dict[str, list[float]] = {who: [] for who in contestants}
        for number in range(bench.small_calls):
            for who, call in contestants.items():
                started = time.perf_counter()
                await call(f"bench/small/{who.replace(' ', '-')}/{number}")
                took[who].append((time.perf_counter() - started) * 1000)
            started = time.perf_counter()
            await handle.identify.remote()
            took.setdefault(EMPTY_CALL, []).append((time.perf_counter() - started) * 1000)
        medians = {who: statistics.median(times) for who, times in took.items()}
        added_ms = medians["raylora actor"] - medians["aiobotocore"]
        name = f"{operation} of {SMALL_BYTES} B, {label}"
        bench.keep({"name": name, "target": "<= 1 ms added at p50", "p50_ms": medians, "added_ms": added_ms})
        print(f"\n{name}: p50 {medians['raylora actor']:.2f} ms against {medians['aiobotocore']:.2f} ms, ", end="")
        print(f"added {added_ms:.2f} ms (target <= 1); ", end="")
        print(f"{IN_PROCESS} {medians[IN_PROCESS]:.2f} ms, {EMPTY_CALL} {medians[EMPTY_CALL]:.2f} ms", flush=True)


async def large(bench: Bench, settings: S3Settings, store: StorageClient, size_mib: int, label: str) -> None:
    """One file, up and down, and what the actor's memory grew to."""
    client, bucket = boto_client(settings), settings.bucket
    with tempfile.TemporaryDirectory(prefix="bench-storage-") as folder:
        source, target = Path(folder, "source"), Path(folder, "target")
        sha256 = _write_random(source, size_mib)

        def timed(work: Callable[[str], Any]) -> Timed:
            async def run(prefix: str) -> float:
                started = time.perf_counter()
                await asyncio.to_thread(work, prefix)
                return time.perf_counter() - started

            return run

        async def up(prefix: str) -> float:
            started = time.perf_counter()
            await store.upload_file(source, f"{prefix}/large")
            return time.perf_counter() - started

        async def down(_: str) -> float:
            started = time.perf_counter()
            await store.download_file("bench/large", target, expected_sha256=sha256)
            return time.perf_counter() - started

        def noting_its_hash(prefix: str) -> None:
            """The nearest that boto3 has to what ours does: its own checksums, and the SHA-256 as metadata."""
            with source.open("rb") as file:
                noted = {"Metadata": {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}}
            checking.upload_file(str(source), bucket, f"{prefix}/large", Config=plain, ExtraArgs=noted)

        plain, checking = TransferConfig(), boto_client(settings, checksums=True)
        ups: dict[str, Timed] = {
            "raylora actor": up,
            "boto3 transfer": timed(lambda p: client.upload_file(str(source), bucket, f"{p}/large", Config=plain)),
            "boto3, SHA-256 noted": timed(noting_its_hash),
        }
        downs: dict[str, Timed] = {
            "raylora actor": down,
            "boto3 transfer": timed(lambda _: client.download_file(bucket, "bench/large", str(target), Config=plain)),
        }
        if has_obstore():
            import obstore

            fast = obstore_store(settings)
            ups["obstore"] = timed(lambda p: obstore.put(fast, f"{p}/large", source))
            downs["obstore"] = timed(lambda _: obstore_download(fast, "bench/large", target))
        ups = {who: _settled(_and_removed(store, timing)) for who, timing in ups.items()}
        downs = {who: _settled(timing) for who, timing in downs.items()}
        await store.upload_file(source, "bench/large")
        memory = ActorMemory()
        name = f"{size_mib} MiB file, {label}"
        repeats = bench.large_repeats
        await bench.compare(f"upload of one {name}", ups, base="boto3 transfer", target=">= 1.0", repeats=repeats)
        await bench.compare(f"download of one {name}", downs, base="boto3 transfer", target=">= 1.0", repeats=repeats)
        rss_mib, own_mib = memory.stop()
        peaks = {"peak_rss_mib": rss_mib, "peak_own_mib": own_mib}
        bench.keep({"name": f"actor memory, {name}", "target": "< 512 MiB", **peaks})
        print(f"\nactor memory while it moved the file: {rss_mib:.0f} MiB resident at most, ", end="")
        print(f"{own_mib:.0f} of them not shared (target < 512)", flush=True)


def _and_removed(store: StorageClient, timing: Timed) -> Timed:
    """Copies that stay would fill the page cache for those that come later."""

    async def run(prefix: str) -> float:
        took_s = await timing(prefix)
        await store.delete(f"{prefix}/large")
        return took_s

    return run


def _settled(timing: Timed) -> Timed:
    """Nobody waits for the disk because of what another has written."""

    async def run(prefix: str) -> float:
        await asyncio.to_thread(os.sync)
        return await timing(prefix)

    return run


def _write_random(path: Path, size_mib: int) -> str:
    sha256 = hashlib.sha256()
    with path.open("wb") as file:
        for _ in range(size_mib):
            block = os.urandom(MIB)
            sha256.update(block)
            file.write(block)
    return sha256.hexdigest()


async def run(options: argparse.Namespace, bench: Bench, settings: S3Settings, label: str, *, near: bool) -> None:
    namespace = f"bench-{label.replace(' ', '-')}"
    store = StorageClient(settings, BreakerSettings(), namespace=namespace)
    clients, local = S3Clients(settings), S3Store(settings, BreakerSettings(shared=False))
    await store.ensure_bucket()
    try:
        if "batch" in options.parts:
            await batch(bench, settings, store, label, "reported" if near else ">= 15")
        if "objects" in options.parts:
            await objects(bench, settings, store, local, clients, label)
        if "small" in options.parts:
            await small(bench, settings, store, local, clients, label)
        if "large" in options.parts:
            await large(bench, settings, store, options.large_mib, label)
    finally:
        await local.aclose()
        await clients.aclose()
        ray.kill(this_nodes_actor(namespace))


def this_nodes_actor(namespace: str) -> Any:
    return ray.get_actor(storage_actor_name(ray.get_runtime_context().get_node_id()), namespace=namespace)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--large-mib", type=int, default=2048)
    parser.add_argument("--small-calls", type=int, default=150)
    parser.add_argument("--large-repeats", type=int, default=2)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="results of other parts stay")
    parser.add_argument("--where", nargs="+", choices=WHERE, default=WHERE, help="without and with latency")
    parser.add_argument("--machine", default=platform.node(), help="names the result file")
    options = parser.parse_args()
    file = HERE / "results" / f"storage-{options.machine}.json"
    file.parent.mkdir(exist_ok=True)
    bench = Bench(options.repeats, options.large_repeats, options.small_calls, file)
    os.environ["BENCH_MARK"] = str(os.getpid())
    with ExitStack() as stack:
        # Unix socket paths are limited to about 100 bytes.
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="rb", dir="/tmp", ignore_cleanup_errors=True))
        server = stack.enter_context(EmbeddedS3(Path(folder, "s3"), 0))
        # Ray writes its cluster's token there.
        os.environ["HOME"] = folder
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=f"{folder}/r", namespace="bench")
        stack.callback(ray.shutdown)
        if "near" in options.where:
            asyncio.run(run(options, bench, server.settings(), "no latency", near=True))
        if "far" in options.where:
            far = stack.enter_context(latency(server.settings(), LATENCY_MS))
            asyncio.run(run(options, bench, far, f"{LATENCY_MS:g} ms latency", near=False))
    print(f"\nwritten to {file.relative_to(HERE.parent)}")


if __name__ == "__main__":
    main()
