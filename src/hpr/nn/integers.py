"""A coded model that keeps the integers of its weights in memory, and unpacks one weight at a time, when a layer reads it.

Each module stays an instance of its class, with its hooks, bias and settings: it becomes an object of a subclass whose
``weight`` is computed when it is read. The products are therefore those of the float model, bit for bit.
"""

from __future__ import annotations

import weakref

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hpr.anatomy.lookup import base_of, has_module, module_at, readers_of_weights
from hpr.coding.codes import Codes, Product, half_octaves, parts_of
from hpr.errors import HprError
from hpr.nn.bank import BANK
from hpr.nn.coded import codes_of

_TYPES = (torch.int8, torch.int16, torch.int32)
_FAR_BYTES = 8  # place and code of a number outside the range
Kind = type[nn.Module]
_CLASSES: dict[Kind, Kind] = {}


class Unpacked(nn.Module):
    """A weight that is unpacked from integers when it is read. ``like``: empty, of the dtype that the weight has."""

    rows: Tensor
    columns: Tensor
    like: Tensor

    def __init__(self, buffers: dict[str, Tensor], like: Tensor):
        super().__init__()
        for name, buffer in (buffers | {"like": torch.empty(0, dtype=like.dtype)}).items():
            self.register_buffer(name, buffer.to(like.device), persistent=False)
        self._alive: weakref.ref[Tensor] | None = None

    def weight(self) -> Float[Tensor, "out in"]:
        """The whole weight in the dtype of ``like``; the same tensor as long as somebody holds it."""
        alive = self._alive() if self._alive is not None else None
        if alive is not None and (alive.dtype, alive.device) == (self.like.dtype, self.rows.device):
            return alive
        with torch.no_grad():
            numbers = self._scaled(self.whole(), self.rows).to(self.like.dtype)
        self._alive = weakref.ref(numbers)
        return numbers

    def look_up(self, ids: Int[Tensor, " *batch"]) -> Float[Tensor, "*batch in"]:
        """Rows of the weight by number, without the others."""
        with torch.no_grad():
            wanted, back = ids.unique(return_inverse=True)
            return F.embedding(back, self._scaled(self.whole(wanted), self.rows[wanted]).to(self.like.dtype))

    def whole(self, wanted: Int[Tensor, " rows"] | None = None) -> Float[Tensor, "rows in"]:
        """The numbers before they are scaled, of all rows or of some, whose numbers are in order."""
        raise NotImplementedError

    def _scaled(self, numbers: Tensor, rows: Tensor) -> Tensor:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_alive": None}  # a weak reference is neither copied nor pickled


class Integers(Unpacked):
    """weight[i, j] = codes[i, j] · rows[i] · columns[j], with a few codes outside the range of their type kept beside.

    ``codes``: (out, in), int8 unless many of them need more. ``rows`` (out,) and ``columns`` (in,): the bits of float32
    numbers, int32, so that ``half()`` does not round them. ``places`` and ``far``: flat places, in order, of the codes outside
    the range and these codes, int32; ``codes`` has 0 there.
    """

    codes: Tensor
    places: Tensor
    far: Tensor

    def __init__(self, found: Codes, like: Tensor):
        values = torch.from_numpy(found.values).flatten()
        dtype = _smallest(found)
        limits = torch.iinfo(dtype)
        outside = (values < limits.min) | (values > limits.max)
        buffers = {
            "codes": values.masked_fill(outside, 0).to(dtype).view(found.values.shape),
            "rows": _bits(found.scale * half_octaves(found.rows)),
            "columns": _bits(half_octaves(found.columns)),
            "places": outside.nonzero().flatten().int(),
            "far": values[outside],
        }
        super().__init__(buffers, like)

    def whole(self, wanted: Int[Tensor, " rows"] | None = None) -> Float[Tensor, "rows in"]:
        """The codes as float32, of all rows or of some, whose numbers are in order."""
        if wanted is None:
            numbers = self.codes.to(torch.float32)
            numbers.view(-1)[self.places.long()] = self.far.to(torch.float32)
            return numbers
        numbers = self.codes.index_select(0, wanted).to(torch.float32)
        if len(self.places) and len(wanted):
            width = self.codes.shape[1]
            owners, columns = self.places.long() // width, self.places.long() % width
            found = torch.searchsorted(wanted.long(), owners).clamp(max=len(wanted) - 1)
            here = wanted[found] == owners
            numbers[found[here], columns[here]] = self.far[here].to(torch.float32)
        return numbers

    def _scaled(self, numbers: Tensor, rows: Tensor) -> Tensor:
        return numbers.mul_(rows.view(torch.float32)[:, None]).mul_(self.columns.view(torch.float32))


