"""Random batches that models of every kind accept."""

import pytest
import torch
from torch import nn

import families
from hpr.errors import HprError
from hpr.profiling.objectives import call
from hpr.specimen import specimen


@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_family_takes_its_specimen(name: str) -> None:
    model = families.built(families.FAMILIES[name])
    batch = specimen(model)
    with torch.no_grad():
        assert torch.isfinite(families.output_of(call(model, batch))).all()
    again = specimen(model)
    assert all(torch.equal(again[key], value) for key, value in batch.items())


def test_a_plain_module_is_asked_for_data() -> None:
    with pytest.raises(HprError, match="give a batch"):
        specimen(nn.Linear(2, 2))
