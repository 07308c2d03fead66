"""The engine inside a FastAPI application of one's own.

DQE_BUNDLE=bundle DQE_INDEX=index uvicorn in_fastapi:app

`dqe-serve` has keys, limits, metrics, uploads and a page; embed the engine where an application has these already.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException, Request

from dqe_engine import Query, RetrievalEngine
from dqe_engine.errors import DeadlineError, InputError, OverloadError


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """One engine for each process, loaded where it serves. Requests that come together are answered as one batch."""
    with RetrievalEngine.load(os.environ["DQE_BUNDLE"]) as engine:
        engine.load_index(os.environ["DQE_INDEX"])
        engine.warm_up()
        with engine.batcher(most=32, room=256) as batcher:
            app.state.batcher = batcher
            yield


app = FastAPI(lifespan=lifespan)


@app.get("/similar/{article}")
async def similar(request: Request, article: str, text: str | None = None, k: int = 10) -> dict[str, Any]:
    """Articles like this one that differ as the text says."""
    try:
        found = await request.app.state.batcher.search_async(Query(reference_id=article, text=text, k=k), timeout=2.0)
    except InputError as error:
        raise HTTPException(422, str(error)) from error
    except (OverloadError, DeadlineError) as error:
        raise HTTPException(503, str(error), headers={"Retry-After": "1"}) from error
    return {"mode": found.mode, "hits": [{"id": hit.id, "score": hit.score} for hit in found.hits]}
