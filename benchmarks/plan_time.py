"""Seconds that a budget in bytes takes after the profile: to plan, with dampings and products chosen, and to write the file.

MiniLM is profiled on 4,096 docstrings and chooses on others. BERT-base's shape has random weights, and is profiled on 16
sequences of random ids; it chooses on 8 others. Threads are those of ``OMP_NUM_THREADS``. Other work on the machine makes two
threads slower than one.

Run: python benchmarks/plan_time.py minilm --megabytes 8 5.6 [--profile FILE]
     python benchmarks/plan_time.py bert-base --megabytes 30
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from transformers import BertConfig, BertModel

import hpr
from common.byte_ground import minilm
from common.tables import markdown, say
from hpr.evaluation.divergence import divergence
from hpr.profiling.objectives import OBJECTIVES
from hpr.profiling.profile import Profile
from hpr.rounding.plan import plan_bytes

Measure = Callable[[nn.Module], float]


def shape() -> tuple[nn.Module, Profile, Measure]:
    """BERT-base's shape, its profile, and what chooses."""
    torch.manual_seed(0)
    model, goal = BertModel(BertConfig()).eval(), OBJECTIVES["embedding"]
    batches = [{"input_ids": torch.randint(1000, 30000, (4, 64))} for _ in range(6)]
    profile = hpr.profile(model, batches[:4], "embedding", structure=False)
    return model, profile, lambda student: divergence(student, model, batches[4:], goal).mean


def main() -> None:
    """Print one JSON line a row and a table at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("minilm", "bert-base"))
    parser.add_argument("--megabytes", type=float, nargs="+", required=True)
    parser.add_argument("--profile", type=Path, help="a file that keeps MiniLM's profile from run to run")
    given = parser.parse_args()
    logging.getLogger("hpr").setLevel(logging.ERROR)
    if given.model == "minilm":
        on = minilm(profile=given.profile, task=False)
        model, profile, measure = on.model, on.profile, on.measure
    else:
        model, profile, measure = shape()
    rows = []
    for megabytes, choose in ((megabytes, choose) for megabytes in given.megabytes for choose in (False, True)):
        start, processor = time.perf_counter(), time.process_time()
        made = plan_bytes(model, profile, f"{megabytes}MB", int(megabytes * 1e6), measure if choose else None)
        planned = time.perf_counter()
        with TemporaryDirectory() as folder:
            hpr.save(made.student, Path(folder) / "model")
        written = time.perf_counter()
        times = {"plan": planned - start, "write": written - planned, "processor": time.process_time() - processor}
        facts = {"threads": torch.get_num_threads(), "dampings tried": len(made.tried)}
        facts["products"] = sum(bool(entry.terms) for entry in made.plan.entries.values())
        rows.append(say(model=given.model, megabytes=made.bytes / 1e6, **facts, **times))
    forms = {"model": "", "megabytes": ".2f", "threads": "", "dampings tried": "", "products": ""}
    print(markdown(rows, forms | {"plan": ".0f", "write": ".1f", "processor": ".0f"}))


if __name__ == "__main__":
    main()
