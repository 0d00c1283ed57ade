"""States with positions first, (T, B, d), are read by example where a batch has as many examples as positions, too."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import hpr
from conftest import strengthened
from hpr.anatomy.describe import describe
from hpr.errors import HprError
from hpr.healing.loss import GlobalLoss, Weights
from hpr.operators.fitting import Fits
from hpr.profiling.curvature import measure_curvature
from hpr.profiling.layer_features import measure_layers
from hpr.profiling.layout import turned_modules
from hpr.profiling.objectives import OBJECTIVES, Objective
from hpr.profiling.run import profile
from hpr.routing import expected_gains
from hpr.routing.plan import routed
from hpr.runtime.batch import Batch, first_examples
from hpr.sharing.refit import refit

EXAMPLES = 8
MODELS: dict[str, Callable[[], nn.Module]] = {
    "xlnet": lambda: tf.XLNetModel(tf.XLNetConfig(vocab_size=40, d_model=16, n_layer=3, n_head=2, d_inner=24)),
    "fsmt": lambda: tf.FSMTForConditionalGeneration(
        tf.FSMTConfig(
            langs=["en", "de"],
            src_vocab_size=40,
            tgt_vocab_size=40,
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_position_embeddings=32,
        )
    ),
    "bert": lambda: tf.BertModel(
        tf.BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24)
    ),
}
TURNED = ("xlnet", "fsmt")


class Fixed(Objective):
    """Its loss of an example does not depend on the batch around it."""

    def loss(self, outputs: object, batch: Batch, generator: torch.Generator) -> Tensor:
        states = outputs[0]  # type: ignore[index]
        mask = batch.get("decoder_attention_mask", batch["attention_mask"])
        directions = torch.cos(torch.arange(states.shape[1] * states.shape[2]).reshape(states.shape[1:]) ** 1.5)
        return (states * directions * mask.unsqueeze(-1)).sum()


def fixed() -> Objective:
    goal = OBJECTIVES["hidden"]
    return Fixed("fixed", goal.read, distribution=goal.distribution)


def built(family: str) -> nn.Module:
    torch.manual_seed(0)
    return strengthened(MODELS[family]())


def batch_of(family: str, positions: int, decoder: int = 6) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(positions)

    def texts(length: int) -> tuple[Tensor, Tensor]:
        lengths = 2 + torch.arange(EXAMPLES) % (length - 1)
        return torch.randint(4, 40, (EXAMPLES, length), generator=draw), (torch.arange(length) < lengths[:, None]).long()

    ids, mask = texts(positions)
    batch = {"input_ids": ids, "attention_mask": mask}
    if family == "fsmt":
        batch["decoder_input_ids"], batch["decoder_attention_mask"] = texts(decoder)
    return batch


def parts_of(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The same examples in two batches, of which neither has as many examples as positions."""
    return [{name: value[rows] for name, value in batch.items()} for rows in (slice(5), slice(5, None))]


@pytest.mark.parametrize("positions", [7, 8, 9])
@pytest.mark.parametrize("family", MODELS)
def test_features_and_curvature_are_those_of_the_examples(family: str, positions: int) -> None:
    model, batch = built(family), batch_of(family, positions)
    anatomy = describe(model)
    whole, parts = (measure_layers(model, anatomy, batches) for batches in ([batch], parts_of(batch)))
    assert whole.keys() == parts.keys() != set()
    for stack, expected in parts.items():
        torch.testing.assert_close(
            torch.tensor(whole[stack].similarity), torch.tensor(expected.similarity), atol=1e-6, rtol=1e-5
        )
        assert whole[stack].block_influence == pytest.approx(expected.block_influence, rel=1e-4)
    first = batch_of(family, 11)  # the first look, at scales and means, is at this batch alone
    (sites, _), (expected_sites, _) = (
        measure_curvature(model, anatomy, [first, *batches], fixed()) for batches in ([batch], parts_of(batch))
    )
    for name in (site.name for site in anatomy.sites if site.kind == "linear"):  # tables of positions are read once a batch
        one = expected_sites[name]
        assert sites[name].rows == pytest.approx(one.rows)
        for side in ("left", "right"):
            found, wanted = getattr(sites[name], side), getattr(one, side)
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("decoder", [6, 7, 8])
def test_modules_are_found_by_a_part_that_tells_axes_apart(decoder: int) -> None:
    """Batches of 7 examples would look square to a decoder of 7 positions."""
    model, batch = built("fsmt"), batch_of("fsmt", 8, decoder)
    turned = turned_modules(model, [batch])
    encoder, decoder = model.model.encoder.layers, model.model.decoder.layers
    assert {encoder[1], encoder[0].fc1, decoder[0].encoder_attn.k_proj, decoder[0], decoder[1].self_attn.q_proj} <= turned
    assert model.model.decoder.output_projection not in turned
    assert turned_modules(model, [batch_of("fsmt", 9, 7)]) == frozenset()  # shapes tell


def test_batch_first_models_have_no_such_modules() -> None:
    assert turned_modules(built("bert"), [batch_of("bert", 8)]) == frozenset()
    one = {"input_ids": torch.full((1, 1), 5), "attention_mask": torch.ones(1, 1).long()}
    assert turned_modules(built("xlnet"), [one]) == frozenset()


@pytest.mark.parametrize("family", TURNED)
def test_hidden_states_in_the_loss_are_masked_by_example(family: str) -> None:
    model, batch = built(family), batch_of(family, 8, 8)
    loss = GlobalLoss(model, describe(model), OBJECTIVES["seq2seq" if family == "fsmt" else "hidden"], Weights(hidden=1.0))
    for path in loss.anatomy.blocks:
        name = "decoder_attention_mask" if "decoder" in path else "attention_mask"
        targets = loss.targets(batch, [path])
        assert torch.equal(loss.mask(batch, path, targets.hidden[path]), batch[name].T.float())
        part = first_examples(batch, 5)
        targets = loss.targets(part, [path])
        assert torch.equal(loss.mask(part, path, targets.hidden[path]), part[name].T.float())


@pytest.fixture(scope="module")
def shared() -> tuple[nn.Module, hpr.Profile, hpr.Plan]:
    model = built("xlnet")
    statistics = profile(model, [batch_of("xlnet", 11)], "hidden")
    plan = hpr.plan(model, statistics, "90%", options=hpr.PlanOptions(operators=["low-rank"]))
    return model, statistics, plan


def test_refit_leaves_padding_out(shared) -> None:
    model, statistics, plan = shared
    batch = batch_of("xlnet", 8)
    students = [hpr.share(model, plan, statistics) for _ in range(2)]
    before = copy.deepcopy(students[0].state_dict())
    for student, batches in zip(students, ([batch], parts_of(batch)), strict=True):
        refit(student, model, plan, statistics, batches)
    after, expected = (model(**batch).last_hidden_state for model in students)
    assert any(not torch.equal(value, before[name]) for name, value in students[0].state_dict().items())
    torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-3)


def test_expected_gains_leave_padding_out(shared) -> None:
    model, statistics, _ = shared
    fits, batch = Fits(model, statistics), batch_of("xlnet", 8)
    sites = [site for site in fits.anatomy.sites if site.kind == "linear"]
    measured = fits.measured(site.name for site in sites)
    found, expected = (expected_gains._moments(model, sites, batches, measured) for batches in ([batch], parts_of(batch)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_routers_refuse_states_that_they_cannot_read(shared) -> None:
    model, _, plan = shared
    with pytest.raises(HprError, match="hidden states of XLNetModel have positions before examples"):
        routed(plan, model, 2)