class ProductIntegers(Unpacked):
    """A weight (out, in) of low rank as the integers of its factors ``u`` (out, rank) and ``v`` (rank, in).

    ``between``: the whole scales between them, int64. ``rows`` (out,) and ``columns`` (in,): the bits of float64 numbers,
    int64.
    """

    between: Tensor

    def __init__(self, found: Product, like: Tensor):
        whole, bits = found.between()
        scales = {"rows": found.rows(), "columns": half_octaves(found.v.columns)}
        buffers = {name: torch.from_numpy(one).view(torch.int64) for name, one in scales.items()}
        super().__init__(buffers | {"between": torch.from_numpy(whole)}, like)
        self.bits = bits
        self.u, self.v = Integers(found.u, like), Integers(found.v, like)

    def whole(self, wanted: Int[Tensor, " rows"] | None = None) -> Float[Tensor, "rows in"]:
        """The sums of the product, float64: whole numbers below 2^53, so they are exact in any order."""
        return (self.u.whole(wanted).double() * self.between) @ self.v.whole().double()

    def _scaled(self, numbers: Tensor, rows: Tensor) -> Tensor:
        scaled = numbers.mul_(2.0**-self.bits).mul_(rows.view(torch.float64)[:, None])
        return scaled.mul_(self.columns.view(torch.float64)).float()


class _ReadsIntegers(nn.Module):
    """A module whose ``weight`` is unpacked from ``integers`` when it is read; ``state_dict`` holds the unpacked weight."""

    kind: Kind  # what the module was
    integers: Unpacked

    @property
    def weight(self) -> Tensor:
        found = self.integers.weight()
        return found.T if isinstance(self, Conv1D) else found

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        return _bare, (self.kind,), self.__getstate__()  # the class has no name to be found by


def _bare(kind: Kind) -> nn.Module:
    made = _reading(kind)
    return made.__new__(made)


class _LooksUp(nn.Embedding):
    """An embedding that unpacks the rows it is asked for. Subclasses that call ``super().forward`` arrive here."""

    integers: Unpacked

    def forward(self, input: Tensor) -> Tensor:
        return self.integers.look_up(input)


