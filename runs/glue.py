"""Fine-tune a smaller model beside its original on SST-2 or MRPC from local files: accuracy of each, and what it took.

The same data, steps and relative learning rate for both. A model is a folder that ``hpr`` or ``save_pretrained`` wrote, or
``packaged`` for all-MiniLM-L6-v2:
python runs/glue.py sst2 --data FOLDER packaged out/half [--epochs 1]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import transformers as tf

from hpr.checkpoints.open import open_model
from hpr.data.files import read_labels, read_texts
from hpr.healing.optimizer import parameter_groups
from hpr.nn.bank import parameters

LONGEST = 128  # tokens
Rows = tuple[list[tuple[str, ...]], list[int]]


def sst2(data: Path) -> dict[str, Rows]:
    """Film reviews, 1 where favourable: train.tsv, dev.tsv and test.tsv."""
    rows = {}
    for name in ("train", "dev", "test"):
        labels = read_labels(data / f"{name}.tsv") or []
        rows[name] = [(text,) for text in read_texts(data / f"{name}.tsv", "sentence")], [int(label) for label in labels]
    return rows


def mrpc(data: Path) -> dict[str, Rows]:
    """Pairs of sentences, 1 where they say the same: msr_paraphrase_train.txt and _test.txt. Every tenth of train is dev."""
    found = {}
    for name in ("train", "test"):
        rows = [line.split("\t") for line in read_texts(data / f"msr_paraphrase_{name}.txt")[1:]]
        found[name] = ([(row[3], row[4]) for row in rows], [int(row[0]) for row in rows])
    texts, labels = found["train"]
    for name, kept in (("dev", lambda i: i % 10 == 0), ("train", lambda i: i % 10 != 0)):
        places = [i for i in range(len(texts)) if kept(i)]
        found[name] = ([texts[i] for i in places], [labels[i] for i in places])
    return found


TASKS = {"sst2": sst2, "mrpc": mrpc}


def rows_of(tokenizer, rows: Rows) -> list[dict]:
    """Tokenised, with labels."""
    texts, labels = rows
    read = tokenizer(*map(list, zip(*texts, strict=True)), truncation=True, max_length=LONGEST)
    return [dict(zip((*read, "labels"), values, strict=True)) for values in zip(*read.values(), labels, strict=True)]


def right(predictions: tf.EvalPrediction) -> dict[str, float]:
    """Share of examples classified as labelled."""
    return {"accuracy": float((predictions.predictions.argmax(-1) == predictions.label_ids).mean())}


def main() -> None:
    """Fine-tune each model and say what it scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("models", nargs="+")
    parser.add_argument("--data", type=Path, required=True, help="folder with the files of the task")
    parser.add_argument("--output", type=Path, default=Path("out/glue"))
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--steps", type=int, default=-1, help="instead of epochs")
    parser.add_argument("--rate", type=float, default=1e-3, help="relative to the scale of each parameter")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    data = TASKS[options.task](options.data)
    for name in options.models:
        tf.set_seed(options.seed)
        opened = open_model(None if name == "packaged" else name, "cpu")
        model = tf.AutoModelForSequenceClassification.from_pretrained(opened.folder, num_labels=2)
        rows = {split: rows_of(opened.tokenizer, part) for split, part in data.items()}
        arguments = tf.TrainingArguments(
            output_dir=str(options.output / Path(name).name),
            num_train_epochs=options.epochs,
            max_steps=options.steps,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=128,
            lr_scheduler_type="linear",
            warmup_steps=0.1,
            train_sampling_strategy="group_by_length",
            logging_steps=200,
            save_strategy="no",
            seed=options.seed,
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
        )
        trainer = tf.Trainer(
            model=model,
            args=arguments,
            train_dataset=rows["train"],
            data_collator=tf.DataCollatorWithPadding(opened.tokenizer),
            compute_metrics=right,
            optimizers=(torch.optim.AdamW(parameter_groups(model, options.rate, 1.0, 0.0), weight_decay=0.0), None),
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        scores = {split: trainer.evaluate(rows[split])["eval_accuracy"] for split in ("dev", "test")}
        about = {"parameters": parameters(model), "steps": trainer.state.global_step, "seconds": seconds}
        print(json.dumps({"task": options.task, "model": name, **scores, **about}), flush=True)


if __name__ == "__main__":
    main()
