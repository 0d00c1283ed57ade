"""Graphs of a sentence encoder in ONNX Runtime: the original's, quantised by its own tools, and what they take."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
import torch.nn.functional as F
from torch import Tensor

from common.tasks import Embed
from hpr.data.batches import in_input_order, text_batches

_RESIDENT = """
import json, sys, time
import numpy as np, onnxruntime as ort
def used():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))
before, start = used(), time.perf_counter()
options = ort.SessionOptions()
options.intra_op_num_threads = 1
session = ort.InferenceSession(sys.argv[1], options)
seconds = time.perf_counter() - start
feed = {one.name: np.ones((1, 16), np.int64) for one in session.get_inputs()}
session.run(None, feed)
print(json.dumps({"resident": used() - before, "seconds": seconds}))
"""


def session(file: Path, threads: int = 1) -> ort.InferenceSession:
    """The graph, ready to run."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(str(file), options)


def without_stale_shapes(file: Path, target: Path) -> Path:
    """The graph without the shapes of weights, which ONNX Runtime's quantisers change without telling."""
    model = onnx.load(file)
    weights = {one.name for one in model.graph.initializer}
    kept = [value for value in model.graph.value_info if value.name not in weights]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
    onnx.save(model, target)
    return target


def int8(file: Path, target: Path) -> Path:
    """Dynamic quantisation by ONNX Runtime: int8 weights, a scale for each column."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(str(file), str(target), weight_type=QuantType.QInt8, per_channel=True)
    return target


def int4(file: Path, target: Path) -> Path:
    """ONNX Runtime's 4-bit products in blocks of 32 and look-ups; activations in int8."""
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    kinds = ("MatMul", "Gather")
    config = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=True, accuracy_level=4, op_types_to_quantize=kinds)
    quantizer = MatMulNBitsQuantizer(onnx.load(file), algo_config=config)
    quantizer.process()
    quantizer.model.save_model_to_file(str(target))
    return target


def feed_of(graph: ort.InferenceSession, batch: dict[str, Any]) -> dict[str, np.ndarray]:
    """The inputs that a graph takes, of a batch of ids and masks; segments are all the first."""
    given = {name: np.asarray(value) for name, value in batch.items()}
    given.setdefault("token_type_ids", np.zeros_like(given["input_ids"]))
    return {one.name: given[one.name] for one in graph.get_inputs()}


def embedder(graph: ort.InferenceSession, tokenizer: Any) -> Embed:
    """Texts → means of the last hidden states over real tokens."""

    def embed(texts: Sequence[str]) -> Tensor:
        batches = text_batches(texts, tokenizer, 64, 256)
        rows = []
        for batch in batches:
            [states] = graph.run(["last_hidden_state"], feed_of(graph, dict(batch)))
            mask = batch["attention_mask"][..., None].float()
            rows.append(F.normalize((torch.from_numpy(states) * mask).sum(1) / mask.sum(1), dim=-1))
        return in_input_order(torch.cat(rows), batches)

    return embed


def taken(file: Path) -> dict[str, float]:
    """Bytes of memory that a fresh process takes for the graph after one pass, and seconds to load it."""
    done = subprocess.run([sys.executable, "-c", _RESIDENT, str(file)], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found
