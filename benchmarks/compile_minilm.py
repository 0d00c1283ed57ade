"""torch.compile of a compressed MiniLM and of its materialised copy: one graph, and its cost beside the original's.

Every compilation is a process of its own without caches on disk, and the models take turns. Needs a C++ compiler.

OMP_NUM_THREADS=1 python benchmarks/compile_minilm.py out/half
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import hpr
from common.tables import say

SHAPE = (1, 128)  # examples, tokens
PASSES = 30
WAYS = ("original", "compressed", "materialised")


def measure(way: str, folder: Path) -> None:
    """Compile one model as a whole, and print the processor's seconds, the time of a pass, and the difference to eager."""
    torch.set_num_threads(1)
    model = hpr.open_model(None if way == "original" else folder, "cpu").model.eval()
    if way == "materialised":
        model = hpr.materialise(model, SHAPE[0] * SHAPE[1])
    ids = torch.randint(1000, 20000, SHAPE, generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.inference_mode():
        expected = model(**batch).last_hidden_state
        compiled = torch.compile(model, fullgraph=True)
        start = sum(os.times()[:4])  # of the compiler, too: the clock says little on a busy machine
        found = compiled(**batch).last_hidden_state
        seconds, times = sum(os.times()[:4]) - start, []
        for _ in range(PASSES):
            start = time.perf_counter()
            compiled(**batch)
            times.append(1000 * (time.perf_counter() - start))
    say(way=way, seconds=seconds, milliseconds=statistics.median(times), differs=float((found - expected).abs().max()))


def main() -> None:
    """Print one JSON line for each compilation, and the medians of their ratios to the original's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what hpr compress wrote")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help="this one alone, in this process")
    options = parser.parse_args()
    if options.way:
        measure(options.way, options.folder)
        return
    settings = os.environ | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    rows: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(options.rounds):
        for way in WAYS:
            command = [sys.executable, __file__, str(options.folder), "--way", way]
            done = subprocess.run(command, capture_output=True, text=True, env=settings, check=False)
            if done.returncode:
                raise SystemExit(f"{way} does not compile as one graph:\n{done.stderr[-3000:]}")
            print(line := done.stdout.splitlines()[-1], flush=True)
            rows[way].append(json.loads(line))
    for way in WAYS[1:]:
        pairs = list(zip(rows[way], rows["original"], strict=True))
        ratios = {
            name: statistics.median(one[name] / other[name] for one, other in pairs) for name in ("seconds", "milliseconds")
        }
        say(way=way, **{f"{name}_ratio": round(ratio, 2) for name, ratio in ratios.items()}, load=os.getloadavg()[0])


if __name__ == "__main__":
    main()
