"""Other projects' quantisers by their own packages; each function imports its package and raises ``ImportError`` without it."""

from __future__ import annotations

import copy
import inspect
import json
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from common.quantised.student import Peer, half_bytes, weights_of, with_weights
from common.quantised.uniform import GROUP, nearest


def nnc(model: nn.Module, qp: int) -> Peer:
    """MPEG's NNC (ISO/IEC 15938-17) by Fraunhofer's ``nncodec``: dependent quantisation and context-adaptive coding.

    ``qp``: the step is 2^(qp / 4) at multiples of 4, and linear between them; vectors keep the package's fine step of qp −75.
    """
    from nncodec.nn import decode, encode

    numbers = {name: tensor.detach().numpy().astype(np.float32) for name, tensor in model.named_parameters()}
    with TemporaryDirectory() as folder:
        stream = encode(numbers, {"qp": qp, "verbose": False, "results": folder})
    student = copy.deepcopy(model)
    found = decode(stream, {"verbose": False})
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.copy_(torch.from_numpy(np.asarray(found[name])))
    return Peer(student, {"own": len(stream)})


def hqq(model: nn.Module, bits: int) -> Peer:
    """HQQ (Badri and Shaji, 2023): groups of 64 with 16-bit scale and offset, fitted to the weights, no calibration data."""
    from hqq.core.quantize import Quantizer

    weights, size = {}, 0
    for name, weight in weights_of(model).items():
        options = {"nbits": bits, "group_size": GROUP, "axis": 1, "bitpack": False, "compute_dtype": torch.float32}
        codes, facts = Quantizer.quantize(weight.clone(), device="cpu", **options)
        scale, zero = (facts[key].half().float() for key in ("scale", "zero"))
        weights[name] = ((codes.float().reshape(-1, GROUP) - zero) * scale).reshape(weight.shape)
        size += -(-weight.numel() * bits // 8) + 2 * (scale.numel() + zero.numel())
    return Peer(with_weights(model, weights), {"fixed": size + half_bytes(model, weights)})


def torchao(model: nn.Module, bits: int) -> Peer:
    """torchao, weights only: 8 bits a row, or 4 bits in groups of 64, symmetric; its tables are quantised alike."""
    from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_

    def covered(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear | nn.Embedding)

    weights = weights_of(model)
    student = copy.deepcopy(model)
    kind = {8: torch.int8, 4: torch.int4, 3: torch.int3, 2: torch.int2}[bits]
    quantize_(student, IntxWeightOnlyConfig(kind, PerAxis(0) if bits == 8 else PerGroup(GROUP)), filter_fn=covered)
    found, size = {}, 0
    for name, weight in weights.items():
        packed: Any = student.get_submodule(name).weight
        found[name] = packed.dequantize().detach().float()
        size += -(-weight.numel() * bits // 8) + 2 * packed.scale.numel()
    return Peer(with_weights(model, found), {"fixed": size + half_bytes(model, found)})


def auto_round(model: nn.Module, tokenizer: Any, batches: Sequence[Any], bits: int) -> Peer:
    """AutoRound (Cheng et al., 2023): rounding and clipping of each block's layers trained by signed gradients, groups of 64.

    It reads sequences of one length from the calibration texts, and leaves tables alone: they are rounded to nearest.
    """
    from auto_round import AutoRound

    texts = [text for batch in batches for text in tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "texts.json"
        path.write_text(json.dumps([{"text": text} for text in texts]), encoding="utf-8")
        options = {"bits": bits, "group_size": GROUP, "sym": False, "dataset": str(path), "device_map": "cpu"}
        sizes = {"iters": 200, "nsamples": 256, "seqlen": 32, "batch_size": 8, "enable_torch_compile": False}
        found = AutoRound(copy.deepcopy(model), tokenizer, **options, **sizes).quantize()
    trained: nn.Module = found[0] if isinstance(found, tuple) else found
    weights = {}
    for name, weight in weights_of(model).items():
        after = trained.get_submodule(name).weight.detach().float()
        weights[name] = nearest(weight, bits).weight() if torch.equal(after, weight) else after
    groups = sum(len(weight) * -(-weight.shape[1] // GROUP) for weight in weights.values())
    codes = sum(-(-weight.numel() * bits // 8) for weight in weights.values())
    return Peer(with_weights(model, weights), {"fixed": codes + 4 * groups + half_bytes(model, weights)})


def onnx_int8(model: nn.Module) -> Peer:
    """onnxruntime's dynamic int8: weights and activations in 8 bits. The student runs onnxruntime itself."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with TemporaryDirectory() as folder:
        whole, small = Path(folder) / "whole.onnx", Path(folder) / "small.onnx"
        _export(model, whole)
        quantize_dynamic(whole, small, weight_type=QuantType.QInt8, per_channel=True)
        return Peer(_Session(small), {"own": os.path.getsize(small)})


def onnx_4bits(model: nn.Module, block: int) -> Peer:
    """onnxruntime's 4 bits in blocks of some numbers, tables as well. The student runs onnxruntime itself."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    with TemporaryDirectory() as folder:
        whole, small = Path(folder) / "whole.onnx", Path(folder) / "small.onnx"
        _export(model, whole)
        config = DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=False, op_types_to_quantize=("MatMul", "Gather"))
        quantizer = MatMulNBitsQuantizer(onnx.load(whole), algo_config=config)
        quantizer.process()
        quantizer.model.save_model_to_file(str(small))
        return Peer(_Session(small), {"own": os.path.getsize(small)})


class _Session(nn.Module):
    """A model of hidden states that onnxruntime runs, on one thread."""

    def __init__(self, path: Path):
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])

    def forward(self, **inputs: Tensor) -> BaseModelOutput:
        known = {given.name for given in self.session.get_inputs()}
        feed = {name: tensor.numpy() for name, tensor in inputs.items() if name in known}
        return BaseModelOutput(last_hidden_state=torch.from_numpy(self.session.run(None, feed)[0]))


def _export(model: nn.Module, path: Path) -> None:
    """The model from ids and mask to hidden states as ONNX, for any batch and length."""

    class Hidden(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            hidden: Tensor = self.inner(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            return hidden

    ids = torch.ones(2, 8, dtype=torch.long)
    sizes = {0: "batch", 1: "length"}
    older = {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
    torch.onnx.export(
        Hidden(model).eval(),
        (ids, torch.ones_like(ids)),
        str(path),
        input_names=["input_ids", "attention_mask"],
        output_names=["hidden"],
        dynamic_axes={"input_ids": sizes, "attention_mask": sizes, "hidden": sizes},
        **older,
    )
