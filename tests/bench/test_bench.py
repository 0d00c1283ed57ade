"""A benchmark of a tiny decoder, for real, in both runtimes; and what is refused before anything is loaded."""

from __future__ import annotations

import pytest

import hpr
from conftest import HEADS, inputs_of
from hpr.bench import run
from hpr.bench.run import bench
from hpr.checkpoints.save import save
from hpr.errors import BudgetError, HprError

pytest.importorskip("onnxruntime", reason="graphs are run by onnxruntime")
pytest.importorskip("onnxscript", reason="graphs are written by onnxscript")


def test_a_decoder_in_both_runtimes(build, ids, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_LOADS", 1)  # a process that imports torch takes seconds
    model = build("llama", HEADS["llama"])
    model.save_pretrained(tmp_path / "original")
    profile = hpr.profile(model, [inputs_of("llama", ids)])
    save(hpr.share(model, hpr.plan(model, profile, "60%"), profile), tmp_path / "out")
    found = bench(tmp_path / "out", str(tmp_path / "original"), ["1x4", "2x3"], rounds=2)
    names = {(row["runtime"], row["name"]) for row in found["latency"]}
    for runtime in ("torch", "onnxruntime"):
        assert {(runtime, "original"), (runtime, "compressed"), (runtime, "int8")} <= names
    assert {row["shape"] for row in found["latency"]} == {"1x4", "2x3"}
    assert all(row["low"] <= row["median"] <= row["high"] and row["rounds"] == 2 for row in found["latency"])
    assert {(row["runtime"], row["name"]) for row in found["decode"]} == names
    for rows in (found["latency"], found["decode"], found["load"]):
        assert all(row["ratio"] == 1 for row in rows if row["name"] == "original")
    load = {(row["runtime"], row["name"]): row for row in found["load"]}
    assert load["onnxruntime", "original"]["resident_bytes"] < load["torch", "original"]["resident_bytes"]
    assert load["torch", "compressed"]["bytes"] < load["torch", "original"]["bytes"]
    assert {one["name"] for one in found["left_out"] if one["runtime"] == "torch"} == {"int4"}


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"threads": 0}, HprError, "threads is 0"),
        ({"rounds": 0}, HprError, "rounds is 0"),
        ({"runtimes": ["tensorrt"]}, HprError, "runtime 'tensorrt' is unknown"),
        ({"shapes": ["1by4"]}, BudgetError, "shape is '1by4'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(tmp_path, options, kind, text):
    with pytest.raises(kind, match=text):
        bench(tmp_path / "missing", **options)
