"""What a replica's log says of an error, by whose it is."""

import logging

import pytest

from serve_app.errors import InvalidRequest, ModelNotServed
from serve_app.refusals import SERVE_LOGGER, RefusalsInOneLine
from train_jobs.errors import Problem


def logged(error: Exception, caplog: pytest.LogCaptureFixture) -> logging.LogRecord:
    logger = logging.getLogger(SERVE_LOGGER)
    quiet = RefusalsInOneLine()
    logger.addFilter(quiet)
    logger.addHandler(caplog.handler)
    try:
        raise error
    except Exception:
        logger.exception("Request failed.")
    finally:
        logger.removeHandler(caplog.handler)
        logger.removeFilter(quiet)
    return caplog.records[-1]


@pytest.mark.parametrize(
    "error", [InvalidRequest([Problem("prompt", "a private text", "x")]), ModelNotServed("a private text", ["tiny"])]
)
def test_a_clients_mistake_is_a_line_with_its_code(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    record = logged(error, caplog)
    assert (record.levelno, record.exc_info) == (logging.INFO, None)
    assert record.getMessage() == f"Request refused: {error.code}"  # type: ignore[attr-defined]
    assert "private" not in caplog.text


def test_a_fault_of_ours_keeps_its_trace(caplog: pytest.LogCaptureFixture) -> None:
    record = logged(KeyError("x"), caplog)
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None
