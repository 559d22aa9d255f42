"""The procedurally drawn, captioned world that the tiny base model is trained on.

One object of a shape and colour, in one of two named sizes and five places, on a plain background.
Everything is a pure function of a ``random.Random``, so a seed names a data set.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw

SIZE_PX = 64
SUPERSAMPLING = 4

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (245, 145, 30),
    "yellow": (250, 225, 60),
    "green": (50, 165, 75),
    "blue": (45, 90, 215),
    "purple": (140, 60, 175),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
RADIUS_PX = {"small": 13.0, "": 18.0, "large": 24.0}
PLACES: dict[str, tuple[int, int]] = {
    "in the center": (0, 0),
    "on the left": (-1, 0),
    "on the right": (1, 0),
    "at the top": (0, -1),
    "at the bottom": (0, 1),
}
HELD_OUT_FRACTION = 0.12


@dataclass(frozen=True)
class Scene:
    """What one picture shows; ``size`` and ``place`` may be empty, which leaves them open."""

    shape: str
    colour: str
    background: str
    size: str = ""
    place: str = ""

    @property
    def caption(self) -> str:
        words = ["a", self.size, self.colour, self.shape, "on a", self.background, "background", self.place]
        return " ".join(word for word in words if word)


def combinations() -> list[tuple[str, str, str]]:
    """Every (shape, colour, background) in which the object can be seen."""
    return [(s, c, b) for s in SHAPES for c in COLOURS for b in COLOURS if c != b]


def held_out_combinations() -> frozenset[tuple[str, str, str]]:
    """The combinations that training never shows, fixed by a seed of their own."""
    every = combinations()
    return frozenset(random.Random(20261121).sample(every, int(len(every) * HELD_OUT_FRACTION)))


def random_scene(rng: random.Random, *, held_out: bool) -> Scene:
    """Draw a scene from the training combinations, or from the held-out ones."""
    hidden = held_out_combinations()
    pool = [combo for combo in combinations() if (combo in hidden) == held_out]
    shape, colour, background = rng.choice(pool)
    size = rng.choice(("small", "", "large"))
    place = rng.choice((*PLACES, "", ""))
    return Scene(shape, colour, background, size, place)


def loosen(scene: Scene, rng: random.Random) -> Scene:
    """The scene as a caption tells it: now and then the colour is left open, or the shape's word means nothing.

    So a word that the base does not know leaves the rest of a prompt in force, and a LoRA can give it a meaning.
    """
    shape, colour = scene.shape, scene.colour
    if rng.random() < 0.1:
        shape = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 6)))
    if rng.random() < 0.1:
        colour = ""
    return replace(scene, shape=shape, colour=colour)


def polygon(shape: str, cx: float, cy: float, r: float) -> list[tuple[float, float]]:
    """Corners of a straight-edged shape, in pixels."""
    if shape == "square":
        h = r * 0.85
        return [(cx - h, cy - h), (cx + h, cy - h), (cx + h, cy + h), (cx - h, cy + h)]
    if shape == "triangle":
        return [(cx, cy - r), (cx + r * 0.95, cy + r * 0.8), (cx - r * 0.95, cy + r * 0.8)]
    if shape == "star":
        spikes = [(r * 1.08 if i % 2 == 0 else r * 0.45, math.pi * i / 5 - math.pi / 2) for i in range(10)]
        return [(cx + q * math.cos(a), cy + q * math.sin(a)) for q, a in spikes]
    if shape == "cross":
        a, b = r * 0.33, r
        corners = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a)]
        return [(cx + x, cy + y) for x, y in [*corners, (-b, -a), (-a, -a)]]
    raise ValueError(f"{shape} has no corners")


def draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, centre: tuple[float, float], r: float, fill: tuple[int, int, int], k: int
) -> None:
    """Draw one shape on a canvas that is ``k`` times the final size."""
    cx, cy, q = centre[0] * k, centre[1] * k, r * k
    if shape == "circle":
        draw.ellipse((cx - q, cy - q, cx + q, cy + q), fill=fill)
    elif shape == "ring":
        draw.ellipse((cx - q, cy - q, cx + q, cy + q), outline=fill, width=int(q * 0.42))
    else:
        draw.polygon(polygon(shape, cx, cy, q), fill=fill)


def render(scene: Scene, rng: random.Random) -> Image.Image:
    """Draw a scene at 64 x 64 RGB; ``rng`` decides what the caption leaves open, and a small jitter."""
    place = scene.place or rng.choice(tuple(PLACES))
    r = RADIUS_PX[scene.size] * rng.uniform(0.98, 1.02)
    reach = SIZE_PX / 2 - r - 2
    dx, dy = PLACES[place]
    centre = (
        SIZE_PX / 2 + dx * reach + rng.uniform(-0.5, 0.5),
        SIZE_PX / 2 + dy * reach + rng.uniform(-0.5, 0.5),
    )
    k = SUPERSAMPLING
    image = Image.new("RGB", (SIZE_PX * k, SIZE_PX * k), COLOURS[scene.background])
    draw_shape(ImageDraw.Draw(image), scene.shape, centre, r, COLOURS[scene.colour], k)
    return image.resize((SIZE_PX, SIZE_PX), Image.Resampling.BOX)


def render_clutter(rng: random.Random) -> Image.Image:
    """A scene of many parts in any colours, without a caption: keeps the VAE true beyond the captioned world."""
    k = SUPERSAMPLING

    def colour() -> tuple[int, int, int]:
        if rng.random() < 0.6:
            return rng.choice(tuple(COLOURS.values()))
        return (rng.randrange(256), rng.randrange(256), rng.randrange(256))

    image = Image.new("RGB", (SIZE_PX * k, SIZE_PX * k), colour())
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(2, 7)):
        x, y, r = rng.uniform(0, 64), rng.uniform(0, 64), rng.uniform(2, 20)
        kind = rng.random()
        if kind < 0.6:
            draw_shape(draw, rng.choice(SHAPES), (x, y), r, colour(), k)
        elif kind < 0.8:
            end = (rng.uniform(0, 64) * k, rng.uniform(0, 64) * k)
            draw.line((x * k, y * k, *end), fill=colour(), width=rng.randint(1, 5) * k)
        else:
            w, h = rng.uniform(3, 25) * k, rng.uniform(3, 25) * k
            draw.rectangle((x * k, y * k, x * k + w, y * k + h), fill=colour())
    return image.resize((SIZE_PX, SIZE_PX), Image.Resampling.BOX)
