"""Everything that a worker needs before its first step: pictures, model, adapter, cache and checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from diffusion.adapter import ConvLora, TrainableLora, attach_lora
from diffusion.errors import SettingNotSupported
from diffusion.families import Family, Flux1, load_family
from diffusion.lora import read_factors, read_lora
from diffusion.lora_fit import fit_factors, fit_layers
from diffusion.lycoris_layers import Lycoris
from diffusion.quantized import Quantization, check_quantization
from diffusion.sharding import shard_denoiser
from train_jobs.artifacts import Artifacts, pinned_uploads
from train_jobs.cache import Encodings, TrainingCache, build_cache
from train_jobs.checkpoint import Checkpoint, read_checkpoint
from train_jobs.data import Picture, Use, choose_held_out, plan_uses, read_folder, same_pictures
from train_jobs.errors import NAMES_SHOWN_MAX, ConfigInvalid, ModelNotAvailable, Problem
from train_jobs.file_digests import FileDigests
from train_jobs.kept import Kept, digest_of_files, name_of
from train_jobs.models import resolve_model, weights_sha256
from train_jobs.peers import Peers
from train_jobs.previews import Previews, store_nowhere
from train_jobs.reporting import BEST_STEP
from train_jobs.sharing import together
from train_jobs.spec import DatasetSpec, NetworkSpec, OptimizeSpec, TrainSpec
from train_jobs.validation import Validation


@dataclass
class Prepared:
    """`uploads` are the dataset uploads used, by dataset name. `base_model_sha256` is `models.weights_sha256`, and None
    where this worker writes no adapter."""

    family: Family
    lora: TrainableLora
    cache: TrainingCache
    checkpoint: Checkpoint | None
    uploads: dict[str, str]
    previews: Previews
    validation: Validation | None
    base_model_sha256: str | None = None
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Pictures:
    """Read pictures by the dataset they came from, the validation's own last; `uploads` by dataset name."""

    datasets: tuple[tuple[DatasetSpec, list[Picture]], ...]
    uploads: dict[str, str] = field(default_factory=dict)


def read_pictures(spec: TrainSpec, artifacts: Artifacts, pins: Mapping[str, str]) -> Pictures:
    """Download and decode everything. Raises DatasetNotFound, DatasetEmpty, ImageUnreadable, StorageError."""
    found: list[tuple[DatasetSpec, list[Picture]]] = []
    uploads: dict[str, str] = {}
    for index, dataset in enumerate(spec.all_datasets):
        folder, manifest = artifacts.dataset(dataset, index, pins.get(dataset.label))
        uploads[dataset.label] = manifest.upload_id
        masks: Path | None = None
        if dataset.mask_dataset is not None:
            named = DatasetSpec(dataset=dataset.mask_dataset, upload_id=dataset.mask_upload_id)
            masks, manifest = artifacts.dataset(named, 1000 + index, pins.get(dataset.mask_dataset))
            uploads[dataset.mask_dataset] = manifest.upload_id
        found.append((dataset, read_folder(folder, dataset, masks)))
    return Pictures(tuple(found), uploads)


def warnings_of(pictures: Pictures) -> list[str]:
    """Pictures that are in a dataset more than once: usually a mistake, and trained on as often as they are there."""
    return [
        f"In dataset '{dataset.label}' these pictures are the same: {', '.join(names[:NAMES_SHOWN_MAX])}."
        for dataset, found in pictures.datasets
        for names in same_pictures(found)
    ]


def without_effect(spec: TrainSpec, family: Family) -> list[str]:
    """Settings that this model has no place for. Trainers' interfaces write `conv` into every model's config."""
    denoiser = next(iter(family.lora_components))
    warnings: list[str] = []
    if spec.network.conv_rank is not None and not family.conv_target_modules(denoiser):
        warnings.append("The network's conv rank had no effect: this model has no convolutions to adapt.")
    if spec.train.bypass_guidance_embedding and family.name != Flux1.name:
        warnings.append("Bypassing the guidance embedding had no effect: it is for FLUX.1.")
    return warnings


