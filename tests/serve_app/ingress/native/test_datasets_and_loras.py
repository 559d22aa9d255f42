"""Data sets and adapters over /v1."""

import hashlib
import json
import re
import unicodedata
from base64 import b64decode
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import load, save

from serve_app.testing import OTHER_KEY, TENANT, LocalServer, keys_of, picture_base64
from storage.errors import StorageError, StorageFailed, StorageTimeout, StorageUnavailable
from storage.job_record import JobRecord
from storage.job_state import JobKind
from storage.jobs_testing import JobsWorld

PICTURE = {"filename": "1.png", "content": picture_base64()}
LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"  # 160 by 160 in the tiny model


def lora_bytes(**replaced: Any) -> bytes:
    tensors = {
        f"{LAYER}.lora_A.weight": np.zeros((4, 160), np.float16),
        f"{LAYER}.lora_B.weight": np.zeros((160, 4), np.float16),
    }
    return save({name: value for name, value in {**tensors, **replaced}.items() if value is not None})


async def import_lora(server: LocalServer, http: httpx.AsyncClient, data: bytes, **fields: Any) -> httpx.Response:
    asked = {"name": "paper", "filename": "paper.safetensors", "size_bytes": len(data), **fields}
    started = await http.post("/v1/loras/import", json=asked)
    assert started.status_code == 201, started.text
    lora_id = started.json()["id"]
    assert "method=PUT" in started.json()["upload"]["url"]
    await server.store.put(keys_of(TENANT).staging_file(lora_id, "paper.safetensors"), data)
    return await http.post(f"/v1/loras/{lora_id}/finish")


def trained(world: JobsWorld, key: str) -> JobRecord:
    record = world.running("driver", JobKind.TRAINING, tenant=TENANT, request={"name": "mine", "network": {"rank": 4}})
    lora = {"id": record.id, "key": key, "filename": "mine.safetensors", "size_bytes": 3, "step": 9}
    return world.jobs.complete(record.id, "driver", {"loras": [lora], "trigger_word": "zib"})


async def test_a_data_set_is_stored_read_and_deleted(server: LocalServer) -> None:
    async with server.client() as http:
        body = {"name": "cats", "trigger_word": "ohwx", "files": [PICTURE]}
        stored = (await http.post("/v1/datasets", json=body)).json()["dataset"]
        assert [file["filename"] for file in stored["files"]] == ["1.png"]
        assert (await http.get("/v1/datasets")).json() == {"items": [{"name": "cats"}]}
        assert (await http.get("/v1/datasets/cats")).json() == stored
        assert (await http.delete("/v1/datasets/cats")).status_code == 204
        assert (await http.get("/v1/datasets/cats")).json()["code"] == "dataset_not_found"
        assert server.store.keys() == []


async def test_decomposed_names_in_a_body_are_stored_composed(server: LocalServer) -> None:
    name = "\u304c \u00e9.png"
    body: dict[str, Any] = {"name": "cats", "files": [{**PICTURE, "filename": unicodedata.normalize("NFD", name)}]}
    async with server.client() as http:
        stored = (await http.post("/v1/datasets", json=body)).json()["dataset"]
        assert [file["filename"] for file in stored["files"]] == [name]
        body["files"].append({**PICTURE, "filename": name})
        refused = await http.post("/v1/datasets", json=body)
    assert (refused.status_code, refused.json()["code"]) == (400, "invalid_request")
    [problem] = refused.json()["validation_errors"]
    assert (problem["path"], problem["code"]) == ("files[1].filename", "duplicate")


