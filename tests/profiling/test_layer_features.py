"""Layer features: the CKA formula, block influence, context dependence, and a model that is left as it was."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from hpr.anatomy.describe import describe
from hpr.errors import HprError
from hpr.profiling.layer_features import cka_matrix, measure_layers
from hpr.runtime.progress import reporting_to

Build = Callable[..., nn.Module]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def token_batches(count: int = 2, examples: int = 4, positions: int = 9) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    batches = []
    for _ in range(count):
        ids = torch.randint(3, 40, (examples, positions), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, 5:] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


class Block(nn.Module):
    """Position by position, unless it mixes; the output comes back in one of the ways that models use."""

    axis = 1  # of positions

    def __init__(self, wrap: Callable = lambda y: y, mix: bool = False):
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.wrap, self.mix = wrap, mix

    def forward(self, x: Tensor) -> object:
        y = x + self.inner(x)
        return self.wrap(y + y.mean(self.axis, keepdim=True) if self.mix else y)


class Plain(nn.Module):
    def __init__(self, *blocks: nn.Module):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            while not isinstance(x, Tensor):
                x = x[0]
        return x


def cka(first: Tensor, second: Tensor) -> float:
    """Linear CKA of two representations (N, D₁) and (N, D₂) of the same N examples."""
    return cka_matrix([first, second])[0][1]


def test_cka_is_the_formula() -> None:
    x, y = drawn(30, 5).double(), drawn(30, 8, seed=1).double()
    x_c, y_c = x - x.mean(0), y - y.mean(0)
    direct = (y_c.T @ x_c).norm() ** 2 / ((x_c.T @ x_c).norm() * (y_c.T @ y_c).norm())
    assert cka(x, y) == pytest.approx(float(direct), abs=1e-12)
    assert cka(x, y) == pytest.approx(cka(y, x), abs=1e-12)
    assert 0 < cka(x, y) < 1


def test_cka_ignores_rotation_scale_and_shift() -> None:
    x = drawn(40, 6)
    rotation = torch.linalg.qr(drawn(6, 6, seed=2).double()).Q
    assert cka(x, 7 * (x.double() @ rotation) + 3) == pytest.approx(1.0, abs=1e-12)
    assert cka(x, x.double() @ rotation @ torch.diag(torch.arange(1.0, 7)).double()) < 0.99
    assert cka(x * 1e-30, x * 1e30) == pytest.approx(1.0, abs=1e-6)
    assert cka(x, torch.full((40, 3), 0.1)) == 0.0


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: y,
        lambda y: (y, None),
        lambda y: [y],
        lambda y: BaseModelOutput(last_hidden_state=y),
        lambda y: ((y, None), 3, 3),
    ],
)
def test_plain_modules_and_what_blocks_may_return(wrap: Callable) -> None:
    torch.manual_seed(0)
    model = Plain(Block(wrap), Block(wrap), Block(wrap))
    batches = [drawn(5, 7, 6), drawn(3, 7, 6, seed=1)]
    features = measure_layers(model, describe(model), batches)["blocks"]
    x, hidden, influence = torch.cat(batches), [], []
    with torch.no_grad():
        for block in model.blocks:
            y = x + block.inner(x)
            influence.append(float((1 - torch.cosine_similarity(x.double(), y.double(), dim=-1)).mean()))
            hidden.append(y.mean(1))
            x = y
    assert features.block_influence == pytest.approx(influence, abs=1e-6)
    for i in range(3):
        for j in range(3):
            assert features.similarity[i][j] == pytest.approx(cka(hidden[i], hidden[j]), abs=1e-6)
    assert features.context_dependence == pytest.approx([0, 0, 0], abs=1e-12)  # no position sees another


def test_context_moves_what_attends_to_it() -> None:
    torch.manual_seed(0)
    model = Plain(Block(), Block(mix=True), Block())
    features = measure_layers(model, describe(model), [drawn(5, 7, 6)])["blocks"]
    assert features.context_dependence[0] == pytest.approx(0, abs=1e-12)
    assert min(features.context_dependence[1:]) > 1e-3
    lone = measure_layers(model, describe(model), [drawn(1, 7, 6)])["blocks"]
    assert lone.context_dependence[1] > 1e-3
    pooled = measure_layers(model, describe(model), [drawn(4, 1, 6)])["blocks"]
    assert pooled.context_dependence == pytest.approx([0, 0, 0], abs=1e-12)


def test_replacing_at_the_entrance_is_replacing_the_tokens(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same positions replaced in input_ids move a BERT's layers by the same amount."""
    from hpr.profiling import layer_features as module

    model, batch = build("bert"), token_batches(1)[0]
    swaps = []
    swap = module._swap

    def spy(x: Tensor, mask: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        swaps.append(swap(x, mask, generator)[1])
        return swap(x, mask, generator.set_state(start))

    start = torch.Generator().manual_seed(0).get_state()
    monkeypatch.setattr(module, "_swap", spy)
    found = measure_layers(model, describe(model), [batch])["encoder"].context_dependence
    (kept,) = swaps
    replaced = (batch["attention_mask"] > 0) & (kept == 0)
    assert replaced.any()
    assert not replaced[:, 0].any()
    assert not replaced[2, 5:].any()  # the example before is padding there
    ids = torch.where(replaced, batch["input_ids"].roll(1, 0), batch["input_ids"])
    with torch.no_grad():
        before = model(**batch, output_hidden_states=True).hidden_states[1:]
        after = model(**(batch | {"input_ids": ids}), output_hidden_states=True).hidden_states[1:]
    for layer, (x, y) in enumerate(zip(before, after, strict=True)):
        moved = (1 - torch.cosine_similarity(x.double(), y.double(), dim=-1))[kept > 0].mean()
        assert found[layer] == pytest.approx(float(moved), rel=1e-4)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "bart", "t5"])
