"""The report holds every picture and needs no other file."""

import re
from pathlib import Path

from PIL import Image

from serve_app.demo.report import Report, Row, draw_curve, write_report


def make_report(*, title: str = "t") -> Report:
    row = Row("row <one>", (Image.new("RGB", (64, 64), (1, 2, 3)), Image.new("RGB", (64, 64), (4, 5, 6))))
    return Report(title, (row, row), ((1, 1.0), (2, 0.5), (10, 0.1)), (("name", "value"),))


def test_the_page_needs_nothing_from_outside_and_escapes_text(tmp_path: Path) -> None:
    _, page = write_report(make_report(title="<script>"), tmp_path)
    text = page.read_text()
    assert "<script>" not in text
    assert text.count("src='data:image/png;base64,") == 5
    assert not re.search(r"(src|href)=['\"](?!data:)", text)


def test_the_sheet_shows_the_pictures(tmp_path: Path) -> None:
    sheet, _ = write_report(make_report(), tmp_path)
    with Image.open(sheet) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20)}
    assert {(1, 2, 3), (4, 5, 6)} <= colours


def test_a_loss_without_points_still_gives_a_frame() -> None:
    assert draw_curve((), 300, 100).size == (300, 100)
    assert draw_curve(((1, 0.0), (2, 0.0)), 300, 100).size == (300, 100)
