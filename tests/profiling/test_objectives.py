"""Objectives: divergences against the formulas, losses with the right Fisher matrix, masks, and the choice by class."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

import hpr
from hpr.errors import HprError
from hpr.profiling import distributions
from hpr.profiling.distributions import GAUSSIAN
from hpr.profiling.objectives import OBJECTIVES, TEMPERATURES, UNCERTAIN, Objective, objective_for, softened
from hpr.profiling.outputs import read_scores
from hpr.runtime.batch import as_batch, examples_in, mask_of
from hpr.runtime.hooks import run

CATEGORICAL = [name for name, one in OBJECTIVES.items() if one.distribution is distributions.CATEGORICAL]
BY_EXAMPLE = [name for name, one in OBJECTIVES.items() if one.read is read_scores]  # they have no positions


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outputs_of(name: str, seed: int = 0) -> SimpleNamespace:
    values = drawn(3, 4, seed=seed) if name in BY_EXAMPLE else drawn(3, 5, 4, seed=seed)
    return as_outputs(values, name)


def as_outputs(values: Tensor, name: str) -> SimpleNamespace:
    """Outputs of any kind that hold these values: start and end of a span, both towers of a pair, classes before pixels."""
    halves = {"start_logits": values[..., 0], "end_logits": values[..., 1]} if values.dim() == 3 else {}
    pair = {"image_embeds": values[:, 0], "text_embeds": values[:, -1]} if values.dim() == 3 else {}
    logits = values.movedim(-1, 1)[..., None] if name == "segmentation" else values
    return SimpleNamespace(logits=logits, values=values, last_hidden_state=values, **halves, **pair)


MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
BATCH = {"input_ids": torch.zeros(3, 5, dtype=torch.long), "attention_mask": MASK}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_equal_outputs_diverge_by_nothing(name: str) -> None:
    found = OBJECTIVES[name].divergence(outputs_of(name), outputs_of(name), BATCH)
    assert found.shape == (3,)
    assert (found == 0).all()
    assert (OBJECTIVES[name].divergence(outputs_of(name), outputs_of(name, 1), BATCH) > 0).all()


@pytest.mark.parametrize("name", CATEGORICAL)
def test_categorical_divergence_is_torchs(name: str) -> None:
    batch = {**BATCH, "decoder_attention_mask": MASK}
    teacher, student = outputs_of(name), outputs_of(name, 1)
    log_p, log_q = teacher.values.log_softmax(-1), student.values.log_softmax(-1)
    expected = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    if name == "spans":
        log_p, log_q = (
            torch.stack(
                [(one.masked_fill(MASK == 0, -torch.inf)).log_softmax(-1) for one in (kind.start_logits, kind.end_logits)]
            )
            for kind in (teacher, student)
        )
        expected = F.kl_div(log_q, log_p, log_target=True, reduction="none").nansum((0, 2))
    elif name not in BY_EXAMPLE:
        expected = (expected if name == "segmentation" else expected * MASK).sum(1)  # a picture has no padding
    torch.testing.assert_close(OBJECTIVES[name].divergence(teacher, student, batch), expected)


def test_gaussian_divergence_is_half_the_squared_distance() -> None:
    teacher, student = outputs_of("hidden"), outputs_of("hidden", 1)
    one, two = teacher.last_hidden_state, student.last_hidden_state
    found = OBJECTIVES["hidden"].divergence(teacher, student, BATCH)
    torch.testing.assert_close(found, (0.5 * (one - two).square().sum(-1) * MASK).sum(1))
    pooled = [F.normalize((x * MASK[..., None]).sum(1) / MASK.sum(1, keepdim=True), dim=-1) for x in (one, two)]
    found = OBJECTIVES["embedding"].divergence(teacher, student, BATCH)
    torch.testing.assert_close(found, 1 - F.cosine_similarity(*pooled))  # of unit vectors ½‖a − b‖² = 1 − cos
    found = OBJECTIVES["cls-embedding"].divergence(teacher, student, BATCH)
    torch.testing.assert_close(found, 1 - F.cosine_similarity(one[:, 0], two[:, 0]))


@pytest.mark.parametrize(
    "name", ["hidden", "embedding", "causal-lm", "masked-lm", "spans", "ctc", "frames", "token-classification"]
)
def test_masked_positions_count_for_nothing(name: str) -> None:
    teacher, student, other = outputs_of(name), outputs_of(name, 1), outputs_of(name, 1)
    values = other.logits.clone()
    values[MASK == 0] = 100
    other = as_outputs(values, name)
    objective = OBJECTIVES[name]
    assert torch.equal(objective.divergence(teacher, student, BATCH), objective.divergence(teacher, other, BATCH))
    values = values.clone().requires_grad_()
    outputs = as_outputs(values, name)
    objective.loss(outputs, BATCH, torch.Generator().manual_seed(0)).backward()
    assert (values.grad[MASK == 0] == 0).all()
    assert (values.grad[MASK == 1] != 0).any(-1).all()


def test_labels_of_minus_100_and_decoder_masks_are_not_read() -> None:
    objective, teacher, student = OBJECTIVES["seq2seq"], outputs_of("seq2seq"), outputs_of("seq2seq", 1)
    masked = objective.divergence(teacher, student, {"input_ids": MASK, "decoder_attention_mask": MASK})
    labels = torch.where(MASK == 1, 7, -100)
    assert torch.equal(objective.divergence(teacher, student, {"input_ids": MASK, "labels": labels}), masked)
    assert (objective.divergence(teacher, student, {"input_ids": MASK}) >= masked).all()


def test_mask_of() -> None:
    hidden = torch.zeros(3, 5, 4)
    assert torch.equal(mask_of(BATCH, hidden), MASK.float())
    assert torch.equal(mask_of({"input_ids": MASK}, hidden), torch.ones(3, 5))
    assert torch.equal(mask_of(as_batch(torch.zeros(3, 5)), hidden), torch.ones(3, 5))
    assert torch.equal(mask_of(BATCH, torch.zeros(3, 6, 4)), torch.ones(3, 6))  # of another sequence
    assert torch.equal(mask_of(BATCH, torch.zeros(5, 3, 4)), MASK.T.float())  # positions first
    assert torch.equal(mask_of(BATCH, torch.zeros(6, 3, 4)), torch.ones(6, 3))  # two choices of each example


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_has_the_fisher_matrix_of_the_divergence(name: str) -> None:
    """E[∇ℓ ∇ℓᵀ] over draws against the second derivative of the divergence, for one example's predictions."""
    objective = OBJECTIVES[name]
    raw = drawn(1, 3) if name in BY_EXAMPLE else drawn(1, 2, 3) if name == "spans" else drawn(1, 1, 3)
    batch = {"input_ids": torch.zeros(1, 1)}
    size = raw.numel()

    def divergence(values: Tensor) -> Tensor:
        return objective.divergence(as_outputs(raw, name), as_outputs(values, name), batch).sum()

    hessian = torch.autograd.functional.hessian(divergence, raw.clone()).reshape(size, size)
    generator, total = torch.Generator().manual_seed(0), torch.zeros(size, size)
    for _ in range(400):
        values = raw.clone().requires_grad_()
        objective.loss(as_outputs(values, name), batch, generator).backward()
        total += torch.outer(values.grad.flatten(), values.grad.flatten()) / 400
    assert (total - hessian).norm() < 0.25 * hessian.norm()


