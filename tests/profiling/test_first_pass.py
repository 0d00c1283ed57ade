"""The first pass: what a model cannot read is said with the batch, the value and the mend, before anything is measured."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import hpr
from hpr.data.targets import longest_input
from hpr.errors import DataError, HprError
from hpr.profiling.first_pass import check_batches, check_weights
from hpr.profiling.objectives import OBJECTIVES, objective_for
from hpr.runtime.hooks import eval_mode

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
IMAGE = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 16,
    "patch_size": 8,
}
IDS = torch.arange(4, 22).reshape(2, 9)


def bert(kind: type = tf.BertForMaskedLM, **settings: object) -> nn.Module:
    torch.manual_seed(0)
    return kind(tf.BertConfig(**SMALL | {"max_position_embeddings": 12} | settings)).eval()  # type: ignore[arg-type]


def vit() -> nn.Module:
    return tf.ViTForImageClassification(tf.ViTConfig(**IMAGE)).eval()


CASES = {
    "an id above the table": (bert, {"input_ids": IDS + 50}, r"has the id 64, but the table .* 0 to 63: use the tokenizer"),
    "a negative id": (bert, {"input_ids": IDS - 10}, r"has the id -6, .* from 0 to 63"),
    "floats for ids": (bert, {"input_ids": IDS.float()}, r"is torch\.float32, token ids are whole numbers"),
    "too many positions": (bert, {"input_ids": IDS.repeat(1, 3)}, r"batch 0 \(input_ids int64 \(2, 27\)\).*take"),
    "a mask of another length": (
        bert,
        {"input_ids": IDS, "attention_mask": torch.ones(2, 5)},
        r"mask has shape \(2, 5\), input_ids \(2, 9\)",
    ),
    "images of another size": (vit, {"pixel_values": torch.zeros(2, 3, 20, 20)}, r"pixel_values float32 \(2, 3, 20, 20\)"),
    "channels last": (vit, {"pixel_values": torch.zeros(2, 16, 16, 3)}, r"pixel_values"),
    "ids for images": (vit, {"input_ids": IDS}, r"cannot read batch 0"),
    "an image that is not finite": (
        vit,
        {"pixel_values": torch.full((2, 3, 16, 16), torch.nan)},
        r"pixel_values is not finite in example 0: remove or correct",
    ),
    "choices that are missing": (
        lambda: bert(tf.BertForMultipleChoice),
        {"input_ids": IDS},
        r"cannot read batch 0",
    ),
    "no padding token": (
        lambda: tf.GPT2ForSequenceClassification(
            tf.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=2, eos_token_id=3)
        ).eval(),
        {"input_ids": IDS},
        r"padding token",
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("where", ["profile", "compress", "compress to bytes"])
def test_a_batch_that_does_not_fit_is_named(name: str, where: str) -> None:
    build, batch, said = CASES[name]
    model = build()
    call: Callable[[], object] = lambda: hpr.profile(model, [batch])  # noqa: E731
    if where != "profile":
        call = lambda: hpr.compress(model, "90%" if where == "compress" else "50%bytes", [batch] * 8)  # noqa: E731
    with pytest.raises(DataError, match=said):
        call()


def test_a_later_batch_is_named_by_its_number() -> None:
    model = bert()
    batches = [{"input_ids": IDS}] * 5
    for place in (3, 4):
        data = list(batches)
        data[place] = {"input_ids": torch.where(IDS == 21, 64, IDS)}
        with pytest.raises(DataError, match=rf"batch {place} .* has the id 64"):
            hpr.profile(model, data)
        data[place] = {"input_ids": IDS.repeat(1, 2)}
        with pytest.raises(DataError, match=rf"batch {place} "):
            hpr.profile(model, data)


def test_good_batches_pass_and_leave_the_model_alone() -> None:
    model = bert().train()
    check_batches(model, [{"input_ids": IDS}, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}], objective_for(model))
    assert all(module.training for module in model.modules())
    choice = bert(tf.BertForMultipleChoice)
    check_batches(choice, [{"input_ids": IDS.reshape(2, 3, 3)}], objective_for(choice))


def test_ids_of_one_dimension_are_no_texts() -> None:
    with pytest.raises(DataError, match=r"input_ids has shape \(9,\): give \(examples, positions\)"):
        check_batches(bert(), [{"input_ids": IDS[0]}], OBJECTIVES["masked-lm"])


def test_ids_out_of_range_that_a_model_reads_are_no_fault() -> None:
    """Some models hash their ids, or put other inputs where an id stands."""

    class Hashed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(8, 4)

        def get_input_embeddings(self) -> nn.Module:
            return self.table

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.table(input_ids % 8)

    check_batches(Hashed(), [{"input_ids": IDS}], OBJECTIVES["hidden"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    model = bert()
    model.bert.encoder.layer[0].output.dense.weight.data[3, 4] = value
    for call in (
        lambda: hpr.profile(model, [{"input_ids": IDS}]),
        lambda: hpr.compress(model, "60%", [{"input_ids": IDS}] * 8),
    ):
        with pytest.raises(HprError, match=r"bert\.encoder\.layer\.0\.output\.dense\.weight is not finite at \[3, 4\]"):
            call()
    with torch.device("meta"), pytest.raises(HprError, match="has no numbers"):
        check_weights(nn.Linear(2, 2))


def test_outputs_that_overflow_are_said() -> None:
    model = bert()
    model.cls.predictions.decoder.bias.data.fill_(3e38)
    model.cls.predictions.decoder.weight.data.fill_(3e38)
    with pytest.raises(DataError, match=r"output of BertForMaskedLM is not finite on batch 0, example 0.*remove the example"):
        hpr.profile(model, [{"input_ids": IDS}])
    half = bert().half()
    half.cls.predictions.transform.LayerNorm.weight.data.fill_(6e4)
    half.cls.predictions.decoder.weight.data.fill_(6e4)
    with pytest.raises(DataError, match=r"load the model in float32 instead of torch\.float16"):
        hpr.profile(half, [{"input_ids": IDS}])


def test_an_objective_without_any_gradient_is_an_error() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(2)])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                layer(x)
            return torch.ones(len(x), 4, requires_grad=True) * 2

    with pytest.raises(HprError, match=r"no weight of Constant has a gradient of the objective 'hidden'"):
        hpr.profile(Constant(), [torch.randn(3, 4)])


def test_a_batch_that_cannot_be_cut_is_read_whole() -> None:
    class Packed(nn.Module):
        """Reads the patches of all its pictures as one sequence, whose lengths stand in another input."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(2)])

        def forward(self, patches: Tensor, lengths: Tensor) -> Tensor:
            x = torch.stack([part.mean(0) for part in patches.split(lengths.tolist())])
            for layer in self.layers:
                x = x + layer(x)
            return x

    batch = {"patches": torch.randn(9, 4), "lengths": torch.tensor([2] * 3 + [3])}
    model = Packed()
    student = hpr.share(model, hpr.plan(model, hpr.profile(model, [batch]), "100%"))
    assert torch.equal(student(**batch), model(**batch))
    with pytest.raises(DataError, match=r"cannot read batch 0 \(patches float32 \(8, 4\)"):
        hpr.profile(model, [batch | {"patches": torch.randn(8, 4)}])


