"""What the scripts print: one JSON object a line as results come in, and a Markdown table of some of them at the end."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from hpr.plans.plan import Plan


def say(**row: Any) -> dict[str, Any]:
    """Print one JSON line, and give the row back."""
    print(json.dumps(row, ensure_ascii=False), flush=True)
    return row


def markdown(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """A table of rows: ``columns`` are keys with format specifications (``{"bits": ".3f"}``); what a row lacks stays empty."""
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = ["" if row.get(key) is None else format(row[key], form) for key, form in columns.items()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def count(plan: Plan) -> dict[str, int]:
    """How many sites each operator got."""
    return dict(sorted(Counter(entry.operator for entry in plan.entries.values()).items()))
