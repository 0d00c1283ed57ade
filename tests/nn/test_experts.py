"""Experts that are slices of one parameter: found, measured, planned, shared, saved and given back."""

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn

import hpr
from conftest import MIXTURE, MIXTURES, low_rank_terms, plan_everything, plan_of
from hpr.anatomy.describe import describe
from hpr.anatomy.lookup import slice_at, weight_at
from hpr.anatomy.swappable import not_swappable
from hpr.anatomy.uncovered import uncovered
from hpr.errors import HprError
from hpr.evaluation.cost import parts, sizes
from hpr.nn.bank import bank_of, parameters
from hpr.nn.experts import SharedExperts
from hpr.planning.options import PlanOptions
from hpr.plans.plan import keep_all
from hpr.plans.terms import FactorShape, Term
from hpr.profiling.curvature import measure_curvature
from hpr.profiling.distributions import GAUSSIAN
from hpr.profiling.objectives import Objective
from hpr.rounding.others import round_others
from hpr.sharing.attach import attach
from hpr.sharing.share import share
from hpr.sharing.unshare import unshare

EXPERTS = "layers.1.mlp.experts"


def build(family: str) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(MIXTURES[family]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


@pytest.fixture(params=MIXTURES)
def model(request: pytest.FixtureRequest) -> tf.PreTrainedModel:
    return build(request.param)


class Experts(nn.Module):
    """Three experts of two matrices each; row r of an example goes to expert r modulo 3."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 7, 5))
        self.down = nn.Parameter(torch.randn(3, 5, 7))
        self.idle = nn.Parameter(torch.randn(3, 5, 7))  # read, but not as the weight of a Linear

    def forward(self, rows: Tensor) -> Tensor:
        total = torch.zeros_like(rows)
        for number in torch.arange(3):
            mine = torch.arange(int(number), len(rows), 3)
            inner = torch.tanh(F.linear(rows[mine], self.up[number]))
            total[mine] = F.linear(inner, self.down[number]) + 0 * inner @ self.idle[number].T
        return total


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 5)
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(self.first(x).flatten(0, 1)).view(x.shape)


class Fixed(Objective):
    def loss(self, outputs: Tensor, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        return (outputs * direction(batch["input"])).sum()


def direction(batch: Tensor) -> Tensor:
    """A direction that depends on the row alone; rows of zeros are padding."""
    return (batch.abs().sum(-1, keepdim=True) > 0) * torch.cos(100 * batch.sum(-1, keepdim=True) + torch.arange(5))


def dense_with(model: nn.Module, student: nn.Module) -> nn.Module:
    """The stock model with every weight that the student's factors add up to."""
    dense = copy.deepcopy(model)
    dense.load_state_dict(unshare(student).state_dict())
    return dense


def test_every_expert_is_a_site(model: tf.PreTrainedModel) -> None:
    anatomy = describe(model)
    site = anatomy[f"{EXPERTS}.down_proj.2"]
    assert (site.stack, site.layer, site.slot, site.expert) == ("layers", 1, "mlp.experts.down_proj", 2)
    assert weight_at(model, site).data_ptr() == model.model.layers[1].mlp.experts.down_proj[2].data_ptr()
    assert (site.out_features, site.in_features) == tuple(weight_at(model, site).shape)
    row = anatomy.slots()["layers", "mlp.experts.gate_up_proj"]
    assert [(one.layer, one.expert) for one in row] == [(layer, expert) for layer in range(2) for expert in range(4)]
    experts = sum(one.parameters for one in anatomy.sites if one.expert is not None)
    assert experts == sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 3)
    routers = sum(p.numel() for name, p in model.named_parameters() if name.endswith("mlp.gate.weight"))
    assert anatomy.other_parameters == routers + sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert not_swappable(model, anatomy) == {}


@pytest.mark.usefixtures("random_fit")
def test_transformers_finds_the_shape_of_a_placeholder(model: tf.PreTrainedModel) -> None:
    """It asks for a parameter of that name when it loads a model whose experts it may have to transpose, as Qwen3-VL's."""
    student = share(model, plan_everything(model))
    place = student.get_parameter(f"model.{EXPERTS}.down_proj")
    assert place.shape == (4, 2, 1)
    assert not any(parameter is place for parameter in student.parameters())


