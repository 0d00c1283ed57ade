"""Folded models: plain Linears with the usual names, which compute, save and load as their student, and serve other tools."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import hpr
from conftest import HEADS, inputs_of, low_rank_terms, plan_everything, plan_of
from hpr.anatomy.describe import describe
from hpr.errors import CheckpointError, HprError
from hpr.nn.bank import bank_of, parameters
from hpr.nn.folded import folded_in
from hpr.nn.site import BankReader
from hpr.plans.layer_states import DROPPED
from hpr.plans.terms import Term
from hpr.sharing.fold import balanced
from hpr.sharing.specification import NEEDS_HPR

Build = Callable[..., nn.Module]
pytestmark = pytest.mark.usefixtures("random_fit")


def outputs(model: nn.Module, family: str, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(**inputs_of(family, ids))[0]


@pytest.mark.parametrize("headed", [True, False])
@pytest.mark.parametrize("family", HEADS)
def test_a_folded_model_computes_saves_and_loads_as_its_student(
    family: str, headed: bool, build: Build, ids: Tensor, tmp_path: Path
) -> None:
    head = HEADS[family] if headed else tf.AutoModel
    model = build(family, head)
    student = hpr.share(model, plan_everything(model))
    before = {key: value.clone() for key, value in student.state_dict().items()}
    plain = hpr.fold(student)
    assert all(torch.equal(before[key], value) for key, value in student.state_dict().items())
    assert bank_of(plain) is None
    assert not any(isinstance(module, BankReader) for module in plain.modules())
    assert len(folded_in(plain)) > 6
    torch.testing.assert_close(outputs(plain, family, ids), outputs(student, family, ids), rtol=1e-4, atol=1e-5)
    plain.save_pretrained(tmp_path / "first")
    loaded, report = head.from_pretrained(tmp_path / "first", output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(outputs(loaded, family, ids), outputs(plain, family, ids))
    hpr.save(loaded, tmp_path / "second")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert NEEDS_HPR in (tmp_path / "first" / "config.json").read_text(encoding="utf-8")


def test_a_linear_is_found_by_the_usual_name(bert: nn.Module) -> None:
    plain = hpr.fold(hpr.share(bert, plan_everything(bert)))
    named = dict(plain.named_modules())
    for usual in ("query", "key", "value", "dense"):
        found = [module for name, module in named.items() if name.endswith(f".{usual}")]
        assert found
        assert all(type(module) is nn.Linear for module in found)
    assert plain.encoder.layer[0].attention.self.query is plain.get_submodule("encoder.layer.0.attention.self.query")
    copied = copy.deepcopy(plain)
    assert [name for name, _ in copied.named_modules()] == list(named)


def test_linears_are_dense_where_two_would_hold_more(bert: nn.Module, ids: Tensor) -> None:
    sites = [site.name for site in describe(bert).sites if site.name.endswith("attention.self.query")]
    several = (*low_rank_terms("a", 2, row_scale="r"), *low_rank_terms("b", 3, column_scale="c"))
    plan = plan_of(
        describe(bert),
        {
            sites[0]: several,
            sites[1]: (Term(f"{sites[1]}:whole"),),
            sites[2]: (*low_rank_terms("low", 2, rows=(0, 9)), *low_rank_terms("high", 2, rows=(9, 16))),
        },
    )
    student = hpr.share(bert, plan)
    plain = hpr.fold(student)
    assert {path: module.rank for path, module in folded_in(plain).items()} == {sites[0]: 5}
    assert type(plain.get_submodule(sites[1])) is type(plain.get_submodule(sites[2])) is nn.Linear
    torch.testing.assert_close(outputs(plain, "bert", ids), outputs(student, "bert", ids), rtol=1e-4, atol=1e-5)


def test_a_product_is_balanced_and_stays_what_it_is() -> None:
    draw = torch.Generator().manual_seed(0)
    inner = torch.randn(3, 7, generator=draw, dtype=torch.float64) * torch.tensor([[100.0], [1.0], [0.01]])
    outer = torch.randn(9, 3, generator=draw, dtype=torch.float64)
    first, second = balanced(inner, outer)
    torch.testing.assert_close(second @ first, outer @ inner)
    torch.testing.assert_close(first.norm(dim=1), second.norm(dim=0))
    torch.testing.assert_close(first @ first.T, second.T @ second)


def test_plain_modules_are_folded_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3)))
    plain = hpr.fold(hpr.share(model, plan_everything(model)))
    assert len(folded_in(plain)) == 3
    hpr.save(plain, tmp_path / "out")
    loaded = hpr.load(copy.deepcopy(model), tmp_path / "out")
    x = torch.randn(4, 16)
    assert torch.equal(loaded(x), plain(x))
    assert hpr.describe(plain).total_parameters == parameters(plain)


def test_models_that_share_nothing_are_copied(bert: nn.Module, ids: Tensor) -> None:
    plain = hpr.fold(bert)
    assert plain is not bert
    assert not hasattr(plain.config, "quantization_config")
    assert torch.equal(outputs(plain, "bert", ids), outputs(bert, "bert", ids))


def test_layers_without_stock_weights_are_refused(bert: nn.Module) -> None:
    plan = plan_everything(bert)
    student = hpr.share(bert, plan)
    bank = bank_of(student)
    assert bank is not None
    bank.layers = {"encoder.layer.1": DROPPED}
    with pytest.raises(HprError, match=r"encoder\.layer\.1"):
        hpr.fold(student)


def test_checkpoints_that_do_not_fit_are_refused(bert: nn.Module, tmp_path: Path) -> None:
    plain = hpr.fold(hpr.share(bert, plan_everything(bert)))
    plain.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(key for key in weights if key.endswith("query.inner.weight"))
    save_file({key: value for key, value in weights.items() if key != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"query\.inner\.weight was not in the weights"):
        tf.AutoModel.from_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text(encoding="utf-8")
    (tmp_path / "config.json").write_text(text.replace("attention.self.query", "attention.self.dropout"), encoding="utf-8")
    with pytest.raises(CheckpointError, match="is a Dropout, which cannot be folded"):
        tf.AutoModel.from_pretrained(tmp_path)


def test_peft_trains_merges_saves_and_loads(bert: nn.Module, ids: Tensor, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    plain = hpr.fold(hpr.share(bert, plan_everything(bert)))
    count = parameters(plain)
    adapted = peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=True))
    optimizer = torch.optim.Adam([one for one in adapted.parameters() if one.requires_grad], lr=0.02)
    wanted = torch.randn(outputs(plain, "bert", ids).shape, generator=torch.Generator().manual_seed(3))
    losses = []
    for _ in range(20):
        loss = (adapted(input_ids=ids).last_hidden_state - wanted).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    adapted.eval().save_pretrained(tmp_path / "adapter")
    expected = outputs(adapted, "bert", ids)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(outputs(merged, "bert", ids), expected, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    loaded = tf.AutoModel.from_pretrained(tmp_path / "merged")
    assert parameters(loaded) == count
    assert torch.equal(outputs(loaded, "bert", ids), outputs(merged, "bert", ids))
    hpr.fold(hpr.share(bert, plan_everything(bert))).save_pretrained(tmp_path / "base")
    base = tf.AutoModel.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(outputs(again, "bert", ids), expected, rtol=1e-4, atol=1e-5)


def test_torchao_quantises_every_linear(bert: nn.Module, ids: Tensor) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    plain = hpr.fold(hpr.share(bert, plan_everything(bert)))
    expected = outputs(plain, "bert", ids)
    quantization.quantize_(plain, quantization.Int8WeightOnlyConfig())
    linears = [module for module in plain.modules() if isinstance(module, nn.Linear)]
    assert len(linears) > 2 * 6
    assert all(type(module.weight) is not nn.Parameter for module in linears)
    assert (outputs(plain, "bert", ids) - expected).norm() < 0.05 * expected.norm()