def keep_integers(model: nn.Module) -> nn.Module:
    """Keep a coded model's weights as integers in memory, in place, and return it.

    Most weights then take one byte a number, instead of four or two. A layer unpacks its weight each time it is called, and
    an embedding unpacks only the rows that it looks up, so outputs stay the same bit for bit and passes get slower.
    ``hpr.save`` writes the same file as before, ``save_pretrained`` a stock checkpoint; ``hpr.unshare`` gives a model with
    float weights. Experts that are slices of one parameter stay floats. Raises ``HprError`` for a model that is
    not coded, or whose layers share factors.

    >>> coded = hpr.share(model, hpr.plan(model, profile, "50%bytes"), profile)
    >>> small = hpr.extras.keep_integers(coded)
    >>> small.get_submodule("encoder.layer.0.output.dense").integers.codes.dtype
    torch.int8
    """
    if not codes_of(model):
        raise HprError(
            f"this {type(model).__name__} is not coded, so it has no integers to keep: compress it to a budget in bytes, such "
            f"as 8MB, or load a checkpoint of one"
        )
    if hasattr(base_of(model)[0], BANK):
        raise HprError(
            f"layers of this {type(model).__name__} share factors, which are no integers while it runs: use it as it is, or "
            f"compress the original to a budget in bytes, such as 8MB"
        )
    readers = readers_of_weights(model)
    for path, coded in codes_of(model).items():
        if not has_module(model, path):  # an expert, which is a slice of a parameter
            continue
        site = module_at(model, path)
        weight = site._parameters.get("weight")
        users = [user for user in readers.get(id(weight), []) if isinstance(user, nn.Linear | nn.Embedding | Conv1D)]
        if weight is None or any(getattr(user, "max_norm", None) is not None for user in users):
            continue  # integers already, or a table that its look-ups change
        codes = coded.codes()
        integers = ProductIntegers(codes, weight) if isinstance(codes, Product) else Integers(codes, weight)
        for user in users:
            _swap(user, integers)
    return model


def _swap(module: nn.Module, integers: Unpacked) -> None:
    """Let a module read its weight from integers. Tied modules read the same ones."""
    del module._parameters["weight"]
    module.__class__ = _reading(type(module))
    module.integers = integers


def _reading(kind: Kind) -> Kind:
    """The subclass of a module's class that reads integers; below a table's own ``forward`` lies that of ``_LooksUp``."""
    if kind not in _CLASSES:
        bases: tuple[Kind, ...] = (_ReadsIntegers, kind)
        if issubclass(kind, nn.Embedding):
            bases = (_ReadsIntegers, _LooksUp) if kind is nn.Embedding else (_ReadsIntegers, kind, _LooksUp)
        _CLASSES[kind] = type(f"Integer{kind.__name__}", bases, {"__module__": __name__, "kind": kind})
    return _CLASSES[kind]


def keep_floats(model: nn.Module) -> None:
    """Give every module its float weight again, in place; tied modules share one."""
    weights: dict[Unpacked, nn.Parameter] = {}
    for module in list(model.modules()):
        if isinstance(module, _ReadsIntegers):
            integers = module.integers
            if integers not in weights:
                weight = module.weight
                weights[integers] = nn.Parameter(weight.contiguous() if isinstance(module, Conv1D) else weight)
            del module._modules["integers"]
            module.__class__ = module.kind  # type: ignore[assignment]
            module.register_parameter("weight", weights[integers])


def integer_bytes(model: nn.Module) -> int:
    """By how many bytes a coded model's weights are smaller in memory if its integers are kept; 0 if they are kept already."""
    weights = {
        id(weight): (weight, coded)
        for path, coded in codes_of(model).items()
        if has_module(model, path) and (weight := module_at(model, path)._parameters.get("weight")) is not None
    }
    return sum(_saved_bytes(coded.codes(), weight) for weight, coded in weights.values())


def _saved_bytes(found: Codes | Product, weight: Tensor) -> int:
    integers = sum(_bytes(part, _smallest(part)) + 4 * sum(part.values.shape) for part in parts_of(found))
    if isinstance(found, Product):
        integers += 8 * (sum(weight.shape) + found.rank)
    return weight.numel() * weight.element_size() - integers


def _smallest(found: Codes) -> torch.dtype:
    """The type in which the codes, with those outside its range beside, take the fewest bytes."""
    return min(_TYPES, key=lambda dtype: _bytes(found, dtype))


def _bytes(found: Codes, dtype: torch.dtype) -> int:
    limits = torch.iinfo(dtype)
    outside = int(np.count_nonzero((found.values < limits.min) | (found.values > limits.max)))
    return found.values.size * dtype.itemsize + _FAR_BYTES * outside


def _bits(numbers: np.ndarray) -> Tensor:
    return torch.from_numpy(numbers.astype(np.float32)).view(torch.int32)