def test_at_a_temperature_the_fisher_matrix_is_that_of_the_softened_outputs() -> None:
    """E[∇ℓ ∇ℓᵀ] at T against the covariance of a label at T, in closed form: logits as sure as these have next to none at 1."""
    logits = torch.tensor([[9.0, 0.0, -3.0]])
    for temperature in (1.0, 4.0):
        objective = replace(OBJECTIVES["classification"], temperature=temperature)
        chances = (logits / temperature).softmax(-1)[0]
        expected = chances.diag() - torch.outer(chances, chances)
        generator, total = torch.Generator().manual_seed(0), torch.zeros(3, 3)
        for _ in range(2000):
            values = logits.clone().requires_grad_()
            objective.loss(values, None, generator).backward()
            total += torch.outer(values.grad[0], values.grad[0]) / 2000
        assert (total - expected).norm() < 0.1 * expected.norm() + 1e-3
    assert objective.divergence(logits, logits / 4, None) == OBJECTIVES["classification"].divergence(logits, logits / 4, None)


@pytest.mark.parametrize(("scale", "expected"), [(0.1, 1.0), (8.0, 3.0), (1000.0, TEMPERATURES[-1])])
def test_outputs_are_softened_as_far_as_they_are_certain(scale: float, expected: float) -> None:
    model = nn.Linear(3, 3, bias=False).train()
    with torch.no_grad():
        model.weight.copy_(scale * torch.eye(3))
    found = softened(OBJECTIVES["classification"], model, [torch.eye(3), torch.eye(3)])
    assert found.temperature == expected
    differing = 1 - model(torch.eye(3)).div(expected).softmax(-1).square().sum(-1).mean()
    assert scale == 1000 or differing >= UNCERTAIN * 2 / 3
    assert model.training
    assert softened(OBJECTIVES["hidden"], model, [torch.eye(3)]) is OBJECTIVES["hidden"]


