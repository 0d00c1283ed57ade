"""Models of usual shapes with random weights: sizes, time and memory of a whole compression, and an exact round trip.

Random weights say nothing about quality. Each model runs in a process of its own, so that its peak memory is its own:
python benchmarks/shapes.py [bert-base gpt2-small t5-small whisper-tiny vit-b-16] [options, see --help]

Calibrates on random token ids (128 an example), pixels or spectrograms. Prints one JSON object a line, a table at the end.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers as tf
from torch import Tensor, nn

import hpr
from common.promises import answer
from common.tables import count, markdown, say
from hpr.anatomy.describe import describe
from hpr.anatomy.lookup import bytes_per_parameter
from hpr.nn.bank import parameters
from hpr.planning import planner
from hpr.planning.options import PlanOptions
from hpr.plans.budget import parse_budget
from hpr.runtime.environment import peak_memory

Batch = dict[str, Tensor]
TOKENS = 128
BATCH = 8
_FRESH = """
import sys, torch
import transformers
import hpr
from common.promises import answer
torch.set_num_threads(int(sys.argv[4]))
batch, expected = torch.load(sys.argv[3])
model = getattr(transformers, sys.argv[1]).from_pretrained(sys.argv[2]).eval()
print(torch.equal(answer(model, batch), expected))
"""


def text(config: tf.PretrainedConfig, draw: torch.Generator) -> Batch:
    """Token ids, none of them padding."""
    ids = torch.randint(3, config.vocab_size, (BATCH, TOKENS), generator=draw)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def pairs(config: tf.PretrainedConfig, draw: torch.Generator) -> Batch:
    """Token ids with target ids."""
    return {**text(config, draw), "labels": torch.randint(3, config.vocab_size, (BATCH, TOKENS), generator=draw)}


def spectra(config: tf.PretrainedConfig, draw: torch.Generator) -> Batch:
    """Thirty seconds of spectrogram with target ids."""
    shape = (BATCH, config.num_mel_bins, 2 * config.max_source_positions)
    labels = torch.randint(3, config.vocab_size, (BATCH, TOKENS), generator=draw)
    return {"input_features": torch.randn(shape, generator=draw), "labels": labels}


def images(config: tf.PretrainedConfig, draw: torch.Generator) -> Batch:
    """Pixels."""
    shape = (BATCH, config.num_channels, config.image_size, config.image_size)
    return {"pixel_values": torch.randn(shape, generator=draw)}


@dataclass(frozen=True)
class Shape:
    """A model class, its configuration, data of its kind and a budget."""

    model: str
    config: Callable[[], tf.PretrainedConfig]
    batch: Callable[[tf.PretrainedConfig, torch.Generator], Batch]
    budget: str = "50%"


SHAPES = {
    "bert-base": Shape("BertModel", tf.BertConfig, text, "50M"),
    "gpt2-small": Shape("GPT2LMHeadModel", tf.GPT2Config, text),
    "t5-small": Shape(
        "T5ForConditionalGeneration",
        lambda: tf.T5Config(d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8, decoder_start_token_id=0),
        pairs,
    ),
    "whisper-tiny": Shape(
        "WhisperForConditionalGeneration",
        lambda: tf.WhisperConfig(
            d_model=384,
            encoder_layers=4,
            decoder_layers=4,
            encoder_attention_heads=6,
            decoder_attention_heads=6,
            encoder_ffn_dim=1536,
            decoder_ffn_dim=1536,
        ),
        spectra,
    ),
    "vit-b-16": Shape("ViTForImageClassification", lambda: tf.ViTConfig(num_labels=1000), images),
}


def run(name: str, examples: int, operators: Sequence[str] | None) -> None:
    """Compress one shape and print its row."""
    shape = SHAPES[name]
    torch.manual_seed(0)
    model = getattr(tf, shape.model)(shape.config()).eval()
    draw = torch.Generator().manual_seed(1)
    batches = [shape.batch(model.config, draw) for _ in range(examples // BATCH)]
    seconds: dict[str, float] = {}
    peaks: dict[str, float] = {}

    @contextmanager
    def stage(label: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[label] = round(time.perf_counter() - start, 1)
        peaks[label] = round(peak_memory() / 1e9, 2)
        print(f"{name}: {label} {seconds[label]} s, peak so far {peaks[label]} GB", file=sys.stderr, flush=True)

    with stage("profile"):
        profile = hpr.profile(model, batches)
    with stage("plan"):
        draft = planner.draft(model, profile, PlanOptions(operators=operators))
        plan = draft.best(draft.budget(shape.budget))
    with stage("fit"):
        student = hpr.share(model, plan, profile)
    with tempfile.TemporaryDirectory() as folder:
        with stage("save"):
            saved = hpr.save(student, Path(folder) / "out")
        size = (saved / "model.safetensors").stat().st_size
        equal = reloads(shape.model, student, saved, batches[0])
    limit = parse_budget(shape.budget, describe(model), bytes_per_parameter(model))
    used = parameters(student)
    say(
        model=name,
        budget=shape.budget,
        examples=BATCH * len(batches),
        threads=torch.get_num_threads(),
        dense_parameters=parameters(model),
        parameters=used,
        budget_met=used == plan.parameters(draft.anatomy) <= limit.parameters,
        megabytes=size / 1e6,
        seconds=round(sum(seconds.values()), 1),
        by_stage=seconds,
        peak_gigabytes=max(peaks.values()),
        peak_by_stage=peaks,
        reload_bit_equal=equal,
        operators=count(plan),
    )


def reloads(kind: str, student: nn.Module, saved: Path, batch: Batch) -> bool:
    """Whether a fresh process loads the saved model and gives the very same outputs. Raises where it cannot."""
    facts = saved.parent / "expected.pt"
    torch.save((batch, answer(student, batch)), facts)
    arguments = [kind, str(saved), str(facts), str(torch.get_num_threads())]
    command = [sys.executable, "-c", _FRESH, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout.strip() == "True"


COLUMNS = {
    "model": "",
    "budget": "",
    "dense_parameters": ",",
    "parameters": ",",
    "budget_met": "",
    "megabytes": ".1f",
    "seconds": ".0f",
    "by_stage": "",
    "peak_gigabytes": ".1f",
    "reload_bit_equal": "",
}


def main() -> None:
    """Each shape named, all by default, in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="model", help=", ".join(SHAPES))
    parser.add_argument("--examples", type=int, default=64, help=f"to profile on, a multiple of {BATCH}")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--operators", help="to consider, separated by commas; all by default")
    options = parser.parse_args()
    if unknown := set(options.names) - set(SHAPES):
        parser.error(f"no shape {sorted(unknown)[0]}; there are {', '.join(SHAPES)}")
    if options.examples < BATCH or options.examples % BATCH:
        parser.error(f"{options.examples} examples: a multiple of {BATCH} is needed")
    torch.set_num_threads(options.threads)
    names = options.names or list(SHAPES)
    if len(names) == 1:
        operators = options.operators.split(",") if options.operators else None
        return run(names[0], options.examples, operators)
    rows = []
    for name in names:
        more = ["--examples", str(options.examples), "--threads", str(options.threads)]
        more += ["--operators", options.operators] if options.operators else []
        done = subprocess.run([sys.executable, __file__, name, *more], stdout=subprocess.PIPE, text=True, check=True)
        print(done.stdout, end="", flush=True)
        rows.append(json.loads(done.stdout))
    for row in rows:
        row["by_stage"] = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in row["by_stage"].items())
    print(f"\n{markdown(rows, COLUMNS)}")
    return None


if __name__ == "__main__":
    sys.exit(main())
