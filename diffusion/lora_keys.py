"""Key names of LoRA files: which module a key belongs to, which of its weights it is, and which layer the module means.

Names alone, without torch or a model, so that the header of a file can be judged where there is neither. The forms:
peft's and diffusers' (``transformer.<path>.lora_A.weight``, and those from before peft), ai-toolkit's and ComfyUI's
(``diffusion_model.<path>``), sd-scripts' (``lora_unet_<path with underscores>.lora_down.weight``) and LyCORIS'
(``lycoris_<path with underscores>.lokr_w1``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeVar

from diffusion.errors import LoraInvalid

LORA_A, LORA_B, ALPHA = "lora_A", "lora_B", "alpha"
DORA_SCALE, MAGNITUDE = "dora_scale", "lora_magnitude_vector"
"""DoRA's magnitudes by LyCORIS' name and by peft's: an axis of length one means different things in them."""
PAIR = frozenset({LORA_A, LORA_B})
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
DENOISER = ""
"""The component of a name that tells none: the model's UNet or transformer, whichever it has."""
SHOWN_MAX = 150
T = TypeVar("T")

_SIDES = {"A": LORA_A, "B": LORA_B, "down": LORA_A, "up": LORA_B}
_PAIR_END = re.compile(
    r"(\.lora_(?P<peft>[AB])(\.\w+)?|\.lora_(?P<kohya>down|up)|(\.|_)lora\.(?P<old>down|up)"
    r"|\.lora_linear_layer\.(?P<text>down|up))\.weight$"
)
_MAGNITUDE_END = re.compile(rf"\.{MAGNITUDE}(\.\w+)?(\.weight)?$")
_OTHER_END = re.compile(rf"\.(?P<part>{'|'.join((ALPHA, DORA_SCALE, *LOHA, *LOKR))})(\.weight)?$")
_UNSUPPORTED = {
    r"\.lora_mid": "Tucker LoCon", r"\.hada_t": "Tucker LoHa", r"\.lokr_t": "Tucker LoKr", r"\.boft_": "BOFT",
    r"\.oft_": "OFT", r"\.glora_": "GLoRA", r"\.lora_embedding_": "an adapted embedding",
    r"\.lora_B(\.\w+)?\.bias$": "a LoRA with biases", r"\.scalar$": "LyCORIS' scalar",
    r"\.diff(_b)?$": "a whole difference of a weight",
}  # fmt: skip
_PREFIXES = (
    ("lora_unet_", DENOISER), ("lora_transformer_", DENOISER), ("lycoris_", DENOISER),
    ("lora_te1_", "text_encoder"), ("lora_te2_", "text_encoder_2"), ("lora_te3_", "text_encoder_3"),
    ("lora_te_", "text_encoder"),
    ("model.diffusion_model.", DENOISER), ("diffusion_model.", DENOISER),
    ("text_encoders.clip_l.transformer.", "text_encoder"), ("text_encoders.clip_g.transformer.", "text_encoder_2"),
    ("text_encoders.t5xxl.transformer.", "text_encoder_3"),
    ("unet.", "unet"), ("transformer.", "transformer"), ("text_encoder.", "text_encoder"),
    ("text_encoder_2.", "text_encoder_2"), ("text_encoder_3.", "text_encoder_3"),
)  # fmt: skip
"""What a module's name may begin with, and the component that it means; sd-scripts' te3 is T5's."""
_UNDERSCORED = tuple(prefix for prefix, _ in _PREFIXES if prefix.endswith("_"))
_PEFT = "base_model.model."
_T5_PATH = re.compile(r"^encoder[._]block[._]\d")
_OLD_PROJECTION = re.compile(r"\.to_(q|k|v|out)_lora$")
_OLD_UNET = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
_OLD_TEXT = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}


@dataclass(frozen=True)
class Target:
    """The layer that a module's name means: ``component`` as diffusers' pipelines call it, or ``DENOISER``, and the
    path there, with dots or with underscores in their place."""

    component: str
    path: str