@pytest.mark.parametrize(
    ("error", "retry_after"),
    [
        (StorageUnavailable("put", 41.2), "42"),
        (StorageTimeout("put", 120.0), "5"),
        (StorageFailed("put", 4, "connection"), "5"),
    ],
    ids=["unavailable", "timeout", "failed"],
)
async def test_an_upload_while_the_storage_is_away_may_be_sent_again_later_and_nothing_is_visible_before(
    server: LocalServer, error: StorageError, retry_after: str
) -> None:
    promise = {"name": "cats", "files": [{"filename": "1.png", "size_bytes": len(b64decode(PICTURE["content"]))}]}
    async with server.client() as http:
        started = (await http.post("/v1/uploads", json=promise)).json()
        await server.store.put(keys_of(TENANT).staging_file(started["id"], "1.png"), b64decode(PICTURE["content"]))
        requests: list[tuple[str, Any]] = [
            ("/v1/datasets", {"name": "dogs", "files": [PICTURE]}),
            ("/v1/uploads", promise),
            (f"/v1/uploads/{started['id']}/finish", None),
        ]
        server.store.break_down(error)
        for path, body in requests:
            reply = await http.post(path, json=body, headers={"Idempotency-Key": path})
            assert (reply.status_code, reply.headers["retry-after"]) == (503, retry_after), path
            assert reply.json()["code"] in {error.code, "dataset_not_stored"}
        server.store.recover()
        assert (await http.get("/v1/datasets")).json() == {"items": []}
        for path, body in requests:
            assert (await http.post(path, json=body, headers={"Idempotency-Key": path})).status_code == 201, path
        assert (await http.get("/v1/datasets")).json() == {"items": [{"name": "cats"}, {"name": "dogs"}]}


async def test_a_data_set_is_its_tenants_own(server: LocalServer) -> None:
    async with server.client() as http, server.client(OTHER_KEY) as stranger:
        await http.post("/v1/datasets", json={"name": "cats", "files": [PICTURE]})
        assert (await stranger.get("/v1/datasets")).json() == {"items": []}
        assert (await stranger.get("/v1/datasets/cats")).status_code == 404
        assert (await stranger.delete("/v1/datasets/cats")).status_code == 404
        assert (await http.get("/v1/datasets/cats")).status_code == 200


async def test_a_data_set_that_a_training_reads_stays_whatever_it_is_read_for(server: LocalServer) -> None:
    spec = {
        "name": "mine",
        "model": "tiny",
        "datasets": [{"dataset": "cats", "mask_dataset": "cat-masks"}],
        "validation": {"dataset": {"dataset": "held", "mask_dataset": "held-masks"}},
    }
    names = ("cats", "cat-masks", "held", "held-masks", "dogs")
    async with server.client() as http:
        for name in names:
            await http.post("/v1/datasets", json={"name": name, "files": [PICTURE]})
        training = (await http.post("/v1/trainings", json={"spec": spec})).json()["training"]
        replies = {name: await http.delete(f"/v1/datasets/{name}") for name in names}
        assert [reply.status_code for reply in replies.values()] == [409, 409, 409, 409, 204]
        assert replies["held-masks"].json()["code"] == "dataset_in_use"
        assert (await http.get("/v1/datasets/cat-masks")).status_code == 200
        await server.jobs.request_cancel(training["id"], tenant=TENANT)
        assert (await http.delete("/v1/datasets/cat-masks")).status_code == 204


@pytest.mark.parametrize(
    "body",
    [
        {"name": "cats", "files": []},
        {"name": "../cats", "files": [PICTURE]},
        {"name": "cats", "files": [{"filename": "1.png", "content": "bm90IGEgcGljdHVyZQ=="}]},
    ],
)
async def test_a_wrong_data_set_leaves_nothing(server: LocalServer, body: dict[str, Any]) -> None:
    async with server.client() as http:
        assert (await http.post("/v1/datasets", json=body)).status_code == 400
    assert server.store.keys() == []


async def test_a_body_of_ten_megabytes_reaches_the_data_sets_and_no_route_beside_it(server: LocalServer) -> None:
    large = b'{"prompt": "' + b"x" * (10 * 1024 * 1024) + b'"}'
    async with server.client() as http:
        assert (await http.post("/v1/generations", content=large)).status_code == 413
        assert (await http.post("/v1/datasets", content=large)).status_code == 400


async def test_an_upload_beside_the_request_has_the_limits_of_what_is_checked_at_its_end(server: LocalServer) -> None:
    async with server.client() as http:
        for name, size_bytes, status in (
            ("1.png", 100 * 2**20, 201),
            ("1.png", 100 * 2**20 + 1, 400),
            ("1.zip", 500 * 2**20, 201),
            ("1.zip", 500 * 2**20 + 1, 400),
        ):
            file = {"filename": name, "size_bytes": size_bytes}
            reply = await http.post("/v1/uploads", json={"name": "cats", "files": [file]})
            assert reply.status_code == status, (name, size_bytes)
            if status == 400:
                assert [problem["path"] for problem in reply.json()["validation_errors"]] == ["files[0].size_bytes"]


