"""Build the tiny base model from nothing but seeds: VAE, then tokenizer and text encoder, then UNet.

    python assets/tiny/build.py vae  --work /tmp/tiny
    python assets/tiny/build.py text --work /tmp/tiny
    python assets/tiny/build.py unet --work /tmp/tiny
    python assets/tiny/build.py export --work /tmp/tiny

Each stage writes its state to ``--work`` and goes on from it when started again.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import random
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from world import COLOURS, PLACES, RADIUS_PX, SHAPES, Scene, loosen, random_scene, render, render_clutter

logger = logging.getLogger("tiny")
HERE = Path(__file__).resolve().parent
SEED = 7
TOKENS_MAX = 77
START, END = "<|startoftext|>", "<|endoftext|>"


def byte_alphabet() -> list[str]:
    """The printable stand-ins for the 256 byte values, as GPT-2 and CLIP order them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    extra = [chr(256 + i) for i in range(256 - len(printable))]
    return [chr(code) for code in printable] + extra


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer in which every word of the world is one token and any other text still encodes."""
    words = sorted(
        {"a", "on", "the", "in", "at", "background", "small", "large", "and", "picture", "of", "with"}
        | set(COLOURS)
        | set(SHAPES)
        | {w for place in PLACES for w in place.split()}
    )
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            ranked = [(merges.index(pair), i) for i, pair in enumerate(pairwise(pieces)) if pair in merges]
            if not ranked:
                merges.append((pieces[0], pieces[1]))
                ranked = [(0, 0)]
            i = min(ranked)[1]
            pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    alphabet = byte_alphabet()
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *dict.fromkeys(a + b for a, b in merges), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(f"{a} {b}" for a, b in merges) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS_MAX)
    for word in words:
        if len(tokenizer(word).input_ids) != 3:
            raise RuntimeError(f"{word!r} is not one token: {tokenizer.tokenize(word)}")
    tokenizer.save_pretrained(folder)
    return tokenizer


def to_tensor(images: list) -> torch.Tensor:
    """[B, 3, H, W] in -1..1."""
    array = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        latent_channels=4,
        sample_size=64,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        mid_block_add_attention=False,
    )


def train_vae(work: Path, steps: int, batch: int) -> None:
    """Reconstruct world scenes and clutter; colour-true is the aim, so plain L1 and L2 with a trace of KL."""
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    vae = make_vae().to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.5e-3, total_steps=steps, pct_start=0.05)
    started_at = time.monotonic()
    for step in range(steps):
        images = [
            render(random_scene(rng, held_out=False), rng) if rng.random() < 0.4 else render_clutter(rng)
            for _ in range(batch)
        ]
        x = to_tensor(images).to(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        kl = posterior.kl().mean() / x[0].numel()
        loss = F.l1_loss(y, x) + F.mse_loss(y, x) + 1e-3 * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            l1 = F.l1_loss(y, x).item()
            logger.info("vae step %d l1 %.4f kl %.3f  %.0f s", step, l1, kl.item(), time.monotonic() - started_at)
        if step % 200 == 199 or step == steps - 1:
            vae.save_pretrained(work / "vae")


@torch.no_grad()
def encode_world(vae: AutoencoderKL, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[str]]:
    """Latent means and standard deviations [N, 4, 16, 16], loss weights [N, 1, 16, 16] and captions of scenes."""
    rng = random.Random(SEED + 1)
    means, stds, weights, captions = [], [], [], []
    for _ in range(count // 64):
        scenes = [random_scene(rng, held_out=False) for _ in range(64)]
        images = to_tensor([render(scene, rng) for scene in scenes])
        posterior = vae.encode(images).latent_dist
        means.append(posterior.mean)
        stds.append(posterior.std)
        weights.append(object_weight(images))
        captions += [loosen(scene, rng).caption for scene in scenes]
    return torch.cat(means), torch.cat(stds), torch.cat(weights), captions


def object_weight(images: torch.Tensor) -> torch.Tensor:
    """[B, 1, 16, 16] with mean 1 per picture: 4 on the object and one latent around it for each 1 elsewhere.

    Most of a picture is background, whose loss says nothing about shapes.
    """
    # No object reaches the corner.
    distance = (images - images[:, :, :1, :1]).abs().amax(1, keepdim=True)
    covered = F.max_pool2d((distance > 0.1).float(), 4)
    weight = 1 + 3 * F.max_pool2d(covered, 3, stride=1, padding=1)
    return weight / weight.mean((1, 2, 3), keepdim=True)


def make_text_encoder(vocab_size: int, end_id: int, start_id: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS_MAX,
            projection_dim=128,
            bos_token_id=start_id,
            eos_token_id=end_id,
            pad_token_id=end_id,
        )
    )


# What a caption may say, each with the words that say it; "" is for a caption that leaves it open.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": (*SHAPES, ""),
    "colour": (*COLOURS, ""),
    "background": tuple(COLOURS),
    "size": tuple(RADIUS_PX),
    "place": (*PLACES, ""),
}


def attribute_labels(scene: Scene) -> list[int]:
    """The place of each attribute's value in ATTRIBUTES; a word that names no shape counts as none."""
    values = ("" if getattr(scene, name) not in known else getattr(scene, name) for name, known in ATTRIBUTES.items())
    return [known.index(value) for known, value in zip(ATTRIBUTES.values(), values, strict=True)]


