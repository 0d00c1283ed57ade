"""What HPR promises of a model, tried on one model: shared, saved, loaded, generating, trained and unshared; and coded."""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hpr
from common.tiny_batches import EXAMPLES, Batch, main_output
from hpr.anatomy.describe import describe
from hpr.anatomy.lookup import module_at
from hpr.errors import BudgetError
from hpr.evaluation.cost import disk_bytes
from hpr.nn.bank import bank_of
from hpr.plans.plan import Plan, keep_all
from hpr.runtime.hooks import run

PROMISES = {
    "identity": "identity plan bit-equal",
    "plan": "75 % plan (or the smallest there is) within budget",
    "reload": "save → load bit-equal",
    "cache": "cached = uncached",
    "gradient": "gradient in every factor",
    "unshare": "unshared loads in stock",
    "coded": "coded plan within its bytes",
    "decoded": "coded save → load bit-equal",
}


Compare = Callable[[Tensor, Tensor], bool]


@dataclass
class Row:
    """What was found so far: ``kept`` holds True, False or None (does not apply) for each promise tried."""

    stage: str = "describe"
    stacks: list[str] = field(default_factory=list)
    sites: int = 0
    shared: int = 0
    kept: dict[str, bool | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def check(model: Any, batch: Callable[[int], Batch], row: Row) -> None:
    """Fill a row; what stands in it when an exception comes says how far the model got. ``batch`` draws one by a seed."""
    first = batch(1)
    anatomy = describe(model)
    row.sites, row.stacks = len(anatomy.sites), [f"{one.name} {one.layers}" for one in anatomy.stacks]
    expected = answer(model, first)
    steady = equal(answer(model, first), expected)
    if not steady:
        row.notes.append("the original answers differently each time")
    stock = steady and _reloads(model, first, expected, row)
    row.stage = "identity"
    kept = answer(hpr.share(model, keep_all(anatomy)), first)
    row.kept["identity"] = equal(kept, expected) if steady else None
    row.stage = "profile"
    profile = hpr.profile(model, [batch(seed) for seed in (2, 3, 4)])
    row.stage = "plan"
    plan = _planned(model, profile, row)
    row.stage = "share"
    student = hpr.share(model, plan, profile)
    row.shared = sum(bool(entry.terms) for entry in plan.entries.values())
    used = sum(parameter.numel() for parameter in student.parameters())
    orders = sum(buffer.numel() for name, buffer in student.named_buffers() if name.endswith(".order"))
    row.kept["plan"] = used + orders == plan.parameters(anatomy) <= plan.budget.parameters
    found = answer(student, first)
    row.stage = "save"
    with tempfile.TemporaryDirectory() as folder:
        path = hpr.save(student, f"{folder}/shared")
        row.stage = "load"
        again = type(model).from_pretrained(path).eval()
        row.kept["reload"] = stock(answer(again, first), found) if stock else None
        row.stage = "generate"
        row.kept["cache"] = caches(student, first, row) if generates(model, first, row) else None
        row.stage = "gradient"
        row.kept["gradient"] = gradients_reach(model, student, plan, first, row)
        row.stage = "unshare"
        dense = hpr.unshare(student)
        dense.save_pretrained(f"{folder}/dense")
        again = type(model).from_pretrained(f"{folder}/dense").eval()
        row.kept["unshare"] = bank_of(again) is None and (close(answer(again, first), found) if stock else None)
    row.stage = "code"
    code(model, profile, first, row, stock)
    row.stage = "done"


def _planned(model: Any, profile: hpr.Profile, row: Row) -> Plan:
    """A plan of 75 % of the parameters, or of the fewest possible where much of a tiny model is no site."""
    try:
        return hpr.plan(model, profile, "75%")
    except BudgetError as refusal:
        if not (least := re.search(r"needs [\d,]+ \(([\d.]+)% of all\)", str(refusal))):
            raise
        row.notes.append(f"its smallest plan has {least[1]} % of the parameters")
        return hpr.plan(model, profile, f"{min(100.0, float(least[1]) + 1):.1f}%")


def code(model: Any, profile: hpr.Profile, batch: Batch, row: Row, stock: Compare | None) -> None:
    """A coded plan of a sixth of the bytes, or of the least possible bytes: made, saved and loaded."""
    limit = disk_bytes(model) // 6
    plan = None
    while plan is None:
        try:
            plan = hpr.plan(model, profile, f"{limit / 1000}KB")
        except BudgetError as refusal:  # it names the fewest bytes that were tried, in thousands
            if not (least := re.search(r"([\d.]+) MB: ", str(refusal))):
                raise
            limit = round(max(float(least[1]) * 1e6, limit) * 1.1)
    student = hpr.share(model, plan, profile)
    found = answer(student, batch)
    with tempfile.TemporaryDirectory() as folder:
        path = hpr.save(student, f"{folder}/coded")
        size = sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))
        row.kept["coded"] = size <= limit
        again = type(model).from_pretrained(path).eval()
        row.kept["decoded"] = stock(answer(again, batch), found) if stock else None


