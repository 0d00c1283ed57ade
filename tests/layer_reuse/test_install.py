"""Layers that are dropped or reuse attention: against float64 references, in every way in which a model may be run."""

import copy
import os
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertEncoder

import hpr
import tiny_families
from hpr.anatomy.describe import describe
from hpr.anatomy.lookup import module_at
from hpr.checkpoints import load, save
from hpr.errors import HprError
from hpr.evaluation.cost import flops_per_token, forward_flops, parts
from hpr.layer_reuse.attention import attention_modules
from hpr.layer_reuse.dead_weights import dead_weights
from hpr.layer_reuse.install import droppable, reusable, with_states
from hpr.layer_reuse.reuse import with_layers
from hpr.nn.bank import parameters
from hpr.plans.layer_states import DROPPED, KEYS, WEIGHTS
from hpr.plans.plan import Plan, keep_all
from hpr.plans.terms import Entry, Term
from hpr.runtime.batch import as_batch, example_batch
from hpr.runtime.hooks import run
from hpr.sharing.refit import refit_stacks
from hpr.sharing.share import share
from hpr.sharing.unshare import unshare

NAMES = ["BERT", "GPT-2", "GPT-NeoX", "Llama", "Qwen3", "T5", "BART", "Whisper", "ViT"]
STATES = [WEIGHTS, KEYS]


def make(name: str, head: str | None = None) -> nn.Module:
    """A tiny model whose attention depends on what it reads."""
    torch.manual_seed(0)
    family = tiny_families.FAMILIES[name]
    model = getattr(tf, head or family.model)(family.config()).eval()
    with torch.no_grad():
        for module in model.modules():
            if "Attention" in type(module).__name__:
                for parameter in module.parameters(recurse=False):
                    parameter.mul_(2)
                for child in module.children():
                    for parameter in child.parameters(recurse=False):
                        parameter.mul_(5 if parameter.dim() > 1 else 1)
    return model


def batch_of(name: str) -> dict[str, Tensor]:
    return tiny_families.FAMILIES[name].batch(torch.Generator().manual_seed(1))


def every_second(model: nn.Module, state: str) -> dict[str, str]:
    """Layers 1 and up of every stack: a run of takers where there are more than two layers."""
    return {f"{stack.name}.{layer}": state for stack in describe(model).stacks for layer in range(1, stack.layers)}


def planned(model: nn.Module, states: Mapping[str, str], batch: Any = None) -> Plan:
    anatomy = describe(model)
    return with_layers(keep_all(anatomy), anatomy, states, dead_weights(model, states, batch))


def made(name: str, state: str) -> tuple[nn.Module, nn.Module]:
    model = make(name)
    return model, share(model, planned(model, every_second(model, state)))


