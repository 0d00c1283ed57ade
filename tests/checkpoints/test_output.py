"""What saving will need is tried before the work, errors of the disk are said in words, and nothing half-written is left."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers as tf
from safetensors import SafetensorError
from torch import nn

import hpr
from hpr.checkpoints import save
from hpr.errors import CheckpointError
from hpr.plans.plan import Plan, is_plan
from hpr.runtime.files import check_file, write_text

Build = Callable[..., nn.Module]


@pytest.fixture
def unmeasured(monkeypatch):
    """Fails if data is read or a model profiled."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the work has begun")

    monkeypatch.setattr("hpr.pipeline.compress.prepare", never)
    monkeypatch.setattr("hpr.pipeline.coded.prepare", never)


def refused(model: object, output: Path | str, message: str, budget: str = "60%") -> None:
    with pytest.raises(CheckpointError, match=message):
        hpr.compress(model, budget, ["a text"], output)


@pytest.mark.parametrize("budget", ["60%", "1KB"])
def test_folders_that_cannot_be_written(build: Build, tmp_path: Path, unmeasured: None, budget: str) -> None:
    model = build("bert")
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    refused(model, tmp_path / "file", "file is a file: choose a folder", budget)
    refused(model, tmp_path / "file" / "below" / "out", r"out cannot be written .*give another path", budget)
    refused(model, "/proc/below/out", "/proc/below/out cannot be written", budget)
    refused(model, tmp_path / ("long" * 100), "cannot be written .*too long", budget)
    refused(model, 5, "the output folder is 5, a int: give a path", budget)
    refused(model, f"{tmp_path}/zero\0byte", "zero byte", budget)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text("[1]", encoding="utf-8")
    refused(model, tmp_path / "theirs", "content that is not from HPR", budget)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "theirs"]
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_a_folder_without_the_right_to_write(build: Build, tmp_path: Path, unmeasured: None, monkeypatch) -> None:
    def read_only(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", read_only)
    refused(build("bert"), tmp_path / "out", "out cannot be written .*Permission denied")


def test_a_disk_that_is_too_small(build: Build, tmp_path: Path, unmeasured: None, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    refused(build("bert"), tmp_path / "deep" / "out", r"out needs about [\d,]+ bytes, and its disk has 100 left")
    refused(build("bert"), tmp_path / "out", "out needs about 263,168 bytes", "1KiB")
    assert list(tmp_path.iterdir()) == []


def test_missing_parents_are_made_and_a_probe_leaves_none_of_them(build: Build, tmp_path: Path) -> None:
    save.check_output(build("bert"), tmp_path / "a" / "b" / "out")
    assert list(tmp_path.iterdir()) == []
    assert save.save(build("bert"), tmp_path / "a" / "b" / "out").is_dir()
    save.check_output(build("bert"), tmp_path / "a" / "b" / "out")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["out"]


class NoTokenizer:
    """Reads text, but cannot be saved."""


class BrokenTokenizer:
    def save_pretrained(self, folder: Path) -> None:
        raise ValueError("the vocabulary is lost")


@pytest.mark.parametrize("budget", ["60%", "1KB"])
@pytest.mark.parametrize(
    ("tokenizer", "message"), [(NoTokenizer(), "NoTokenizer, which cannot be saved"), (BrokenTokenizer(), "vocabulary is lost")]
)
def test_tokenizers_that_cannot_be_saved(build, tmp_path, unmeasured, tokenizer, message, budget) -> None:
    refused(hpr.open_model(build("bert"), tokenizer=tokenizer), tmp_path / "out", message, budget)


def test_configurations_that_cannot_be_saved(build: Build, tmp_path: Path, unmeasured: None) -> None:
    model = build("gpt2", tf.AutoModelForCausalLM)
    model.config.thing = object()
    refused(model, tmp_path / "out", r"the configuration \(GPT2Config\) cannot be saved .*JSON")
    model = build("gpt2", tf.AutoModelForCausalLM)
    model.generation_config.temperature = 0.3
    refused(model, tmp_path / "out", r"the generation configuration .*cannot be saved .*(?s:.)*temperature")


def test_ties_that_the_class_does_not_declare(build: Build, tmp_path: Path, unmeasured: None) -> None:
    model = build("bert")
    model.encoder.layer[1].output.dense.weight = model.encoder.layer[0].output.dense.weight
    refused(model, tmp_path / "out", r"tied weights that its class does not declare(?s:.)*_tied_weights_keys")


def test_pickled_modules_of_a_sentence_encoder(folder: Path, tmp_path: Path, unmeasured: None) -> None:
    types = ["Transformer", "Pooling", "Dense"]
    paths = ["", "1_Pooling", "2_Dense"]
    modules = [{"path": path, "type": f"sentence_transformers.models.{name}"} for path, name in zip(paths, types, strict=True)]
    for path in paths[1:]:
        (folder / path).mkdir()
        (folder / path / "config.json").write_text("{}", encoding="utf-8")
    (folder / "2_Dense" / "pytorch_model.bin").write_bytes(b"")
    write_text(folder / "modules.json", str(modules).replace("'", '"'))
    refused(folder, tmp_path / "out", "2_Dense has pickled weights")


def test_a_disk_that_fills_up_while_saving(build: Build, tmp_path: Path, monkeypatch) -> None:
    save.save(build("bert"), tmp_path / "old")
    before = {file.name: file.read_bytes() for file in (tmp_path / "old").iterdir()}

    def fills(self: nn.Module, folder: Path, **_: object) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(tf.PreTrainedModel, "save_pretrained", fills)
    for name in ("old", "new"):
        with pytest.raises(CheckpointError, match=f"{name} cannot be written .*No space left.*free space"):
            save.save(build("bert"), tmp_path / name)
    assert {file.name: file.read_bytes() for file in (tmp_path / "old").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_files_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"plan\.json cannot be written"):
        check_file(tmp_path / "file" / "plan.json", "a plan", is_plan)
    with pytest.raises(CheckpointError, match="is a folder: give the path of a file"):
        check_file(tmp_path, "a plan", is_plan)
    with pytest.raises(CheckpointError, match=r"plan\.json cannot be written"):
        write_text(tmp_path / "file" / "plan.json", "{}")
    check_file(tmp_path / "new" / "plan.json", "a plan", is_plan)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_command_line_says_it_at_once(build: Build, tmp_path: Path, monkeypatch) -> None:
    from typer.testing import CliRunner

    from hpr.cli.program import app

    monkeypatch.setattr("hpr.cli.commands.quiet", lambda: None)  # which sets up logging for good
    monkeypatch.setattr("hpr.checkpoints.open.open_model", lambda *_, **__: pytest.fail("a model was opened"))
    monkeypatch.setattr(Plan, "load", lambda path: pytest.fail("a plan was read"))
    (tmp_path / "file").write_text("", encoding="utf-8")
    for command in (["profile"], ["plan"], ["share"]):
        shown = CliRunner().invoke(app, [*command, str(tmp_path), "-o", str(tmp_path / "file" / "out")])
        assert (shown.exit_code, "cannot be written" in shown.output) == (2, True), command
