"""The scripts under runs/, end to end on tiny data: they start, they finish, and they say what they should."""

import gzip
import io
import json
import os
import subprocess
import sys
import wave
import zipfile
from pathlib import Path

import numpy as np
import pytest

from hpr.checkpoints.open import open_model

RUNS = Path(__file__).parents[2] / "runs"
WORDS = ["the layer reads", "a factor", "its text", "a layer writes the text"]


def said(script: str, *arguments: object) -> list[dict]:
    """The JSON lines that a script prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(RUNS / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]


def write_task(data: Path, task: str, times: int = 5) -> None:
    data.mkdir(parents=True)
    texts = list(enumerate(WORDS * times))
    if task == "sst2":
        for name in ("train", "dev", "test"):
            rows = "".join(f"{text}\t{number % 2}\n" for number, text in texts)
            (data / f"{name}.tsv").write_text(f"sentence\tlabel\n{rows}", encoding="utf-8")
    elif task == "mrpc":
        for name in ("train", "test"):
            rows = "".join(f"{number % 2}\t1\t2\t{text}\ta factor\n" for number, text in texts)
            (data / f"msr_paraphrase_{name}.txt").write_text(f"Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n{rows}")
    else:
        for name in ("train", "test"):
            rows = "".join(f"{text},a factor,{number % 6}\n" for number, text in texts)
            (data / f"stsb-en-{name}.csv").write_text(rows, encoding="utf-8")


@pytest.mark.parametrize("task", ["sst2", "mrpc"])
def test_glue(tmp_path, folder, task) -> None:
    data = tmp_path / "data"
    write_task(data, task)
    found = said("glue.py", task, folder, "--data", data, "--steps", 2, "--output", tmp_path / "out")
    (row,) = [one for one in found if "task" in one]
    assert row["steps"] == 2
    assert 0 <= row["test"] <= 1
    assert row["parameters"] > 0


def test_many_tasks(tmp_path, folder) -> None:
    for task in ("sst2", "mrpc", "sts-b"):
        write_task(tmp_path / "data" / task, task, times=80)
    rows = said("many_tasks.py", folder, "--original", folder, "--data", tmp_path / "data", "--steps", 8, 8, 8)
    assert [row["model"].split(",")[0] for row in rows[:-1]] == ["dense"] * 3 + ["shared body", "dense body"]
    sizes = [row["parameters"] for row in rows[:-1]]
    assert sizes[3] == sizes[0] + rows[-1]["a further task costs"]["mrpc"] + rows[-1]["a further task costs"]["sts-b"]
    assert all(-1 <= rows[3][task] <= 1 for task in ("sst2", "mrpc", "sts-b"))


def test_pretraining(tmp_path, folder) -> None:
    (tmp_path / "text.txt").write_text("".join(f"{word} {number}\n" for number in range(2000) for word in WORDS))
    shape = ("--minutes", 0.02, "--layers", 1, "--width", 64, "--batch", 4)
    (row,) = said("pretrain.py", tmp_path / "out", "--text", tmp_path / "text.txt", "--tokenizer", folder, *shape)
    assert row["steps"] > 0
    assert row["held_out"] > 0
    assert open_model(tmp_path / "out").objective == "masked-lm"


def test_digits(tmp_path) -> None:
    draw = np.random.default_rng(0)
    with zipfile.ZipFile(tmp_path / "recordings.zip", "w") as archive:
        for digit in range(10):
            for number in range(12):
                sound = io.BytesIO()
                with wave.open(sound, "wb") as file:
                    file.setparams((1, 2, 8000, 0, "NONE", ""))
                    file.writeframes((1000 * draw.normal(size=2000)).astype(np.int16).tobytes())
                archive.writestr(f"{digit}_one_{number}.wav", sound.getvalue())
    rows = said("digits.py", "--data", tmp_path / "recordings.zip", "--epochs", 1, "--seeds", 2)
    assert [row["model"] for row in rows] == ["apart", "shared", "shallow"]
    sizes = {row["model"]: row["trained"] for row in rows}
    assert sizes["shared"] < 0.5 * sizes["apart"]
    assert all(len(row["each"]) == 2 and row["spread"] is not None for row in rows)


def test_multi30k(tmp_path) -> None:
    for split, count in (("train", 40), ("val", 10), ("test_2016_flickr", 6)):
        for language in ("en", "de"):
            with gzip.open(tmp_path / f"{split}.{language}.gz", "wt", encoding="utf-8") as file:
                file.writelines(f"{WORDS[number % 4]} {language} {number}\n" for number in range(count))
    rows = said("multi30k.py", "--data", tmp_path, "--epochs", 1, "--output", tmp_path / "out", "apart", "shared")
    sizes = {row["model"]: row["parameters"] for row in rows if "bleu" in row and "model" in row}
    assert sizes["shared"] < sizes["apart"]
    assert [row["paired"] for row in rows if "paired" in row] == ["shared", "apart"]
    assert (tmp_path / "out" / "shared" / "model" / "model.safetensors").is_file()
    again = said("multi30k.py", "--data", tmp_path, "--output", tmp_path / "out", "apart", "shared")
    before, after = ([row["bleu"] for row in some if "paired" in row] for some in (rows, again))
    assert after == before
    assert not any("valid_loss" in row for row in again)
