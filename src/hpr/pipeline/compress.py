"""All steps at once: profile, plan, share, choose by measurement, refit, heal, evaluate, and write a folder."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import nn

from hpr.anatomy.describe import describe
from hpr.anatomy.lookup import bytes_per_parameter
from hpr.checkpoints import save
from hpr.checkpoints.open import open_model
from hpr.data.batches import first_batches
from hpr.data.loaded_model import as_opened
from hpr.data.splits import Splits, joined, split_sources
from hpr.errors import HprError
from hpr.evaluation.divergence import Comparison, Estimate, divergence
from hpr.evaluation.evaluate import evaluate
from hpr.pipeline.record import operator_gains, plan_rows, record, write
from hpr.pipeline.rescore import reusing_plans, students
from hpr.planning.draft import Draft
from hpr.planning.options import PlanOptions
from hpr.planning.planner import draft, known_operators
from hpr.plans.budget import parse_budget
from hpr.plans.plan import Plan
from hpr.profiling.objectives import Objective, objective_for
from hpr.profiling.profile import Profile
from hpr.profiling.run import profile
from hpr.routing.plan import best_routed
from hpr.routing.usage import routes_taken
from hpr.sharing.refit import refit as regress
from hpr.sharing.share import share

REFITTED = 1024  # examples a refit regresses on
_OTHER_BUDGETS = (0.6, 0.8, 1.25, 1.5)  # of the one asked for: what the report shows of quality against size


@dataclass(frozen=True)
class Compression:
    """What ``compress`` made: the student, its plan, ``metrics`` (as in metrics.json) and the output folder, if any."""

    student: nn.Module
    plan: Plan
    metrics: dict[str, Any]
    output: Path | None


@dataclass
class _Clock:
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def compress(
    model: str | Path | nn.Module | None = None,
    budget: str = "50%",
    output: str | Path | None = None,
    data: Any = None,
    only: str | None = None,
    operators: Iterable[str] | None = None,
    objective: str | None = None,
    examples: int = 4096,
    plans: int = 4,
    refit: bool | Literal["auto"] = "auto",
    seed: int = 0,
    tokenizer: Any = None,
    align: bool | Literal["auto"] = "auto",
    reuse: bool = False,
    heal: str | None = None,
    shares: Mapping[str, float] | None = None,
    device: str | None = None,
    routers: int = 0,
) -> Compression:
    """Compress a model: profile, plan, share, choose by measurement, heal where wanted, evaluate, and write a folder.

    ``model``: a folder, a name, a module (with its ``tokenizer``), or None for the packaged all-MiniLM-L6-v2. ``data``: a
    text file, a list of texts, an ``.npy`` or ``.npz`` file, or None for the standard library's docstrings; or several of
    these by name, with ``shares`` of the examples. Up to ``plans`` plans are re-scored end to end. ``align``: also plan with
    aligned layers (see ``planner.draft``). ``reuse``: also try plans in which layers are dropped or reuse attention (see
    ``reusing_plans``), which takes two passes over the re-scoring text for each layer and state. ``heal``: train the result
    for so long (``500steps``, ``10min``) on all of the data. ``refit="auto"`` refits where the data
    is the user's own and re-scoring finds it better. ``device``: where a model that is named runs (see ``open_model``); a
    module stays where it is. ``routers``: so many experts between which routers choose by the input (see ``mixing``); 0 for the
    best static plan, since routers have not been found to pay. Raises ``HprError`` before anything is written where an input
    does not serve.
    """
    clock = _Clock()
    torch.manual_seed(seed)
    opened = as_opened(model, tokenizer, objective) if isinstance(model, nn.Module) else open_model(model, device)
    if output is not None:
        save.check_folder(output)
    goal = objective_for(opened.model, objective or opened.objective)
    # a budget that is none, or operators that are none, are said at once
    parse_budget(budget, describe(opened.model), bytes_per_parameter(opened.model), only)
    known_operators(operators)
    if routers < 0 or routers == 1:
        raise HprError(f"routers {routers}: at least 2 experts, between which a router chooses, or 0 for no routers")
    if routers and reuse:
        raise HprError(f"routers {routers} and reuse: plans in which layers reuse are not routed; ask for one of the two")
    if heal is not None:
        from hpr.healing.duration import parse_duration

        parse_duration(heal)
    with clock("data"):
        dealt = split_sources(data, opened, examples, shares=shares)
        texts = joined(list(dealt.values()))
    with clock("profile"):
        found = profile(opened.model, texts.calibration, goal.name, seed)
    with clock("plan"):
        sketch = draft(
            opened.model,
            found,
            PlanOptions(
                only=only,
                operators=None if operators is None else tuple(operators),
                align=None if align == "auto" else align,
            ),
        )
        limit = sketch.budget(budget)
        if routers:
            tried = [(budget, best_routed(sketch, limit, opened.model, routers))]
        else:
            tried = [(budget, plan) for plan in sketch.alternatives(limit, max(1, plans))]
    if reuse:
        from hpr.layer_reuse.ablation import intervene  # an optional feature, loaded if asked for

        with clock("interventions"):
            found = replace(found, interventions=intervene(opened.model, texts.rescoring, goal))
            others = reusing_plans(opened.model, found, sketch, limit, texts.rescoring, goal)
            tried += [(budget, plan) for plan in others]
    with clock("plan"):
        tried += _other_budgets(sketch, limit.parameters) if plans > 1 else []
    scores: list[Comparison] = []
    best, student = 0, opened.model  # of the plans for this budget; the first is one of them
    with clock("rescore"):
        for one, score in students(opened.model, found, [plan for _, plan in tried], texts.rescoring, goal):
            if tried[len(scores)][0] == budget and (not scores or score.divergence.mean < scores[best].divergence.mean):
                best, student = len(scores), one
            scores.append(score)
    plan = tried[best][1]
    refitted = False
    if refit is True or (refit == "auto" and texts.own and not plan.layers):
        with clock("refit"):
            student, refitted = _refitted(student, opened.model, plan, found, texts, goal, scores[best].divergence, refit)
    healing = None
    if heal is not None:
        from hpr.healing.heal import HEALED
        from hpr.healing.heal import heal as healed
        from hpr.healing.recipe import Recipe

        with clock("heal"):
            if not goal.writes_targets:  # there the teacher would have to write more answers first
                longer = split_sources(data, opened, HEALED, shares=shares)
                dealt = {name: replace(part, calibration=longer[name].calibration) for name, part in dealt.items()}
            sources = SimpleNamespace(files=dealt, shares=shares) if shares else dealt
            healing = healed(student, opened, sources, Recipe(duration=heal, objective=goal.name, seed=seed))
    with clock("evaluate"):
        figures = evaluate(student, opened.model, texts.heldout, goal, data=f"{texts.source}, held out")
    metrics = record(opened, plan, found, texts, figures, clock.seconds, seed)
    metrics["plans"] = plan_rows(tried, scores, best, sketch.anatomy)
    metrics["plan_quality"] = "cosine to the original" if scores[best].cosine is not None else "agreement with the original"
    metrics["refit"] = refitted
    metrics["operator_gains"] = operator_gains(sketch, plan)
    if healing is not None:
        metrics["healing"] = healing.as_metrics()
    metrics |= routes_taken(student, dealt, opened.tokenizer)
    folder = None
    if output is not None:
        folder = write(student, output, plan, metrics, opened)
    return Compression(student, plan, metrics, folder)


def _other_budgets(sketch: Draft, parameters: int) -> list[tuple[str, Plan]]:
    """Best plans at a few budgets around the one asked for, as far as they are possible."""
    plans = []
    for share_of in _OTHER_BUDGETS:
        count = int(share_of * parameters)
        if count < sketch.anatomy.total_parameters:
            text = f"{100 * count / sketch.anatomy.total_parameters:.0f}%"
            try:
                plans.append((text, sketch.best(sketch.budget(str(count)))))
            except HprError:
                continue  # below the smallest possible plan: there is nothing to show there
    return plans


def _refitted(
    student: nn.Module,
    teacher: nn.Module,
    plan: Plan,
    found: Profile,
    texts: Splits,
    goal: Objective,
    before: Estimate,
    wish: bool | str,
) -> tuple[nn.Module, bool]:
    """The refitted student where the user insists or it measures better on re-scoring text; else the student as it was."""
    regress(student, teacher, plan, found, first_batches(texts.calibration, REFITTED))
    if wish is True or divergence(student, teacher, texts.rescoring, goal).mean < before.mean:
        return student, True
    return share(teacher, plan, found), False