def test_the_loss_is_a_sum_over_examples_and_reproducible() -> None:
    logits = drawn(6, 4)
    one, two = (OBJECTIVES["classification"].loss(logits, None, torch.Generator().manual_seed(3)) for _ in range(2))
    assert one == two
    double = OBJECTIVES["classification"].loss(logits.half(), None, torch.Generator().manual_seed(3))
    assert double.dtype == torch.float32
    assert one > 0


@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        (tf.BertModel, "hidden"),
        (tf.BertForMaskedLM, "masked-lm"),
        (tf.BertForSequenceClassification, "classification"),
        (tf.GPT2LMHeadModel, "causal-lm"),
        (tf.LlamaForCausalLM, "causal-lm"),
        (tf.T5ForConditionalGeneration, "seq2seq"),
        (tf.BartForConditionalGeneration, "seq2seq"),
        (tf.WhisperForConditionalGeneration, "seq2seq"),
        (tf.ViTForImageClassification, "classification"),
        (tf.ASTForAudioClassification, "classification"),
        (tf.BertForTokenClassification, "token-classification"),
        (tf.BertForQuestionAnswering, "spans"),
        (tf.BertForMultipleChoice, "classification"),
        (tf.BertForNextSentencePrediction, "classification"),
        (tf.VideoMAEForVideoClassification, "classification"),
        (tf.Wav2Vec2ForCTC, "ctc"),
        (tf.Wav2Vec2ForAudioFrameClassification, "frames"),
        (tf.CLIPModel, "contrastive"),
        (tf.SiglipModel, "contrastive"),
        (tf.LlavaForConditionalGeneration, "causal-lm"),
        (tf.ImageGPTForCausalImageModeling, "causal-lm"),
        (tf.SegformerForSemanticSegmentation, "segmentation"),
        (type("Mine", (tf.BertForTokenClassification,), {}), "token-classification"),
        (nn.Linear, "hidden"),
    ],
)
def test_objective_by_class(cls: type, expected: str) -> None:
    model = cls.__new__(cls)  # only the class counts
    assert objective_for(model).name == expected
    assert objective_for(model, "embedding").name == "embedding"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_labels": 1}, "score"),
        ({"num_labels": 3, "problem_type": "regression"}, "score"),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, "multi-label"),
        ({"num_labels": 1, "problem_type": "multi_label_classification"}, "multi-label"),
        ({"num_labels": 3, "problem_type": "single_label_classification"}, "classification"),
        ({"num_labels": 3}, "classification"),
    ],
)
def test_a_classifier_is_read_as_its_configuration_says(settings: dict, expected: str) -> None:
    for kind, config in ((tf.BertForSequenceClassification, tf.BertConfig), (tf.ViTForImageClassification, tf.ViTConfig)):
        model = kind.__new__(kind)
        nn.Module.__init__(model)
        model.config = config(**settings)
        assert objective_for(model).name == expected
    choice = tf.BertForMultipleChoice.__new__(tf.BertForMultipleChoice)
    nn.Module.__init__(choice)
    choice.config = tf.BertConfig(num_labels=1)
    assert objective_for(choice).name == "classification"


