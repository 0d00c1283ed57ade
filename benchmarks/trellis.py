"""Dependent rounding, tried: a trellis along the anti-diagonals of a weight, beside rounding number by number.

Dependent rounding (trellis-coded quantisation, Marcellin and Fischer 1990; VVC and NNC have it) lets the numbers before a
number decide which of two coarser grids it is rounded to: even steps, or odd ones and zero. A Viterbi search finds the path of
least damage plus λ times bits. Entries of one anti-diagonal do not touch one another (``rounding.matrices``), so each
anti-diagonal of a weight is one path; the errors of those before it enter its targets as usual. Bits are entropies, for each
bucket of expected size and each grid. Columns of "dB": damage times 4^bits, in decibels, so that lower is better at equal bits.

Run: python benchmarks/trellis.py --profile FILE [--steps 7e-5 1.1e-4 2e-4]    (MiniLM; FILE is made if it is missing)
     python benchmarks/trellis.py    (independent Gaussian numbers)
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.byte_ground import minilm
from common.tables import markdown, say
from hpr.coding.codes import Codes
from hpr.coding.stream import bucket_of_each, choice_of
from hpr.rounding.matrices import _in_steps
from hpr.rounding.model import Rounder
from hpr.rounding.sites import THRESHOLD, powers

FOUR = ((0, 2), (2, 0), (1, 3), (3, 1)), (0, 0, 1, 1)  # next state by parity, and the grid of each state
EIGHT = ((0, 2), (5, 7), (1, 3), (6, 4), (2, 0), (4, 6), (3, 1), (7, 5)), (0, 1, 0, 1, 0, 1, 0, 1)
TRELLISES = {"4 states": FOUR, "8 states": EIGHT}
FINE = 0.62  # of the step: the grid below the two coarser ones, which has about the damage of the plain step
ROUNDS = 3  # each takes the prices of bits from the codes of the one before
LARGEST = 64  # sizes from here on have one price
SITES = [
    f"encoder.layer.{layer}.attention.{name}" for layer in (0, 3, 5) for name in ("self.query", "self.value", "output.dense")
]

Prices = Callable[[int, np.ndarray, int], Any]  # grid, sizes of codes, place on the path → bits


def path(targets: np.ndarray, prices: Prices, slope: float, trellis: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, numbers in fine steps, and grids of several paths (places, paths), each the cheapest of its trellis."""
    following, grids = trellis
    places, count = targets.shape
    cost = np.full((len(grids), count), np.inf)
    cost[0] = 0
    before = np.zeros((places, len(grids), count), np.int8)
    codes = np.zeros((places, len(grids), count), np.int64)
    for place, target in enumerate(targets):
        found = {(grid, parity): _nearest(target, grid, parity, prices, slope, place) for grid in (0, 1) for parity in (0, 1)}
        reached = np.full_like(cost, np.inf)
        for state, grid in enumerate(grids):
            for parity, after in enumerate(following[state]):
                more, code = found[grid, parity]
                better = cost[state] + more < reached[after]
                reached[after] = np.where(better, cost[state] + more, reached[after])
                before[place, after] = np.where(better, state, before[place, after])
                codes[place, after] = np.where(better, code, codes[place, after])
        cost = reached
    state, every = cost.argmin(0), np.arange(count)
    chosen, numbers, used = (np.zeros(targets.shape, np.int64) for _ in range(3))
    for place in range(places - 1, -1, -1):
        chosen[place] = codes[place, state, every]
        state = before[place, state, every]
        used[place] = np.array(grids)[state]
        numbers[place] = 2 * chosen[place] - used[place] * np.sign(chosen[place])
    return chosen, numbers, used


