"""Weights that follow the input: what a router sees, static at step 0, masks, caches, saving, collapse, healing."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import nn

import hpr
from hpr.anatomy.describe import describe
from hpr.errors import HprError
from hpr.healing.loss import GlobalLoss, Weights, entropies, undecided
from hpr.healing.optimizer import parameter_groups
from hpr.healing.recipe import Recipe
from hpr.healing.train import train
from hpr.nn.bank import FactorBank, bank_of, parameters
from hpr.nn.routed import RoutedLinear
from hpr.planning.planner import draft
from hpr.plans.plan import Plan, keep_all
from hpr.plans.product import component_weights
from hpr.plans.terms import FactorShape, Route, Term, entry_from_dict, routers_of, validate_entry
from hpr.profiling.objectives import OBJECTIVES
from hpr.routing.collapse import collapse, mean_routes
from hpr.routing.plan import best_routed, routed, seeing_all

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 60}
BUILDS = {
    "bert": lambda: tf.BertModel(tf.BertConfig(**SIZES, max_position_embeddings=24)),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=60, n_positions=32, bos_token_id=1, eos_token_id=1)
    ),
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, num_key_value_heads=2)),
    "bart": lambda: tf.BartForConditionalGeneration(
        tf.BartConfig(
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            vocab_size=60,
            max_position_embeddings=40,
        )
    ),
    "vit": lambda: tf.ViTModel(tf.ViTConfig(**{**SIZES, "image_size": 32, "patch_size": 8})),
}
DECODERS = ("gpt2", "llama", "bart")


def ids(rows: int = 4, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


def inputs(kind: str, rows: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    if kind == "vit":
        return {"pixel_values": torch.randn(rows, 3, 32, 32, generator=torch.Generator().manual_seed(seed))}
    batch = {"input_ids": ids(rows, seed=seed)}
    return batch | ({"decoder_input_ids": ids(rows, 7, seed + 50)} if kind == "bart" else {})


def built(kind: str, budget: str = "70%") -> tuple[nn.Module, nn.Module, nn.Module]:
    """A model, a static student, and the same with routers."""
    torch.manual_seed(0)
    model = BUILDS[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    profile = hpr.profile(model, [inputs(kind, seed=seed) for seed in range(4)], "hidden" if kind != "gpt2" else None)
    plan = hpr.plan(model, profile, budget)
    dynamic = hpr.share(model, roomy(routed(plan, model)), profile)
    return model, hpr.share(model, plan, profile), dynamic


def roomy(plan: Plan) -> Plan:
    """A plan whose routers may come on top of its budget."""
    return replace(plan, budget=replace(plan.budget, parameters=10**9))


def decided(dynamic: nn.Module, scale: float = 0.5) -> nn.Module:
    """The same, its routers drawn."""
    found, draw = copy.deepcopy(dynamic), torch.Generator().manual_seed(1)
    for name, parameter in found.named_parameters():
        if "ROUTER" in name:
            parameter.data.copy_(scale * torch.randn(parameter.shape, generator=draw))
    return found


def output(model: nn.Module, **batch: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch)[0]


@pytest.fixture(scope="module", params=list(BUILDS))
def made(request):
    return request.param, *built(request.param)


def test_at_step_0_dynamic_is_static(made) -> None:
    kind, _, static, dynamic = made
    assert torch.equal(output(static, **inputs(kind)), output(dynamic, **inputs(kind)))
    routers = [parameter for name, parameter in dynamic.named_parameters() if "ROUTER" in name]
    assert routers
    assert parameters(dynamic) == parameters(static) + sum(router.numel() for router in routers)
    assert not torch.equal(output(decided(dynamic), **inputs(kind)), output(static, **inputs(kind)))


def test_what_a_router_sees(made) -> None:
    kind, model, *_ = made
    seen = {"bert": {"encoder"}, "bart": {"encoder"}, "vit": {"layers"}}
    assert seeing_all(model, describe(model)) == seen.get(kind, set())


def test_saved_and_loaded_it_is_the_same(made, tmp_path) -> None:
    kind, _, _, dynamic = made
    changed = decided(dynamic)
    hpr.save(changed, tmp_path / "out")
    loaded = type(changed).from_pretrained(tmp_path / "out").eval()
    assert torch.equal(output(loaded, **inputs(kind)), output(changed, **inputs(kind)))
    again = copy.deepcopy(loaded)
    assert bank_of(again).routing is not bank_of(loaded).routing
    assert torch.equal(output(again, **inputs(kind)), output(changed, **inputs(kind)))


def test_a_batch_of_mixed_lengths_is_one_by_one(made) -> None:
    kind, _, _, dynamic = made
    if kind == "vit":
        pytest.skip("pictures have no padding")
    changed, batch, lengths = decided(dynamic), inputs(kind), (12, 5, 9, 1)
    mask = torch.tensor([[place < length for place in range(12)] for length in lengths]).long()
    whole = output(changed, **batch, attention_mask=mask)
    for row, length in enumerate(lengths):
        alone = {name: value[row : row + 1] for name, value in batch.items()}
        alone["input_ids"] = alone["input_ids"][:, :length]
        count = 7 if kind == "bart" else length
        torch.testing.assert_close(whole[row : row + 1, :count], output(changed, **alone), atol=1e-5, rtol=1e-4)


def test_many_threads_get_the_outputs_of_one(made) -> None:
    """Each thread has masks of its own; sizes differ, so that one thread's mask would not fit another's input."""
    kind, _, _, dynamic = made
    changed = decided(dynamic)
    batches = []
    for seed in range(24):
        batch = inputs(kind, rows=1 + seed % 3, seed=seed)
        if "input_ids" in batch:
            length = 4 + seed % 8
            batch["input_ids"] = batch["input_ids"][:, :length]
            batch["attention_mask"] = (torch.arange(length) < length - seed % 3).long().repeat(len(batch["input_ids"]), 1)
        batches.append(batch)
    expected = [output(changed, **batch) for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda batch: output(changed, **batch), batches * 4))
    assert all(torch.equal(one, other) for one, other in zip(found, expected * 4, strict=True))
    assert bank_of(changed).routing.masks == []


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_is_seen_where_the_model_is_called_past_its_hooks(attention: str) -> None:
    """As sentence-transformers calls it."""
    _, _, dynamic = built("bert")
    changed, batch = decided(dynamic), inputs("bert")
    changed.set_attn_implementation(attention)
    mask = (torch.arange(12) < torch.tensor([[12], [5], [9], [2]])).long()
    with torch.no_grad():
        past = changed.forward(**batch, attention_mask=mask)[0]
    assert torch.equal(past, output(changed, **batch, attention_mask=mask))


@pytest.mark.parametrize("routers", [False, True])
def test_many_threads_get_the_embeddings_of_one_from_sentence_transformers(routers: bool, folder: Path, tmp_path: Path) -> None:
    """It calls ``forward`` past the hooks of the model, on texts that it pads. A call has the same texts in both."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    _, static, dynamic = built("bert")
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    hpr.save(decided(dynamic) if routers else static, tmp_path / "out", tokenizer)
    encoder = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    words = ["the", "layer", "reads", "its", "factor", "a", "text", "writes"]
    calls = [[" ".join(words[: 1 + (seed + row) % 8]) for row in range(1 + seed % 4)] for seed in range(24)]
    expected = [encoder.encode(texts, convert_to_tensor=True) for texts in calls]
    alone = encoder.encode([calls[3][0]], convert_to_tensor=True)
    torch.testing.assert_close(expected[3][:1], alone, rtol=1e-4, atol=1e-5)  # padding does not count
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda texts: encoder.encode(texts, convert_to_tensor=True), calls * 4))
    assert all(torch.equal(one, other) for one, other in zip(found, expected * 4, strict=True))


