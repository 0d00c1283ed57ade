"""A copy for inference: the same function, nothing put together at a call, the faster product at each site."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import hpr
from conftest import HEADS, MIXTURES, plan_everything, plan_of
from hpr.anatomy.describe import describe
from hpr.nn.bank import bank_of
from hpr.nn.linear import SharedLinear
from hpr.nn.site import SharedSite
from hpr.sharing import materialise as module
from hpr.sharing.share import share

Build = Callable[..., nn.Module]
pytestmark = pytest.mark.usefixtures("random_fit")


def shared(model: nn.Module) -> nn.Module:
    """Every site of low rank, with an identity block in its own factor; all sites of one slot share the other one."""
    anatomy, entries = describe(model), plan_everything(model).entries
    terms = {
        name: [replace(term, identity="u" if anatomy[name].out_features > (term.rank or 0) else "") for term in entry.terms]
        for name, entry in entries.items()
    }
    return share(model, plan_of(anatomy, terms))


def outputs(model: nn.Module, ids: Tensor) -> Tensor:
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **more)[0]


@pytest.fixture
def thin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "dense_is_faster", lambda site, positions: False)


@pytest.fixture
def dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "dense_is_faster", lambda site, positions: True)


@pytest.mark.parametrize("family", HEADS)
@pytest.mark.usefixtures("thin")
def test_with_thin_products_the_outputs_are_equal_bit_by_bit(build: Build, ids: Tensor, family: str, tmp_path: Path) -> None:
    model = build(family, HEADS[family])
    student = shared(model)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    fast = hpr.materialise(student)
    assert torch.equal(outputs(fast, ids), outputs(student, ids))
    bank = bank_of(fast)
    assert bank is not None
    built = [factor for factor in bank.factors.values() if factor.shape.identity or hasattr(factor, "order")]
    assert not built
    assert "order" in " ".join(before)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    again = type(fast).from_pretrained(hpr.save(fast, tmp_path / "fast")).eval()
    assert torch.equal(outputs(again, ids), outputs(student, ids))
    stock = hpr.unshare(fast).state_dict()
    assert all(torch.equal(value, stock[name]) for name, value in hpr.unshare(student).state_dict().items())


def test_a_student_and_its_copy_compile_as_one_graph(bert: nn.Module, ids: Tensor) -> None:
    student = shared(bert)
    for model in (student, hpr.materialise(student)):
        torch.compiler.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(outputs(compiled, ids), outputs(model, ids), rtol=1e-5, atol=1e-6)


class _Operations(TorchDispatchMode):
    """Notes the names of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("thin")
def test_nothing_is_put_together_at_a_call(build: Build, ids: Tensor) -> None:
    model = build("bert")
    student = shared(model)
    counts = []
    for one in (student, hpr.materialise(student), model):
        with _Operations() as operations:
            outputs(one, ids)
        counts.append({name: operations.names.count(name) for name in ("eye", "index_select", "cat")})
    assert counts[0]["eye"] > 0
    assert counts[1]["eye"] == 0
    assert counts[1]["index_select"] <= counts[2]["index_select"]


@pytest.mark.parametrize("family", HEADS)
@pytest.mark.usefixtures("dense")
def test_where_dense_is_faster_a_plain_linear_takes_the_place(build: Build, ids: Tensor, family: str, tmp_path: Path) -> None:
    model = build(family, HEADS[family])
    student = shared(model)
    fast = hpr.materialise(student)
    tables = {one.path for one in fast.modules() if isinstance(one, SharedSite) and not isinstance(one, SharedLinear)}
    assert all(one.path in tables for one in fast.modules() if isinstance(one, SharedLinear))  # tied heads
    assert sum(type(one) is nn.Linear for one in fast.modules()) > 3 or family == "gpt2"  # which has its own class
    torch.testing.assert_close(outputs(fast, ids), outputs(student, ids), rtol=1e-4, atol=1e-5)
    bank = bank_of(fast)
    if not tables:
        assert bank is None
        return
    used = {name for one in fast.modules() if isinstance(one, SharedSite) for term in one.terms for name in term.factors}
    assert bank is not None
    assert len(bank.factors) == len(used)  # those of tables alone
    again = type(fast).from_pretrained(hpr.save(fast, tmp_path / "fast")).eval()
    assert torch.equal(outputs(again, ids), outputs(fast, ids))


@pytest.mark.parametrize("family", MIXTURES)
def test_fused_experts_are_plain_again(ids: Tensor, family: str) -> None:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(MIXTURES[family]()).eval()
    student = shared(model)
    fast = hpr.materialise(student)
    assert {type(one).__name__ for one in fast.modules()} & {"SharedExperts"} == set()
    torch.testing.assert_close(outputs(fast, ids), outputs(student, ids), rtol=1e-4, atol=1e-5)


def test_the_choice_is_by_time(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("bert")
    student = shared(model)
    site = next(one for one in student.modules() if isinstance(one, SharedLinear))
    monkeypatch.setattr(site, "flops_per_row", lambda: 2 * site.out_features * site.in_features)
    assert module.dense_is_faster(site, 4)  # it multiplies no less, so nothing is timed
    monkeypatch.setattr(site, "flops_per_row", lambda: 1)
    for seconds, expected in (([1.0, 2.0], False), ([2.0, 1.0], True)):
        monkeypatch.setattr(module, "_fastest", lambda *calls, seconds=seconds: seconds)
        assert module.dense_is_faster(site, 4) is expected


def test_times_are_the_least_of_calls_that_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(clock)))
    order: list[str] = []

    def call(name: str, ticks: int) -> Callable[[], Tensor]:
        def made() -> Tensor:
            order.append(name)
            for _ in range(ticks):
                next(clock)
            return torch.zeros(1)

        return made

    assert module._fastest(call("a", 2), call("b", 5)) == [3.0, 6.0]
    assert order[:4] == ["a", "b", "a", "b"]


def test_a_model_without_shared_factors_is_copied(build: Build, ids: Tensor) -> None:
    model = build("bert")
    copied = hpr.materialise(model)
    assert copied is not model
    assert torch.equal(outputs(copied, ids), outputs(model, ids))
    for bad in (0, -3, 2.5, "many", True):
        with pytest.raises(hpr.HprError, match="positions is"):
            hpr.materialise(model, bad)  # type: ignore[arg-type]
    with pytest.raises(hpr.HprError, match="the model is of type int"):
        hpr.materialise(5)  # type: ignore[arg-type]


def test_coded_factors_are_built_from_their_codes(build: Build, ids: Tensor) -> None:
    model = build("bert")
    batches = [{"input_ids": ids}, {"input_ids": ids.flip(0)}]
    profile = hpr.profile(model, batches)
    plan = hpr.plan(model, profile, "80%", hpr.PlanOptions(bytes="60%bytes"))
    student = hpr.share(model, plan, profile)
    torch.testing.assert_close(outputs(hpr.materialise(student), ids), outputs(student, ids), rtol=1e-4, atol=1e-5)


class Net(nn.Module):
    """Two layers without a table."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8)) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.mark.usefixtures("dense")
def test_a_plain_module_that_became_dense_is_plain(tmp_path: Path) -> None:
    torch.manual_seed(0)
    fast = hpr.materialise(shared(Net()))
    assert bank_of(fast) is None
    x = torch.randn(3, 8)
    again = hpr.load(Net(), hpr.save(fast, tmp_path / "fast"))
    assert torch.equal(again(x), fast(x))
