"""What each section of the report says: rows, figures and one plain sentence of reading, from plan and metrics."""

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
    present,
    records,
    seconds,
    share,
    table,
    verdict,
)

Section = dict[str, Any]
_PLAN_KEYS = ("label", "budget", "parameters", "predicted", "measured", "chosen", "quality")


def quality(metrics: Mapping[str, Any]) -> list[Section]:
    """Every measurement with a verdict in words; ``good`` is None where better and worse cannot be told."""
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
    found = [
        (present(part.get("name")), number(part.get("before")), number(part.get("after"))) for part in records(metrics, "parts")
    ]
    if not found:
        return None
    found.sort(key=lambda part: -(part[1] or part[2] or 0.0))
    rows = [
        _bars(name, [("before", before, count(before)), ("after", after, count(after))], share(after, before))
        for name, before, after in found
    ]
    cuts = [(before - after, name) for name, before, after in found if before is not None and after is not None]
    saved = sum(cut for cut, _ in cuts)
    reading = "Nothing was saved in any part that was counted."
    if saved > 0:
        most, name = max(cuts)
        reading = f"Of {count(saved)} parameters saved, {share(most, saved)} come from {name}."
    return {"rows": _scaled(rows), "reading": reading}


def layers(metrics: Mapping[str, Any]) -> list[Section]:
    """Similarity, block influence and context dependence for every stack that has any of them."""
    found = table(metrics, "layers")
    names = dict.fromkeys(
        name for key in ("names", "similarity", "block_influence", "context_dependence") for name in table(found, key)
    )
    sections = []
    for name in names:
        matrix = [numbers(row) for row in dig(found, "similarity", name) or [] if isinstance(row, list | tuple)]
        square = bool(matrix) and all(len(row) == len(matrix) for row in matrix)
        influence, context = (numbers(dig(found, key, name)) for key in ("block_influence", "context_dependence"))
        section: Section = {"name": name, "similarity": None, "bars": []}
        if square:
            reading = captions.similarity_reading(matrix)
            section["similarity"] = {
                "svg": figures.heatmap(matrix, f"Similarity between the layers of {name}. {reading}"),
                "reading": reading,
            }
        for values, title, axis, meaning in (
            (influence, "Block influence", "1 − cos(input, output)", "how far a layer turns what it is given"),
            (
                context,
                "Context dependence",
                "shift of the output",
                "how far a token's output moves when the tokens around it are replaced",
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
    """Group-boundary probabilities by stack and slot, with the boundaries that the plan took."""
    rows_of = {f"{stack.name} · {row.slot}": row for stack in plan_map.stacks for row in stack.rows}
    stacks: dict[str, list[Section]] = {}
    for key, value in table(metrics, "boundaries").items():
        names = str(key).split(" + ")  # counterparts in an encoder and its decoder are one track
        parts = zip(*(name.partition(" · ")[::2] for name in names), strict=True)
        stack, slot = (" + ".join(dict.fromkeys(part)) for part in parts)
        found = [rows_of[name] for name in names if name in rows_of]
        entropy, chosen = number(dig(value, "entropy")), plan_table.boundaries(found) if len(found) == len(names) else ()
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
        known = [cell["strength"] for row in rows for cell in row["cells"] if cell["known"]]
        sure = sum(value < 0.1 or value > 0.9 for value in known)
        reading = (
            f"{sure} of {len(known)} possible boundaries are settled (below 10 % or above 90 %); "
            "the others could go either way."
        )
        gaps = _gaps(stack, max(len(row["cells"]) for row in rows), {one.name: one.layers for one in plan_map.stacks})
        sections.append({"stack": stack, "rows": rows, "gaps": gaps, "reading": reading})
    return sections


def plans(metrics: Mapping[str, Any]) -> Section:
    """All plans tried, numbered from the smallest, with the two scatter plots as far as there are points for them."""
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
    if scored:
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
    """What the plan would lose without each operator."""
    found = [
        (present(row.get("operator")), number(row.get("damage_without")), number(row.get("damage_with")))
        for row in records(metrics, "operator_gains")
    ]
    if not found:
        return None
    found.sort(key=lambda row: -((row[1] or 0.0) - (row[2] or 0.0)))
    rows = []
    for name, without, with_it in found:
        saved = share(without - with_it, without) if without is not None and with_it is not None else ABSENT
        rows.append(
            _bars(name, [("before", without, figure(without, "nats")), ("after", with_it, figure(with_it, "nats"))], saved)
        )
    best = next((row for row in rows if row["note"] != ABSENT), None)
    reading = "No gain could be computed."
    if best is not None:
        without_text, with_text = (bar["text"] for bar in best["bars"])
        reading = f"Most is owed to {best['name']}: without it the damage would be {without_text} instead of {with_text}."
    return {"rows": _scaled(rows), "reading": reading}


def healing(metrics: Mapping[str, Any]) -> Section | None:
    """What training has brought: the validation loss and the training loss by step, and each stage's part in it."""
    found = table(metrics, "healing")
    if not found:
        return None
    rows, best = records(found, "history"), number(found.get("best_step"))
    before = number(found.get("before"))
    start = [(0.0, before)] if before is not None else []
    section: Section = {"reading": captions.healing_reading(found), "curves": [], "stages": []}
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
    stages = records(found, "stages")
    for row in stages if len(stages) > 1 else []:
        values = [("before", number(row.get("before"))), ("after", number(row.get("after")))]
        bars = [(kind, value, figure(value, "nats")) for kind, value in values]
        section["stages"].append(_bars(f"{present(row.get('stage'))}, {exact(row.get('steps'))} steps", bars, ""))
    _scaled(section["stages"])
    return section


def solver(metrics: Mapping[str, Any]) -> Section | None:
    """How near the plan is to the best one by its own measure."""
    found = table(metrics, "solver")
    if not found:
        return None
    gap = number(found.get("gap"))
    rows = [
        ("Damage of the plan", figure(found.get("damage"), "nats"), "predicted, summed over all sites, per example"),
        (
            "Lower bound",
            figure(found.get("bound"), "nats"),
            "no plan made of these candidates within this budget can do better",
        ),
        ("Gap", ABSENT if gap is None else f"{100 * gap:.2f}\u00a0%", "how far the plan may be from the best one, at most"),
        ("Multiplier λ", figure(found.get("multiplier"), "nats per parameter"), "what one more parameter would save"),
    ]
    reading = "The gap was not recorded, so it is open how far from the best this plan is."
    if gap is not None:
        reading = f"By its own measure the plan is within {100 * gap:.2f}\u00a0% of the best that these candidates allow."
    return {"rows": rows, "reading": reading}


def timing(metrics: Mapping[str, Any]) -> Section | None:
    """Wall-clock seconds by step, in the order they were recorded."""
    found = [(str(step), number(spent)) for step, spent in table(metrics, "timing").items()]
    spent = [(time, step) for step, time in found if time is not None]
    if not spent:
        return None
    total = sum(time for time, _ in spent)
    rows = [_bars(step, [("after", time, seconds(time))], share(time, total)) for step, time in found]
    reading = f"{seconds(total)} in all, most of it ({share(max(spent)[0], total)}) in the step “{max(spent)[1]}”."
    return {"rows": _scaled(rows), "reading": reading}


def stack_note(stack: StackMap) -> str:
    """The size of a stack's map: ``6 layers × 4 slots``."""
    return (
        f"{stack.layers} layer{'s' if stack.layers != 1 else ''} × {len(stack.rows)} slot{'s' if len(stack.rows) != 1 else ''}"
    )


def _gaps(stacks: str, count: int, layers: Mapping[str, int]) -> list[str]:
    """``0|1`` for every gap between neighbours, numbered anew in each of several stacks."""
    numbers = [layer for stack in stacks.split(" + ") for layer in range(layers.get(stack, 0))]
    numbers += range(len(numbers), count + 1)
    return [f"{one}|{other}" for one, other in pairwise(numbers[: count + 1])]


def _bars(name: str, bars: Sequence[tuple[str, float | None, str]], note: str) -> Section:
    return {"name": name, "note": note, "bars": [{"kind": kind, "value": value, "text": text} for kind, value, text in bars]}


def _scaled(rows: list[Section]) -> list[Section]:
    """Give every bar its width in per cent of the longest."""
    longest = max((bar["value"] or 0.0 for row in rows for bar in row["bars"]), default=0.0)
    for bar in (bar for row in rows for bar in row["bars"]):
        bar["width"] = f"{100 * max(bar['value'] or 0.0, 0.0) / longest if longest > 0 else 0.0:.2f}"
    return rows