@pytest.mark.parametrize("kind", DECODERS)
def test_nothing_later_is_seen(kind) -> None:
    changed = decided(built(kind)[2])
    name = "decoder_input_ids" if kind == "bart" else "input_ids"
    batch, other = inputs(kind), inputs(kind)
    other[name][:, 5:] = ids(4, other[name].shape[1] - 5, seed=9)
    assert torch.equal(output(changed, **batch)[:, :5], output(changed, **other)[:, :5])
    shorter = batch | {name: batch[name][:, :5]}
    torch.testing.assert_close(output(changed, **shorter), output(changed, **batch)[:, :5], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", DECODERS)
def test_cached_is_uncached(kind) -> None:
    changed = decided(built(kind)[2])
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    given = {"input_ids": ids(2), "attention_mask": torch.tensor([[1] * 12, [0] * 4 + [1] * 8])}
    expected = changed.generate(**given, use_cache=False, **settings)
    assert torch.equal(changed.generate(**given, use_cache=True, **settings), expected)


def test_collapse(made, tmp_path) -> None:
    kind, _, static, dynamic = made
    batches = [inputs(kind, seed=seed) for seed in range(3)]
    assert torch.equal(output(collapse(dynamic, batches), **inputs(kind)), output(static, **inputs(kind)))
    changed = decided(dynamic)
    flat = collapse(changed, batches)
    assert not torch.equal(output(flat, **inputs(kind)), output(changed, **inputs(kind)))
    with pytest.raises(HprError, match=r"depends on the input: use hpr.extras.collapse on the model first"):
        hpr.unshare(changed)
    dense = hpr.unshare(flat)
    torch.testing.assert_close(output(dense, **inputs(kind)), output(flat, **inputs(kind)), atol=1e-4, rtol=1e-4)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in dense.modules())
    hpr.save(flat, tmp_path / "flat")
    loaded = type(flat).from_pretrained(tmp_path / "flat").eval()
    assert torch.equal(output(loaded, **inputs(kind)), output(flat, **inputs(kind)))
    with pytest.raises(HprError, match="do not depend on the input: it is static already"):
        collapse(static, batches)
    with pytest.raises(HprError, match="batches is empty"):
        collapse(changed, [])


