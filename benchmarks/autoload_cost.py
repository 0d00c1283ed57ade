"""Milliseconds that hpr's entry point adds to ``import torch``: alone, and as a difference of whole imports that take turns.

Each import runs in a Python of its own. Half of them find a dist-info with the entry point of this source, half do not. An hpr
that is installed with its entry point is hidden from neither: run this where none is, or read the first row alone.

Run: python benchmarks/autoload_cost.py [--rounds 15]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
ALONE = """
import os, sys, time
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
import torch
start = time.perf_counter()
from hpr_autoload import watch
watch()
taken = time.perf_counter() - start
finder = sys.meta_path[0]
start = time.perf_counter()
for _ in range(10000):
    finder.find_spec("another.module", None)
print(1e3 * taken, 100 * (time.perf_counter() - start))
"""
WHOLE = """
import time
start, spent = time.perf_counter(), time.process_time()
import torch
print(1e3 * (time.perf_counter() - start), 1e3 * (time.process_time() - spent))
"""


def seconds(code: str, path: list[Path]) -> list[float]:
    """The numbers that a new Python prints."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return [float(word) for word in done.stdout.split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = range(parser.parse_args().rounds)
    points = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]["torch.backends"]
    with tempfile.TemporaryDirectory() as folder:
        info = Path(folder) / "hpr_entry-0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hpr-entry\nVersion: 0\n", encoding="utf-8")
        lines = [f"{name} = {value}" for name, value in points.items()]
        (info / "entry_points.txt").write_text("\n".join(["[torch.backends]", *lines]), encoding="utf-8")
        source = [ROOT / "src"]
        rows = [(seconds(ALONE, source), seconds(WHOLE, source), seconds(WHOLE, [*source, Path(folder)])) for _ in rounds]
    alone, find = zip(*(row[0] for row in rows), strict=True)
    median = statistics.median
    print(json.dumps({"entry point, ms": round(median(alone), 3), "1,000 later imports, ms": round(median(find), 3)}))
    for number, name in enumerate(("wall", "processor")):
        without, having = ([row[place][number] for row in rows] for place in (1, 2))
        differences = [after - before for before, after in zip(without, having, strict=True)]
        print(
            json.dumps(
                {
                    "import torch": name,
                    "without, ms": round(median(without), 1),
                    "with, ms": round(median(having), 1),
                    "median of differences, ms": round(median(differences), 2),
                    "their quartiles": [round(value, 1) for value in statistics.quantiles(differences, n=4)],
                }
            )
        )
    print(json.dumps({"load": [round(value, 1) for value in os.getloadavg()]}))


if __name__ == "__main__":
    main()
