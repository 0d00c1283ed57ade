"""Graphs of ONNX compute what their model does, with each number stored once, at any number of examples and positions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from torch import Tensor

import hpr
from conftest import HEADS, inputs_of
from hpr.coding.codes import parts_of
from hpr.data.loaded_model import as_loaded
from hpr.nn.coded import codes_of

ort = pytest.importorskip("onnxruntime", reason="graphs are run by onnxruntime")
onnx = pytest.importorskip("onnx", reason="graphs are read by onnx")
pytest.importorskip("onnxscript", reason="graphs are written by onnxscript")

from hpr.export.onnx import Exported, export_onnx  # noqa: E402


def made(build: Any, ids: Tensor, family: str, head: type, budget: str) -> Any:
    model = build(family, head)
    with torch.no_grad():
        model.get_input_embeddings().weight[5, 3] = 0.5 if family == "bert" else 0.0  # perhaps a code outside int8
    profile = hpr.profile(model, [inputs_of(family, ids)])
    return hpr.share(model, hpr.plan(model, profile, budget), profile).eval()


def session(exported: Exported, name: str) -> Any:
    return ort.InferenceSession(str(exported.folder / "onnx" / name))


def tensors(exported: Exported, name: str) -> dict[str, np.ndarray]:
    graph = onnx.load(exported.folder / "onnx" / name).graph
    return {one.name: onnx.numpy_helper.to_array(one, str(exported.folder / "onnx")) for one in graph.initializer}


@pytest.mark.parametrize("budget", ["60%", "12%bytes"])
def test_an_encoder_at_other_sizes(build, ids, tmp_path, budget):
    student = made(build, ids, "bert", tf.AutoModel, budget)
    exported = export_onnx(as_loaded(student), tmp_path / "out")
    name = "model.onnx" if budget == "60%" else "model_quantized.onnx"
    assert exported.tensors <= 1.01 * exported.model
    stored = list(tensors(exported, name).values())
    matrices = {one.tobytes() for one in stored if one.dtype == np.int8}
    for path, coded in codes_of(student).items():  # the integers of the plan, one byte each
        if "layer" in path:
            [*parts] = parts_of(coded.codes())
            assert all(part.values.astype(np.int8).T.tobytes() in matrices for part in parts)
    assert budget == "60%" or not [one for one in stored if one.dtype == np.float32 and one.size > 24 * 16]
    for examples, positions in ((1, 1), (5, 13)):
        more = torch.randint(3, 40, (examples, positions), generator=torch.Generator().manual_seed(2))
        mask = torch.ones_like(more)
        mask[0, positions // 2 + 1 :] = 0
        wanted = student(input_ids=more, attention_mask=mask).last_hidden_state.detach().numpy()
        [found, *_] = session(exported, name).run(None, {"input_ids": more.numpy(), "attention_mask": mask.numpy()})
        assert np.abs(found - wanted)[mask.bool().numpy()].max() < (1e-5 if budget == "60%" else 0.1)


@pytest.mark.parametrize(("family", "budget"), [("gpt2", "60%"), ("llama", "8%bytes")])
def test_a_writer_with_its_keys_and_values(build, ids, tmp_path, family, budget):
    """The same graph reads a prompt with empty keys and values, and then one token after the other."""
    student = made(build, ids, family, HEADS[family], budget)
    exported = export_onnx(as_loaded(student), tmp_path / "out")
    graph = session(exported, "model.onnx" if budget == "60%" else "model_quantized.onnx")
    size = next(parameter.numel() for parameter in student.get_input_embeddings().parameters())
    if budget == "8%bytes":  # a tied table is stored once
        [table] = [one for one in tensors(exported, "model_quantized.onnx").values() if one.size == size]
        assert table.dtype == np.uint8
    cached = {one.name: one.shape for one in graph.get_inputs() if one.name.startswith("past_key_values.")}
    assert "past_key_values.0.key" in cached
    past = {name: np.zeros((2, shape[1], 0, shape[3]), np.float32) for name, shape in cached.items()}
    mask, logits = torch.ones_like(ids), []
    mask[1, :2] = 0  # a shorter text, padded on the left
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for start, stop in ((0, 4), (4, 5), (5, 7)):
        feed = {"input_ids": ids[:, start:stop].numpy(), "attention_mask": mask[:, :stop].numpy(), **past}
        feed |= {"position_ids": positions[:, start:stop].numpy()}
        results = graph.run(None, {one.name: feed[one.name] for one in graph.get_inputs()})
        names = [one.name for one in graph.get_outputs()]
        logits.append(results[names.index("logits")])
        past = {name: results[names.index(name.replace("past_key_values", "present"))] for name in cached}
    wanted = student(input_ids=ids, attention_mask=mask, position_ids=positions).logits.detach().numpy()
    gap = np.abs(np.concatenate(logits, 1) - wanted)[mask.bool().numpy()].max()
    assert gap < (1e-5 if budget == "60%" else 0.1) * np.abs(wanted).max()


def test_an_encoder_and_decoder_share_one_file_of_weights(build, ids, tmp_path):
    budget = "12%bytes"
    student = made(build, ids, "bart", HEADS["bart"], budget)
    exported = export_onnx(as_loaded(student), tmp_path / "out")
    ending = ".onnx" if budget == "60%" else "_quantized.onnx"
    names = {f"onnx/{name}{ending}" for name in ("encoder_model", "decoder_model", "decoder_with_past_model")}
    assert {name for name in exported.files if name.startswith("onnx/")} == {*names, f"onnx/weights{ending}_data"}
    assert exported.tensors <= 1.01 * exported.model + 3 * 2**16
    first, later = session(exported, f"decoder_model{ending}"), session(exported, f"decoder_with_past_model{ending}")
    [states] = session(exported, f"encoder_model{ending}").run(None, _wanted(session(exported, f"encoder_model{ending}"), ids))
    feed = {
        "input_ids": ids[:, :3].numpy(),
        "encoder_hidden_states": states,
        "encoder_attention_mask": np.ones((2, 7), np.int64),
    }
    results = dict(zip([one.name for one in first.get_outputs()], first.run(None, _only(first, feed)), strict=True))
    wanted = student(input_ids=ids, decoder_input_ids=ids[:, :4]).logits.detach().numpy()
    allowed = (1e-5 if budget == "60%" else 0.1) * np.abs(wanted).max()
    assert np.abs(results["logits"] - wanted[:, :3]).max() < allowed
    feed = {
        "input_ids": ids[:, 3:4].numpy(),
        "encoder_attention_mask": np.ones((2, 7), np.int64),
        "encoder_hidden_states": states,
    }
    feed |= {name.replace("present", "past_key_values"): value for name, value in results.items()}
    found = dict(zip([one.name for one in later.get_outputs()], later.run(None, _only(later, feed)), strict=True))
    assert np.abs(found["logits"] - wanted[:, 3:]).max() < allowed
    assert found["present.0.decoder.key"].shape[2] == 4


def _only(graph: Any, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {one.name: feed[one.name] for one in graph.get_inputs()}


def _wanted(graph: Any, ids: Tensor) -> dict[str, np.ndarray]:
    return _only(graph, {"input_ids": ids.numpy(), "attention_mask": np.ones_like(ids.numpy())})


def test_an_output_folder_is_replaced_but_no_other_one(build, tmp_path):
    model = as_loaded(build("bert"))
    export_onnx(model, tmp_path / "out", zipped=True)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    again = export_onnx(model, tmp_path / "out")
    assert not list(Path(again.folder).rglob("*.gz"))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "notes.txt").write_text("mine")
    with pytest.raises(hpr.HprError, match="choose another output folder"):
        export_onnx(model, tmp_path / "theirs")


def test_a_graph_that_differs_from_its_model_is_an_error(build, tmp_path, monkeypatch):
    from hpr.export import parity

    monkeypatch.setattr(parity, "FLOATS", -1.0)
    with pytest.raises(hpr.HprError, match="differs by"):
        export_onnx(as_loaded(build("bert")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_graph_with_a_fixed_length_is_an_error(build, tmp_path, monkeypatch):
    from hpr.export import graphs

    monkeypatch.setattr(graphs, "_OPEN", {"input_ids": (0,), "attention_mask": (0,)})  # as a tracer that fixes what it saw
    with pytest.raises(hpr.HprError, match=r"cannot be run with input_ids \(3, 11\)"):
        export_onnx(as_loaded(build("bert")), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_copied_weights_are_an_error_that_names_them(build, tmp_path, monkeypatch):
    from hpr.export import weights_file

    held = weights_file.bytes_of
    monkeypatch.setattr(weights_file, "_CONSTANTS", 0)
    monkeypatch.setattr(weights_file, "bytes_of", lambda model, codes: held(model, codes) - 3000)
    with pytest.raises(hpr.HprError, match="copied weights"):
        export_onnx(as_loaded(build("gpt2", HEADS["gpt2"])), tmp_path / "out")


def test_the_command_line_says_what_it_wrote(folder, tmp_path):
    from typer.testing import CliRunner

    from hpr.cli.program import app

    command = ["export", str(folder), "--to", "onnx", "--gzip", "-o", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    written = json.loads(result.stdout)
    assert written["bytes"] == (tmp_path / "out" / "onnx" / "model.onnx").stat().st_size
    assert written["bytes_gzip"] == (tmp_path / "out" / "onnx" / "model.onnx.gz").stat().st_size
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    refused = CliRunner().invoke(app, ["export", str(folder), "--to", "onnx", "-o", str(folder)])
    assert refused.exit_code == 2
    assert "choose another output folder" in refused.stderr
    assert CliRunner().invoke(app, ["export", str(folder), "--to", "hf", "--gzip"]).exit_code == 2


def test_a_model_that_cannot_write_is_an_error(build, tmp_path, monkeypatch):
    model = build("gpt2", HEADS["gpt2"])

    def refuses(*_: Any, **__: Any) -> None:
        raise ValueError("no sampling here")

    monkeypatch.setattr(type(model), "generate", refuses)
    with pytest.raises(hpr.HprError, match=r"cannot write a few tokens.*no sampling here"):
        export_onnx(as_loaded(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()