def test_mean_routes_leave_padding_out() -> None:
    changed = decided(built("gpt2")[2])
    mask = torch.ones(4, 12).long()
    mask[:, 8:] = 0
    padded = mean_routes(changed, [{"input_ids": ids(), "attention_mask": mask}])
    short = mean_routes(changed, [{"input_ids": ids()[:, :8]}])
    assert padded.keys() == short.keys()
    for router, alpha in padded.items():
        torch.testing.assert_close(alpha, short[router], atol=1e-5, rtol=1e-5)
        assert float(alpha.sum()) == pytest.approx(4)


def test_a_mask_is_forgotten_after_an_error() -> None:
    changed = decided(built("bert")[2])
    with pytest.raises(IndexError):
        changed(input_ids=torch.full((1, 4), 99), attention_mask=torch.ones(1, 4).long())
    assert bank_of(changed).routing.masks == []


def test_the_best_routed_plan_keeps_within_its_budget() -> None:
    torch.manual_seed(0)
    model = BUILDS["bert"]().eval()
    profile = hpr.profile(model, [inputs("bert", seed=seed) for seed in range(4)])
    drafted = draft(model, profile)
    limit = drafted.budget("70%")
    plan = best_routed(drafted, limit, model)
    assert plan.parameters(drafted.anatomy) <= limit.parameters
    assert plan.damage > drafted.best(limit).damage
    plan.validate(drafted.anatomy)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))).entries == plan.entries
    with pytest.raises(HprError, match="no site of this plan has a term of rank 999 or more"):
        routed(plan, model, 999)


def test_routers_go_where_they_pay() -> None:
    torch.manual_seed(0)
    model = BUILDS["bert"]().eval()
    profile = hpr.profile(model, [inputs("bert", seed=seed) for seed in range(4)])
    drafted = draft(model, profile)
    limit, names = drafted.budget("70%"), [site.name for site in drafted.anatomy.select("encoder.*") if site.kind == "linear"]
    static = drafted.best(limit)
    priced = {
        name: 4 * static.diagnostics["solver"]["multiplier"] * (drafted.anatomy[name].in_features + 1) / entry.damage
        for name in names
        if (entry := static.entries[name]).damage > 0 and any((term.rank or 0) >= 4 for term in entry.terms)
    }
    first = next(iter(priced))
    gains = {name: 0.99 * price for name, price in priced.items()}
    assert best_routed(drafted, limit, model, gains=gains).entries == static.entries
    plan = best_routed(drafted, limit, model, gains={**gains, first: 1.01 * priced[first]})
    routed_sites = {name for name, entry in plan.entries.items() if routers_of(entry.terms)}
    assert routed_sites == {first}
    assert plan.parameters(drafted.anatomy) <= limit.parameters


def test_healing_teaches_routers() -> None:
    model, _, dynamic = built("bert", "45%")
    routers = {name: parameter for name, parameter in dynamic.named_parameters() if "ROUTER" in name}
    rates = {id(group["params"][0]): group["lr"] for group in parameter_groups(dynamic, 1.0, 1.0, 0.0, router_rate=3.0)}
    for parameter in routers.values():
        assert rates[id(parameter)] == pytest.approx(3.0 * parameter.shape[1] ** -0.5)
    batches = [inputs("bert", rows=8, seed=seed) for seed in range(8)]
    found = train(dynamic, model, batches, batches[:2], Recipe(30, learning_rate=1e-2, checks=3))
    assert found.after.mean < found.before.mean
    assert all(parameter.any() for parameter in routers.values())


def test_what_routers_owe_is_not_in_the_validation_loss() -> None:
    torch.manual_seed(0)
    teacher = tf.BertForSequenceClassification(tf.BertConfig(**SIZES, max_position_embeddings=24)).eval()
    profile = hpr.profile(teacher, [inputs("bert", seed=seed) for seed in range(4)], "classification")
    plan = roomy(routed(hpr.plan(teacher, profile, "70%"), teacher))
    student = decided(hpr.share(teacher, plan, profile))
    loss = GlobalLoss(teacher, describe(teacher), OBJECTIVES["classification"], Weights(labels=1.0))
    batch = inputs("bert") | {"labels": torch.tensor([0, 1, 0, 1])}
    early, late = (loss(student, batch, progress).floats() for progress in (0.0, 1.0))
    assert 0 < early["routing"] < late["routing"]
    assert loss.validate(student, [batch]).mean == pytest.approx(early["outputs"] + early["labels"])


