"""share, attach and unshare on tiny models of several families."""

import copy
from collections.abc import Callable

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from conftest import HEADS, low_rank_terms, plan_everything, plan_of, random_factors
from hpr.anatomy.describe import describe
from hpr.anatomy.lookup import module_at, weight_of
from hpr.anatomy.swappable import not_swappable
from hpr.errors import HprError
from hpr.nn.bank import bank_of
from hpr.nn.embedding import SharedEmbedding
from hpr.nn.linear import SharedLinear
from hpr.nn.site import SharedSite
from hpr.operators import fitting
from hpr.plans.plan import Plan, keep_all
from hpr.plans.terms import FactorShape, Term
from hpr.sharing.attach import attach
from hpr.sharing.share import share
from hpr.sharing.specification import is_specification
from hpr.sharing.unshare import unshare

Build = Callable[..., nn.Module]


def outputs(model: nn.Module, ids: Tensor) -> Tensor:
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **more)[0]


@pytest.mark.parametrize("family", HEADS)
def test_keeping_everything_gives_a_plain_copy(build: Build, ids: Tensor, family: str) -> None:
    model = build(family, HEADS[family])
    student = share(model, keep_all(describe(model)))
    assert torch.equal(outputs(student, ids), outputs(model, ids))
    assert bank_of(student) is None
    assert getattr(student.config, "quantization_config", None) is None
    with torch.no_grad():
        next(student.parameters()).add_(1)
    assert not torch.equal(outputs(student, ids), outputs(model, ids))


@pytest.mark.parametrize("family", HEADS)
def test_share_computes_what_its_dense_twin_computes(build: Build, ids: Tensor, random_fit: None, family: str) -> None:
    model = build(family, HEADS[family])
    before = copy.deepcopy(model.state_dict())
    anatomy = describe(model)
    student = share(model, plan_everything(model))
    dense = unshare(student)
    torch.testing.assert_close(outputs(student, ids), outputs(dense, ids), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs(student, ids), outputs(model, ids), atol=1e-3)
    assert is_specification(student.config.quantization_config)
    assert getattr(dense.config, "quantization_config", None) is None
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    for name, module in model.named_modules(remove_duplicate=False):  # stock classes again, and the ties of the original
        assert type(dense.get_submodule(name)) is type(module)
    assert dense.state_dict().keys() == model.state_dict().keys()
    assert describe(dense).total_parameters == anatomy.total_parameters
    assert [site.aliases for site in describe(dense).sites] == [site.aliases for site in anatomy.sites]
    assert dense._tied_weights_keys == model._tied_weights_keys
    assert dense.all_tied_weights_keys == model.all_tied_weights_keys
    for target, source in dense.all_tied_weights_keys.items():
        assert dense.get_parameter(target) is dense.get_parameter(source)


@pytest.mark.parametrize("family", HEADS)
def test_a_shared_model_has_the_parameters_of_its_plan_and_trains(
    build: Build, ids: Tensor, random_fit: None, family: str
) -> None:
    model = build(family, HEADS[family])
    plan = plan_everything(model)
    student = share(model, plan)
    assert sum(parameter.numel() for parameter in student.parameters()) == plan.parameters(describe(model))
    student.tie_weights()  # what from_pretrained, Trainer and resizing call
    more = {"decoder_input_ids": ids} if student.config.is_encoder_decoder else {}
    student(input_ids=ids, **more)[0].square().mean().backward()
    bank = bank_of(student)
    assert bank is not None
    assert all(parameter.grad is not None for parameter in bank.parameters())


def test_teacher_and_student_are_independent(build: Build, ids: Tensor, random_fit: None) -> None:
    model = build("bert")
    student = share(model, plan_everything(model))
    twin, expected = copy.deepcopy(student), outputs(student, ids)
    bank = bank_of(twin)
    assert bank is not None
    with torch.no_grad():
        for parameter in [*model.parameters(), *bank.parameters()]:
            parameter.zero_()
    assert torch.equal(outputs(student, ids), expected)
    assert not torch.equal(outputs(twin, ids), expected)


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_dtype_stay(build: Build, random_fit: None, training: bool) -> None:
    model = build("bert").to(torch.bfloat16).train(training)
    student = share(model, plan_everything(model))
    assert all(module.training == training for module in student.modules())
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in unshare(student).parameters()} == {torch.bfloat16}


