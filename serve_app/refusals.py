"""How a replica's log tells what a client did wrong: one line, where Serve would log an error with its stack trace."""

from __future__ import annotations

import logging

from serve_app.ingress.errors import INTERNAL, describe

SERVE_LOGGER = "ray.serve"


class RefusalsInOneLine(logging.Filter):
    """Lets every record through; one of an error that is the client's becomes a line with its code, never its text."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        if error is None:
            return True
        public = describe(error)
        if public.status < INTERNAL.status:
            record.msg, record.args = "Request refused: %s", (public.code,)
            record.levelno, record.levelname = logging.INFO, logging.getLevelName(logging.INFO)
            record.exc_info = record.exc_text = None
        return True


def log_refusals_in_one_line() -> None:
    """For the whole process, as Serve's logger is; a replica calls it when it starts."""
    logging.getLogger(SERVE_LOGGER).addFilter(RefusalsInOneLine())