def test_the_entropy_asked_for() -> None:
    even, one = torch.ones(6, 4), torch.zeros(6, 4)
    one[:, 0] = 4
    each = 4 * torch.eye(4)
    owed = {
        (name, progress): float(undecided(entropies({("s", "r"): [(alpha, None)]}), progress))
        for name, alpha in (("even", even), ("one", one), ("each", each))
        for progress in (0, 1)
    }
    assert owed["even", 0] == pytest.approx(0, abs=1e-6)
    assert owed["even", 1] == pytest.approx(0.25)
    assert owed["one", 0] == owed["one", 1] == pytest.approx(1)
    assert owed["each", 1] == pytest.approx(0, abs=1e-6)
    masked = torch.tensor([1, 1, 0, 0])
    assert float(undecided(entropies({("s", "r"): [(each, masked)]}), 1)) == pytest.approx(0.5)


@pytest.mark.parametrize("bias", [True, False])
def test_whole_matrices_are_merged_for_a_sequence_where_that_is_cheaper(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    shapes = {"a": FactorShape(6, 5), "b": FactorShape(6, 5), "r": FactorShape(2, 6)}
    bank = FactorBank(shapes)
    terms = tuple(Term(name, route=Route("r", 2, "sequence", place)) for place, name in enumerate("ab"))
    site = RoutedLinear(bank, terms, nn.Linear(5, 6, bias=bias), "x").double()
    bank.double()
    with torch.no_grad():
        for name in shapes:
            bank[name].weight.normal_()
    x = torch.randn(3, 7, 5, dtype=torch.float64)
    mask = torch.ones(3, 7)
    mask[1, 4:] = 0
    bank.routing.masks.append(mask)
    mean = torch.stack([row[kept.bool()].mean(0) for row, kept in zip(x, mask, strict=True)])
    alpha = 2 * (mean @ bank["r"].weight[:, :-1].T + bank["r"].weight[:, -1]).softmax(-1)
    whole = alpha[:, 0, None, None] * bank["a"].weight + alpha[:, 1, None, None] * bank["b"].weight
    expected = torch.einsum("bti,boi->bto", x, whole) + (site.bias if bias else 0)
    assert site.merges(7)
    assert not site.merges(2)
    torch.testing.assert_close(site(x), expected)
    gradients = torch.autograd.grad(site(x).sum(), list(bank.parameters()))
    monkeypatch.setattr(RoutedLinear, "merges", lambda self, positions: False)
    torch.testing.assert_close(site(x), expected)
    for one, other in zip(gradients, torch.autograd.grad(site(x).sum(), list(bank.parameters())), strict=True):
        torch.testing.assert_close(one, other)


def test_weights_of_components_and_of_whole_terms() -> None:
    alpha = torch.tensor([[0.5, 1.5]])
    assert component_weights(alpha, Route("r", 2), 5).tolist() == [[0.5, 1.5, 0.5, 1.5, 0.5]]
    assert component_weights(alpha, Route("r", 2, expert=1), None).tolist() == [[1.5]]


@pytest.mark.parametrize(
    ("route", "message"),
    [
        ({"router": "r", "experts": 1}, "1 experts are not a whole number from 2 up"),
        ({"router": "r", "experts": 9}, "9 experts cannot be dealt rank 4"),
        ({"router": "r", "experts": 2, "expert": 2}, "expert 2 is not from 0 to 1"),
        ({"router": "", "experts": 2}, "'' is no factor name"),
        ({"router": "r", "experts": 2, "per": "word"}, "'word' is none of"),
        ({"router": "r", "experts": 2, "top": 1}, "a route has no field 'top'"),
    ],
)
def test_bad_routes_are_named(route, message) -> None:
    anatomy, name = describe(BUILDS["bert"]()), "encoder.layer.0.intermediate.dense"
    term = {"u": "u", "v": "v", "rank": 4, "route": route}
    with pytest.raises(HprError, match=message):
        validate_entry(anatomy[name], entry_from_dict(name, {"operator": "low rank", "terms": [term]}))


def test_tables_cannot_be_routed() -> None:
    anatomy = describe(BUILDS["bert"]())
    plan = keep_all(anatomy)
    name = "embeddings.word_embeddings"
    entry = replace(plan.entries[name], operator="low rank", terms=(Term("u", "v", 4, route=Route("r", 2)),))
    with pytest.raises(HprError, match="only Linear modules can"):
        replace(plan, entries={**plan.entries, name: entry}).validate(anatomy)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_routed_model_compiles_as_a_whole(kind) -> None:
    _, _, dynamic = built(kind)
    changed, batch = decided(dynamic), inputs(kind)
    compiled = torch.compile(changed, backend="eager", fullgraph=True)
    assert torch.equal(output(compiled, **batch), output(changed, **batch))
