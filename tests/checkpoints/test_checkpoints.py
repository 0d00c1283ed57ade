"""Checkpoints: exact round trips, loading without hpr, damage, atomic folders."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from conftest import HEADS, low_rank_terms, plan_everything, plan_of
from hpr.anatomy.describe import describe
from hpr.anatomy.lookup import module_at
from hpr.checkpoints import load, quantizer, save
from hpr.checkpoints.side_files import copy_side_files
from hpr.errors import CheckpointError, HprError
from hpr.nn.bank import MEND, bank_of
from hpr.nn.site import SharedSite
from hpr.runtime import files
from hpr.sharing.share import share
from hpr.sharing.specification import NEEDS_HPR, is_specification
from hpr.sharing.unshare import unshare

Build = Callable[..., nn.Module]
pytestmark = pytest.mark.usefixtures("random_fit")


def shared(model: nn.Module) -> nn.Module:
    return share(model, plan_everything(model))


def outputs(model: nn.Module, ids: Tensor) -> Tensor:
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **more)[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def without_hpr(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a Python that has not imported hpr."""
    alone = os.environ | {"HPR_AUTOLOAD": "0"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, env=alone)


@pytest.mark.parametrize("family", HEADS)
@pytest.mark.parametrize("headed", [True, False])
def test_save_load_save_is_exact(build: Build, ids: Tensor, tmp_path: Path, family: str, headed: bool) -> None:
    head = HEADS[family] if headed else tf.AutoModel
    student = shared(build(family, head))
    student.save_pretrained(tmp_path / "first")
    loaded, report = head.from_pretrained(tmp_path / "first", output_loading_info=True)
    loaded.save_pretrained(tmp_path / "second")
    assert not any(report.values()), report
    assert torch.equal(outputs(loaded, ids), outputs(student, ids))
    assert contents(tmp_path / "second") == contents(tmp_path / "first")
    unique = sum(parameter.numel() for parameter in student.parameters())
    assert (tmp_path / "first" / "model.safetensors").stat().st_size <= 4 * unique + 64 * 1024
    assert sum(parameter.numel() for parameter in loaded.parameters()) == unique
    assert loaded.all_tied_weights_keys == student.all_tied_weights_keys
    torch.testing.assert_close(outputs(unshare(loaded), ids), outputs(student, ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", HEADS)
def test_a_loaded_model_is_an_ordinary_one(build: Build, ids: Tensor, tmp_path: Path, family: str) -> None:
    shared(build(family, HEADS[family])).save_pretrained(tmp_path)
    loaded = HEADS[family].from_pretrained(tmp_path)
    assert not getattr(loaded, "is_quantized", False)
    assert not hasattr(loaded, "hf_quantizer")
    assert not hasattr(loaded, "quantization_method")
    assert not hasattr(loaded.config, "_is_quantized")
    assert outputs(loaded.half(), ids).dtype == torch.float16
    assert outputs(loaded.to(torch.bfloat16), ids).dtype == torch.bfloat16
    for dtype in (torch.float16, torch.bfloat16):
        low = HEADS[family].from_pretrained(tmp_path, dtype=dtype)
        assert outputs(low, ids).dtype == dtype
        kept = {n for n, p in low.named_parameters() if p.dtype == torch.float32}
        assert kept == {n for n, _ in low.named_parameters() if family == "t5" and dtype == torch.float16 and "-WO:" in n}


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "bart"])
def test_base_and_head_classes_load_each_others_checkpoints(build: Build, ids: Tensor, tmp_path: Path, family: str) -> None:
    headed = shared(build(family, HEADS[family]))
    headed.save_pretrained(tmp_path / "head")
    base = tf.AutoModel.from_pretrained(tmp_path / "head")
    inner = getattr(headed, headed.base_model_prefix)
    if family != "bert":  # a pooler of its own, new
        assert torch.equal(outputs(base, ids), outputs(inner, ids))
    factors = bank_of(headed).factors.state_dict()
    assert all(torch.equal(value, factors[key]) for key, value in bank_of(base).factors.state_dict().items())
    base.save_pretrained(tmp_path / "base")
    again, report = HEADS[family].from_pretrained(tmp_path / "base", output_loading_info=True)
    assert sum(isinstance(module, SharedSite) for module in again.modules()) >= sum(
        isinstance(module, SharedSite) for module in base.modules()
    )
    if family in ("gpt2", "llama"):  # all but the tied head came with the base: it is tied again, to the factors
        assert not report["missing_keys"] - {"lm_head.weight"}
        assert torch.equal(outputs(again, ids), outputs(headed, ids))


