"""A BERT of any shape, trained on local text for some minutes: something to compress where no checkpoint is at hand.

Masked language modelling (Devlin et al. 2019) on lines packed to 128 tokens, with the vocabulary of another model's tokenizer.
What some minutes teach is far from what a public checkpoint knows. Prints one JSON object a line:
python runs/pretrain.py out/bert-base-shape --text text.txt --minutes 3 [--layers 12 --width 768]
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
import transformers as tf
from accelerate.utils import send_to_device

from hpr.checkpoints.open import open_model
from hpr.data.files import read_texts
from hpr.nn.bank import parameters

LENGTH = 128  # tokens of a row
HELD_OUT = 64  # rows


def rows_of(texts: list[str], tokenizer: tf.PreTrainedTokenizerBase) -> torch.Tensor:
    """(n, LENGTH) token ids: lines one after the other, each with its marks of start and end."""
    ids = [token for line in tokenizer(texts)["input_ids"] for token in line]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).reshape(-1, LENGTH)


def main() -> None:
    """Train until the time is up, with the learning rate going to 0 by then; save the model with its tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="one sentence or paragraph a line")
    parser.add_argument("--tokenizer", help="a folder with one; that of the packaged all-MiniLM-L6-v2 if left out")
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--batch", type=int, default=128, help="rows a step")
    parser.add_argument("--rate", type=float, default=3e-4)
    options = parser.parse_args()
    tf.set_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = tf.AutoTokenizer.from_pretrained(options.tokenizer) if options.tokenizer else open_model().tokenizer
    shape = {"num_hidden_layers": options.layers, "hidden_size": options.width, "num_attention_heads": options.width // 64}
    config = tf.BertConfig(vocab_size=len(tokenizer), intermediate_size=4 * options.width, **shape)
    model = tf.BertForMaskedLM(config).to(device)
    rows = rows_of(read_texts(options.text), tokenizer)
    rows = rows[torch.randperm(len(rows))]
    held_out, rows = rows[:HELD_OUT], rows[HELD_OUT:]
    collate = tf.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)

    def masked(chosen: torch.Tensor) -> dict[str, torch.Tensor]:
        return send_to_device(collate(list(chosen)), device)

    solver = torch.optim.AdamW(model.parameters(), lr=options.rate, weight_decay=0.01)
    start, losses, step = time.perf_counter(), [], 0
    while (done := (time.perf_counter() - start) / (60 * options.minutes)) < 1:
        share = min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * done))
        for group in solver.param_groups:
            group["lr"] = share * options.rate
        batch = masked(rows[torch.randint(len(rows), (options.batch,))])
        with torch.autocast(device, torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        solver.step()
        solver.zero_grad()
        losses.append(loss.detach())
        step += 1
    model.eval()
    with torch.no_grad():
        guessed = float(model(**masked(held_out)).loss)
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    about = {"parameters": parameters(model), "steps": step, "rows": len(rows), "seconds": time.perf_counter() - start}
    print(json.dumps(about | {"loss": float(torch.stack(losses[-50:]).mean()), "held_out": guessed}), flush=True)


if __name__ == "__main__":
    main()
