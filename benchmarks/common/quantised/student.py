"""What every peer gives back, and the bytes of numbers that are not quantised."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hpr.anatomy.describe import describe
from hpr.anatomy.lookup import weight_at
from hpr.nn.coded import stored


@dataclass(frozen=True)
class Peer:
    """A method at one setting: its student, and the bytes of a file for each way of packing the same numbers."""

    student: nn.Module
    bytes: Mapping[str, int]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The weight (out, in) of every linear layer and embedding table that HPR rounds, by site."""
    return {site.name: weight_at(model, site).detach() for site in describe(model).sites}


def with_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the model with other weights at some sites; all other numbers are rounded to half precision."""
    student = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.copy_(stored(parameter))
        for site in describe(model).sites:
            if site.name in weights:
                weight_at(student, site).copy_(weights[site.name])
    return student


def half_bytes(model: nn.Module, without: Collection[str]) -> int:
    """The bytes of all parameters in half precision but for the weights of some sites."""
    covered = sum(site.parameters for site in describe(model).sites if site.name in without)
    return 2 * (sum(parameter.numel() for parameter in model.parameters()) - covered)
