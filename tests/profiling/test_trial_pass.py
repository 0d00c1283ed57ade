"""Passes of a trial: a block alone gives what it gives inside its model, and is given up where it does not."""

import torch
from torch import Tensor, nn

from hpr.profiling.trial_pass import of_block, repeatable


class Block(nn.Module):
    """Writes into what it gets, and returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: tuple[Tensor, float]) -> tuple[Tensor, None]:
        return x.add_(self.inner(x) * scale[0] * scale[1]), None


class Counting(Block):
    calls = 0

    def forward(self, x: Tensor, scale: tuple[Tensor, float]) -> tuple[Tensor, None]:
        self.calls += 1
        return super().forward(x + self.calls, scale)


class Net(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.first, self.block, self.idle = nn.Linear(3, 4), block, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).clone()
        for _ in range(2):
            x, _ = self.block(x, scale=(torch.ones(4), 0.5))
        return x


@torch.no_grad()
def test_a_block_alone_gives_what_its_first_call_gave() -> None:
    torch.manual_seed(0)
    model, x = Net(Block()), torch.randn(2, 3)
    tried = of_block(model.block, lambda: model(x))
    assert tried is not None
    expected = model.block(model.first(x), scale=(torch.ones(4), 0.5))[0]
    assert torch.equal(tried.expected, expected.double().flatten())
    assert torch.equal(tried.outputs(), tried.expected)
    assert not model.block._forward_pre_hooks
    model.block.inner.weight += 1
    assert not torch.allclose(tried.outputs(), tried.expected)


@torch.no_grad()
def test_what_cannot_be_called_again_is_given_up() -> None:
    torch.manual_seed(0)
    model, x = Net(Counting()), torch.randn(2, 3)
    assert of_block(model.block, lambda: model(x)) is None
    assert of_block(model.idle, lambda: model(x)) is None  # the model does not call it
    assert repeatable(lambda: torch.randn(3)) is None
    assert repeatable(lambda: {"ids": torch.arange(3)}) is None  # no number that a weight could change