def test_a_model_that_writes_is_read_by_where_its_inputs_are() -> None:
    """Transformers lists models of pictures and sounds together, with an encoder of their own or without."""
    for kind, config, expected in (
        (tf.Florence2ForConditionalGeneration, tf.Florence2Config(), "seq2seq"),
        (tf.LlavaForConditionalGeneration, tf.LlavaConfig(), "causal-lm"),
        (tf.AudioFlamingo3ForConditionalGeneration, tf.AudioFlamingo3Config(), "causal-lm"),
        (tf.WhisperForConditionalGeneration, tf.WhisperConfig(), "seq2seq"),
    ):
        model = kind.__new__(kind)
        nn.Module.__init__(model)
        model.config = config
        assert objective_for(model).name == expected


def test_a_head_over_the_vocabulary_is_read_as_tokens_in_a_class_without_a_task() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    assert objective_for(tf.BertForPreTraining(tf.BertConfig(**sizes))).name == "masked-lm"
    double = tf.GPT2DoubleHeadsModel(tf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64))
    assert objective_for(double).name == "causal-lm"
    assert objective_for(tf.BertModel(tf.BertConfig(**sizes))).name == "hidden"


def test_a_backbone_is_read_by_all_its_maps() -> None:
    maps = (drawn(3, 4, 6, 6), drawn(3, 8, 3, 3))
    read, weight = OBJECTIVES["hidden"].read(SimpleNamespace(feature_maps=maps), {"pixel_values": drawn(3, 3, 9, 9)})
    assert read.shape == (3, 1, 4 * 36 + 8 * 9)
    assert weight.shape == (3, 1)
    assert torch.equal(read[1, 0, 144:], maps[1][1].flatten())


def test_frames_take_the_part_of_the_mask_that_they_stand_for() -> None:
    samples = torch.zeros(2, 40)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 20:] = 0
    _, weight = OBJECTIVES["ctc"].read(
        SimpleNamespace(logits=drawn(2, 4, 3)), {"input_values": samples, "attention_mask": mask}
    )
    assert weight.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_the_ends_of_an_answer_are_never_in_the_padding() -> None:
    start = torch.tensor([[0.0, 1.0, 9.0]])
    outputs = SimpleNamespace(start_logits=start, end_logits=start.flip(1))
    read, weight = OBJECTIVES["spans"].read(outputs, {"input_ids": start, "attention_mask": torch.tensor([[1, 1, 0]])})
    assert read.softmax(-1)[0, :, 2].tolist() == [0.0, 0.0]
    assert weight.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("name", ["spans", "contrastive", "classification", "segmentation", "hidden"])
def test_outputs_that_an_objective_cannot_read(name: str) -> None:
    with pytest.raises(HprError, match="another objective"):
        OBJECTIVES[name].read(SimpleNamespace(loss=None) if name != "hidden" else (torch.tensor(1.0),), BATCH)


def test_unknown_objective() -> None:
    with pytest.raises(HprError, match="no objective 'accuracy': use one of embedding, "):
        objective_for(nn.Linear(1, 1), "accuracy")


