"""Folders of every family with random weights, made of the real component classes: seconds to write, 1 MB each.

For tests and benchmarks; `width` scales the denoiser for the latter. And a scripted device, for memory that runs short.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from diffusers.pipelines.flux2.pipeline_flux2 import SYSTEM_MESSAGE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from diffusion.engine.memory import Memory

START, END = "<|startoftext|>", "<|endoftext|>"
SEED = 11


def byte_alphabet() -> list[str]:
    """The characters that GPT-2's byte-level tokenizers write bytes as."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(code) for code in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def write_clip_tokenizer(folder: Path, *, length: int = 77) -> CLIPTokenizer:
    """Every byte is a token, alone or at the end of a word; no merges but one."""
    alphabet = byte_alphabet()
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), "re", START, END]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=length)


def t5_tokenizer() -> T5TokenizerFast:
    """Letters as pieces of a unigram model, with T5's special tokens."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(chr(code), -3.0) for code in range(33, 127)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    marks = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0, **marks)


def qwen_tokenizer() -> Any:
    """Bytes as tokens, with Qwen's chat marks and a chat template."""
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(byte_alphabet())}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>",  # noqa: S106 - a text token
        additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return fast


def clip_encoder(tokenizer: CLIPTokenizer, *, width: int = 32, projected: bool = False, length: int = 77) -> Any:
    """Two layers; ``projected`` gives the class that SDXL's second encoder has."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=length, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id, projection_dim=width,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config) if projected else CLIPTextModel(config)


def t5_encoder(tokenizer: Any, *, width: int = 32) -> Any:
    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    return T5EncoderModel(config)


def kl_vae(*, channels: int = 4, sample_size: int = 64, shift: float | None = None) -> Any:
    """Factor 4."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16, 16), layers_per_block=1, latent_channels=channels, sample_size=sample_size,
        norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        scaling_factor=0.7, shift_factor=shift,
    )  # fmt: skip


def ddim(prediction_type: str = "epsilon") -> Any:
    return diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type,
        clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="trailing",
    )  # fmt: skip


