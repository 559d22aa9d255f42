from __future__ import annotations

import posixpath
import unicodedata
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import InvalidKey
from storage.keys import Keys, Place, check_filename, check_key, check_name, check_prefix, composed, place_of

SHA = "ab" * 32
NASTY = st.sampled_from(
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "/a",
        "a//b",
        "a\\b",
        "a\x00b",
        "a\nb",
        "..\uff0f",
        "\uff0e\uff0e",
        " a",
        "a ",
        "~\ud800",
    ]
)
ANYTHING = st.text(max_size=40) | NASTY
NAMES = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,30}", fullmatch=True)
TENANTS = NAMES.filter(lambda name: name.lower() not in {"processes", "dataset", "datasets", "results"})
FILENAMES = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9 ._()-]{0,28}[a-z]", fullmatch=True).filter(
    lambda name: name.lower() != "manifest.json"
)
BUILDERS: list[Callable[[Keys, str], str]] = [
    lambda keys, part: keys.dataset_file(part, "u1", "a.png"),
    lambda keys, part: keys.dataset_file("f", part, "a.png"),
    lambda keys, part: keys.dataset_file("f", "u1", part),
    lambda keys, part: keys.dataset_manifest(part, "u1"),
    lambda keys, part: keys.dataset_manifest("f", part),
    lambda keys, part: keys.dataset_manifests_prefix(part) + "x",
    lambda keys, part: keys.staging_file(part, "a.png"),
    lambda keys, part: keys.staging_file("u1", part),
    lambda keys, part: keys.lora_file(part, "a.safetensors"),
    lambda keys, part: keys.lora_file("p", part),
    lambda keys, part: keys.checkpoint_file(part, 1, "a.bin"),
    lambda keys, part: keys.checkpoint_file("p", 1, part),
    lambda keys, part: keys.checkpoints_prefix(part) + "x",
    lambda keys, part: keys.samples_prefix(part) + "x",
    lambda keys, part: keys.sample_image(part, 1, 0, "png"),
    lambda keys, part: keys.sample_image("p", 1, 0, part),
    lambda keys, part: keys.training_log(part, "a.log"),
    lambda keys, part: keys.training_log("p", part),
    lambda keys, part: keys.images_prefix(part) + "x",
    lambda keys, part: keys.ray_train_prefix(part) + "x",
    lambda keys, part: keys.image(part, 0, SHA, "png"),
    lambda keys, part: keys.image("p", 0, part, "png"),
    lambda keys, part: keys.image("p", 0, SHA, part),
]


@given(st.sampled_from(BUILDERS), ANYTHING)
def test_no_part_can_leave_the_tenant(build: Callable[[Keys, str], str], part: str) -> None:
    keys = Keys("raylora", "matt")
    try:
        key = build(keys, part)
    except InvalidKey:
        return
    assert posixpath.normpath(key) == key
    assert keys.owns(key)
    assert check_key(key) == key


@given(TENANTS, TENANTS, NAMES, FILENAMES)
def test_a_tenant_owns_its_own_keys_and_no_others(mine: str, other: str, process_id: str, filename: str) -> None:
    key = Keys("raylora", mine).lora_file(process_id, filename)

    assert Keys("raylora", mine).owns(key)
    assert Keys("raylora", other).owns(key) == (mine == other)


@given(NAMES, NAMES)
def test_a_prefix_never_matches_its_neighbour(one: str, other: str) -> None:
    keys = Keys("raylora", "matt")

    listed = keys.dataset_manifest(other, "u1").startswith(keys.dataset_manifests_prefix(one))

    assert listed == (one == other)


def test_matt_does_not_own_what_matt2_has() -> None:
    assert not Keys("raylora", "matt").owns(Keys("raylora", "matt2").image("p", 0, SHA, "png"))


@given(st.lists(st.tuples(NAMES, NAMES, FILENAMES), min_size=2, max_size=2, unique=True))
def test_different_files_have_different_keys(parts: list[tuple[str, str, str]]) -> None:
    keys = Keys("raylora", "matt")
    one, other = parts

    assert keys.dataset_file(*one) != keys.dataset_file(*other)


@given(st.integers(0, 10**9 - 1), st.integers(0, 10**9 - 1))
def test_key_order_is_step_order(one: int, other: int) -> None:
    keys = Keys("raylora", "matt")

    in_order = keys.checkpoint_file("p", one, "a") < keys.checkpoint_file("p", other, "a")

    assert in_order == (one < other)


def test_kinds_of_files_with_the_same_name_do_not_collide() -> None:
    keys = Keys("raylora", "matt")

    built = [keys.lora_file("p", "a"), keys.training_log("p", "a"), keys.checkpoint_file("p", 0, "a")]

    assert len(set(built)) == len(built)


@pytest.mark.parametrize("tenant", ["processes", "Datasets", "dataset", "results"])
def test_a_tenant_cannot_be_named_like_what_lies_beside_tenants(tenant: str) -> None:
    with pytest.raises(InvalidKey):
        Keys("raylora", tenant)


def test_no_tenant_owns_the_mirror_of_the_records() -> None:
    keys = Keys("raylora", "matt")

    assert keys.process_record("train_0123456789ab") == "raylora/processes/train_0123456789ab.json"
    assert not keys.owns(keys.process_record("train_0123456789ab"))


