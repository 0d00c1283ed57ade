"""The rooms and the one direction of imports between them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import hpr

PACKAGE = Path(hpr.__file__).parent
BELOW = {
    "errors": "",
    "anatomy": "",
    "runtime": "anatomy",
    "plans": "anatomy runtime",
    "reporting": "plans",
    "profiling": "anatomy runtime",
    "solver": "plans",
    "coding": "",
    "nn": "anatomy coding plans runtime",
    "data": "anatomy profiling runtime",
    "operators": "anatomy plans profiling runtime solver",
    "evaluation": "anatomy coding data nn plans profiling runtime",
    "timing": "anatomy evaluation nn plans runtime",
    "layer_reuse": "anatomy evaluation plans profiling runtime",
    "sharing": "anatomy coding layer_reuse nn operators plans profiling runtime",
    "rounding": "anatomy coding evaluation nn operators plans profiling runtime",
    "planning": "anatomy layer_reuse operators plans profiling runtime solver timing",
    "checkpoints": "anatomy coding data nn plans profiling runtime sharing",
    "routing": "anatomy data nn operators planning plans profiling runtime sharing",
    "healing": "anatomy coding data evaluation nn plans profiling rounding runtime sharing",
}
BELOW["export"] = "anatomy checkpoints coding data nn plans runtime sharing"
BELOW["bench"] = "checkpoints data evaluation export nn runtime timing"
BELOW["pipeline"] = " ".join(room for room in BELOW if room != "errors")
BELOW["cli"] = BELOW["pipeline"] + " pipeline"
BELOW["extras"] = BELOW["cli"]


def room_of(path: Path, root: Path) -> str:
    first = path.relative_to(root).parts[0]
    return first.removesuffix(".py")


def imported(tree: ast.AST, rooms: Mapping[str, str]) -> set[str]:
    """The rooms that a file imports from, anywhere in it."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "hpr":
            below = node.module.split(".")[1:]
            names |= {below[0]} if below else {alias.name for alias in node.names if alias.name in rooms}
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("hpr.")}
    return names


def violations(root: Path) -> list[str]:
    """Imports that the table does not allow, and rooms that it does not know."""
    faults = []
    for path in sorted(root.rglob("*.py")):
        room = room_of(path, root)
        if room == "__init__":
            continue
        if room not in BELOW:
            faults.append(f"{path.relative_to(root)}: {room} is no room of the table")
            continue
        allowed = {room, "errors", *BELOW[room].split()}
        wrong = imported(ast.parse(path.read_text(encoding="utf-8")), BELOW) - allowed
        faults += [f"{path.relative_to(root)}: {room} must not import {other}" for other in sorted(wrong)]
    return faults


def test_imports_run_in_one_direction() -> None:
    assert violations(PACKAGE) == []


def test_the_table_has_no_circle() -> None:
    def reached(room: str, seen: frozenset[str]) -> set[str]:
        assert room not in seen, f"{room} imports itself through {', '.join(seen)}"
        return {room}.union(*(reached(other, seen | {room}) for other in BELOW[room].split()))

    for room in BELOW:
        reached(room, frozenset())


def test_only_the_face_and_the_errors_stand_at_the_root() -> None:
    assert sorted(path.name for path in PACKAGE.glob("*.py")) == ["__init__.py", "errors.py"]


@pytest.mark.parametrize(
    "line",
    [
        "from hpr.cli.console import out",
        "import hpr.pipeline.compress",
        "from hpr import planning",
        "def f():\n    from hpr.nn import bank",
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, line: str) -> None:
    (tmp_path / "anatomy").mkdir()
    (tmp_path / "anatomy" / "describe.py").write_text(line + "\n", encoding="utf-8")
    assert len(violations(tmp_path)) == 1


def test_every_room_says_in_one_sentence_what_it_is_for() -> None:
    for room in BELOW.keys() - {"errors"}:
        text = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8")))
        assert text, room


def test_a_model_without_layer_states_never_loads_layer_reuse() -> None:
    script = """
import sys, torch, hpr
from torch import nn
model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)))
profile = hpr.profile(model, [torch.randn(4, 8)], "hidden")
student = hpr.share(model, hpr.plan(model, profile, "80%"), profile)
print([name for name in sys.modules if name.startswith("hpr.layer_reuse")])
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
