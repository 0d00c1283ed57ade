"""The server of examples/server: what it answers, what it refuses, and many requests at once on loopback."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import hpr
from conftest import low_rank_terms, plan_of
from hpr.anatomy.describe import describe

uvicorn, httpx2 = pytest.importorskip("uvicorn"), pytest.importorskip("httpx2")
TestClient = pytest.importorskip("fastapi.testclient").TestClient
SentenceTransformer = pytest.importorskip("sentence_transformers").SentenceTransformer
serve = pytest.importorskip("serve")  # in examples/server
TEXTS = ["the layer reads its text", "a factor"]


@pytest.fixture
def compressed(folder: Path, tmp_path: Path, random_fit: Any) -> Path:
    loaded = hpr.open_model(folder, "cpu")
    site = "encoder.layer.0.output.dense"
    student = hpr.share(loaded.model, plan_of(describe(loaded.model), {site: low_rank_terms(site)}))
    return hpr.save(student, tmp_path / "out", loaded.tokenizer)


@pytest.fixture
def client(compressed: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HPR_MODEL", str(compressed))
    return TestClient(serve.app(), raise_server_exceptions=False)


def test_embeddings_are_those_of_the_model(client: Any, compressed: Path) -> None:
    answer = client.post("/embed", json={"texts": TEXTS})
    expected = SentenceTransformer(str(compressed), device="cpu").encode(TEXTS, convert_to_tensor=True)
    assert torch.equal(torch.tensor(answer.json()["embeddings"]), expected)
    health = client.get("/health").json()
    assert (health["model"], health["dimensions"]) == ("out", 16)
    assert health["parameters"] == hpr.describe(hpr.open_model(compressed, "cpu").model).total_parameters


def test_the_fast_copy_gives_the_same(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPR_FAST", "1")
    fast = TestClient(serve.app())
    found, expected = (torch.tensor(one.post("/embed", json={"texts": TEXTS}).json()["embeddings"]) for one in (fast, client))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("content", "status", "said"),
    [
        (b'{"texts": []}', 422, "body.texts: List should have at least 1 item"),
        (b'{"texts": [""]}', 422, "body.texts.0: String should have at least 1 character"),
        (b'{"texts": "a"}', 422, "body.texts: Input should be a valid list"),
        (b'{"texts": [1]}', 422, "body.texts.0: Input should be a valid string"),
        (b'{"texts": [NaN]}', 422, "body.texts.0: Input should be a valid string"),
        (b'{"texts": ["\\ud800"]}', 422, "body.texts.0: Input should be a valid string"),
        (b'{"texts": [' + b'"a",' * 64 + b'"a"]}', 422, "at most 64 items"),
        (b'{"texts": ["' + b"a" * 8193 + b'"]}', 422, "at most 8192 characters"),
        (b"{}", 422, "body.texts: Field required"),
        (b"{", 422, "JSON decode error"),
        (b'{"texts": ["\xff"]}', 400, "error parsing the body"),
        (b"[" * 100_000, 400, "error parsing the body"),
        (b" " * (4 * 64 * 8192 + 1), 413, "2,097,152 bytes: send fewer or shorter texts"),
    ],
)
def test_what_it_refuses(client: Any, content: bytes, status: int, said: str) -> None:
    answer = client.post("/embed", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status
    assert said in answer.json()["detail"]
    assert len(answer.content) < 200  # it does not repeat the input


def test_a_body_without_a_stated_length_is_limited_too(client: Any) -> None:
    assert client.post("/embed", content=(b" " * 65_536 for _ in range(64))).status_code == 413


def test_a_busy_server_says_so(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "AT_ONCE", 0)
    answer = TestClient(serve.app()).post("/embed", json={"texts": TEXTS})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


def test_a_folder_is_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HPR_MODEL", str(tmp_path / "missing"))
    with pytest.raises(SystemExit, match=r"HPR_MODEL is .*missing.*: set it to a folder that hpr compress wrote"):
        serve.app()
    monkeypatch.delenv("HPR_MODEL")
    with pytest.raises(SystemExit, match="HPR_MODEL is None"):
        serve.app()


@pytest.fixture
def address(client: Any) -> Iterator[str]:
    """The same server on a port of loopback."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(client.app, log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def test_many_requests_at_once(address: str, compressed: Path) -> None:
    encoder = SentenceTransformer(str(compressed), device="cpu")
    given = [[" ".join(TEXTS[0].split()[: 1 + (number + row) % 5]) for row in range(1 + number % 3)] for number in range(16)]
    expected = [encoder.encode(texts, convert_to_tensor=True) for texts in given]
    with httpx2.Client(timeout=60) as client, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda texts: client.post(f"{address}/embed", json={"texts": texts}), given * 4))
    assert [answer.status_code for answer in answers] == [200] * 64
    found = [torch.tensor(answer.json()["embeddings"]) for answer in answers]
    assert all(torch.equal(one, other) for one, other in zip(found, expected * 4, strict=True))