def _reloads(model: Any, batch: Batch, expected: Tensor, row: Row) -> Compare | None:
    """How far Transformers itself saves and loads the original without change: bit by bit, to rounding, or not at all."""
    row.stage = "stock"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = answer(type(model).from_pretrained(folder).eval(), batch)
    if equal(again, expected):
        return equal
    row.notes.append("the original changes when Transformers saves and loads it")
    return close if close(again, expected) else None


@torch.no_grad()
def answer(model: nn.Module, batch: Batch) -> Tensor:
    """The model's main output, one tensor; a model that draws random numbers draws the same ones."""
    torch.manual_seed(0)
    return main_output(run(model, batch))


def equal(one: Tensor, other: Tensor) -> bool:
    """Bit by bit."""
    return bool(torch.equal(one, other))


def close(one: Tensor, other: Tensor) -> bool:
    """To what float32 rounding may grow to in a random model, in relation to the largest value."""
    return one.shape == other.shape and float((one - other).abs().max()) <= 1e-3 * float(other.abs().max())


def generates(model: Any, batch: Batch, row: Row) -> bool:
    """Whether the original generates the same with and without its cache: only then the student must."""
    if not (hasattr(model, "can_generate") and model.can_generate()):
        return False
    try:
        same = cached(model, batch)
    except Exception as error:  # whatever stock generation refuses is no fault of a student
        row.notes.append(f"the original does not generate ({type(error).__name__})")
        return False
    if not same:
        row.notes.append("the original generates otherwise without its cache")
    return same


def caches(student: Any, batch: Batch, row: Row) -> bool:
    """Whether a student generates the same with and without its cache, or its dense form does not either.

    A router may be undecided to the last bit, and rounding decides.
    """
    if cached(student, batch):
        return True
    if cached(hpr.unshare(student), batch):
        return False
    row.notes.append("the unshared student generates otherwise without its cache")
    return True


@torch.no_grad()
def cached(model: Any, batch: Batch) -> bool:
    """Whether generation is the same with and without cache. It gets copies, because Blip writes into its input."""
    inputs = {
        key: value[: len(value) * 2 // EXAMPLES].clone() for key, value in batch.items() if not key.startswith("decoder_")
    }
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": 1, "return_dict_in_generate": True}
    runs = [model.generate(**inputs, **settings, output_logits=True, use_cache=use) for use in (True, False)]
    same = torch.equal(runs[0].sequences, runs[1].sequences)
    return same and close(torch.stack(runs[0].logits), torch.stack(runs[1].logits))


def gradients_reach(model: nn.Module, student: nn.Module, plan: Plan, batch: Batch, row: Row) -> bool | None:
    """Whether a loss on the outputs moves every factor of a weight, or of its rows, that it moves in the original.

    Experts are left out: a compressed router may choose others. None if the plan shares nothing, or if the original has no
    gradients as it is.
    """
    try:
        original = _after_backward(model, batch)
    except RuntimeError as error:
        row.notes.append(f"the original has no gradients ({error})")
        return None
    trained, anatomy = _after_backward(student, batch), describe(model)
    bank = bank_of(trained)
    if bank is None:
        row.notes.append("the plan shares nothing")
        return None
    for name, entry in plan.entries.items():
        gradient = module_at(original, name).weight.grad if entry.terms and anatomy[name].expert is None else None
        for term in entry.terms if gradient is not None else ():
            read = gradient if term.rows is None else gradient[slice(*term.rows)]  # a batch may not read some rows of a table
            reached = [_has_gradient(bank[factor].weight) for factor in term.factors]
            if read.abs().sum() > 0 and not (any(reached) if term.identity else all(reached)):
                return False  # a factor with an identity block holds the other rows alone
    return True


def _has_gradient(weight: Tensor) -> bool:
    return weight.grad is not None and bool(weight.grad.abs().sum() > 0)


def _after_backward(model: nn.Module, batch: Batch) -> nn.Module:
    """A copy of the model with the gradients of a random sum of its outputs."""
    copied = copy.deepcopy(model)
    torch.manual_seed(0)
    output = main_output(run(copied, batch))
    (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    return copied