async def test_an_upload_beside_the_request_is_a_data_set_once_it_is_finished(server: LocalServer) -> None:
    data = b64decode(PICTURE["content"])
    async with server.client() as http, server.client(OTHER_KEY) as stranger:
        body = {"name": "cats", "files": [{"filename": "1.png", "size_bytes": len(data)}]}
        started = (await http.post("/v1/uploads", json=body)).json()
        assert "method=PUT" in started["files"][0]["url"]
        finish = f"/v1/uploads/{started['id']}/finish"
        early = await http.post(finish)
        assert (early.status_code, early.json()["code"]) == (400, "invalid_request")
        await server.store.put(keys_of(TENANT).staging_file(started["id"], "1.png"), data)
        assert (await stranger.post(finish)).json()["code"] == "upload_not_found"
        finished = await http.post(finish)
        assert finished.status_code == 201, finished.text
        assert [file["filename"] for file in finished.json()["dataset"]["files"]] == ["1.png"]
        assert (await http.get("/v1/datasets/cats")).json() == finished.json()["dataset"]
        assert (await http.post(finish)).json()["dataset"] == finished.json()["dataset"]


async def test_a_trained_adapter_is_listed_downloaded_and_deleted(server: LocalServer, world: JobsWorld) -> None:
    key = keys_of(TENANT).lora_file("train_0123456789ab", "mine.safetensors")
    await server.store.put(key, b"abc")
    training = trained(world, key)
    async with server.client() as http:
        [lora] = (await http.get("/v1/loras")).json()["items"]
        assert (lora["id"], lora["source"], lora["rank"], lora["trigger_word"]) == (training.id, "training", 4, "zib")
        path = f"/v1/loras/{training.id}"
        assert (await http.get(path)).json() == lora
        download = (await http.get(f"{path}/download")).json()
        assert (download["filename"], download["size_bytes"]) == ("mine.safetensors", 3)
        assert (await http.get(f"{path}/download", params={"filename": "x"})).json()["code"] == "object_not_found"
        assert (await http.delete(path)).status_code == 204
        assert server.store.keys() == []
        assert (await http.get(path)).json()["code"] == "lora_not_found"
        assert (await http.get("/v1/loras")).json()["items"] == []
        assert (await http.get(f"/v1/trainings/{training.id}")).json()["result"]["lora_id"] is None


async def test_an_imported_adapter_can_be_drawn_with(server: LocalServer) -> None:
    data = lora_bytes()
    async with server.client() as http:
        reply = await import_lora(server, http, data, sha256=hashlib.sha256(data).hexdigest(), base_model="tiny")
        assert reply.status_code == 201, reply.text
        lora = reply.json()
        assert (lora["source"], lora["rank"], lora["files"][0]["format"]) == ("import", 4, "diffusers")
        assert [item["id"] for item in (await http.get("/v1/loras")).json()["items"]] == [lora["id"]]
        made = await http.post("/v1/generations", json={"prompt": "a", "loras": [{"id": lora["id"]}]})
        assert made.status_code == 202
        record = await server.jobs.get(made.json()["id"])
        assert await server.store.get(record.request["loras"][0]["key"]) == data
        assert (await http.delete(f"/v1/loras/{lora['id']}")).status_code == 204
        assert server.store.keys() == []
        gone = await http.post("/v1/generations", json={"prompt": "b", "loras": [{"id": lora["id"]}]})
        assert gone.json()["code"] == "lora_not_usable"


async def test_pages_of_adapters_have_no_more_than_was_asked_for_and_lead_to_all(
    server: LocalServer, world: JobsWorld
) -> None:
    expected = []
    for number in range(2):
        trained(world, keys_of(TENANT).lora_file("train_0123456789ab", f"{number}.safetensors"))
        world.clock.advance(1)
    async with server.client() as http:
        expected = [item["id"] for item in (await http.get("/v1/loras")).json()["items"]]
        for _ in range(3):
            expected.insert(0, (await import_lora(server, http, lora_bytes())).json()["id"])
            world.clock.advance(1)
        assert [item["id"] for item in (await http.get("/v1/loras")).json()["items"]] == expected
        for limit in range(1, 6):
            seen, cursor = [], None
            while True:
                params = {"limit": limit} | ({} if cursor is None else {"cursor": cursor})
                page = (await http.get("/v1/loras", params=params)).json()
                assert len(page["items"]) <= limit
                seen += [item["id"] for item in page["items"]]
                cursor = page["next_cursor"]
                if cursor is None:
                    break
            assert seen == expected, limit