def _sd1(folder: Path, width: int) -> Any:
    tokenizer = write_clip_tokenizer(folder / "words")
    return diffusers.StableDiffusionPipeline(
        vae=kl_vae(), text_encoder=clip_encoder(tokenizer), tokenizer=tokenizer,
        unet=diffusers.UNet2DConditionModel(
            sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(width, 2 * width),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=32, attention_head_dim=2,
            norm_num_groups=4,
        ),
        scheduler=ddim("v_prediction"), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _sdxl(folder: Path, width: int) -> Any:
    tokenizer = write_clip_tokenizer(folder / "words")
    return diffusers.StableDiffusionXLPipeline(
        vae=kl_vae(), text_encoder=clip_encoder(tokenizer), tokenizer=tokenizer,
        text_encoder_2=clip_encoder(tokenizer, projected=True),
        tokenizer_2=write_clip_tokenizer(folder / "words_2"),
        unet=diffusers.UNet2DConditionModel(
            sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(width, 2 * width),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=64, attention_head_dim=(2, 4),
            norm_num_groups=4, use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=8, projection_class_embeddings_input_dim=8 * 6 + 32,
            transformer_layers_per_block=(1, 2),
        ),
        scheduler=ddim(),
    )  # fmt: skip


def _sd3(folder: Path, width: int) -> Any:
    tokenizer = write_clip_tokenizer(folder / "words")
    words = t5_tokenizer()
    return diffusers.StableDiffusion3Pipeline(
        vae=kl_vae(channels=8, shift=0.06),
        text_encoder=clip_encoder(tokenizer, projected=True), tokenizer=tokenizer,
        text_encoder_2=clip_encoder(tokenizer, projected=True), tokenizer_2=write_clip_tokenizer(folder / "words_2"),
        text_encoder_3=t5_encoder(words, width=64), tokenizer_3=words,
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=16, patch_size=2, in_channels=8, out_channels=8, num_layers=2, attention_head_dim=width // 2,
            num_attention_heads=2, joint_attention_dim=64, caption_projection_dim=width, pooled_projection_dim=64,
            pos_embed_max_size=32, qk_norm="rms_norm",
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


def _flux1(folder: Path, width: int) -> Any:
    tokenizer = write_clip_tokenizer(folder / "words")
    words = t5_tokenizer()
    return diffusers.FluxPipeline(
        vae=kl_vae(channels=4, shift=0.1), text_encoder=clip_encoder(tokenizer), tokenizer=tokenizer,
        text_encoder_2=t5_encoder(words), tokenizer_2=words,
        transformer=diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=width,
            num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=True,
            axes_dims_rope=(width // 4, width // 4, width // 2),
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )  # fmt: skip


def _z_image(folder: Path, width: int) -> Any:
    tokenizer = qwen_tokenizer()
    return diffusers.ZImagePipeline(
        vae=kl_vae(channels=4, shift=0.1), tokenizer=tokenizer,
        text_encoder=Qwen3Model(_qwen3_config(len(tokenizer), layers=2)),
        transformer=diffusers.ZImageTransformer2DModel(
            all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=2 * width, n_layers=2, n_refiner_layers=1,
            n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[width // 4, width // 4, width // 2],
            axes_lens=[1024, 64, 64],
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


def _qwen_image(folder: Path, width: int) -> Any:
    tokenizer = qwen_tokenizer()
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 2048,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2], "rope_type": "default"},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 16,
        "fullatt_block_indexes": [0],
    }  # fmt: skip
    return diffusers.QwenImagePipeline(
        vae=diffusers.AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
            latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.8, 1.0, 1.2],
        ),
        tokenizer=tokenizer,
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
        transformer=diffusers.QwenImageTransformer2DModel(
            patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=width,
            num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(width // 4, width // 4, width // 2),
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, shift_terminal=0.02,
        ),
    )  # fmt: skip


def _flux2_klein(folder: Path, width: int) -> Any:
    tokenizer = qwen_tokenizer()
    return diffusers.Flux2KleinPipeline(
        vae=diffusers.AutoencoderKLFlux2(
            block_out_channels=(8, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=64,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        tokenizer=tokenizer, text_encoder=Qwen3ForCausalLM(_qwen3_config(len(tokenizer), layers=28)),
        transformer=diffusers.Flux2Transformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=width,
            num_attention_heads=2, joint_attention_dim=48, timestep_guidance_channels=16, mlp_ratio=2.0,
            axes_dims_rope=(width // 4,) * 4, guidance_embeds=False,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )  # fmt: skip


def _flux2_dev(folder: Path, width: int) -> Any:
    pipeline = _flux2_klein(folder, width)
    tokenizer = qwen_tokenizer()
    # As one token: spelt out by a tokenizer this small, the system message would leave a prompt no room.
    tokenizer.add_tokens([SYSTEM_MESSAGE])
    tokenizer.add_tokens(["[IMG]", "[IMG_BREAK]", "[IMG_END]"], special_tokens=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
    )
    transformer = dict(pipeline.transformer.config) | {"guidance_embeds": True}
    return diffusers.Flux2Pipeline(
        vae=pipeline.vae,
        scheduler=pipeline.scheduler,
        tokenizer=tokenizer,
        text_encoder=Mistral3ForConditionalGeneration(
            Mistral3Config(
                vision_config={
                    "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
                    "num_attention_heads": 2, "head_dim": 8, "image_size": 32, "patch_size": 16,
                },
                text_config={
                    "model_type": "mistral", "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32,
                    "num_hidden_layers": 30, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
                    "max_position_embeddings": 2048,
                },
                image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
            )
        ),
        transformer=diffusers.Flux2Transformer2DModel.from_config(transformer),
    )  # fmt: skip


def _qwen3_config(vocabulary: int, *, layers: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=2048,
    )  # fmt: skip


MAKERS: dict[str, Callable[[Path, int], Any]] = {
    "sd1": _sd1, "sdxl": _sdxl, "sd3": _sd3, "flux1": _flux1, "z_image": _z_image, "qwen_image": _qwen_image,
    "flux2_klein": _flux2_klein, "flux2_dev": _flux2_dev,
}  # fmt: skip


def write_tiny_model(family: str, folder: Path, *, width: int = 16) -> Path:
    """Write a model folder of the family (by its ``name``) into ``folder / "model"``, the same for every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        pipeline = MAKERS[family](folder, width)
    pipeline.save_pretrained(folder / "model", safe_serialization=True)
    return folder / "model"


class ScriptedMemory:
    """A device of ``total_bytes`` on which a test says what is held; running out raises as torch does.

    ``given_back`` counts the calls of ``give_back``.
    """

    tells_peaks: ClassVar[bool] = True

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.held_bytes = self.given_back = 0
        self._base_bytes = self._most_bytes = 0

    @contextmanager
    def holding(self, size_bytes: int) -> Iterator[None]:
        if self.held_bytes + size_bytes > self.total_bytes:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size_bytes} bytes.")
        self.held_bytes += size_bytes
        self._most_bytes = max(self._most_bytes, self.held_bytes)
        try:
            yield
        finally:
            self.held_bytes -= size_bytes

    def measure(self) -> Memory:
        return Memory(self.total_bytes - self.held_bytes, self.total_bytes)

    def start_peak(self) -> None:
        self._base_bytes = self._most_bytes = self.held_bytes

    def peak_bytes(self) -> int:
        return self._most_bytes - self._base_bytes

    def give_back(self) -> None:
        self.given_back += 1