def test_families(build: Build, family: str) -> None:
    model = build(family)
    batches = token_batches()
    if model.config.is_encoder_decoder:
        batches = [batch | {"decoder_input_ids": batch["input_ids"][:, :6]} for batch in batches]
    found = measure_layers(model, describe(model), batches)
    assert set(found) == {stack.name for stack in describe(model).stacks}
    for stack in describe(model).stacks:
        features = found[stack.name]
        assert len(features.similarity) == len(features.block_influence) == len(features.context_dependence) == stack.layers
        values = [*features.block_influence, *features.context_dependence, *(v for row in features.similarity for v in row)]
        assert all(math.isfinite(value) and 0 <= value <= 2 for value in values)
        assert all(value > 0 for value in features.context_dependence)
    assert found == measure_layers(model, describe(model), batches)
    assert found != measure_layers(model, describe(model), batches, seed=1)


def test_padding_does_not_matter(build: Build) -> None:
    model = build("bert")
    batch = token_batches(1)[0]
    other = dict(batch, input_ids=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 7))
    first, second = (measure_layers(model, describe(model), [one])["encoder"] for one in (batch, other))
    assert first.block_influence == pytest.approx(second.block_influence, abs=1e-7)
    assert first.context_dependence == pytest.approx(second.context_dependence, abs=1e-7)


def test_the_decoders_mask_is_its_own(build: Build) -> None:
    """Encoder and decoder inputs of one length: the decoder is pooled over its own real positions."""
    model = build("bart", tf.AutoModelForSeq2SeqLM)
    batch = token_batches(1)[0]
    labels = batch["input_ids"].masked_fill(batch["attention_mask"].flip(0) == 0, -100)
    marked = measure_layers(model, describe(model), [batch | {"labels": labels}])["decoder"]
    shifted = model.prepare_decoder_input_ids_from_labels(labels=labels)
    given = {"decoder_input_ids": shifted, "decoder_attention_mask": (labels != -100).long()}
    explicit = measure_layers(model, describe(model), [batch | given])["decoder"]
    assert marked.block_influence == pytest.approx(explicit.block_influence, abs=1e-6)


def test_pictures(build: Build) -> None:
    config = tf.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
    )
    torch.manual_seed(0)
    model = tf.AutoModel.from_config(config)
    (features,) = measure_layers(model, describe(model), [{"pixel_values": drawn(3, 3, 8, 8)}]).values()
    assert min(features.context_dependence) > 0


def test_the_model_is_left_as_it_was(build: Build) -> None:
    model = build("bert").train()
    model.encoder.layer[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    with pytest.raises(HprError, match=r"layer 0 of encoder.*batch 0"):
        measure_layers(model, describe(model), [{"inputs_embeds": torch.full((2, 3, 16), float("nan"))}])
    calls = []
    with reporting_to(lambda *call: calls.append(call)):
        measure_layers(model, describe(model), token_batches())
    assert calls == [("features", done, 4) for done in (1, 2, 3, 4)]
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_errors() -> None:
    model = Plain(Block(), Block())
    with pytest.raises(HprError, match="no calibration batches"):
        measure_layers(model, describe(model), [])
    unused = Plain(Block(), Block())
    unused.more = Plain(Block(), Block())
    assert set(measure_layers(unused, describe(unused), [drawn(2, 3, 6)])) == {"blocks"}


class Turned(nn.Module):
    """A model whose blocks get positions first, (T, B, D)."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        for block in inner.blocks:
            block.axis = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize(("examples", "positions"), [(5, 7), (7, 7), (2, 2), (20, 16)])
def test_positions_may_come_first(examples: int, positions: int) -> None:
    """Shapes do not tell it where there are as many positions as examples; of 20 examples, context dependence reads 16."""
    torch.manual_seed(0)
    plain = Plain(Block(mix=True), Block(), Block(mix=True))
    batches = [drawn(examples, positions, 6), drawn(3, 9, 6, seed=1)]
    expected = measure_layers(plain, describe(plain), batches)
    turned = Turned(plain)
    found = measure_layers(turned, describe(turned), batches)
    for one, other in zip(expected.values(), found.values(), strict=True):
        for name, values in vars(one).items():
            torch.testing.assert_close(torch.tensor(getattr(other, name)), torch.tensor(values), rtol=1e-4, atol=1e-6)
        assert min(one.context_dependence) > 1e-3


def test_states_that_are_not_those_of_examples_have_no_features() -> None:
    torch.manual_seed(0)
    whole = Plain(Block(), Block())
    whole.blocks[0].forward = lambda x: x.mean((0, 1), keepdim=True)  # one row for the whole batch
    assert measure_layers(whole, describe(whole), [drawn(4, 3, 6)]) == {}
    odd = Plain(Block(), Block())
    odd.forward = lambda x: [block(x) for block in odd.blocks] and x
    for block in odd.blocks:
        block.wrap = lambda y: {"x": None}
    assert measure_layers(odd, describe(odd), [drawn(4, 3, 6)]) == {}


def test_a_block_that_is_run_twice_counts_once() -> None:
    torch.manual_seed(0)
    model = Plain(Block(mix=True), Block())
    once = measure_layers(model, describe(model), [drawn(6, 4, 6)])
    twice = nn.Sequential(model, nn.Identity())
    twice.forward = lambda x: model(model(x))
    found = measure_layers(twice, describe(twice), [drawn(6, 4, 6)])
    assert list(found.values()) == list(once.values())