def out(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        output = run(model, as_batch(batch))
        return output if isinstance(output, Tensor) else next(value for value in output.values() if value.dim() > 1)


def reference(model: nn.Module, batch: Any, state: str, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The family's own eager attention in float64, given the keys and values, or weights, of the layer below."""
    model = copy.deepcopy(model).double()
    model.set_attn_implementation("eager")
    source = sys.modules[type(model).__module__]
    eager, kept = source.eager_attention_forward, {}
    first: dict[nn.Module, nn.Module] = {}
    for stack in describe(model).stacks:
        lowest = attention_modules(module_at(model, stack.block(0)))
        for layer in range(1, stack.layers):
            block = module_at(model, stack.block(layer))
            first |= {module: lowest[path] for path, module in attention_modules(block).items()}

    def patched(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *more: Any, **named: Any) -> tuple:
        if module in first and state == KEYS:
            key, value = kept[first[module]][1:]
        output, weights = eager(module, query, key, value, *more, **named)
        kept[module] = weights, key, value
        if module in first and state == WEIGHTS:
            weights = kept[first[module]][0]
            spread = value.repeat_interleave(weights.shape[1] // value.shape[1], dim=1)
            output = torch.einsum("bhts,bhsd->bthd", weights, spread)
        return output, weights

    with monkeypatch.context() as patch:
        patch.setattr(source, "eager_attention_forward", patched)
        return out(model, {key: value.double() if value.is_floating_point() else value for key, value in batch.items()})


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", NAMES)
def test_reuse_computes_what_the_reference_computes(name: str, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make(name), batch_of(name)
    plan = planned(model, every_second(model, state), batch)
    student, before = share(model, plan), copy.deepcopy(model.state_dict())
    expected = reference(model, batch, state, monkeypatch)
    assert not torch.allclose(out(model, batch).double(), expected, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(out(with_states(model, plan.layers), batch), out(student, batch))
    exact, precise = student.double(), {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    for implementation in ("sdpa", "eager"):
        exact.set_attn_implementation(implementation)
        torch.testing.assert_close(out(exact, precise), expected, rtol=1e-5, atol=1e-6)  # norms and softmax are of float32
    assert parameters(student) == plan.parameters(describe(model)) < parameters(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "Llama", "T5", "ViT"])
def test_a_dropped_layer_is_as_if_it_had_never_been(name: str) -> None:
    model, batch = make(name), batch_of(name)
    states = every_second(model, DROPPED)
    plan = planned(model, states)
    student = share(model, plan)
    config = copy.deepcopy(model.config)
    for key in ("num_hidden_layers", "num_decoder_layers"):
        if hasattr(config, key):
            setattr(config, key, 1)
    small = type(model)(config).eval()
    missing, _ = small.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    torch.testing.assert_close(out(student, batch), out(small, batch))
    assert parameters(student) == plan.parameters(describe(model)) == parameters(small)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("name", "left"), [("BERT", False), ("Llama", False), ("Llama", True), ("T5", False)])
def test_a_batch_of_mixed_lengths_is_as_one_by_one(name: str, left: bool, implementation: str, state: str) -> None:
    _, student = made(name, state)
    student.set_attn_implementation(implementation)
    ids = torch.randint(3, 96, (3, 9), generator=torch.Generator().manual_seed(2))
    lengths = [9, 4, 6]
    mask = torch.stack([(torch.arange(9) >= 9 - length) if left else (torch.arange(9) < length) for length in lengths]).long()
    more = {"decoder_input_ids": ids[:, :5]} if name == "T5" else {}
    together = out(student, {"input_ids": ids * mask, "attention_mask": mask, **more})
    for row, length in enumerate(lengths):
        alone = ids[row : row + 1, -length:] if left else ids[row : row + 1, :length]
        own = {key: value[row : row + 1] for key, value in more.items()}
        expected = out(student, {"input_ids": alone, **own})
        found = together[row : row + 1] if more else together[row : row + 1, mask[row].bool()]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("state", [*STATES, DROPPED])
@pytest.mark.parametrize("name", ["GPT-2", "Qwen3", "T5", "Whisper"])
def test_generation_with_and_without_a_cache(name: str, state: str) -> None:
    _, student = made(name, state)
    batch = {key: value[:2] for key, value in batch_of(name).items() if key != "labels"}
    if "input_ids" in batch:
        batch = {"input_ids": batch["input_ids"][:, :6]}
    batch = {key: value.repeat_interleave(2, 0) for key, value in batch.items()}
    for more in ({}, {"num_beams": 2}, {"cache_implementation": "static"}):
        settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **batch}
        cached = student.generate(use_cache=True, **settings, **more)
        more.pop("cache_implementation", None)
        assert torch.equal(cached, student.generate(use_cache=False, **settings, **more))


@pytest.mark.parametrize("state", [*STATES, DROPPED])
@pytest.mark.parametrize("name", ["BERT", "GPT-NeoX", "Qwen3", "BART"])
def test_save_load_save_is_exact(name: str, state: str, tmp_path: Path) -> None:
    model, student = made(name, state)
    batch = batch_of(name)
    student.save_pretrained(tmp_path / "first")
    loaded, report = type(model).from_pretrained(tmp_path / "first", output_loading_info=True)
    loaded.save_pretrained(tmp_path / "second")
    assert not any(report.values()), report
    assert torch.equal(out(loaded, batch), out(student, batch))
    assert parameters(loaded) == parameters(student)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    inner = tf.AutoModel.from_pretrained(tmp_path / "first")
    inputs = {key: value for key, value in batch.items() if key != "labels"} | _decoder(batch)
    if name != "BERT":  # a pooler of its own, new
        assert torch.equal(out(inner, inputs), out(getattr(student, student.base_model_prefix), inputs))
    eager = type(model).from_pretrained(tmp_path / "first", attn_implementation="eager")
    torch.testing.assert_close(out(eager, batch), out(student, batch), rtol=1e-5, atol=1e-6)
    if state == WEIGHTS:
        assert all(weights is not None for weights in _attentions(eager, batch))


def _decoder(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"decoder_input_ids": batch["labels"]} if "labels" in batch else {}


def _attentions(model: nn.Module, batch: Mapping[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        outputs = model(**batch, output_attentions=True)
    found = list(outputs["attentions"] if "attentions" in outputs else outputs["decoder_attentions"])
    assert torch.equal(found[0], found[1])  # the second layer's are those of the first
    return found


def test_loading_without_hpr_fails_loudly_though_nothing_reads_factors(tmp_path: Path) -> None:
    made("BERT", DROPPED)[1].save_pretrained(tmp_path)
    code = f"import transformers; transformers.BertForMaskedLM.from_pretrained({str(tmp_path)!r})"
    alone = os.environ | {"HPR_AUTOLOAD": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, env=alone)
    assert done.returncode != 0
    assert done.stderr.strip().endswith("import hpr before loading")


@pytest.mark.parametrize("state", [*STATES, DROPPED])
@pytest.mark.parametrize("name", ["GPT-2", "Qwen3", "BART"])
def test_gradients_reach_all_that_stays(name: str, state: str) -> None:
    _, student = made(name, state)
    batch = batch_of(name)
    sample = out(student, batch)
    direction = torch.randn(sample.shape, generator=torch.Generator().manual_seed(3))

    def gradients(one: nn.Module) -> dict[str, Tensor]:
        one.zero_grad()
        outputs = run(one, batch)
        (next(value for value in outputs.values() if value.dim() > 1) * direction).sum().backward()
        return {key: parameter.grad.clone() for key, parameter in one.named_parameters() if parameter.grad is not None}

    found = gradients(student)
    assert set(found) == {key for key, _ in student.named_parameters()}
    assert all(gradient.any() for key, gradient in found.items() if "position" not in key)
    student.train()  # no dropout is left in these: checkpointing asks for training mode
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for key in ("dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(module, key, None), float):
                setattr(module, key, 0.0)
    student.activation_checkpointing_enable({"use_reentrant": False})
    again = gradients(student)
    for key, gradient in found.items():
        torch.testing.assert_close(again[key], gradient, rtol=1e-4, atol=1e-5)


def test_copies_and_threads_do_not_meet() -> None:
    _, student = made("Llama", WEIGHTS)
    batch, other = batch_of("Llama"), tiny_families.text(torch.Generator().manual_seed(5))
    expected, expected_other = out(student, batch), out(student, other)
    twin, results = copy.deepcopy(student), {}
    block = student.model.layers[0]

    def between(module: nn.Module, inputs: Any, output: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            results["twin"] = out(twin, other)
            worker = threading.Thread(target=lambda: results.update(thread=out(student, other)))
            worker.start()
            worker.join()

    handle = block.register_forward_hook(between)
    results["main"] = out(student, batch)
    handle.remove()
    assert torch.equal(results["main"], expected)
    assert torch.equal(results["thread"], expected_other)
    assert torch.equal(results["twin"], expected_other)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(out(student, batch), expected)


def test_what_an_earlier_pass_left_is_never_taken() -> None:
    _, student = made("Llama", WEIGHTS)
    batch = batch_of("Llama")
    run(student, batch)  # gradients are recorded, so the weights are still held
    holders = [module.hpr_role.takes_weights for module in student.modules() if getattr(module, "hpr_role", None)]
    kept = {id(holder): holder for holder in holders if holder is not None}.values()
    assert all(holder.get() is not None for holder in kept)
    out(student, batch)
    assert all(holder.get() is None for holder in kept)
    student.model.layers[0].forward = lambda hidden, *more, **named: hidden  # as layerdrop does
    with pytest.raises(HprError, match=r"layers\.1 finds nothing to reuse.*layerdrop to 0"):
        run(student, batch)


def test_compiled() -> None:
    _, student = made("GPT-2", WEIGHTS)
    batch = batch_of("GPT-2")
    compiled = torch.compile(student, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(out(compiled, batch), out(student, batch))


def test_beside_other_operators_and_with_a_profile(tmp_path: Path) -> None:
    model, batch = make("GPT-2"), batch_of("GPT-2")
    anatomy, states = describe(model), {"h.1": WEIGHTS, "h.2": WEIGHTS}
    profile = hpr.profile(model, [batch])
    plan = planned(model, states)
    torch.testing.assert_close(out(share(model, plan, profile), batch), out(with_states(model, states), batch))
    names = ["h.1.mlp.c_fc", "h.2.mlp.c_fc"]
    terms = {name: Entry("low rank", (Term(f"{name}.u", f"{name}.v", 31),)) for name in names}
    mixed = replace(plan, entries={**plan.entries, **terms})
    student = share(model, mixed, profile)
    assert (
        parameters(student) == mixed.parameters(anatomy) == parameters(share(model, plan)) + 2 * 31 * (32 + 128) - 2 * 32 * 128
    )
    torch.testing.assert_close(out(student, batch), out(with_states(model, states), batch), rtol=0.1, atol=0.1)
    student.save_pretrained(tmp_path)
    assert torch.equal(out(type(model).from_pretrained(tmp_path), batch), out(student, batch))


class Plain(nn.Module):
    """A BERT encoder on frames of any kind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = BertEncoder(tf.BertConfig(**tiny_families.PLAIN, attn_implementation="sdpa"))

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x).last_hidden_state


@pytest.mark.parametrize("states", [{"encoder.1": WEIGHTS, "encoder.2": DROPPED}, {"encoder.1": DROPPED, "encoder.2": WEIGHTS}])
def test_plain_modules(states: dict[str, str], tmp_path: Path) -> None:
    model, x = Plain().eval(), torch.randn(2, 5, 32)
    student = share(model, planned(model, states, x))
    save.save(student, tmp_path)
    loaded = load.load(Plain().eval(), tmp_path)
    assert torch.equal(out(loaded, x), out(student, x))
    assert torch.equal(out(with_states(model, states), x), out(student, x))
    assert parameters(loaded) == parameters(student)


def test_mixed_states_take_from_the_nearest_layer_that_has_it() -> None:
    model = make("BERT")
    batch = {"input_ids": torch.randint(3, 96, (2, 6))}
    twin = with_states(model, {"encoder.1": KEYS, "encoder.2": WEIGHTS})
    blocks = [next(iter(attention_modules(module_at(twin, f"encoder.layer.{layer}")).values())) for layer in range(3)]
    roles = [block.hpr_role for block in blocks]
    assert roles[0].gives_keys is roles[1].takes_keys is not None
    assert roles[1].gives_weights is roles[2].takes_weights is not None
    out(twin, batch)
    skipping = with_states(model, {"encoder.1": WEIGHTS, "encoder.2": KEYS})
    blocks = [next(iter(attention_modules(module_at(skipping, f"encoder.layer.{layer}")).values())) for layer in range(3)]
    assert blocks[2].hpr_role.takes_keys is blocks[0].hpr_role.gives_keys is not None


@pytest.mark.parametrize("state", [WEIGHTS, KEYS])
def test_nothing_is_held_after_a_backward_pass(state: str) -> None:
    model = with_states(make("BERT"), {"encoder.1": state, "encoder.2": state}).train()
    blocks = [next(iter(attention_modules(module_at(model, f"encoder.layer.{layer}")).values())) for layer in range(3)]
    holder = blocks[0].hpr_role.gives_weights or blocks[0].hpr_role.gives_keys
    for _ in range(2):
        output = run(model, {"input_ids": torch.randint(3, 96, (2, 6))})[0]
        given = holder.get()
        held = weakref.ref(given[0] if isinstance(given, tuple) else given)
        del given
        assert held() is not None
        output.sum().backward()
        del output
        assert held() is None
        assert holder.get() is None


def test_operations_fall() -> None:
    model, student = made("Llama", WEIGHTS)
    anatomy, batch = describe(model), {"input_ids": torch.randint(3, 96, (2, 16))}
    projections = 2 * (32 * 32 + 16 * 32)  # queries, keys of half as many heads
    assert flops_per_token(model, anatomy) - flops_per_token(student, anatomy) == 2 * projections
    scores = 2 * 16 * 16 * 32  # an example: T x S x width
    assert forward_flops(model, batch) - forward_flops(student, batch) == 2 * 2 * (16 * projections + scores)
    assert sum(row["after"] for row in parts(model, student, anatomy)) == parameters(student)


def test_unshare_names_the_layers() -> None:
    _, student = made("BERT", WEIGHTS)
    with pytest.raises(HprError, match=r"encoder\.layer\.1 \(attention reused\), encoder\.layer\.2"):
        unshare(student)


def test_refit_is_refused() -> None:
    model = make("BERT")
    plan = planned(model, {"encoder.1": WEIGHTS})
    with pytest.raises(HprError, match=r"encoder\.1 is 'attention reused'.*leave the refit out"):
        refit_stacks(share(model, plan), model, describe(model), plan, {}, [batch_of("BERT")])


def test_who_can_and_why_not() -> None:
    def reasons(name: str, find: Callable) -> dict[str, str | None]:
        model = make(name)
        return find(model, describe(model))

    assert reasons("BERT", reusable) == {"encoder.0": "there is no layer below", "encoder.1": None, "encoder.2": None}
    assert "past transformers' attention interface" in str(reasons("MPNet", reusable)["encoder.1"])
    assert "past transformers' attention interface" in str(reasons("DeBERTa-v2", reusable)["encoder.1"])
    assert "attends as 'sliding_attention'" in str(reasons("ModernBERT", reusable)["layers.1"])
    assert reasons("ModernBERT", reusable)["layers.2"] is None
    assert "in different ways" in str(reasons("ModernBERT", droppable)["layers.1"])
    assert "lowest" in str(reasons("MPNet", droppable)["encoder.0"])
    assert reasons("MPNet", droppable)["encoder.1"] is None
    with pytest.raises(HprError, match="past transformers' attention interface; let it be its own"):
        with_states(make("MPNet"), {"encoder.1": WEIGHTS})


def test_other_attention_is_refused() -> None:
    model, student = made("Llama", WEIGHTS)
    batch = batch_of("Llama")
    student.config._attn_implementation_internal = "flex_attention"
    role = next(module.hpr_role for module in student.modules() if getattr(module, "hpr_role", None))
    assert role.config is student.config
    with pytest.raises(HprError, match=r"set_attn_implementation\('sdpa'\)"):
        student.model.layers[0].self_attn(
            torch.zeros(1, 2, 32), student.model.rotary_emb(torch.zeros(1, 2, 32), torch.arange(2)[None]), None
        )
    model.set_attn_implementation("hpr_reuse")
    with pytest.raises(HprError, match="'hpr_reuse' is for layers that reuse attention"):
        out(model, {"input_ids": batch["input_ids"]})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers": {"encoder.9": WEIGHTS}}, "no layer 'encoder.9'.*encoder.0 to encoder.2"),
        ({"layers": {"encoder.1": "asleep"}}, "'asleep' is no state"),
        ({"layers": {"encoder.0": WEIGHTS}}, "lowest of its stack"),
        ({"layers": {"encoder.1": DROPPED, "encoder.2": WEIGHTS}}, "both are 'dropped', or neither"),
        ({"layers": {"encoder.2": WEIGHTS}}, "layer encoder.1 reuses nothing"),
        ({"removed": {"encoder.1": -1}}, "whole number from 0 up"),
        ({"removed": {}}, "what it says of removed parameters is not so"),
    ],
)
def test_plans_that_contradict_themselves(change: dict[str, Any], words: str) -> None:
    model = make("BERT")
    data = planned(model, {"encoder.1": WEIGHTS, "encoder.2": WEIGHTS}).to_dict()
    assert Plan.from_dict(data).to_dict() == data
    with pytest.raises(HprError, match=words):
        share(model, Plan.from_dict({**data, **change}))
    older = keep_all(describe(model)).to_dict()
    assert "layers" not in older
    assert Plan.from_dict(older).layers == {}


def test_a_site_that_still_has_an_effect_cannot_vanish() -> None:
    model = make("BERT")
    data = planned(model, {"encoder.1": WEIGHTS}).to_dict()
    data["sites"]["encoder.layer.1.intermediate.dense"] = {"operator": "reused", "damage": 0.0, "terms": []}
    with pytest.raises(HprError, match="its layer attends by itself"):
        share(model, Plan.from_dict(data))


@pytest.mark.parametrize("name", ["Llama", "T5", "Whisper", "ViT", "CLIP", "wav2vec2"])
def test_example_batches(name: str) -> None:
    model = make(name)
    assert torch.isfinite(out(model, example_batch(model))).all()


def test_plain_modules_need_a_batch() -> None:
    with pytest.raises(HprError, match="give a batch"):
        dead_weights(Plain(), {"encoder.1": WEIGHTS})
    assert re.match("encoder", next(iter(reusable(Plain(), describe(Plain())))))
