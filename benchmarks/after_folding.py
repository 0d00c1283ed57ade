"""A folded MiniLM in the hands of other tools: int8 and int4 of torchao, with and without balanced products, and LoRA of PEFT.

LoRA trains 20 steps on the training pairs of STS-B (cosines against the scores), is merged, saved, and loaded by its folder.

Run: python benchmarks/after_folding.py out/half [--steps 20]
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis
from transformers import AutoModel

import hpr
from common.paths import shared
from common.tables import say
from common.tasks import Pairs, embedder, sts_correlation, sts_pairs
from hpr.checkpoints.open import open_model
from hpr.nn.bank import parameters
from hpr.nn.folded import folded_in

TYPES = {
    "int8, weights": Int8WeightOnlyConfig(),
    "int8, weights and activations": Int8DynamicActivationInt8WeightConfig(),
    "int4, weights, a scale a row": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerAxis(0)),
}


@contextmanager
def unbalanced() -> Iterator[None]:
    """Fold products as their factors are stored, identity blocks included."""
    with patch("hpr.sharing.fold.balanced", lambda inner, outer: (inner, outer)):
        yield


def quantised(model: nn.Module, config: Any) -> nn.Module:
    """A copy, all of whose Linears torchao quantised."""
    made = copy.deepcopy(model)
    quantize_(made, config)
    return made


def trained(model: nn.Module, tokenizer: Any, pairs: Pairs, steps: int) -> nn.Module:
    """The model with LoRA on queries and values, after some steps."""
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"]))
    optimizer = torch.optim.AdamW((one for one in adapted.parameters() if one.requires_grad), lr=1e-3)
    for step in range(steps):
        part = slice(32 * step, 32 * step + 32)
        rows = []
        for side in pairs[:2]:
            batch = tokenizer(list(side[part]), padding=True, truncation=True, max_length=128, return_tensors="pt")
            mask = batch["attention_mask"].unsqueeze(-1)
            rows.append((adapted(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))
        loss = (torch.cosine_similarity(*rows) - torch.tensor(pairs[2][part]) / 5).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (0, steps - 1):
            say(step=step + 1, loss=round(loss.item(), 4))
    return adapted.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what hpr share or hpr compress wrote, from the packaged MiniLM")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    loaded = open_model(options.folder, "cpu")
    test, train = (sts_pairs(shared() / "data" / "sts-b" / f"stsb-en-{name}.csv") for name in ("test", "train"))

    def score(model: nn.Module) -> float:
        return round(sts_correlation(embedder(model, loaded.tokenizer), test), 4)

    plain = hpr.fold(loaded.model)
    say(model="shared", parameters=parameters(loaded.model), sts_b=score(loaded.model))
    say(model="folded", parameters=parameters(plain), pairs=len(folded_in(plain)), sts_b=score(plain))
    with unbalanced():
        as_stored = hpr.fold(loaded.model)
    for name, config in TYPES.items():
        say(torchao=name, balanced=score(quantised(plain, config)), as_stored=score(quantised(as_stored, config)))
    adapted = trained(plain, loaded.tokenizer, train, options.steps)
    say(lora=sum(one.numel() for one in adapted.parameters() if one.requires_grad), sts_b=score(adapted))
    merged = adapted.merge_and_unload()
    with tempfile.TemporaryDirectory() as folder:
        merged.save_pretrained(folder)
        again = AutoModel.from_pretrained(folder).eval()
    say(lora="merged, saved and loaded", parameters=parameters(again), sts_b=score(again))


if __name__ == "__main__":
    main()
