"""Memory and time of a coded model beside its original: weights decoded at load, and integers kept in memory.

Each row runs in a process of its own. "resident" is what the process holds after loading, beyond what it held after its
imports and a pass of a tiny model (after the allocator gave back what is free), with tokenizer and streams; "weights" are the
bytes of parameters and buffers. Times are the median of one pass on one thread.

Run: python benchmarks/memory_bytes.py out/demo    (a folder that `hpr compress --budget 8MB` wrote; Linux)
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import BertConfig, BertModel

import hpr
from common.tables import markdown
from hpr.evaluation.cost import resident_bytes

SHAPES = ((1, 16), (1, 128), (32, 128))  # batch, tokens
WAYS = ("original", "floats", "integers")


def held() -> int:
    """The resident bytes of this process now, without memory that the allocator keeps for later."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def row(way: str, folder: str | None, half: bool, repeats: int) -> dict[str, float | str]:
    """Load one model in one way, and measure it."""
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    tiny = BertModel(BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64)).eval()
    tiny(input_ids=torch.ones(1, 16, dtype=torch.long))  # so that code that every model needs is loaded before
    before = held()
    loaded = hpr.open_model(folder, device="cpu")
    model = loaded.model.half() if half else loaded.model
    if way == "integers":
        hpr.extras.keep_integers(model)
    found: dict[str, float | str] = {"way": way, "weights MB": resident_bytes(model) / 1e6}
    for batch, tokens in SHAPES:
        ids = torch.randint(1000, 2000, (batch, tokens), generator=draw)
        times = []
        with torch.no_grad():
            for _ in range(repeats + 1):
                start = time.perf_counter()
                model(input_ids=ids)
                times.append(time.perf_counter() - start)
        found[f"{batch} × {tokens}, ms"] = 1e3 * statistics.median(times[1:])
        if (batch, tokens) == SHAPES[0]:  # large batches would leave their activations with the allocator
            found["resident MB"] = (held() - before) / 1e6
    return found


def main() -> None:
    """Print one JSON line a row and a table at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a coded model")
    parser.add_argument("--original", help="its original; the packaged MiniLM if left out")
    parser.add_argument("--half", action="store_true", help="in half precision")
    parser.add_argument("--repeats", type=int, default=15, help="timed passes of each shape")
    parser.add_argument("--way", choices=WAYS, help="this row alone, in this process")
    given = parser.parse_args()
    if given.way:
        folder = given.original if given.way == "original" else given.folder
        print(json.dumps(row(given.way, folder, given.half, given.repeats)))
        return
    rows = []
    for way in WAYS:
        command = [sys.executable, *sys.argv, "--way", way]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        rows.append(json.loads(out.splitlines()[-1]))
        print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
    forms = {"way": "", "weights MB": ".1f", "resident MB": ".1f"} | {f"{b} × {t}, ms": ".1f" for b, t in SHAPES}
    print(markdown(rows, forms))


if __name__ == "__main__":
    main()
