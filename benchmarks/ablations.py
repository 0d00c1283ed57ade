"""What each decision of coded rounding is worth: all-MiniLM-L6-v2 at equal bytes, with one decision left out at a time.

Every row but "dampings chosen" rounds with the first dampings that ``hpr`` tries, without a choice by measurement, so that
rows differ in one decision. To add a decision, add a function from the ground and a number of bytes to a student to
``DECISIONS``. Divergence in nats on held-out docstrings and on held-out sentences of six kinds.

Run: python benchmarks/ablations.py [--megabytes 8 6 4] [--profile FILE] [--only "one side" ...]
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import hpr.rounding.choice
import hpr.rounding.model
import hpr.rounding.plan
import hpr.rounding.sites
from common.byte_ground import Ground, minilm
from common.quantised.coded import one_sided, saved_bytes
from common.tables import markdown, say
from hpr.coding.codes import Codes, joined, parts_of
from hpr.coding.record import Coded
from hpr.evaluation.cost import coded_bytes
from hpr.nn.coded import codes_of, other_codes_of, stored
from hpr.profiling.profile import Profile
from hpr.rounding.matrices import Rule

Student = tuple[nn.Module, int]  # with the bytes that its file takes, or would take
_CLOSE = 0.005  # of the bytes: as near as a search by another code comes


def whole(on: Ground, limit: int, profile: Profile | None = None, **options: Any) -> Student:
    """Nothing left out."""
    made = hpr.rounding.plan.plan_bytes(on.model, profile or on.profile, f"{limit / 1e6}MB", limit, **options)
    return made.student, saved_bytes(made.student)


def chosen(on: Ground, limit: int) -> Student:
    """Dampings chosen by measurement on data that was not profiled."""
    return whole(on, limit, measure=on.measure)


def second_side(on: Ground, limit: int) -> Student:
    """The moments of the inputs alone."""
    return whole(on, limit, one_sided(on.profile))


def damped(on: Ground, limit: int, damping: float) -> Student:
    """The same damping for both sides at every size."""
    with patched(hpr.rounding.choice, "UPWARDS", ((damping, damping),)):
        return whole(on, limit)


def halves(on: Ground, limit: int) -> Student:
    """Every number to the nearest code, though the larger code costs more."""
    with patched(hpr.rounding.model, "THRESHOLD", 0.5):
        return whole(on, limit)


def alone(on: Ground, limit: int) -> Student:
    """Every number rounded by itself on the same grid: no number takes up the errors of others."""

    def nearest(weights: Tensor, grids: tuple[Tensor, Tensor], sides: object, rule: Rule) -> Tensor:
        return rule.whole(weights / (grids[0][:, :, None] * grids[1][:, None, :]))

    with patched(hpr.rounding.sites, "round_matrices", nearest):
        return whole(on, limit)


def no_products(on: Ground, limit: int) -> Student:
    """No weight as a product of two factors."""
    with patched(hpr.rounding.choice, "worthwhile", lambda *_: {}):
        return whole(on, limit)


def biases(on: Ground, limit: int) -> Student:
    """Biases of the original."""
    student, size = whole(on, limit)
    known = dict(on.model.named_parameters())
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(stored(known[name]))
    return student, size


def same_bits(on: Ground, limit: int) -> Student:
    """A step for each weight, so that all weights take the same bits a number, instead of one step for all."""
    profile = on.profile
    for _ in range(2):  # the second time mends what the first one missed, because a bit is not a factor of two at low rates
        made = hpr.rounding.plan.plan_bytes(on.model, profile, f"{limit / 1e6}MB", limit)
        bits = made.plan.diagnostics["bits"]
        numbers = {name: weight.stream for name, weight in codes_of(made.student).items()}
        mean = 8 * sum(map(len, numbers.values())) / sum(8 * len(stream) / bits[name] for name, stream in numbers.items())
        sites = {name: replace(site, rows=site.rows * 4 ** (mean - bits[name])) for name, site in profile.sites.items()}
        profile = replace(profile, sites=sites)
    return whole(on, limit, profile)


def coded_by(on: Ground, limit: int, code: Callable[[list[Codes]], float]) -> Student:
    """The same rounding at the step at which another code takes so many bytes."""
    budget = float(limit)
    for _ in range(4):
        student, size = whole(on, int(budget))
        codes = {name: coded.codes() for name, coded in codes_of(student).items()}
        parts = {name: parts_of(one) for name, one in codes.items()}
        empty = {name: Coded.of(joined([without_codes(part) for part in some])) for name, some in parts.items()}
        size = int(
            coded_bytes(student, empty, other_codes_of(student)) + code([part for some in parts.values() for part in some])
        )
        if abs(size / limit - 1) < _CLOSE:
            break
        budget *= limit / size
    return student, size


def without_codes(codes: Codes) -> Codes:
    """The same scales with codes that take no bits."""
    return replace(codes, values=np.zeros_like(codes.values))


def table_each(codes: list[Codes]) -> float:
    """Bytes by entropy with one table for each weight."""
    return sum(_entropy([one]) for one in codes)


def table_for_all(codes: list[Codes]) -> float:
    """Bytes by entropy with one table for the whole model."""
    return _entropy(codes)


def _entropy(codes: list[Codes]) -> float:
    values = np.concatenate([one.values.ravel() for one in codes])
    _, counts = np.unique(values, return_counts=True)
    return float((counts * -np.log2(counts / counts.sum())).sum()) / 8 + 2 * len(counts)


@contextmanager
def patched(module: Any, name: str, value: object) -> Iterator[None]:
    """The name of a module bound to another value inside the ``with`` block. Raises ``AttributeError`` for an unknown name."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


DECISIONS: dict[str, Callable[[Ground, int], Student]] = {
    "nothing left out": whole,
    "one side": second_side,
    "no feedback": alone,
    "no products": no_products,
    "biases not corrected": biases,
    "threshold 0.5": halves,
    "one table for each weight": partial(coded_by, code=table_each),
    "one table for all": partial(coded_by, code=table_for_all),
    "same bits in every weight": same_bits,
    "damping 0.3": partial(damped, damping=0.3),
    "damping 0.001": partial(damped, damping=0.001),
    "dampings chosen": chosen,
}


def main() -> None:
    """Print one JSON line per row and a table at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, nargs="+", default=[8.0, 6.0, 4.0])
    parser.add_argument("--profile", type=Path, help="a file that keeps the profile from run to run")
    parser.add_argument("--only", nargs="+", choices=list(DECISIONS), default=list(DECISIONS))
    given = parser.parse_args()
    logging.getLogger("hpr").setLevel(logging.ERROR)
    on = minilm(profile=given.profile, task=False)
    rows = []
    for megabytes in given.megabytes:
        for name in given.only:
            student, size = DECISIONS[name](on, int(megabytes * 1e6))
            rows.append(say(left_out=name, budget=megabytes, megabytes=size / 1e6, **on.score(student)))
    print(markdown(rows, {"left_out": "", "budget": "g", "megabytes": ".3f", "divergence": ".5f", "six kinds": ".5f"}))


if __name__ == "__main__":
    main()
