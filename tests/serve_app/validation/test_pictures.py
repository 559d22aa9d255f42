"""Pictures are decoded by another process; what ends it is refused, and nothing else."""

from pathlib import Path

import pytest
from PIL import Image

from serve_app.validation import decoder, pictures
from serve_app.validation.pictures import PictureFacts, PictureProblem, decode_pictures


def saved(path: Path, kind: str = "PNG", size: tuple[int, int] = (8, 4)) -> Path:
    Image.new("RGB", size, "red").save(path, kind)
    return path


def test_each_file_gets_its_answer_in_order(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_bytes(saved(tmp_path / "x").read_bytes()[:40])
    answers = decode_pictures([saved(tmp_path / "a"), broken, saved(tmp_path / "b", "JPEG"), tmp_path / "missing"])
    assert answers == [
        PictureFacts("PNG", 8, 4),
        PictureProblem(pictures.UNREADABLE, "invalid_value"),
        PictureFacts("JPEG", 8, 4),
        PictureProblem(pictures.UNREADABLE, "invalid_value"),
    ]


def test_a_picture_over_the_limits_is_refused_by_its_size(tmp_path: Path) -> None:
    wide = saved(tmp_path / "wide", size=(decoder.SIDE_MAX_PX + 1, 1))
    assert decode_pictures([wide]) == [PictureProblem(pictures.TOO_LARGE, "too_large")]


def test_no_pictures_need_no_process() -> None:
    assert decode_pictures([]) == []


def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    script = tmp_path / "stand_in.py"
    script.write_text(body)
    monkeypatch.setattr(decoder, "__file__", str(script))


DIES_AT_BOMBS = """
import json, os, signal, sys
for line in sys.stdin:
    if "bomb" in line:
        os.kill(os.getpid(), signal.SIGKILL)
    print(json.dumps({"format": "PNG", "width_px": 1, "height_px": 1}), flush=True)
"""


def test_a_picture_that_ends_the_process_is_refused_and_the_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch, DIES_AT_BOMBS)
    answers = decode_pictures([Path("a"), Path("bomb"), Path("b"), Path("bomb"), Path("c")])
    costly = PictureProblem(pictures.TOO_COSTLY, "too_large")
    fine = PictureFacts("PNG", 1, 1)
    assert answers == [fine, costly, fine, costly, fine]


def test_after_several_such_pictures_the_rest_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, DIES_AT_BOMBS)
    answers = decode_pictures([*[Path("bomb")] * pictures.CHILDREN_MAX, Path("a")])
    assert answers == [PictureProblem(pictures.TOO_COSTLY, "too_large")] * (pictures.CHILDREN_MAX + 1)


def test_the_process_has_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Path(decoder.__file__).read_text().replace("def decode(", "def unused(")
    greedy = "def decode(path):\n    return {'problem': 'unreadable', 'x': len(bytearray(4 * 1024**3))}\n\n\n"
    stand_in(tmp_path, monkeypatch, script.replace("def main(", greedy + "def main("))
    assert decode_pictures([Path("a")]) == [PictureProblem(pictures.TOO_COSTLY, "too_large")]