@pytest.mark.parametrize("cursor", ["import.", "import.x", "import.eCB5", "import.ä", "x"])
async def test_a_cursor_that_this_server_did_not_give_is_refused(server: LocalServer, cursor: str) -> None:
    async with server.client() as http:
        reply = await http.get("/v1/loras", params={"cursor": cursor})
    assert (reply.status_code, reply.json()["code"]) == (400, "invalid_cursor")


async def test_an_adapter_of_another_tenant_does_not_exist(server: LocalServer, world: JobsWorld) -> None:
    key = keys_of(TENANT).lora_file("train_0123456789ab", "mine.safetensors")
    training = trained(world, key)
    async with server.client() as http, server.client(OTHER_KEY) as stranger:
        imported = (await import_lora(server, http, lora_bytes())).json()["id"]
        assert (await stranger.get("/v1/loras")).json()["items"] == []
        for lora_id in (training.id, imported, "x", "gen_0123456789ab"):
            for method, tail in (("GET", ""), ("GET", "/download"), ("DELETE", ""), ("POST", "/finish")):
                reply = await stranger.request(method, f"/v1/loras/{lora_id}{tail}")
                assert (reply.status_code, reply.json()["code"]) == (404, "lora_not_found")


def pickled() -> bytes:
    return b"\x80\x04" + b"x" * 100


def of(names: dict[str, tuple[int, ...]]) -> bytes:
    return save({name: np.zeros(shape, np.float16) for name, shape in names.items()})


def pair(name: str, outs: int = 160, ins: int = 160) -> dict[str, tuple[int, ...]]:
    return {f"{name}.lora_down.weight": (4, ins), f"{name}.lora_up.weight": (outs, 4)}


DORA = "dora_scale"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (pickled(), "not a safetensors file"),
        (b" ", "not a safetensors file"),
        (lora_bytes()[:40], "not a safetensors file"),
        (lora_bytes(**{f"{LAYER}.lora_B.weight": None}), f"'{LAYER}' do not belong together"),
        (lora_bytes(**{f"{LAYER}.lora_B.weight": np.zeros((160, 3), np.float16)}), f"'{LAYER}' do not belong together"),
        (lora_bytes(**{f"{LAYER}.bias": np.zeros(3, np.float16)}), f"unknown weight name '{LAYER}.bias'"),
        (lora_bytes(**{f"{LAYER}.oft_blocks": np.zeros(3, np.float16)}), f"OFT is not supported: '{LAYER}.oft_blocks'"),
        (lora_bytes(**{f"{LAYER}.lokr_w1": np.zeros((2, 2), np.float16)}), "mixed with those of another kind"),
        (lora_bytes(**{f"{LAYER}.alpha": np.zeros(2, np.float16)}), f"alpha of '{LAYER}' is not one number"),
        (lora_bytes(**{f"{LAYER}.{DORA}": np.zeros((1, 160), np.float16)}), f"of '{LAYER}' is one number per input"),
        (lora_bytes(**{f"{LAYER}.{DORA}": np.zeros((8, 1), np.float16)}), f"of '{LAYER}' is not one number per output"),
        (lora_bytes(**{f"{LAYER}.lora_A.weight": np.zeros((4, 8), np.int8)}), "not floating-point"),
        (of({f"{LAYER}.lora_A.weight": (2000, 8), f"{LAYER}.lora_B.weight": (8, 2000)}), "rank is not between"),
        (of(pair("lora_unet_nowhere_0_to_q")), "none of the models .* 'lora_unet_nowhere_0_to_q'"),
        (of(pair("strange.transformer_blocks.0.attn.to_q")), "'strange.transformer_blocks.0.attn.to_q'"),
        (of(pair("lora_te3_encoder_block_0_layer_0_SelfAttention_q")), "T5 .*'lora_te3_encoder_block_0_layer_0_Self"),
        (
            of(pair("lora_unet_double_blocks_0_img_attn_proj") | pair("lora_unet_input_blocks_4_1_proj_in")),
            "'lora_unet_double_blocks_0_img_attn_proj' and 'lora_unet_input_blocks_4_1_proj_in' .*different models",
        ),
        (
            of(pair("diffusion_model.layers.0.attention.to_q") | pair("lora_unet_layers_0_attention_to_q")),
            "are for one layer",
        ),
    ],
)
async def test_a_file_that_no_model_could_take_is_refused_with_what_is_wrong_in_it(
    server: LocalServer, data: bytes, reason: str
) -> None:
    async with server.client() as http:
        reply = await import_lora(server, http, data)
        assert (reply.status_code, reply.json()["code"]) == (400, "lora_file_invalid")
        assert re.search(reason, reply.json()["detail"])
        assert (await http.get("/v1/loras")).json()["items"] == []


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (pair("lora_unet_double_blocks_0_img_attn_proj"), "no layer 'lora_unet_double_blocks_0_img_attn_proj'"),
        (pair("lora_unet_down_blocks_9_resnets_0_time_emb_proj"), "no layer 'lora_unet_down_blocks_9"),
        (pair("lora_te2_text_model_encoder_layers_0_mlp_fc1"), "adapts 'text_encoder_2' .'lora_te2_text_model"),
        (pair(LAYER, ins=320), rf"'{LAYER}' is \(160, 160\), the LoRA was made for \(160, 320\)"),
    ],
)
async def test_a_file_that_does_not_fit_the_base_model_that_it_names_is_refused(
    server: LocalServer, names: dict[str, tuple[int, ...]], reason: str
) -> None:
    async with server.client() as http:
        reply = await import_lora(server, http, of(names), base_model="tiny")
        assert (reply.status_code, reply.json()["code"]) == (400, "lora_file_invalid")
        assert re.search(f"does not fit its base model.*{reason}", reply.json()["detail"])
        # A model that is not on this machine, or is none of this server's, says nothing against it.
        for model in ("org/model", "somebody's SDXL", None):
            assert (await import_lora(server, http, of(names), base_model=model)).status_code == 201