def test_half_precision_runs(build: Build, ids: Tensor, random_fit: None) -> None:
    model = build("t5", HEADS["t5"])
    student = share(model, plan_everything(model))
    assert outputs(student.half(), ids).dtype == torch.float16


def test_tied_head_reads_the_factors_of_the_embedding(build: Build, random_fit: None) -> None:
    model = build("bert", HEADS["bert"])
    name = "embeddings.word_embeddings"
    student = share(model, plan_of(describe(model), {name: low_rank_terms(name)}))
    embedding, head = module_at(student, name), module_at(student, "cls.predictions.decoder")
    assert isinstance(embedding, SharedEmbedding)
    assert isinstance(head, SharedLinear)
    assert head.bank is embedding.bank
    assert head.bias is student.cls.predictions.bias  # a tie of its own, untouched
    assert student.config.tie_word_embeddings is True
    assert list(student._tied_weights_keys) == ["cls.predictions.decoder.bias"]


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_own_forward_of_an_embedding_is_kept(build: Build, ids: Tensor, random_fit: None, family: str) -> None:
    """BART scales its embedding and shifts its positions; the tables alone are factored, at full rank."""
    model = build(family, HEADS[family])
    anatomy = describe(model)
    tables = [site for site in anatomy.sites if site.kind == "embedding" and "bias" not in site.name]
    plan = plan_of(anatomy, {site.name: (Term(f"{site.name}:w"),) for site in tables})

    def copy_weights(fits: fitting.Fits, plan: object) -> fitting.Fitted:
        return fitting.Fitted({f"{site.name}:w": weight_of(module_at(model, site.name)).detach() for site in tables}, {})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting.Fits, "fit", copy_weights)
        student = share(model, plan)
    torch.testing.assert_close(outputs(student, ids), outputs(model, ids), rtol=0, atol=1e-6)
    assert all(isinstance(module_at(student, site.name), SharedSite) for site in tables)


class Reads(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids]


class Doubles(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Toy(nn.Module):
    def __init__(self, odd: nn.Module) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 4)
        self.odd = odd
        self.head = nn.Linear(4, 8)


ATTENTION = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)


@pytest.mark.parametrize(
    ("odd", "path", "words"),
    [
        (Reads(8, 4), "odd", "reads its whole table"),
        (Doubles(4, 8), "odd", "a forward of its own"),
        (nn.Embedding(8, 4, max_norm=1.0), "odd", "max_norm"),
        (nn.Bilinear(4, 4, 8), "odd", "neither Linear"),
        (ATTENTION, "odd.self_attn.out_proj", "MultiheadAttention"),
    ],
)
def test_what_cannot_be_replaced_is_refused_untouched(odd: nn.Module, path: str, words: str) -> None:
    model = Toy(copy.deepcopy(odd))
    out_features, in_features = model.get_submodule(path).weight.shape[:2]
    with pytest.raises(HprError, match=rf"{path} .*{words}.*keep it"):
        attach(model, {path: (Term("w"),)}, {"w": FactorShape(out_features, in_features)})
    assert (path in not_swappable(model, describe(model))) != isinstance(odd, nn.Bilinear | Doubles)  # no sites
    assert bank_of(model) is None
    assert type(model.get_submodule(path)) is type(Toy(copy.deepcopy(odd)).get_submodule(path))


def test_attach_refuses_shapes_and_aliases_that_do_not_fit() -> None:
    terms = {"head": (Term("w"),)}
    with pytest.raises(HprError, match="head needs factor 'w' as"):
        attach(Toy(nn.Identity()), terms, {"w": FactorShape(8, 5)})
    with pytest.raises(HprError, match="correct the aliases"):
        attach(Toy(nn.Linear(4, 4)), terms, {"w": FactorShape(8, 4)}, {"head": ["odd"]})
    with pytest.raises(HprError, match="no module 'nowhere'"):
        attach(Toy(nn.Identity()), {"nowhere": (Term("w"),)}, {"w": FactorShape(8, 4)})
    with pytest.raises(HprError, match="no site below"):
        attach(Toy(nn.Identity()), {}, {})


