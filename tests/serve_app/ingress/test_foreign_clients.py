"""The real clients of OpenAI and Hugging Face over real HTTP. The making of pictures is scripted: a plain red one."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from serve_app.inference.plan import GenerationWork
from serve_app.testing import KEY, ScriptedInference, keys_of, picture_base64
from storage.jobs_testing import JobsWorld
from tests.serve_app.ingress.test_openapi_conformance import Served

RED = base64.b64decode(picture_base64(64, 64))


async def red_picture(self: ScriptedInference, work: GenerationWork) -> dict[str, object]:
    key = keys_of(work.tenant).image(work.process_id, 0, "0" * 64, "png")
    await self.store.put(key, RED, content_type="image/png")
    return {"key": key, "filename": "red.png", "content_type": "image/png", "size_bytes": len(RED), "seed": 5}


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(ScriptedInference, "_picture", red_picture)
    world = JobsWorld(tmp_path)
    served = Served(world)
    served.start()
    assert served.ready.wait(30)
    yield f"http://127.0.0.1:{served.port}/v1"
    served.stop()
    world.close()


def test_openais_client_draws_by_url_and_in_the_body_and_understands_our_errors(url: str) -> None:
    import openai

    client = openai.OpenAI(base_url=url, api_key=KEY, max_retries=0)
    extra = {"seed": 5, "steps": 4}
    by_url = client.images.generate(prompt="a", model="tiny", size="64x64", extra_body=extra)
    assert by_url.data is not None
    assert "method=GET" in str(by_url.data[0].url)
    inline = client.images.generate(prompt="a", response_format="b64_json", extra_body=extra)
    assert inline.data is not None
    assert base64.b64decode(str(inline.data[0].b64_json)) == RED
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt="a", model="no-such-model")
    assert refused.value.code == "model_not_served"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=url, api_key="wrong", max_retries=0).images.generate(prompt="a")


def test_hugging_faces_client_opens_the_picture_and_understands_our_errors(url: str) -> None:
    from huggingface_hub import InferenceClient
    from huggingface_hub.errors import HfHubHTTPError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = InferenceClient(model=f"{url}/hf/tiny", token=KEY).text_to_image("a", width=64, height=64, seed=5)
        assert image.tobytes() == Image.open(io.BytesIO(RED)).tobytes()
        with pytest.raises(HfHubHTTPError):
            InferenceClient(model=f"{url}/hf/no-such-model", token=KEY).text_to_image("a")