def modules_of(weights: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """By module, and there by part: ``lora_A``, ``lora_B``, ``alpha``, ``dora_scale``, LoHa's, LoKr's and so on.

    Raises LoraInvalid for a key that is none of these, and for one of a kind that is not supported.
    """
    for pattern, kind in _UNSUPPORTED.items():
        key = next((key for key in weights if re.search(pattern, key)), None)
        if key is not None:
            raise LoraInvalid(f"{kind} is not supported: {shown(key)}")
    modules: dict[str, dict[str, T]] = {}
    for key, weight in weights.items():
        module, part = _split(key)
        parts = modules.setdefault(module, {})
        if part in parts:
            raise LoraInvalid(f"it has a weight twice: {shown(key)}")
        parts[part] = weight
    return modules


def check_parts(module: str, parts: Iterable[str]) -> None:
    """Raises LoraInvalid unless the module is a pair, a LoHa or a LoKr, and whole."""
    found = set(parts) - {ALPHA, DORA_SCALE, MAGNITUDE}
    if found <= PAIR:
        if found == PAIR:
            return
        if not found:
            raise LoraInvalid(f"there is no pair of weights for {shown(module)}")
        raise LoraInvalid(f"the two weights of {shown(module)} do not belong together: one is missing")
    if found & set(LOHA):
        if found == set(LOHA):
            return
        reason = "incomplete" if found < set(LOHA) else "mixed with those of another kind"
        raise LoraInvalid(f"the LoHa weights of {shown(module)} are {reason}")
    if not found <= set(LOKR):
        raise LoraInvalid(f"the LoKr weights of {shown(module)} are mixed with those of another kind")
    if not all(name in found or {f"{name}_a", f"{name}_b"} <= found for name in ("lokr_w1", "lokr_w2")):
        raise LoraInvalid(f"the LoKr weights of {shown(module)} are incomplete")


def plain_name(module: str) -> str:
    """Without what peft puts around every name, and with today's names of layers that diffusers called otherwise."""
    name = module.removeprefix(_PEFT).replace(".processor.", ".")
    old = _OLD_TEXT if name.startswith("text_encoder") else _OLD_UNET
    return _OLD_PROJECTION.sub(lambda found: f".{old[found[1]]}", name)


def target_of(module: str) -> Target:
    """Raises LoraInvalid for a layer of T5, which takes no adapter here."""
    name = plain_name(module)
    component, path = DENOISER, name
    for prefix, meant in _PREFIXES:
        if name.startswith(prefix):
            component, path = meant, name.removeprefix(prefix)
            break
    if component == "text_encoder_3" or (component.startswith("text_encoder") and _T5_PATH.match(path)):
        raise LoraInvalid(
            f"it adapts the T5 text encoder ({shown(module)}), and adapters of CLIP's and of the denoiser are the ones "
            "that are taken; export it without T5"
        )
    return Target(component, path)


def scales_inputs(scale: Sequence[int]) -> bool:
    """Whether a ``dora_scale`` of this shape has a number for each input of its layer, ``[1, in]``, not each output.

    Early LyCORIS normed columns so, and later ones do with ``wd_on_output=False``.
    """
    return len(scale) > 1 and scale[0] == 1 and prod(scale) > 1


def inputs_scaled(module: str) -> LoraInvalid:
    return LoraInvalid(
        f"the DoRA magnitude of {shown(module)} is one number per input of its layer, which is not supported; "
        "LyCORIS trains one per output with wd_on_output=True"
    )


def has_underscores(module: str) -> bool:
    """Whether the name is of sd-scripts' or LyCORIS' form, where underscores stand for dots too."""
    return module.startswith(_UNDERSCORED)


def shown(name: str) -> str:
    """For messages: the name as it is, cut where a file has endless ones."""
    return repr(name if len(name) <= SHOWN_MAX else f"{name[:SHOWN_MAX]}...")


def _split(key: str) -> tuple[str, str]:
    if found := _PAIR_END.search(key):
        side = _SIDES[next(filter(None, (found["peft"], found["kohya"], found["old"], found["text"])))]
        # The projections that were called to_q_lora keep that end, by which target_of knows them.
        return key[: found.start()] + ("_lora" if key[found.start()] == "_" else ""), side
    if found := _MAGNITUDE_END.search(key):
        return key[: found.start()], MAGNITUDE
    if found := _OTHER_END.search(key):
        return key[: found.start()], found["part"]
    raise LoraInvalid(f"unknown weight name {shown(key)}")