def test_calls_and_counts() -> None:
    linear = nn.Linear(2, 3)
    assert torch.equal(run(linear, as_batch(torch.ones(4, 2))), linear(torch.ones(4, 2)))
    assert torch.equal(run(linear, {"input": torch.ones(4, 2)}), linear(torch.ones(4, 2)))
    assert examples_in(as_batch(torch.ones(4, 2))) == examples_in({"input": torch.ones(4, 2)}) == 4


def test_a_new_objective_is_one_entry(monkeypatch) -> None:
    """A regression: its labels count nowhere, its outputs are the logits of a classifier read as Gaussian means."""

    def read(outputs, batch):
        return outputs.logits, torch.ones(len(outputs.logits))

    toy = Objective("regression", read, distribution=GAUSSIAN, classes=("MODEL_FOR_TOY_MAPPING_NAMES",))
    monkeypatch.setattr(modeling_auto, "MODEL_FOR_TOY_MAPPING_NAMES", {"toy": "Regressor"}, raising=False)
    monkeypatch.setitem(OBJECTIVES, "regression", toy)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 40}
    model = type("Regressor", (tf.BertForSequenceClassification,), {})(tf.BertConfig(**sizes, num_labels=3)).eval()
    assert objective_for(model) is toy
    batches = [{"input_ids": torch.randint(3, 40, (4, 6))} for _ in range(2)]
    profile = hpr.profile(model, batches)
    assert profile.about["objective"] == "regression"
    assert sum(site.has_gradient for site in profile.sites.values()) > 6
    student = copy.deepcopy(model)
    student.classifier.weight.data += 0.1
    found = hpr.evaluate(student, model, batches, repeats=0)["quality"]
    logits = [[m(**batch).logits for batch in batches] for m in (model, student)]
    expected = 0.5 * (torch.cat(logits[0]) - torch.cat(logits[1])).square().sum(-1).mean()
    assert found[0]["name"] == "Divergence from the original"
    assert abs(found[0]["after"] - float(expected.detach())) < 1e-5
    with pytest.raises(HprError, match="the objective is 'regression'"):
        hpr.evaluate(student, model, batches, labels=[0] * 8, repeats=0)


def test_a_classifier_with_one_label_gives_a_number() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 40}
    model = tf.BertForSequenceClassification(tf.BertConfig(**sizes, num_labels=1)).eval()
    batches = [{"input_ids": torch.randint(3, 40, (4, 6))}]
    with pytest.raises(HprError, match=r"has one label, .* 'classification' .* use --objective score"):
        hpr.profile(model, batches, "classification")
    profile = hpr.profile(model, batches)
    assert profile.about["objective"] == "score"
    assert sum(site.has_gradient for site in profile.sites.values()) > 6
    student = copy.deepcopy(model)
    student.classifier.weight.data *= -2
    student.classifier.bias.data += 1
    rows = {row["name"]: row["after"] for row in hpr.evaluate(student, model, batches, repeats=0)["quality"]}
    assert abs(rows["Correlation with the original"] + 1) < 1e-6
    assert "Cosine to the original" not in rows
    student.classifier.weight.data.zero_()  # one score for every input has no correlation
    assert "Correlation with the original" not in {
        row["name"] for row in hpr.evaluate(student, model, batches, repeats=0)["quality"]
    }


def test_labels_are_read_as_the_objective_says(monkeypatch) -> None:
    toy = replace(OBJECTIVES["causal-lm"], name="unshifted", shifts_labels=False, classes=())
    monkeypatch.setitem(OBJECTIVES, "unshifted", toy)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 40}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes)).eval()
    ids = torch.randint(3, 40, (4, 6))
    logits = model(input_ids=ids).logits.detach()
    for name, shift in (("causal-lm", 1), ("unshifted", 0)):
        found = hpr.evaluate(model, model, [{"input_ids": ids, "labels": ids}], name, repeats=0)["quality"][0]
        expected = nn.functional.cross_entropy(logits[:, : 6 - shift].flatten(0, 1), ids[:, shift:].flatten())
        assert abs(found["before"] - float(expected)) < 1e-5
