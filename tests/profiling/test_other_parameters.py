import copy

import pytest
import torch
from torch import Tensor, nn

import hpr
from hpr.anatomy.describe import describe
from hpr.profiling.curvature import measure_curvature
from hpr.profiling.objectives import OBJECTIVES
from hpr.profiling.other_parameters import Sensitivity, other_parameters


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)
        self.unread = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)))


def test_the_parameters_beside_the_sites() -> None:
    found = set(other_parameters(Net(), describe(Net())))
    assert found == {"unread", "first.bias", "norm.weight", "norm.bias", "second.bias"}


def test_sensitivities_agree_with_the_fisher_matrix_by_example() -> None:
    model, goal = Net().eval(), OBJECTIVES["classification"]
    x = torch.randn(4096, 4, generator=torch.Generator().manual_seed(1))
    others = Sensitivity(model, describe(model))
    _, examples = measure_curvature(model, describe(model), list(x.split(4)), goal, 0, others)
    found = others.per_example(examples)
    expected = dict.fromkeys(found, 0.0)
    for row in x[:400]:
        logits = model(row[None])
        probabilities = logits.softmax(-1)[0].detach()
        for label, share in enumerate(probabilities):
            gradients = torch.autograd.grad(
                logits.log_softmax(-1)[0, label],
                [model.get_parameter(name) for name in expected],
                allow_unused=True,
                retain_graph=True,
            )
            for name, gradient in zip(expected, gradients, strict=True):
                if gradient is not None:
                    expected[name] += float(share * gradient.square().mean()) / 400
    assert found["unread"] == 0.0
    for name in ("first.bias", "norm.weight", "norm.bias", "second.bias"):
        assert found[name] == pytest.approx(expected[name], rel=0.15)


def test_a_profile_leaves_gradients_and_flags_as_they_were() -> None:
    model = Net()
    model.norm.weight.requires_grad_(False)
    model.norm.bias.grad = torch.full((6,), 2.0)
    before = copy.deepcopy(model.state_dict())
    profile = hpr.profile(model, [torch.randn(8, 4)], "classification")
    assert not model.norm.weight.requires_grad
    assert model.first.weight.requires_grad
    assert torch.equal(model.norm.bias.grad, torch.full((6,), 2.0))
    assert model.first.bias.grad is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert set(profile.others) == {"unread", "first.bias", "norm.weight", "norm.bias", "second.bias"}
