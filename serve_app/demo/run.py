"""Starts an instance of its own, trains a LoRA over HTTP, draws before and after, reports, and ends the instance."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

from serve_app.cli.client import ApiClient, ApiError
from serve_app.cli.patience import Patience
from serve_app.cli.progress import training_progress
from serve_app.cli.trainings import prepare_training
from serve_app.demo.measure import distance_to_set, rms_distance
from serve_app.demo.report import Report, Row, write_report
from serve_app.settings import Settings
from serve_app.stack import control
from serve_app.stack.instance import Instance
from serve_app.stack.ports import any_free
from storage.listening import url_of

logger = logging.getLogger(__name__)

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = REPOSITORY / "examples" / "zib" / "train.yaml"
PICTURES = REPOSITORY / "examples" / "zib" / "images"
HOME_FOLDER = "demo"
LOOPBACK = "127.0.0.1"

NEW_WORD = tuple(f"a zib on a {colour} background" for colour in ("red", "blue", "green", "white", "yellow", "black"))
OLD_WORDS = (
    "a large yellow star on a blue background in the center",
    "a small red circle on a white background on the left",
    "a green square on a black background",
    "a large white ring on a red background",
    "an orange cross on a purple background",
    "a blue triangle on a yellow background at the top",
)
STEPS, GUIDANCE = 25, 3.0
UNFINISHED = frozenset({"starting", "running"})
# The bar the demo holds itself to: the LoRA brings pictures at least this much nearer to the training pictures.
DISTANCE_RATIO_MAX = 0.5


@dataclass(frozen=True)
class Drawn:
    """Pictures of the new word and of the old ones, by the same prompts and seeds each time."""

    new: tuple[Image.Image, ...]
    old: tuple[Image.Image, ...]


def surroundings(settings: Settings) -> dict[str, str]:
    """Variables for the demo's instance: its data beside the code, or below the folder where data were said to be; its
    ports on loopback, and none of an instance that runs already."""
    base = settings.home if "home" in settings.model_fields_set else REPOSITORY / ".raylora"
    own = {
        "RAYLORA_HOME": str(base / HOME_FOLDER), "RAYLORA_HOST": LOOPBACK, "RAYLORA_PORT": str(any_free()),
        "RAYLORA_DASHBOARD_PORT": str(any_free()),
    }  # fmt: skip
    if settings.uses_embedded_s3():
        port = any_free()
        own |= {"RAYLORA_S3_HOST": LOOPBACK, "RAYLORA_S3_PORT": str(port)}
        own |= {"RAYLORA_S3_PUBLIC_ENDPOINT_URL": url_of(LOOPBACK, port)}
    return own


@contextmanager
def running_instance(environment: dict[str, str], console: Console) -> Iterator[tuple[str, str]]:
    """An instance with these variables that lives as long as the block or this process: (URL, API key)."""
    instance = Instance(Path(environment["RAYLORA_HOME"]))
    control.stop(instance, missing_ok=True)
    instance.prepare()
    key, _ = instance.ensure_api_key(None)
    try:
        with console.status("starting") as status:
            state = control.start(
                instance, while_pid=os.getpid(), environment=environment, on_stage=lambda stage: status.update(stage)
            )
        yield state.http_url, key.get_secret_value()
    finally:
        console.print("ending what was started")
        control.stop(instance, missing_ok=True)


def draw(client: ApiClient, prompts: tuple[str, ...], lora: str | None, folder: Path) -> tuple[Image.Image, ...]:
    """One picture for each prompt, its place as the seed, fetched through presigned URLs into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)

    def one(index: int) -> Image.Image:
        reply = client.start(
            "generate", prompt=prompts[index], seed=100 + index, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
            loras=[{"id": lora, "scale": 1.0}] if lora else [], wait=True,
        )  # fmt: skip
        target = folder / f"{index:02d}.png"
        client.fetch(reply["images"][0]["url"], target)
        with Image.open(target) as image:
            return image.convert("RGB")

    # All at once: the engine draws them as one batch.
    with ThreadPoolExecutor(len(prompts)) as pool:
        return tuple(pool.map(one, range(len(prompts))))


def draw_all(client: ApiClient, lora: str | None, folder: Path) -> Drawn:
    pictures = draw(client, NEW_WORD + OLD_WORDS, lora, folder)
    return Drawn(pictures[: len(NEW_WORD)], pictures[len(NEW_WORD) :])


