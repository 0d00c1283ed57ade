"""The profile: statistics of each site and each layer on the calibration data, saved as one safetensors file.

For a site with weight W and a change Δ, the predicted damage in nats per example is ``½ · N · tr(left Δ right Δᵀ)``, with N the
number of rows per example. A Linear has left ≈ G = E[g gᵀ] (out × out) and right ≈ A = cov(x) (in × in); an embedding table has
left = the counts of its tokens as shares (V,) and right = E[g gᵀ] (d × d). The Kronecker form is that of K-FAC (Martens and
Grosse, 2015); ``curvature`` says how it is estimated.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hpr.anatomy.model import Anatomy
from hpr.anatomy.symmetry import Symmetry
from hpr.errors import HprError, check_kind
from hpr.runtime.files import parse_json, writing

FORMAT = 1
_HEADER = "hpr_profile"  # the key of everything but tensors, as JSON


@dataclass(frozen=True)
class SiteStatistics:
    """Second moments of one site, float64. ``left``: (out, out) or (out,) diagonal; ``right``: (in, in) or (in,) diagonal.

    ``rows``: rows seen per example; ``mean``: E[x], (in,), where a bias can absorb what a change does to the mean (``right``
    is then centred), else None; a site that got no gradient has rows 0.
    """

    left: Tensor
    right: Tensor
    rows: float
    mean: Tensor | None = None

    @property
    def has_gradient(self) -> bool:
        """Whether the objective depends on this site. The planner keeps a site without gradient, such as an unused pooler."""
        return self.rows > 0

    @property
    def fisher_trace(self) -> float:
        """The trace of the Fisher matrix of the whole weight, left ⊗ right: rows · tr left · tr right."""
        return self.rows * trace(self.left) * trace(self.right)


def trace(moment: Float[Tensor, ...]) -> float:
    """Return the trace of a full moment (n, n), or of a diagonal moment (n,)."""
    return float(moment.sum() if moment.dim() == 1 else moment.trace())


def unit(moment: Float[Tensor, ...]) -> Float[Tensor, ...]:
    """Return a moment divided by its trace, so that its trace is 1."""
    return moment / trace(moment)


def pooled(sites: Sequence[SiteStatistics], traces: Sequence[float]) -> tuple[Float[Tensor, ...], Float[Tensor, ...]]:
    """Return the mean left and right moment of several statistics of one matrix, both with trace 1.

    ``traces``: the Fisher traces of the statistics, which are their weights in the mean.
    """
    shares = [fisher_trace / sum(traces) for fisher_trace in traces]
    left, right = (
        torch.stack([share * unit(getattr(site, side)) for share, site in zip(shares, sites, strict=True)]).sum(0)
        for side in ("left", "right")
    )
    return left, right


@dataclass(frozen=True)
class LayerFeatures:
    """Features of one stack of L layers: linear CKA of pooled outputs (L, L), block influence (L,), context dependence (L,)."""

    similarity: list[list[float]]
    block_influence: list[float]
    context_dependence: list[float]


@dataclass(frozen=True)
class Profile:
    """Statistics per site and features per stack. ``about``: objective, examples, tokens, seconds, peak bytes, versions.

    ``symmetries``: transforms of weights that leave the model's outputs unchanged, as trials confirm.
    ``others``: parameter that is no site's weight → mean squared gradient of one number, in squared nats per example.
    ``interventions``: layer → state → measured divergence in nats per example, if measured (``layer_reuse.ablation``).

    >>> profile = hpr.profile(loaded, texts)
    >>> profile.save(folder / "profile.safetensors")
    >>> hpr.Profile.load(folder / "profile.safetensors").fingerprint == profile.fingerprint
    True
    """

    fingerprint: str
    sites: Mapping[str, SiteStatistics]
    layers: Mapping[str, LayerFeatures] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    symmetries: tuple[Symmetry, ...] = ()
    interventions: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    others: Mapping[str, float] = field(default_factory=dict)

    def check(self, anatomy: Anatomy) -> None:
        """Raise ``HprError`` if this profile is of another model, lacks one of its sites, or has moments that do not fit it."""
        if self.fingerprint != anatomy.fingerprint:
            raise HprError(
                f"the profile was taken of a model with fingerprint {self.fingerprint}, this one has {anatomy.fingerprint}: "
                f"profile this model"
            )
        if missing := [site.name for site in anatomy.sites if site.name not in self.sites]:
            raise HprError(f"the profile lacks {missing[0]} ({len(missing)} sites): profile this model anew")
        for site in anatomy.sites:
            moments = self.sites[site.name]
            sides = (("left", moments.left, site.out_features), ("right", moments.right, site.in_features))
            for side, moment, size in sides:
                if tuple(moment.shape) not in ((size,), (size, size)):
                    raise HprError(
                        f"the profile's {side} moment of {site.name}, {tuple(moment.shape)}, should have {size} or {size} x "
                        f"{size} numbers: the file is damaged; profile this model anew"
                    )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file atomically. Sites with the same moment, such as query, key and value, store it once."""
        tensors: dict[str, Tensor] = {}
        stored: dict[int, str] = {}
        sites: dict[str, Any] = {}
        for name, statistics in self.sites.items():
            sites[name] = {"rows": statistics.rows}
            for part in ("left", "right", "mean"):
                tensor = getattr(statistics, part)
                if tensor is not None:
                    key = stored.setdefault(id(tensor), f"{name}.{part}")
                    tensors[key] = tensor.contiguous()
                    sites[name][part] = key
        header = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "sites": sites,
            "layers": {name: vars(features) for name, features in self.layers.items()},
            "about": dict(self.about),
            "symmetries": [symmetry.to_list() for symmetry in self.symmetries],
            "others": dict(self.others),
            "interventions": {layer: dict(damages) for layer, damages in self.interventions.items()},
        }
        target = Path(path)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                save_file(tensors, partial, metadata={_HEADER: json.dumps(header)})
                os.replace(partial, target)
            finally:
                partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Return the profile in a file. Raises ``HprError`` if the file is missing, damaged or no profile."""
        check_kind("the path of a profile", path, (str, os.PathLike), "a path")
        if not Path(path).is_file():
            raise HprError(f"no profile at {path}: `hpr profile` writes one")
        try:
            with safe_open(path, framework="pt") as file:
                header = parse_json((file.metadata() or {})[_HEADER])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise HprError(f"{path} is no profile or is damaged ({error}): profile the model anew") from error
        try:
            if header["format"] != FORMAT:
                raise HprError(f"profile format {header['format']} is not the {FORMAT} this version reads: profile anew")
            sites = {}
            for name, site in header["sites"].items():
                parts = {part: tensors[site[part]] for part in ("left", "right", "mean") if part in site}
                sites[name] = SiteStatistics(rows=site["rows"], **parts)
                _check_moments(name, sites[name])
            layers = {name: LayerFeatures(**features) for name, features in header["layers"].items()}
            symmetries = tuple(Symmetry.from_list(values) for values in header.get("symmetries", ()))
            interventions, others = header.get("interventions", {}), header.get("others", {})
            for key, value in (("about", header["about"]), ("interventions", interventions), ("others", others)):
                if not isinstance(value, dict):
                    raise ValueError(f"{key} is {value!r:.80}, not a mapping")
            return cls(header["fingerprint"], sites, layers, header["about"], symmetries, interventions, others)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise HprError(f"{path} is no profile or is damaged ({error}): profile the model anew") from error


def _check_moments(name: str, statistics: SiteStatistics) -> None:
    """Raise ``ValueError`` for moments that no measurement gives: they would end in the middle of planning."""
    for side in ("left", "right"):
        moment = getattr(statistics, side)
        if not moment.is_floating_point() or not bool(torch.isfinite(moment).all()):
            raise ValueError(f"the {side} moment of {name} has numbers that are not finite, or no floating point")
        if statistics.has_gradient and not bool(moment.any()):
            raise ValueError(f"the {side} moment of {name} is 0, although the objective depends on it")


def is_profile(path: Path) -> bool:
    """Whether a file is a profile, of this version or another."""
    try:
        with safe_open(path, framework="pt") as file:
            return _HEADER in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False