def test_a_fault_of_another_kind_is_not_taken_for_a_refused_batch() -> None:
    class Broken(nn.Module):
        def __init__(self, error: BaseException) -> None:
            super().__init__()
            self.linear, self.error = nn.Linear(2, 2), error

        def forward(self, x: Tensor) -> Tensor:
            raise self.error

    for error in (MemoryError("no memory"), KeyboardInterrupt(), RuntimeError("CUDA out of memory.")):
        with pytest.raises(type(error)) as caught:
            check_batches(Broken(error), [{"input": torch.zeros(2, 2)}], OBJECTIVES["hidden"])
        assert caught.value is error


@pytest.mark.parametrize(
    ("config", "usable"),
    [
        (tf.RobertaConfig(**SMALL, max_position_embeddings=24, pad_token_id=1), 22),
        (tf.XLMRobertaConfig(**SMALL, max_position_embeddings=24, pad_token_id=1), 22),
        (tf.CamembertConfig(**SMALL, max_position_embeddings=24, pad_token_id=1), 22),
        (tf.MPNetConfig(**SMALL, max_position_embeddings=24, pad_token_id=1), 22),
        (tf.EsmConfig(**SMALL, max_position_embeddings=24, pad_token_id=1, position_embedding_type="absolute"), 22),
        (tf.BertConfig(**SMALL, max_position_embeddings=24), 24),
        (tf.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=24), 24),
        (
            tf.OPTConfig(
                vocab_size=64,
                hidden_size=16,
                ffn_dim=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=24,
            ),
            24,
        ),
        (tf.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2), None),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_the_longest_input_is_one_that_the_model_reads(config: tf.PretrainedConfig, usable: int | None) -> None:
    model = tf.AutoModel.from_config(config).eval()
    longest = longest_input(model)
    assert usable is None or longest == usable
    length = min(longest, 64)
    ids = torch.full((1, length), 5)
    batch = {"input_ids": ids} | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})
    with eval_mode(model), torch.no_grad():
        model(**batch)
        if usable is not None:
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=torch.full((1, length + 1), 5))


def test_text_for_a_model_of_images_is_refused() -> None:
    with pytest.raises(DataError, match=r"reads pixel_values, not text: give its inputs as a file \(\.npy, \.npz\)"):
        hpr.compress(
            hpr.open_model(vit(), tokenizer=lambda texts, **_: {"input_ids": [[1]] * len(texts)}), "90%", ["a text"] * 9
        )


def test_arrays_that_do_not_fit(build: Callable[..., nn.Module]) -> None:
    for array in (np.full((16, 9), 9_999), np.random.default_rng(0).random((16, 9)), np.arange(16)):
        with pytest.raises(DataError, match="cannot read batch 0"):
            hpr.compress(build("bert"), "60%", array)
