"""Ask whether the tiny model draws what it is told, by looking at pixels only.

    python assets/tiny/check.py --model assets/tiny/model --prompts 200

Prompts name combinations of shape, colour and background that training never showed. The background is the median
colour of the border; the object is what differs from it; its colour is the nearest named one to the median of its
inner pixels; its shape is the one whose drawing, over sizes and places, overlaps it best (intersection over union).
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from world import COLOURS, SHAPES, SIZE_PX, Scene, draw_shape, random_scene

HERE = Path(__file__).resolve().parent
Pixels = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


def nearest_colour(rgb: Pixels) -> str:
    """The named colour with the smallest Euclidean distance in RGB."""
    return min(COLOURS, key=lambda name: float(np.linalg.norm(rgb - np.array(COLOURS[name]))))


def background_rgb(pixels: Pixels) -> Pixels:
    """Median colour of the two-pixel border of [64, 64, 3] pixels; an object touches only part of it."""
    border = np.concatenate(
        [
            pixels[:2].reshape(-1, 3),
            pixels[-2:].reshape(-1, 3),
            pixels[:, :2].reshape(-1, 3),
            pixels[:, -2:].reshape(-1, 3),
        ]
    )
    median: Pixels = np.median(border, axis=0)
    return median


def object_mask(pixels: Pixels, background: Pixels) -> Mask:
    """[64, 64] pixels that lie more than half way from the background to the strongest deviation."""
    distance = np.linalg.norm(pixels - background, axis=-1)
    mask: Mask = distance > max(30.0, 0.5 * float(np.percentile(distance, 99)))
    return mask


@cache
def templates() -> list[tuple[str, Mask]]:
    """Masks of every shape over radii of 11 to 26 px, each centred."""
    drawn = []
    for shape in SHAPES:
        for radius in np.arange(11, 26.5, 0.75):
            image = Image.new("L", (SIZE_PX, SIZE_PX), 0)
            canvas = ImageDraw.Draw(image)
            draw_shape(canvas, shape, (SIZE_PX / 2, SIZE_PX / 2), float(radius), 255, 1)  # type: ignore[arg-type]
            drawn.append((shape, np.asarray(image) > 127))
    return drawn


def shifted(mask: Mask, dx: int, dy: int) -> Mask:
    """Move a mask, losing what leaves the picture."""
    out = np.zeros_like(mask)
    h, w = mask.shape
    ys, xs = slice(max(0, dy), min(h, h + dy)), slice(max(0, dx), min(w, w + dx))
    ys0, xs0 = slice(max(0, -dy), min(h, h - dy)), slice(max(0, -dx), min(w, w - dx))
    out[ys, xs] = mask[ys0, xs0]
    return out


def nearest_shape(mask: Mask) -> str:
    """The shape whose template, aligned on the bounding box, has the highest intersection over union."""
    rows, columns = np.where(mask.any(1))[0], np.where(mask.any(0))[0]
    if len(rows) == 0:
        return "nothing"
    best, name = -1.0, "nothing"
    for shape, template in templates():
        t_rows, t_columns = np.where(template.any(1))[0], np.where(template.any(0))[0]
        moved = shifted(
            template,
            round((columns[0] + columns[-1] - t_columns[0] - t_columns[-1]) / 2),
            round((rows[0] + rows[-1] - t_rows[0] - t_rows[-1]) / 2),
        )
        overlap = float((moved & mask).sum() / (moved | mask).sum())
        if overlap > best:
            best, name = overlap, shape
    return name


def describe(image: Image.Image) -> tuple[str, str, str]:
    """(shape, colour, background) as the pixels of a 64 x 64 picture show them."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    background = background_rgb(pixels)
    mask = object_mask(pixels, background)
    inner = pixels[mask] if mask.any() else pixels.reshape(-1, 3)
    return nearest_shape(mask), nearest_colour(np.median(inner, axis=0)), nearest_colour(background)


def held_out_scenes(count: int, seed: int) -> list[Scene]:
    """Distinct scenes of held-out combinations."""
    rng = random.Random(seed)
    scenes: dict[Scene, None] = {}
    while len(scenes) < count:
        scenes[random_scene(rng, held_out=True)] = None
    return list(scenes)


def score(scenes: Iterable[Scene], images: Iterable[Image.Image]) -> dict[str, float]:
    """Share of pictures that show the asked background, colour and shape."""
    rows = []
    for scene, image in zip(scenes, images, strict=True):
        shape, colour, background = describe(image)
        rows.append((shape == scene.shape, colour == scene.colour, background == scene.background))
    hits = np.array(rows, dtype=np.float64).mean(0)
    return {"shape": float(hits[0]), "object_colour": float(hits[1]), "background_colour": float(hits[2])}


def generate(model: Path, scenes: list[Scene], steps: int, guidance: float) -> list[Image.Image]:
    """Pictures by the stock diffusers pipeline, the scene's index as the seed."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    for start in range(0, len(scenes), 20):
        part = scenes[start : start + 20]
        generators = [torch.Generator("cpu").manual_seed(start + i) for i in range(len(part))]
        images += pipeline(
            [scene.caption for scene in part], num_inference_steps=steps, guidance_scale=guidance, generator=generators
        ).images
    return images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--sheet", type=Path, help="write the pictures as one PNG")
    args = parser.parse_args()
    scenes = held_out_scenes(args.prompts, seed=11)
    images = generate(args.model, scenes, args.steps, args.guidance)
    if args.sheet:
        sheet = Image.new("RGB", (SIZE_PX * 20, SIZE_PX * -(-len(images) // 20)))
        for i, image in enumerate(images):
            sheet.paste(image, (i % 20 * SIZE_PX, i // 20 * SIZE_PX))
        sheet.save(args.sheet)
    result = score(scenes, images)
    print(json.dumps({"prompts": len(scenes), "steps": args.steps, "guidance": args.guidance, **result}))
    if result["background_colour"] < 0.95 or result["object_colour"] < 0.90 or result["shape"] < 0.80:
        raise SystemExit("below the bar: background 0.95, object colour 0.90, shape 0.80")


if __name__ == "__main__":
    main()
