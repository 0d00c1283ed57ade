"""The costs of a model: parameters, bytes, and floating-point operations.

Functions that take an ``Anatomy`` expect the teacher's, so that they count the same sites in the teacher and in the student.
A site of the student may be kept, read shared factors, or be dropped with its layer.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import PreTrainedModel

from hpr.anatomy.lookup import module_at, slice_at
from hpr.anatomy.model import Anatomy, Site
from hpr.coding.codes import Codes
from hpr.coding.record import Coded
from hpr.errors import HprError
from hpr.nn.bank import bank_of, parameters, terms_of
from hpr.nn.coded import coded_state, codes_of, state_of
from hpr.nn.embedding import SharedEmbedding
from hpr.nn.integers import integer_bytes
from hpr.nn.site import SharedSite
from hpr.plans.terms import Term, factors_of
from hpr.runtime.batch import Batch
from hpr.runtime.hooks import eval_mode, run, to_device_of

OTHER = "biases, norms and other"
_DTYPES = {  # safetensors writes the tensors of the last dtype first
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}


def sizes(model: nn.Module, anatomy: Anatomy) -> dict[str, int]:
    """The costs of a model by name: ``parameters``, ``bytes`` on disk, ``resident_bytes`` and ``flops_per_token``.

    A coded model also has ``integer_bytes``: its resident bytes if its weights are kept as integers.
    """
    resident = resident_bytes(model)
    coded = {"integer_bytes": resident - integer_bytes(model)} if codes_of(model) and not bank_of(model) else {}
    return {
        "parameters": parameters(model),
        "bytes": disk_bytes(model),
        "resident_bytes": resident,
        **coded,
        "flops_per_token": flops_per_token(model, anatomy),
    }


def disk_bytes(model: nn.Module) -> int:
    """The exact size in bytes of the safetensors file that ``save_pretrained`` (or ``hpr.save``) would write.

    The header's part is not exact if transformers renames weights, stores each expert separately, or splits the file (above
    50 GB).
    """
    if codes_of(model):
        return file_size(coded_state(model).tensors, _metadata(model))
    state = {key: value for key, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    groups: dict[Hashable, list[str]] = {}
    for key, value in state.items():
        groups.setdefault((_storage(value), value.storage_offset(), value.shape), []).append(key)
    declared = set(getattr(model, "all_tied_weights_keys", None) or ())
    metadata = _metadata(model)
    for keys in groups.values():
        stored = next((key for key in sorted(keys) if key not in declared), sorted(keys)[-1]) if declared else min(keys)
        for key in set(keys) - {stored}:
            del state[key]
            if not isinstance(model, PreTrainedModel):
                metadata[key] = stored
    return file_size(state, metadata)


def coded_bytes(model: nn.Module, coded: Mapping[str, Coded], others: Mapping[str, Codes]) -> int:
    """The bytes of the file that a model will have with the codes of its sites, and of ``others`` by name."""
    return file_size(state_of(model, coded, others).tensors, _metadata(model))


def _metadata(model: nn.Module) -> dict[str, str]:
    return {"format": "pt"} if isinstance(model, PreTrainedModel) else {}


def file_bytes(folder: str | os.PathLike[str]) -> int:
    """The bytes of all safetensors files in a folder. Raises ``HprError`` if there is none."""
    files = list(Path(folder).glob("*.safetensors"))
    if not files:
        raise HprError(f"{folder} holds no .safetensors file: give a folder that a model was saved to")
    return sum(file.stat().st_size for file in files)


def resident_bytes(model: nn.Module) -> int:
    """The bytes of parameters and buffers in memory. Tensors that share a storage count once."""
    tensors = (*model.parameters(), *model.buffers())
    return sum({_storage(tensor): _storage_bytes(tensor) for tensor in tensors}.values())


def flops_per_token(model: nn.Module, anatomy: Anatomy) -> int:
    """Floating-point operations (multiply-adds × 2) of all sites for one input row.

    Attention scores (see ``forward_flops``), norms and activations are not counted. The lookup of a table's row counts as 0, a
    product of that row with a factor counts. All experts of a layer count, although its router sends a row to a few of them.
    Sharing does not change the operations of experts, because the student computes their weights before it uses them.
    """
    total = 0
    for site in anatomy.sites:
        if site.expert is not None:
            total += 2 * site.parameters
            continue
        modules = [module for path in (site.name, *site.aliases) if (module := _find(model, path)) is not None]
        total += sum(_flops(module, site) for module in dict.fromkeys(modules))
    return total


def forward_flops(model: nn.Module, batch: Batch) -> int:
    """Floating-point operations (multiply-adds × 2) of all matrix products of one forward pass, with those of attention.

    Products with padding and with masked positions count. Products that a layer reuses from another layer do not.
    """
    cpu_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # torch counts the other kinds itself
    with (
        torch.no_grad(),
        eval_mode(model),
        FlopCounterMode(display=False, custom_mapping={cpu_attention: _attention_flops}) as counter,
    ):
        run(model, to_device_of(batch, model))
    return counter.get_total_flops()


def parts(teacher: nn.Module, student: nn.Module, anatomy: Anatomy) -> list[dict[str, Any]]:
    """The parameters of each part of teacher (``before``) and student (``after``), as one mapping per part.

    A part is a slot of a stack (``encoder · attention.self.query``), a site outside the stacks, or everything else (``OTHER``).
    The parameters of a shared factor are split evenly among the sites that use it. The counts of all parts add up to the
    model's ``parameters``.
    """
    before, after = _by_part(teacher, anatomy), _by_part(student, anatomy)
    return [{"name": name, "before": before[name], "after": after[name]} for name in before]


def _by_part(model: nn.Module, anatomy: Anatomy) -> dict[str, int]:
    """Part → its number of parameters."""
    terms = terms_of(model)
    stored = {site.name: dict(_stored(model, site, terms)) for site in anatomy.sites}
    users = Counter(key for units in stored.values() for key in units)
    shares: dict[str, float] = {}
    for site in anatomy.sites:
        name = site.name if site.stack is None else f"{site.stack} · {site.slot}"
        site_share = sum(count / users[key] for key, count in stored[site.name].items())
        shares[name] = shares.get(name, 0.0) + site_share
    rounded, running = {}, 0.0
    for name, share in shares.items():  # differences of rounded running sums are whole numbers with the same total
        rounded[name] = round(running + share) - round(running)
        running += share
    return rounded | {OTHER: parameters(model) - sum(rounded.values())}


def _stored(model: nn.Module, site: Site, terms: Mapping[str, Sequence[Term]]) -> Iterator[tuple[Hashable, int]]:
    """The factors or the weight that a site reads: (identity, number of parameters) of each."""
    bank = bank_of(model)
    if site.name in terms and bank is not None:
        for factor in factors_of(terms[site.name]):
            yield factor, bank[factor].shape.parameters
    elif site.expert is not None and (expert := slice_at(model, site.name)) is not None:
        yield (_storage(expert.weight), expert.number), expert.weight.numel()
    elif (module := _find(model, site.name)) is not None:
        weight: Tensor = module.weight  # type: ignore[assignment]
        yield id(module.integers) if hasattr(module, "integers") else _storage(weight), weight.numel()


def _flops(module: nn.Module, site: Site) -> int:
    """Floating-point operations of the module at a site for one input row."""
    if isinstance(module, SharedEmbedding):
        shapes = [module.bank[term.v].shape for term in module.terms if term.v is not None]
        return 2 * sum(shape.rows * shape.columns for shape in shapes)
    if isinstance(module, SharedSite):
        return module.flops_per_row()
    return 0 if isinstance(module, nn.Embedding) else 2 * site.parameters


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *others: Any, **named: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _find(model: nn.Module, path: str) -> nn.Module | None:
    """The module at a path; None if the student dropped it."""
    try:
        return module_at(model, path)
    except HprError:
        return None  # its layer is dropped, or reuses the attention of the layer below


def _storage(tensor: Tensor) -> Hashable:
    """A key that is equal for tensors that share memory. A tensor that is empty or on the meta device has a key of its own."""
    pointer = 0 if tensor.is_meta else tensor.untyped_storage().data_ptr()
    return (str(tensor.device), pointer) if pointer else id(tensor)


def _storage_bytes(tensor: Tensor) -> int:
    """The bytes of a tensor's whole storage."""
    return tensor.numel() * tensor.element_size() if tensor.is_meta else tensor.untyped_storage().nbytes()


def file_size(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """The bytes of a safetensors file: 8 for the header's length, a JSON header padded to a multiple of 8, and the data."""
    order = list(_DTYPES)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for key in sorted(state, key=lambda name: (-order.index(state[name].dtype), name)):
        end = offset + state[key].numel() * state[key].element_size()
        header[key] = {"dtype": _DTYPES[state[key].dtype], "shape": list(state[key].shape), "data_offsets": [offset, end]}
        offset = end
    length = len(json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode())
    return 8 + -(-length // 8) * 8 + offset
