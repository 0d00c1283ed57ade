"""Refit: it lowers the divergence on its own text, touches nothing else, and finds the residual stream."""

import copy

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import hpr
from conftest import strengthened
from hpr.anatomy.describe import describe
from hpr.anatomy.lookup import module_at
from hpr.anatomy.model import Site, Stack
from hpr.evaluation.divergence import divergence
from hpr.nn.linear import SharedLinear
from hpr.operators.registry import plannable
from hpr.planning.options import PlanOptions
from hpr.planning.planner import draft
from hpr.plans.plan import keep_all
from hpr.profiling.objectives import OBJECTIVES
from hpr.runtime.progress import reporting_to
from hpr.sharing import layerwise

SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "intermediate_size": 40, "vocab_size": 60, "max_position_embeddings": 16}
MODELS = {
    "bert": lambda: tf.BertModel(tf.BertConfig(**SIZES, num_attention_heads=2)),
    "llama": lambda: tf.LlamaModel(tf.LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2)),
}
GOAL = OBJECTIVES["hidden"]


def build(family: str):
    torch.manual_seed(0)
    return strengthened(MODELS[family]())


def text(count: int = 6):
    draw = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        mask = torch.ones(8, 12, dtype=torch.long)
        mask[::3, 7:] = 0
        batches.append({"input_ids": torch.randint(3, 60, (8, 12), generator=draw), "attention_mask": mask})
    return batches


@pytest.fixture(scope="module", params=MODELS)
def made(request):
    model, batches = build(request.param), text()
    profile = hpr.profile(model, batches, "hidden")
    return request.param, model, profile, batches


def unique(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(one, two) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize(
    "operator", [None, *(name for name in plannable() if name not in ("keep", "base + block + private", "segments"))]
)
def test_refit_lowers_the_divergence_on_its_own_text(made, operator) -> None:
    _, model, profile, batches = made
    stack = "encoder.*" if made[0] == "bert" else "layers.*"
    drafted = draft(
        model, profile, PlanOptions(only=stack, operators=[operator] if operator else None, align=False)
    )  # kept sites are compared below
    plan = drafted.best(drafted.budget("40%" if operator is None else "70%"))
    student = hpr.share(model, plan, profile)
    teacher, before, size = state(model), state(student), unique(student)
    plain = divergence(student, model, batches, GOAL).mean
    hpr.refit(student, model, batches, plan, profile)
    if operator not in ("tie", "tie + scale"):  # those have nothing private but a bias, and can lose
        assert divergence(student, model, batches, GOAL).mean < plain
    assert same(state(model), teacher)
    assert unique(student) == size  # shared factors are shared as before
    after = state(student)
    assert after.keys() == before.keys()
    assert all(torch.isfinite(value).all() for value in after.values())
    kept = [site for site in describe(model).sites if plan.entries[site.name].operator == "keep"]
    for site in kept:
        assert torch.equal(module_at(student, site.name).weight, module_at(model, site.name).weight)
    again = hpr.share(model, plan, profile)
    hpr.refit(again, model, batches, plan, profile)
    assert same(state(again), after)


def test_what_is_kept_is_untouched_bit_for_bit(made) -> None:
    _, model, profile, batches = made
    plan = keep_all(describe(model))
    student = hpr.share(model, plan, profile)
    before = state(student)
    hpr.refit(student, model, batches, plan, profile)
    assert same(state(student), before)
    drafted = draft(model, profile, PlanOptions(only="embed*"))
    plan = drafted.best(drafted.budget("60%"))
    student = hpr.share(model, plan, profile)
    before = state(student)
    hpr.refit(student, model, batches, plan, profile)  # embeddings stay as they are
    assert same(state(student), before)


def test_an_exact_student_stays_so(made) -> None:
    """At a rank that loses nothing, the target is the weight itself, but for the ridge and rounding."""
    _, model, profile, batches = made
    stack = "encoder.*" if made[0] == "bert" else "layers.*"
    drafted = draft(model, profile, PlanOptions(only=stack, operators=["low rank"]))
    plan = drafted.best(drafted.budget("99.9%"))
    student = hpr.share(model, plan, profile)
    plain = divergence(student, model, batches, GOAL).mean
    hpr.refit(student, model, batches, plan, profile)
    assert divergence(student, model, batches, GOAL).mean < max(1.5 * plain, 1e-4)


def test_modes_hooks_and_modules_are_as_before(made) -> None:
    _, model, profile, batches = made
    drafted = draft(model, profile)
    plan = drafted.best(drafted.budget("60%"))
    student = hpr.share(model, plan, profile)
    calls = []
    with reporting_to(lambda stage, done, total: calls.append((stage, done, total))):
        hpr.refit(student, model, batches, plan, profile)
    calls = [call for call in calls if call[0] == "refit"]
    for one in (model, student):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in one.modules())
        assert not any(m.training for m in one.modules())
        assert all(p.requires_grad and p.grad is None for p in one.parameters())
    total = calls[-1][2]
    assert [done for _, done, _ in calls] == list(range(1, total + 1))
    assert any(isinstance(m, SharedLinear) for m in student.modules())


