"""What is done to a traced graph: each tensor is stored once, codes as codes, and names are those that runtimes know."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from hpr.coding.codes import Codes, half_octaves

STORED_AS_CODES = 256  # numbers; smaller tensors are not worth a look
_CACHE = re.compile(r"^(?:input\.|output\.)?past_key_values\.(?:(self|cross)_attention_cache\.)?layers\.(\d+)\.(keys|values)$")
_SIDES = {None: "", "self": "decoder.", "cross": "encoder."}
_READ = {
    "decoder_input_ids": "input_ids",
    "attention_mask": "encoder_attention_mask",
    "encoder_outputs.last_hidden_state": "encoder_hidden_states",
}


def store_once(model: ir.Model) -> None:
    """Join tensors with equal numbers, in place. One that is the transpose of another is read from it."""
    common.DeduplicateInitializersPass(size_limit=1 << 40)(model)
    graph = model.graph
    known: dict[tuple[bytes, tuple[int, ...]], ir.Value] = {}
    tensors = [value for value in graph.initializers.values() if _is_matrix(value)]
    for value in sorted(tensors, key=lambda value: not any(node.op_type == "Gather" for node, _ in value.uses())):
        numbers = _numbers(value)
        if (kept := known.get((digest(numbers.T), numbers.T.shape))) is not None:
            _read_transposed(model, value, kept)
        else:
            known.setdefault((digest(numbers), numbers.shape), value)
    remove_unused(model)


def _read_transposed(model: ir.Model, value: ir.Value, kept: ir.Value) -> None:
    """Let all that read a matrix read the one that it is the transpose of."""
    for node, index in list(value.uses()):
        if node.op_type == "MatMul" and index == 1:
            fused = ir.node("FusedMatMul", [node.inputs[0], kept], {"transB": 1}, domain="com.microsoft")
            _put(model, node, fused)
        else:
            turned = ir.node("Transpose", [kept], {"perm": [1, 0]})
            turned.outputs[0].shape, turned.outputs[0].type = value.shape, value.type
            model.graph.insert_before(node, turned)
            node.replace_input_with(index, turned.outputs[0])
    model.opset_imports.setdefault("com.microsoft", 1)


def _put(model: ir.Model, node: ir.Node, new: ir.Node) -> None:
    """Put a node of one output in the place of another one."""
    output = node.outputs[0]
    new.outputs[0].shape, new.outputs[0].type, name = output.shape, output.type, output.name
    model.graph.insert_before(node, new)
    ir.convenience.replace_all_uses_with(output, new.outputs[0], replace_graph_outputs=True)
    model.graph.remove(node, safe=True)
    new.outputs[0].name = name


def store_codes(model: ir.Model, codes: Mapping[str, Codes]) -> None:
    """Store float tensors that equal a coded weight as its codes; the runtime scales them once, when it loads the graph."""
    by_digest: dict[bytes, tuple[Codes, bool]] = {}
    for found in codes.values():
        weight = found.weight().numpy()
        by_digest[digest(weight.T)] = (found, True)
        by_digest[digest(weight)] = (found, False)
    for value in list(model.graph.initializers.values()):
        if value.dtype != ir.DataType.FLOAT or value.const_value is None or value.const_value.size < STORED_AS_CODES:
            continue
        numbers = _numbers(value)
        if (match := by_digest.get(digest(numbers))) is not None:
            _decode(model, value, *match, shape=numbers.shape)


def _decode(model: ir.Model, value: ir.Value, found: Codes, turned: bool, shape: tuple[int, ...]) -> None:
    """Replace a tensor by the nodes that compute it from codes, with the products of ``Codes.weight`` in their order."""
    numbers = found.values
    kind = np.int8 if np.abs(numbers).max() < 128 else np.int16 if np.abs(numbers).max() < 1 << 15 else np.int32
    rows = _scales(found.scale * half_octaves(found.rows))[:, None]
    columns = _scales(half_octaves(found.columns))
    parts = {"codes": numbers.astype(kind), "rows": rows, "columns": columns}
    parts |= {"shape": np.array(shape, np.int64)}
    made = {}
    for part, array in parts.items():
        name = f"{value.name}.{part}"
        made[part] = ir.Value(name=name, const_value=ir.Tensor(np.ascontiguousarray(array), name=name))
        made[part].shape, made[part].dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
        model.graph.register_initializer(made[part])
    nodes = [ir.node("Cast", [made["codes"]], {"to": ir.DataType.FLOAT.value})]
    nodes.append(ir.node("Mul", [nodes[-1].outputs[0], made["rows"]]))
    nodes.append(ir.node("Mul", [nodes[-1].outputs[0], made["columns"]]))
    if turned:
        nodes.append(ir.node("Transpose", [nodes[-1].outputs[0]], {"perm": [1, 0]}))
    nodes.append(ir.node("Reshape", [nodes[-1].outputs[0], made["shape"]]))
    first = next(iter(model.graph))
    model.graph.insert_before(first, nodes)
    last = nodes[-1].outputs[0]
    last.shape, last.type = value.shape, value.type
    ir.convenience.replace_all_uses_with(value, last)
    del model.graph.initializers[value.name]  # type: ignore[arg-type]


def _scales(numbers: np.ndarray) -> np.ndarray:
    """Scales in float32; one for all if they are equal, as those of convolutions and norms."""
    return (numbers[:1] if (numbers == numbers[0]).all() else numbers).astype(np.float32)


def remove_unused(model: ir.Model) -> None:
    """Remove nodes and tensors that nothing reads, in place."""
    common.RemoveUnusedNodesPass()(model)
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]


def drop_outputs(model: ir.Model, read: Collection[str] | None) -> None:
    """Remove outputs that nobody reads, or that are an input as it is, and then inputs without a reader (an encoder's states).

    ``read``: the names of those that are read; None stands for all.
    """
    graph = model.graph
    for output in list(graph.outputs):
        if read is not None and output.name not in read:
            graph.outputs.remove(output)
            continue
        node = output.producer()
        if node is not None and node.op_type == "Identity" and node.inputs[0] is not None and node.inputs[0].is_graph_input():
            graph.outputs.remove(output)
    remove_unused(model)
    for value in list(graph.inputs):
        if not value.uses():
            graph.inputs.remove(value)


def forget_origin(model: ir.Model) -> None:
    """Remove the notes about where in the source each node comes from: they would be a fifth of a small model's file."""
    common.ClearMetadataAndDocStringPass()(model)


def to_bytes(model: ir.Model) -> bytes:
    """The file of a graph. Its tensors' shapes stand with them alone: ONNX Runtime's quantisers take them only once."""
    proto = ir.to_proto(model)
    stored = {tensor.name for tensor in proto.graph.initializer}
    shapes = [value for value in proto.graph.value_info if value.name not in stored]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(shapes)
    return proto.SerializeToString()


def give_known_names(model: ir.Model) -> dict[str, str]:
    """Rename caches to ``past_key_values.0.key`` and ``present.0.key``, and what the decoder of a model with an encoder reads.

    Most runtimes know these names. Returns new name → old name.
    """
    named = {}
    inputs = {value.name for value in model.graph.inputs}
    reads_encoder = "decoder_input_ids" in inputs and "input_ids" not in inputs  # with both, a graph is encoder and decoder
    for value in (*model.graph.inputs, *model.graph.outputs):
        old = str(value.name)
        new = _READ.get(old, old) if reads_encoder else old
        if match := _CACHE.match(old):
            side, number, part = match.groups()
            past = "past_key_values" if value.is_graph_input() else "present"
            new = f"{past}.{number}.{_SIDES[side]}{part.removesuffix('s')}"
        value.name = new
        named[new] = old
    return named


def name_axes(model: ir.Model) -> None:
    """Give the open axes of inputs names that say what they count, in place."""
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for axis, size in enumerate(value.shape or ()):
            symbol = getattr(size, "value", None)
            if isinstance(symbol, str) and re.fullmatch(r"[a-z]\d+", symbol):
                wanted = _axis_name(str(value.name), axis)
                taken = list(names.values()).count(wanted)
                names.setdefault(symbol, wanted if not taken else f"{wanted}_{taken + 1}")
    for value in _values(model):
        if value.shape is not None:
            sizes = [_renamed(size, names) for size in value.shape]
            value.shape = ir.Shape(sizes)


def _axis_name(name: str, axis: int) -> str:
    if axis == 0:
        return "batch"
    if name.startswith("past_key_values"):
        return "encoder_sequence" if ".encoder." in name else "past_sequence"
    kinds = {"encoder_hidden_states": "encoder_sequence", "encoder_attention_mask": "encoder_sequence"}
    kinds |= {"attention_mask": "total_sequence"}
    return kinds.get(name, "sequence") if axis == 1 else f"{name}_axis_{axis}"


def _renamed(size: int | ir.SymbolicDim, names: Mapping[str, str]) -> int | str | None:
    symbol = size if isinstance(size, int) else size.value
    if not isinstance(symbol, str):
        return symbol
    return re.sub(r"[a-z]\d+", lambda match: names.get(match.group(), match.group()), symbol)


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    for node in model.graph:
        yield from node.outputs


def _is_matrix(value: ir.Value) -> bool:
    return value.const_value is not None and len(value.const_value.shape) == 2 and value.const_value.size >= STORED_AS_CODES


def _numbers(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    return value.const_value.numpy()


def digest(numbers: np.ndarray) -> bytes:
    """Of a tensor's numbers and kind, without its shape: a convolution is coded as a matrix."""
    return hashlib.sha256(np.ascontiguousarray(numbers).tobytes()).digest() + str(numbers.dtype).encode()