def test_classification_head_on_a_base_checkpoint_and_back(build: Build, tmp_path: Path, ids: Tensor) -> None:
    base = shared(build("bert"))
    base.save_pretrained(tmp_path / "base")
    headed, report = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert report["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert torch.equal(outputs(headed.bert, ids), outputs(base, ids))
    headed.save_pretrained(tmp_path / "head")
    back = tf.AutoModel.from_pretrained(tmp_path / "head")
    assert torch.equal(outputs(back, ids), outputs(base, ids))


def test_an_encoder_alone_takes_its_factors_only(build: Build, tmp_path: Path, ids: Tensor) -> None:
    student = shared(build("t5", HEADS["t5"]))
    student.save_pretrained(tmp_path / "whole")
    encoder = tf.T5EncoderModel.from_pretrained(tmp_path / "whole").eval()
    with torch.no_grad():
        assert torch.equal(encoder(input_ids=ids)[0], student.encoder(input_ids=ids)[0])
    assert not any(key.startswith("DECODER") for key in bank_of(encoder).factors)
    encoder.save_pretrained(tmp_path / "encoder")
    with torch.no_grad():
        assert torch.equal(tf.T5EncoderModel.from_pretrained(tmp_path / "encoder")(input_ids=ids)[0], encoder(input_ids=ids)[0])


def test_a_shared_task_head_is_skipped_by_the_base_class(build: Build, tmp_path: Path) -> None:
    model = build("bert", tf.AutoModelForSequenceClassification)
    name = "encoder.layer.0.output.dense"
    student = share(
        model, plan_of(describe(model), {"classifier": low_rank_terms("classifier", 1), name: low_rank_terms(name)})
    )
    student.save_pretrained(tmp_path / "head")
    base = tf.AutoModel.from_pretrained(tmp_path / "head")
    assert list(base.config.quantization_config["sites"]) == ["encoder.layer.0.output.dense"]
    base.save_pretrained(tmp_path / "base")
    assert not any("classifier" in key for key in load_file(tmp_path / "base" / "model.safetensors"))
    tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")  # its classifier is a new dense one


def test_minilm_through_every_class(minilm: Path, tmp_path: Path) -> None:
    sentence = pytest.importorskip("sentence_transformers")
    model = tf.AutoModel.from_pretrained(minilm)
    student = share(model, plan_everything(model, rank=32))
    tokenizer = tf.AutoTokenizer.from_pretrained(minilm)
    fresh = tf.AutoTokenizer.from_pretrained(minilm)  # batching leaves traces in what a tokenizer saves
    out = save.save(student, tmp_path / "out", fresh, {"plan.json": "{}"}, source=minilm)
    batch = tokenizer(["A small model.", "Layers may reuse one another's parameters."], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = student(**batch).last_hidden_state
        assert torch.equal(tf.AutoModel.from_pretrained(out)(**batch).last_hidden_state, expected)
        assert tf.AutoModelForSequenceClassification.from_pretrained(out)(**batch).logits.shape == (2, 2)
        encoder = sentence.SentenceTransformer(str(out))
        mask = batch["attention_mask"].unsqueeze(-1)
        pooled = nn.functional.normalize((expected * mask).sum(1) / mask.sum(1))
    vectors = encoder.encode(["A small model.", "Layers may reuse one another's parameters."], convert_to_tensor=True)
    torch.testing.assert_close(vectors.cpu(), pooled, rtol=1e-4, atol=1e-5)
    save.save(tf.AutoModel.from_pretrained(out), tmp_path / "again", fresh, {"plan.json": "{}"}, source=minilm)
    assert contents(tmp_path / "again") == contents(out)
    encoder.save_pretrained(str(tmp_path / "sentence"))
    written, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "sentence", out))
    assert written.keys() == expected.keys()  # transformers orders them otherwise
    assert all(torch.equal(value, expected[name]) for name, value in written.items())


