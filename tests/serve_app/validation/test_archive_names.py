"""What the paths in a zip say: names in the data set, masks, and what is left out with its reason."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.validation.archive_names import NO_PART, NOT_OF_A_PICTURE, OF_THE_SYSTEM, RESERVED, named_files

PARTS = st.sampled_from(["a", "b", "masks", "Mask", "__MACOSX", ".git", "set"])
NAMES = st.sampled_from(["1.png", "2.jpg", "1_mask.png", "1.txt", "x.md", ".DS_Store", "manifest.json", "3.heic"])
PATHS = st.lists(st.builds(lambda folders, name: "/".join([*folders, name]), st.lists(PARTS, max_size=3), NAMES))


def kept(paths: list[str]) -> dict[str, str]:
    return {paths[index]: name for index, name in named_files(paths).kept.items()}


def left_out(paths: list[str]) -> dict[str, str]:
    return {paths[index]: reason for index, reason in named_files(paths).left_out.items()}


@pytest.mark.parametrize("root", ["", "dataset/", "my photos/set 1/", "masks/"])
@pytest.mark.parametrize("folder", ["masks", "mask", "Masks", "masks/x"])
@pytest.mark.parametrize("name", ["1.png", "1_mask.png"])
def test_a_picture_in_a_folder_of_masks_is_the_mask_of_its_name(root: str, folder: str, name: str) -> None:
    paths = [f"{root}1.jpg", f"{root}1.txt", f"{root}{folder}/{name}"]
    assert kept(paths) == {paths[0]: "1.jpg", paths[1]: "1.txt", paths[2]: "1_mask.png"}


def test_masks_belong_to_pictures_in_a_folder_beside_theirs() -> None:
    assert kept(["images/1.png", "masks/1.png"]) == {"images/1.png": "1.png", "masks/1.png": "1_mask.png"}


def test_what_is_in_a_folder_of_masks_and_belongs_to_no_picture_is_left_out() -> None:
    paths = ["1.png", "masks/2.png", "masks/1.txt"]
    assert kept(paths) == {"1.png": "1.png"}
    assert left_out(paths) == {"masks/2.png": NOT_OF_A_PICTURE, "masks/1.txt": NOT_OF_A_PICTURE}


def test_a_folder_around_all_files_makes_no_masks_of_them() -> None:
    assert kept(["masks/1.png", "masks/1.txt", "__MACOSX/masks/._1.png"]) == {
        "masks/1.png": "1.png",
        "masks/1.txt": "1.txt",
    }


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("README.md", NO_PART),
        ("LICENSE", NO_PART),
        ("a/x.exe", NO_PART),
        ("__MACOSX/1.png", OF_THE_SYSTEM),
        (".git/1.png", OF_THE_SYSTEM),
        ("a/.DS_Store", OF_THE_SYSTEM),
        ("a/Thumbs.db", OF_THE_SYSTEM),
        ("desktop.ini", OF_THE_SYSTEM),
        ("a/Manifest.json", RESERVED),
    ],
)
def test_what_training_ignores_is_left_out_with_its_reason(path: str, reason: str) -> None:
    assert left_out(["1.png", path]) == {path: reason}


def test_a_picture_of_a_kind_that_cannot_be_read_is_not_left_out_so_that_it_is_refused_by_name() -> None:
    paths = ["1.png", "2.HEIC", "masks/1.tif"]
    assert kept(paths) == {"1.png": "1.png", "2.HEIC": "2.HEIC", "masks/1.tif": "1.tif"}


def test_a_decomposed_picture_and_a_composed_mask_and_caption_belong_together() -> None:
    decomposed, plain = unicodedata.normalize("NFD", "\u00e9.png"), "\u00e9"
    assert list(kept([decomposed, f"{plain}.txt", f"masks/{plain}.png"]).values()) == [
        f"{plain}.png",
        f"{plain}.txt",
        f"{plain}_mask.png",
    ]


@given(PATHS)
def test_every_file_is_either_kept_or_left_out(paths: list[str]) -> None:
    files = named_files(paths)
    assert sorted([*files.kept, *files.left_out]) == list(range(len(paths)))
    assert set(files.masks) <= set(files.kept)
