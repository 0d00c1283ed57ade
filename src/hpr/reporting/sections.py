"""The sections of the report: rows, figures and a caption for each, from the plan and the metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from hpr.plans import table as plan_table
from hpr.plans.json_values import dig, number
from hpr.plans.table import PlanMap, StackMap
from hpr.reporting import captions
from hpr.reporting import svg as figures
from hpr.reporting.formatting import (
    ABSENT,
    count,
    exact,
    figure,
    numbers,
    percent,
    present,
    records,
    seconds,
    table,
    verdict,
)

Section = dict[str, Any]
_PLAN_KEYS = ("label", "budget", "parameters", "predicted", "measured", "chosen", "quality")


def quality(metrics: Mapping[str, Any]) -> list[Section]:
    """Every measurement with its change in words; ``good`` is None if better and worse are not defined for it."""
    rows = []
    for row in records(metrics, "quality"):
        unit, higher = str(row.get("unit") or ""), row.get("higher_is_better")
        before, after = number(row.get("before")), number(row.get("after"))
        good = None if None in (before, after) or higher is None else (after > before) == higher or after == before  # type: ignore[operator]
        rows.append(
            {
                "name": present(row.get("name")),
                "data": present(row.get("data")),
                "before": "–" if before is None else figure(before, unit),
                "after": figure(after, unit),
                "verdict": verdict(row),
                "good": good,
            }
        )
    return rows


def parts(metrics: Mapping[str, Any]) -> Section | None:
    """Parameters by part of the model, the largest first."""
    counted = [
        (present(part.get("name")), number(part.get("before")), number(part.get("after"))) for part in records(metrics, "parts")
    ]
    if not counted:
        return None
    counted.sort(key=lambda part: -(part[1] or part[2] or 0.0))
    rows = [
        _bars(name, [("before", before, count(before)), ("after", after, count(after))], percent(after, before))
        for name, before, after in counted
    ]
    cuts = [(before - after, name) for name, before, after in counted if before is not None and after is not None]
    saved = sum(cut for cut, _ in cuts)
    reading = "No part of the model became smaller."
    if saved > 0:
        most, name = max(cuts)
        reading = f"{percent(most, saved)} of the {count(saved)} saved parameters come from {name}."
    return {"rows": _scaled(rows), "reading": reading}


def layers(metrics: Mapping[str, Any]) -> list[Section]:
    """Similarity, block influence and context dependence of every stack that has one of them."""
    features = table(metrics, "layers")
    names = dict.fromkeys(
        name for key in ("names", "similarity", "block_influence", "context_dependence") for name in table(features, key)
    )
    sections = []
    for name in names:
        matrix = [numbers(row) for row in dig(features, "similarity", name) or [] if isinstance(row, list | tuple)]
        square = bool(matrix) and all(len(row) == len(matrix) for row in matrix)
        influence, context = (numbers(dig(features, key, name)) for key in ("block_influence", "context_dependence"))
        section: Section = {"name": name, "similarity": None, "bars": []}
        if square:
            reading = captions.similarity_reading(matrix)
            section["similarity"] = {
                "svg": figures.heatmap(matrix, f"Similarity between the layers of {name}. {reading}"),
                "reading": reading,
            }
        for values, title, axis, meaning in (
            (
                influence,
                "Block influence",
                "1 − cos(input, output)",
                "how far the output of a layer points away from its input",
            ),
            (
                context,
                "Context dependence",
                "shift of the output",
                "how far the output of a token moves if the other tokens are replaced",
            ),
        ):
            reading = captions.bar_reading(values, meaning)
            svg = (
                figures.layer_bars(values, axis, f"{title} of the layers of {name}. {reading}")
                if any(v is not None for v in values)
                else None
            )
            section["bars"].append({"title": title, "svg": svg, "reading": reading})
        sections.append(section)
    return sections


def boundaries(plan_map: PlanMap, metrics: Mapping[str, Any]) -> list[Section]:
    """Probability of each group boundary by stack and slot, and the boundaries of the plan."""
    rows_of = {f"{stack.name} · {row.slot}": row for stack in plan_map.stacks for row in stack.rows}
    stacks: dict[str, list[Section]] = {}
    for key, value in table(metrics, "boundaries").items():
        names = str(key).split(" + ")  # counterparts in an encoder and its decoder are one track
        parts = zip(*(name.partition(" · ")[::2] for name in names), strict=True)
        stack, slot = (" + ".join(dict.fromkeys(part)) for part in parts)
        rows_here = [rows_of[name] for name in names if name in rows_of]
        entropy, chosen = (
            number(dig(value, "entropy")),
            plan_table.boundaries(rows_here) if len(rows_here) == len(names) else (),
        )
        cells = []
        for gap, probability in enumerate(numbers(dig(value, "probabilities"))):
            strength = min(1.0, max(0.0, probability or 0.0))
            text = "–" if probability is None else f"{100 * strength:.0f}"
            took = chosen[gap] if gap < len(chosen) else None
            cells.append(
                {
                    "text": text,
                    "strength": strength,
                    "shade": figures.shade(strength),
                    "taken": took,
                    "known": probability is not None,
                }
            )
        equal = "" if entropy is None else f"≈ {math.exp(min(entropy, 50)):.3g}"
        if not cells:
            continue
        stacks.setdefault(stack, []).append({"slot": slot or stack, "cells": cells, "entropy": figure(entropy), "equal": equal})
    sections = []
    for stack, rows in stacks.items():
        strengths = [cell["strength"] for row in rows for cell in row["cells"] if cell["known"]]
        sure = sum(value < 0.1 or value > 0.9 for value in strengths)
        reading = (
            f"{sure} of {len(strengths)} possible boundaries are certain (below 10 % or above 90 %). The temperature of the "
            "probabilities was fitted to predicted against measured damage."
        )
        gaps = _gaps(
            stack, max(len(row["cells"]) for row in rows), {stack_map.name: stack_map.layers for stack_map in plan_map.stacks}
        )
        sections.append({"stack": stack, "rows": rows, "gaps": gaps, "reading": reading})
    return sections


def plans(metrics: Mapping[str, Any]) -> Section:
    """All plans tried, numbered from the smallest, and two scatter plots.

    Quality against size is left out (None) if all plans have the same budget.
    """
    tried = sorted(records(metrics, "plans"), key=lambda plan: number(plan.get("parameters")) or 0.0)
    rows = [{**dict.fromkeys(_PLAN_KEYS), **plan, "number": index + 1} for index, plan in enumerate(tried)]
    result: Section = {"rows": rows, "damage": None, "quality": None}
    pairs = [(number(row.get("predicted")), number(row.get("measured"))) for row in rows]
    positive = [(x, y) for x, y in pairs if x is not None and y is not None and x > 0 and y > 0]
    if positive:
        reading = captions.damage_reading(positive, len(rows))
        svg = figures.damage_scatter(rows, f"Predicted against measured damage of {len(positive)} plans. {reading}")
        result["damage"] = {"svg": svg, "reading": reading}
    scored = [row for row in rows if number(row.get("quality")) is not None and number(row.get("parameters")) is not None]
    if len({row["budget"] for row in scored}) > 1:
        name, original = captions.quality_axis(scored, metrics)
        reading = captions.quality_reading(scored, name)
        svg = figures.quality_scatter(
            rows,
            name,
            number(dig(metrics, "budget", "parameters")),
            original,
            f"{name} against size of {len(scored)} plans. {reading}",
        )
        result["quality"] = {"svg": svg, "reading": reading}
    return result


def gains(metrics: Mapping[str, Any]) -> Section | None:
    """The predicted damage with and without each operator."""
    gained = [
        (present(row.get("operator")), number(row.get("damage_without")), number(row.get("damage_with")))
        for row in records(metrics, "operator_gains")
    ]
    if not gained:
        return None
    gained.sort(key=lambda row: -((row[1] or 0.0) - (row[2] or 0.0)))
    rows = []
    for name, without, with_it in gained:
        saved = percent(without - with_it, without) if without is not None and with_it is not None else ABSENT
        rows.append(
            _bars(name, [("before", without, figure(without, "nats")), ("after", with_it, figure(with_it, "nats"))], saved)
        )
    best = next((row for row in rows if row["note"] != ABSENT), None)
    reading = "The gain of no operator was recorded."
    if best is not None:
        without_text, with_text = (bar["text"] for bar in best["bars"])
        reading = f"{best['name'].capitalize()} gains most: without it the damage is {without_text} instead of {with_text}."
    return {"rows": _scaled(rows), "reading": reading}


def healing(metrics: Mapping[str, Any]) -> Section | None:
    """Validation divergence and training loss by step, and the change in each stage; None without healing."""
    healed = table(metrics, "healing")
    if not healed:
        return None
    rows, best = records(healed, "history"), number(healed.get("best_step"))
    before = number(healed.get("before"))
    start = [(0.0, before)] if before is not None else []
    section: Section = {"reading": captions.healing_reading(healed), "curves": [], "stages": []}
    for key, title, axis, first in (
        ("validation", "Divergence on the validation set", "nats per example", start),
        ("loss", "Loss", "mean between checks", []),
    ):
        pairs = [(number(row.get("step")), number(row.get(key))) for row in rows]
        points = [*first, *((step, value) for step, value in pairs if step is not None and value is not None)]
        if len(points) > 1:
            reading = captions.curve_reading(points)
            svg = figures.curve(points, axis, best if key == "validation" else None, f"{title} by step. {reading}")
            section["curves"].append({"title": title, "svg": svg, "reading": reading})
    stages = records(healed, "stages")
    for row in stages if len(stages) > 1 else []:
        values = [("before", number(row.get("before"))), ("after", number(row.get("after")))]
        bars = [(kind, value, figure(value, "nats")) for kind, value in values]
        section["stages"].append(_bars(f"{present(row.get('stage'))}, {exact(row.get('steps'))} steps", bars, ""))
    _scaled(section["stages"])
    return section


def solver(metrics: Mapping[str, Any]) -> Section | None:
    """Predicted damage of the plan, and how far it may be from the least possible."""
    account = table(metrics, "solver")
    if not account:
        return _rounding(table(metrics, "rounding"), _before(metrics))
    gap = number(account.get("gap"))
    rows = [
        ("Damage of the plan", figure(account.get("damage"), "nats"), "predicted, summed over all sites, per example"),
        (
            "Lower bound",
            figure(account.get("bound"), "nats"),
            "no plan of these candidates within this budget has less",
        ),
        (
            "Gap",
            ABSENT if gap is None else f"{100 * gap:.2f}\u00a0%",
            "the plan has at most so much more damage than the best plan",
        ),
        ("Multiplier λ", figure(account.get("multiplier"), "nats per parameter"), "damage that one more parameter would save"),
    ]
    if rounding := table(metrics, "rounding"):
        cost = f"predicted{_before(metrics)}; the damage of the plan is that of sharing alone"
        rows += [_step(rounding), ("Damage of rounding", figure(rounding.get("damage"), "nats"), cost)]
    reading = "The gap to the best plan was not recorded."
    if gap is not None:
        reading = f"The predicted damage is within {100 * gap:.2f}\u00a0% of the least that these candidates allow."
    return {"rows": rows, "reading": reading}


def _before(metrics: Mapping[str, Any]) -> str:
    """What figures of a rounding are called if its codes were trained afterwards."""
    return ", before healing" if table(metrics, "healing") else ""


def _rounding(account: Mapping[str, Any], before: str) -> Section | None:
    """The step of a coded model, and how far its damage is from the least that so many bits allow."""
    if not account:
        return None
    above = number(account.get("decibels"))
    rows = [
        _step(account),
        ("Damage of the plan", figure(account.get("damage"), "nats"), f"predicted{before}, summed over all sites, per example"),
        (
            "Above the limit",
            ABSENT if above is None else f"{above:.1f}\u00a0dB",
            "over the least damage of any code of so many bits for independent Gaussian weights",
        ),
    ]
    reading = "How far the plan is from the limit of a code of so many bits was not recorded."
    if above is not None:
        reading = (
            f"The predicted damage is {above:.1f}\u00a0decibels above what the best code of so many bits could reach. Rounding "
            f"number by number stays 1.5\u00a0decibels above it at many bits; 6\u00a0decibels are a bit a number."
        )
    return {"rows": rows, "reading": reading}


def _step(account: Mapping[str, Any]) -> tuple[str, str, str]:
    return "Step size δ", figure(account.get("step"), ""), "in √nats, one for all weights: a number costs about δ² / 12 nats"


def timing(metrics: Mapping[str, Any]) -> Section | None:
    """Wall-clock seconds by step, in the order they were recorded."""
    steps = [(str(step), number(spent)) for step, spent in table(metrics, "timing").items()]
    spent = [(time, step) for step, time in steps if time is not None]
    if not spent:
        return None
    total = sum(time for time, _ in spent)
    rows = [_bars(step, [("after", time, seconds(time))], percent(time, total)) for step, time in steps]
    reading = f"{seconds(total)} in total; {percent(max(spent)[0], total)} of it in the step “{max(spent)[1]}”."
    return {"rows": _scaled(rows), "reading": reading}


def stack_note(stack: StackMap) -> str:
    """The size of a stack's map: ``6 layers × 4 slots``."""
    return (
        f"{stack.layers} layer{'s' if stack.layers != 1 else ''} × {len(stack.rows)} slot{'s' if len(stack.rows) != 1 else ''}"
    )


def _gaps(stacks: str, count: int, layers: Mapping[str, int]) -> list[str]:
    """``0|1`` for every gap between neighbouring layers; each stack is numbered from 0."""
    numbers = [layer for stack in stacks.split(" + ") for layer in range(layers.get(stack, 0))]
    numbers += range(len(numbers), count + 1)
    return [f"{left}|{right}" for left, right in pairwise(numbers[: count + 1])]


def _bars(name: str, bars: Sequence[tuple[str, float | None, str]], note: str) -> Section:
    return {"name": name, "note": note, "bars": [{"kind": kind, "value": value, "text": text} for kind, value, text in bars]}


def _scaled(rows: list[Section]) -> list[Section]:
    """Give every bar its width in per cent of the longest."""
    longest = max((bar["value"] or 0.0 for row in rows for bar in row["bars"]), default=0.0)
    for bar in (bar for row in rows for bar in row["bars"]):
        bar["width"] = f"{100 * max(bar['value'] or 0.0, 0.0) / longest if longest > 0 else 0.0:.2f}"
    return rows
