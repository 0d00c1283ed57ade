"""The bytes of graphs: how many there are beside those of the model, and the file that several graphs read them from."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path

import onnx_ir as ir
from torch import Tensor, nn

from hpr.coding.codes import Codes
from hpr.errors import HprError
from hpr.export.integer_sites import multiplies_integers
from hpr.export.passes import STORED_AS_CODES, digest

_INLINE = 1 << 10  # bytes; smaller tensors stay in their graph
_ALIGNED = 1 << 12  # bytes; runtimes map a file by pages
_SPARE = 1.01  # how much larger the tensors of graphs may be than the model's numbers
_CONSTANTS = 1 << 16  # bytes of constants that a graph may have beside them
Key = tuple[bytes, tuple[int, ...], str]


def tensors_in(programs: Mapping[str, ir.Model]) -> dict[Key, tuple[int, list[str]]]:
    """Every tensor of some graphs once, by its numbers: its bytes, and its names."""
    found: dict[Key, tuple[int, list[str]]] = {}
    for graph, value in _stored(programs):
        assert value.const_value is not None
        _, names = found.setdefault(_key(value.const_value), (value.const_value.nbytes, []))
        names.append(f"{value.name} in {graph}")
    return found


def check_size(programs: Mapping[str, ir.Model], held: int) -> int:
    """The bytes of all tensors in the graphs, each once. ``held``: those of the model's numbers.

    Raises ``HprError`` if the graphs have more than 1.01 times as many: something was copied, and the largest tensors that are
    not the model's own are named.
    """
    tensors = tensors_in(programs)
    total = sum(size for size, _ in tensors.values())
    if total <= _SPARE * held + _CONSTANTS * len(programs):
        return total
    made = sorted(((size, names[0]) for size, names in tensors.values() if not _is_own(names[0])), reverse=True)
    named = ", ".join(f"{name} ({size:,} bytes)" for size, name in made[:3])
    raise HprError(
        f"the graphs hold {total:,} bytes of tensors and the model {held:,}: the exporter copied weights ({named}); this model "
        f"cannot be exported as ONNX at its size, `hpr export --to hf` writes it for torch"
    )


def _is_own(name: str) -> bool:
    """Whether a tensor has the name of one of the model: paths have dots, and what the exporter makes has none."""
    return "." in name.partition(" in ")[0]


def bytes_of(model: nn.Module, codes: Mapping[str, Codes]) -> int:
    """The bytes of a model's numbers as they are exported: parameters and buffers once, coded floats as one byte a number.

    The codes of a table and of a head that is tied to it count once, also where one is the transpose of the other. The weight
    of a module that multiplies by integers does not count: its integers are buffers.
    """
    tensors: dict[int, Tensor] = {}
    for module in model.modules():
        own = [*module._parameters.items(), *module._buffers.items()]
        tensors |= {
            id(one): one for name, one in own if one is not None and not (name == "weight" and multiplies_integers(module))
        }
    others = {id(one) for name, one in model.named_parameters() if name in codes and one.numel() >= STORED_AS_CODES}
    joined = {_content(one): one.numel() * (one.element_size() - 3 * (key in others)) for key, one in tensors.items()}
    return sum(joined.values())


def _content(tensor: Tensor) -> Hashable:
    """What equal matrices of integers have in common, and a matrix with its transpose. Floats are told apart by identity."""
    if tensor.is_floating_point() or tensor.dim() != 2:
        return id(tensor)
    numbers = tensor.numpy()
    return frozenset((digest(one), one.shape) for one in (numbers, numbers.T))


def move_weights(programs: Mapping[str, ir.Model], file: Path) -> None:
    """Write the tensors of all graphs into one file, each once, and let the graphs read them from there."""
    places: dict[Key, int] = {}
    with open(file, "wb") as out:
        for _, value in _stored(programs):
            tensor = value.const_value
            assert tensor is not None
            if tensor.nbytes < _INLINE:
                continue
            key = _key(tensor)
            if key not in places:
                out.write(b"\0" * (-out.tell() % _ALIGNED))
                places[key] = out.tell()
                out.write(tensor.tobytes())
            value.const_value = _outside(file, places[key], tensor, str(value.name))


def _outside(file: Path, place: int, tensor: ir.TensorProtocol, name: str) -> ir.ExternalTensor:
    shape = ir.Shape(tensor.shape.numpy())
    return ir.ExternalTensor(file.name, place, tensor.nbytes, tensor.dtype, shape=shape, name=name, base_dir=file.parent)


def _stored(programs: Mapping[str, ir.Model]) -> Iterator[tuple[str, ir.Value]]:
    for name, program in programs.items():
        for value in program.graph.initializers.values():
            if value.const_value is not None:
                yield name, value


def _key(tensor: ir.TensorProtocol) -> Key:
    return hashlib.sha256(tensor.tobytes()).digest(), tuple(tensor.shape.numpy()), str(tensor.dtype)