def test_trainer_trains_a_loaded_model(build: Build, tmp_path: Path, ids: Tensor) -> None:
    pytest.importorskip("accelerate")
    shared(build("gpt2", HEADS["gpt2"])).save_pretrained(tmp_path / "model")
    model = HEADS["gpt2"].from_pretrained(tmp_path / "model")
    before = outputs(model, ids)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    settings = tf.TrainingArguments(str(tmp_path / "run"), max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = tf.Trainer(model, settings, train_dataset=rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    trainer.save_model(str(tmp_path / "trained"))
    model.eval()
    assert not torch.equal(outputs(model, ids), before)
    assert torch.equal(outputs(HEADS["gpt2"].from_pretrained(tmp_path / "trained"), ids), outputs(model, ids))


def test_a_state_dict_can_be_passed(build: Build, tmp_path: Path, ids: Tensor) -> None:
    student = shared(build("bert"))
    student.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    config = tf.AutoConfig.from_pretrained(tmp_path)
    loaded = tf.BertModel.from_pretrained(None, config=config, state_dict=weights)
    assert torch.equal(outputs(loaded, ids), outputs(student, ids))
    key = next(key for key in weights if "hpr_bank.factors" in key)
    del weights[key]
    with pytest.raises(HprError, match="was not in the weights"):
        tf.BertModel.from_pretrained(None, config=tf.AutoConfig.from_pretrained(tmp_path), state_dict=weights)


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_loading_without_hpr_fails_and_says_the_mend(build: Build, tmp_path: Path, family: str) -> None:
    shared(build(family, HEADS[family])).save_pretrained(tmp_path)
    done = without_hpr(f"import transformers; transformers.{HEADS[family].__name__}.from_pretrained({str(tmp_path)!r})")
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1].endswith(NEEDS_HPR)
    assert "pip install hpr" in NEEDS_HPR


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_a_loader_that_ignores_the_configuration_fails_without_hpr_too(build: Build, tmp_path: Path, family: str) -> None:
    shared(build(family, HEADS[family])).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["fusion_config"], config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = without_hpr(f"import transformers; transformers.{HEADS[family].__name__}.from_pretrained({str(tmp_path)!r})")
    assert done.returncode != 0
    assert "RuntimeError" in done.stderr
    assert MEND in done.stderr
    assert "import hpr" in MEND


@pytest.mark.parametrize("family", HEADS)
def test_unshared_checkpoints_need_no_hpr(build: Build, ids: Tensor, tmp_path: Path, family: str) -> None:
    dense = unshare(shared(build(family, HEADS[family])))
    dense.save_pretrained(tmp_path / "dense")
    torch.save((ids, outputs(dense, ids)), tmp_path / "expected.pt")
    more = "{'decoder_input_ids': ids}" if dense.config.is_encoder_decoder else "{}"
    done = without_hpr(
        f"import sys, torch, transformers\n"
        f"model, info = transformers.{HEADS[family].__name__}.from_pretrained({str(tmp_path / 'dense')!r}, "
        f"output_loading_info=True)\n"
        f"ids, expected = torch.load({str(tmp_path / 'expected.pt')!r})\n"
        f"assert 'hpr' not in sys.modules and not any(info.values()), info\n"
        f"with torch.no_grad():\n"
        f"    assert torch.equal(model(input_ids=ids, **{more})[0], expected)\n"
    )
    assert done.returncode == 0, done.stderr
    assert "hpr" not in (tmp_path / "dense" / "config.json").read_text()
    build(family, HEADS[family]).save_pretrained(tmp_path / "original")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("dense", "original")]
    assert abs(sizes[0] - sizes[1]) < 64


def damaged(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_damaged_checkpoints_are_named(build: Build, tmp_path: Path) -> None:
    shared(build("bert")).save_pretrained(tmp_path / "good")
    key = "hpr_bank.factors.ENCODER-LAYER-1-OUTPUT-DENSE:U.weight"

    def copy(name: str) -> Path:
        return Path(shutil.copytree(tmp_path / "good", tmp_path / name))

    folder = copy("truncated")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(HprError, match=r"model\.safetensors is damaged"):
        tf.AutoModel.from_pretrained(folder)

    folder = copy("missing")
    damaged(folder, lambda weights: weights.pop(key))
    with pytest.raises(HprError, match=r"ENCODER-LAYER-1-OUTPUT-DENSE:U\.weight is missing in"):
        tf.AutoModel.from_pretrained(folder)
    with pytest.raises(HprError, match=r"ENCODER-LAYER-1-OUTPUT-DENSE:U\.weight is missing in"):
        tf.AutoModelForSequenceClassification.from_pretrained(folder)

    folder = copy("shape")
    damaged(folder, lambda weights: weights.update({key: torch.zeros(16, 4)}))
    with pytest.raises(HprError, match=r"ENCODER-LAYER-1-OUTPUT-DENSE:U\.weight has shape \(16, 4\)"):
        tf.AutoModel.from_pretrained(folder)


def test_damaged_configurations_are_named(build: Build, tmp_path: Path) -> None:
    shared(build("bert")).save_pretrained(tmp_path)
    original = json.loads((tmp_path / "config.json").read_text())

    def load_with(change: Callable[[dict], object]) -> None:
        config = json.loads(json.dumps(original))
        change(config["quantization_config"])
        (tmp_path / "config.json").write_text(json.dumps(config))
        tf.AutoModel.from_pretrained(tmp_path)

    site = "encoder.layer.1.output.dense"
    with pytest.raises(HprError, match="format 99"):
        load_with(lambda spec: spec.update(format=99))
    with pytest.raises(HprError, match="'colour'"):
        load_with(lambda spec: spec.update(colour="red"))
    with pytest.raises(HprError, match=r"no shape for factor 'encoder\.layer\.1\.output\.dense:u'"):
        load_with(lambda spec: spec["factors"].pop("encoder.layer.1.output.dense:u"))
    with pytest.raises(HprError, match=rf"{site} needs factor"):
        load_with(lambda spec: spec["sites"][site][0].update(rank=2))
    with pytest.raises(HprError, match="does not describe"):
        load_with(lambda spec: spec["sites"].update({site: [7]}))


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 4)
        self.inner = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.inner(self.table(ids)))


