"""Figures as inline SVG: numbers in, markup out, coloured by the style sheet's variables so that light and dark both work.

Every figure has its natural width in pixels as a minimum, so that text stays readable on a telephone, and may grow to
``GROWTH`` times that. All text passes through ``Markup.format``, which escapes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from scipy.stats import rankdata

from hpr.plans.json_values import number
from hpr.reporting.formatting import count, exact, figure

WIDTH = 350  # what a 390 px telephone shows without scrolling
GROWTH = 1.45
_NUMBERED = 16  # up to so many plans, points carry the plan's number


def spearman(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Rank correlation in [−1, 1]; None for fewer than three pairs or where one side is constant."""
    if len(pairs) < 3:
        return None
    first, second = (rankdata(side) for side in zip(*pairs, strict=True))
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])


def shade(value: float) -> str:
    """The class that gives text enough contrast on a heat colour of this strength in [0, 1]."""
    return "low" if value < 0.6 else "mid" if value < 0.69 else "high"


def heatmap(matrix: Sequence[Sequence[float | None]], label: str) -> Markup:
    """A layers × layers map of similarities in [0, 1], values written where cells are wide enough, on hover always."""
    size = len(matrix)
    cell = max(13.0, min(44.0, (WIDTH - 40) / size))
    known = [value for row in matrix for value in row if value is not None]
    low = min(0.9, max(0.0, math.floor(min(known, default=0.0) * 10) / 10))
    left, side = 34, size * cell
    parts = []
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            strength = 0.0 if value is None else min(1.0, max(0.0, (value - low) / (1 - low)))
            x, y = left + j * cell, i * cell
            parts.append(
                Markup('<g><title>layers {} and {}: {}</title><rect class="heat" x="{:.1f}" y="{:.1f}" ').format(
                    i, j, figure(value), x + 0.75, y + 0.75
                )
                + Markup('width="{0:.1f}" height="{0:.1f}" rx="2" fill-opacity="{1:.3f}"/>').format(
                    cell - 1.5, 0.05 + 0.95 * strength
                )
            )
            if cell >= 25 and value is not None:
                parts.append(_text(x + cell / 2, y + cell / 2 + 3.6, _short(value), f"on-heat {shade(strength)}"))
            parts.append(Markup("</g>"))
    step = 1 if size <= 16 else 4
    for layer in range(0, size, step):
        parts.append(_text(left + (layer + 0.5) * cell, side + 15, layer, "tick"))
        parts.append(_text(left - 6, (layer + 0.5) * cell + 4, layer, "tick end"))
    parts.append(_text(left + side / 2, side + 31, "layer", "axis"))
    parts.append(_turned(9, side / 2, "layer"))
    scale = side + 42
    for index in range(20):
        parts.append(
            Markup('<rect class="heat" x="{:.1f}" y="{:.1f}" width="6.2" height="8" fill-opacity="{:.3f}"/>').format(
                left + 28 + index * 6, scale, 0.05 + 0.95 * index / 19
            )
        )
    parts.append(_text(left + 22, scale + 8, f"{low:.1f}", "tick end"))
    parts.append(_text(left + 154, scale + 8, "1.0 linear CKA", "tick start"))
    return _svg(max(left + side + 4, 270), scale + 14, label, parts)


def layer_bars(values: Sequence[float | None], axis: str, label: str) -> Markup:
    """One upright bar per layer, from zero; values written where there is room."""
    size, height, left, top = len(values), 92.0, 48.0, 16.0
    step = (WIDTH - left - 6) / max(size, 1)
    known = [value for value in values if value is not None]
    upper = _nice_above(max(known, default=0.0))
    parts = [*_horizontal_grid([0, upper / 2, upper], lambda value: top + height * (1 - value / upper), left, WIDTH - 6)]
    for layer, value in enumerate(values):
        x = left + layer * step
        if value is not None:
            tall = height * min(1.0, max(0.0, value / upper))
            parts.append(
                Markup('<g><title>layer {}: {}</title><rect class="bar" x="{:.1f}" y="{:.1f}" ').format(
                    layer, figure(value), x + step * 0.18, top + height - tall
                )
                + Markup('width="{:.1f}" height="{:.1f}" rx="1.5"/></g>').format(step * 0.64, max(tall, 0.5))
            )
            if step >= 25:
                parts.append(_text(x + step / 2, top + height - tall - 4, _short(value), "tick"))
        if size <= 16 or layer % 4 == 0:
            parts.append(_text(x + step / 2, top + height + 15, layer, "tick"))
    parts.append(_text(left + (WIDTH - left - 6) / 2, top + height + 31, "layer", "axis"))
    parts.append(_turned(9, top + height / 2, axis))
    return _svg(WIDTH, top + height + 36, label, parts)


