"""Unlabelled English text of several kinds, without any sentence that stands in STS-B: what a user who has text would bring."""

from __future__ import annotations

import gzip
import random
import re

from common.paths import shared
from common.tasks import labelled_texts, sts_pairs
from hpr.data.docstrings import docstrings
from hpr.data.files import read_texts

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'])")


def unlabelled() -> dict[str, list[str]]:
    """Sentences by kind, each shuffled: docstrings, captions, film reviews, news, stories, encyclopaedia."""
    data = shared() / "data"
    with gzip.open(data / "multi30k" / "train.en.gz", "rt", encoding="utf-8") as file:
        captions = [line.strip() for line in file if line.strip()]
    news = [line.split("\t") for line in read_texts(data / "mrpc" / "msr_paraphrase_train.txt")[1:]]
    kinds = {
        "docstrings": docstrings("calibration"),
        "captions": captions,
        "reviews": [text for text in labelled_texts(data / "sst2" / "train.tsv")[0] if len(text.split()) > 3],
        "news": [text for row in news if len(row) == 5 for text in row[3:]],
        "stories": _sentences(read_texts(data / "tinystories" / "calibration.txt")),
        "encyclopaedia": _sentences(read_texts(data / "wikitext-2" / "valid.txt")),
    }
    known = {
        text for name in ("dev", "test") for side in sts_pairs(data / "sts-b" / f"stsb-en-{name}.csv")[:2] for text in side
    }
    found = {}
    for name, texts in kinds.items():
        kept = sorted(set(texts) - known)
        random.Random(0).shuffle(kept)
        found[name] = kept
    return found


def mixture(each: int = 4000) -> list[str]:
    """As many sentences of every kind, shuffled."""
    texts = [text for kind in unlabelled().values() for text in kind[:each]]
    random.Random(1).shuffle(texts)
    return texts


def divided(held: int = 100, each: int = 1000) -> tuple[list[str], dict[str, list[str]]]:
    """At most ``each`` sentences of six kinds to read, shuffled, and ``held`` others of every kind to measure on, by kind.

    Held-out docstrings come from modules that no calibration reads.
    """
    kinds = unlabelled()
    kept = {name: texts[-held:] for name, texts in kinds.items()} | {"docstrings": docstrings("heldout")[:held]}
    texts = [text for kind in kinds.values() for text in kind[: min(map(len, kinds.values())) - held][:each]]
    random.Random(1).shuffle(texts)
    return texts, kept


def _sentences(documents: list[str]) -> list[str]:
    pieces = [re.sub(r"\s+", " ", piece).strip() for text in documents for piece in _SENTENCE_END.split(text)]
    return [piece for piece in pieces if 5 <= len(piece.split()) <= 60]
