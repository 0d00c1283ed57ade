"""Malformed and hostile inputs: exit code 2, a message with the value and the mend, no traceback, nothing left on disk."""

import json
import os
import shutil
import zipfile

import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save
from typer.testing import CliRunner

import hpr
from hpr.cli.program import app

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{number}" for number in range(35))]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    tf.BertModel(tf.BertConfig(**sizes, vocab_size=40, max_position_embeddings=16)).save_pretrained(folder / "model")
    (folder / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    tf.BertTokenizer(str(folder / "vocab.txt"), model_max_length=16).save_pretrained(folder / "model")
    (folder / "texts.txt").write_text("\n".join(f"word{number % 30} word3" for number in range(32)), encoding="utf-8")
    (folder / "table.csv").write_text("body,stars\n" + "\n".join(f"word{number},{number}" for number in range(20)))
    model = tf.AutoModel.from_pretrained(folder / "model").eval()
    batches = [{"input_ids": torch.randint(5, 40, (4, 6))} for _ in range(4)]
    profile = hpr.profile(model, batches)
    profile.save(folder / "profile.safetensors")
    hpr.plan(model, profile, "90%").save(folder / "plan.json")
    return folder


def edited(home, folder, **config):
    """A copy of the model with other values in its config.json; None removes a key."""
    target = folder / "edited"
    shutil.copytree(home / "model", target)
    known = json.loads((target / "config.json").read_text())
    kept = {key: value for key, value in (known | config).items() if value is not None}
    (target / "config.json").write_text(json.dumps(kept))
    return target


def with_file(home, folder, name, content, drop=()):
    target = folder / "edited"
    shutil.copytree(home / "model", target)
    for gone in drop:
        (target / gone).unlink()
    (target / name).write_bytes(content)
    return target


def as_type(home, folder, dtype):
    weights = load_file(home / "model" / "model.safetensors")
    return with_file(home, folder, "model.safetensors", save({name: value.to(dtype) for name, value in weights.items()}))


def tokenizer(home, folder, **settings):
    known = json.loads((home / "model" / "tokenizer_config.json").read_text())
    return with_file(home, folder, "tokenizer_config.json", json.dumps(known | settings).encode())


def pipe(folder):
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


def dangling(folder):
    (folder / "link").symlink_to(folder / "nowhere" / "file")
    return folder / "link"


def data(folder, name, content):
    path = folder / name
    path.write_bytes(content)
    return path


def archive(folder):
    with zipfile.ZipFile(folder / "a.docx", "w") as file:
        file.writestr("word/document.xml", "<w/>")
    return folder / "a.docx"


def array(folder, values):
    np.save(folder / "x.npy", values)
    return folder / "x.npy"


def damaged_plan(home, folder, change):
    plan = json.loads((home / "plan.json").read_text())
    change(plan)
    return data(folder, "edited.json", json.dumps(plan).encode())


COMPRESS = ("compress", "MODEL", "--data", "TEXTS", "-o", "OUT")
PLAN = ("plan", "MODEL", "--profile", "PROFILE", "-o", "OUT")
CASES = {
    # flags
    "seed beyond 64 bits": ((*COMPRESS, "--seed", 2**64), "give a whole number from 0 to 2^64 - 1"),
    "negative seed": ((*COMPRESS, "--seed", -1), "give a whole number"),
    "seed that is no number": ((*COMPRESS, "--seed", "one"), "--seed"),
    "no examples": ((*COMPRESS, "--examples", 0), "--examples"),
    "no plans": ((*COMPRESS, "--plans", 0), "--plans"),
    "unknown flag": ((*COMPRESS, "--budgets", "50%"), "--budgets"),
    "unknown objective": ((*COMPRESS, "--objective", "bleu"), "no objective 'bleu'"),
    "empty objective": ((*COMPRESS, "--objective", ""), "no objective ''"),
    "unknown device": ((*COMPRESS, "--device", "tpu9"), "'tpu9'"),
    "meta device": ((*COMPRESS, "--device", "meta"), "'meta'"),
    "unknown operator": ((*COMPRESS, "--operators", "magic"), "no operator 'magic'"),
    "pattern without a site": ((*COMPRESS, "--only", "decoder.*"), "matches no site"),
    "five bits": ((*COMPRESS, "--budget", "30%bytes", "--bits", 5), "bits"),
    "bits without bytes": ((*COMPRESS, "--bits", 4), "bits"),
    # budgets
    "budget in words": ((*COMPRESS, "--budget", "half"), "'half' is no budget"),
    "empty budget": ((*COMPRESS, "--budget", ""), "no budget"),
    "budget of nothing": ((*COMPRESS, "--budget", "0%"), "no budget"),
    "negative budget": ((*COMPRESS, "--budget=-5%"), "no budget"),
    "budget that is not a number": ((*COMPRESS, "--budget", "nan%"), "no budget"),
    "more than the model": ((*COMPRESS, "--budget", "150%"), "give at most 100%"),
    "more parameters than the model": ((*COMPRESS, "--budget", "7B"), "give at most 100%"),
    "more bytes than the model": ((*COMPRESS, "--budget", "5GB"), "give less"),
    "fraction for a share": ((*COMPRESS, "--budget", "0.5"), "write 50%"),
    "share without its sign": ((*COMPRESS, "--budget", "50"), "write 50%"),
    "too few parameters": ((*COMPRESS, "--budget", "300"), "Raise the budget"),
    "too few bytes": ((*COMPRESS, "--budget", "0.2KB"), "give a larger budget"),
    "bytes that are no size": ((*COMPRESS, "--bytes", "much"), "which is no size"),
    # models
    "no folder": (("compress", "/no/such/model", "-o", "OUT"), "no folder at /no/such/model"),
    "a file for a folder": (("compress", "TEXTS", "-o", "OUT"), "is a file"),
    "an empty folder": (("compress", lambda home, folder: folder, "-o", "OUT"), "config.json"),
    "config that is no JSON": (lambda home, folder: with_file(home, folder, "config.json", b"{"), "config.json"),
    "config that is a list": (lambda home, folder: with_file(home, folder, "config.json", b"[1]"), "config.json"),
    "unknown kind of model": (
        lambda home, folder: edited(home, folder, model_type="bart9", architectures=["Bart9Model"]),
        "cannot be loaded",
    ),
    "heads that do not divide": (lambda home, folder: edited(home, folder, num_attention_heads=7), "cannot be loaded"),
    "a million layers": (lambda home, folder: edited(home, folder, num_hidden_layers=10**9), "num_hidden_layers"),
    "architectures that are no list": (lambda home, folder: edited(home, folder, architectures=5), "not a list"),
    "own code": (
        lambda home, folder: edited(home, folder, auto_map={"AutoModel": "mine.Model"}, model_type="mine"),
        "own code",
    ),
    "quantised by another tool": (
        lambda home, folder: edited(home, folder, quantization_config={"quant_method": "gptq", "bits": 4}),
        "gptq",
    ),
    "weights cut off": (lambda home, folder: with_file(home, folder, "model.safetensors", b"\x08\0\0\0\0\0\0\0{}"), "edited"),
    "no weights": (
        lambda home, folder: with_file(home, folder, "notes.txt", b"", drop=["model.safetensors"]),
        "has no model.safetensors",
    ),
    "pickled weights": (
        lambda home, folder: with_file(home, folder, "pytorch_model.bin", b"\x80\x04", drop=["model.safetensors"]),
        "safetensors",
    ),
    "an adapter beside the model": (
        lambda home, folder: with_file(home, folder, "adapter_config.json", b'{"peft_type": "LORA"}'),
        "merge",
    ),
    "damaged tokenizer": (lambda home, folder: with_file(home, folder, "tokenizer.json", b"{}"), "tokenizer"),
    "a configuration nested too deeply": (
        lambda home, folder: with_file(home, folder, "config.json", b'{"a":' * 100_000),
        "config.json",
    ),
    "a quantisation that is a number": (
        lambda home, folder: edited(home, folder, quantization_config=4),
        "is quantised already (4): give the original",
    ),
    "whole numbers for weights": (lambda home, folder: as_type(home, folder, torch.int32), "stored as I32"),
    "yes and no for weights": (lambda home, folder: as_type(home, folder, torch.bool), "stored as BOOL"),
    "complex weights": (lambda home, folder: as_type(home, folder, torch.complex64), "stored as C64"),
    "a tokenizer for no position": (
        lambda home, folder: tokenizer(home, folder, model_max_length=0),
        "model_max_length",
    ),
    "a tokenizer for a number of positions in words": (
        lambda home, folder: tokenizer(home, folder, model_max_length="long"),
        "tokenizer",
    ),
    # data
    "no file": (("compress", "MODEL", "--data", "/no/such.txt", "-o", "OUT"), "no file at /no/such.txt"),
    "a folder": (("compress", "MODEL", "--data", "MODEL", "-o", "OUT"), "folder"),
    "a device": (("compress", "MODEL", "--data", "/dev/zero", "-o", "OUT"), "/dev/zero"),
    "an empty file": (lambda home, folder: data(folder, "x.txt", b""), "is empty"),
    "too few texts": (lambda home, folder: data(folder, "x.txt", b"word1\nword2\n"), "at least 8"),
    "zero bytes": (lambda home, folder: data(folder, "x.txt", b"\0\1\2" * 90), "x.txt"),
    "a pickle": (lambda home, folder: data(folder, "x.txt", b"\x80\x04\x95\x00\x00\x00"), "x.txt"),
    "a PDF": (lambda home, folder: data(folder, "x.txt", b"%PDF-1.7\n" + b"x" * 99), "PDF"),
    "a word processor's file": (lambda home, folder: archive(folder), "a.docx"),
    "JSON lines with a broken line": (lambda home, folder: data(folder, "x.jsonl", b'{"text": "word1"}\n{"text"\n'), "line 2"),
    "JSON lines without text": (lambda home, folder: data(folder, "x.jsonl", b'{"a": 1}\n' * 9), "x.jsonl"),
    "uneven rows": (lambda home, folder: data(folder, "x.csv", b"text,label\n" + b"word1, word2,1\n" * 9), "row 2"),
    "latin-1": (lambda home, folder: data(folder, "x.txt", b"caf\xe9\n" * 9), "UTF-8"),
    "a table without that column": (
        ("compress", "MODEL", "--data", "TABLE", "--column", "review", "-o", "OUT"),
        "no column 'review'",
    ),
    "a table without a column of texts": (("compress", "MODEL", "--data", "TABLE", "-o", "OUT"), "--column"),
    "numbers that are not finite": (lambda home, folder: array(folder, np.full((9, 3), np.nan)), "not finite"),
    "ids beyond the table": (lambda home, folder: array(folder, np.full((16, 3), 77)), "id 77"),
    "ids that are fractions": (lambda home, folder: array(folder, np.full((16, 3), 0.5)), "whole numbers"),
    "words in an array": (lambda home, folder: array(folder, np.array([["a"]] * 9)), "dtype"),
    # outputs
    "output below a file": (("compress", "MODEL", "--data", "TEXTS", "-o", "BELOW"), "texts.txt"),
    "output is the model": (("compress", "MODEL", "--data", "TEXTS", "-o", "MODEL"), "not from HPR"),
    "output is a file": (("compress", "MODEL", "--data", "TEXTS", "-o", "TEXTS"), "texts.txt"),
    "output in /proc": (("compress", "MODEL", "--data", "TEXTS", "-o", "/proc/x/y"), "/proc"),
    "profile over another file": (("profile", "MODEL", "--data", "TEXTS", "-o", "TEXTS"), "texts.txt"),
    "profile over a pipe": (("profile", "MODEL", "--data", "TEXTS", "-o", lambda home, folder: pipe(folder)), "pipe"),
    "profile over a link to nothing": (
        ("profile", "MODEL", "--data", "TEXTS", "-o", lambda home, folder: dangling(folder)),
        "link",
    ),
    "plan over another file": ((*PLAN[:-1], "TEXTS", "--budget", "90%"), "texts.txt"),
    "plan over a pipe": ((*PLAN[:-1], lambda home, folder: pipe(folder), "--budget", "90%"), "pipe"),
    "plan over a link to nothing": ((*PLAN[:-1], lambda home, folder: dangling(folder), "--budget", "90%"), "link"),
    # plans, profiles and reports
    "a pipe for a profile": (("plan", "MODEL", "--profile", lambda home, folder: pipe(folder), "-o", "OUT"), "pipe"),
    "no profile": (("plan", "MODEL", "--profile", "/no/such", "-o", "OUT"), "no profile at"),
    "a profile that is none": (("plan", "MODEL", "--profile", "TEXTS", "-o", "OUT"), "is no profile"),
    "a plan that is none": (("share", "MODEL", "--plan", "TEXTS", "-o", "OUT"), "plan"),
    "a plan of another format": (
        lambda home, folder: damaged_plan(home, folder, lambda plan: plan.update(format=99)),
        "format",
    ),
    "a plan of another model": (
        lambda home, folder: damaged_plan(home, folder, lambda plan: plan["model"].update(fingerprint="0")),
        "fingerprint",
    ),
    "a plan whose sites are a list": (
        lambda home, folder: damaged_plan(home, folder, lambda plan: plan.update(sites=[])),
        "plan",
    ),
    "a report of nothing": (("report", "MODEL"), "no plan.json"),
    "a plan with an unreadable budget": ((*PLAN, "--budget", "lots"), "no budget"),
    # healing
    "a duration in words": ((*COMPRESS, "--heal", "long"), "no amount of healing"),
    "no steps": ((*COMPRESS, "--heal", "0steps"), "no amount of healing"),
    "too many steps": ((*COMPRESS, "--heal", "9999999999999steps"), "give less"),
    "healing of a model that shares nothing": (
        ("heal", "MODEL", "--teacher", "MODEL", "--data", "TEXTS", "-o", "OUT"),
        "MODEL",
    ),
}


def tree(*folders):
    return {str(path): path.lstat().st_size for folder in folders for path in folder.rglob("*")}


@pytest.mark.parametrize("name", CASES)
def test_hostile_input_is_refused_in_words(home, tmp_path, name):
    arguments, message = CASES[name]
    if callable(arguments):
        made = arguments(home, tmp_path)
        if made.is_dir():
            arguments = ("compress", made, "--data", "TEXTS", "-o", "OUT")
        elif made.suffix == ".json" and "format" in made.read_text()[:2000]:
            arguments = ("share", "MODEL", "--plan", made, "--profile", "PROFILE", "-o", "OUT")
        else:
            arguments = ("compress", "MODEL", "--data", made, "-o", "OUT")
    places = {
        "MODEL": home / "model",
        "PROFILE": home / "profile.safetensors",
        "TEXTS": home / "texts.txt",
        "TABLE": home / "table.csv",
        "BELOW": home / "texts.txt" / "out",
        "OUT": tmp_path / "out",
    }
    words = [one(home, tmp_path) if callable(one) else places.get(one, one) for one in arguments]
    before = tree(home, tmp_path)
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "300"})
    said = " ".join(result.stderr.split())
    assert result.exit_code == 2, f"{result.exit_code}: {result.output[-600:]} {result.exception!r}"
    assert str(places.get(message, message)) in said
    assert "Traceback" not in result.output
    assert tree(home, tmp_path) == before


@pytest.mark.parametrize("budget", [0.5, None, b"50%", ["50%"], np.float32(50), -1])
def test_budgets_of_other_types_are_refused(home, budget):
    with pytest.raises(hpr.HprError):
        hpr.compress(home / "model", budget, home / "texts.txt")