def test_only_slices_that_a_linear_reads_are_sites() -> None:
    names = [site.name for site in describe(Net()).sites]
    assert names == ["first"] + [f"experts.{name}.{number}" for name in ("up", "down") for number in range(3)]
    stored_transposed = tf.GptOssConfig(
        **MIXTURE | {"head_dim": 8}, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2
    )
    with torch.device("meta"):
        other = tf.AutoModelForCausalLM.from_config(stored_transposed)
    assert all(site.expert is None for site in describe(other).sites)
    assert slice_at(Net(), "experts.up.3") is slice_at(Net(), "experts.up") is slice_at(Net(), "first.weight.0") is None


def test_statistics_are_those_of_autograd_row_by_row() -> None:
    draw = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, 6, 5, generator=draw) for _ in range(3)]
    batches[1][0, 3:] = 0
    net = Net()
    found, examples = measure_curvature(net, describe(net), batches, Fixed("fixed", lambda *_: None, distribution=GAUSSIAN))  # type: ignore[arg-type, return-value]
    net = Net().double()
    for name in ("up", "down"):
        for number in range(3):
            rows, left, right, trace = 0, torch.zeros(()), torch.zeros(()), 0.0
            for batch in batches:
                hidden = net.first(batch.double()).flatten(0, 1)[number::3].detach()
                inner = F.linear(hidden, net.experts.up[number])
                last = F.linear(torch.tanh(inner), net.experts.down[number])
                loss = (last * direction(batch.double().flatten(0, 1))[number::3]).sum()
                x = hidden if name == "up" else torch.tanh(inner).detach()
                (g,) = torch.autograd.grad(loss, inner if name == "up" else last)
                for g_row, x_row in zip(g, x, strict=True):
                    change = torch.outer(g_row, x_row)
                    rows += int(g_row.abs().sum() > 0)
                    left, right = left + torch.outer(g_row, g_row), right + change.T @ change
                    trace += float(change.square().sum()) / examples
            one = found[f"experts.{name}.{number}"]
            assert one.rows == rows / examples
            assert one.mean is None
            torch.testing.assert_close(one.right, right / right.trace(), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(one.left / one.left.trace(), left / left.trace(), rtol=1e-4, atol=1e-6)
            assert one.rows * float(one.left.trace() * one.right.trace()) == pytest.approx(trace, rel=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_the_way_experts_are_run_changes_nothing_and_stays(ids: Tensor, implementation: str) -> None:
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    model = build("mixtral")
    model.set_experts_implementation("eager")
    expected = hpr.profile(model, batches).sites
    model.set_experts_implementation(implementation)
    found = hpr.profile(model, batches).sites
    assert model.config._experts_implementation == implementation
    for name, one in expected.items():
        torch.testing.assert_close(found[name].left, one.left)
    plan = hpr.plan(model, hpr.profile(model, batches), "60%")
    student = share(model, plan)
    with torch.no_grad():
        torch.testing.assert_close(student(ids).logits, dense_with(model, student)(ids).logits)


def test_routers_made_from_a_linear_are_no_sites(ids: Tensor) -> None:
    """Phi's router is one, with a choice for its output. It is coded finely."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(tf.PhimoeConfig(**MIXTURE, intermediate_size=24, num_local_experts=4)).eval()
    anatomy = describe(model)
    profile = hpr.profile(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    assert not any(site.slot == "mlp.router" for site in anatomy.sites)
    assert not_swappable(model, anatomy) == {}
    (row,) = (row for row in uncovered(model, anatomy) if row.owner == "PhimoeTopKRouter")
    assert (row.count, row.reason) == (2, "a PhimoeTopKRouter, whose forward does more than multiply by its weight")
    name = "model.layers.0.mlp.router.weight"
    assert profile.others[name] < 1e-6  # it only chooses, so it has next to no gradient
    weight = model.get_parameter(name)
    rounded = round_others({name: weight}, {name: 0.0}, 1e-3)[name].weight().reshape(weight.shape)
    assert (rounded - weight).norm() < 0.01 * weight.norm()
    assert any(hpr.plan(model, profile, "60%").entries[f"{EXPERTS}.down_proj.{number}"].terms for number in range(4))


def test_the_experts_of_a_layer_are_one_track(model: tf.PreTrainedModel, ids: Tensor) -> None:
    profile = hpr.profile(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    plan = hpr.plan(model, profile, "40%", PlanOptions(only="*.experts.*", operators=["tie"]))
    plan.validate(describe(model))
    groups = [sites for sites in plan.groups() if "experts" in sites[0]]
    assert groups
    for sites in groups:
        assert len({site.rpartition(".")[0] for site in sites}) == 1
        numbers = [int(site.rpartition(".")[2]) for site in sites]
        assert numbers == list(range(numbers[0], numbers[-1] + 1))


def test_a_plan_that_keeps_all_changes_nothing(model: tf.PreTrainedModel, ids: Tensor) -> None:
    student = share(model, keep_all(describe(model)))
    assert bank_of(student) is None
    with torch.no_grad():
        assert torch.equal(student(ids).logits, model(ids).logits)


@pytest.mark.usefixtures("random_fit")
def test_a_student_computes_what_its_dense_weights_compute(model: tf.PreTrainedModel, ids: Tensor) -> None:
    anatomy = describe(model)
    student = share(model, plan_everything(model))
    with torch.no_grad():
        torch.testing.assert_close(student(ids).logits, dense_with(model, student)(ids).logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(unshare(student)(ids).logits, student(ids).logits, rtol=1e-4, atol=1e-5)
        assert torch.equal(copy.deepcopy(student)(ids).logits, student(ids).logits)
    assert parameters(student) == plan_everything(model).parameters(anatomy)
    assert sum(part["after"] for part in parts(model, student, anatomy)) == parameters(student)
    assert sizes(student, anatomy)["bytes"] < sizes(model, anatomy)["bytes"]


@pytest.mark.usefixtures("random_fit")
def test_gradients_reach_the_factors_of_experts(ids: Tensor) -> None:
    """Those of the student are those of a dense model, carried on to the factors."""
    model = build("mixtral")
    name = f"{EXPERTS}.down_proj.1"
    student = share(model, plan_of(describe(model), {name: low_rank_terms(name)}))
    dense = dense_with(model, student)
    for one in (student, dense):
        one(ids).logits.square().sum().backward()
    gradient = dense.model.layers[1].mlp.experts.down_proj.grad
    bank = bank_of(student)
    u, v = bank[f"{name}:u"], bank[f"{name}:v"]
    torch.testing.assert_close(u.weight.grad, gradient[1] @ v.weight.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(v.weight.grad, u.weight.T @ gradient[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bank[f"{EXPERTS}.down_proj.3.kept"].weight.grad, gradient[3], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("random_fit")
def test_students_compile_as_a_whole_and_serve_threads(ids: Tensor) -> None:
    model = build("mixtral")
    student = share(model, plan_everything(model))
    with torch.no_grad():
        expected = student(ids).logits
        assert torch.equal(torch.compile(student, backend="eager", fullgraph=True)(ids).logits, expected)

    def answer(_: int) -> bool:
        with torch.no_grad():
            return torch.equal(student(ids).logits, expected)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(answer, range(12)))


@pytest.mark.usefixtures("random_fit")
def test_half_precision_stays_half(ids: Tensor, tmp_path: Path) -> None:
    build("mixtral").save_pretrained(tmp_path / "dense")
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    student = share(model, plan_everything(model))
    student.save_pretrained(tmp_path / "shared")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "shared", dtype=torch.bfloat16)
    with torch.no_grad():
        assert again(ids).logits.dtype == torch.bfloat16
        assert torch.equal(again(ids).logits, student(ids).logits)


@pytest.mark.usefixtures("random_fit")
def test_kept_experts_beside_shared_ones_are_stored_once(model: tf.PreTrainedModel, ids: Tensor) -> None:
    anatomy = describe(model)
    name = f"{EXPERTS}.gate_up_proj.1"
    plan = plan_of(anatomy, {name: low_rank_terms(name)})
    student = share(model, plan)
    assert parameters(student) == plan.parameters(anatomy)
    experts = student.model.layers[1].mlp.experts
    assert isinstance(experts, SharedExperts)
    assert isinstance(experts.down_proj, nn.Parameter)
    assert experts.gate_up_proj.numel() == 8
    for number in (0, 2, 3):
        assert torch.equal(experts.dense_parameter("gate_up_proj")[number], weight_at(model, anatomy[f"{name[:-1]}{number}"]))
    assert type(student.model.layers[0].mlp.experts) is type(model.model.layers[0].mlp.experts)
    restored = unshare(student).state_dict()
    assert list(restored) == list(model.state_dict())
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, restored[key])]
    assert changed == ["model.layers.1.mlp.experts.gate_up_proj"]


@pytest.mark.usefixtures("random_fit")
def test_save_and_load_are_bit_equal(model: tf.PreTrainedModel, ids: Tensor, tmp_path: Path) -> None:
    anatomy = describe(model)
    name = f"{EXPERTS}.gate_up_proj.1"
    for index, plan in enumerate((plan_everything(model), plan_of(anatomy, {name: low_rank_terms(name)}))):
        student = share(model, plan)
        student.save_pretrained(tmp_path / f"{index}")
        again = type(model).from_pretrained(tmp_path / f"{index}")
        with torch.no_grad():
            assert torch.equal(again(ids).logits, student(ids).logits)
        assert again.state_dict().keys() == student.state_dict().keys()
        assert parameters(again) == plan.parameters(anatomy)
        again.save_pretrained(tmp_path / f"{index}b")
        files = [tmp_path / folder / "model.safetensors" for folder in (f"{index}", f"{index}b")]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.usefixtures("random_fit")
def test_unshared_experts_load_as_stock(model: tf.PreTrainedModel, ids: Tensor, tmp_path: Path) -> None:
    student = share(model, plan_everything(model))
    dense = unshare(student)
    dense.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert bank_of(again) is None
    assert [type(module) for module in again.modules()] == [type(module) for module in model.modules()]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, dense(ids).logits)


@pytest.mark.usefixtures("random_fit")
def test_loading_without_hpr_fails_on_the_shape(model: tf.PreTrainedModel, tmp_path: Path) -> None:
    name = f"{EXPERTS}.gate_up_proj.1"
    share(model, plan_of(describe(model), {name: low_rank_terms(name)})).save_pretrained(tmp_path)
    config = copy.deepcopy(model.config)  # as one that knows nothing of hpr
    with pytest.raises(RuntimeError, match="mismatch"):
        type(model).from_pretrained(tmp_path, config=config, quantization_config=None)


@pytest.mark.usefixtures("random_fit")
def test_plain_modules(tmp_path: Path) -> None:
    net, x = Net(), torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(1))
    student = share(net, plan_everything(net))
    with torch.no_grad():
        torch.testing.assert_close(student(x), dense_with(net, student)(x))
    hpr.save(student, tmp_path / "out")
    assert torch.equal(hpr.load(Net(), tmp_path / "out")(x), student(x))
    assert torch.equal(student.experts.idle, net.experts.idle)


class Nosy(nn.Module):
    """Multiplies by its experts' weights behind their back."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x) @ self.experts.up.mean(0).T


def test_experts_that_another_module_reads_are_kept() -> None:
    net = Nosy()
    assert set(not_swappable(net, describe(net))) == {f"experts.up.{number}" for number in range(3)}


def test_errors_name_the_experts() -> None:
    path = "experts.up.1"
    with pytest.raises(HprError, match=r"experts\.up: expert 0 of 3 has no terms; give all or none"):
        attach(Net(), {path: (Term("f"),)}, {"f": FactorShape(7, 5)})
    twice = nn.ModuleDict({"one": Net(), "two": Net()})
    twice["two"].experts.up = twice["one"].experts.up
    assert "read by two modules" in not_swappable(twice, describe(twice))["one.experts.up.1"]
    with pytest.raises(HprError, match="no experts at"):
        weight_at(nn.Sequential(nn.Linear(2, 2)), describe(Net())[path])