def damage_scatter(plans: Sequence[Mapping[str, Any]], label: str) -> Markup:
    """Predicted against measured damage on equal logarithmic axes, the line y = x, and the chosen plan marked."""
    pairs = [(plan, number(plan.get("predicted")), number(plan.get("measured"))) for plan in plans]
    points = [(plan, x, y) for plan, x, y in pairs if x is not None and y is not None and x > 0 and y > 0]
    values = [value for _, x, y in points for value in (x, y)]
    low, high = math.log10(min(values)) - 0.12, math.log10(max(values)) + 0.12
    left, top, side = 50.0, 8.0, WIDTH - 60.0

    def at_x(value: float) -> float:
        return left + side * (math.log10(value) - low) / (high - low)

    def at_y(value: float) -> float:
        return top + side - side * (math.log10(value) - low) / (high - low)

    ticks = _log_ticks(low, high)
    parts = [*_horizontal_grid(ticks, at_y, left, left + side), *_vertical_grid(ticks, at_x, top, top + side)]
    parts.append(
        Markup('<line class="guide" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(
            left, top + side, left + side, top
        )
    )
    parts.append(_text(left + side - 5, top + 42, "y = x", "tick end"))
    parts.extend(_points([(plan, at_x(x), at_y(y)) for plan, x, y in points], len(plans)))
    parts.append(_text(left + side / 2, top + side + 32, "predicted damage (nats per example, log scale)", "axis"))
    parts.append(_turned(10, top + side / 2, "measured damage (nats per example, log scale)"))
    return _svg(WIDTH, top + side + 38, label, parts)