async def test_an_import_says_where_it_took_the_rank_for_alpha(server: LocalServer) -> None:
    told = np.asarray(8, np.float16)
    settings = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 8})}
    async with server.client() as http:
        reply = await import_lora(server, http, lora_bytes(), base_model="tiny")
        assert reply.status_code == 201
        [warning] = reply.json()["warnings"]
        assert LAYER in warning
        assert (await http.get(f"/v1/loras/{reply.json()['id']}")).json()["warnings"] == [warning]
        tensors = load(lora_bytes())
        for data in (lora_bytes(**{f"{LAYER}.alpha": told}), save(tensors, metadata=settings)):
            assert (await import_lora(server, http, data)).json()["warnings"] == []
        reply = await import_lora(server, http, save(tensors, metadata={"lora_adapter_metadata": "{"}))
        assert (reply.status_code, reply.json()["code"]) == (400, "lora_file_invalid")


@pytest.mark.parametrize("promise", [{"size_bytes": 5}, {"sha256": "0" * 64}])
async def test_a_file_that_is_not_the_promised_one_is_not_taken(server: LocalServer, promise: dict[str, Any]) -> None:
    async with server.client() as http:
        reply = await import_lora(server, http, lora_bytes(), **promise)
    assert (reply.status_code, reply.json()["code"]) == (400, "lora_file_invalid")


async def test_an_import_is_finished_after_its_upload_only(server: LocalServer) -> None:
    async with server.client() as http:
        asked = {"name": "paper", "filename": "paper.safetensors", "size_bytes": 10}
        started = (await http.post("/v1/loras/import", json=asked)).json()
        reply = await http.post(f"/v1/loras/{started['id']}/finish")
        assert (reply.status_code, reply.json()["code"]) == (400, "lora_file_invalid")
        unknown = await http.post("/v1/loras/lora_000000000000/finish")
    assert (unknown.status_code, unknown.json()["code"]) == (404, "lora_not_found")


def test_a_kohya_file_is_known_by_its_names(tmp_path: Path) -> None:
    from serve_app.validation.lora_imports import read_header

    buffer = BytesIO(
        save(
            {
                "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": np.zeros((2, 8), np.float32),
                "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": np.zeros((8, 2), np.float32),
                "lora_unet_mid_block_attentions_0_proj_in.alpha": np.ones((), np.float32),
            }
        )
    )
    path = tmp_path / "k.safetensors"
    path.write_bytes(buffer.getvalue())
    header = read_header(path)
    assert (header.format, header.rank) == ("kohya", 2)
