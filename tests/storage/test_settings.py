from __future__ import annotations

import pytest
from pydantic import ValidationError

from storage.settings import BreakerSettings, S3Settings


def test_defaults_are_valid_and_name_the_local_server() -> None:
    assert S3Settings().backend == "rclone"
    assert BreakerSettings().failure_threshold == 5
    assert BreakerSettings().recovery_s == 60


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(ValidationError):
        S3Settings.model_validate({"buckett": "x"})


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        S3Settings().bucket = "other"  # type: ignore[misc]


def test_the_secret_does_not_show() -> None:
    settings = S3Settings.model_validate({"access_key_id": "open", "secret_access_key": "sesame"})

    assert "sesame" not in repr(settings)
    assert "sesame" not in settings.model_dump_json()


@pytest.mark.parametrize("field", ["attempts_max", "attempt_timeout_s", "deadline_s", "max_concurrency"])
def test_a_bound_of_zero_is_refused(field: str) -> None:
    with pytest.raises(ValidationError):
        S3Settings.model_validate({field: 0})


def test_the_environment_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUCKET", "elsewhere")

    assert S3Settings().bucket == "raylora"
