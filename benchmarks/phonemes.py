"""Spelling to phonemes without training: exact match at 70 % and 50 % of the linear weights, against published methods.

BART of one encoder and one decoder layer (0.75 M). Calibrates on words of the training lexicon without their phonemes: the
decoder reads what the model writes itself. Measures exact match on the 2,000 test words. Layers are not dropped: there is one
of each kind. Prints one JSON object a line, then a table: python benchmarks/phonemes.py [--examples 4096] [--words 2000]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BartForConditionalGeneration

from common.comparison import Made, ground, spanning, students
from common.paths import shared
from common.tables import markdown, say
from hpr.data.batches import text_batches
from hpr.data.files import read_texts
from hpr.data.loaded_model import LoadedModel
from hpr.data.splits import prepare
from hpr.data.targets import own_answers
from hpr.evaluation.divergence import compare
from hpr.profiling.objectives import OBJECTIVES

ONLY = "encoder.0.*,decoder.0.*"
GOAL = OBJECTIVES["seq2seq"]
START, END, UNKNOWN = 1, 2, 3


class Speller:
    """Words as ids of characters between start and end, in the way of a tokenizer."""

    pad_token_id = 0

    def __init__(self, letters: str, sounds: str):
        self.letters = {letter: number for number, letter in enumerate(letters) if number > UNKNOWN}
        self.sounds = sounds

    def __call__(self, words: Sequence[str], **settings: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[START, *(self.letters.get(letter, UNKNOWN) for letter in word), END] for word in words]}

    def decode(self, ids: Sequence[int]) -> str:
        """Phonemes of ids, up to the end; "?" for an id that is no phoneme, which only a damaged model writes."""
        inside = list(ids)[: list(ids).index(END)] if END in ids else ids
        known = range(len(self.sounds))
        return "".join(self.sounds[number] if number in known else "?" for number in inside if number > UNKNOWN)


def opened(folder: Path) -> LoadedModel:
    """The model with its characters."""
    known: Mapping[str, str] = json.loads((folder / "characters.json").read_text(encoding="utf-8"))
    model = BartForConditionalGeneration.from_pretrained(folder).eval()
    speller = Speller(known["grapheme_chars"], known["phoneme_chars"])
    return LoadedModel(model, speller, GOAL.name, folder, folder.name)


def exact_match(model: nn.Module, speller: Any, words: Sequence[str], phonemes: Sequence[str]) -> float:
    """Share of words whose phonemes are written exactly as the lexicon has them, decoding greedily."""
    batches = text_batches(words, speller, batch_size=250)
    found = [speller.decode(row) for batch in batches for row in own_answers(model, batch).tolist()]
    return sum(text == phonemes[place] for text, place in zip(found, batches.order, strict=True)) / len(words)


def main() -> None:
    """Print rows and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=4096, help="words to profile")
    parser.add_argument("--words", type=int, default=2000, help="test words to measure on, at most")
    options = parser.parse_args()
    torch.manual_seed(0)
    lexicon = shared() / "data" / "g2p-us"
    model = opened(shared() / "models" / "g2p-bart-us")
    data = prepare(read_texts(lexicon / "train.tsv", 0), model, options.examples)
    words, phonemes = (read_texts(lexicon / "test.tsv", column)[: options.words] for column in (0, 1))
    on = ground(model.model, data, GOAL, ONLY)
    about = {key: on.profile.about[key] for key in ("examples", "tokens", "seconds")}
    say(model=model.label, weights=on.dense, words=len(words), **about)
    rows = []

    def report(made: Made, budget: float | None) -> None:
        row = say(
            method=made.method,
            budget=None if budget is None else f"{budget:.0%}",
            parameters=made.parameters,
            share=made.parameters / on.dense,
            exact=exact_match(made.student, model.tokenizer, words, phonemes),
            divergence=compare(made.student, on.model, data.heldout, GOAL).divergence.mean,
            **made.facts,
        )
        rows.append(row)

    report(Made("dense", on.model, on.dense), None)
    for share in (0.7, 0.5):
        for made in students(on, share):
            report(made, share)
            if made.plan is not None:
                groups = spanning(made.plan, on.draft.anatomy)
                chosen = {name: entry.operator for name, entry in made.plan.entries.items()}
                say(
                    budget=f"{share:.0%}",
                    spanning=len(groups),
                    groups=groups,
                    all_groups=list(made.plan.groups()),
                    sites=chosen,
                )
    columns = {"method": "", "budget": "", "parameters": ",", "share": ".1%", "exact": ".1%", "divergence": ".4f"}
    print(f"\n{markdown(rows, columns)}\n\nNo layers are dropped: the model has one encoder and one decoder layer.")


if __name__ == "__main__":
    sys.exit(main())
