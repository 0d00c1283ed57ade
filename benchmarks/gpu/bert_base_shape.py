"""What a GPU changes, on a BERT-base-shaped model with random weights: profile time, peak memory, forward latency.

Quality is not the subject (the weights are random). Prints one JSON object a line; needs CUDA.
Run: python benchmarks/gpu/bert_base_shape.py
"""

from __future__ import annotations

import json
import time

import torch
from torch import nn
from transformers import BertConfig, BertModel

import hpr
from hpr.evaluation.latency import latency
from hpr.planning import planner
from hpr.planning.options import PlanOptions


def batches(count: int, device: str) -> list[dict[str, torch.Tensor]]:
    """Random token ids, 32 × 128 a batch."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(1000, 30000, (32, 128), generator=generator) for _ in range(count)]
    return [{"input_ids": one.to(device), "attention_mask": torch.ones_like(one).to(device)} for one in ids]


def step(model: nn.Module, given: list[dict[str, torch.Tensor]]) -> float:
    """Seconds of one forward and backward pass over the batches."""
    start = time.perf_counter()
    for batch in given:
        model(**batch).last_hidden_state.square().sum().backward()
    model.zero_grad()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Profile, plan, share and time."""
    torch.manual_seed(0)
    model = BertModel(BertConfig()).eval().cuda()
    given = batches(16, "cuda")
    step(model, given)
    passes = step(model, given)
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    profile = hpr.profile(model, given, "embedding")
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated()
    print(
        json.dumps({"forward and backward": passes, "profile": seconds, "ratio": seconds / passes, "peak bytes": peak}),
        flush=True,
    )
    start = time.perf_counter()
    draft = planner.draft(model, profile, PlanOptions(operators=["low rank", "segments"]))
    plan = draft.best(draft.budget("50%"))
    student = hpr.share(model, plan, profile)
    print(json.dumps({"plan and fits": time.perf_counter() - start, "parameters": plan.parameters(draft.anatomy)}), flush=True)
    for dtype in (torch.float32, torch.bfloat16):
        for size in (1, 8, 32):
            batch = {name: tensor[:size] for name, tensor in given[0].items()}
            with torch.no_grad():
                found = latency(student.to(dtype), model.to(dtype), batch, 15)
            row = {"dtype": str(dtype), "batch": size, "dense ms": found.teacher_ms, "shared ms": found.student_ms}
            print(json.dumps(row | {"ratio": found.student_ms / found.teacher_ms}), flush=True)


if __name__ == "__main__":
    main()
