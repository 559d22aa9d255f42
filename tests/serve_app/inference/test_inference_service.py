"""The replica's work over a scripted engine: what it is asked, what is stored, when it stops."""

import asyncio
import hashlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffusion.engine import GeneratedImage, GenerateRequest
from diffusion.engine.memory import Memory
from diffusion.errors import Cancelled, InsufficientMemory, SizeNotSupported
from diffusion.images import read_settings
from serve_app.inference.engines import (
    DeviceFacts,
    EngineShelf,
    LastResort,
)
from serve_app.inference.lora_cache import LoraCache, file_name
from serve_app.inference.plan import GenerationRequest, GenerationWork, ResolvedLora
from serve_app.inference.service import InferenceService, requested_pictures
from serve_app.testing import keys_of
from storage.errors import IntegrityError, StorageError, StorageFailed, StorageTimeout, StorageUnavailable
from storage.testing import InMemoryStore
from train_jobs.generate_spec import GenerateSpec

KEY = "raylora/matt/processes/train_0123456789ab/lora/a.safetensors"
ID = "gen_0123456789ab"


class ScriptedEngine:
    """Two steps; with `gate`, the first lasts until the gate opens or somebody asks to stop."""

    def __init__(self) -> None:
        self.seen: list[GenerateRequest] = []
        self.files: list[bytes] = []
        self.gate: threading.Event | None = None
        self.at_work = threading.Event()
        self.error: Exception | None = None
        self.ended_by_request = False
        self.closed = False
        self.iteration_lasts_s = 0.0

    def close(self) -> None:
        self.closed = True

    def iteration_s(self) -> float:
        return self.iteration_lasts_s

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        *,
        on_step: Callable[[int, int], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[GeneratedImage]:
        assert on_step is not None
        assert should_stop is not None
        if self.error is not None:
            raise self.error
        self.seen += requests
        on_step(1, 2)
        self.at_work.set()
        while self.gate is not None and not self.gate.wait(0.001):
            if should_stop():
                self.files += [lora.path.read_bytes() for request in requests for lora in request.loras]
                self.ended_by_request = True
                raise Cancelled(1, 2)
        on_step(2, 2)
        return [GeneratedImage(Image.new("RGB", (r.width, r.height), "red"), r.seed, r.settings()) for r in requests]


class Replica:
    def __init__(self, folder: Path) -> None:
        self.store = InMemoryStore()
        self.engine = ScriptedEngine()
        self.loaded: list[str] = []
        self.free_bytes = 10_000
        self.naps_left: int | None = None
        self.shelf = EngineShelf(
            {"tiny": "/models/tiny", "other": "/models/other"},
            self._load,
            memory=lambda: Memory(self.free_bytes, 10_000),
            needed_bytes=lambda folder: 5000,
        )
        self.loras = LoraCache(self.store, folder, bytes_max=1000)
        self.service = InferenceService(
            store=self.store,
            keys_of=keys_of,
            shelf=self.shelf,
            loras=self.loras,
            device=lambda: DeviceFacts("cpu"),
            sleep=self._sleep,
        )

    def away(self, error: StorageError, *, naps: int | None) -> None:
        """The storage is, until the service has waited so often."""
        self.store.break_down(error)
        self.naps_left = naps

    async def _sleep(self, seconds: float) -> None:
        if self.naps_left is not None:
            self.naps_left -= 1
            if self.naps_left == 0:
                self.store.recover()

    def _load(self, folder: str) -> Any:
        self.loaded.append(folder)
        return self.engine

    async def events(self, request: GenerationRequest) -> list[dict[str, Any]]:
        work = GenerationWork(ID, "matt", request.as_json())
        return [event async for event in self.service.generate(work)]


def request(**fields: Any) -> GenerationRequest:
    loras = fields.pop("loras", ())
    values = {"prompts": ("a cat",), "model": "tiny", "seed": 5, "width": 16, "height": 16, **fields}
    return GenerationRequest(spec=GenerateSpec(**values), loras=loras)


def lora(data: bytes = b"weights", key: str = KEY, scale: float = 1.0) -> ResolvedLora:
    return ResolvedLora(id="train_0123456789ab", key=key, sha256=hashlib.sha256(data).hexdigest(), scale=scale)


@pytest.fixture
def replica(tmp_path: Path) -> Replica:
    return Replica(tmp_path / "loras")


async def test_progress_comes_before_the_output_and_the_output_last(replica: Replica) -> None:
    events = await replica.events(request())
    assert [event["progress"]["stage"] for event in events[:-1]] == ["denoising", "denoising", "storing"]
    assert set(events[-1]) == {"output"}


@pytest.mark.parametrize(
    ("kind", "content_type"), [("png", "image/png"), ("jpg", "image/jpeg"), ("webp", "image/webp")]
)
async def test_what_the_output_names_is_stored_with_its_digest(replica: Replica, kind: str, content_type: str) -> None:
    [image] = (await replica.events(request(output_format=kind)))[-1]["output"]["images"]
    data = await replica.store.get(image["key"], expected_sha256=image["sha256"])
    assert (image["size_bytes"], image["content_type"]) == (len(data), content_type)
    assert (image["filename"], image["seed"], image["width"]) == (f"{ID}_0000.{kind}", 5, 16)
    assert image["key"] == keys_of("matt").image(ID, 0, image["sha256"], kind)
    settings = read_settings(data)
    assert settings is not None
    assert settings["prompt"] == "a cat"


@pytest.mark.parametrize(
    ("by", "name"),
    [
        ({"id": "train_0123456789ab"}, "train_0123456789ab"),
        ({"id": None, "path": "s3://bucket/raylora/matt/a.safetensors"}, "s3://bucket/raylora/matt/a.safetensors"),
        ({"id": None}, "raylora/matt/a.safetensors"),
    ],
)
def test_the_settings_call_an_adapter_what_the_client_called_it(by: dict[str, Any], name: str) -> None:
    used = ResolvedLora(**by, key="raylora/matt/a.safetensors", sha256=None, scale=1.0)
    [picture] = requested_pictures(request(loras=(used,)), [Path("/cache/0f3a.safetensors")])
    assert picture.settings()["loras"] == [{"name": name, "scale": 1.0}]


def test_each_picture_has_the_next_seed_over_all_prompts() -> None:
    pictures = requested_pictures(request(prompts=("a", "b"), num_images=2), [])
    assert [(p.prompt, p.seed) for p in pictures] == [("a", 5), ("a", 6), ("b", 7), ("b", 8)]


def test_the_last_seed_is_followed_by_the_first() -> None:
    pictures = requested_pictures(request(num_images=2, seed=2**63 - 1), [])
    assert [p.seed for p in pictures] == [2**63 - 1, 0]


async def test_adapters_are_fetched_verified_and_handed_over_with_their_scale(replica: Replica) -> None:
    await replica.store.put(KEY, b"weights")
    await replica.events(request(loras=(lora(scale=0.5),)))
    [used] = replica.engine.seen[0].loras
    assert (used.path.read_bytes(), used.scale, used.name) == (b"weights", 0.5, "train_0123456789ab")


async def test_an_adapter_with_other_bytes_is_not_used(replica: Replica) -> None:
    await replica.store.put(KEY, b"tampered")
    with pytest.raises(IntegrityError):
        await replica.events(request(loras=(lora(),)))
    assert replica.engine.seen == []


async def test_an_adapter_is_fetched_once_however_many_ask(replica: Replica) -> None:
    await replica.store.put(KEY, b"weights")
    held = replica.store.hold("download_file")
    calls = [asyncio.create_task(replica.events(request(loras=(lora(),)))) for _ in range(3)]
    while not replica.store.calls["download_file"]:  # noqa: ASYNC110 the store has no event for it
        await asyncio.sleep(0)
    calls[0].cancel()
    held.set()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert all(isinstance(result, list) for result in results[1:])
    assert replica.store.calls["download_file"] == 1


async def test_a_failed_download_is_tried_again_by_the_next_request(replica: Replica) -> None:
    await replica.store.put(KEY, b"weights")
    replica.store.fail("download_file", *[StorageFailed("download_file", 4, "connection")] * 2)
    with pytest.raises(StorageFailed):
        await replica.events(request(loras=(lora(),)))
    assert await replica.events(request(loras=(lora(),)))


async def test_the_least_recently_used_adapter_makes_room_but_never_one_in_use(tmp_path: Path) -> None:
    store = InMemoryStore()
    cache = LoraCache(store, tmp_path, bytes_max=100)
    all_loras = []
    for name in "abc":
        key = KEY.replace("a.safetensors", f"{name}.safetensors")
        await store.put(key, name.encode() * 60)
        all_loras.append(lora(name.encode() * 60, key))
    a, b, c = all_loras
    async with cache.borrow([a]) as [path_a]:
        async with cache.borrow([b]):
            pass
        assert path_a.exists()
        assert not (tmp_path / file_name(b)).exists()
    async with cache.borrow([c]) as [path_c]:
        assert path_c.exists()
    assert not path_a.exists()
    assert path_c.exists()


async def test_cancelling_stops_the_engine_before_the_files_are_let_go(replica: Replica) -> None:
    await replica.store.put(KEY, b"weights")
    replica.engine.gate = threading.Event()
    call = asyncio.create_task(replica.events(request(loras=(lora(),))))
    await asyncio.to_thread(replica.engine.at_work.wait)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert replica.engine.ended_by_request
    assert replica.engine.files == [b"weights"]
    assert await replica.store.list(keys_of("matt").images_prefix(ID)) == []


async def test_closing_the_stream_stops_the_engine_too(replica: Replica) -> None:
    replica.engine.gate = threading.Event()
    events = replica.service.generate(GenerationWork(ID, "matt", request().as_json()))
    await anext(events)
    await events.aclose()
    assert replica.engine.ended_by_request


async def test_the_engines_own_errors_come_out(replica: Replica) -> None:
    replica.engine.error = SizeNotSupported(16, 17, 8)
    with pytest.raises(SizeNotSupported):
        await replica.events(request())


async def test_a_picture_that_is_not_stored_though_the_storage_answers_is_a_failure(replica: Replica) -> None:
    replica.store.fail("put", *[StorageFailed("put", 4, "connection")] * 2)
    with pytest.raises(StorageFailed):
        await replica.events(request())


@pytest.mark.parametrize(
    "error",
    [StorageUnavailable("put", 60.0), StorageTimeout("put", 120.0), StorageFailed("put", 4, "connection")],
    ids=lambda error: error.code,
)
async def test_pictures_that_are_made_wait_for_the_storage_and_are_not_made_again(
    replica: Replica, error: StorageError
) -> None:
    replica.away(error, naps=20)
    events = await replica.events(request())
    stages = [event["progress"]["stage"] for event in events if "progress" in event]
    assert stages.count("waiting for storage") == 20
    assert stages[-1] == "storing"
    [entry] = events[-1]["output"]["images"]
    assert await replica.store.exists(entry["key"])
    assert len(replica.engine.seen) == 1


async def test_an_adapter_that_cannot_be_had_while_the_storage_is_away_is_waited_for(replica: Replica) -> None:
    await replica.store.put(KEY, b"weights")
    replica.away(StorageUnavailable("download_file", 60.0), naps=20)
    events = await replica.events(request(loras=(lora(),)))
    assert events[0]["progress"]["stage"] == "waiting for storage"
    assert "output" in events[-1]


async def test_a_generation_that_waits_for_the_storage_can_be_stopped(replica: Replica) -> None:
    replica.away(StorageUnavailable("put", 60.0), naps=None)
    events = replica.service.generate(GenerationWork(ID, "matt", request().as_json()))
    async for event in events:
        if event["progress"]["stage"] == "waiting for storage":
            break
    await events.aclose()
    replica.store.recover()
    assert replica.store.keys() == []


async def test_a_model_is_loaded_once_and_makes_room_for_another(replica: Replica) -> None:
    await replica.service.load("tiny")
    await replica.events(request())
    assert replica.loaded == ["/models/tiny"]
    await replica.events(request(model="other"))
    assert (await replica.service.health()).models_loaded == ("other",)
    assert replica.engine.closed


async def test_a_model_that_does_not_fit_is_refused_with_the_numbers_and_loads_when_it_does(replica: Replica) -> None:
    replica.free_bytes = 4000
    with pytest.raises(InsufficientMemory) as caught:
        await replica.events(request())
    assert (caught.value.needed_bytes, caught.value.free_bytes) == (5000, 4000)
    assert replica.shelf.loaded == ()
    replica.free_bytes = 6000
    assert await replica.events(request())


def test_a_model_that_does_not_fit_whole_is_loaded_by_the_last_resort_where_its_parts_fit() -> None:
    loaded: list[str] = []
    free_bytes = 6000

    def load(way: str) -> Any:
        def note(folder: str) -> ScriptedEngine:
            loaded.append(way)
            return ScriptedEngine()

        return note

    shelf = EngineShelf(
        {"tiny": "/models/tiny"},
        load("whole"),
        memory=lambda: Memory(free_bytes, 10_000),
        needed_bytes=lambda folder: 5000,
        last_resort=LastResort(load("in parts"), lambda folder: 2000),
    )
    shelf.load("tiny")
    assert loaded == ["whole"]
    assert shelf._evict()
    free_bytes = 3000
    shelf.load("tiny")
    assert loaded == ["whole", "in parts"]
    assert shelf._evict()
    free_bytes = 1000
    with pytest.raises(InsufficientMemory) as caught:
        shelf.load("tiny")
    assert caught.value.needed_bytes == 2000


def test_a_model_in_use_makes_room_for_no_other(replica: Replica) -> None:
    with replica.shelf.using("tiny"):
        replica.free_bytes = 4000
        with pytest.raises(InsufficientMemory):
            replica.shelf.load("other")
        assert replica.shelf.loaded == ("tiny",)


async def test_generations_of_one_replica_are_in_the_engine_at_the_same_time(replica: Replica) -> None:
    replica.engine.gate = threading.Event()
    calls = [asyncio.create_task(replica.events(request(seed=seed))) for seed in range(3)]
    while len(replica.engine.seen) < 3:  # noqa: ASYNC110 the scripted engine runs on other threads
        await asyncio.sleep(0.001)
    replica.engine.gate.set()
    finished = await asyncio.gather(*calls)
    assert all(events[-1]["output"] for events in finished)
    assert replica.loaded == ["/models/tiny"]


async def test_an_engine_whose_iteration_does_not_end_makes_the_replica_unhealthy(replica: Replica) -> None:
    await replica.service.load("tiny")
    assert (await replica.service.health()).ok
    replica.engine.iteration_lasts_s = 601.0
    assert not (await replica.service.health()).ok
