"""Is a product of two factors, private or shared, cheaper than the rounded weight? Costs J = damage + price · bits at one step.

Every linear weight is rounded whole and as products of several ranks; then weights of one group share the right factor V: those
that read the same input (query, key and value), and those of one slot in two neighbouring layers, whose V is rounded in the
mean of their input moments. Each weight fits its own U to the rounded V. A group counts if it is cheaper than the best private
ways of its weights together. Savings in per cent of J of all linear weights, and in kilobytes at the price of a bit.

Run: python benchmarks/products_at_the_slope.py minilm 8 5.6 4 3    (or: kwt1 0.112 0.08; megabytes at about which to round)
"""

from __future__ import annotations

import argparse
import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from common.byte_ground import Ground, minilm, speech
from common.tables import markdown, say
from hpr.coding.codes import parts_of
from hpr.coding.stream import estimate
from hpr.rounding.model import Rounder
from hpr.rounding.products import Factoring, price
from hpr.rounding.rates import Rates

GROUNDS = {"minilm": partial(minilm, task=False), "kwt1": speech}
SHARES = (0.06, 0.1, 0.15, 0.2, 0.3, 0.45, 0.65)  # ranks that are tried, of the full rank
DAMPINGS = (0.15, 0.15)


def private(one: Factoring, whole: float, step: float) -> float:
    """The least cost of a weight by itself, whole or as a product."""
    ranks = {max(1, int(share * min(one.weight.shape))) for share in SHARES}
    products = [one.codes(rank, step) for rank in ranks]
    return min(
        [whole, *(cost([one.damage(product)], [product.u, product.v], step) for product in products if product.is_exact)]
    )


def shared(group: Sequence[Factoring], step: float) -> float:
    """The least cost of weights that share a right factor."""
    right = torch.stack([_full(one.right) for one in group]).mean(0)
    root = torch.linalg.cholesky(right)
    seen = [math.sqrt(one.rows / 2) * _full(one.roots[0]).T @ one.weight @ root for one in group]
    _, values, vectors = torch.linalg.svd(torch.cat(seen), full_matrices=False)
    basis = torch.linalg.solve_triangular(root.T, vectors.T, upper=True).T
    together = replace(group[0], right=right, roots=(group[0].roots[0], root), values=values, basis=basis)
    costs = []
    for rank in {max(1, int(share * len(values))) for share in SHARES}:
        v = together.right_factor(rank, step)
        users = [one.fitted(v, values[:rank], step) for one in group]
        damages = [one.damage(product) for one, product in zip(group, users, strict=True)]
        costs.append(cost(damages, [users[0].v, *(product.u for product in users)], step))
    return min(costs)


def cost(damages: Sequence[float], parts: Sequence[object], step: float) -> float:
    """Nats."""
    return sum(damages) + price(step) * 8 * sum(estimate(part) for part in parts)  # type: ignore[arg-type]


def rows(on: Ground, megabytes: float) -> dict[str, object]:
    """What private and shared products save at about so many megabytes."""
    rounder = Rounder(on.model, on.profile, *DAMPINGS)
    step = Rates(rounder.sites).step(8e6 * megabytes, rounder.finest, rounder.finest * 2**40)
    codes = rounder.codes(step)
    linear = {one.site.name: one for one in rounder.sites if one.read and one.site.kind == "linear"}
    made = {name: rounder.factoring(one) for name, one in linear.items()}
    whole = {name: cost([one.damage(codes[name])], parts_of(codes[name]), step) for name, one in made.items()}
    alone = {name: private(one, whole[name], step) for name, one in made.items()}
    inputs, pairs = defaultdict(list), defaultdict(list)
    for name, one in linear.items():
        inputs[id(on.profile.sites[name].right)].append(name)
        pairs[one.site.stack, one.site.slot, (one.site.layer or 0) // 2].append(name)
    total = sum(whole.values())
    saved = {
        "private": sum(whole.values()) - sum(alone.values()),
        "same input": _gain(inputs, alone, made, step),
        "layer pairs": _gain(pairs, alone, made, step),
    }
    shares = {name: 100 * gain / total for name, gain in saved.items()}
    kilobytes = {f"{name}, kB": gain / price(step) / 8e3 for name, gain in saved.items()}
    return say(
        megabytes=megabytes, products=sum(alone[name] < whole[name] for name in alone), of=len(alone), **shares, **kilobytes
    )


def _gain(groups: Mapping[object, list[str]], alone: Mapping[str, float], made: Mapping[str, Factoring], step: float) -> float:
    several = [names for names in groups.values() if len(names) > 1]
    return sum(max(0.0, sum(alone[name] for name in names) - shared([made[name] for name in names], step)) for names in several)


def _full(moment: Tensor) -> Tensor:
    return torch.diag(moment) if moment.dim() == 1 else moment


def main() -> None:
    """Print one JSON line per size and a table at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ground", choices=list(GROUNDS))
    parser.add_argument("megabytes", type=float, nargs="+")
    given = parser.parse_args()
    logging.getLogger("hpr").setLevel(logging.ERROR)
    on = GROUNDS[given.ground]()
    found = [rows(on, megabytes) for megabytes in given.megabytes]
    figures = {"private": ".2f", "same input": ".2f", "layer pairs": ".2f"}
    print(
        markdown(found, {"megabytes": "g", "products": "", "of": "", **figures, **{f"{name}, kB": ".1f" for name in figures}})
    )


if __name__ == "__main__":
    main()
