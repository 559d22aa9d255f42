"""The loss history as a picture and as a TensorBoard file."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw
from tensorboardX.event_file_writer import EventFileWriter
from tensorboardX.proto import event_pb2
from tensorboardX.summary import scalar

Points = Sequence[tuple[int, float]]
WIDTH_PX, HEIGHT_PX, MARGIN_PX = 800, 400, 48
LOSS, SMOOTHED, VALIDATION = (176, 196, 222), (31, 78, 160), (200, 60, 40)
SMOOTHING = 0.95
"""Of an exponential moving average, as TensorBoard's slider has it."""


def smoothed(points: Points) -> list[tuple[int, float]]:
    """An exponential moving average without the pull towards zero at its start (Kingma & Ba 2015, section 3)."""
    found: list[tuple[int, float]] = []
    average, weight = 0.0, 0.0
    for step, loss in points:
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        found.append((step, average / weight))
    return found


def loss_png(history: Points, validation: Points = ()) -> bytes:
    """Loss (pale), smoothed loss (blue) and validation loss (red) over the steps. `history` must not be empty."""
    image = Image.new("RGB", (WIDTH_PX, HEIGHT_PX), "white")
    draw = ImageDraw.Draw(image)
    values = [loss for _, loss in [*history, *validation]]
    low, high = min(values), max(values)
    first, last = history[0][0], max(history[-1][0], history[0][0] + 1)

    def place(point: tuple[int, float]) -> tuple[float, float]:
        across = (point[0] - first) / (last - first)
        up = (point[1] - low) / (high - low) if high > low else 0.5
        return MARGIN_PX + across * (WIDTH_PX - 2 * MARGIN_PX), HEIGHT_PX - MARGIN_PX - up * (HEIGHT_PX - 2 * MARGIN_PX)

    frame = (MARGIN_PX, MARGIN_PX, WIDTH_PX - MARGIN_PX, HEIGHT_PX - MARGIN_PX)
    draw.rectangle(frame, outline=(150, 150, 150))
    draw.text((4, MARGIN_PX - 6), f"{high:.4g}", fill="black")
    draw.text((4, HEIGHT_PX - MARGIN_PX - 6), f"{low:.4g}", fill="black")
    draw.text((MARGIN_PX, HEIGHT_PX - MARGIN_PX + 6), f"step {first}", fill="black")
    draw.text((WIDTH_PX - 2 * MARGIN_PX, HEIGHT_PX - MARGIN_PX + 6), f"step {last}", fill="black")
    for points, colour, width in ((history, LOSS, 1), (smoothed(history), SMOOTHED, 2), (validation, VALIDATION, 2)):
        if len(points) > 1:
            draw.line([place(point) for point in points], fill=colour, width=width)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def tensorboard_file(folder: Path, history: Points, validation: Points = ()) -> bytes:
    """One whole event file: `loss`, `loss/smoothed` and `loss/validation`. Written anew each time from the history, so
    that a continued training leaves one file. `folder` is for the writer and is left behind."""
    writer = EventFileWriter(str(folder), filename_suffix=".raylora")
    for tag, points in {"loss": history, "loss/smoothed": smoothed(history), "loss/validation": validation}.items():
        for step, loss in points:
            event = event_pb2.Event(summary=scalar(tag, loss))
            event.step = step
            writer.add_event(event)
    writer.close()
    return next(iter(sorted(folder.glob("events.out.tfevents.*")))).read_bytes()
