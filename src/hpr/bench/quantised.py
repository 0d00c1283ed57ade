"""The original in int8 and int4, as the tools of ONNX Runtime make them from its graph."""

from __future__ import annotations

from pathlib import Path

from hpr.runtime.hooks import no_warnings

_WEIGHTS = ("MatMul", "Gather")


def int8(graph: Path, file: Path) -> None:
    """Dynamic int8: weights by channel beforehand, inputs at every call."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with no_warnings():
        types = list(_WEIGHTS)
        quantize_dynamic(graph, file, op_types_to_quantize=types, per_channel=True, weight_type=QuantType.QInt8)


def int4(graph: Path, file: Path) -> None:
    """Weights and tables in 4 bits, in blocks of 32; inputs are rounded to 8 bits within a product."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    with no_warnings():
        axes = (("MatMul", 0), ("Gather", 1))
        model, options = onnx.load(graph), {"op_types_to_quantize": _WEIGHTS, "quant_axes": axes}
        made = MatMulNBitsQuantizer(model, bits=4, block_size=32, is_symmetric=True, accuracy_level=4, **options)
        made.process()
        made.model.save_model_to_file(str(file))