def test_training_mode_changes_nothing_and_is_restored(made) -> None:
    """Dropout would be fitted else: a model in training mode is refitted as one in evaluation mode."""
    _, model, profile, batches = made
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    drafted = draft(model, profile)
    plan = drafted.best(drafted.budget("60%"))
    expected = hpr.share(model, plan, profile)
    hpr.refit(expected, model, batches, plan, profile)
    student = hpr.share(model, plan, profile).train()
    model.train()
    still = next(module for module in model.modules() if not list(module.children()))
    still.eval()  # each module has its own mode
    hpr.refit(student, model, batches, plan, profile)
    assert same(state(student), state(expected))
    assert all(module.training for module in student.modules())
    assert [module for module in model.modules() if not module.training] == [still]


RESIDUAL = {
    "bert": {"attention.output.dense", "output.dense"},
    "llama": {"self_attn.o_proj", "mlp.down_proj"},
}


def test_the_residual_stream_is_found_by_its_sums(made) -> None:
    family, model, _, batches = made
    anatomy = describe(model)
    (stack,) = anatomy.stacks
    with torch.no_grad():
        pair = layerwise.ModelPair(
            layerwise.record_calls(model, stack, batches[0]),
            layerwise.record_calls(copy.deepcopy(model), stack, batches[0]),
            batches[0],
        )
        for layer in range(stack.layers):
            block = module_at(model, f"{stack.path}.{layer}")
            sites = [site for site in anatomy.sites if site.layer == layer]
            both = layerwise.Layer(stack, layer, block, block)
            found, called = set(), []
            for stage in layerwise.stages(both, sites, pair):
                called.append({site.slot for site in stage})
                with layerwise.watching(both, block, stage) as seen:
                    output = pair.teacher.run(block, layer)
                for one in seen.values():
                    one.later.append(output)
                found |= {site.slot for site, one in seen.items() if one.residual_place() is not None}
            assert found == RESIDUAL[family]
            assert len(called[0]) == 3  # query, key and value read one tensor
            assert set().union(*called) == {site.slot for site in sites}
            pair.advance(both)


def test_layer_by_layer_is_what_the_model_computes(made) -> None:
    _, model, _, batches = made
    (stack,) = describe(model).stacks
    seen = []
    last = module_at(model, f"{stack.path}.{stack.layers - 1}")
    handle = last.register_forward_hook(lambda m, i, o: seen.append(o if isinstance(o, torch.Tensor) else o[0]))
    with torch.no_grad():
        entry = layerwise.record_calls(model, stack, batches[0])
        for layer in range(stack.layers):
            entry.hidden = entry.run(module_at(model, f"{stack.path}.{layer}"), layer)
    handle.remove()
    torch.testing.assert_close(entry.hidden, seen[0])


class Fleeting(nn.Module):
    """Inputs that are freed at once, so that the next one is likely to come to lie at the same address."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, hidden_states: Tensor) -> Tensor:
        y = self.first(hidden_states * 2)
        y = self.second(y * 2)
        return self.third(y * 2)


def test_stages_tell_inputs_apart_that_follow_one_another_in_memory() -> None:
    stack = Stack("blocks", "blocks", 1)
    sites = [Site(f"blocks.0.{slot}", "linear", 64, 64, True, "blocks", 0, slot) for slot in ("first", "second", "third")]
    net = Fleeting()
    entry = layerwise.BlockCalls(torch.ones(8, 32, 64), [((None,), {})])
    with torch.no_grad():
        stages = list(layerwise.stages(layerwise.Layer(stack, 0, net, net), sites, layerwise.ModelPair(entry, entry, {})))
    assert [[site.slot for site in stage] for stage in stages] == [["first"], ["second"], ["third"]]


def test_padding_of_a_decoder_is_its_own() -> None:
    batch = {"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]), "labels": torch.tensor([[5, 6, 7, 2], [5, 2, -100, -100]])}
    encoder, decoder = Stack("encoder", "encoder.layers", 2), Stack("decoder", "decoder.layers", 2)
    of_encoder, of_decoder = torch.zeros(2, 3, 8), torch.zeros(2, 4, 8)
    assert torch.equal(layerwise.real_rows(batch, encoder, of_encoder), batch["attention_mask"].bool())
    assert torch.equal(layerwise.real_rows(batch, decoder, of_decoder), batch["labels"] != -100)
    assert torch.equal(
        layerwise.real_rows(batch, decoder, of_encoder), batch["attention_mask"].bool()
    )  # keys and values across
    assert layerwise.real_rows(batch, decoder, torch.zeros(8, 8)) == slice(None)
