"""How the original UNet names the layers that diffusers' has, by block number: sd-scripts trains SDXL with these names.

Source: the module list of ``SdxlUNet2DConditionModel`` in kohya-ss/sd-scripts ``library/sdxl_original_unet.py``.
Numbers count on from block to block: input 0 is the first convolution, then come each block's layers and its
downsampling. Names alone, without torch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

_PATH = re.compile(
    r"(?P<side>down|up)_blocks\.(?P<block>\d+)\.(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<at>\d+)\."
    r"(?P<rest>.+)"
)
_MIDDLE = re.compile(r"mid_block\.(?P<kind>resnets|attentions)\.(?P<at>\d+)\.(?P<rest>.+)")
_RESNET = {
    "conv1": "in_layers_2", "time_emb_proj": "emb_layers_1", "conv2": "out_layers_3", "conv_shortcut": "skip_connection"
}  # fmt: skip
_OTHERS = {
    "conv_in": "input_blocks_0_0", "conv_out": "out_2",
    "time_embedding.linear_1": "time_embed_0", "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0", "add_embedding.linear_2": "label_emb_0_2",
}  # fmt: skip


def sgm_names(paths: Iterable[str]) -> dict[str, str]:
    """The original's name, with underscores, by the path of each of a UNet's layers. ``paths`` are all of its layers'.

    Paths that the original does not have are left out; empty for other models.
    """
    paths = list(paths)
    matches = {path: match for path in paths if (match := _PATH.fullmatch(path))}
    resnets: Counter[tuple[str, int]] = Counter()
    samplers, attended = set(), set()
    for match in matches.values():
        block = match["side"], int(match["block"])
        if match["kind"] == "resnets":
            resnets[block] = max(resnets[block], int(match["at"]) + 1)
        elif match["kind"] == "attentions":
            attended.add(block)
        else:
            samplers.add(block)
    names = {path: _OTHERS[path] for path in paths if path in _OTHERS} if resnets else {}
    for path, match in matches.items():
        side, number = match["side"], int(match["block"])
        before = sum(count for (other, i), count in resnets.items() if other == side and i < number)
        if side == "down":
            first = 1 + before + sum(1 for other, i in samplers if other == side and i < number)
            names[path] = _down_name(match, first, resnets[side, number])
        else:
            place = 2 if (side, number) in attended else 1
            names[path] = _up_name(match, before, resnets[side, number], place)
    for path in paths:
        if match := _MIDDLE.fullmatch(path):
            at = 1 if match["kind"] == "attentions" else 2 * int(match["at"])
            names[path] = f"middle_block_{at}_{_inner(match)}"
    return names


def _down_name(match: re.Match[str], first: int, resnets: int) -> str:
    if match["kind"] == "downsamplers":
        return f"input_blocks_{first + resnets}_0_op"
    return f"input_blocks_{first + int(match['at'])}_{_place(match)}_{_inner(match)}"


def _up_name(match: re.Match[str], first: int, resnets: int, sampler_place: int) -> str:
    """Upsampling is the last thing in its block's last number."""
    if match["kind"] == "upsamplers":
        return f"output_blocks_{first + resnets - 1}_{sampler_place}_conv"
    return f"output_blocks_{first + int(match['at'])}_{_place(match)}_{_inner(match)}"


def _place(match: re.Match[str]) -> int:
    return 0 if match["kind"] == "resnets" else 1


def _inner(match: re.Match[str]) -> str:
    rest: str = match["rest"]
    return _RESNET.get(rest, rest) if match["kind"] == "resnets" else rest.replace(".", "_")
