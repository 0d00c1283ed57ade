"""Story writers and spelling to phonemes at a number of bytes, no training: coded rounding beside the peers of ``bytes.py``.

BabyLlama (characters, 0.94 M), stories260k (512 tokens, 0.26 M) and tinystories-656k (2,048 tokens, 0.66 M) in bits per
character of evaluation stories; g2p-bart (0.75 M) in exact match on the test words. Every method profiles calibration text
alone, and chooses its damping on calibration text that was not profiled. Shares are those of the file in float32.

Run: python benchmarks/bytes_writers.py [babyllama-tok105 stories260k tinystories-656k g2p-bart-us] [--shares 16 12 9 7]
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

import hpr
from common.paths import shared
from common.quantised.coded import one_sided, saved_bytes
from common.quantised.uniform import uniform
from common.tables import markdown, say
from hpr.checkpoints.open import open_model
from hpr.data.batches import first_batches
from hpr.data.files import read_texts
from hpr.data.loaded_model import LoadedModel
from hpr.data.splits import Splits, prepare
from hpr.evaluation.divergence import divergence
from hpr.rounding.plan import plan_bytes
from phonemes import exact_match, opened
from stories import bits_per_character

SPELLER = "g2p-bart-us"
SHARES = {  # percent of the file in float32
    "babyllama-tok105": (16.0, 12.4, 12.0, 9.4, 9.0, 7.0),
    "stories260k": (16.0, 15.9, 13.1, 12.0, 9.0, 7.0),
    "tinystories-656k": (16.0, 12.0, 9.0, 7.0),
    SPELLER: (16.0, 12.0, 10.7, 9.0, 7.8, 7.0),
}
METHODS = ("nearest", "one side", "ours")
WIDTHS = (4, 3, 2)  # bits of the peer that rounds to the nearest
STORIES = 300
CHOOSING = 128  # texts that choose the damping


@dataclass(frozen=True)
class Writer:
    """A model with its data, and how a student is scored; ``file_bytes`` is the size of the original's file."""

    loaded: LoadedModel
    data: Splits
    score: Callable[[nn.Module], dict[str, float]]
    file_bytes: int

    def choose(self, student: nn.Module) -> float:
        """Nats per example from the original on calibration text that was not profiled."""
        batches = first_batches(self.data.rescoring, CHOOSING)
        return divergence(student, self.loaded.model, batches, self.loaded.goal).mean


def writer(name: str, examples: int, stories: int) -> Writer:
    """A model by the name of its folder, with ``examples`` texts to profile."""
    folder = shared() / "models" / name
    score: Callable[[nn.Module], dict[str, float]]
    if name == SPELLER:
        loaded = opened(folder)
        lexicon = shared() / "data" / "g2p-us"
        data = prepare(read_texts(lexicon / "train.tsv", 0), loaded, examples)
        words, phonemes = (read_texts(lexicon / "test.tsv", column) for column in (0, 1))

        def score(student: nn.Module) -> dict[str, float]:
            return {"exact": 100 * exact_match(student, loaded.tokenizer, words, phonemes)}

    else:
        loaded = open_model(folder)
        texts = shared() / "data" / "tinystories"
        data = prepare(texts / "calibration.txt", loaded, examples)
        documents = read_texts(texts / "evaluation.txt")[:stories]
        context: int = loaded.model.config.max_position_embeddings  # type: ignore[union-attr, assignment]

        def score(student: nn.Module) -> dict[str, float]:
            return {"bits": bits_per_character(student, loaded.tokenizer, documents, context)}

    return Writer(loaded, data, score, os.path.getsize(folder / "model.safetensors"))


def measured(name: str, on: Writer, shares: Sequence[float], methods: Sequence[str]) -> list[dict[str, object]]:
    """All rows of one model."""
    model = on.loaded.model

    def report(method: str, student: nn.Module, size: int, **facts: object) -> dict[str, object]:
        share = 100 * size / on.file_bytes
        return say(model=name, method=method, bytes=size, share=share, **on.score(student), **facts)

    rows = [report("original", copy.deepcopy(model), on.file_bytes)]
    for bits in WIDTHS if "nearest" in methods else ():
        peer = uniform(model, bits)
        rows.append(report(f"nearest, {bits} bits", peer.student, min(peer.bytes.values())))
    start = time.perf_counter()
    profile = hpr.profile(model, on.data.calibration, on.loaded.objective, structure=False)
    temperature = profile.about["temperature"]
    say(model=name, profiled=profile.about["examples"], temperature=temperature, seconds=time.perf_counter() - start)
    for method, metric in (("one side", one_sided(profile)), ("ours", profile)):
        for share in shares if method in methods else ():
            made = plan_bytes(model, metric, f"{share}%bytes", int(share / 100 * on.file_bytes), on.choose)
            assert made.plan.rounding is not None
            dampings = (made.plan.rounding.output_damping, made.plan.rounding.input_damping)
            facts = {"predicted": made.plan.damage, "chosen at": made.tried[dampings], "dampings": dampings}
            rows.append(report(method, made.student, saved_bytes(made.student), planned=made.bytes, **facts))
    return rows


def main() -> None:
    """Print one JSON line per row and a table at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="model", help=", ".join(SHARES))
    parser.add_argument("--shares", type=float, nargs="+", help="percent of the bytes in float32")
    parser.add_argument("--examples", type=int, default=4096, help="texts to profile, at most")
    parser.add_argument("--stories", type=int, default=STORIES, help="evaluation stories to measure on, at most")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    given = parser.parse_args()
    logging.getLogger("hpr").setLevel(logging.ERROR)
    torch.manual_seed(0)
    rows = [
        row
        for name in given.names or SHARES
        for row in measured(name, writer(name, given.examples, given.stories), given.shares or SHARES[name], given.methods)
    ]
    columns = {
        "model": "",
        "method": "",
        "bytes": ",",
        "share": ".1f",
        "predicted": ".3f",
        "chosen at": ".3f",
        "bits": ".4f",
        "exact": ".1f",
    }
    print(markdown(rows, columns))


if __name__ == "__main__":
    main()