@pytest.mark.parametrize("sites", [["table", "inner.0"], ["inner.0"], []])
def test_plain_modules(tmp_path: Path, sites: list[str]) -> None:
    model, ids = Toy(), torch.arange(8)
    student = share(model, plan_of(describe(model), {name: low_rank_terms(name, 2) for name in sites}))
    out = save.save(student, tmp_path / "out", files={"plan.json": "{}"})
    loaded = load.load(Toy(), out)
    assert torch.equal(loaded(ids), student(ids))
    save.save(loaded, tmp_path / "again", files={"plan.json": "{}"})
    assert contents(tmp_path / "again") == contents(out)
    stored = load_file(out / files.WEIGHTS)
    assert len({"head.weight", "table.weight"} & set(stored)) == 1  # tied: once

    if sites:
        with pytest.raises(HprError, match="no module"):
            module_at(nn.Linear(2, 2), sites[0])
    damaged(out, lambda weights: weights.pop("inner.2.bias"))
    with pytest.raises(HprError, match=r"(?s)does not fit this Toy.*inner\.2\.bias"):
        load.load(Toy(), out)
    (out / files.WEIGHTS).write_bytes(b"short")
    with pytest.raises(HprError, match="damaged"):
        load.load(Toy(), out)
    (out / files.CONFIG).unlink()
    with pytest.raises(HprError, match="a folder that hpr wrote"):
        load.load(Toy(), out)


