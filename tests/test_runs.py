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

from test_models import folder  # noqa: F401  a fixture

RUNS = Path(__file__).parents[1] / "runs"
WORDS = ["the layer reads", "a factor", "its text", "a layer writes the text"]


def said(script: str, *arguments: object) -> list[dict]:
    """The JSON lines that a script prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(RUNS / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]


@pytest.mark.parametrize("task", ["sst2", "mrpc"])
def test_glue(tmp_path, folder, task) -> None:  # noqa: F811
    data = tmp_path / "data"
    data.mkdir()
    if task == "sst2":
        for name in ("train", "dev", "test"):
            rows = "".join(f"{text}\t{number % 2}\n" for number, text in enumerate(WORDS * 5))
            (data / f"{name}.tsv").write_text(f"sentence\tlabel\n{rows}", encoding="utf-8")
    else:
        for name in ("train", "test"):
            rows = "".join(f"{number % 2}\t1\t2\t{text}\ta factor\n" for number, text in enumerate(WORDS * 5))
            (data / f"msr_paraphrase_{name}.txt").write_text(f"Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n{rows}")
    found = said("glue.py", task, folder, "--data", data, "--steps", 2, "--output", tmp_path / "out")
    (row,) = [one for one in found if "task" in one]
    assert row["steps"] == 2
    assert 0 <= row["test"] <= 1
    assert row["parameters"] > 0


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
