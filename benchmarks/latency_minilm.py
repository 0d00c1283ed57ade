"""Time of one forward pass of a compressed MiniLM and of its original, taking turns on one thread, eager.

OMP_NUM_THREADS=1 python benchmarks/latency_minilm.py out/half
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import nn

from common.tables import say
from hpr.checkpoints.open import open_model

SHAPES = ((1, 16, 60), (1, 128, 30), (32, 128, 4))  # examples, tokens, passes of each model


def milliseconds(model: nn.Module, batch: dict[str, torch.Tensor]) -> float:
    start = time.perf_counter()
    model(**batch)
    return 1000 * (time.perf_counter() - start)


@torch.inference_mode()
def main() -> None:
    """Print one JSON line for each shape: medians in milliseconds and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what hpr compress wrote")
    options = parser.parse_args()
    torch.set_num_threads(1)
    original, student = (open_model(name, "cpu").model.eval() for name in (None, options.folder))
    for examples, tokens, passes in SHAPES:
        ids = torch.randint(1000, 20000, (examples, tokens), generator=torch.Generator().manual_seed(0))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        times = [(milliseconds(original, batch), milliseconds(student, batch)) for _ in range(passes + 1)][1:]  # one to warm up
        before, after = (statistics.median(column) for column in zip(*times, strict=True))
        say(examples=examples, tokens=tokens, original_ms=round(before, 1), compressed_ms=round(after, 1), ratio=after / before)


if __name__ == "__main__":
    main()
