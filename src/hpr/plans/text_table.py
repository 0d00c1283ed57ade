"""Write the table of a plan as plain text, for ``print(plan)`` and the command line."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

from hpr.plans.json_values import dig, number
from hpr.plans.table import CODED, Cell, read_plan
from hpr.plans.terms import KEEP

WIDTH = 100  # characters of a line of text


def runs(cells: Iterable[Cell | None]) -> list[str]:
    """``0–1: sib 93`` for each group of neighbouring layers, and for neighbouring layers that are all kept."""
    joined: list[list[tuple[int, Cell]]] = []
    for layer, cell in enumerate(cells):
        if cell is None:
            continue
        before = joined[-1][-1] if joined else None
        if before and before[0] == layer - 1 and (cell.joins_left or cell.kind == before[1].kind in (KEEP, CODED)):
            joined[-1].append((layer, cell))
        else:
            joined.append([(layer, cell)])
    texts = []
    for run in joined:
        first, last = run[0][0], run[-1][0]
        words = [word for word, _ in groupby(cell.word for _, cell in run)]
        texts.append(f"{first if first == last else f'{first}–{last}'}: {' | '.join(words)}")
    return texts


def plan_text(plan: Mapping[str, Any]) -> str:
    """The table as plain text: a line for each slot (``layers: operator rank``), the operators, and what the plan predicts."""
    plan_map = read_plan(plan)
    rows = [(f"{stack.name} · {row.slot}", runs(row.cells)) for stack in plan_map.stacks for row in stack.rows]
    rows += [(cell.site, [cell.word.replace("/", " / ")]) for cell in plan_map.outside]
    left = max((len(name) for name, _ in rows), default=0) + 2
    lines = []
    for name, groups in rows:
        # a no-break space keeps a group on one line; long lists of ranks may still be broken
        text = "   ".join(group if len(group) > WIDTH - left else group.replace(" ", "\u00a0") for group in groups)
        lines += textwrap.wrap(
            text, max(WIDTH, left + 24), initial_indent=name.ljust(left), subsequent_indent=" " * left, break_on_hyphens=False
        )
    codes = [f"{use.name if use.name == use.code else f'{use.code} = {use.name}'} ({use.sites})" for use in plan_map.operators]
    lines += ["", *textwrap.wrap(", ".join(codes), WIDTH), _prediction(plan)]
    return "\n".join(lines).replace("\u00a0", " ")


def _prediction(plan: Mapping[str, Any]) -> str:
    """Budget, predicted damage, and the gap to the best plan."""
    allowed, dense = (number(dig(plan, *keys)) for keys in (("budget", "parameters"), ("model", "dense_parameters")))
    damage, gap = number(dig(plan, "predicted_damage")), number(dig(plan, "diagnostics", "solver", "gap"))
    parts = [f"budget {dig(plan, 'budget', 'text')}"]
    step, bits = (number(dig(plan, "rounding", key)) for key in ("step", "bits"))
    size = number(dig(plan, "diagnostics", "bytes"))
    shares = dig(plan, "rounding", "factors")
    if allowed is not None and dense is not None and (step is None or shares):
        parts[0] += f": at most {allowed:,.0f} of {dense:,.0f} parameters"
    if step is not None:
        parts[0] += (
            f"{',' if shares else ':'} every number rounded with the step {step:.3g}"
            + (f", codes of {bits:.0f} bits" if bits else "")
            + (f", {size / 1e6:.3f} MB" if size else "")
        )
    if damage is not None:
        parts.append(f"predicted damage {damage:.3g} nats per example")
    if (rounded := number(dig(plan, "diagnostics", "rounding_damage"))) is not None:
        parts[-1] += f" by sharing, {rounded:.3g} by rounding"
    if (above := number(dig(plan, "diagnostics", "decibels"))) is not None:
        parts[-1] += f", {above:.1f} decibels above the limit of a code of so many bits"
    if gap is not None:
        parts[-1] += f", at most {100 * gap:.2f} % above the least possible"
    return "\n".join(parts)
