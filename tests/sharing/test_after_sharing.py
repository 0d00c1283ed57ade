"""What other tools do to a model that shares: they work, or they refuse at once, and nothing passes over a site in silence."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import hpr
from conftest import HEADS, low_rank_terms, plan_everything, plan_of
from hpr.anatomy.describe import describe
from hpr.errors import HprError
from hpr.nn.embedding import SharedEmbedding
from hpr.sharing.share import share

Build = Callable[..., nn.Module]
FAMILIES = ["bert", "gpt2", "t5"]


@pytest.fixture(params=["made", "loaded", "copied"])
def of_family(request, build: Build, random_fit: None, tmp_path: Path) -> Callable[[str], nn.Module]:
    """A shared model as ``share`` made it, as it was loaded, and as a copy of that."""

    def make(family: str) -> nn.Module:
        model = build(family, HEADS[family])
        student = share(model, plan_everything(model))
        if request.param == "made":
            return student
        student.save_pretrained(tmp_path / family)
        loaded = type(model).from_pretrained(tmp_path / family)
        return loaded if request.param == "loaded" else copy.deepcopy(loaded)

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_table_refuses_other_rows(of_family: Callable[[str], nn.Module], family: str) -> None:
    student = of_family(family)
    table = student.get_input_embeddings()
    with pytest.raises(HprError, match=r"is shared, so its 40 rows cannot become 42: do it on hpr\.unshare"):
        student.resize_token_embeddings(42)
    with pytest.raises(HprError, match="is shared, so its 40 rows cannot become 42"):
        student.base_model.resize_token_embeddings(42)
    with pytest.raises(HprError, match="is shared, so no other table can be set"):
        student.set_input_embeddings(nn.Embedding(40, 16))
    with pytest.raises(HprError, match="is shared, so no other head can be set"):
        student.set_output_embeddings(nn.Linear(16, 40))
    assert isinstance(table, SharedEmbedding)
    assert student.get_input_embeddings() is table
    assert student.resize_token_embeddings(40) is table
    assert student.resize_token_embeddings() is table


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_added_to_the_unshared_model(of_family: Callable[[str], nn.Module], family: str) -> None:
    dense = hpr.unshare(of_family(family))
    assert dense.resize_token_embeddings(42).num_embeddings == 42
    assert "resize_token_embeddings" not in vars(dense)


def test_a_table_that_is_kept_takes_other_rows(build: Build, random_fit: None, tmp_path: Path, ids: Tensor) -> None:
    site = "encoder.layer.0.output.dense"
    model = build("bert", tf.AutoModelForMaskedLM)
    student = share(model, plan_of(describe(model), {site: low_rank_terms(site)})).eval()
    student.resize_token_embeddings(42)
    student.save_pretrained(tmp_path)
    loaded = tf.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert loaded.get_input_embeddings().num_embeddings == 42
    assert torch.equal(loaded(input_ids=ids).logits, student(input_ids=ids).logits)


@pytest.mark.filterwarnings("ignore")
def test_torchs_quantisation_refuses_and_works_on_the_unshared_model(of_family: Callable[[str], nn.Module]) -> None:
    student = of_family("bert")
    with pytest.raises(HprError, match=r"torch\.ao quantises Linear modules.* pass over: quantise hpr\.unshare"):
        torch.ao.quantization.quantize_dynamic(student, {nn.Linear})
    prepared = copy.deepcopy(student)
    prepared.qconfig = torch.ao.quantization.default_qconfig
    with pytest.raises(HprError, match=r"torch\.ao quantises Linear modules"):
        torch.ao.quantization.prepare(prepared)
    quantised = torch.ao.quantization.quantize_dynamic(hpr.unshare(student), {nn.Linear})
    linears = [type(module).__module__ for module in quantised.modules() if type(module).__name__ == "Linear"]
    assert linears
    assert all(".quantized" in name for name in linears)
