"""Whisper tiny.en at a number of bytes, no training: word errors on evaluation clips, measured divergence, and the file.

Calibrates on the sound of 85 clips alone: the targets are the model's own greedy transcripts. Of every four batches three are
profiled, and the fourth chooses the damping. The student is saved and loaded again by ``from_pretrained``, and must give the
same bits. Needs soundfile and jiwer.

Run: python benchmarks/bytes_whisper.py [--megabytes 21.0 16.4 12.5 10.2] [--profile FILE]
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import nn

import hpr
from common.paths import shared
from common.speech import normalizer, read_clips, transcribed, transcripts, word_errors
from common.tables import markdown, say
from hpr.evaluation.divergence import divergence
from hpr.profiling.objectives import OBJECTIVES
from hpr.rounding.plan import plan_bytes

MEGABYTES = (21.0, 16.4, 12.5, 10.2)
GOAL = OBJECTIVES["seq2seq"]


def reloaded(student: Any, processor: Any, batch: dict[str, Any]) -> tuple[int, bool]:
    """Bytes of the student's file of weights, and whether the model that is loaded from it gives the same bits."""
    with TemporaryDirectory() as place:
        folder = hpr.save(student, Path(place) / "model", processor)
        again = type(student).from_pretrained(folder).eval()
        same = torch.equal(student(**batch).logits, again(**batch).logits)
        kept = again.generation_config.to_dict() == student.generation_config.to_dict()
        sound = transformers.AutoFeatureExtractor.from_pretrained(folder).to_dict() == processor.feature_extractor.to_dict()
        return os.path.getsize(folder / "model.safetensors"), same and kept and sound


def main() -> None:
    """Print one JSON line per row and a table at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, nargs="+", default=MEGABYTES)
    parser.add_argument("--profile", type=Path, help="read the profile from this file, or write it there")
    given = parser.parse_args()
    logging.getLogger("hpr").setLevel(logging.ERROR)
    torch.manual_seed(0)
    folder, data = shared() / "models" / "whisper-tiny-en", shared() / "data" / "speech-en"
    model: Any = transformers.WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = transformers.WhisperProcessor.from_pretrained(folder)
    normalize = normalizer(folder)
    batches = [transcribed(model, part) for part in read_clips(data, "calibration", processor.feature_extractor).split(5)]
    profiled = [batch for place, batch in enumerate(batches) if place % 4 != 3]
    choosing = batches[3::4]
    clips = read_clips(data, "evaluation", processor.feature_extractor)
    start = time.perf_counter()
    if given.profile is not None and given.profile.is_file():
        profile = hpr.Profile.load(given.profile)
    else:
        profile = hpr.profile(model, profiled, structure=False)
        if given.profile is not None:
            profile.save(given.profile)
    say(temperature=profile.about["temperature"], examples=profile.about["examples"], seconds=time.perf_counter() - start)

    def measure(student: nn.Module) -> float:
        return divergence(student, model, choosing, GOAL).mean

    def errors(student: nn.Module) -> float:
        return word_errors(transcripts(student, processor.tokenizer, clips.split(8)), clips.texts, normalize)

    dense = sum(parameter.numel() * 4 for parameter in model.parameters()) / 1e6
    rows = [say(method="original, float32", megabytes=dense, errors=errors(model))]
    for megabytes in given.megabytes:
        start = time.perf_counter()
        made = plan_bytes(model, profile, f"{megabytes}MB", int(megabytes * 1e6), measure)
        seconds = time.perf_counter() - start
        assert made.plan.rounding is not None
        dampings = (made.plan.rounding.output_damping, made.plan.rounding.input_damping)
        size, same = reloaded(made.student, processor, choosing[0])
        facts = {"predicted": made.plan.damage, "measured": made.tried[dampings], "dampings": dampings, "same bits": same}
        row = {"method": "ours", "megabytes": size / 1e6, "errors": errors(made.student), **facts, "seconds": seconds}
        rows.append(say(**row, tried=list(made.tried.items())))
    columns = {"method": "", "megabytes": ".2f", "errors": ".2f", "predicted": ".3f", "measured": ".3f", "same bits": ""}
    print(markdown(rows, columns))


if __name__ == "__main__":
    main()
