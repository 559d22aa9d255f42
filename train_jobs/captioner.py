"""Captions for pictures that have none, by an image-to-text model that the request names, through transformers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from diffusion.images import read_image
from train_jobs.data import Picture, caption_of, on_white, own_text
from train_jobs.errors import ModelNotAvailable
from train_jobs.kept import Kept, digest_of_file, digest_of_files, name_of
from train_jobs.models import resolve_model
from train_jobs.peers import Alone, Peers
from train_jobs.sharing import share_out, together
from train_jobs.spec import PROMPT_MAX, CaptioningSpec, DatasetSpec

logger = logging.getLogger(__name__)

CAPTIONS = "captions"
VERSION = 2
"""Of what a caption depends on besides its inputs: 2 since pictures of 16 bits are read as they are."""
FLORENCE_TASK = "<DETAILED_CAPTION>"
"""What a model of the Florence-2 kind is asked unless told otherwise: it knows tasks by such names."""
CHAT_PROMPT = "Describe this picture in one sentence."
MODEL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors"]
Pictures = tuple[tuple[DatasetSpec, list[Picture]], ...]


class Captioner:
    """One loaded model. Raises ModelNotAvailable for a folder that holds none of this kind."""

    def __init__(self, spec: CaptioningSpec, folder: Path, device: torch.device) -> None:
        self._spec = spec
        self._device = device
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        try:
            self._processor: Any = _processor(folder)
            model: Any = AutoModelForImageTextToText.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=dtype
            )
        except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
            logger.warning("the captioning model cannot be loaded: %s", type(error).__name__)
            raise ModelNotAvailable(spec.model, "it cannot be read as a model that captions pictures") from error
        self._model: Any = model.to(device).eval()

    @torch.no_grad()
    def caption(self, path: Path) -> str:
        """What the model says, its first choice of words, in one line."""
        inputs = self._inputs(on_white(read_image(path))).to(self._device)
        inputs = {k: v.to(self._model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        ids_1L = self._model.generate(**inputs, do_sample=False, max_new_tokens=self._spec.max_new_tokens)
        return " ".join(self._processor.decode(self._new_tokens(ids_1L, inputs), skip_special_tokens=True).split())

    def _inputs(self, image: Image.Image) -> Any:
        prompt = self._spec.prompt
        if prompt is None and hasattr(self._processor, "task_prompts_without_inputs"):
            prompt = FLORENCE_TASK
        if getattr(self._processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": prompt or CHAT_PROMPT}]
            asked = self._processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
            return self._processor(images=[image], text=[asked], return_tensors="pt")
        return self._processor(images=image, text=prompt or "", return_tensors="pt")

    @staticmethod
    def _new_tokens(ids_1L: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Some models answer with the question in front."""
        ids_L, asked_L = ids_1L[0], inputs["input_ids"][0]
        repeats = len(ids_L) >= len(asked_L) and torch.equal(ids_L[: len(asked_L)], asked_L)
        return ids_L[len(asked_L) :] if repeats else ids_L


def _processor(folder: Path) -> Any:
    """The model's own; where torchvision is missing, which only its part for videos needs, without that part."""
    try:
        return AutoProcessor.from_pretrained(folder, local_files_only=True)
    except ImportError:
        if find_spec("torchvision") is not None:
            raise
    kind = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
    whole: Any = getattr(transformers, str(PROCESSOR_MAPPING_NAMES[kind]))
    parts = [part for part in whole.get_attributes() if part != "video_processor"]
    still: Any = type(whole.__name__, (whole,), {"get_attributes": classmethod(lambda _: parts)})
    return still.from_pretrained(folder, local_files_only=True)


def caption_all(
    spec: CaptioningSpec,
    pictures: Pictures,
    *,
    kept: Kept,
    models: Mapping[str, str],
    device: torch.device,
    paths_allowed: bool,
    on_progress: Callable[[int, int], None],
    should_stop: Callable[[], bool] | None,
    peers: Peers | None = None,
) -> Pictures | None:
    """The pictures with captions where they had none, or with `overwrite` all of them. None when asked to stop.

    What was said of a picture before, in this run or another, is not asked again; of several workers one asks. Raises
    ModelNotAvailable and StorageError.
    """
    peers = peers or Alone()
    wanted = [p for dataset, found in pictures for p in found if spec.overwrite or not own_text(p.path, dataset)]
    if not wanted:
        return pictures

    def find() -> tuple[Path, list[str]]:
        folder = resolve_model(spec.model, models, paths_allowed=paths_allowed, files=MODEL_FILES)
        asked = [VERSION, digest_of_files(folder, MODEL_FILES), spec.prompt, spec.max_new_tokens]
        return folder, [name_of(*asked, digest_of_file(picture.path)) for picture in wanted]

    folder, names = together(peers, find)
    paths = {name: picture.path for name, picture in zip(names, wanted, strict=True)}
    captioners: list[Captioner] = []

    def make(batch: Sequence[str]) -> dict[str, str]:
        if not captioners:
            captioners.append(Captioner(spec, folder, device))
        texts = {name: captioners[0].caption(paths[name]) for name in batch}
        kept.keep(CAPTIONS, {name: text.encode() for name, text in texts.items()})
        return texts

    texts = share_out(
        peers,
        list(paths),
        fetch=lambda own: {name: data.decode() for name, data in kept.fetch(CAPTIONS, own).items()},
        batches=lambda missing: [[name] for name in missing],
        make=make,
        on_done=lambda done: on_progress(done, len(paths)),
        should_stop=should_stop,
    )
    if texts is None:
        return None
    said = {picture.path: texts[name] for name, picture in zip(names, wanted, strict=True)}
    return tuple((dataset, _with_captions(found, dataset, said, spec)) for dataset, found in pictures)


def _with_captions(
    pictures: Sequence[Picture], dataset: DatasetSpec, said: Mapping[Path, str], spec: CaptioningSpec
) -> list[Picture]:
    captioned: list[Picture] = []
    for picture in pictures:
        if said.get(picture.path):
            text = f"{spec.prefix}{said[picture.path]}{spec.suffix}"[:PROMPT_MAX].strip()
            picture = replace(picture, text=text, caption=caption_of(text, dataset))
        captioned.append(picture)
    return captioned
