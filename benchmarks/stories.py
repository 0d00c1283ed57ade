"""Story writers without training: bits per character at 70 % and 50 % of the linear weights, against published methods.

BabyLlama (characters, 0.94 M) and stories260k (512 tokens, 0.26 M), both Llamas of 5 layers with grouped-query attention.
Calibrates on the calibration stories alone, in windows of at most 256 tokens, as ``hpr.compress`` deals them out, and
measures on the evaluation stories. Prints one JSON object a line, the models' continuations of one prompt, then a table:
python benchmarks/stories.py [babyllama-tok105 stories260k] [--examples 4096] [--stories 1000]
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from common.comparison import Made, dropped, ground, students
from common.paths import shared
from common.tables import markdown, say
from hpr.checkpoints.open import open_model
from hpr.data.files import read_texts
from hpr.data.loaded_model import LoadedModel
from hpr.data.splits import prepare
from hpr.profiling.objectives import OBJECTIVES

MODELS = ("babyllama-tok105", "stories260k")
ONLY = "layers.*"
PROMPT = "Once upon a time, there was a little girl named Lily. She"
WRITTEN = 160  # characters of a continuation
BATCH = 32


@torch.no_grad()
def bits_per_character(model: nn.Module, tokenizer: Any, documents: Sequence[str], context: int) -> float:
    """Σ −log2 p(token | the document's tokens before it) over all tokens but each document's first, per character.

    The first token is given, not predicted: it is the one that the tokenizer puts before every document (Llama's <s>).
    Characters are Python's, of the document as it is. A document longer than ``context`` tokens is read in windows of that
    many, each beginning half a window after the last, and a token is counted where it first appears: so it sees all
    tokens before it in the first window and at least half of ``context`` later on.
    """
    spans: list[tuple[list[int], int]] = []  # tokens of a window, and how many of them were counted before
    for document in documents:
        ids = tokenizer(document, verbose=False)["input_ids"]
        start, counted = 0, 1
        while True:
            spans.append((ids[start : start + context], counted - start))
            counted = start + context
            if counted >= len(ids):
                break
            start += context // 2
    spans.sort(key=lambda span: len(span[0]))
    total = 0.0
    for first in range(0, len(spans), BATCH):
        part = spans[first : first + BATCH]
        width = len(part[-1][0])
        ids = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens, _ in part])  # to the right: no token sees it
        targets = ids.clone()
        for row, (tokens, skipped) in enumerate(part):
            targets[row, len(tokens) :] = targets[row, :skipped] = -100
        logits = model(input_ids=ids).logits[:, :-1].double()
        total += float(F.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-100, reduction="sum"))
    return total / math.log(2) / sum(map(len, documents))


@torch.no_grad()
def continuation(model: Any, tokenizer: Any, sample: bool) -> str:
    """About 160 characters after the prompt: the most probable token each time, or drawn at temperature 0.8, seed 0."""
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    torch.manual_seed(0)
    drawn = {"do_sample": True, "temperature": 0.8, "top_k": 0} if sample else {"do_sample": False}
    written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=WRITTEN, **drawn)
    text = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    return text[:WRITTEN]


def main() -> None:
    """Print rows, continuations and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="model", help=", ".join(MODELS))
    parser.add_argument("--examples", type=int, default=4096, help="windows of calibration text to profile")
    parser.add_argument("--stories", type=int, default=1000, help="evaluation stories to measure on, at most")
    options = parser.parse_args()
    documents = read_texts(shared() / "data" / "tinystories" / "evaluation.txt")[: options.stories]
    table = [row for name in options.names or MODELS for row in measured(name, documents, options.examples)]
    print(f"\n{markdown(table, {'model': '', 'method': '', 'budget': '', 'parameters': ',', 'share': '.1%', 'bits': '.4f'})}")


def measured(name: str, documents: Sequence[str], examples: int) -> list[dict[str, Any]]:
    """All rows of one model."""
    torch.manual_seed(0)
    opened = open_model(shared() / "models" / name)
    data = prepare(shared() / "data" / "tinystories" / "calibration.txt", opened, examples)
    start = time.perf_counter()
    on = ground(opened.model, data, OBJECTIVES[opened.objective], ONLY)
    about = {"examples": on.profile.about["examples"], "tokens": on.profile.about["tokens"]}
    say(model=name, weights=on.dense, stories=len(documents), **about, seconds=time.perf_counter() - start)
    rows = [report(name, opened, Made("dense", opened.model, on.dense), None, on.dense, documents)]
    for share in (0.7, 0.5):
        for made in (*students(on, share), *dropped(on, share)):
            rows.append(report(name, opened, made, share, on.dense, documents))
    return rows


def report(
    name: str, opened: LoadedModel, made: Made, budget: float | None, dense: int, documents: Sequence[str]
) -> dict[str, Any]:
    """Measure one model and print its row and what it writes."""
    context = opened.model.config.max_position_embeddings
    row = say(
        model=name,
        method=made.method,
        budget=None if budget is None else f"{budget:.0%}",
        parameters=made.parameters,
        share=made.parameters / dense,
        bits=bits_per_character(made.student, opened.tokenizer, documents, context),
        **made.facts,
    )
    for sample in (False, True):
        text = continuation(made.student, opened.tokenizer, sample)
        say(method=made.method, budget=row["budget"], drawn="sampled" if sample else "greedy", prompt=PROMPT, text=text)
    return row


if __name__ == "__main__":
    sys.exit(main())
