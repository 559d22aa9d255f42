import pickle
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from serve_app.settings import AutoscalingSettings, Settings, SettingsIncomplete
from storage.settings import S3Settings


@pytest.fixture(autouse=True)
def _no_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [name for name in os.environ if name.startswith("RAYLORA_")]:
        monkeypatch.delenv(name)


def complete(**fields: object) -> Settings:
    return Settings(s3_access_key_id=SecretStr("id"), s3_secret_access_key=SecretStr("sec"), **fields)  # type: ignore[arg-type]


def test_the_defaults_are_a_laptop_on_loopback() -> None:
    settings = Settings()
    assert (settings.host, settings.port, settings.default_model) == ("127.0.0.1", 8000, "tiny")
    assert settings.home == Path.home() / ".raylora"
    assert settings.uses_embedded_s3()
    assert settings.api_key is None


def test_arguments_go_before_environment_and_environment_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "raylora.toml"
    file.write_text('port = 1\nhost = "0.0.0.0"\ns3_port = 3\n[models]\nmine = "/models/mine"\n')
    monkeypatch.setenv("RAYLORA_CONFIG", str(file))
    monkeypatch.setenv("RAYLORA_PORT", "2")
    monkeypatch.setenv("RAYLORA_HOST", "10.0.0.1")
    settings = Settings(host="10.0.0.2", default_model="mine")
    assert (settings.s3_port, settings.port, settings.host) == (3, 2, "10.0.0.2")
    assert settings.models == {"mine": "/models/mine"}


def test_the_file_may_be_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "raylora.yaml"
    file.write_text("port: 7\nlimits: {wait_max_s: 60}\n")
    monkeypatch.setenv("RAYLORA_CONFIG", str(file))
    assert (Settings().port, Settings().limits.wait_max_s) == (7, 60)


def test_an_unknown_field_of_the_file_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "raylora.toml"
    file.write_text("prot = 1\n")
    monkeypatch.setenv("RAYLORA_CONFIG", str(file))
    with pytest.raises(ValidationError, match="prot"):
        Settings()


def test_a_named_file_that_is_missing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYLORA_CONFIG", "/nowhere/raylora.toml")
    with pytest.raises(SettingsIncomplete):
        Settings()


def test_the_default_model_must_be_one_of_the_models() -> None:
    with pytest.raises(ValidationError):
        Settings(default_model="other")


def test_nothing_can_be_changed_later() -> None:
    with pytest.raises(ValidationError):
        Settings().port = 1  # type: ignore[misc]


def test_secrets_show_neither_in_text_nor_in_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = complete(api_key=SecretStr("open-sesame"))
    assert "open-sesame" not in repr(settings) + str(settings.s3())
    monkeypatch.setenv("RAYLORA_PORT", "open-sesame")
    with pytest.raises(ValidationError) as refused:
        Settings()
    assert "open-sesame" not in str(refused.value)


def test_settings_travel_to_replicas_whole() -> None:
    settings = complete(api_key=SecretStr("k"), port=8123)
    again = pickle.loads(pickle.dumps(settings))  # noqa: S301 our own bytes
    assert again == settings
    assert again.api_key.get_secret_value() == "k"


def test_without_credentials_there_is_no_storage() -> None:
    with pytest.raises(SettingsIncomplete):
        Settings().s3()


def test_the_stacks_own_server_is_handed_over_whole() -> None:
    s3 = S3Settings(
        endpoint_url="http://127.0.0.1:9000", bucket="b", access_key_id=SecretStr("i"), secret_access_key=SecretStr("s")
    )
    settings = Settings().with_s3(s3)
    assert settings.s3() == s3
    assert not settings.uses_embedded_s3()
    assert settings.jobs_config().s3 == s3


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"s3_endpoint_url": "http://s3"}, "RAYLORA_S3_ACCESS_KEY_ID and RAYLORA_S3_SECRET_ACCESS_KEY;"),
        ({"s3_bucket": "b", "s3_secret_access_key": "secret-1"}, "needs RAYLORA_S3_ACCESS_KEY_ID;"),
        ({"s3_endpoint_url": "http://s3", "s3_access_key_id": "i"}, "needs RAYLORA_S3_SECRET_ACCESS_KEY;"),
        ({"s3_backend": "aws"}, "RAYLORA_S3_ACCESS_KEY_ID and RAYLORA_S3_SECRET_ACCESS_KEY;"),
    ],
)
def test_an_s3_server_that_is_named_in_part_is_refused(given: dict[str, str], missing: str) -> None:
    with pytest.raises(ValidationError, match=missing) as refused:
        Settings(**given)  # type: ignore[arg-type]
    assert "secret-1" not in str(refused.value)


