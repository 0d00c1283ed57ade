"""What a router could bring, against least squares over the inputs themselves."""

import pytest
import torch
import transformers as tf
from test_routing import BUILDS

import hpr
from hpr.anatomy.describe import describe
from hpr.errors import HprError
from hpr.nn.bank import bank_of, terms_of
from hpr.operators.metric import measure
from hpr.planning.options import PlanOptions
from hpr.routing.expected_gains import expected_gains

SITE = "encoder.layer.1.intermediate.dense"


def texts(low: int, high: int, seed: int) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    mask = torch.ones(8, 12).long()
    mask[:, 9:] = 0
    return [{"input_ids": torch.randint(low, high, (8, 12), generator=draw), "attention_mask": mask} for _ in range(4)]


@pytest.fixture(scope="module")
def made() -> tuple[tf.BertModel, torch.nn.Module, hpr.Profile, dict[str, list[dict[str, torch.Tensor]]]]:
    torch.manual_seed(0)
    teacher = BUILDS["bert"]().eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    kinds = {"low": texts(3, 20, 1), "high": texts(40, 60, 2)}
    profile = hpr.profile(teacher, [*kinds["low"], *kinds["high"]])
    student = hpr.share(teacher, hpr.plan(teacher, profile, "50%", PlanOptions(operators=["low rank"])), profile)
    return teacher, student, profile, kinds


def test_the_gain_is_that_of_least_squares(made) -> None:
    teacher, student, profile, kinds = made
    gains = expected_gains(teacher, student, profile, kinds, experts=3)
    assert all(0 <= gain < 1 for gain in gains.values())
    anatomy = describe(teacher)
    one, bank = measure(teacher, anatomy, profile)[SITE], bank_of(student)
    path = anatomy[SITE].name
    (term,) = terms_of(student)[path]
    u, v = (bank[name].dense().detach().double() for name in (term.u, term.v))
    inputs, seen = {}, []
    handle = teacher.get_submodule(path).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        for kind, batches in kinds.items():
            for batch in batches:
                teacher(**batch)
            kept = torch.cat([x[batch["attention_mask"].bool()] for x, batch in zip(seen, batches, strict=True)])
            inputs[kind] = kept.double() - one.mean
            seen.clear()
    handle.remove()
    parts = [torch.arange(term.rank) % 3 == expert for expert in range(3)]

    def pieces(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the experts emit (numbers, 3) and what is wanted (numbers, 1), in the metric of the outputs."""
        emitted = [(x @ v[part].T @ u[:, part].T @ one.left.root).reshape(-1) for part in parts]
        return torch.stack(emitted, 1), (x @ one.weight.T @ one.left.root).reshape(-1, 1)

    def lost(several: list[torch.Tensor]) -> float:
        design, wanted = (torch.cat(part) for part in zip(*map(pieces, several), strict=True))
        return float((wanted - design @ torch.linalg.lstsq(design, wanted).solution).square().sum())

    expected = 1 - sum(lost([x]) for x in inputs.values()) / lost(list(inputs.values()))
    assert gains[SITE] == pytest.approx(expected, rel=1e-5)


def test_kinds_that_are_alike_need_no_router(made) -> None:
    teacher, student, profile, kinds = made
    alike = expected_gains(teacher, student, profile, {"one": kinds["low"], "other": kinds["low"]})
    assert max(alike.values()) < 1e-9
    apart = expected_gains(teacher, student, profile, kinds)
    assert min(apart.values()) >= 0
    assert sum(apart.values()) > 0


def test_what_it_needs(made) -> None:
    teacher, student, profile, kinds = made
    with pytest.raises(HprError, match="1 kinds of input, a router distinguishes at least two"):
        expected_gains(teacher, student, profile, {"low": kinds["low"]})
    with pytest.raises(HprError, match="shares nothing, so it has no term to route"):
        expected_gains(teacher, teacher, profile, kinds)
