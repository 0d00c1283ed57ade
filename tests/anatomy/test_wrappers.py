"""Wrappers are taken off where that is exact, and refused before anything is measured where it is not."""

import os
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import hpr
from conftest import low_rank_terms, plan_of
from hpr.anatomy.describe import describe
from hpr.anatomy.wrappers import unwrapped
from hpr.errors import HprError

Build = Callable[..., nn.Module]


@pytest.fixture
def one_process(monkeypatch):
    monkeypatch.setitem(os.environ, "MASTER_ADDR", "127.0.0.1")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def compiled_forward(model: nn.Module) -> nn.Module:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


EXACT = {
    "DataParallel": nn.DataParallel,
    "compile": lambda model: torch.compile(model, backend="eager"),
    "compile of DataParallel": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
    "model.compile()": compiled_in_place,
    "compile of forward": compiled_forward,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
}


@pytest.mark.parametrize("wrapper", EXACT)
def test_what_is_inside_is_described_loaded_and_profiled(build: Build, ids: Tensor, wrapper: str) -> None:
    model = build("bert", tf.AutoModelForMaskedLM)
    wrapped = EXACT[wrapper](model)
    before = vars(wrapped).keys(), wrapped._compiled_call_impl
    loaded = hpr.open_model(wrapped)
    assert (type(loaded.model), loaded.objective) == (tf.BertForMaskedLM, "masked-lm")
    assert hpr.describe(wrapped) == describe(model)
    assert "forward" not in vars(loaded.model)
    assert loaded.model._compiled_call_impl is None
    assert (vars(wrapped).keys(), wrapped._compiled_call_impl) == before
    assert torch.equal(loaded.model.cls.predictions.bias, model.cls.predictions.bias)
    profile = hpr.profile(wrapped, [{"input_ids": ids}], structure=False)
    assert profile.fingerprint == describe(model).fingerprint


def test_distributed_models(build: Build, one_process: None) -> None:
    wrapped = nn.parallel.DistributedDataParallel(build("bert", tf.AutoModelForMaskedLM))
    assert unwrapped(wrapped) is wrapped.module


def test_a_wrapped_student_is_saved_healed_and_unshared_as_what_it_is(build: Build, random_fit: None, tmp_path: Path) -> None:
    site = "encoder.layer.0.output.dense"
    model = build("bert", tf.AutoModelForMaskedLM)
    student = hpr.share(model, plan_of(describe(model), {site: low_rank_terms(site)}))
    folder = hpr.save(nn.DataParallel(student), tmp_path / "saved")
    loaded = tf.AutoModelForMaskedLM.from_pretrained(folder)
    assert loaded.state_dict().keys() == student.state_dict().keys()
    assert type(hpr.unshare(nn.DataParallel(student))) is tf.BertForMaskedLM


def fully_sharded(model: nn.Module) -> nn.Module:
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    return torch.distributed.fsdp.fully_shard(model, mesh=mesh)


def sharded_inside(model: nn.Module) -> nn.Module:
    fully_sharded(model.bert.encoder)
    return model


def compiled_inside(model: nn.Module) -> nn.Module:
    model.bert.encoder.layer[0].compile(backend="eager")
    return model


def wrapped_inside(model: nn.Module) -> nn.Module:
    model.bert = torch.compile(model.bert, backend="eager")
    return model


def closed_over(model: nn.Module) -> nn.Module:
    before = model.forward
    model.forward = lambda *args, **kwargs: before(*args, **kwargs)
    return model


def with_adapter(model: nn.Module) -> nn.Module:
    model._hf_peft_config_loaded = True  # as add_adapter sets it
    return model


def of_peft(model: nn.Module) -> nn.Module:
    return type("PeftModel", (nn.Sequential,), {"__module__": "peft.peft_model"})(model)


def of_bitsandbytes(model: nn.Module) -> nn.Module:
    kind = type("Linear8bitLt", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    model.cls.predictions.transform.dense = kind(16, 16)
    return model


def in_eight_bits(model: nn.Module) -> nn.Module:
    dense = model.cls.predictions.transform.dense
    dense.weight = nn.Parameter(dense.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    return model


def sparse(model: nn.Module) -> nn.Module:
    dense = model.cls.predictions.transform.dense
    dense.weight = nn.Parameter(dense.weight.data.to_sparse())
    return model


def offloaded(model: nn.Module) -> nn.Module:
    from accelerate import cpu_offload

    return cpu_offload(model, torch.device("cpu"))


def quantised(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


REFUSED = {
    "fully_shard": (fully_sharded, "sharded by fully_shard"),
    "fully_shard inside": (sharded_inside, r"bert\.encoder .*sharded by fully_shard"),
    "compiled block": (compiled_inside, r"bert\.encoder\.layer\.0 .*compiled"),
    "compiled body": (wrapped_inside, r"bert \(OptimizedModule\).*compiled"),
    "closure": (closed_over, "function in place of its forward"),
    "adapter": (with_adapter, "adapted by PEFT"),
    "PeftModel": (of_peft, "merge_and_unload"),
    "bitsandbytes": (of_bitsandbytes, r"quantised \(a class of bitsandbytes"),
    "float8": (in_eight_bits, "float8_e4m3fn, which is quantised"),
    "sparse": (sparse, "sparse tensor"),
    "offloaded": (offloaded, "offloaded by accelerate"),
    "quantize_dynamic": (quantised, r"quantised \(a class of torch\.ao\.nn\.quantized"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("wrapper", REFUSED)
def test_what_cannot_be_taken_off_is_refused(build: Build, one_process: None, wrapper: str) -> None:
    wrap, message = REFUSED[wrapper]
    wrapped = wrap(build("bert", tf.AutoModelForMaskedLM))
    for step in (hpr.open_model, hpr.describe, lambda model: hpr.compress(model, "60%", ["never read"])):
        with pytest.raises(HprError, match=message):
            step(wrapped)


def test_scripted_modules_are_refused() -> None:
    scripted = torch.jit.trace(nn.Linear(3, 4), torch.zeros(1, 3))
    with pytest.raises(HprError, match=r"compiled by torch\.jit: give the module"):
        hpr.open_model(scripted)


def test_models_of_sentence_transformers_are_refused(folder: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    for one in (model, model[0]):
        with pytest.raises(HprError, match="save it with save_pretrained"):
            hpr.open_model(one)


def test_a_method_that_was_set_on_a_model_stays(build: Build) -> None:
    model = build("bert")
    model.forward = types.MethodType(type(model).forward, model)
    assert unwrapped(model) is model


@pytest.mark.parametrize("budget", ["60%", "1KB"])
def test_a_shared_model_is_refused_before_it_is_measured(build: Build, random_fit: None, budget: str) -> None:
    site = "encoder.layer.0.output.dense"
    model = build("bert")
    student = hpr.share(model, plan_of(describe(model), {site: low_rank_terms(site)}))
    with pytest.raises(HprError, match="shared already: plan on its original"):
        hpr.compress(student, budget, ["never read"])


def test_things_that_are_no_models_are_named(folder: Path) -> None:
    with pytest.raises(HprError, match=r"the model is a builtins\.dict.* give a folder, a hub id, or a torch module"):
        hpr.open_model({"weight": torch.ones(1)})
    pipeline = tf.pipeline("feature-extraction", str(folder), device="cpu")
    with pytest.raises(HprError, match=r"Pipeline.* give its attribute model"):
        hpr.open_model(pipeline)