def test_what_the_embedded_server_is_to_be_like_names_no_other() -> None:
    settings = Settings(s3_bucket="b", s3_prefix="a/b", s3_public_endpoint_url="https://files", s3_port=9000)
    assert settings.uses_embedded_s3()
    assert not complete(s3_endpoint_url="http://s3").uses_embedded_s3()
    assert not complete().uses_embedded_s3()


@pytest.mark.parametrize("name", ["processes", "Datasets", "-a", "a.b", ""])
def test_a_tenant_that_could_have_no_objects_is_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        Settings(default_tenant=name)
    with pytest.raises(ValidationError):
        Settings(tenant_keys={name: SecretStr("0123456789abcdef")})


@pytest.mark.parametrize("prefix", ["a//b", "/a", "..", ""])
def test_a_prefix_that_no_key_may_begin_with_is_refused(prefix: str) -> None:
    with pytest.raises(ValidationError):
        Settings(s3_prefix=prefix)


def test_records_are_below_home_unless_a_database_is_named(tmp_path: Path) -> None:
    assert complete(home=tmp_path).jobs_config().records.url == f"sqlite:///{tmp_path}/records.db"
    assert complete(records_url="postgresql://db/x").records().url == "postgresql://db/x"


def test_further_tenants_have_keys_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYLORA_TENANT_KEYS", '{"alice": "key-of-alice-0123"}')
    settings = Settings(api_key=SecretStr("key"))
    keys = {tenant: key.get_secret_value() for tenant, key in settings.keys_by_tenant().items()}
    assert keys == {"default": "key", "alice": "key-of-alice-0123"}
    assert "key-of-alice" not in repr(settings)


@pytest.mark.parametrize(
    "keys",
    [
        {"default": "key-of-default-01"},
        {"a": "0123456789abcdef", "b": "0123456789abcdef"},
        {"a": "the-key-of-the-first"},
        {"a": "short"},
        {"../a": "0123456789abcdef"},
    ],
)
def test_a_tenant_without_a_name_or_key_of_its_own_is_refused(keys: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        Settings(api_key=SecretStr("the-key-of-the-first"), tenant_keys=keys)  # type: ignore[arg-type]


def test_the_number_of_replicas_is_fixed_unless_a_range_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = Settings(inference_replicas=3)
    assert (fixed.autoscaling, fixed.replicas_max(), fixed.may_rest()) == (None, 3, False)
    monkeypatch.setenv("RAYLORA_AUTOSCALING__REPLICAS_MIN", "0")
    monkeypatch.setenv("RAYLORA_AUTOSCALING__REPLICAS_MAX", "4")
    scaled = Settings()
    assert (scaled.replicas_max(), scaled.may_rest()) == (4, True)


def test_a_range_of_replicas_that_is_none_is_refused() -> None:
    with pytest.raises(ValidationError, match="replicas_min"):
        AutoscalingSettings(replicas_min=3, replicas_max=2)


def test_rounded_weights_need_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.settings.find_spec", lambda name: None)
    for rounded, extra in (("int8", "quantized"), ("float8", "quantized"), ("nf4", "nf4")):
        monkeypatch.setenv("RAYLORA_QUANTIZE", rounded)
        with pytest.raises(ValidationError, match=rf"install raylora\[{extra}\].*leave this unset"):
            Settings()
    monkeypatch.setattr("serve_app.settings.find_spec", lambda name: name)
    assert Settings().quantize == "nf4"


def test_the_key_for_wandb_comes_by_either_name_and_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "RAYLORA_WANDB_API_KEY"):
        monkeypatch.delenv("WANDB_API_KEY", raising=False)
        monkeypatch.setenv(name, "a-key-for-wandb")
        settings = complete()
        assert settings.wandb_api_key == SecretStr("a-key-for-wandb")
        config = settings.jobs_config()
        assert config.wandb_api_key == settings.wandb_api_key
        assert "a-key" not in repr(settings) + repr(config) + settings.model_dump_json() + config.model_dump_json()
