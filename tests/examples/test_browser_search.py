"""The page of examples/browser-search: its own tests, and its scores beside those of Python on the same model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import hpr

FOLDER = Path(__file__).parents[2] / "examples" / "browser-search"
NODE = shutil.which("node")
PARAGRAPHS = {
    "dog": "Dogs, cats and other companions cannot come to the island, however well they behave, because the birds that breed"
    " on the ground leave their colony after a single visit by a hunter, and nobody can tell them that yours is friendly.",
    "nurse": "The room with plasters and splints is opposite the library and is never locked. Two of the staff are trained"
    " nurses, and for anything more than a cut you should fetch one of them before you do anything else at all.",
    "train": "A slow train leaves the harbour on Mondays and Thursdays at seven in the morning and takes a little under three"
    " hours to the capital; in deep snow it turns around, and the journey is tried again on the following day.",
}
QUERIES = {"may I bring my puppy": "dog", "somebody broke a leg": "nurse", "how do I travel to the city": "train"}


BROWSERS = (os.environ.get("CHROMIUM"), "/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome")


@pytest.fixture(scope="module")
def browser() -> None:
    """Skips what needs more than Python."""
    if NODE is None or not (FOLDER / "node_modules").is_dir():
        pytest.skip("needs node and the packages of the page: npm ci in examples/browser-search")
    if not any(place and Path(place).exists() for place in BROWSERS):
        pytest.skip("needs Chromium; name one with CHROMIUM=/path")


def run(*command: object, **environment: str) -> str:
    """The output of a program that must succeed."""
    done = subprocess.run(
        [str(part) for part in command], cwd=FOLDER, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(NODE is None, reason="needs node")
def test_its_own_tests_of_reading_splitting_ranking_and_downloading_pass() -> None:
    tests = [path for path in sorted((FOLDER / "test").glob("*.test.mjs")) if path.name != "page.test.mjs"]
    assert len(tests) == 4
    run(NODE, "--test", *tests)


@pytest.fixture(scope="module")
def exported(browser: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that HPR_BROWSER_MODEL names, or MiniLM with the 8-bit integers of ONNX Runtime's own tools."""
    if "HPR_BROWSER_MODEL" in os.environ:
        return Path(os.environ["HPR_BROWSER_MODEL"])
    pytest.importorskip("onnxscript")
    quantization = pytest.importorskip("onnxruntime.quantization")
    loaded = hpr.open_model(device="cpu")
    folder = tmp_path_factory.mktemp("exported")
    (folder / "onnx").mkdir()
    loaded.tokenizer.save_pretrained(folder)
    loaded.model.config.save_pretrained(folder)

    class LastStates(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = loaded.model.eval()

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor) -> Any:
            return self.encoder(input_ids, attention_mask, token_type_ids).last_hidden_state

    batch = loaded.tokenizer(["a dog", "a longer sentence about dogs"], padding=True, return_tensors="pt")
    names = ("input_ids", "attention_mask", "token_type_ids")
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    torch.onnx.export(
        LastStates().eval(),
        (batch["input_ids"], batch["attention_mask"], torch.zeros_like(batch["input_ids"])),
        folder / "onnx" / "model.onnx",
        dynamo=True,
        input_names=names,
        output_names=["last_hidden_state"],
        dynamic_shapes=(sizes,) * 3,
        external_data=False,
        verbose=False,
    )
    quantization.quantize_dynamic(
        folder / "onnx" / "model.onnx", folder / "onnx" / "model_quantized.onnx", weight_type=quantization.QuantType.QInt8
    )
    return folder


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory, exported: Path) -> Path:
    """The built page with the model in it, beside and not in the place of one that a user built."""
    built = tmp_path_factory.mktemp("page") / "dist"
    run(NODE, FOLDER / "node_modules" / "vite" / "bin" / "vite.js", "build", "--outDir", built, "--logLevel", "warn")
    run(NODE, "scripts/model.mjs", exported, built / "model")
    return built


def test_the_page_finds_answers_on_wide_and_narrow_screens_in_chromium(dist: Path) -> None:
    out = run(NODE, "--test", "test/page.test.mjs", DIST=str(dist))
    assert "# skipped 0" in out


def test_the_page_scores_passages_as_python_does(dist: Path, exported: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    document = tmp_path / "document.txt"
    document.write_text("\n\n".join(PARAGRAPHS.values()), encoding="utf-8")
    answers = [json.loads(line) for line in run(NODE, "scripts/ask.mjs", dist, document, *QUERIES).splitlines()]
    session = onnxruntime.InferenceSession(exported / "onnx" / "model_quantized.onnx")
    tokenizer = AutoTokenizer.from_pretrained(exported)

    def vector(text: str) -> np.ndarray:
        batch = tokenizer(text, return_tensors="np")
        ids, mask = batch["input_ids"].astype(np.int64), batch["attention_mask"].astype(np.int64)
        inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        mean = session.run(["last_hidden_state"], inputs)[0][0].mean(0)
        return np.asarray(mean / np.linalg.norm(mean))

    passages = [vector(paragraph) for paragraph in PARAGRAPHS.values()]
    assert [answer["query"] for answer in answers] == list(QUERIES)
    for answer in answers:
        first = list(PARAGRAPHS)[answer["hits"][0]["passage"]]
        assert first == QUERIES[answer["query"]]
        assert len(answer["hits"]) == len(PARAGRAPHS)
        asked = vector(answer["query"])
        for hit in answer["hits"]:
            assert hit["score"] == pytest.approx(float(asked @ passages[hit["passage"]]), abs=0.02)
