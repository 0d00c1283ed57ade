"""Serve the embeddings of a model that hpr compressed. Copy this file and change what you need.

HPR_MODEL=out/half uvicorn serve:app --factory --workers 2
"""

from __future__ import annotations

import os
from threading import BoundedSemaphore
from typing import Annotated

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from sentence_transformers import SentenceTransformer
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import hpr  # before the model is loaded: transformers then knows its format

TEXTS = 64  # of one request
CHARACTERS = 8_192  # of one text; the model reads its first tokens
BYTES = 4 * TEXTS * CHARACTERS  # of the body of a request
AT_ONCE = 16  # requests that a worker takes at a time: others get 503 at once, and may come again


class Texts(BaseModel):
    """What /embed takes."""

    texts: Annotated[list[Annotated[str, Field(min_length=1, max_length=CHARACTERS)]], Field(min_length=1, max_length=TEXTS)]


class Embeddings(BaseModel):
    """What /embed gives: a vector for each text, in the same order."""

    embeddings: list[list[float]]


class Health(BaseModel):
    """What /health gives."""

    model: str
    parameters: int
    dimensions: int
    process: int


class LimitedBody:
    """Refuses a request when its body grows beyond a number of bytes, before it is read as a whole."""

    def __init__(self, app: ASGIApp, limit: int):
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.limit:
                raise HTTPException(413, f"a request may have {self.limit:,} bytes: send fewer or shorter texts")
            return message

        await self.app(scope, counted, send)


def app() -> FastAPI:
    """The server of the model in the folder ``HPR_MODEL``. ``HPR_FAST=1`` makes it faster and takes more memory."""
    folder = os.environ.get("HPR_MODEL")
    if not folder or not os.path.isdir(folder):
        raise SystemExit(f"HPR_MODEL is {folder!r}: set it to a folder that hpr compress wrote")
    encoder = SentenceTransformer(folder, device="cpu", local_files_only=True)
    parameters = hpr.describe(encoder[0].model).total_parameters
    if os.environ.get("HPR_FAST") == "1":
        encoder[0].model = hpr.materialise(encoder[0].model)
    free = BoundedSemaphore(AT_ONCE)
    server = FastAPI(title="Embeddings")
    server.add_middleware(LimitedBody, limit=BYTES)

    @server.get("/health")
    def health() -> Health:
        name = os.path.basename(os.path.abspath(folder))
        dimensions = encoder.get_embedding_dimension() or 0
        return Health(model=name, parameters=parameters, dimensions=dimensions, process=os.getpid())

    @server.post("/embed")
    def embed(given: Texts) -> Embeddings:  # no coroutine, so that FastAPI runs it in a thread of its own
        if not free.acquire(blocking=False):
            raise HTTPException(503, "the server is busy: try again in a second", {"Retry-After": "1"})
        try:
            return Embeddings(embeddings=encoder.encode(given.texts).tolist())
        finally:
            free.release()

    @server.exception_handler(RequestValidationError)
    def refuse(request: Request, error: RequestValidationError) -> JSONResponse:
        """Says what is wrong and where; FastAPI's own answer repeats the whole input, which may not even be text."""
        wrong = error.errors()[0]
        return JSONResponse({"detail": f"{'.'.join(str(part) for part in wrong['loc'])}: {wrong['msg']}"}, 422)

    return server