def plan_all_uses(spec: TrainSpec, pictures: Pictures, *, size_multiple: int) -> list[Use]:
    """Uses of all datasets; those held out for validation are marked."""
    uses: list[Use] = []
    validation, seed = spec.validation, spec.train.seed
    for index, (dataset, found) in enumerate(pictures.datasets):
        held_out: frozenset[str] = frozenset()
        if index >= len(spec.datasets):
            held_out = frozenset(picture.name for picture in found)
        elif validation is not None and validation.dataset is None and not dataset.is_regularisation:
            held_out = choose_held_out(found, validation.share, seed + index)
        uses += plan_uses(
            found, dataset, size_multiple=size_multiple, regularisation_weight=spec.train.regularisation_weight,
            held_out=held_out,
        )  # fmt: skip
    return uses


def load_model(
    spec: TrainSpec, models: Mapping[str, str], device: torch.device, *, paths_allowed: bool, workers: int = 1
) -> tuple[Family, TrainableLora]:
    """The CPU computes in float32: bf16 is slower there, and no better. With several workers that split the model, all
    of them must call this.

    Raises ModelNotAvailable, ModelNotFound, UnsupportedModel, SettingNotSupported.
    """
    train = spec.train
    is_half = train.dtype == "bf16" and device.type != "cpu"
    wanted = spec.quantize
    quantization = Quantization(wanted.denoiser, wanted.text_encoders, wanted.exclude) if wanted.is_on else None
    if quantization is not None:
        check_quantization()
    folder = resolve_model(spec.model, models, paths_allowed=paths_allowed)
    dtype = torch.bfloat16 if is_half else torch.float32
    is_split = train.strategy == "fsdp" and workers > 1
    loaded_on = torch.device("cpu") if is_split else device
    family = load_family(folder, device=loaded_on, dtype=dtype, quantization=quantization)
    if spec.family is not None and spec.family != family.name:
        raise ModelNotAvailable(spec.model, f"it is of the kind {family.name}, and the config says {spec.family}")
    family.bypasses_guidance = train.bypass_guidance_embedding
    lora = _attach(spec, family)
    if is_split:
        shard_denoiser(family, device, whole=lora.parameters())
    denoiser: Any = family.denoiser
    if train.gradient_checkpointing and device.type != "cpu":
        denoiser.enable_gradient_checkpointing()
    if train.compile:
        denoiser.compile_repeated_blocks(dynamic=True)
    return family, lora


def _attach(spec: TrainSpec, family: Family) -> TrainableLora:
    network = spec.network
    denoiser, *encoders = family.lora_components
    if spec.train.train_text_encoder and not encoders:
        raise SettingNotSupported("train_text_encoder", f"the text encoder of {family.name} cannot be trained here")
    lycoris, conv = _lycoris(network), None
    if family.conv_target_modules(denoiser):
        if lycoris is not None and lycoris.full_rank:
            conv = ConvLora(network.rank, network.alpha_effective)
        elif network.conv_rank is not None:
            conv = ConvLora(network.conv_rank, network.conv_alpha or float(network.conv_rank))
    return attach_lora(
        family,
        rank=network.rank,
        alpha=network.alpha_effective,
        dropout=network.dropout,
        dora=network.type == "dora",
        lycoris=lycoris,
        targets=network.targets,
        components=[denoiser, *_trained(spec.train, encoders)],
        seed=spec.train.seed,
        conv=conv,
        only_if_contains=network.only_if_contains,
        ignore_if_contains=network.ignore_if_contains,
        initial=network.initial,
    )


def _trained(train: OptimizeSpec, encoders: Sequence[str]) -> list[str]:
    numbered = enumerate(encoders, start=1)
    return [name for number, name in numbered if train.train_text_encoder and number in train.trained_text_encoders]