def _nearest(
    target: np.ndarray, grid: int, parity: int, prices: Prices, slope: float, place: int
) -> tuple[np.ndarray, np.ndarray]:
    """The cheapest code of one parity on one grid, with its cost."""
    size, sign = np.abs(target), np.where(target < 0, -1, 1)
    low = 2 * np.floor(((size + grid) / 2 - parity) / 2) + parity
    best, code = np.full(len(target), np.inf), np.zeros(len(target))
    for option in (low, low + 2, np.full_like(low, parity)):
        option = np.maximum(option, parity)
        cost = (size - np.where(option > 0, 2 * option - grid, 0)) ** 2 + slope * prices(grid, option.astype(int), place)
        best, code = np.where(cost < best, cost, best), np.where(cost < best, option, code)
    return best, code * sign


def entropy(codes: np.ndarray, contexts: np.ndarray) -> float:
    """Bits a number, for known frequencies in each context."""
    bits = 0.0
    for context in np.unique(contexts):
        counts = np.unique(codes[contexts == context], return_counts=True)[1]
        bits += float((counts * (math.log2(counts.sum()) - np.log2(counts))).sum())
    return bits / codes.size


def table(codes: np.ndarray, contexts: np.ndarray) -> np.ndarray:
    """Bits of every size in every context (contexts, sizes), a sign included."""
    found = np.zeros((int(contexts.max()) + 2, LARGEST + 1))
    for context in range(len(found)):
        counts = np.bincount(np.minimum(np.abs(codes[contexts == context]), LARGEST), minlength=LARGEST + 1) + 0.3
        found[context] = -np.log2(counts / counts.sum()) + (np.arange(LARGEST + 1) > 0)
    return found


def line(name: str, step: float, damage: float, bits: float) -> dict[str, Any]:
    return say(rounding=name, step=step, bits=bits, damage=damage, dB=10 * math.log10(damage) + 20 * math.log10(2) * bits)


def gaussians(steps: Sequence[float]) -> list[dict[str, Any]]:
    """Independent numbers of variance 1: the least damage at R bits is 4^-R, which is 0 dB."""
    numbers, rows = np.random.default_rng(0).standard_normal((2000, 50)), []
    for step in steps:
        plain = np.sign(numbers) * np.floor(np.abs(numbers) / step + 1 - THRESHOLD)
        none = np.zeros(numbers.shape, int)
        rows.append(line("plain", step, float(np.square(numbers - plain * step).mean()), entropy(plain.astype(int), none)))
        for name, trellis in TRELLISES.items():
            prices, slope = None, 0.0
            for _ in range(ROUNDS):
                known = prices
                found = path(
                    numbers / (FINE * step),
                    lambda grid, size, _, known=known: 0.0 if known is None else known[grid, np.minimum(size, LARGEST)],
                    slope,
                    trellis,
                )
                error = float(np.square(numbers / (FINE * step) - found[1]).mean())
                prices, slope = table(found[0], found[2]), 2 * math.log(2) * 0.9 * error
            rows.append(line(name, step, error * (FINE * step) ** 2, entropy(found[0], found[2])))
    return rows


