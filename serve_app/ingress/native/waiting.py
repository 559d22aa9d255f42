"""The long-poll parameter of `/v1`."""

from typing import Annotated

from fastapi import Query

WAIT_MAX_S = 60.0

Waited = Annotated[float, Query(ge=0.0, le=WAIT_MAX_S, allow_inf_nan=False, description="Seconds to wait for the end.")]
