"""A picture of divergence against megabytes, both logarithmic: a line for each method, from the rows that bytes.py prints.

python benchmarks/bytes_picture.py rows.jsonl [more.jsonl] docs/bytes.svg [--score "six kinds"]
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from picture import SOFT, text

WIDTH, HEIGHT = 860, 520  # pixels
LEFT, RIGHT, TOP, BOTTOM = 74, 196, 64, 54
GRID, PAPER = "#e4e8ee", "#ffffff"
SERIES = {  # method → colour and dashes; what is not named here is not drawn
    "ours": ("#c2410c", ""),
    "one side": ("#d99a2b", ""),
    "GPTQ, tables too, ANS": ("#1d5fa8", ""),
    "GPTQ": ("#1d5fa8", "5 4"),
    "nearest": ("#7a8694", "5 4"),
    "HQQ": ("#2f8f6b", "5 4"),
    "torchao": ("#8a5fb0", "5 4"),
    "auto-round": ("#c9a400", "5 4"),
    "onnxruntime": ("#b0407a", "5 4"),
    "NNC": ("#111827", ""),
    "static": ("#7c5a3a", "2 4"),
}
TITLES = {
    "ours": "HPR",
    "one side": "HPR, one side",
    "GPTQ, tables too, ANS": "GPTQ, entropy coded",
    "static": "static embeddings",
}
TEXTS = {"six kinds": "text of six kinds", "divergence": "calibration-like text"}
Point = tuple[float, float]  # megabytes, divergence in nats


def points_of(rows: Sequence[Mapping[str, Any]], score: str) -> dict[str, list[Point]]:
    """Method → its points from small to large, for the methods that are drawn."""
    found: dict[str, list[Point]] = {name: [] for name in SERIES}
    for row in rows:
        if row.get("method") in found and row.get(score, 0) > 0:
            found[row["method"]].append((row["megabytes"], row[score]))
    return {name: sorted(points) for name, points in found.items() if points}


def picture(rows: Sequence[Mapping[str, Any]], score: str, title: str) -> str:
    """The rows as a standalone SVG, readable on light and dark pages."""
    lines = points_of(rows, score)
    points = [point for line in lines.values() for point in line]
    sizes, nats = ([point[axis] for point in points] for axis in (0, 1))
    low, high = math.log(min(sizes) * 0.92), math.log(max(sizes) * 1.05)
    least, most = math.floor(math.log10(min(nats))), math.ceil(math.log10(max(nats)))
    across, down = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(megabytes: float) -> float:
        return LEFT + across * (math.log(megabytes) - low) / (high - low)

    def y(nats: float) -> float:
        return TOP + down * (most - math.log10(nats)) / (most - least)

    parts = [
        text(20, 28, title, 14, weight="600"),
        text(20, 48, f"nats per example on held-out {TEXTS.get(score, score)}", 11, colour=SOFT),
    ]
    for megabytes in (0.1, 0.2, 0.5, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48):
        if low <= math.log(megabytes) <= high:
            parts += [_line(x(megabytes), TOP, x(megabytes), TOP + down)]
            parts += [text(x(megabytes), TOP + down + 18, f"{megabytes:g}", 11, "middle", SOFT)]
    for power in range(least, most + 1):
        parts += [_line(LEFT, y(10.0**power), LEFT + across, y(10.0**power))]
        parts += [text(LEFT - 8, y(10.0**power) + 4, f"{10.0**power:.{max(0, -power)}f}", 11, "end", SOFT)]
    parts.append(text(LEFT + across / 2, HEIGHT - 14, "megabytes on disk", 12, "middle", SOFT))
    for name in reversed(lines):  # ours is drawn last, on top
        parts += _series(name, [(x(size), y(value)) for size, value in lines[name]])
    for place, name in enumerate(lines):
        colour, dashes = SERIES[name]
        height = TOP + 14 + 22 * place
        left = LEFT + across + 18
        parts += [_stroke(f"M{left},{height}h26", colour, dashes, name == "ours"), _dot(left + 13, height, colour)]
        parts.append(text(left + 34, height + 4, TITLES.get(name, name), 12, weight="600" if name == "ours" else "400"))
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    font = 'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif"'
    frame = f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="{PAPER}"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font} role="img">\n' + "\n".join([frame, *parts]) + "\n</svg>\n"


def _series(name: str, places: Sequence[Point]) -> list[str]:
    colour, dashes = SERIES[name]
    path = "M" + "L".join(f"{left:.1f},{top:.1f}" for left, top in places)
    return [_stroke(path, colour, dashes, name == "ours"), *(_dot(left, top, colour) for left, top in places)]


def _stroke(path: str, colour: str, dashes: str, thick: bool) -> str:
    style = f'stroke="{colour}" stroke-width="{3 if thick else 1.6:g}" fill="none" stroke-linejoin="round"'
    return f'<path d="{path}" {style}' + (f' stroke-dasharray="{dashes}"' if dashes else "") + "/>"


def _dot(left: float, top: float, colour: str) -> str:
    return f'<circle cx="{left:.1f}" cy="{top:.1f}" r="3.4" fill="{colour}" stroke="{PAPER}"/>'


def _line(left: float, top: float, right: float, bottom: float) -> str:
    return f'<path d="M{left:.1f},{top:.1f}L{right:.1f},{bottom:.1f}" stroke="{GRID}" fill="none"/>'


def main() -> None:
    """Read rows and write an SVG."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="+", help="what bytes.py printed, in one file or in several")
    parser.add_argument("output", type=Path)
    parser.add_argument("--score", default="six kinds")
    parser.add_argument("--title", default="all-MiniLM-L6-v2 without training: divergence from the original by size")
    given = parser.parse_args()
    lines = [line for path in given.rows for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("{")]
    given.output.write_text(picture([json.loads(line) for line in lines], given.score, given.title), encoding="utf-8")


if __name__ == "__main__":
    main()