class Weights:
    """Some weights of MiniLM at one step size, in steps of their grids."""

    def __init__(self, rounder: Rounder, step: float):
        self.sites = [one for one in rounder.sites if one.site.name in SITES]
        weights = torch.stack([one.weight for one in self.sites])
        rows = torch.stack([one.scale(step) * powers(one.rows, weights) for one in self.sites])
        columns = torch.stack([powers(one.columns, weights) for one in self.sites])
        self.left = _in_steps(torch.stack([one.left for one in self.sites if one.left is not None]), rows).numpy()
        self.right = _in_steps(torch.stack([one.right for one in self.sites if one.right is not None]), columns).numpy()
        self.values = (weights / rows[:, :, None] / columns[:, None, :]).numpy()

    def rounded(self, one: Callable[[np.ndarray, np.ndarray, np.ndarray], Sequence[np.ndarray]]) -> list[np.ndarray]:
        """Codes, numbers and grids; ``one`` rounds the targets (sites, places) of an anti-diagonal with rows and columns."""
        height, width = self.values.shape[1:]
        spread, found = np.zeros_like(self.values), [np.zeros_like(self.values) for _ in range(3)]
        for wave in range(height + width - 2, -1, -1):
            i = np.arange(max(0, wave - width + 1), min(height - 1, wave) + 1)
            j = wave - i
            targets = self.values[:, i, j] - np.einsum("ski,ski->si", self.left[:, :, i], spread[:, :, j])
            for part, values in zip(found, one(targets, i, j), strict=True):
                part[:, i, j] = values
            spread[:, i] += (found[1][:, i, j] - self.values[:, i, j])[:, :, None] * self.right[:, j]
        return found

    def damage(self, numbers: np.ndarray) -> float:
        """The mean of the squared whitened errors, in squared steps."""
        errors = self.left.transpose(0, 2, 1) @ (numbers - self.values) @ self.right
        return float(np.square(errors).mean())

    def buckets(self, codes: np.ndarray) -> np.ndarray:
        """The coder's bucket of every number."""
        found = []
        for one, values in zip(self.sites, codes, strict=True):
            choice = choice_of([Codes(values.astype(np.int32), one.rows, one.columns, 1.0)])
            found.append(bucket_of_each(choice.layouts, choice.sized).reshape(values.shape))
        return np.stack(found).astype(int)


def weights(steps: Sequence[float], profile: Path) -> list[dict[str, Any]]:
    """Nine weights of MiniLM, with feedback of errors; every weight has tables of its own."""
    on, rows = minilm(profile=profile, task=False), []
    rounder = Rounder(on.model, on.profile, 0.15, 0.15)
    for step in steps:
        ground = Weights(rounder, step)

        def plain(targets: np.ndarray, *_: np.ndarray) -> list[np.ndarray]:
            codes = np.sign(targets) * np.floor(np.abs(targets) + 1 - THRESHOLD)
            return [codes, codes, np.zeros_like(codes)]

        codes, numbers, _ = ground.rounded(plain)
        buckets = ground.buckets(codes)
        bits = float(np.mean([entropy(*pair) for pair in zip(codes, buckets, strict=True)]))
        rows.append(line("plain", step, ground.damage(numbers) * step**2, bits))
        buckets -= buckets.min()
        for name, trellis in TRELLISES.items():
            prices, slope = np.zeros((2 * int(buckets.max()) + 2, LARGEST + 1)), 0.0
            for _ in range(ROUNDS):

                def dependent(
                    targets: np.ndarray,
                    i: np.ndarray,
                    j: np.ndarray,
                    prices: Any = prices,
                    slope: float = slope,
                    trellis: Any = trellis,
                    buckets: np.ndarray = buckets,
                ) -> list[np.ndarray]:
                    def price(grid: int, size: np.ndarray, place: int) -> np.ndarray:
                        return prices[2 * buckets[:, i[place], j[place]] + grid, np.minimum(size, LARGEST)]

                    codes, numbers, grids = path(targets.T / FINE, price, slope, trellis)
                    return [codes.T, numbers.T * FINE, grids.T]

                codes, numbers, grids = ground.rounded(dependent)
                contexts, damage = (2 * buckets + grids).astype(int), ground.damage(numbers)
                prices, slope = table(codes.astype(int), contexts), 2 * math.log(2) * 0.9 * damage / FINE**2
            bits = float(np.mean([entropy(*pair) for pair in zip(codes, contexts, strict=True)]))
            rows.append(line(name, step, damage * step**2, bits))
    return rows


def main() -> None:
    """Print one JSON line a row and a table at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", type=Path, help="of MiniLM, measured and written there if there is none")
    parser.add_argument("--steps", type=float, nargs="+")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.profile is None:
        rows = gaussians(given.steps or (0.3, 0.7, 1.2, 1.8))
    else:
        rows = weights(given.steps or (7e-5, 1.1e-4, 2e-4), given.profile)
    print(markdown(rows, {"rounding": "", "step": "g", "bits": ".3f", "damage": ".4g", "dB": ".2f"}))


if __name__ == "__main__":
    main()
