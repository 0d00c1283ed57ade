"""Formats the values of a report, a card or a table; a missing value becomes "not recorded"."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from hpr.plans.json_values import dig, number

ABSENT = "not recorded"
_NBSP = "\u00a0"


def table(data: Any, *keys: str) -> Mapping[str, Any]:
    """The mapping at ``keys``, empty if there is none."""
    value = dig(data, *keys)
    return value if isinstance(value, Mapping) else {}


def records(data: Any, *keys: str) -> list[Mapping[str, Any]]:
    """The list of mappings at ``keys``, empty if there is none."""
    value = dig(data, *keys)
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list | tuple) else []


def numbers(values: Any) -> list[float | None]:
    """Each item as ``number`` reads it; empty if ``values`` is no list."""
    return [number(value) for value in values] if isinstance(values, list | tuple) else []


def present(value: Any) -> str:
    """The text, or "not recorded" for a missing value."""
    return ABSENT if value is None or value == "" else str(value)


def exact(value: Any) -> str:
    """All digits: ``22,713,216``."""
    amount = number(value)
    return ABSENT if amount is None else f"{amount:,.0f}"


def count(value: Any, unit: str = "") -> str:
    """Three significant digits with a decimal prefix: ``22.7 M``, ``90.9 MB``."""
    amount = number(value)
    if amount is None:
        return ABSENT
    for limit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(amount) >= limit * 0.9995:
            return f"{_digits(amount / limit)}{_NBSP}{prefix}{unit}"
    small = f"{amount:.0f}" if amount == round(amount) else _digits(amount)
    return f"{small}{_NBSP}{unit}" if unit else small


def byte_count(value: Any) -> str:
    """``90.9 MB``, in decimal megabytes."""
    return count(value, "B")


def flop_count(value: Any) -> str:
    """``21.3 MFLOP``."""
    return count(value, "FLOP")


def milliseconds(value: Any) -> str:
    """``10.7 ms``."""
    amount = number(value)
    return ABSENT if amount is None else f"{_digits(amount)}{_NBSP}ms"


def seconds(value: Any) -> str:
    """``0.42 s``, ``38 s``, ``2 min 05 s``."""
    amount = number(value)
    if amount is None:
        return ABSENT
    if round(amount) < 60:
        return f"{_digits(amount)}{_NBSP}s"
    minutes, rest = divmod(round(amount), 60)
    if minutes < 60:
        return f"{minutes}{_NBSP}min {rest:02d}{_NBSP}s"
    return f"{minutes // 60}{_NBSP}h {minutes % 60:02d}{_NBSP}min"


def figure(value: Any, unit: str = "") -> str:
    """Three significant digits with a unit: ``0.0123 nats``, ``92.5 %``."""
    amount = number(value)
    if amount is None:
        return ABSENT
    return f"{_digits(amount)}{_NBSP}{unit}" if unit else _digits(amount)


def percent(part: Any, whole: Any) -> str:
    """Part of a whole in per cent: ``50.2 %``."""
    above, below = number(part), number(whole)
    return ABSENT if above is None or not below else f"{100 * above / below:.1f}{_NBSP}%"


def moment(value: Any) -> str:
    """An ISO time for people: ``2025-03-04 10:12 UTC``; other text as it is."""
    match = re.match(r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d)(?::[\d.]+)?(.*)", str(value))
    if match is None:
        return present(value)
    zone = "UTC" if match[3] in ("Z", "+00:00") else match[3]
    return f"{match[1]} {match[2]} {zone}".rstrip()


def verdict(row: Mapping[str, Any]) -> str:
    """The change of a quality row in words, and whether it is better or worse."""
    before, after, higher = number(row.get("before")), number(row.get("after")), row.get("higher_is_better")
    direction = "" if higher is None else ("higher is better" if higher else "lower is better")
    if after is None:
        return "not measured"
    if before is None:
        return f"measured against the original, so it has no value before{'; ' + direction if direction else ''}"
    change = after - before
    if abs(change) < 1e-12:
        return "unchanged"
    unit = str(row.get("unit") or "")
    change_text = f"{abs(change):.2g}{_NBSP}points" if unit == "%" else figure(abs(change), unit)
    relative = f" ({100 * abs(change) / abs(before):.1f}{_NBSP}%)" if before and unit != "%" else ""
    moved = f"{'up' if change > 0 else 'down'} by {change_text}{relative}"
    return moved if higher is None else f"{moved}, {'better' if (change > 0) == bool(higher) else 'worse'} than the original"


SIZES: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("parameters", "unique parameters, embeddings included", count),
    ("bytes", "bytes on disk", byte_count),
    ("resident_bytes", "weights in memory", byte_count),
    ("integer_bytes", "weights in memory, kept as integers", byte_count),
    ("flops_per_token", "floating-point operations per token", flop_count),
    ("latency_ms", "latency of one forward pass", milliseconds),
    ("peak_memory_bytes", "peak memory", byte_count),
)


_SPEEDS = {"latency": "time of a call, as a copy for inference", "flops": "operations of a call"}


def speed_lines(speed: Mapping[str, Any]) -> list[str]:
    """The share of time or operations that a dial asked for, predicted and measured; nothing without a dial.

    ``speed``: what metrics.json has under that name, or the diagnostics of a plan.
    """
    return [f"{label}, at {_speed(table(speed, kind))}" for kind, label in _SPEEDS.items() if kind in speed]


def _speed(values: Mapping[str, Any]) -> str:
    shares = [(number(values.get(key)), key) for key in ("predicted", "measured")]
    said = ", ".join(f"{share:.2f}x the original {key}" for share, key in shares if share is not None)
    return f"{present(values.get('shape'))}: {said or ABSENT}; {present(values.get('text'))} was asked for"


def size_rows(plan: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Before, after, and per cent kept of each size, in the order of ``SIZES``."""
    rows = []
    for key, label, write in SIZES:
        before, after = number(dig(metrics, "sizes", "before", key)), number(dig(metrics, "sizes", "after", key))
        if key == "parameters" and before is None:
            before = number(dig(plan, "model", "dense_parameters"))
        times = f"{before / after:.2f}×" if before and after else ABSENT
        words = {"before": write(before), "after": write(after), "kept": percent(after, before), "times": times}
        if key == "integer_bytes" and after is None:  # the weights of most models are no integers
            continue
        known, smaller = before is not None or after is not None, bool(before and after and before > after)
        rows.append({"key": key, "label": label, "known": known, "smaller": smaller, **words})
    return rows


def _digits(value: float) -> str:
    """Three significant digits, without an exponent in the usual range."""
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 1e6 or size < 1e-4:
        return f"{value:.2e}"
    decimals = max(0, 2 - math.floor(math.log10(float(f"{size:.2e}"))))
    return f"{value:,.{decimals}f}"
