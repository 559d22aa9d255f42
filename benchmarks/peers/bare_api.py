"""A peer of bench_api: FastAPI over a dictionary, behind nothing but uvicorn. The least that such an API can cost."""

import uuid
from typing import Any

from fastapi import FastAPI, HTTPException, Request

app = FastAPI()
jobs: dict[str, dict[str, Any]] = {}


@app.get("/livez")
async def livez() -> dict[str, Any]:
    return {"alive": True}


@app.post("/runsync")
async def runsync(request: Request) -> dict[str, Any]:
    body = await request.json()
    job_id = str(uuid.uuid4())
    jobs[job_id] = {"id": job_id, "status": "COMPLETED", "output": body["input"]}
    return jobs[job_id]


@app.get("/status/{job_id}")
async def status(job_id: str) -> dict[str, Any]:
    if job_id not in jobs:
        raise HTTPException(404)
    return jobs[job_id]