def train_text(work: Path, steps: int, batch: int) -> None:
    """Teach the text encoder to tell every attribute of a caption at every place from its end on.

    The padding after a short caption is most of what a cross-attention sees, so each of its places has to say it all.
    """
    torch.manual_seed(SEED)
    rng = random.Random(SEED + 2)
    tokenizer = write_tokenizer(work / "tokenizer")
    text = make_text_encoder(len(tokenizer), tokenizer.eos_token_id, tokenizer.bos_token_id).train()
    heads = torch.nn.ModuleList(torch.nn.Linear(128, len(known)) for known in ATTRIBUTES.values())
    optimizer = torch.optim.AdamW([*text.parameters(), *heads.parameters()], lr=1e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        scenes = [loosen(random_scene(rng, held_out=False), rng) for _ in range(batch)]
        ids_BL = tokenizer(
            [scene.caption for scene in scenes], padding="max_length", max_length=TOKENS_MAX, return_tensors="pt"
        ).input_ids
        labels_BA = torch.tensor([attribute_labels(scene) for scene in scenes])
        hidden_BLD = text(ids_BL).last_hidden_state
        ended_BL = ids_BL == tokenizer.eos_token_id
        caption_of = ended_BL.nonzero()[:, 0]
        losses = [F.cross_entropy(head(hidden_BLD[ended_BL]), labels_BA[caption_of, i]) for i, head in enumerate(heads)]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(text.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            logger.info("text step %d loss %s", step, " ".join(f"{value.item():.4f}" for value in losses))
    text.save_pretrained(work / "text_encoder")


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(64, 128, 160),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=2,
        norm_num_groups=8,
    )


def make_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def sample_timesteps(batch: int, generator: torch.Generator) -> torch.Tensor:
    """Seven in ten from the noisy three fifths of the schedule: what a word for a shape changes is decided there."""
    noisy = 400 + torch.rand(batch, generator=generator) * 600
    clear = torch.rand(batch, generator=generator) * 400
    return torch.where(torch.rand(batch, generator=generator) < 0.7, noisy, clear).long().clamp(0, 999)


def train_unet(work: Path, begin_from: Path | None, steps: int, decay_steps: int, batch: int, scenes: int) -> None:
    """v-prediction with the finished text encoder, one caption in ten dropped; the averaged weights are kept.

    Without a state in ``work`` the UNet of the model in ``begin_from`` is gone on from, where one is named.
    """
    torch.manual_seed(SEED)
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    vae = AutoencoderKL.from_pretrained(work / "vae").eval()
    text = CLIPTextModel.from_pretrained(work / "text_encoder").eval().requires_grad_(False)
    means, stds, weights, captions = encode_world(vae, scenes)
    scale = 1 / (means + stds * torch.randn_like(means)).std().item()
    logger.info(
        "%d scenes, scaling factor %.4f, channel means %s", len(captions), scale, means.mean((0, 2, 3)).tolist()
    )
    ids = tokenizer(
        [*captions, ""], padding="max_length", max_length=TOKENS_MAX, truncation=True, return_tensors="pt"
    ).input_ids
    unet = make_unet().to(memory_format=torch.channels_last)
    if begin_from is not None:
        unet.load_state_dict(UNet2DConditionModel.from_pretrained(begin_from / "unet").state_dict())
    unet.train()
    average = copy.deepcopy(unet).eval()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-3)
    scheduler = make_scheduler()
    alphas = scheduler.alphas_cumprod
    done, state_file, losses = 0, work / "unet_state.pt", []
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        unet.load_state_dict(state["unet"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
    started_at = time.monotonic()
    for step in range(done, steps):
        # A generator per step keeps the sequence the same when the run is started again.
        generator = torch.Generator().manual_seed(SEED * 1_000_003 + step)
        lr = 1e-3 * min(1.0, (step + 1) / 200, max(0.02, (steps - step) / decay_steps))
        for group in optimizer.param_groups:
            group["lr"] = lr
        pick = torch.randint(len(captions), (batch,), generator=generator)
        latents = (means[pick] + stds[pick] * torch.randn(means[pick].shape, generator=generator)) * scale
        noise = torch.randn(latents.shape, generator=generator)
        t = sample_timesteps(batch, generator)
        drop = torch.rand(batch, generator=generator) < 0.1
        tokens = ids[torch.where(drop, len(captions), pick)]
        a = alphas[t].view(-1, 1, 1, 1)
        noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
        target = a.sqrt() * noise - (1 - a).sqrt() * latents
        predicted = unet(noisy.contiguous(memory_format=torch.channels_last), t, text(tokens).last_hidden_state).sample
        loss = (weights[pick] * (predicted - target).square()).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        decay = min(0.996, (1 + step) / (10 + step))
        with torch.no_grad():
            for kept, current in zip(average.parameters(), unet.parameters(), strict=True):
                kept.lerp_(current, 1 - decay)
        losses.append(loss.item())
        if step % 50 == 0:
            logger.info(
                "unet step %d loss %.4f lr %.1e  %.0f s", step, np.mean(losses[-50:]), lr, time.monotonic() - started_at
            )
        if step % 250 == 249 or step == steps - 1:
            state = {
                "unet": unet.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step + 1,
                "scale": scale,
            }
            torch.save(state, state_file.with_suffix(".tmp"))
            state_file.with_suffix(".tmp").replace(state_file)


def export(work: Path, out: Path) -> None:
    """Write the diffusers folder in fp16 safetensors."""
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    state = torch.load(work / "unet_state.pt", weights_only=True)
    text = CLIPTextModel.from_pretrained(work / "text_encoder")
    unet, vae = make_unet(), AutoencoderKL.from_pretrained(work / "vae")
    unet.load_state_dict(state["average"])
    # Without the folder it was read from, which is nobody else's.
    vae.register_to_config(scaling_factor=state["scale"], _name_or_path="")
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(out, safe_serialization=True)
    logger.info("wrote %s: %.1f MB", out, sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) / 1e6)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("vae", "text", "unet", "export"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=HERE / "model")
    parser.add_argument("--begin-from", type=Path, help="a model folder whose UNet to go on from")
    parser.add_argument("--vae-steps", type=int, default=2600)
    parser.add_argument("--text-steps", type=int, default=600)
    parser.add_argument("--unet-steps", type=int, default=2000)
    parser.add_argument("--decay-steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--scenes", type=int, default=16384)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.stage == "vae":
        train_vae(args.work, args.vae_steps, args.batch // 4)
    elif args.stage == "text":
        train_text(args.work, args.text_steps, args.batch * 2)
    elif args.stage == "unet":
        train_unet(args.work, args.begin_from, args.unet_steps, args.decay_steps, args.batch, args.scenes)
    else:
        export(args.work, args.out)


if __name__ == "__main__":
    main()
