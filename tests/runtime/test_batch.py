"""A batch is a mapping inside the package; a bare tensor is taken in at the boundary and passed positionally."""

import pytest
import torch
from torch import nn

from hpr.data.batches import Batches
from hpr.errors import DataError
from hpr.runtime.batch import POSITIONAL, as_batch, as_batches, examples_in, first_examples
from hpr.runtime.hooks import run, to_device_of


class Odd(nn.Module):
    """Its only input has a name of its own, so that a keyword ``input`` would not reach it."""

    def forward(self, values):
        return values + 1


class Masked(nn.Module):
    """``input`` is the second of two inputs."""

    def forward(self, mask, input):
        return mask * input


def test_a_bare_tensor_is_passed_positionally() -> None:
    batch = as_batch(torch.zeros(3, 2))
    assert set(batch) == {POSITIONAL}
    assert torch.equal(run(Odd(), batch), torch.ones(3, 2))
    assert torch.equal(run(Odd(), to_device_of(torch.zeros(3, 2), Odd())), torch.ones(3, 2))


def test_an_input_of_that_name_among_others_stays_a_keyword() -> None:
    batch = {"input": torch.full((2, 2), 3.0), "mask": torch.tensor([[1.0, 0.0]])}
    assert run(Masked(), batch).tolist() == [[3, 0], [3, 0]]


def test_what_is_no_batch() -> None:
    with pytest.raises(DataError, match="a batch is a list: give a tensor, or a mapping"):
        as_batch([1, 2])


def test_lists_keep_their_class_and_order() -> None:
    mappings = Batches([{"input_ids": torch.zeros(2, 2)}], [1, 0])
    assert as_batches(mappings) is mappings
    bare = Batches([torch.zeros(2, 2), {"input_ids": torch.zeros(1, 2)}], [2, 0, 1])
    made = as_batches(bare)
    assert (type(made), made.order, [set(batch) for batch in made]) == (Batches, [2, 0, 1], [{POSITIONAL}, {"input_ids"}])
    assert isinstance(bare[0], torch.Tensor)  # the user's list is left alone
    assert len(as_batches((torch.zeros(2, 2),))) == 1


def test_first_examples_cuts_tensors_alone() -> None:
    cut = first_examples({"input_ids": torch.zeros(5, 2), "flag": True, "shared": torch.zeros(3)}, 2)
    assert (examples_in(cut), cut["flag"], len(cut["shared"])) == (2, True, 3)


@pytest.mark.parametrize(("values", "grid"), [("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")])
def test_first_examples_cuts_packed_patches_with_their_grid(values: str, grid: str) -> None:
    sizes = torch.tensor([[1, 2, 2], [1, 2, 4], [2, 2, 2]])
    batch = {"input_ids": torch.zeros(3, 5), values: torch.arange(20.0)[:, None], grid: sizes}
    cut = first_examples(batch, 2)
    assert torch.equal(cut[values], torch.arange(12.0)[:, None])
    assert torch.equal(cut[grid], sizes[:2])


def test_first_examples_leaves_patches_whole_that_the_grid_does_not_count() -> None:
    batch = {"input_ids": torch.zeros(2, 5), "pixel_values": torch.zeros(9, 1), "image_grid_thw": torch.ones(2, 3).long()}
    assert len(first_examples(batch, 1)["pixel_values"]) == 9
