"""Coded rounding and its one-sided form, which is GPTQ with entropy coding (WaterSIC, arXiv 2603.04956)."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

import hpr
from hpr.profiling.profile import Profile


def one_sided(profile: Profile) -> Profile:
    """The profile with the output moments of linear sites replaced by their mean diagonal."""
    sites = {
        name: replace(site, left=torch.full((len(site.left),), float(site.left.diagonal().mean())).double())
        if site.left.dim() == 2
        else site
        for name, site in profile.sites.items()
    }
    return replace(profile, sites=sites)


def saved_bytes(student: nn.Module) -> int:
    """The bytes of the file of weights that ``hpr.save`` writes."""
    with TemporaryDirectory() as folder:
        hpr.save(student, Path(folder) / "model")
        return os.path.getsize(Path(folder) / "model" / "model.safetensors")