def test_other_quantisations_are_left_to_their_tools(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(HprError, match="another quantisation"):
        load.load(Toy(), tmp_path)


def test_save_refuses_foreign_folders_and_replaces_its_own(build: Build, tmp_path: Path) -> None:
    student, out = shared(build("bert")), tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(HprError, match="choose another output folder"):
        save.save(student, out)
    assert [file.name for file in out.iterdir()] == ["thesis.txt"]
    (out / "thesis.txt").unlink()

    save.save(student, out, files={"metrics.json": "{}", "README.md": "first"})
    (out / "notes.txt").write_text("mine")
    (out / "model-00001-of-00002.safetensors").write_text("stale")
    save.save(student, out, files={"README.md": "second"})
    names = sorted(file.name for file in out.iterdir())
    assert names == ["README.md", "config.json", "model.safetensors", "notes.txt"]
    assert (out / "README.md").read_text() == "second"
    assert is_specification(json.loads((out / "config.json").read_text())["quantization_config"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]

    kept = share(build("bert"), plan_of(describe(build("bert")), {}))  # an identity plan's output is HPR's too
    for _ in range(2):
        save.save(kept, tmp_path / "kept", files={"plan.json": "{}"})


def test_a_failed_save_leaves_the_old_folder(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student, out = shared(build("bert")), tmp_path / "out"
    save.save(student, out, files={"README.md": "first"})
    before = contents(out)

    class Broken:
        def save_pretrained(self, folder: Path) -> None:
            raise OSError("disk full")

    with pytest.raises(CheckpointError, match=r"out cannot be written .*disk full"):
        save.save(student, out, Broken(), {"README.md": "second"})
    assert contents(out) == before

    rename = Path.rename

    def fails_at_the_end(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError("lost the disk")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_at_the_end)
    with pytest.raises(CheckpointError, match=r"out cannot be written .*lost the disk"):
        save.save(student, out, files={"README.md": "second"})
    assert contents(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_sentence_files_from_older_layouts(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for folder in (source / "0_Transformer", source / "1_Pooling", source / "2_Dense", target):
        folder.mkdir(parents=True)
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{path[2:]}"}
        for i, path in enumerate(["0_Transformer", "1_Pooling", "2_Dense"])
    ]
    (source / "modules.json").write_text(json.dumps(modules))
    (source / "0_Transformer" / "sentence_bert_config.json").write_text("{}")
    (source / "1_Pooling" / "config.json").write_text("{}")
    (source / "2_Dense" / "pytorch_model.bin").write_text("")
    with pytest.raises(HprError, match="pickled"):
        copy_side_files(source, target, None)
    (source / "2_Dense" / "model.safetensors").write_text("")
    copy_side_files(source, target, None)
    assert sorted(contents(target)) == [
        "1_Pooling/config.json",
        "2_Dense/model.safetensors",
        "modules.json",
        "sentence_bert_config.json",
    ]
    assert json.loads((target / "modules.json").read_text())[0]["path"] == ""


def test_registering_twice_is_harmless() -> None:
    quantizer.register()
    quantizer.register()


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert save.sha256(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_weights_of_others_are_never_replaced(build: Build, tmp_path: Path) -> None:
    """Not even if a plan lies beside them: ``hpr plan m -o m/plan.json``, then ``hpr share m -o m``."""
    model, folder = build("bert"), tmp_path / "m"
    model.save_pretrained(folder)
    plan_everything(model).save(folder / "plan.json")
    (folder / "README.md").write_text("theirs")
    before = contents(folder)
    with pytest.raises(CheckpointError, match="weights that HPR did not write: choose another output folder"):
        save.save(shared(model), folder)
    assert contents(folder) == before


def test_unshared_models_that_hpr_wrote_are_replaced_until_their_weights_change(build: Build, tmp_path: Path) -> None:
    model, folder = build("bert"), tmp_path / "m"
    save.save(model, folder, files={"README.md": "first"})
    save.save(model, folder, files={"README.md": "second"})
    assert (folder / "README.md").read_text() == "second"
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(folder)  # by somebody else
    before = contents(folder)
    with pytest.raises(CheckpointError, match="choose another output folder"):
        save.save(model, folder)
    assert contents(folder) == before
    shutil.rmtree(folder)
    save.save(model, folder)
    save.save(shared(model), folder)
    assert files.MARKER not in {file.name for file in folder.iterdir()}


ABOVE = ("operators", "profiling", "reporting", "healing", "planning", "evaluation", "pipeline", "data", "cli")
LOADED = f"sorted(name for name in sys.modules if name.startswith({tuple(f'hpr.{room}' for room in ABOVE)!r}))"


def test_the_code_that_loads_imports_nothing_that_compresses() -> None:
    package = str(Path(save.__file__).parent.parent)
    bare = f"import sys, types; sys.modules['hpr'] = package = types.ModuleType('hpr'); package.__path__ = [{package!r}]"
    run = without_hpr(
        f"{bare}\nimport hpr.checkpoints.quantizer, hpr.checkpoints.load\nprint({LOADED}, 'networkx' in sys.modules)"
    )
    assert run.stdout.strip() == "[] False", run.stderr


def test_loading_a_folder_imports_nothing_that_compresses(build: Build, tmp_path: Path) -> None:
    save.save(shared(build("bert")), tmp_path / "m")
    load_it = f"import hpr, sys; from transformers import AutoModel; AutoModel.from_pretrained({str(tmp_path / 'm')!r})"
    run = without_hpr(f"{load_it}; print({LOADED}, 'networkx' in sys.modules)")
    assert run.stdout.strip() == "[] False", run.stderr


def test_lack_of_memory_is_no_checkpoint_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = save.save(nn.Linear(2, 2), tmp_path / "out")
    monkeypatch.setattr(load, "load_model", lambda *_, **__: torch.empty(1 << 50))
    with pytest.raises(RuntimeError, match="memory"):
        load.load(nn.Linear(2, 2), out)


@pytest.mark.parametrize("said", ["CUDA out of memory. Tried to allocate 2 GiB", "CUDA error: device-side assert triggered"])
def test_a_device_that_fails_inside_load_state_dict_is_no_checkpoint_that_does_not_fit(
    said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = save.save(nn.Linear(2, 2), tmp_path / "out")
    fresh = nn.Linear(2, 2)

    def fails(self: Tensor, *_: object, **__: object) -> Tensor:
        raise torch.OutOfMemoryError(said)

    monkeypatch.setattr(torch.Tensor, "copy_", fails)
    with pytest.raises(RuntimeError, match=said[:10]):  # torch wraps the error, and only its text is left
        load.load(fresh, out)
