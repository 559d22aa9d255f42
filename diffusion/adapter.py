"""Trainable layers on a family's modules, through peft: LoRA, DoRA, LoKr and LoHa."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, TypeAlias

import torch
from peft import (
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from diffusion.errors import LoraMismatch, SettingNotSupported
from diffusion.families.base import Family, LoraTargets
from diffusion.lora_settings import ADAPTER_METADATA_KEY
from diffusion.lycoris_layers import Lycoris, alphas, check_ranks, settle_scales, use_products

AnyConfig: TypeAlias = LoraConfig | LoKrConfig | LoHaConfig
InitialWeights = Literal["gaussian", "uniform"]
TRAINING_ADAPTER = "trainee"  # peft keeps adapters in ModuleDicts, where "training" is taken


def adapter_layers(component: nn.Module) -> Iterator[Any]:
    """peft's wrapped layers in ``component``."""
    return (module for module in component.modules() if isinstance(module, BaseTunerLayer))


def inject_adapter(
    component: nn.Module, adapter_name: str, config: AnyConfig, state: Mapping[str, Tensor] | None = None
) -> None:
    """Wrap the target layers. With ``state`` (peft names) its layers are the targets and it gives the weights."""
    with warnings.catch_warnings():
        # peft wonders at a second adapter on one module; here that is the normal case.
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        # Of rounded layers, which would need it to merge; nothing here merges.
        warnings.filterwarnings("ignore", message=".*instantiated without `get_apply_tensor_subclass`")
        # Without low_cpu_mem_usage peft would first draw random weights, from the generator that training uses.
        options = {"state_dict": state, "low_cpu_mem_usage": True} if state is not None else {}
        inject_adapter_in_model(config, component, adapter_name=adapter_name, **options)
    if state is not None:
        set_peft_model_state_dict(component, state, adapter_name=adapter_name, low_cpu_mem_usage=True)


def remove_adapter(component: nn.Module, adapter_name: str) -> None:
    """Delete one adapter; layers left without any are unwrapped, so the module is what it was before."""
    peft_config: dict[str, Any] = getattr(component, "peft_config", {})
    if adapter_name not in peft_config:
        return
    del peft_config[adapter_name]
    wrapped = [(n, m) for n, m in component.named_modules() if isinstance(m, BaseTunerLayer)]
    for path, layer in wrapped:
        if layer.active_adapters == [adapter_name]:
            layer.set_adapter([])  # else peft activates another one by itself, with a warning
        layer.delete_adapter(adapter_name)
        if not layer._all_available_adapter_names():
            parent_path, _, child = path.rpartition(".")
            setattr(component.get_submodule(parent_path), child, layer.get_base_layer())
    if not peft_config:
        del component.peft_config


@dataclass(frozen=True)
class ConvLora:
    """Rank and alpha of the layers on convolutions."""

    rank: int
    alpha: float


