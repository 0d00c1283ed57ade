"""Spoken digits with a small Whisper-shaped encoder, trained from scratch: layers that share against layers that do not.

The 3,000 recordings of FSDD (8 kHz, six speakers) as logarithmic mel spectra; recordings 0 to 4 of each speaker and digit are
the test set. Eight layers of width 64: *apart*, *shared* (all read one set of weights, the rest is private), and *shallow*
(nothing shared, as many layers as *shared* has parameters for). Accuracy over three seeds:
python runs/digits.py --data recordings.zip [--epochs 30] [apart shared shallow]
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import time
import wave
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor
from transformers.audio_utils import mel_filter_bank

import hpr
from hpr.nn.bank import parameters

RATE, HOP, WINDOW, BANDS, FRAMES = 8000, 80, 200, 40, 100  # a second in frames of 10 ms
LAYERS = {"apart": 8, "shared": 8, "shallow": 1}


def recordings(path: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Spectra (n, BANDS, FRAMES), digits (n,), and which are of the test set."""
    filters = torch.tensor(mel_filter_bank(WINDOW // 2 + 1, BANDS, 0, RATE / 2, RATE, norm="slaney")).float()
    spectra, digits, tested = [], [], []
    with zipfile.ZipFile(path) as archive:
        for name in sorted(name for name in archive.namelist() if name.endswith(".wav")):
            digit, _, number = Path(name).stem.split("_")
            with wave.open(io.BytesIO(archive.read(name))) as file:
                sound = torch.from_numpy(np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32) / 32768)
            sound = F.pad(sound, (0, max(0, FRAMES * HOP - len(sound))))[: FRAMES * HOP]
            power = torch.stft(sound, WINDOW, HOP, window=torch.hann_window(WINDOW), return_complex=True).abs().square()
            spectra.append((filters.T @ power[:, :FRAMES]).clamp(min=1e-8).log())
            digits.append(int(digit))
            tested.append(int(number) < 5)
    found = torch.stack(spectra)
    return (found - found.mean()) / found.std(), torch.tensor(digits), torch.tensor(tested)


def built(kind: str, seed: int) -> torch.nn.Module:
    """One of the three, with random weights."""
    tf.set_seed(seed)
    config = tf.WhisperConfig(
        num_mel_bins=BANDS,
        d_model=64,
        encoder_layers=LAYERS[kind],
        encoder_attention_heads=4,
        encoder_ffn_dim=256,
        decoder_layers=1,
        decoder_attention_heads=4,
        decoder_ffn_dim=64,
        vocab_size=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        max_source_positions=FRAMES // 2,
        dropout=0.1,
        num_labels=10,
        classifier_proj_size=64,
    )
    model = tf.WhisperForAudioClassification(config)
    return hpr.share(model, hpr.presets.albert()) if kind == "shared" else model


def accuracy_after(model: torch.nn.Module, spectra: Tensor, digits: Tensor, tested: Tensor, epochs: int, seed: int) -> float:
    """Train with AdamW and shifts in time; share of the test recordings that are recognised."""
    rows, labels = spectra[~tested], digits[~tested]
    steps = epochs * (len(rows) // 50)
    solver = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    course = torch.optim.lr_scheduler.OneCycleLR(solver, max_lr=2e-3, total_steps=steps)
    draw = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(rows), generator=draw).split(50)[: len(rows) // 50]:
            shift = int(torch.randint(-10, 11, (1,), generator=draw))
            model(input_features=rows[batch].roll(shift, -1), labels=labels[batch]).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            solver.step()
            course.step()
            solver.zero_grad()
    model.eval()
    with torch.no_grad():
        found = torch.cat([model(input_features=part).logits.argmax(-1) for part in spectra[tested].split(100)])
    return float((found == digits[tested]).double().mean())


def main() -> None:
    """Train each kind with every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=list(LAYERS), metavar="model", help=", ".join(LAYERS))
    parser.add_argument("--data", type=Path, required=True, help="recordings.zip")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    data = recordings(options.data)
    for kind in options.kinds:
        start, scores = time.perf_counter(), []
        for seed in range(options.seeds):
            model = built(kind, seed)
            scores.append(accuracy_after(model, *data, options.epochs, seed))
        size = sum(part.numel() for name, part in model.named_parameters() if part.requires_grad)
        about = {"parameters": parameters(model), "trained": size, "seconds": time.perf_counter() - start}
        mean, spread = statistics.mean(scores), statistics.stdev(scores) if len(scores) > 1 else None
        print(json.dumps({"model": kind, "accuracy": mean, "spread": spread, "each": scores, **about}), flush=True)


if __name__ == "__main__":
    main()
