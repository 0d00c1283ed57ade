"""Whole runs on models and data that are unlike most: other caches, layers of unlike widths, texts that hardly vary."""

from collections.abc import Callable

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import hpr
from hpr.anatomy.multiplies import multiplies

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 2}
OPTIONS = hpr.PlanOptions(plans=1, refit=True)


def batches(low: int = 4, high: int = 60, length: int = 9) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(low, high, (8, length), generator=draw)} for _ in range(8)]


def bert(**settings: int) -> nn.Module:
    torch.manual_seed(0)
    return tf.BertForMaskedLM(tf.BertConfig(**SIZES | {"num_hidden_layers": 3} | settings)).eval()


@pytest.mark.parametrize(
    "config",
    [
        tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=2, eos_token_id=3),
        tf.GPTNeoXConfig(**SIZES),
        tf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
        tf.FalconConfig(**{k: v for k, v in SIZES.items() if k != "intermediate_size"}, alibi=False),
        tf.MptConfig(vocab_size=64, d_model=32, n_heads=4, n_layers=2, max_seq_len=64),
        tf.CTRLConfig(vocab_size=64, n_embd=32, dff=64, n_layer=2, n_head=4, n_positions=64),
    ],
    ids=lambda config: config.model_type,
)
def test_a_refit_runs_whatever_carries_the_cache(config: tf.PretrainedConfig) -> None:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    use_cache = model.config.use_cache
    made = hpr.compress(model, "80%", batches(), options=OPTIONS)
    assert made.metrics["refit"] is True
    assert any(entry.terms for entry in made.plan.entries.values())
    assert model.config.use_cache == use_cache


@pytest.mark.parametrize("budget", ["70%", "30%bytes"])
def test_layers_of_unlike_widths(budget: str) -> None:
    """Structured pruning leaves a layer with fewer neurons, or fewer heads, than its neighbours."""
    model = bert()
    narrow = model.bert.encoder.layer[1]
    narrow.intermediate.dense, narrow.output.dense = nn.Linear(32, 40), nn.Linear(40, 32)
    attention = model.bert.encoder.layer[2].attention
    for name in ("query", "key", "value"):
        setattr(attention.self, name, nn.Linear(32, 16))
    attention.self.num_attention_heads, attention.self.all_head_size = 2, 16
    attention.output.dense = nn.Linear(16, 32)
    made = hpr.compress(model, budget, batches(), options=hpr.PlanOptions(plans=1))
    ids = batches()[0]
    assert torch.isfinite(made.student(**ids).logits).all()


@pytest.mark.parametrize("budget", ["60%", "30%bytes"])
@pytest.mark.parametrize(
    "data",
    [
        [{"input_ids": torch.full((8, 6), 7)} for _ in range(8)],  # one text again and again
        [{"input_ids": torch.full((8, 1), 9)} for _ in range(8)],  # one word
        [{"input_ids": torch.arange(4, 12)[:, None]} for _ in range(8)],  # single words
    ],
    ids=["one text", "one word", "single words"],
)
@pytest.mark.parametrize("kind", [tf.BertModel, tf.BertForMaskedLM])
def test_texts_that_hardly_vary(kind: type, data: list[dict[str, Tensor]], budget: str) -> None:
    torch.manual_seed(0)
    model = kind(tf.BertConfig(**SIZES)).eval()
    made = hpr.compress(model, budget, data, options=hpr.PlanOptions(plans=1, refit=True if budget == "60%" else None))
    assert all(torch.isfinite(parameter).all() for parameter in made.student.parameters())
    assert made.metrics["quality"][0]["after"] >= 0


def test_targets_that_are_all_alike(build: Callable[..., nn.Module]) -> None:
    """The decoder's inputs never vary, so what centring leaves of their moments is rounding."""
    model = build("bart")
    data = [{**batch, "labels": torch.full((8, 1), 5)} for batch in batches(high=30)]
    made = hpr.compress(model, "70%", data, options=OPTIONS)
    assert all(torch.isfinite(parameter).all() for parameter in made.student.parameters())


@pytest.mark.parametrize("what", ["zero layer", "equal layers", "no bias read"])
def test_weights_of_low_rank(what: str) -> None:
    model = bert()
    with torch.no_grad():
        if what == "zero layer":  # as pruning leaves it
            for parameter in model.bert.encoder.layer[1].parameters():
                parameter.mul_(parameter.dim() < 2)
        elif what == "equal layers":
            model.bert.encoder.layer[1].load_state_dict(model.bert.encoder.layer[0].state_dict())
        else:
            model.bert.encoder.layer[1].output.dense.weight[:, 1:] = 0
    for budget in ("60%", "30%bytes"):
        made = hpr.compress(model, budget, batches(), options=hpr.PlanOptions(plans=1))
        assert all(torch.isfinite(parameter).all() for parameter in made.student.parameters())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (parametrizations.weight_norm, r"computes its weight from parametrizations.*remove_parametrizations"),
        (parametrizations.orthogonal, r"remove_parametrizations"),
        (spectral_norm, r"computes its weight from weight_orig.*remove_spectral_norm"),
        (weight_norm, r"computes its weight from weight_g, weight_v.*remove_weight_norm"),
        (lambda module: prune.l1_unstructured(module, "weight", 0.5), r"weight_orig, weight_mask.*prune\.remove"),
    ],
)
def test_weights_that_are_computed_are_refused_by_name(change: Callable, said: str) -> None:
    model = bert()
    change(model.bert.encoder.layer[1].output.dense)
    for budget in ("95%", "50%bytes"):
        with pytest.raises(hpr.HprError, match=rf"bert\.encoder\.layer\.1\.output\.dense \(.*\) .*{said}"):
            hpr.compress(model, budget, batches(), options=OPTIONS)
    model = bert()
    change(model.bert.embeddings.word_embeddings)
    with pytest.raises(hpr.HprError, match="word_embeddings"):
        hpr.profile(model, batches())


class _Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class _WrittenOut(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


def test_a_subclass_of_linear_is_a_site_if_it_multiplies() -> None:
    model = bert()
    layer = model.bert.encoder.layer[1]
    state = layer.output.dense.state_dict()
    for kind, is_site in ((_WrittenOut, True), (_Scaled, False)):
        layer.output.dense = kind(64, 32)
        layer.output.dense.load_state_dict(state)
        names = [site.name for site in hpr.describe(model).sites]
        assert ("encoder.layer.1.output.dense" in names) is is_site
        with torch.device("meta"):
            bare = kind(64, 32)
        assert multiplies(bare) is is_site
    ids = batches()[0]
    for budget in ("60%", "30%bytes"):  # the scaled one stays, or is coded by its gradients
        made = hpr.compress(model, budget, batches(), options=hpr.PlanOptions(plans=1))
        assert torch.isfinite(made.student(**ids).logits).all()
