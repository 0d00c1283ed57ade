"""Time of one pass of a compressed MiniLM, of its materialised copy and of the original, taking turns on one thread, eager.

OMP_NUM_THREADS=1 python benchmarks/latency_minilm.py out/half
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import nn

import hpr
from common.tables import say
from hpr.checkpoints.open import open_model
from hpr.evaluation.cost import resident_bytes

SHAPES = ((1, 16, 60), (1, 128, 30), (32, 128, 4))  # examples, tokens, passes of each model


def milliseconds(model: nn.Module, batch: dict[str, torch.Tensor]) -> float:
    start = time.perf_counter()
    model(**batch)
    return 1000 * (time.perf_counter() - start)


@torch.inference_mode()
def main() -> None:
    """Print one JSON line for each shape: medians in milliseconds, and their ratios to the original's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what hpr compress wrote")
    options = parser.parse_args()
    torch.set_num_threads(1)
    original, student = (open_model(name, "cpu").model.eval() for name in (None, options.folder))
    dense = resident_bytes(original)
    for examples, tokens, passes in SHAPES:
        ids = torch.randint(1000, 20000, (examples, tokens), generator=torch.Generator().manual_seed(0))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        models = {"original": original, "compressed": student, "materialised": hpr.materialise(student, examples * tokens)}
        times = [[milliseconds(model, batch) for model in models.values()] for _ in range(passes + 1)][1:]  # one to warm up
        medians = dict(zip(models, (statistics.median(column) for column in zip(*times, strict=True)), strict=True))
        say(
            examples=examples,
            tokens=tokens,
            **{f"{name}_ms": round(median, 1) for name, median in medians.items()},
            **{f"{name}_ratio": round(medians[name] / medians["original"], 3) for name in ("compressed", "materialised")},
            **{f"{name}_bytes_kept": round(resident_bytes(models[name]) / dense, 3) for name in ("compressed", "materialised")},
        )


if __name__ == "__main__":
    main()