def test_the_manifest_cannot_be_overwritten_by_a_file_of_its_name() -> None:
    with pytest.raises(InvalidKey):
        Keys("raylora", "matt").dataset_file("f", "u1", "Manifest.json")


@pytest.mark.parametrize("name", ["photo 1 (copy).jpg", "фото.png", "写真.jpg", "a+b,c=[d]!'e&~@f.webp"])
def test_a_plain_filename_is_accepted(name: str) -> None:
    assert check_filename(name) == name


@pytest.mark.parametrize(
    "name", ["", ".hidden", "a/b", "a\\b", "a\x7f", "e\u0301.png", "\uff0e\uff0e", "a%2fb", "x" * 201]
)
def test_a_dangerous_filename_is_refused(name: str) -> None:
    with pytest.raises(InvalidKey):
        check_filename(name)


@pytest.mark.parametrize("name", ["", "-rf", ".", "..", "a b", "é", "x" * 201])
def test_a_name_that_is_no_identifier_is_refused(name: str) -> None:
    with pytest.raises(InvalidKey):
        check_name(name, "a name")


@pytest.mark.parametrize("folder", ["", ".", "..", "a b", "a/b", "é", "a\n", "x" * 201])
def test_a_folder_that_is_none_is_refused(folder: str) -> None:
    with pytest.raises(InvalidKey):
        Keys("raylora", "matt").dataset_manifests_prefix(folder)


@pytest.mark.parametrize("folder", [".hidden", "...", "-rf", "_"])
def test_a_folder_may_start_with_a_dot_or_a_dash(folder: str) -> None:
    keys = Keys("raylora", "matt")
    assert keys.dataset_manifests_prefix(folder) == f"raylora/matt/datasets/{folder}/"
    assert place_of("raylora", keys.dataset_manifest(folder, "u1")) == Place("datasets", "matt", "u1", folder)


def test_a_key_of_an_older_layout_is_accepted() -> None:
    assert check_key("my-models/dataset/Some Folder/.caption #1.txt")


@pytest.mark.parametrize(
    "key", ["", "/a", "a/", "a//b", "a/../b", "./a", "a/" + "x" * 201, "/".join(["x" * 100] * 11), "\ud800"]
)
def test_a_key_that_some_server_cannot_hold_is_refused(key: str) -> None:
    with pytest.raises(InvalidKey):
        check_key(key)


@pytest.mark.parametrize("prefix", ["", "/", "raylora/matt", "a//", "../"])
def test_a_prefix_that_is_no_folder_is_refused(prefix: str) -> None:
    with pytest.raises(InvalidKey):
        check_prefix(prefix)


@pytest.mark.parametrize("step", [-1, 10**9])
def test_a_step_that_does_not_fit_is_refused(step: int) -> None:
    with pytest.raises(InvalidKey):
        Keys("raylora", "matt").checkpoint_file("p", step, "a")


@given(NAMES, NAMES, FILENAMES)
def test_the_place_of_a_key_is_what_it_was_made_for(tenant: str, name: str, filename: str) -> None:
    keys = Keys("some/raylora", tenant)

    for key in (keys.lora_file(name, filename), keys.sample_image(name, 1, 2, "png"), keys.image(name, 0, SHA, "png")):
        assert place_of("some/raylora", key) == Place("processes", tenant, name)
    assert place_of("some/raylora", keys.staging_file(name, filename)) == Place("staging", tenant, name)
    assert place_of("some/raylora", keys.dataset_manifest("f", name)) == Place("datasets", tenant, name, "f")
    for key in (keys.imported_lora_file(name, filename), keys.imported_lora_manifest(name)):
        assert place_of("some/raylora", key) == Place("loras", tenant, name)
    assert place_of("some/raylora", keys.kept("latents", SHA)) == Place("kept", tenant, SHA)


@pytest.mark.parametrize(
    "key",
    [
        "raylora/processes/train_0123456789ab.json",
        "raylora/dataset/processes/x/y",
        "raylora/results/staging/x/y",
        "raylora/datasets/name/file.png",
        "raylora2/matt/staging/x/y",
        "raylora/matt/processes/train_0123456789ab",
        "raylora/matt/something/else/there",
    ],
)
def test_what_is_not_ours_has_no_place(key: str) -> None:
    assert place_of("raylora", key) is None


@given(st.text(max_size=40) | st.text("e\u0301\u00e9\u1100\u1161\u212b.pn g", max_size=20))
def test_a_name_is_the_same_however_its_sender_composes_it(name: str) -> None:
    once = composed(name)
    assert composed(once) == once
    assert {composed(unicodedata.normalize(form, name)) for form in ("NFC", "NFD")} == {once}


@given(st.from_regex(r"[\u00c0-\u024f\uac00-\ud7a3A-Za-z]{1,20}\.png", fullmatch=True))
def test_letters_with_their_marks_apart_are_a_filename_once_composed(name: str) -> None:
    apart = unicodedata.normalize("NFD", name)
    try:
        check_filename(composed(name))
    except InvalidKey:
        with pytest.raises(InvalidKey):
            check_filename(composed(apart))
    else:
        assert check_filename(composed(apart)) == composed(name)


def test_what_a_filename_may_not_hold_is_shown() -> None:
    with pytest.raises(InvalidKey, match="\u00bd"):
        check_filename("1\u00bd.png")