def test_attach_on_the_meta_device(build: Build) -> None:
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(build("gpt2").config)
    bank = attach(model, {"wte": low_rank_terms("w")}, {"w:u": FactorShape(40, 3), "w:v": FactorShape(3, 16)})
    assert {parameter.device.type for parameter in bank.parameters()} == {"meta"}
    assert isinstance(model.lm_head, SharedLinear)


def test_plain_modules_with_a_tie(random_fit: None) -> None:
    torch.manual_seed(0)
    model = Toy(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)))
    model.head.weight = model.table.weight
    student = share(model, plan_of(describe(model), {"table": low_rank_terms("table", 2), "odd.0": low_rank_terms("odd.0", 2)}))
    x, ids = torch.ones(1, 4), torch.arange(8)
    dense = unshare(student)
    assert isinstance(student.head, SharedLinear)
    assert dense.head.weight is dense.table.weight
    torch.testing.assert_close(student.head(student.odd(x)), dense.head(dense.odd(x)))
    torch.testing.assert_close(student.table(ids), dense.table(ids))


def test_conv1d_comes_back(build: Build, random_fit: None) -> None:
    model = build("gpt2")
    dense = unshare(share(model, plan_everything(model)))
    assert isinstance(dense.h[0].attn.c_attn, Conv1D)
    assert dense.h[0].attn.c_attn.weight.shape == (16, 48)
    assert dense.h[0].attn.c_attn.weight.is_contiguous()


def test_embedding_settings_come_back(build: Build, random_fit: None) -> None:
    model = build("bert")
    dense = unshare(share(model, plan_everything(model)))
    assert dense.embeddings.word_embeddings.padding_idx == model.embeddings.word_embeddings.padding_idx == 0


def test_sharing_twice_is_refused(build: Build, random_fit: None) -> None:
    model = build("bert")
    student = share(model, plan_everything(model))
    with pytest.raises(HprError, match="shared already"):
        share(student, keep_all(describe(student)))
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(HprError, match="quantised"):
        share(model, keep_all(describe(model)))


@pytest.mark.parametrize("part", ["1", "2"])  # the bias change is a vector, the factor a matrix
def test_bad_factors_name_the_site(build: Build, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    model = build("bert")
    name = "encoder.layer.1.output.dense"

    def broken(fits: fitting.Fits, plan: Plan) -> fitting.Fitted:
        fitted = random_factors(fits.model, fits.anatomy, plan)
        for values in (fitted.factors[f"{name}:u"], fitted.bias_changes[name]):
            if part in str(values.dim()):
                values.view(-1)[0] = torch.inf
        return fitted

    monkeypatch.setattr(fitting.Fits, "fit", broken)
    with pytest.raises(HprError, match=r"encoder\.layer\.1\.output\.dense: its .* is not finite"):
        share(model, plan_of(describe(model), {name: low_rank_terms(name)}))


def test_biases_take_the_change_and_those_without_are_passed(build: Build, random_fit: None) -> None:
    model = build("bert")
    name = "encoder.layer.1.output.dense"
    student = share(model, plan_of(describe(model), {name: low_rank_terms(name)}))
    torch.testing.assert_close(module_at(student, name).bias, module_at(model, name).bias + 0.1)
    share(build("llama"), plan_everything(build("llama")))  # has no biases


def test_a_tie_that_is_declared_but_does_not_hold(build: Build, random_fit: None) -> None:
    model = build("gpt2", HEADS["gpt2"])
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(HprError, match=r"call model\.tie_weights"):
        share(model, plan_of(describe(model), {"wte": low_rank_terms("wte")}))


def test_another_models_plan_is_refused(build: Build) -> None:
    with pytest.raises(HprError, match="plan this model anew"):
        share(build("bert"), keep_all(describe(build("gpt2"))))


def test_a_model_inside_that_does_not_tell_its_ties(build: Build, random_fit: None) -> None:
    """Some models of transformers hold another whose code leaves out ``post_init``: it has no ``all_tied_weights_keys``."""
    model = build("bert")
    del model.all_tied_weights_keys
    student = share(model, plan_everything(model))
    assert not hasattr(student, "all_tied_weights_keys")
    assert not hasattr(unshare(student), "all_tied_weights_keys")