def train(client: ApiClient, console: Console) -> tuple[dict[str, Any], tuple[tuple[int, float], ...]]:
    """Upload the data set, train, and return the process object with the loss as it was reported."""
    body = prepare_training(client, CONFIG, on_upload=console.print)
    process_id = client.start("train", config=body)["process_id"]
    console.print(f"training {process_id}")
    loss: dict[int, float] = {}

    def noted(show: Callable[[dict[str, Any]], None], process: dict[str, Any]) -> None:
        show(process)
        value = (process.get("metrics") or {}).get("loss")
        if process.get("step") and isinstance(value, int | float):
            loss[int(process["step"])] = float(value)

    with training_progress(console) as show:
        process = client.follow(process_id, lambda process: noted(show, process))
    if process["status"] != "completed":
        raise ApiError("training_failed", f"The training is {process['status']}: {process.get('error')}")
    return process, tuple(sorted(loss.items()))


def cancel_leftovers(client: ApiClient) -> None:
    """End what a demo that was broken off left queued or running: it would go on and take this one's time."""
    for process in client.processes(1000):
        if process["status"] in UNFINISHED:
            try:
                client.call("cancel", process_id=process["id"])
            except ApiError as exc:
                # It may have ended by itself in between; anything else shows in what follows.
                logger.info("%s was not cancelled: %s", process["id"], exc.code)


def training_pictures() -> dict[str, Image.Image]:
    pictures = {}
    for file in sorted(PICTURES.glob("zib_*.png")):
        with Image.open(file) as image:
            pictures[file.stem] = image.convert("RGB")
    return pictures


def run_demo(output: Path, settings: Settings, console: Console) -> dict[str, Any]:
    """Do the main job, with results in the folder `output`, and return what was found.

    Raises ApiError (also below the bar) or InstanceError.
    """
    started_at = time.monotonic()
    where = surroundings(settings)
    with (
        running_instance(where, console) as (url, key),
        ApiClient(url, key, patience=Patience(console.print)) as client,
    ):
        ready_s = time.monotonic() - started_at
        console.print(f"ready on {url} after {ready_s:.0f} s")
        cancel_leftovers(client)
        before = draw_all(client, None, output / "before")
        process, loss = train(client, console)
        after = draw_all(client, process["id"], output / "after")
        lora = client.call("download", process_id=process["id"])
        lora_file = output / Path(lora["filename"]).name
        client.fetch(lora["url"], lora_file)
    references = training_pictures()
    distance_before = distance_to_set(before.new, tuple(references.values()))
    distance_after = distance_to_set(after.new, tuple(references.values()))
    drift = sum(map(rms_distance, before.old, after.old)) / len(before.old)
    facts = (
        ("model", "tiny, shipped with the project"),
        ("training", f"{process['total_steps']} steps, id {process['id']}"),
        ("RMS distance to the nearest training picture", f"{distance_before:.3f} before, {distance_after:.3f} after"),
        ("RMS change of pictures without the word", f"{drift:.3f}"),
        ("LoRA", f"{lora_file.name}, {lora_file.stat().st_size / 1e3:.0f} kB"),
        ("time", f"{time.monotonic() - started_at:.0f} s in all, {ready_s:.0f} s of it to start"),
    )  # fmt: skip
    rows = (
        Row("training pictures", tuple(references.values())[::2]),
        Row("'a zib on a ... background' before the training", before.new),
        Row("the same prompts and seeds after it", after.new),
        Row("other prompts before", before.old),
        Row("other prompts with the LoRA", after.old),
    )
    sheet, page = write_report(Report("A LoRA in a few minutes", rows, loss, facts), output)
    for name, value in facts:
        console.print(f"{name}: {value}")
    console.print(f"contact sheet {sheet}\npage          {page}\nLoRA          {lora_file}")
    result = {
        "contact_sheet": str(sheet), "page": str(page), "lora": str(lora_file), "process_id": process["id"],
        "distance_before": distance_before, "distance_after": distance_after, "drift_other_prompts": drift,
    }  # fmt: skip
    if distance_after > DISTANCE_RATIO_MAX * distance_before:
        raise ApiError(
            "demo_below_bar",
            f"The LoRA brought the pictures to {distance_after / distance_before:.2f} of the distance; "
            f"{DISTANCE_RATIO_MAX} or less was expected.",
        )
    return result
