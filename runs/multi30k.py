"""English→German captions with a small Marian, trained from scratch: encoder and decoder sharing against no sharing.

Three models of 3+3 layers on Multi30k's 29,000 pairs: *apart* (nothing shared), *shared* (the six layers of both stacks read
two sets of weights in turn, as ``hpr.presets.cycle`` says), and *narrow* (nothing shared, as small as *shared*). BLEU on
the 2016 test set with bootstrap intervals, and paired tests against *shared*. A model that an earlier call left in the output
folder is scored as it is. Needs ``pip install 'hpr[runs]'``:
python runs/multi30k.py --data FOLDER [--epochs 20] [apart shared narrow]
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from pathlib import Path

import sacrebleu
import torch
import transformers as tf
from sacrebleu.significance import PairedTest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import hpr
from hpr.checkpoints.open import open_model
from hpr.nn.bank import parameters

VOCABULARY = 3000
LONGEST = 64  # tokens of a sentence
WIDTHS = {"apart": 128, "shared": 128, "narrow": 88}


def lines(data: Path, split: str, language: str) -> list[str]:
    """Sentences of one side."""
    with gzip.open(data / f"{split}.{language}.gz", "rt", encoding="utf-8") as file:
        return [line.strip() for line in file]


def tokenizer_of(texts: list[str]) -> tf.PreTrainedTokenizerFast:
    """Byte-pair encoding over both languages."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def built(kind: str, dropout: float, seed: int) -> tf.MarianMTModel:
    """One of the three, with random weights."""
    tf.set_seed(seed)
    width = WIDTHS[kind]
    config = tf.MarianConfig(
        vocab_size=VOCABULARY,
        d_model=width,
        encoder_layers=3,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        dropout=dropout,
        max_position_embeddings=2 * LONGEST,
        scale_embedding=True,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        forced_eos_token_id=None,
    )
    model = tf.MarianMTModel(config)
    if kind == "shared":
        model = hpr.share(model, hpr.presets.cycle(groups=2, spanning=True))
    return model


def trained(
    model: tf.MarianMTModel, rows: list[dict], valid: list[dict], tokenizer, epochs: float, seed: int, folder: Path
) -> dict:
    """Train, keep the checkpoint of least validation loss; seconds and that loss."""
    arguments = tf.Seq2SeqTrainingArguments(
        output_dir=str(folder / "checkpoints"),
        num_train_epochs=epochs,
        per_device_train_batch_size=128,
        per_device_eval_batch_size=256,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.0,
        label_smoothing_factor=0.1,
        train_sampling_strategy="group_by_length",
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        logging_steps=200,
        seed=seed,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
    )
    collate = tf.DataCollatorForSeq2Seq(tokenizer, model=model, padding=True)
    start = time.perf_counter()
    trainer = tf.Seq2SeqTrainer(model=model, args=arguments, train_dataset=rows, eval_dataset=valid, data_collator=collate)
    trainer.train()
    return {"seconds": time.perf_counter() - start, "valid_loss": trainer.state.best_metric}


@torch.no_grad()
def translations(model: tf.MarianMTModel, tokenizer, texts: list[str]) -> list[str]:
    """German by beam search, four beams."""
    model.eval()
    found = []
    for start in range(0, len(texts), 100):
        batch = tokenizer(texts[start : start + 100], return_tensors="pt", padding=True, return_token_type_ids=False)
        written = model.generate(**batch.to(model.device), num_beams=4, max_new_tokens=LONGEST, length_penalty=1.0)
        found += tokenizer.batch_decode(written, skip_special_tokens=True)
    return found


def main() -> None:
    """Train, translate, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=list(WIDTHS), metavar="model", help=", ".join(WIDTHS))
    parser.add_argument("--data", type=Path, required=True, help="folder with train.en.gz, val.en.gz, test_2016_flickr.en.gz")
    parser.add_argument("--output", type=Path, default=Path("out/multi30k"))
    parser.add_argument("--epochs", type=float, default=20)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sides = {split: (lines(options.data, split, "en"), lines(options.data, split, "de")) for split in ("train", "val")}
    tokenizer = tokenizer_of([*sides["train"][0], *sides["train"][1]])
    rows = {}
    for split, (english, german) in sides.items():
        read = tokenizer(english, text_target=german, truncation=True, max_length=LONGEST, return_token_type_ids=False)
        rows[split] = [dict(zip(read, values, strict=True)) for values in zip(*read.values(), strict=True)]
    english, german = (lines(options.data, "test_2016_flickr", language) for language in ("en", "de"))
    systems = []
    for kind in options.kinds:
        folder, about = options.output / kind, {}
        if (folder / "model").is_dir():
            model = open_model(folder / "model").model
        else:
            model = built(kind, options.dropout, options.seed)
            about = trained(model, rows["train"], rows["val"], tokenizer, options.epochs, options.seed, folder)
            hpr.save(model, folder / "model", tokenizer)
        written = translations(model, tokenizer, english)
        systems.append((kind, written))
        score = sacrebleu.BLEU().corpus_score(written, [german], n_bootstrap=1000)
        size = {"parameters": parameters(model), "dropout": model.config.dropout}
        about |= {"epochs": options.epochs, "seed": options.seed} if about else {"trained": "before"}
        print(json.dumps({"model": kind, **size, "bleu": str(score), **about}), flush=True)
        print(json.dumps({"model": kind, "text": english[0], "translation": written[0]}, ensure_ascii=False), flush=True)
    if len(systems) > 1:
        systems.sort(key=lambda system: system[0] != "shared")  # the first is the baseline of the paired tests
        _, scores = PairedTest(systems, {"BLEU": sacrebleu.BLEU(references=[german])}, None, "bs", 1000)()
        for (kind, _), result in zip(systems, scores["BLEU"], strict=True):
            print(json.dumps({"paired": kind, "bleu": result.score, "mean": result.mean, "ci": result.ci, "p": result.p_value}))


if __name__ == "__main__":
    main()
