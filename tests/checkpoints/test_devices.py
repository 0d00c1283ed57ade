"""Checkpoints whose weights are divided over devices, or kept on disk: outputs are those of the model in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from safetensors.torch import load_file
from torch import Tensor, nn

import hpr
from conftest import HEADS, inputs_of, plan_everything
from hpr.anatomy.describe import describe
from hpr.anatomy.lookup import base_of
from hpr.checkpoints.devices import check_devices
from hpr.errors import CheckpointError
from hpr.nn.bank import BANK, parameters
from hpr.plans.terms import factors_of

Build = Callable[..., nn.Module]
pytestmark = pytest.mark.usefixtures("random_fit")


def outputs(model: nn.Module, family: str, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(**inputs_of(family, ids)).logits


@pytest.fixture(params=["shared", "coded"])
def save(request: pytest.FixtureRequest, build: Build, ids: Tensor, tmp_path: Path) -> Callable[[str], nn.Module]:
    """``save("bert")``: write a shared or coded model to ``tmp_path / "out"`` and return it as it is loaded."""

    def made(family: str) -> nn.Module:
        model = build(family, HEADS[family])
        if request.param == "coded":
            profile = hpr.profile(model, [inputs_of(family, ids)])
            student = hpr.share(model, hpr.plan(model, profile, "60%bytes"), profile)
        else:
            student = hpr.share(model, plan_everything(model))
        hpr.save(student, tmp_path / "out")
        return HEADS[family].from_pretrained(tmp_path / "out")

    return made


def maps(model: nn.Module) -> list[dict[str, str]]:
    """Everything on disk; each part of the base model on disk, and each part alone in memory.

    Without those that put tied weights in different places: stock models cannot be divided so.
    """
    base, prefix = base_of(model)
    parts = [f"{prefix}{name}" for name, _ in base.named_children()]
    heads = [name for name, child in model.named_children() if prefix and child is not base]
    everywhere = [*parts, *heads, *(name for name, _ in model.named_buffers(recurse=False))]
    found = [
        {"": "disk"},
        *({name: "disk" if name == part else "cpu" for name in everywhere} for part in parts),
        *({name: "cpu" if name == part else "disk" for name in everywhere} for part in parts),
    ]
    ties = [[*pair] for pair in model.all_tied_weights_keys.items()]
    return [places for places in found if all(len({_place(places, key) for key in pair}) == 1 for pair in ties)]


def _place(places: dict[str, str], key: str) -> str:
    return next(place for name, place in places.items() if key.startswith(name))


@pytest.mark.parametrize("family", ["bert", "gpt2", "bart"])
def test_outputs_are_the_same_wherever_weights_lie(
    family: str, save: Callable[[str], nn.Module], ids: Tensor, tmp_path: Path
) -> None:
    loaded = save(family)
    expected = outputs(loaded, family, ids)
    for number, places in enumerate(maps(loaded)):
        folder = tmp_path / str(number)
        divided = HEADS[family].from_pretrained(tmp_path / "out", device_map=places, offload_folder=folder)
        torch.testing.assert_close(outputs(divided, family, ids), expected, msg=str(places))
    split = HEADS[family].from_pretrained(
        tmp_path / "out", device_map="auto", max_memory={"cpu": 12_000}, offload_folder=tmp_path / "auto"
    )
    torch.testing.assert_close(outputs(split, family, ids), expected)
    on_processor = cpu_offload(HEADS[family].from_pretrained(tmp_path / "out"), torch.device("cpu"))
    torch.testing.assert_close(outputs(on_processor, family, ids), expected)
    on_disk = disk_offload(HEADS[family].from_pretrained(tmp_path / "out"), tmp_path / "disk", torch.device("cpu"))
    torch.testing.assert_close(outputs(on_disk, family, ids), expected)


def test_a_shared_model_on_disk_saves_what_it_was_loaded_from(build: Build, tmp_path: Path) -> None:
    hpr.share(model := build("bert", HEADS["bert"]), plan_everything(model)).save_pretrained(tmp_path / "out")
    divided = HEADS["bert"].from_pretrained(tmp_path / "out", device_map={"": "disk"}, offload_folder=tmp_path / "disk")
    divided.save_pretrained(tmp_path / "again")
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    names = ("out", "again")
    assert len({(tmp_path / name / "config.json").read_text(encoding="utf-8") for name in names}) == 1


def test_several_devices_that_compute_are_refused_with_the_mend() -> None:
    check_devices({"embeddings": "cuda:0", "encoder": "cuda:0", BANK: "cpu", "pooler": "disk"})
    with pytest.raises(CheckpointError, match=r"cuda:0, cuda:1 cannot share factors: .* hpr\.unshare"):
        check_devices({"embeddings": "cuda:0", "encoder": "cuda:1"})


@pytest.mark.parametrize("family", HEADS)
def test_parameters_are_counted_with_and_without_tables(family: str, build: Build) -> None:
    model = build(family, HEADS[family])
    student = hpr.share(model, plan_everything(model))
    assert student.num_parameters() == parameters(student)
    tables = [site.name for site in describe(model).sites if site.kind == "embedding"]
    read = {name for path in tables for name in factors_of(plan_everything(model).entries[path].terms)}
    plan_shapes = plan_everything(model).factors(describe(model))
    without = parameters(student) - sum(plan_shapes[name].parameters for name in read)
    assert student.num_parameters(exclude_embeddings=True) == without
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    assert student.num_parameters(only_trainable=True, exclude_embeddings=True) == 0
    assert hpr.unshare(student).num_parameters(exclude_embeddings=True) == model.num_parameters(exclude_embeddings=True)
