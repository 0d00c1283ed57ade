"""Which weights a class reads past their module, found in its source."""

import logging

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from hpr.anatomy.describe import describe
from hpr.anatomy.swappable import not_swappable

HEAD = """class Read(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)

"""
BODIES = {
    "a product": ("def forward(self, x): return self.down(F.linear(x, self.up.weight))", {"up"}),
    "a nested function": ("def forward(self, x): return (lambda y: y @ self.up.weight)(self.down(x))", {"up"}),
    "another method": (
        "def forward(self, x): return self.down(self.first(x))\n    def first(self, x): return x @ self.up.weight",
        {"up"},
    ),
    "its type": ("def forward(self, x): return self.down(self.up(x.to(self.up.weight.dtype)))", set()),
    "its class": ("def forward(self, x): return self.down(self.up(x)) if isinstance(self.up.weight, Tensor) else x", set()),
    "at the start": (
        "def forward(self, x): return self.down(self.up(x))\n    def reset_parameters(self): self.up.weight.data.zero_()",
        set(),
    ),
    "a bias": ("def forward(self, x): return self.down(self.up(x) - self.up.bias)", set()),
}


def made(body: str, known: bool, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """A module of a class whose source is in a file, or nowhere."""
    source = f"{HEAD}    {body}\n"
    names = {"nn": nn, "F": F, "Tensor": Tensor, "__name__": "written"}
    path = tmp_path_factory.mktemp("source") / "written.py"
    if known:
        path.write_text(source)
    exec(compile(source, str(path), "exec"), names)
    return names["Read"]()  # type: ignore[operator]


@pytest.mark.parametrize("what", BODIES)
def test_reads_past_a_module_are_found_in_the_source(what: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    body, expected = BODIES[what]
    model = made(body, True, tmp_path_factory)
    assert set(not_swappable(model, describe(model))) == expected


def test_without_a_source_what_may_be_read_is_kept(
    tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "hpr")
    reading = made("def forward(self, x): return F.linear(self.down(x), self.up.weight)", False, tmp_path_factory)
    assert set(not_swappable(reading, describe(reading))) == {"up", "down"}
    assert "Read.forward" in caplog.text
    calling = made("def forward(self, x): return self.down(self.up(x))", False, tmp_path_factory)
    assert not_swappable(calling, describe(calling)) == {}


class Scaled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).to(self.weight.dtype) * 2


class Whole(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + self.weight.mean()


@pytest.mark.parametrize(("kind", "refused"), [(Scaled, set()), (Whole, {"table"})])
def test_a_table_may_do_more_than_look_up_but_not_read_its_weight(kind: type[nn.Embedding], refused: set[str]) -> None:
    model = nn.ModuleDict({"table": kind(8, 4), "head": nn.Linear(4, 8)})
    assert set(not_swappable(model, describe(model))) == refused
