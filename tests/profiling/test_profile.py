"""The profile on disk: bit for bit what it was, written at once, and refused where it does not serve."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hpr.anatomy.describe import describe
from hpr.errors import CheckpointError, HprError
from hpr.profiling import profile as profile_module
from hpr.profiling.profile import LayerFeatures, Profile, SiteStatistics


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 2, bias=False)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def profile() -> Profile:
    same = drawn(4, 4)
    sites = {
        "one": SiteStatistics(same, drawn(3), 2.5, drawn(3, seed=1)),
        "two": SiteStatistics(drawn(2, seed=2), same, 0.0),
    }
    layers = {"stack": LayerFeatures([[1.0, 0.1], [0.1, 1.0]], [0.3, 1 / 3], [0.0, 0.25])}
    return Profile(describe(Two()).fingerprint, sites, layers, {"objective": "hidden", "examples": 3})


@pytest.mark.parametrize("change", [torch.zeros_like, lambda moment: moment * torch.nan, lambda moment: moment.long()])
def test_a_profile_with_moments_that_nothing_measures_is_damaged(profile, tmp_path, change) -> None:
    name = next(name for name, site in profile.sites.items() if site.has_gradient and site.left.dim() == 2)
    site = profile.sites[name]
    damaged = replace(profile, sites={**profile.sites, name: replace(site, left=change(site.left))})
    damaged.save(tmp_path / "profile.safetensors")
    with pytest.raises(HprError, match=rf"the left moment of {name} .*profile the model anew"):
        Profile.load(tmp_path / "profile.safetensors")


def test_what_is_loaded_is_bit_for_bit_what_was_saved(profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "profile.safetensors"
    profile.save(path)
    found = Profile.load(path)
    assert found.fingerprint == profile.fingerprint
    assert found.layers == profile.layers
    assert found.about == profile.about
    assert list(found.sites) == list(profile.sites)
    for name, site in profile.sites.items():
        other = found.sites[name]
        assert other.rows == site.rows
        assert other.has_gradient == site.has_gradient
        for part in ("left", "right", "mean"):
            one, two = getattr(site, part), getattr(other, part)
            assert (one is None) == (two is None)
            assert one is None or (torch.equal(one, two) and one.dtype == two.dtype)
    with safe_open(path, framework="pt") as file:
        assert len(file.keys()) == 4  # the moment that both sites have is there once
    again = tmp_path / "again.safetensors"
    found.save(again)
    assert again.stat().st_size <= path.stat().st_size + 4 * 4 * 8 + 200


def test_views_and_transposes_are_saved(profile: Profile, tmp_path: Path) -> None:
    big = drawn(4, 8)
    site = SiteStatistics(big[:, :4].T, big[:3, 0], 1.0, big[0, :3])
    replace(profile, sites={**profile.sites, "one": site}).save(tmp_path / "p")
    found = Profile.load(tmp_path / "p").sites["one"]
    assert torch.equal(found.left, site.left)
    assert torch.equal(found.right, site.right)
    assert torch.equal(found.mean, site.mean)


def test_writing_is_atomic(profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "profile.safetensors"
    profile.save(path)
    before = path.read_bytes()

    def fails(tensors: dict, target: Path, metadata: dict) -> None:
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(profile_module, "save_file", fails)
    with pytest.raises(CheckpointError, match="disk full"):
        replace(profile, sites={}).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_missing_damaged_and_foreign_files(profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "profile.safetensors"
    with pytest.raises(HprError, match="no profile at"):
        Profile.load(path)
    profile.save(path)
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[:40], whole[:-8]):
        path.write_bytes(content)
        with pytest.raises(HprError, match="no profile or is damaged"):
            Profile.load(path)
    for metadata in (None, {"hpr_profile": "{"}):
        save_file({"x": torch.zeros(1)}, path, metadata=metadata)
        with pytest.raises(HprError, match="no profile or is damaged"):
            Profile.load(path)


@pytest.mark.parametrize("broken", ["format", "site", "key", "list"])
def test_headers_that_do_not_fit(profile: Profile, tmp_path: Path, broken: str) -> None:
    path = tmp_path / "profile.safetensors"
    profile.save(path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["hpr_profile"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if broken == "format":
        header["format"] = 99
    elif broken == "site":
        header["sites"]["one"]["left"] = "nowhere"
    elif broken == "key":
        del header["fingerprint"]
    else:
        header = []
    save_file(tensors, path, metadata={"hpr_profile": json.dumps(header)})
    with pytest.raises(HprError, match="format 99" if broken == "format" else "no profile or is damaged"):
        Profile.load(path)


def test_a_profile_of_another_model_is_refused(profile: Profile) -> None:
    model = Two()
    profile.check(describe(model))
    with torch.no_grad():
        model.one.weight += 1
    with pytest.raises(HprError, match="profile this model"):
        profile.check(describe(model))
    with pytest.raises(HprError, match=r"lacks two \(1 sites\)"):
        replace(profile, sites={"one": profile.sites["one"]}).check(describe(Two()))
