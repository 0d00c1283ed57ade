"""A picture of a plan for the README: one row per weight, one column per layer, colour by what becomes of it.

python benchmarks/picture.py out/half/plan.json docs/plan-map.svg
"""

from __future__ import annotations

import argparse
import json
from html import escape
from pathlib import Path
from typing import Any

from hpr.plans.table import Cell, read_plan

CELL, HEIGHT, LABEL, TOP, GAP = 84, 26, 170, 60, 3  # pixels
KEEP, PRIVATE, GONE = "#d9dde3", "#bcd7f0", "#ffffff"
SHARED = ("#f2a65a", "#7fb685", "#c58bc4", "#e27d7d", "#5fa8a0", "#d8c04f", "#9a8fd0")
INK, SOFT = "#1f2933", "#5b6774"


def fill_of(cell: Cell) -> str:
    """The colour of a cell: grey if kept, blue if compressed alone, and a colour for each group that shares a factor."""
    if cell.kind == "keep":
        return KEEP
    if cell.kind == "gone":
        return GONE
    return SHARED[cell.groups[0].hue % len(SHARED)] if cell.groups else PRIVATE


def text(x: float, y: float, words: str, size: int = 12, anchor: str = "start", colour: str = INK, weight: str = "400") -> str:
    style = f'font-size="{size}" text-anchor="{anchor}" fill="{colour}" font-weight="{weight}"'
    return f'<text x="{x:g}" y="{y:g}" {style}>{escape(words)}</text>'


def box(x: float, y: float, width: float, fill: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{HEIGHT - GAP}" rx="3" fill="{fill}"/>'


def picture(plan: dict[str, Any]) -> str:
    """The plan as a standalone SVG, readable on light and dark pages."""
    table = read_plan(plan)
    layers = max(stack.layers for stack in table.stacks)
    width, y, parts = LABEL + layers * CELL + 20, TOP, []
    for stack in table.stacks:
        parts += [
            text(LABEL + (layer + 0.5) * CELL, y - 6, f"layer {layer}", 11, "middle", SOFT) for layer in range(stack.layers)
        ]
        for row in stack.rows:
            parts.append(text(LABEL - 10, y + 16, row.slot, 12, "end"))
            for layer, cell in enumerate(row.cells):
                if cell is None:
                    continue
                x = LABEL + layer * CELL
                stretch = GAP if cell.joins_right else 0  # neighbours that share a factor touch
                parts += [
                    box(x, y, CELL - GAP + stretch, fill_of(cell)),
                    text(x + CELL / 2 - 1, y + 16, cell.word, 11, "middle"),
                ]
            y += HEIGHT
        y += 30
    y -= 14
    for cell in table.outside:
        lanes = [segment for lane in cell.lanes for segment in lane]
        rows = max((segment.stop for segment in lanes), default=1)
        span = layers * CELL - GAP
        parts.append(text(LABEL - 10, y + 16, cell.site.removeprefix("embeddings."), 12, "end"))
        if not lanes:
            parts += [box(LABEL, y, span, fill_of(cell)), text(LABEL + span / 2, y + 16, cell.word, 11, "middle")]
        for segment in lanes:
            start, length = LABEL + span * segment.start / rows, span * segment.rows / rows
            parts.append(box(start, y, max(1.0, length - 1), fill_of(cell)))
            if length > 26:
                parts.append(text(start + length / 2, y + 16, segment.text, 11, "middle"))
        y += HEIGHT
    y += 16
    x = float(LABEL)
    for colour, words in ((KEEP, "kept"), (PRIVATE, "low rank, private"), (SHARED[0], "shares a factor with its neighbours")):
        parts += [f'<rect x="{x:g}" y="{y:g}" width="14" height="14" rx="3" fill="{colour}"/>', text(x + 20, y + 12, words, 11)]
        x += 40 + 6.2 * len(words)
    budget = plan["budget"]["text"]
    title = f"One plan: {plan['model']['class']} at {budget} of its parameters. Numbers are ranks."
    head = text(20, 28, title, 14, weight="600")
    frame = f'<rect width="{width}" height="{y + 34:g}" rx="10" fill="#ffffff"/>'
    size = f'width="{width}" height="{y + 34:g}" viewBox="0 0 {width} {y + 34:g}"'
    font = 'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font} role="img">\n' + "\n".join([frame, head, *parts]) + "\n</svg>\n"
    )


def main() -> None:
    """Read a plan.json and write an SVG."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    options.output.write_text(picture(json.loads(options.plan.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
