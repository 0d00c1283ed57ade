"""A weight that is read past its module, by code that nothing found, is an error and no wrong output."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import hpr
from conftest import plan_of
from hpr.anatomy.describe import describe
from hpr.errors import HprError
from hpr.plans.terms import Term
from hpr.sharing.check_reads import check_reads


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


class Hidden(nn.Module):
    """Scales its output by a weight that it reaches by a name which no parser finds."""

    def __init__(self, past: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.past = past

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x * getattr(getattr(self.layers[1], "d" + "own"), "wei" + "ght").mean() if self.past else x


@pytest.mark.parametrize("past", [True, False])
def test_a_weight_that_is_read_past_its_module_is_named(past: bool) -> None:
    torch.manual_seed(0)
    model = Hidden(past).eval()
    anatomy = describe(model)
    names = [site.name for site in anatomy.sites]
    plan = plan_of(anatomy, {name: [Term(f"{name}:u", f"{name}:v", 2)] for name in names})
    entries = {name: replace(entry, operator="low rank") for name, entry in plan.entries.items()}
    student = hpr.share(model, replace(plan, entries=entries))
    batch = {"input": torch.randn(3, 4)}
    before = student(batch["input"])
    if past:
        with pytest.raises(HprError, match=r"layers\.1\.down is read past its module"):
            check_reads(student, batch)
        with pytest.raises(HprError, match=r"layers\.1\.down is read past its module"):
            hpr.compress(model, "90%", [torch.randn(8, 4) for _ in range(8)], options=hpr.PlanOptions(plans=1))
    else:
        check_reads(student, batch)
    assert torch.equal(student(batch["input"]), before)
