"""Tiny models, ours and in their stock pipelines, and LoRA files for them under other trainers' names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import diffusers
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusion.engine import Engine, GenerateRequest, LoraRef
from diffusion.families import Family, load_family
from diffusion.lora import read_lora
from diffusion.lora_fit import fit_layers, fit_products
from diffusion.lora_header import check_fit, judge
from diffusion.model_layers import model_layers
from diffusion.testing import write_tiny_model

ALPHA = 3.0
RANK = 2
NameOf = Callable[[str], str]
PEFT = ("lora_A.weight", "lora_B.weight")
KOHYA = ("lora_down.weight", "lora_up.weight")
ATTENTION = {
    "sd3": ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.ff.net.2"],
    "flux1": ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.add_k_proj",
              "single_transformer_blocks.1.attn.to_v"],
    "flux2_klein": ["transformer_blocks.0.attn.to_out.0", "transformer_blocks.0.ff_context.linear_in",
                    "single_transformer_blocks.1.attn.to_qkv_mlp_proj"],
    "qwen_image": ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.txt_mlp.net.0.proj",
                   "transformer_blocks.1.attn.add_v_proj"],
    "z_image": ["layers.0.attention.to_q", "layers.1.feed_forward.w2", "noise_refiner.0.attention.to_out.0"],
}  # fmt: skip
ATTENTION["flux2_dev"] = ATTENTION["flux2_klein"]


def underscored(prefix: str) -> NameOf:
    return lambda path: prefix + path.replace(".", "_")


def dotted(prefix: str) -> NameOf:
    return lambda path: prefix + path


class World:
    """A tiny model as ours and in its stock pipeline, and files for it."""

    def __init__(self, name: str, folder: Path) -> None:
        self._folder = folder
        self._model = write_tiny_model(name, folder)
        self.family: Family = load_family(self._model, device="cpu", dtype=torch.float32)

    def shape(self, path: str) -> tuple[int, int]:
        layer = self.family.denoiser.get_submodule(path)
        assert isinstance(layer, nn.Linear)
        return layer.out_features, layer.in_features

    def pairs(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[Tensor, Tensor]]:
        """Random A and B for layers of these outputs and inputs."""
        generator = torch.Generator().manual_seed(4)
        return {
            name: (
                0.3 * torch.randn(RANK, ins, generator=generator), 0.3 * torch.randn(outs, RANK, generator=generator)
            )
            for name, (outs, ins) in shapes.items()
        }  # fmt: skip

    def write(self, state: Mapping[str, Tensor]) -> Path:
        path = self._folder / "a.safetensors"
        save_file({key: tensor.clone().contiguous() for key, tensor in state.items()}, path)
        return path

    def write_pairs(
        self, pairs: Mapping[str, tuple[Tensor, Tensor]], ends: tuple[str, str], *, alpha: float | None = None
    ) -> Path:
        state = {
            f"{name}.{end}": tensor for name, pair in pairs.items() for end, tensor in zip(ends, pair, strict=True)
        }
        return self.write(state | ({f"{name}.alpha": torch.tensor(alpha) for name in pairs} if alpha else {}))

    def effects(self, path: Path) -> dict[str, Tensor]:
        """What the file adds to the weights of the denoiser's layers, by path. It would be imported too."""
        lora, components = read_lora(path), self.family.lora_components
        denoiser = next(iter(components))
        found = {
            name: layer.alpha / layer.rank * layer.B.flatten(1) @ layer.A.flatten(1)
            for name, layer in fit_layers(lora, components).get(denoiser, {}).items()
        }
        products = fit_products(lora, components).get(denoiser, {})
        header = judge({key: tuple(tensor.shape) for key, tensor in load_file(path).items()}, lora.metadata)
        assert self.family.name in header.families
        check_fit(header, model_layers(self._model))
        return found | {name: torch.kron(product.w1, product.w2) for name, product in products.items()}

    def ours(self, path: Path) -> Tensor:
        request = GenerateRequest(
            prompt="a ring", width=32, height=32, steps=2, seed=1, guidance_scale=1.0, loras=(LoraRef(path),)
        )
        return Engine(self.family).render([request])[0].pixels_CHW

    def stock(self, path: Path | None) -> Tensor:
        pipe = diffusers.DiffusionPipeline.from_pretrained(self._model, local_files_only=True)
        pipe.set_progress_bar_config(disable=True)
        if path is not None:
            pipe.load_lora_weights(str(path))
        guidance = {"true_cfg_scale" if self.family.name == "qwen_image" else "guidance_scale": 1.0}
        picture: Tensor = pipe(
            prompt="a ring", width=32, height=32, num_inference_steps=2, generator=torch.Generator().manual_seed(1),
            output_type="pt", **guidance,
        ).images[0]  # fmt: skip
        return picture


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, effect in expected.items():
        torch.testing.assert_close(found[name], effect, atol=1e-5, rtol=1e-4)