def _lycoris(network: NetworkSpec) -> Lycoris | None:
    if network.type == "lokr":
        return Lycoris("lokr", network.lokr_factor, network.lokr_full_rank)
    return Lycoris("loha") if network.type == "loha" else None


def begin_from(lora: TrainableLora, family: Family, path: Path) -> None:
    """Take the weights of an adapter file. It may have fewer layers and another alpha, but not another rank.

    Raises LoraInvalid, LoraMismatch, ConfigInvalid.
    """
    own = {name: tensor.clone() for name, tensor in lora.state_dict().items()}
    if lora.lycoris is not None:
        found = fit_factors(read_factors(path), family.lora_components)
        if any(key not in own or own[key].shape != tensor.shape for key, tensor in found.items()):
            raise _not_this_network()
        lora.load_state_dict(own | {key: tensor.to(own[key].dtype) for key, tensor in found.items()})
        return
    file = read_lora(path)
    if file.products:
        raise _not_this_network()
    scales = lora.scales()
    for component, layers in fit_layers(file, family.lora_components).items():
        for name, layer in layers.items():
            # B takes what the two alphas differ by, so that the training begins with the file's effect.
            scale = layer.alpha / layer.rank / scales.get(f"{component}.{name}", 1.0)
            parts = {"lora_A.weight": layer.A, "lora_B.weight": layer.B * scale}
            if layer.magnitude is not None:
                parts["lora_magnitude_vector"] = layer.magnitude
            for end, tensor in parts.items():
                key = f"{component}.{name}.{end}"
                if key not in own or own[key].shape != tensor.shape:
                    raise _not_this_network()
                own[key] = tensor.to(own[key].dtype)
    lora.load_state_dict(own)


def _not_this_network() -> ConfigInvalid:
    message = "this adapter's layers or rank differ from the network's"
    return ConfigInvalid([Problem("network.pretrained", message, "mismatch")])


@dataclass(frozen=True)
class _Loaded:
    """The model with its adapter, and what is known before anything is encoded."""

    family: Family
    lora: TrainableLora
    previews: Previews
    uses: list[Use]
    checkpoint: Checkpoint | None
    encodings: Encodings
    base_model_sha256: str | None


