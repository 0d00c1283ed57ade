"""Symmetries are found where they are, by structure, and nowhere else."""

import copy

import pytest
import torch
import transformers as tf
from torch import nn

from hpr.anatomy.describe import describe
from hpr.anatomy.symmetry import Symmetry
from hpr.profiling.symmetry_search import find_symmetries

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32, "vocab_size": 40}
MODELS = {
    "bert": lambda: tf.BertModel(tf.BertConfig(**SIZES, max_position_embeddings=24)),
    "llama": lambda: tf.LlamaModel(tf.LlamaConfig(**SIZES, num_key_value_heads=2)),
    "gpt2": lambda: tf.GPT2Model(tf.GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=40, n_positions=24)),
    "t5": lambda: tf.T5Model(tf.T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4)),
    "albert": lambda: tf.AlbertModel(tf.AlbertConfig(**SIZES, embedding_size=16)),
}
EXPECTED = {
    "bert": {
        "rotation 4 attention.self.value+attention.output.dense",
        "rotation 4 attention.self.key+attention.self.query",
        "order 4 attention.self.key+attention.self.query+attention.self.value+attention.output.dense",
        "order 32 intermediate.dense+output.dense",
    },
    "llama": {  # rotary embeddings stand between queries and keys; two queries share a key; signs pass a gate
        "rotation 2 self_attn.v_proj+self_attn.o_proj",
        "order 2 self_attn.q_proj+self_attn.k_proj+self_attn.v_proj+self_attn.o_proj",
        "rotation 32 mlp.up_proj+mlp.down_proj",
        "order 32 mlp.gate_proj+mlp.up_proj+mlp.down_proj",
    },
    "gpt2": {  # three projections in one matrix
        "rotation 4 attn.c_attn[32:]+attn.c_proj",
        "rotation 4 attn.c_attn+attn.c_attn[16:]",
        "order 4 attn.c_attn+attn.c_attn[16:]+attn.c_attn[32:]+attn.c_proj",
        "order 64 mlp.c_fc+mlp.c_proj",
    },
    "t5": {  # relative positions know the heads of self-attention; those of cross-attention are free
        "rotation 4 layer.0.SelfAttention.v+layer.0.SelfAttention.o",
        "rotation 4 layer.0.SelfAttention.k+layer.0.SelfAttention.q",
        "order 32 layer.1.DenseReluDense.wi+layer.1.DenseReluDense.wo",
        "rotation 4 layer.1.EncDecAttention.v+layer.1.EncDecAttention.o",
        "rotation 4 layer.1.EncDecAttention.k+layer.1.EncDecAttention.q",
        "order 4 layer.1.EncDecAttention.k+layer.1.EncDecAttention.q+layer.1.EncDecAttention.v+layer.1.EncDecAttention.o",
        "order 32 layer.2.DenseReluDense.wi+layer.2.DenseReluDense.wo",
    },
    "albert": set(),  # one layer, used again and again: there is nothing to align
}


def spelled(symmetry: Symmetry) -> str:
    names = [one.slot + (f"[{one.start}:]" if one.start else "") for one in symmetry.slices]
    return f"{symmetry.kind} {symmetry.blocks} {'+'.join(names)}"


def made(family: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = MODELS[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    ids = torch.randint(3, 40, (3, 20), generator=torch.Generator().manual_seed(0))
    return model, {"input_ids": ids, "decoder_input_ids": ids.flip(0)} if family == "t5" else {"input_ids": ids}


@pytest.mark.parametrize("family", MODELS)
def test_families(family) -> None:
    model, batch = made(family)
    before = copy.deepcopy(model.state_dict())
    found = find_symmetries(model, describe(model), [batch])
    assert {spelled(one) for one in found} == EXPECTED[family]
    assert all(Symmetry.from_list(one.to_list()) == one for one in found)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert find_symmetries(model, describe(model), [batch]) == found


class Block(nn.Module):
    """A feed-forward; with ``between`` something that knows its neurons by number stands inside."""

    def __init__(self, between: bool):
        super().__init__()
        self.up, self.down, self.scale = nn.Linear(8, 12), nn.Linear(12, 8), torch.linspace(1, 2, 12) if between else None

    def forward(self, x):
        hidden = self.up(x).relu()
        return x + self.down(hidden if self.scale is None else hidden * self.scale)


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


@pytest.mark.parametrize(("extra", "between", "count"), [((), False, 1), ((), True, 0), ((Noisy(),), False, 0)])
def test_plain_modules(extra, between, count) -> None:
    """Found in a Sequential too; not where neurons are told apart, nor where outputs differ from run to run."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(Block(between), Block(between)), *extra)
    found = find_symmetries(model, describe(model), [torch.randn(4, 20, 8)])
    assert len(found) == count


def test_one_position_proves_nothing() -> None:
    model, batch = made("bert")
    single = {"input_ids": batch["input_ids"][:, :1]}
    assert find_symmetries(model, describe(model), [single]) == ()
    assert {spelled(one) for one in find_symmetries(model, describe(model), [single, batch])} == EXPECTED["bert"]


class _FailsInFloat64(nn.Module):
    """A model that runs as it is; its copy in float64 raises an error."""

    def __init__(self, fail) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.fail = fail

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float64:
            self.fail(x)
        for layer in self.layers:
            x = layer(x)
        return x


def _raise_out_of_memory(x: torch.Tensor) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("fail", [_raise_out_of_memory, lambda x: torch.empty(1 << 50)])
def test_lack_of_memory_is_no_lack_of_symmetries(fail) -> None:
    model = _FailsInFloat64(fail)
    with pytest.raises(RuntimeError, match="memory"):
        find_symmetries(model, describe(model), [torch.randn(4, 8)])


def test_a_model_that_needs_float32_has_no_symmetries() -> None:
    model = _FailsInFloat64(lambda x: x @ torch.eye(8))
    assert find_symmetries(model, describe(model), [torch.randn(4, 8)]) == ()


class Whole(nn.Module):
    """Reads its batch only as a whole: the number of rows stands in another input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block(False) for _ in range(2))

    def forward(self, rows: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        if len(rows) != int(count):
            raise ValueError(f"{len(rows)} rows, but {int(count)} were announced")
        for layer in self.layers:
            rows = layer(rows)
        return rows


def test_a_batch_that_cannot_be_cut_is_tried_whole() -> None:
    model = Whole()
    found = find_symmetries(model, describe(model), [{"rows": torch.randn(4, 20, 8), "count": torch.tensor(4)}])
    assert len(found) == 1
