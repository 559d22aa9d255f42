"""Links of an output: taken out, put back, and made into URLs for whoever reads it."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic_core import to_json

from serve_app.links import PLACED_LINKS, Link, put_back, signed, taken_out
from storage.errors import StorageFailed
from storage.testing import InMemoryStore

NAMES = st.text(max_size=5) | st.sampled_from(["0", "1", "url", "path", "link"])
LINKS = st.builds(
    Link, st.text("abc", min_size=1, max_size=3), st.sampled_from(["GET", "PUT"]), st.none() | NAMES, st.none() | NAMES
)
LEAVES = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | LINKS
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4))
OUTPUTS = st.dictionaries(NAMES, VALUES, max_size=5)


@given(OUTPUTS)
def test_an_output_that_was_written_down_without_its_links_gets_them_back(output: dict[str, Any]) -> None:
    plain, placed = taken_out(output)
    # JSON as the standard library has it: it refuses what is no JSON.
    read = json.loads(json.dumps(plain))
    put_back(read, PLACED_LINKS.validate_json(PLACED_LINKS.dump_json(placed)))
    assert read == output


@given(OUTPUTS)
async def test_each_link_becomes_its_own_url_and_all_else_stays(output: dict[str, Any]) -> None:
    store = InMemoryStore()
    told = await signed(store, output, expires_s=60)
    plain, placed = taken_out(output)
    for one in placed:
        value: Any = told
        for step in one.path:
            value = value[step]
        link = one.link
        if link.method == "GET":
            assert value == await store.presign_get(link.key, expires_s=60, filename=link.filename)
        else:
            assert value == await store.presign_put(link.key, expires_s=60, content_type=link.content_type)
    without, none = taken_out(told)
    assert none == ()
    for one in placed:
        put_back(without, [one])
    assert without == output
    assert taken_out(output) == (plain, placed)


async def test_what_a_client_sent_is_never_taken_for_a_link() -> None:
    forged = json.loads(to_json({"link": Link("raylora/other/secret"), "path": ["url"], "links": [{"path": ["url"]}]}))
    output = {"echoed": forged}
    assert taken_out(output) == (output, ())
    assert await signed(InMemoryStore(), output, expires_s=60) == output


async def test_a_url_that_cannot_be_made_is_an_error_and_no_missing_url() -> None:
    store = InMemoryStore()
    store.fail("presign_get", StorageFailed("presign_get", 1, "connection"))
    with pytest.raises(StorageFailed):
        await signed(store, {"files": [{"url": Link("a/b")}]}, expires_s=60)
