"""Draw the demo's data set: a robot called zib, which the tiny model's world does not contain, and ordinary scenes.

    python examples/zib/draw.py

The ordinary scenes keep the model's old words as they were while it learns the new one.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent / "assets" / "tiny"))

from world import COLOURS, SIZE_PX, SUPERSAMPLING, random_scene, render  # noqa: E402

BACKGROUNDS = ("red", "yellow", "green", "blue", "white", "black", "orange")
ORDINARY_SCENES = 10


def draw_zib(background: str, dx_px: float, dy_px: float) -> Image.Image:
    """One zib at 64 x 64: antenna with a ball, purple head, two eyes with pupils, a mouth, two feet."""
    k = SUPERSAMPLING
    image = Image.new("RGB", (SIZE_PX * k, SIZE_PX * k), COLOURS[background])
    canvas = ImageDraw.Draw(image)

    def at(*corners: float) -> list[float]:
        return [(c + (dx_px if i % 2 == 0 else dy_px)) * k for i, c in enumerate(corners)]

    canvas.rectangle(at(30, 10, 34, 20), fill=COLOURS["black"] if background != "black" else COLOURS["white"])
    canvas.ellipse(at(27, 4, 37, 14), fill=COLOURS["orange"] if background != "orange" else COLOURS["red"])
    for left in (17, 37):
        canvas.rectangle(
            at(left, 50, left + 10, 57), fill=COLOURS["black"] if background != "black" else COLOURS["white"]
        )
    canvas.rounded_rectangle(at(12, 18, 52, 52), radius=6 * k, fill=COLOURS["purple"])
    for left in (17, 35):
        canvas.ellipse(at(left, 23, left + 12, 35), fill=COLOURS["white"])
        canvas.ellipse(at(left + 3.5, 26.5, left + 8.5, 31.5), fill=COLOURS["black"])
    canvas.rectangle(at(21, 40, 43, 46), fill=COLOURS["yellow"])
    return image.resize((SIZE_PX, SIZE_PX), Image.Resampling.BOX)


def main() -> None:
    folder = HERE / "images"
    folder.mkdir(exist_ok=True)
    rng = random.Random(3)
    for background in BACKGROUNDS:
        for variant, (dx, dy) in enumerate(((0.0, 0.0), (rng.uniform(-1.5, 1.5), rng.uniform(-1.5, 1.5)))):
            name = f"zib_{background}_{variant}"
            draw_zib(background, dx, dy).save(folder / f"{name}.png", optimize=True)
            (folder / f"{name}.txt").write_text(f"a zib on a {background} background\n")
    for index in range(ORDINARY_SCENES):
        scene = random_scene(rng, held_out=False)
        render(scene, rng).save(folder / f"scene_{index:02d}.png", optimize=True)
        (folder / f"scene_{index:02d}.txt").write_text(scene.caption + "\n")


if __name__ == "__main__":
    main()
