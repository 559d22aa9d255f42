"""The contact sheet and the page that the demo leaves behind."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

CELL_PX = 128
MARGIN_PX = 12
LABEL_PX = 26
CURVE_HEIGHT_PX = 180
INK, PAPER, GRID, LINE = (30, 30, 30), (255, 255, 255), (225, 225, 225), (45, 90, 215)


@dataclass(frozen=True)
class Row:
    """A line of pictures under one heading."""

    title: str
    images: tuple[Image.Image, ...]


@dataclass(frozen=True)
class Report:
    """Everything shown: rows of pictures, the loss as (step, loss) pairs, and facts as (name, value) pairs."""

    title: str
    rows: tuple[Row, ...]
    loss: tuple[tuple[int, float], ...]
    facts: tuple[tuple[str, str], ...]


def _font(size_px: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size_px)


def draw_curve(loss: Sequence[tuple[int, float]], width_px: int, height_px: int) -> Image.Image:
    """The loss over steps, thin as seen and thick as a running mean. Without points, an empty frame."""
    image = Image.new("RGB", (width_px, height_px), PAPER)
    canvas = ImageDraw.Draw(image)
    left, top, right, bottom = 52, 8, width_px - 8, height_px - 24
    canvas.rectangle((left, top, right, bottom), outline=GRID)
    if len(loss) < 2:
        return image
    steps = [step for step, _ in loss]
    high = max(value for _, value in loss) or 1.0
    span = max(steps[-1] - steps[0], 1)

    def at(step: int, value: float) -> tuple[float, float]:
        return left + (step - steps[0]) / span * (right - left), bottom - value / high * (bottom - top)

    canvas.line([at(step, value) for step, value in loss], fill=(170, 190, 240), width=1)
    smooth, mean = [], loss[0][1]
    for step, value in loss:
        mean += 0.15 * (value - mean)
        smooth.append(at(step, mean))
    canvas.line(smooth, fill=LINE, width=3)
    font = _font(12)
    canvas.text((4, top), f"{high:.3f}", fill=INK, font=font)
    canvas.text((4, bottom - 12), "0", fill=INK, font=font)
    canvas.text((left, bottom + 4), f"step {steps[0]}", fill=INK, font=font)
    canvas.text((right - 70, bottom + 4), f"step {steps[-1]}", fill=INK, font=font)
    return image


def draw_sheet(report: Report) -> Image.Image:
    """One picture with all rows and the loss curve."""
    columns = max(len(row.images) for row in report.rows)
    width = 2 * MARGIN_PX + columns * (CELL_PX + 6)
    height = MARGIN_PX + 40 + len(report.rows) * (LABEL_PX + CELL_PX + 8) + LABEL_PX + CURVE_HEIGHT_PX
    height += 18 * len(report.facts) + 2 * MARGIN_PX
    sheet = Image.new("RGB", (width, height), PAPER)
    canvas = ImageDraw.Draw(sheet)
    canvas.text((MARGIN_PX, MARGIN_PX), report.title, fill=INK, font=_font(24))
    y = MARGIN_PX + 40
    for row in report.rows:
        canvas.text((MARGIN_PX, y), row.title, fill=INK, font=_font(16))
        for index, image in enumerate(row.images):
            cell = image.convert("RGB").resize((CELL_PX, CELL_PX), Image.Resampling.NEAREST)
            sheet.paste(cell, (MARGIN_PX + index * (CELL_PX + 6), y + LABEL_PX - 4))
        y += LABEL_PX + CELL_PX + 8
    canvas.text((MARGIN_PX, y), "loss over the training", fill=INK, font=_font(16))
    sheet.paste(draw_curve(report.loss, width - 2 * MARGIN_PX, CURVE_HEIGHT_PX), (MARGIN_PX, y + LABEL_PX - 4))
    y += LABEL_PX + CURVE_HEIGHT_PX + 4
    for name, value in report.facts:
        canvas.text((MARGIN_PX, y), f"{name}: {value}", fill=INK, font=_font(13))
        y += 18
    return sheet


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def render_page(report: Report) -> str:
    """The same as one HTML file that needs nothing else."""
    parts = [
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(report.title)}</title><style>",
        "body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#1e1e1e}",
        "img.cell{width:128px;height:128px;image-rendering:pixelated;margin:2px}",
        "td{padding:.15rem 1rem .15rem 0;vertical-align:top}img.curve{max-width:100%}",
        f"</style></head><body><h1>{html.escape(report.title)}</h1>",
    ]
    for row in report.rows:
        parts.append(f"<h2>{html.escape(row.title)}</h2><div>")
        parts += [
            f"<img class='cell' alt='{html.escape(row.title)} {index + 1}' src='{_data_url(image)}'>"
            for index, image in enumerate(row.images)
        ]
        parts.append("</div>")
    parts.append(
        f"<h2>Loss</h2><img class='curve' alt='loss curve' src='{_data_url(draw_curve(report.loss, 900, 240))}'>"
    )
    parts.append("<h2>What was done</h2><table>")
    parts += [f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in report.facts]
    parts.append("</table></body></html>")
    return "".join(parts)


def write_report(report: Report, folder: Path) -> tuple[Path, Path]:
    """Write ``contact-sheet.png`` and ``index.html`` and return their paths."""
    sheet, page = folder / "contact-sheet.png", folder / "index.html"
    draw_sheet(report).save(sheet, optimize=True)
    page.write_text(render_page(report), encoding="utf-8")
    return sheet, page
