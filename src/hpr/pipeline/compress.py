"""All steps at once: profile, plan, share, choose by measurement, refit, heal, evaluate, and write a folder."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from hpr.anatomy.describe import describe
from hpr.anatomy.lookup import bytes_per_parameter
from hpr.checkpoints.open import open_model
from hpr.checkpoints.save import check_output
from hpr.coding.tables import ans
from hpr.data.batches import first_batches
from hpr.data.loaded_model import LoadedModel
from hpr.data.splits import Splits, prepare
from hpr.errors import BudgetError, check_kind
from hpr.evaluation.cost import disk_bytes
from hpr.evaluation.divergence import Comparison, divergence
from hpr.evaluation.evaluate import evaluate, measured_on
from hpr.operators.fitting import Fits
from hpr.pipeline.coded import compress_to_bytes, healed, rounding_record
from hpr.pipeline.compression import Compression, seeded, timed
from hpr.pipeline.record import operator_gains, plan_rows, record, write
from hpr.pipeline.rescore import students
from hpr.planning.dial import Dial, check_dial, measured_dial
from hpr.planning.draft import Draft, Proposal
from hpr.planning.least import check_budget
from hpr.planning.options import PlanOptions
from hpr.planning.planner import draft, known_operators
from hpr.plans.budget import Budget, byte_limit, parse_budget
from hpr.plans.plan import Plan
from hpr.profiling.objectives import Objective, objective_for
from hpr.profiling.profile import Profile
from hpr.profiling.run import profile
from hpr.rounding.plan import CodedPlan
from hpr.rounding.shared import aligned_profile, round_shared
from hpr.sharing.materialise import materialise
from hpr.sharing.refit import refit
from hpr.sharing.share import check_unshared
from hpr.solver.boundaries import boundary_probabilities, fitted_temperature
from hpr.timing.target import LATENCY

if TYPE_CHECKING:  # the Trainer is imported only if something is healed
    from hpr.healing.recipe import Recipe
    from hpr.healing.train import Healing

_log = logging.getLogger(__name__)

REFITTED = 1024  # examples that a refit regresses on
CURVE = (0.6, 0.8, 1.25, 1.5)  # budgets that ``curve`` adds, relative to the one asked for


@dataclass(frozen=True)
class _Run:
    """What every step of one compression reads; ``seconds`` collects the time of each step."""

    loaded: LoadedModel
    objective: Objective
    budget: Budget
    options: PlanOptions
    file_limit: int | None  # bytes of the file, for factors that are rounded
    dial: Dial | None = None  # what time or operations may be
    seconds: dict[str, float] = field(default_factory=dict)

    def step(self, name: str) -> AbstractContextManager[None]:
        """Time a step."""
        return timed(self.seconds, name)


@dataclass(frozen=True)
class _Choice:
    """The proposals that were run end to end, with their scores, and which of them was taken."""

    proposals: list[Proposal]  # those for the budget, then those of the curve
    comparisons: list[Comparison]  # one for each proposal
    best: int
    student: nn.Module

    @property
    def plans(self) -> list[Plan]:
        return [proposal.plan for proposal in self.proposals]

    @property
    def plan(self) -> Plan:
        return self.proposals[self.best].plan

    @property
    def score(self) -> Comparison:
        return self.comparisons[self.best]


def compress(
    model: str | Path | nn.Module | LoadedModel | None = None,
    budget: str = "50%",
    data: Any = None,
    output: str | Path | None = None,
    options: PlanOptions | None = None,
    heal: Recipe | str | None = None,
) -> Compression:
    """Compress a model in one call, and write a folder if ``output`` is given.

    The steps: profile, plan, run the best few plans end to end, take the one of least true divergence, refit if that
    measures better, heal if asked to, evaluate on held-out data.

    ``model``: a folder, a hub id, a module, what ``open_model`` gave, or None for the packaged all-MiniLM-L6-v2. A module that
    reads text needs its tokenizer: give ``open_model(module, tokenizer=...)``. ``budget``: ``50%`` or ``11M`` parameters, which
    layers then share; or ``8MB`` on disk (``10%bytes``), for which every weight is rounded and coded. ``data``: a file, a
    list of texts, an array, batches, a ``datasets.Dataset``, a ``Mixture`` of several, or
    None for the standard library's docstrings. ``options``: everything else about planning. ``heal``: a ``Recipe``, or a
    duration such as ``500steps`` or ``10min``.

    Raises ``HprError``, before anything is measured or written, if an input does not fit.

    >>> made = hpr.compress(loaded, "60%", texts, options=hpr.PlanOptions(plans=2))
    >>> made.metrics["budget"]["text"]
    '60%'
    """
    options = PlanOptions() if options is None else options
    check_kind("options", options, PlanOptions, "hpr.PlanOptions(...)")
    loaded = open_model(model)
    if (limit := byte_limit(budget, disk_bytes(loaded.model))) is not None:
        recipe = _recipe(heal, options)
        with seeded(options.seed):
            return compress_to_bytes(loaded, (budget.strip(), limit), data, output, options, recipe)
    with seeded(options.seed):
        run, recipe = _checked(loaded, budget, output, options, heal)
        with run.step("data"):
            texts = prepare(data, run.loaded, options.examples)
            texts.check(run.loaded)
        if options.target is not None:
            with run.step("time"):
                run = _dialled(run, texts)
        with run.step("profile"):
            measured = profile(run.loaded.model, texts.calibration, run.objective.name, options.seed)
        with run.step("plan"):
            fits = Fits(run.loaded.model, measured)
            candidates = draft(run.loaded.model, measured, options, fits=fits, dial=run.dial)
            proposals, refusal = _proposals(run, candidates)
        if options.reuse or run.dial is not None:
            with run.step("interventions"):
                measured, more = _layer_plans(run, measured, candidates, texts)
                proposals += more
        if not proposals and refusal is not None:
            raise refusal
        with run.step("plan"):
            curve = _curve(run, candidates) if options.curve else []
        with run.step("rescore"):
            choice = _chosen(run, fits, proposals, curve, texts)
        with run.step("refit"):
            refitted = _refitted(run, fits, measured, choice, texts)
        healing, rounded = None, None
        if run.file_limit is not None:
            with run.step("round"):
                rounded = _rounded(run, fits, choice, texts)
        if recipe is not None:
            with run.step("heal"):
                if rounded is None or run.file_limit is None:
                    healing = _healed(run, choice.student, texts, recipe)
                else:
                    rounded, healing = healed(rounded, run.file_limit, run.loaded, measured, texts, recipe)
        student, plan = (choice.student, choice.plan) if rounded is None else (rounded.student, rounded.plan)
        with run.step("evaluate"):
            figures = evaluate(student, run.loaded.model, texts.heldout, run.objective)
            figures = measured_on(figures, f"{texts.source}, held out")
        metrics = record(run.loaded, plan, measured, texts, figures) | {
            "seed": options.seed,
            "timing": run.seconds,
            "plans": plan_rows(choice.plans, choice.comparisons, choice.best, candidates.anatomy),
            "boundaries": _boundaries(candidates, choice),
            "plan_quality": choice.score.likeness[0],
            "refit": refitted,
            "operator_gains": operator_gains(candidates, choice.plan),
        }
        if healing is not None:
            metrics["healing"] = healing.as_metrics()
        if rounded is not None:
            metrics |= rounding_record(rounded)
        if options.routers:
            metrics |= _routes(run, student, texts)
        if run.dial is not None:
            with run.step("time"):
                metrics["speed"] = _speed(run.dial, student, plan, run.loaded.model)
        folder = None if output is None else write(student, output, plan, metrics, run.loaded)
    return Compression(student, plan, metrics, folder)


def _checked(
    loaded: LoadedModel, budget: str, output: str | Path | None, options: PlanOptions, heal: Recipe | str | None
) -> tuple[_Run, Recipe | None]:
    """Read every option. Whatever is wrong is said here, before minutes are spent."""
    recipe = _recipe(heal, options)
    file_limit = options.file_limit(budget, disk_bytes(loaded.model))
    if file_limit is not None:
        ans()  # raises if the coder is not installed
        if recipe is not None:
            from hpr.healing.coded.heal import check_recipe

            check_recipe(loaded.model, recipe)
    known_operators(options.operators)
    check_unshared(loaded.model)
    each, anatomy = bytes_per_parameter(loaded.model), describe(loaded.model)
    limit = parse_budget(budget, anatomy, each, options.only)
    check_budget(loaded.model, anatomy, limit, options)
    if output is not None:
        size = int(each * limit.parameters) if file_limit is None else file_limit
        check_output(loaded.model, output, loaded.tokenizer, loaded.folder, size)
    return _Run(loaded, objective_for(loaded.model, loaded.objective), limit, options, file_limit), recipe


def _recipe(heal: Recipe | str | None, options: PlanOptions) -> Recipe | None:
    """The recipe that ``heal`` says."""
    if heal is None:
        return None
    from hpr.healing.recipe import Recipe

    if not isinstance(heal, str):
        check_kind("heal", heal, Recipe, "hpr.Recipe(...), or a duration such as '500steps'")
        return heal
    return Recipe(duration=heal, seed=options.seed)


def _dialled(run: _Run, texts: Splits) -> _Run:
    """The run with what every weight costs in a call. Raises ``BudgetError`` for a target that no plan can meet."""
    model, anatomy = run.loaded.model, describe(run.loaded.model)
    dial = measured_dial(model, anatomy, run.options, texts.calibration[0])
    assert dial is not None
    check_dial(model, anatomy, dial, run.options)
    return replace(run, dial=dial)


def _speed(dial: Dial, student: nn.Module, plan: Plan, teacher: nn.Module) -> dict[str, Any]:
    """What the plan predicted of time or operations, and what the student needs: its copy for inference, if time counts."""
    kind, costs = dial.target.kind, dial.costs
    fast = materialise(student, costs.positions) if kind == LATENCY else student
    return {kind: {**plan.diagnostics[kind], "measured": costs.share_of(fast)}}


def _proposals(run: _Run, candidates: Draft) -> tuple[list[Proposal], BudgetError | None]:
    """Up to ``options.plans`` plans within the budget, the best by predicted damage first; or one plan with routers.

    With a dial there may be none, and the error that says so: plans that drop layers may still be as fast as it asks.
    """
    if run.options.routers:
        from hpr.routing.plan import best_routed

        plan = best_routed(candidates, run.budget, run.loaded.model, run.options.routers)
        return [Proposal(plan, candidates.propose(run.budget).multiplier)], None
    try:
        return candidates.proposals(run.budget, run.options.plans), None
    except BudgetError as error:
        if run.dial is None:
            raise
        return [], error


def _layer_plans(run: _Run, measured: Profile, candidates: Draft, texts: Splits) -> tuple[Profile, list[Proposal]]:
    """The profile with the divergence of each layer dropped or reusing, and plans that do so."""
    from hpr.layer_reuse.ablation import intervene
    from hpr.pipeline.layer_plans import reusing_plans

    model = run.loaded.model
    measured = replace(measured, interventions=intervene(model, texts.rescoring, run.objective))
    return measured, reusing_plans(model, measured, candidates, run.budget, texts.rescoring, run.objective)


def _curve(run: _Run, candidates: Draft) -> list[Proposal]:
    """The best plans at a few budgets around the one asked for, if they are possible."""
    total = candidates.anatomy.total_parameters
    proposals = []
    for factor in CURVE:
        parameters = int(factor * run.budget.parameters)
        if parameters < total:
            with suppress(BudgetError):  # no plan is that small: there is nothing to show
                proposals.append(candidates.propose(Budget(f"{100 * parameters / total:.0f}%", parameters)))
    return proposals


def _chosen(run: _Run, fits: Fits, proposals: list[Proposal], curve: list[Proposal], texts: Splits) -> _Choice:
    """Run every plan end to end, and take the one of least divergence among those for the budget."""
    best, student = 0, run.loaded.model
    scores: list[Comparison] = []
    plans = [proposal.plan for proposal in proposals + curve]
    for plan_student, score in students(fits, plans, texts.rescoring, run.objective):
        number = len(scores)
        if number < len(proposals) and (not scores or score.divergence.mean < scores[best].divergence.mean):
            best, student = number, plan_student
        scores.append(score)
    scored = [replace(one, score=score.divergence.mean) for one, score in zip(proposals + curve, scores, strict=True)]
    _log.info("plan %d of %d has the least divergence: %.4g nats", best + 1, len(proposals), scored[best].score)
    return _Choice(scored, scores, best, student)


def _boundaries(candidates: Draft, choice: _Choice) -> dict[str, Any]:
    """Probabilities of group boundaries, at a temperature fitted to the plans that were run; empty if it cannot be fitted."""
    search = candidates.searches[-1 if choice.plan.alignment else 0]
    predicted = [plan.damage for plan in choice.plans]
    measured = [proposal.score for proposal in choice.proposals if proposal.score is not None]  # all were run
    temperature = fitted_temperature(predicted, measured, len(search.tracks))
    multiplier = choice.proposals[choice.best].multiplier
    if temperature is None or not multiplier or choice.plan.layers:
        return {}
    return boundary_probabilities(search.tracks, multiplier, temperature)


def _refitted(run: _Run, fits: Fits, measured: Profile, choice: _Choice, texts: Splits) -> bool:
    """Refit the student in place if the user asks for it, or if it measures better on the user's own re-scoring text."""
    wanted = run.options.refit
    if wanted is False or (wanted is None and (not texts.own or choice.plan.layers)):
        return False
    student, teacher = choice.student, run.loaded.model
    before = {} if wanted else {name: tensor.clone() for name, tensor in student.state_dict().items()}
    refit(student, teacher, choice.plan, measured, first_batches(texts.calibration, REFITTED), fits=fits)
    if wanted:
        return True
    after = divergence(student, teacher, texts.rescoring, run.objective).mean
    if after < choice.score.divergence.mean:
        return True
    _log.info("the refit is taken back: divergence %.4g nats after %.4g", after, choice.score.divergence.mean)
    student.load_state_dict(before)
    return False


def _healed(run: _Run, student: nn.Module, texts: Splits, recipe: Recipe) -> Healing:
    """Train the student to imitate the original, on all of the data that was read."""
    from hpr.healing.heal import heal

    return heal(student, run.loaded, texts, recipe)


def _rounded(run: _Run, fits: Fits, choice: _Choice, texts: Splits) -> CodedPlan:
    """The chosen student with what it stores rounded and coded; dampings are chosen on the data that chose the plan."""
    assert run.file_limit is not None

    def measure(student: nn.Module) -> float:
        return divergence(student, run.loaded.model, texts.rescoring, run.objective).mean

    profile = aligned_profile(fits, choice.plan)
    return round_shared(choice.student, choice.plan, profile, run.file_limit, measure, run.options.bits)


def _routes(run: _Run, student: nn.Module, texts: Splits) -> dict[str, Any]:
    """Which kinds of input take which route."""
    from hpr.routing.usage import routes_taken

    return routes_taken(student, texts.parts, run.loaded.tokenizer)
