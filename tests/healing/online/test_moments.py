"""Learning without gradients: moments that forget, and factors fitted anew to them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_healing import batches, equal, teacher_of, weights_of
from torch import nn

import hpr
from hpr.errors import HprError
from hpr.healing.online.healer import OnlineHealer
from hpr.healing.online.moments import Moments, blended
from hpr.healing.online.options import OnlineOptions
from hpr.plans.plan import Plan
from hpr.profiling.profile import Profile, SiteStatistics

Made = tuple[nn.Module, Plan, Profile, nn.Module]


def narrow(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Texts of another kind: four tokens alone."""
    return [{"input_ids": batch["input_ids"] % 4 + 3} for batch in batches(count, seed)]


@pytest.fixture(scope="module")
def made() -> Made:
    teacher = teacher_of()
    profile = hpr.profile(teacher, batches())
    plan = hpr.plan(teacher, profile, "50%")
    return teacher, plan, profile, hpr.share(teacher, plan, profile)


def fisher_trace(site: SiteStatistics) -> float:
    """rows · tr left · tr right."""
    traces = [float(side.sum() if side.dim() == 1 else side.trace()) for side in (site.left, site.right)]
    return site.rows * traces[0] * traces[1]


def test_each_batch_takes_its_share() -> None:
    one, two = (SiteStatistics(torch.full((2, 2), value), torch.full((3,), value), value, None) for value in (1.0, 5.0))
    found = blended(one, two, 0.25)
    assert (found.rows, found.mean) == (2.0, None)
    assert fisher_trace(found) == pytest.approx(0.75 * fisher_trace(one) + 0.25 * fisher_trace(two))
    apart = (
        SiteStatistics(torch.diag(torch.tensor([1.0, 0.0])), torch.ones(2), 10.0),
        SiteStatistics(torch.diag(torch.tensor([0.0, 0.1])), torch.ones(2), 100.0),
    )
    assert fisher_trace(apart[0]) == pytest.approx(fisher_trace(apart[1]))
    even = blended(*apart, 0.5)
    assert fisher_trace(even) == pytest.approx(fisher_trace(apart[0]))
    assert even.left[0, 0] == pytest.approx(float(even.left[1, 1]))
    dead = SiteStatistics(torch.zeros(2), torch.zeros(3), 0.0)
    assert blended(one, dead, 0.5) is one
    assert blended(dead, two, 0.5) is two


def test_moments_forget(made: Made) -> None:
    """The same batches once more leave what they gave; many of another kind leave nothing of what was there."""
    teacher, plan, profile, _ = made
    moments, stream = Moments(teacher, plan, profile, forget=0.5), narrow(8, 4)
    for _ in range(8):
        moments.add(stream, seed=0)
    there = hpr.profile(teacher, stream)
    for name, site in there.sites.items():
        found = moments.profile.sites[name]
        if site.has_gradient:
            torch.testing.assert_close(found.left, site.left, rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(found.right, site.right, rtol=1e-6, atol=1e-9)
    copied = Moments(teacher, plan, profile, forget=0.5)
    copied.restore(moments.tensors())
    assert equal(copied.tensors(), moments.tensors())


def test_a_refit_follows_the_stream(made: Made) -> None:
    teacher, plan, profile, student = made
    moments = Moments(teacher, plan, profile, forget=0.2)
    options = OnlineOptions(learning_rate=1e-12, every=4, tolerance=1.0)
    healer = OnlineHealer(hpr.share(teacher, plan, profile), narrow(2, 90), teacher, options, moments)
    for batch in narrow(16, 5):
        healer.update(batch)
    update = healer.refit()
    assert not update.rolled_back
    assert update.validation == healer.measure() < 0.9 * healer.start
    assert equal(weights_of(healer.student), weights_of(moments.fitted()))
    assert not equal(weights_of(healer.student), weights_of(student))


def test_a_refit_that_hurts_is_taken_back(made: Made) -> None:
    teacher, plan, profile, _ = made
    moments = Moments(teacher, plan, profile, forget=1.0)
    options = OnlineOptions(learning_rate=1e-4, every=4)
    healer = OnlineHealer(hpr.share(teacher, plan, profile), batches(4, 90), teacher, options, moments)
    for batch in narrow(4, 5):
        healer.update(batch)
    before = weights_of(healer.student)
    assert healer.refit().rolled_back
    assert equal(weights_of(healer.student), before)


def test_it_goes_on_where_it_was(made: Made, tmp_path: Path) -> None:
    teacher, plan, profile, _ = made
    stream, options = narrow(8, 5), OnlineOptions(every=2, tolerance=1.0)

    def learner(folder: Path | None) -> OnlineHealer:
        moments = Moments(teacher, plan, profile, forget=0.2)
        student = hpr.share(teacher, plan, profile)
        given = student, narrow(2, 90), teacher, options, moments
        return OnlineHealer(*given) if folder is None else OnlineHealer.open(folder, *given)

    straight, cut, kept = learner(None), learner(tmp_path), []
    for place, batch in enumerate(stream):
        straight.update(batch)
        cut.update(batch)
        if place in (3, 6):
            straight.moments.add(stream[:1])  # and what no update brought
            cut.moments.add(stream[:1])
            update = straight.refit()
            assert update == cut.refit()
            kept.append(not update.rolled_back)
            cut = learner(tmp_path)
    assert kept[0]
    assert equal(weights_of(cut.student), weights_of(straight.student))
    assert equal(cut.moments.tensors(), straight.moments.tensors())
    with pytest.raises(HprError, match="other moments"):
        OnlineHealer.open(tmp_path, hpr.share(teacher, plan, profile), narrow(2, 90), teacher, options)


def test_what_does_not_serve_is_said(made: Made) -> None:
    teacher, plan, profile, student = made
    with pytest.raises(HprError, match="forget 0 must be above 0"):
        Moments(teacher, plan, profile, forget=0)
    with pytest.raises(HprError, match="no moments to refit to"):
        OnlineHealer(student, batches(1), teacher).refit()
    other = Moments(teacher, hpr.plan(teacher, profile, "70%"), profile)
    before = weights_of(student)
    with pytest.raises(HprError, match="not that of this student"):
        OnlineHealer(student, batches(1), teacher, moments=other).refit()
    assert equal(weights_of(student), before)


def test_a_refit_that_is_not_finite_is_taken_back(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, plan, profile, _ = made
    student = hpr.share(teacher, plan, profile)
    healer = OnlineHealer(student, batches(1), teacher, moments=Moments(teacher, plan, profile))
    broken = hpr.share(teacher, plan, profile)
    with torch.no_grad():
        next(broken.parameters()).fill_(1e30)
    before = weights_of(student)
    monkeypatch.setattr(Moments, "fitted", lambda self: broken)
    update = healer.refit()
    assert update.rolled_back
    assert update.validation is None
    assert equal(weights_of(student), before)
