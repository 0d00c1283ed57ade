"""How often ``hpr compress`` calls its expensive parts: describe, measure, solve, and the fit of a group of weights.

Runs the command in this process; all arguments are those of ``hpr compress``. Prints one JSON line: counts, seconds in each
(calls inside calls of the same function count twice), wall time, and the time by step from metrics.json:
python benchmarks/calls.py --output out/half [options of hpr compress]
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any

import hpr
from common.tables import say
from hpr.operators.registry import OPERATORS

WATCHED = {
    "describe": ("hpr.anatomy.describe", "describe"),
    "measured sites": ("hpr.operators.metric", "metric_of"),
    "solve": ("hpr.solver.lagrangian", "search"),
}
FITS = "group fits"
DEFAULT_OUTPUT = "out/compressed"


@dataclass
class Calls:
    """Calls and seconds by label."""

    counts: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)

    def watch(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with each of its calls counted under ``label``."""

        @wraps(function)
        def counted(*arguments: Any, **named: Any) -> Any:
            self.counts[label] += 1
            start = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds[label] += time.perf_counter() - start

        return counted


@contextmanager
def counting() -> Iterator[Calls]:
    """Count the calls made inside the ``with`` block, from every module of the package that holds one of the functions."""
    for module in pkgutil.walk_packages(hpr.__path__, "hpr."):
        importlib.import_module(module.name)
    modules = [module for name, module in list(sys.modules.items()) if name == "hpr" or name.startswith("hpr.")]
    calls, replaced, operators = Calls(), [], dict(OPERATORS)
    for label, (home, attribute) in WATCHED.items():
        function = getattr(sys.modules[home], attribute)
        counted = calls.watch(label, function)
        for module in modules:
            for name in [name for name, value in vars(module).items() if value is function]:
                setattr(module, name, counted)
                replaced.append((module, name, function))
    for name, operator in operators.items():
        OPERATORS[name] = replace(operator, fit=calls.watch(FITS, operator.fit))
    try:
        yield calls
    finally:
        OPERATORS.update(operators)
        for module, name, function in replaced:
            setattr(module, name, function)


def output_of(arguments: Sequence[str]) -> Path:
    """The folder that ``hpr compress`` writes with these arguments."""
    for flag, value in pairwise(arguments):
        if flag in ("-o", "--output"):
            return Path(value)
    given = [argument.split("=", 1)[1] for argument in arguments if argument.startswith("--output=")]
    return Path(given[-1] if given else DEFAULT_OUTPUT)


def main() -> None:
    from hpr.cli import app

    arguments = sys.argv[1:]
    if not arguments or "--help" in arguments:
        print(__doc__)
        return
    start, status = time.perf_counter(), 0
    with counting() as calls:
        try:
            app(["compress", *arguments])
        except SystemExit as end:
            status = int(end.code or 0)
    wall = time.perf_counter() - start
    if status:
        raise SystemExit(status)
    metrics = json.loads((output_of(arguments) / "metrics.json").read_text(encoding="utf-8"))
    seconds = {label: round(spent, 2) for label, spent in calls.seconds.items()}
    say(counts=dict(calls.counts), seconds=seconds, wall=round(wall, 1), timing=metrics.get("timing"))


if __name__ == "__main__":
    main()
