"""One MiniLM student served from many threads against the same calls one after another: equal bit for bit, with padding.

A static student and one whose weights follow the input, both called as they are and through SentenceTransformer. Every thread
makes all calls, each in an order of its own. A call has the same texts in both, since the padding of a batch changes the last
bits of its results.

OMP_NUM_THREADS=1 python benchmarks/threads.py
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

import hpr
from common.tables import say
from hpr.data.batches import text_batches
from hpr.data.docstrings import docstrings
from hpr.routing.plan import routed

PROFILED = 512  # texts
LONGEST = 48  # tokens of a text
Call = Callable[[list[str]], Tensor]


def students(folder: Path) -> dict[str, Path]:
    """Folders of a static and of a routed student of MiniLM at half of its parameters; the routers are drawn, not trained."""
    loaded = hpr.open_model(None, "cpu")
    profile = hpr.profile(loaded.model, text_batches(docstrings("calibration")[:PROFILED], loaded.tokenizer))
    plan = hpr.plan(loaded.model, profile, "50%")
    with_routers = routed(plan, loaded.model)
    room = replace(with_routers.budget, parameters=10**9)  # routers come on top
    plans = {"static": plan, "routed": replace(with_routers, budget=room)}
    draw = torch.Generator().manual_seed(0)
    for name, one in plans.items():
        student = hpr.share(loaded.model, one, profile)
        for path, parameter in student.named_parameters():
            if "ROUTER" in path:
                parameter.data.copy_(torch.randn(parameter.shape, generator=draw))
        hpr.save(student, folder / name, loaded.tokenizer, source=loaded.folder)
    return {name: folder / name for name in plans}


def calls_of(path: Path) -> dict[str, Call]:
    """How a student is called: as the model that it is, and by SentenceTransformer."""
    loaded = hpr.open_model(path, "cpu")
    model: nn.Module = loaded.model.eval()
    encoder = SentenceTransformer(str(path), device="cpu")

    @torch.inference_mode()
    def bare(texts: list[str]) -> Tensor:
        batch = loaded.tokenizer(texts, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
        return model(**batch).last_hidden_state

    return {"model": bare, "SentenceTransformer": lambda texts: encoder.encode(texts, convert_to_tensor=True)}


def differing(call: Call, given: Sequence[list[str]], threads: int) -> int:
    """How many calls of all threads give other bits than the same calls one after another."""
    expected = [call(texts) for texts in given]

    def work(thread: int) -> int:
        order = random.Random(thread).sample(range(len(given)), len(given))
        return sum(not torch.equal(call(given[place]), expected[place]) for place in order)

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(work, range(threads)))


def main() -> None:
    """Print one JSON line for each student and way to call it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--calls", type=int, default=200, help="calls of each thread")
    options = parser.parse_args()
    torch.set_num_threads(1)
    texts, draw = docstrings("heldout"), random.Random(0)
    given = [draw.sample(texts, draw.randint(1, 4)) for _ in range(options.calls)]
    with tempfile.TemporaryDirectory() as folder:
        for name, path in students(Path(folder)).items():
            for way, call in calls_of(path).items():
                differ = differing(call, given, options.threads)
                say(student=name, called=way, threads=options.threads, calls=options.threads * len(given), differ=differ)


if __name__ == "__main__":
    main()