class Preparation:
    """Prepares in the order in which things can be found wrong, the cheap ones first."""

    def __init__(
        self,
        spec: TrainSpec,
        artifacts: Artifacts,
        device: torch.device,
        models: Mapping[str, str],
        *,
        scratch: Path,
        kept: Kept,
        digests: FileDigests,
        paths_allowed: bool,
        stage: Callable[..., None],
        should_stop: Callable[[], bool],
        peers: Peers,
    ) -> None:
        self._spec = spec
        self._artifacts = artifacts
        self._device = device
        self._models = models
        self._scratch = scratch
        self._kept = kept
        self._digests = digests
        self._paths_allowed = paths_allowed
        self._stage = stage
        self._should_stop = should_stop
        self._peers = peers

    def run(self) -> Prepared | None:
        """None when asked to stop. Raises what its parts raise, and on every worker what any of them raises."""
        self._stage("dataset")
        pictures, checkpoint_folder = together(self._peers, self._read)
        captioned = self._captioned(pictures)
        if captioned is None:
            return None
        pictures = captioned
        best = facts_of(checkpoint_folder).get(BEST_STEP)
        self._stage("model", **({} if best is None else {BEST_STEP: best}))
        loaded = together(self._peers, lambda: self._load(pictures, checkpoint_folder))
        cache = build_cache(
            loaded.family,
            loaded.uses,
            on_progress=lambda done, total: self._stage("caching", done=done, of=total),
            should_stop=self._should_stop,
            encodings=loaded.encodings,
            peers=self._peers,
        )
        self._kept.prune()
        if cache is None or self._should_stop():
            return None
        spec = self._spec
        watched = spec.validation
        warnings = [*warnings_of(pictures), *without_effect(spec, loaded.family)]
        validation = None if watched is None else Validation(watched, cache, batch_size=spec.train.batch_size)
        return Prepared(
            loaded.family, loaded.lora, cache, loaded.checkpoint, pictures.uploads, loaded.previews, validation,
            loaded.base_model_sha256, warnings,
        )  # fmt: skip

    def _read(self) -> tuple[Pictures, Path | None]:
        """The pictures, and the folder of the newest checkpoint."""
        folder = self._artifacts.newest_checkpoint()
        return read_pictures(self._spec, self._artifacts, pinned_uploads(facts_of(folder))), folder

    def _load(self, pictures: Pictures, checkpoint_folder: Path | None) -> _Loaded:
        spec = self._spec
        family, lora = load_model(
            spec, self._models, self._device, paths_allowed=self._paths_allowed, workers=self._peers.world_size
        )
        store = self._artifacts.store_sample if self._peers.rank == 0 else store_nowhere
        previews = Previews(
            family, lora, spec.sample, name=spec.name, scratch=self._scratch, store=store,
            is_split=spec.train.strategy == "fsdp" and self._peers.world_size > 1,
        )  # fmt: skip
        previews.check(family)
        uses = plan_all_uses(spec, pictures, size_multiple=family.size_multiple)
        checkpoint = None
        if checkpoint_folder is not None:
            checkpoint = read_checkpoint(checkpoint_folder, expected=dict(lora.named_parameters()))
        elif spec.network.pretrained is not None:
            pretrained = self._pretrained(spec.network.pretrained, spec.network.pretrained_sha256)
            begin_from(lora, family, pretrained)
        folder = resolve_model(spec.model, self._models, paths_allowed=self._paths_allowed)
        sha256 = weights_sha256(folder, self._digests.of) if self._peers.rank == 0 else None
        return _Loaded(family, lora, previews, uses, checkpoint, self._encodings(family, folder), sha256)

    def _captioned(self, pictures: Pictures) -> Pictures | None:
        """With the captions that were asked for; None when asked to stop."""
        captioning = self._spec.captioning
        if captioning is None:
            return pictures
        # Imported here because transformers' model classes are slow to import, and few trainings need these.
        from train_jobs.captioner import caption_all

        captioned = caption_all(
            captioning,
            pictures.datasets,
            kept=self._kept,
            models=self._models,
            device=self._device,
            paths_allowed=self._paths_allowed,
            on_progress=lambda done, total: self._stage("captioning", done=done, of=total),
            should_stop=self._should_stop,
            peers=self._peers,
        )
        return None if captioned is None else replace(pictures, datasets=captioned)

    def _encodings(self, family: Family, folder: Path) -> Encodings:
        """Of texts only where their encoders carry no adapter, which would have a part in them."""
        spec = self._spec
        model = [family.name, str(family.dtype), family.device.type]
        latents_by = name_of(*model, digest_of_files(folder, ["vae/*"], self._digests.of))
        if spec.train.train_text_encoder:
            return Encodings(self._kept, latents_by, None)
        rounded = spec.quantize.model_dump(mode="json", include={"text_encoders", "exclude"})
        parts = ["text_encoder*/*", "tokenizer*/*", "model_index.json"]
        texts = digest_of_files(folder, parts, self._digests.of)
        return Encodings(self._kept, latents_by, name_of(*model, rounded, texts))

    def _pretrained(self, name: str, sha256: str | None) -> Path:
        """A file on this machine only where a config of this machine's command line may name one."""
        if self._paths_allowed and Path(name).is_file():
            return Path(name)
        return self._artifacts.fetch_lora(name, expected_sha256=sha256)


def facts_of(folder: Path | None) -> Mapping[str, Any]:
    """The facts stored in a checkpoint; a damaged one is reported later, when it is read in whole."""
    if folder is None:
        return {}
    try:
        facts = json.loads((folder / "state.json").read_text())["facts"]
    except (ValueError, KeyError, TypeError):
        return {}
    return facts if isinstance(facts, dict) else {}
