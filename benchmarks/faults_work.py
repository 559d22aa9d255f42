"""The work that `faults.py` gives an instance, and what of it was acknowledged."""

from __future__ import annotations

import base64
import io
import random
from dataclasses import dataclass, field
from typing import Any

from faults_instance import FINAL, Client, sha256_of
from PIL import Image

from tests.integration.instance import REPOSITORY, training_config

PICTURES = sorted((REPOSITORY / "examples" / "zib" / "images").iterdir())
STEPS, SAVE_EVERY = 8, 4


@dataclass
class Job:
    """Something that was acknowledged: a RunPod job by its id, or an upload by what was sent. `reply`: its end, where
    the answer to its own request was that already."""

    id: str
    what: str
    sent: dict[str, str] = field(default_factory=dict)
    pictures: int = 0
    reply: dict[str, Any] | None = None
    ends: list[str] = field(default_factory=list)


class Work:
    """Submits generations, trainings and uploads; `jobs` are those that were acknowledged.

    `large` are the files of an upload that takes long to check.
    """

    def __init__(self, client: Client, chance: random.Random, large: list[tuple[str, bytes]]) -> None:
        self._client, self._random, self._large = client, chance, large
        self.jobs: list[Job] = []

    def submit_generation(self, *, steps: int) -> None:
        answer = self._client.run(**self.generation(steps), wait=True)
        if answer.kind == "ok":
            self.jobs.append(Job(answer.body["id"], "generation", pictures=2))

    def generate_and_wait(self, steps: int) -> None:
        """A request that is under way when the blow falls. Refused or broken off, it was never acknowledged."""
        answer = self._client.run(wait_s=60.0, **self.generation(steps))
        if answer.kind == "ok":
            job = Job(answer.body["id"], "generation", pictures=2)
            if answer.body["status"] in FINAL:
                job.reply = answer.body
            self.jobs.append(job)

    def generation(self, steps: int) -> dict[str, Any]:
        size = {"width": 64, "height": 64, "num_images": 2, "num_inference_steps": steps}
        return {"prompt": "a red star", "seed": self._random.randrange(2**31), **size}

    def submit_training(self) -> None:
        name = f"t{self._random.randrange(10**9)}"
        config = training_config(name=name, steps=STEPS, save_every=SAVE_EVERY)
        answer = self._client.run(type="train", config=config, wait=True)
        if answer.kind == "ok":
            self.jobs.append(Job(answer.body["id"], "training"))

    def some_pictures(self, count: int) -> tuple[str, list[tuple[str, bytes]]]:
        chosen = self._random.sample([p for p in PICTURES if p.suffix == ".png"], count)
        return f"d{self._random.randrange(10**9)}", [(path.name, path.read_bytes()) for path in chosen]

    def upload_inline(self) -> None:
        name, files = self.some_pictures(8)
        self.uploaded(self._client.run(wait_s=60.0, type="upload_training_data", **inline(name, files)), files)

    def upload_by_run(self) -> None:
        """Large enough that `/run` answers before the upload has ended."""
        name, files = f"d{self._random.randrange(10**9)}", self._large
        self.uploaded(self._client.run(type="upload_training_data", **inline(name, files)), files)

    def upload_presigned(self) -> None:
        name, files = self.some_pictures(4)
        told = [{"filename": n, "size": len(d), "sha256": sha256_of(d), "content_type": "image/png"} for n, d in files]
        answer = self._client.run(wait_s=60.0, type="create_upload", training_name=name, files=told)
        output = answer.body.get("output") or {}
        if answer.body.get("status") != "COMPLETED":
            return
        for place, (_, data) in zip(output["files"], files, strict=True):
            if not self._client.put(place["url"], data, place["headers"]):
                return
        self.uploaded(self._client.run(wait_s=60.0, type="finalize_upload", token=output["token"]), files)

    def uploaded(self, answer: Any, files: list[tuple[str, bytes]]) -> None:
        if answer.kind != "ok":
            return
        job = Job(answer.body["id"], "upload", sent={name: sha256_of(data) for name, data in files})
        if answer.body["status"] in FINAL:
            job.reply = answer.body
        self.jobs.append(job)

    def generate_now(self) -> bool:
        """Whether a short generation was done within its own request."""
        answer = self._client.run(wait_s=20.0, **self.generation(1))
        if answer.kind != "ok" or answer.body["status"] != "COMPLETED":
            return False
        self.jobs.append(Job(answer.body["id"], "generation", pictures=2, reply=answer.body))
        return True

    def upload_now(self) -> bool:
        """Whether a small upload was done within its own request."""
        name, files = self.some_pictures(2)
        answer = self._client.run(wait_s=20.0, type="upload_training_data", **inline(name, files))
        if answer.kind != "ok" or answer.body["status"] != "COMPLETED":
            return False
        self.uploaded(answer, files)
        return True


def large_picture(number: int) -> bytes:
    """A PNG of few bytes that takes long to decode."""
    data = io.BytesIO()
    Image.linear_gradient("L").resize((3600, 3600)).rotate(number).convert("RGB").save(data, "png")
    return data.getvalue()


def inline(name: str, files: list[tuple[str, bytes]]) -> dict[str, Any]:
    content = [{"filename": filename, "content": base64.b64encode(data).decode()} for filename, data in files]
    return {"training_name": name, "dataset_folder": name, "files": content}