def quality_scatter(
    plans: Sequence[Mapping[str, Any]], axis: str, budget: float | None, original: float | None, label: str
) -> Markup:
    """Quality against unique parameters, with the budget and the original's quality as guides where known."""
    pairs = [(plan, number(plan.get("parameters")), number(plan.get("quality"))) for plan in plans]
    points = [(plan, x, y) for plan, x, y in pairs if x is not None and y is not None]
    x_ticks, x_low, x_high = _linear([x for _, x, _ in points] + ([budget] if budget else []))
    y_ticks, y_low, y_high = _linear([y for _, _, y in points] + ([original] if original is not None else []))
    left, top, wide, tall = 50.0, 8.0, WIDTH - 60.0, WIDTH - 60.0

    def at_x(value: float) -> float:
        return left + wide * (value - x_low) / (x_high - x_low)

    def at_y(value: float) -> float:
        return top + tall - tall * (value - y_low) / (y_high - y_low)

    parts = [
        *_horizontal_grid(y_ticks, at_y, left, left + wide),
        *_vertical_grid(x_ticks, at_x, top, top + tall, lambda value: count(value)),
    ]
    if original is not None:
        y = at_y(original)
        parts.append(Markup('<line class="guide" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(left, left + wide, y, y))
        parts.append(_text(left + 5, y + 13, "original", "tick start"))
    if budget:
        x = at_x(budget)
        parts.append(Markup('<line class="guide" x1="{:.1f}" x2="{:.1f}" y1="{}" y2="{}"/>').format(x, x, top, top + tall))
        parts.append(_text(x - 5, top + tall - 6, "budget", "tick end"))
    parts.extend(_points([(plan, at_x(x), at_y(y)) for plan, x, y in points], len(plans)))
    parts.append(_text(left + wide / 2, top + tall + 32, "unique parameters", "axis"))
    parts.append(_turned(10, top + tall / 2, axis))
    return _svg(WIDTH, top + tall + 38, label, parts)


def curve(
    points: Sequence[tuple[float, float]], axis: str, marked: float | None, label: str, among: Sequence[float] = ()
) -> Markup:
    """A line through (step, value) points; the one at the step ``marked`` is set off. The axis holds values ``among`` too."""
    x_ticks, x_low, x_high = _linear([x for x, _ in points])
    y_ticks, y_low, y_high = _linear([*(y for _, y in points), *among])
    left, top, wide, tall = 58.0, 8.0, WIDTH - 68.0, 150.0

    def at_x(value: float) -> float:
        return left + wide * (value - x_low) / (x_high - x_low)

    def at_y(value: float) -> float:
        return top + tall - tall * (value - y_low) / (y_high - y_low)

    parts = [
        *_horizontal_grid([tick for tick in y_ticks if tick >= 0], at_y, left, left + wide),
        *_vertical_grid([tick for tick in x_ticks if tick >= 0], at_x, top, top + tall),
    ]
    line = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in points)
    parts.append(Markup('<polyline class="line" points="{}"/>').format(line))
    for x, y in points:
        chosen = x == marked
        parts.append(
            Markup('<g class="point{}"><title>step {:g}: {}</title>').format(" chosen" if chosen else "", x, figure(y))
        )
        if chosen:
            parts.append(Markup('<path d="M{0:.1f} {1:.1f}l7 7l-7 7l-7 -7z"/>').format(at_x(x), at_y(y) - 7))
        else:
            parts.append(Markup('<circle cx="{:.1f}" cy="{:.1f}" r="3.2"/>').format(at_x(x), at_y(y)))
        parts.append(Markup("</g>"))
    parts.append(_text(left + wide / 2, top + tall + 32, "step", "axis"))
    parts.append(_turned(10, top + tall / 2, axis))
    return _svg(WIDTH, top + tall + 38, label, parts)


def _points(points: Sequence[tuple[Mapping[str, Any], float, float]], plans: int) -> list[Markup]:
    """Circles for plans and a diamond for the chosen one, drawn last so that nothing hides it."""
    parts = []
    for plan, x, y in sorted(points, key=lambda point: bool(point[0].get("chosen"))):
        text = [f"{plan.get('number')}. {plan.get('label') or 'plan without a name'}", f"budget {plan.get('budget') or '?'}"]
        text += [f"{exact(plan.get('parameters'))} parameters", f"predicted {figure(plan.get('predicted'), 'nats')}"]
        text += [f"measured {figure(plan.get('measured'), 'nats')}", f"quality {figure(plan.get('quality'))}"]
        chosen = bool(plan.get("chosen"))
        parts.append(Markup('<g class="point{}"><title>{}</title>').format(" chosen" if chosen else "", ", ".join(text)))
        radius = 8.5 if plans <= _NUMBERED else 4.5
        if chosen:
            reach = radius * 1.45
            parts.append(
                Markup('<path d="M{0:.1f} {1:.1f}l{2:.1f} {2:.1f}l-{2:.1f} {2:.1f}l-{2:.1f} -{2:.1f}z"/>').format(
                    x, y - reach, reach
                )
            )
        else:
            parts.append(Markup('<circle cx="{:.1f}" cy="{:.1f}" r="{}"/>').format(x, y, radius))
        if plans <= _NUMBERED:
            parts.append(_text(x, y + 3.7, plan.get("number"), "in-point"))
        parts.append(Markup("</g>"))
    return parts


def _svg(width: float, height: float, label: str, parts: Sequence[Markup]) -> Markup:
    opening = Markup(
        '<svg role="img" aria-label="{}" viewBox="0 0 {:.0f} {:.0f}" style="min-width:{:.0f}px;max-width:{:.0f}px">'
    ).format(label, width, height, width, width * GROWTH)
    return opening + Markup("").join(parts) + Markup("</svg>")


def _text(x: float, y: float, text: object, kind: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" class="{}">{}</text>').format(x, y, kind, text)


def _turned(x: float, y: float, text: str) -> Markup:
    return Markup('<text class="axis" transform="translate({:.1f} {:.1f}) rotate(-90)">{}</text>').format(x, y, text)


def _horizontal_grid(ticks: Sequence[float], place: Any, left: float, right: float) -> list[Markup]:
    parts = []
    for tick in ticks:
        y = place(tick)
        parts.append(Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(left, right, y, y))
        parts.append(_text(left - 5, y + 3.6, f"{tick:.6g}", "tick end"))
    return parts


def _vertical_grid(ticks: Sequence[float], place: Any, top: float, bottom: float, write: Any = None) -> list[Markup]:
    parts = []
    for tick in ticks:
        x = place(tick)
        parts.append(Markup('<line class="grid" x1="{:.1f}" x2="{:.1f}" y1="{}" y2="{}"/>').format(x, x, top, bottom))
        parts.append(_text(x, bottom + 15, write(tick) if write else f"{tick:.6g}", "tick"))
    return parts


def _log_ticks(low: float, high: float) -> list[float]:
    """Decades, with 2 and 5 between them where the range is short."""
    steps = (1,) if high - low > 2.2 else (1, 2, 5) if high - low > 0.7 else (1, 1.5, 2, 3, 4, 5, 6, 8)
    ticks = [step * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for step in steps]
    return [tick for tick in ticks if low <= math.log10(tick) <= high]


def _linear(values: Sequence[float]) -> tuple[list[float], float, float]:
    """Round ticks, and the ends of an axis that leaves a margin around the values."""
    low, high = min(values), max(values)
    margin = (high - low) * 0.1 or abs(high) * 0.1 or 1.0
    low, high = low - margin, high + margin
    rough = (high - low) / 4
    step = _nice_above(rough)
    first = math.ceil(low / step)
    return [round(index * step, 12) for index in range(first, math.floor(high / step) + 1)], low, high


def _nice_above(value: float) -> float:
    """The least of 1, 2, 2.5, 5 × a power of ten that is not below the value."""
    if value <= 0:
        return 1.0
    base = 10.0 ** math.floor(math.log10(value))
    return next(step * base for step in (1, 2, 2.5, 5, 10) if step * base >= value * 0.9999)


def _short(value: float) -> str:
    """Two decimals without the leading zero, as it fits into a cell: .87, 1.0."""
    text = f"{value:.2f}"
    return "1.0" if text == "1.00" else text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text
