"""Shared factors stay mapped from the file: it is laid out so that tensors begin where torch would allocate them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import hpr
from conftest import low_rank_terms, plan_of
from hpr.anatomy.describe import describe
from hpr.checkpoints.aligned import ALIGNMENT, align_file
from hpr.nn.bank import bank_of


def places(path: Path) -> dict[str, int]:
    """Tensor → its place in the file, in bytes."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header: dict[str, Any] = json.loads(raw[8 : 8 + length])
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def test_the_content_stays_and_small_tensors_fill_gaps(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {f"odd{size}": torch.randn(size, generator=draw) for size in (17, 33, 21, 100, 1001)}
    tensors |= {f"whole{size}": torch.randn(size, 16, generator=draw) for size in (3, 5)}
    tensors |= {f"one{index}": torch.randn(1, generator=draw) for index in range(60)}
    tensors |= {"half": torch.randn(333, generator=draw).half(), "byte": torch.arange(77, dtype=torch.uint8)}
    tensors |= {"long": torch.arange(13), "none": torch.empty(0, 4), "number": torch.tensor(3.0)}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "a": "ä"})
    before = path.stat()
    align_file(path)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in tensors.items())
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "a": "ä"}
    assert path.stat().st_mode == before.st_mode
    starts = places(path)
    large = [name for name, value in tensors.items() if value.element_size() == 4 and value.nbytes >= ALIGNMENT]
    assert all(starts[name] % ALIGNMENT == 0 for name in large)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def saved(model: nn.Module, folder: Path) -> Path:
    sites = [f"encoder.layer.{layer}.{slot}" for layer in range(3) for slot in ("intermediate.dense", "output.dense")]
    student = hpr.share(model, plan_of(describe(model), {site: low_rank_terms(site, 3, identity="u") for site in sites}))
    return hpr.save(student, folder)


@pytest.mark.usefixtures("random_fit")
def test_loaded_factors_lie_in_the_file(bert: nn.Module, tmp_path: Path) -> None:
    loaded = tf.AutoModel.from_pretrained(saved(bert, tmp_path / "out"))
    factors = [factor.weight for factor in bank_of(loaded).factors.values()]  # type: ignore[union-attr]
    assert any(weight.nbytes % ALIGNMENT for weight in factors)
    assert all(weight.data_ptr() % ALIGNMENT == 0 for weight in loaded.parameters())
    if not Path("/proc/self/maps").exists():
        pytest.skip("only Linux tells what lies where in memory")
    spans = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    ranges = [range(int(start, 16), int(stop, 16)) for start, stop in spans]
    mapped = [weight for weight in loaded.parameters() if any(weight.data_ptr() in one for one in ranges)]
    assert sum(weight.nbytes for weight in mapped) > 0.9 * sum(weight.nbytes for weight in loaded.parameters())


@pytest.mark.usefixtures("random_fit")
def test_what_is_written_into_mapped_weights_stays_in_the_process(bert: nn.Module, tmp_path: Path) -> None:
    path = saved(bert, tmp_path / "out") / "model.safetensors"
    before, loaded = path.read_bytes(), tf.AutoModel.from_pretrained(path.parent)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(1)
    assert path.read_bytes() == before
    again = tf.AutoModel.from_pretrained(path.parent)
    assert not any(
        torch.equal(one, other) for one, other in zip(loaded.parameters(), again.parameters(), strict=True) if one.numel()
    )
