"""Where the demo's instance lives, whatever is set for another one."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import SecretStr

from serve_app.demo.run import REPOSITORY, surroundings
from serve_app.settings import Settings


@pytest.fixture(autouse=True)
def _no_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYLORA_HOME", raising=False)


def test_its_data_are_where_data_were_said_to_be(tmp_path: Path) -> None:
    assert surroundings(Settings(home=tmp_path))["RAYLORA_HOME"] == str(tmp_path / "demo")
    assert surroundings(Settings())["RAYLORA_HOME"] == str(REPOSITORY / ".raylora" / "demo")


def test_it_shares_no_port_and_no_public_address_with_the_images_instance() -> None:
    shared = Settings(host="0.0.0.0", s3_port=9000, s3_public_endpoint_url="http://files.example.com:9000")  # noqa: S104
    own = surroundings(shared)
    port = own["RAYLORA_S3_PORT"]
    assert port not in {"9000", own["RAYLORA_PORT"]}
    assert own["RAYLORA_S3_PUBLIC_ENDPOINT_URL"] == f"http://127.0.0.1:{port}"
    assert (own["RAYLORA_HOST"], own["RAYLORA_S3_HOST"]) == ("127.0.0.1", "127.0.0.1")


def test_an_s3_server_of_the_users_own_stays_as_it_is_set() -> None:
    keys = {"s3_access_key_id": SecretStr("i"), "s3_secret_access_key": SecretStr("s")}
    own = surroundings(Settings(s3_endpoint_url="http://s3", **keys))  # type: ignore[arg-type]
    assert not [name for name in own if "_S3_" in name]