STACKS = {
    "flux1": {
        "double_blocks.0.img_attn.qkv": [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"],
        "double_blocks.0.txt_attn.qkv": [f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"],
        "double_blocks.0.img_mlp.0": ["transformer_blocks.0.ff.net.0.proj"],
        "double_blocks.0.txt_mod.lin": ["transformer_blocks.0.norm1_context.linear"],
        "single_blocks.1.linear1": [
            f"single_transformer_blocks.1.{x}" for x in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        ],
        "single_blocks.1.linear2": ["single_transformer_blocks.1.proj_out"],
        "single_blocks.1.modulation.lin": ["single_transformer_blocks.1.norm.linear"],
        "img_in": ["x_embedder"],
        "txt_in": ["context_embedder"],
        "time_in.in_layer": ["time_text_embed.timestep_embedder.linear_1"],
        "vector_in.out_layer": ["time_text_embed.text_embedder.linear_2"],
        "guidance_in.in_layer": ["time_text_embed.guidance_embedder.linear_1"],
        "final_layer.linear": ["proj_out"],
    },
    "flux2_dev": {
        "double_blocks.0.img_attn.qkv": [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"],
        "double_blocks.0.txt_attn.qkv": [f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"],
        "double_blocks.0.img_attn.proj": ["transformer_blocks.0.attn.to_out.0"],
        "double_blocks.0.txt_mlp.2": ["transformer_blocks.0.ff_context.linear_out"],
        "single_blocks.0.linear1": ["single_transformer_blocks.0.attn.to_qkv_mlp_proj"],
        "single_blocks.1.linear2": ["single_transformer_blocks.1.attn.to_out"],
        "img_in": ["x_embedder"],
        "guidance_in.out_layer": ["time_guidance_embed.guidance_embedder.linear_2"],
        "double_stream_modulation_img.lin": ["double_stream_modulation_img.linear"],
        "single_stream_modulation.lin": ["single_stream_modulation.linear"],
        "final_layer.linear": ["proj_out"],
    },
    "sd3": {
        "joint_blocks.0.x_block.attn.qkv": [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"],
        "joint_blocks.0.context_block.attn.proj": ["transformer_blocks.0.attn.to_add_out"],
        "joint_blocks.1.x_block.mlp.fc1": ["transformer_blocks.1.ff.net.0.proj"],
        "context_embedder": ["context_embedder"],
        "t_embedder.mlp.0": ["time_text_embed.timestep_embedder.linear_1"],
        "y_embedder.mlp.2": ["time_text_embed.text_embedder.linear_2"],
    },
    "z_image": {
        "layers.1.attention.qkv": [f"layers.1.attention.to_{x}" for x in "qkv"],
        "layers.1.attention.out": ["layers.1.attention.to_out.0"],
        "context_refiner.0.feed_forward.w1": ["context_refiner.0.feed_forward.w1"],
        "x_embedder": ["all_x_embedder.2-1"],
        "final_layer.linear": ["all_final_layer.2-1.linear"],
    },
}
"""Names of layers in the original models, and the layers that they are in diffusers."""
STACKS["flux2_klein"] = {name: paths for name, paths in STACKS["flux2_dev"].items() if "guidance" not in name}


def joined_pairs(world: World, family: str) -> dict[str, tuple[Tensor, Tensor]]:
    shapes = {}
    for name, paths in STACKS[family].items():
        parts = [world.shape(path) for path in paths]
        shapes[name] = (sum(outs for outs, _ in parts), parts[0][1])
    return world.pairs(shapes)


def cut(world: World, family: str, changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The changes of the original's layers as those of diffusers'."""
    found = {}
    for name, change in changes.items():
        paths = STACKS[family][name]
        found |= dict(zip(paths, change.split([world.shape(path)[0] for path in paths]), strict=True))
    return found
