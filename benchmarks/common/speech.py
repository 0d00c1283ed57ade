"""Whisper on clips of speech: features, the transcripts that it writes itself, and the share of words that it gets wrong."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hpr.runtime.batch import IGNORED, Batch


@dataclass(frozen=True)
class Clips:
    """Log-mel features (clips, 80, 3000) with transcripts, sources (what an id has before the slash) and seconds of speech."""

    features: Float[Tensor, "clips bands frames"]
    texts: list[str]
    sources: list[str]
    seconds: list[float]

    def split(self, size: int) -> list[Float[Tensor, "clips bands frames"]]:
        """The features, ``size`` clips at a time."""
        return list(self.features.split(size))


def read_clips(folder: Path, name: str, extractor: Any, most: int | None = None) -> Clips:
    """The clips of ``name``.tsv (file, id, speaker, seconds, text), at most ``most``."""
    import soundfile

    with open(folder / f"{name}.tsv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[:most]
    sounds = [soundfile.read(folder / name / row["file"], dtype="float32")[0] for row in rows]
    features = torch.cat([extractor(sound, sampling_rate=16000, return_tensors="pt").input_features for sound in sounds])
    sources, seconds = [row["id"].partition("/")[0] for row in rows], [len(sound) / 16000 for sound in sounds]
    return Clips(features, [row["text"] for row in rows], sources, seconds)


@torch.no_grad()
def transcribed(model: Any, features: Float[Tensor, "clips bands frames"]) -> Batch:
    """A batch with the model's own greedy transcript as labels.

    The decoder reads the start token and the token for "no timestamps", which are given in use; so no label is at the place
    of the second one.
    """
    written = model.generate(input_features=features, num_beams=1, do_sample=False)
    settings = model.generation_config
    start, silent, end = settings.decoder_start_token_id, settings.no_timestamps_token_id, settings.eos_token_id
    rows = [[token for token in row if token not in (start, silent, end)] for row in written.tolist()]
    width = max(map(len, rows)) + 1
    labels = torch.full((len(rows), width + 1), IGNORED)
    inputs = torch.full((len(rows), width + 1), end)
    inputs[:, 0], inputs[:, 1] = start, silent
    for place, row in enumerate(rows):
        labels[place, 1 : len(row) + 2] = torch.tensor([*row, end])
        inputs[place, 2 : len(row) + 2] = torch.tensor(row)
    return {"input_features": features, "decoder_input_ids": inputs, "labels": labels}


def normalizer(folder: Path) -> Any:
    """The text normalizer that word error rates of Whisper are measured with, without a table of spellings."""
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    spellings = folder / "normalizer.json"
    return EnglishTextNormalizer(json.loads(spellings.read_text(encoding="utf-8")) if spellings.is_file() else {})


@torch.no_grad()
def transcripts(model: nn.Module, tokenizer: Any, batches: Sequence[Tensor]) -> list[str]:
    """What the model writes, greedily."""
    texts: list[str] = []
    for features in batches:
        written = model.generate(input_features=features, num_beams=1, do_sample=False)  # type: ignore[operator]
        texts += tokenizer.batch_decode(written, skip_special_tokens=True)
    return texts


def word_errors(texts: Sequence[str], said: Sequence[str], normalize: Any) -> float:
    """Percent of words: substituted, left out and put in."""
    import jiwer

    return 100 * float(jiwer.wer([normalize(text) for text in said], [normalize(text) for text in texts]))