class TrainableLora:
    """Layers being trained. Made by ``attach_lora``; the family's own weights stay frozen.

    ``lycoris`` is None for LoRA and DoRA.
    """

    def __init__(
        self, family: Family, components: Sequence[str], rank: int, alpha: float, configs: Mapping[str, AnyConfig],
        lycoris: Lycoris | None = None,
    ) -> None:  # fmt: skip
        self._family = family
        self.components = tuple(components)
        self.rank, self.alpha = rank, alpha
        self.lycoris = lycoris
        self._configs = dict(configs)

    def _modules(self) -> Iterator[tuple[str, nn.Module]]:
        return ((name, self._family.lora_components[name]) for name in self.components)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """float32, in a fixed order, under the names of ``state_dict``."""
        mark = f".{TRAINING_ADAPTER}"
        for component, module in self._modules():
            for name, parameter in module.named_parameters():
                if f"{mark}." in f"{name}.":
                    yield f"{component}.{name.replace(mark, '')}", parameter

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self.named_parameters()]

    def set_dropout(self, on: bool) -> None:
        """Of the adapter's own layers; the modules stay in eval mode."""
        for _, module in self._modules():
            for layer in adapter_layers(module):
                dropout = getattr(layer, "lora_dropout", {})
                if TRAINING_ADAPTER in dropout:
                    dropout[TRAINING_ADAPTER].train(on)

    def scales(self) -> dict[str, float]:
        """alpha / rank by ``<component>.<module path>``."""
        return {
            f"{component}.{path}": float(layer.scaling[TRAINING_ADAPTER])
            for component, module in self._modules()
            for path, layer in module.named_modules()
            if isinstance(layer, BaseTunerLayer) and TRAINING_ADAPTER in layer.scaling
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Detached views, by diffusers key names (``unet.<module>.lora_A.weight``)."""
        return {
            f"{component}.{key}": tensor.detach()
            for component, module in self._modules()
            for key, tensor in get_peft_model_state_dict(module, adapter_name=TRAINING_ADAPTER).items()
        }

    def file_state(self) -> dict[str, Tensor]:
        """What ``save_lora`` writes: ``state_dict`` and, for LoKr and LoHa, each layer's alpha."""
        state = self.state_dict()
        if self.lycoris is not None:
            for component, module in self._modules():
                state |= {f"{component}.{key}": alpha for key, alpha in alphas(module, TRAINING_ADAPTER).items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy weights in place: an optimizer keeps its parameters. Raises LoraMismatch if keys or shapes differ."""
        own = self.state_dict()
        if {key: tensor.shape for key, tensor in own.items()} != {key: tensor.shape for key, tensor in state.items()}:
            raise LoraMismatch("its layers or rank differ from the adapter being trained")
        for component, module in self._modules():
            prefix = f"{component}."
            part = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
            set_peft_model_state_dict(module, part, adapter_name=TRAINING_ADAPTER)

    def metadata(
        self, *, title: str, steps: int | None = None, base_model: str | None = None, trigger_word: str | None = None,
        resolution: int | None = None, created_at: datetime | None = None, base_model_sha256: str | None = None,
        thumbnail: str | None = None, extra: Mapping[str, str] | None = None,
    ) -> dict[str, str]:  # fmt: skip
        """For ``save_lora``: peft's settings as diffusers reads them, ``modelspec.*`` and kohya's ``ss_*`` keys.

        ``thumbnail`` is a ``data:`` URI, as ``images.thumbnail_uri`` makes it. ``base_model_sha256`` goes where
        sd-scripts has the SHA-256 of its base model's one file; its older ``ss_sd_model_hash``, of a part of such a
        file, has no meaning for a folder. Source of the names: github.com/Stability-AI/ModelSpec and
        kohya-ss/sd-scripts ``train_network.py``.
        """
        optional = {
            "modelspec.date": created_at.isoformat() if created_at else None,
            "modelspec.trigger_phrase": trigger_word,
            "modelspec.resolution": f"{resolution}x{resolution}" if resolution else None,
            "ss_resolution": f"({resolution}, {resolution})" if resolution else None,
            "ss_steps": str(steps) if steps is not None else None,
            "ss_sd_model_name": base_model,
            "ss_new_sd_model_hash": base_model_sha256,
            "modelspec.thumbnail": thumbnail,
        }
        return {
            **self._network_metadata(),
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": f"{self._family.architecture}/lora",
            "modelspec.implementation": "diffusers",
            "modelspec.title": title,
            "ss_output_name": title,
            "ss_network_dim": str(self.rank),
            "ss_network_alpha": f"{self.alpha:g}",
            **{key: value for key, value in optional.items() if value is not None},
            **(extra or {}),
        }

    def detach(self) -> None:
        """Take the layers off; the family is as it was before ``attach_lora``."""
        for _, module in self._modules():
            remove_adapter(module, TRAINING_ADAPTER)
            module.eval()

    def _network_metadata(self) -> dict[str, str]:
        if self.lycoris is not None:
            return {
                "ss_network_module": "lycoris.kohya",
                "ss_network_args": json.dumps(self.lycoris.network_args(), sort_keys=True),
            }
        return {
            ADAPTER_METADATA_KEY: json.dumps(self._peft_settings(), sort_keys=True),
            "ss_network_module": "networks.lora",
        }

    def _peft_settings(self) -> dict[str, Any]:
        """Only what a reader needs: the full config names settings that other peft versions refuse."""
        return {
            f"{component}.{key}": value
            for component in self.components
            for key, value in _settings(self._configs[component]).items()
        }


def _settings(config: Any) -> dict[str, Any]:
    targets = config.target_modules
    settings = {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "target_modules": targets if isinstance(targets, str) else sorted(targets or ()),
    }
    if config.use_dora:
        settings["use_dora"] = True
    if config.rank_pattern:
        settings |= {"rank_pattern": dict(config.rank_pattern), "alpha_pattern": dict(config.alpha_pattern)}
    return settings


def attach_lora(
    family: Family,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: LoraTargets = "attention",
    components: Sequence[str] | None = None,
    seed: int = 0,
    conv: ConvLora | None = None,
    dora: bool = False,
    lycoris: Lycoris | None = None,
    only_if_contains: Sequence[str] = (),
    ignore_if_contains: Sequence[str] = (),
    initial: InitialWeights = "gaussian",
) -> TrainableLora:
    """Wrap the target layers of ``components`` (default: only the denoiser's) with new, float32, trainable LoRA layers.

    B is zero, so nothing changes until the first optimizer step. A is normal with standard deviation 1/rank, as in the
    diffusers examples, or with ``initial`` of ``uniform`` within 1/sqrt(inputs), as in kohya's scripts and ai-toolkit;
    both are for LoRA and DoRA. ``conv`` adapts a UNet's convolutions too; ``dora`` also trains magnitudes; ``lycoris``
    makes the layers LoKr or LoHa, to which peft gives no dropout. Of the target layers those are taken whose name, with
    its component in front, contains a part in ``only_if_contains`` (when given) and none in ``ignore_if_contains``.
    ``seed`` alone decides A; the global random state is left as it was. The modules are in eval mode, and dropout
    is off until ``TrainableLora.set_dropout``. Raises SettingNotSupported.
    """
    if rank < 1 or alpha <= 0 or not 0 <= dropout < 1:
        raise SettingNotSupported("network", "rank and alpha must be positive and dropout between 0 and 1")
    known = family.lora_components
    chosen = list(components) if components is not None else [next(iter(known))]
    if not chosen or any(name not in known for name in chosen):
        raise SettingNotSupported("network.components", f"choose from {', '.join(known)}")
    if any(TRAINING_ADAPTER in getattr(module, "peft_config", {}) for module in known.values()):
        raise SettingNotSupported("network", "this model already has an adapter in training")
    if conv is not None and not family.conv_target_modules(chosen[0]):
        raise SettingNotSupported("network.conv_rank", "this model has no convolutions to adapt")
    if lycoris is not None and (dora or dropout > 0):
        raise SettingNotSupported("network", f"{lycoris.kind} has neither dropout nor DoRA's magnitudes")
    configs: dict[str, AnyConfig] = {}
    with torch.random.fork_rng(devices=[]):  # peft draws on the CPU
        torch.manual_seed(seed)
        for name in chosen:
            layers = _target_layers(family, name, targets, conv, only_if_contains, ignore_if_contains)
            patterns = _conv_patterns(family.conv_target_modules(name, targets), layers, conv)
            if lycoris is not None:
                configs[name] = lycoris.config(rank=rank, alpha=alpha, targets=layers, patterns=patterns)
            else:
                configs[name] = LoraConfig(
                    r=rank, lora_alpha=alpha, lora_dropout=dropout,
                    init_lora_weights=True if initial == "uniform" else "gaussian",
                    target_modules=layers, use_dora=dora, **patterns,
                )  # fmt: skip
            inject_adapter(known[name], TRAINING_ADAPTER, configs[name])
    lora = TrainableLora(family, chosen, rank, alpha, configs, lycoris)
    if lycoris is not None:
        _settle_lycoris(lora, [known[name] for name in chosen])
    for parameter in lora.parameters():
        parameter.data = parameter.data.float()  # half-precision weights lose small updates
    for name in chosen:
        known[name].eval()  # peft's new layers are not
    return lora


def _settle_lycoris(lora: TrainableLora, modules: Sequence[nn.Module]) -> None:
    """Raises SettingNotSupported, with the layers taken off again, for a network that could not be served."""
    try:
        for module in modules:
            use_products(module)
            settle_scales(module, TRAINING_ADAPTER)
            check_ranks(module, TRAINING_ADAPTER)
    except SettingNotSupported:
        lora.detach()
        raise


def _target_layers(
    family: Family, component: str, kind: LoraTargets, conv: ConvLora | None, only: Sequence[str], ignore: Sequence[str]
) -> list[str]:
    """The family's suffixes, or with filters the full names of the layers that pass. Raises SettingNotSupported."""
    suffixes = family.lora_target_modules(component, kind)
    if conv is not None:
        suffixes += family.conv_target_modules(component, kind)
    if not only and not ignore:
        return suffixes
    names = [
        name
        for name, module in family.lora_components[component].named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and any(name == s or name.endswith(f".{s}") for s in suffixes)
    ]
    passed = [
        name
        for name in names
        if (not only or any(part in f"{component}.{name}" for part in only))
        and not any(part in f"{component}.{name}" for part in ignore)
    ]
    if not passed:
        raise SettingNotSupported("network", f"the filters leave no layer of the {component}")
    return passed


def _conv_patterns(
    convolutions: Sequence[str], layers: Sequence[str], conv: ConvLora | None
) -> dict[str, dict[str, float]]:
    """peft's ranks and alphas by layer name, where they differ from the adapter's own."""
    if conv is None:
        return {}
    # peft warns of those that the filters left no layer of.
    suffixes = [s for s in convolutions if any(layer == s or layer.endswith(f".{s}") for layer in layers)]
    return {"rank_pattern": dict.fromkeys(suffixes, conv.rank), "alpha_pattern": dict.fromkeys(suffixes, conv.alpha)}
