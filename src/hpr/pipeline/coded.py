"""Compress to a number of bytes: profile, round with the step size that fits, choose the damping by measurement, write."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from hpr.anatomy.describe import describe
from hpr.checkpoints.save import check_output
from hpr.coding.tables import ans
from hpr.data.loaded_model import LoadedModel
from hpr.data.splits import Splits, prepare
from hpr.errors import BudgetError
from hpr.evaluation.cost import disk_bytes
from hpr.evaluation.divergence import compare, divergence
from hpr.evaluation.evaluate import evaluate, measured_on
from hpr.nn.coded import codes_of
from hpr.pipeline.compression import Compression, timed
from hpr.pipeline.record import plan_rows, record, write
from hpr.planning.options import DEFAULTS, PlanOptions
from hpr.profiling.objectives import objective_for
from hpr.profiling.profile import Profile
from hpr.profiling.run import profile
from hpr.rounding.least import check_bytes
from hpr.rounding.plan import CodedPlan, plan_bytes
from hpr.rounding.shared import stored_bits
from hpr.sharing.share import check_unshared

if TYPE_CHECKING:  # the Trainer is imported only if something is healed
    from hpr.healing.recipe import Recipe
    from hpr.healing.train import Healing

_SHARING = (
    "only",
    "operators",
    "align",
    "refit",
    "reuse",
    "routers",
    "curve",
    "bytes",
    "latency",
    "flops",
)  # options of plans that share


def check_options(options: PlanOptions, budget: str) -> None:
    """Raise ``BudgetError`` for options that a budget in bytes does not have: it rounds every weight, and shares none."""
    for name in _SHARING:
        if getattr(options, name) != getattr(DEFAULTS, name):
            raise BudgetError(
                f"{name} is {getattr(options, name)!r}, but a budget in bytes ({budget}) rounds all weights and shares none: "
                f"leave {name} out, or give a budget in parameters, such as 50%"
            )


def compress_to_bytes(
    loaded: LoadedModel,
    budget: tuple[str, int],
    data: Any,
    output: str | Path | None,
    options: PlanOptions,
    recipe: Recipe | None = None,
) -> Compression:
    """Compress a model to a file of at most so many bytes; ``budget``: the user's words and the bytes.

    With a ``recipe`` the codes are trained as well, within the same bytes.

    Raises ``HprError``, before anything is measured or written, if an input does not fit.
    """
    check_options(options, budget[0])
    if recipe is not None:
        from hpr.healing.coded.heal import check_recipe

        check_recipe(loaded.model, recipe)
    ans()  # raises if the coder is not installed
    check_unshared(loaded.model)
    check_bytes(loaded.model, *budget)
    if output is not None:
        check_output(loaded.model, output, loaded.tokenizer, loaded.folder, budget[1])
    seconds: dict[str, float] = {}

    goal = objective_for(loaded.model, loaded.objective)
    with timed(seconds, "data"):
        texts = prepare(data, loaded, options.examples)
        texts.check(loaded)
    with timed(seconds, "profile"):
        measured = profile(loaded.model, texts.calibration, goal.name, options.seed, structure=False)
    with timed(seconds, "round"):

        def measure(student: nn.Module) -> float:
            return divergence(student, loaded.model, texts.rescoring, goal).mean

        made = plan_bytes(loaded.model, measured, *budget, measure, options.bits)
        score = compare(made.student, loaded.model, texts.rescoring, goal)
    healing = None
    if recipe is not None:
        with timed(seconds, "heal"):
            made, healing = healed(made, budget[1], loaded, measured, texts, recipe)
    with timed(seconds, "evaluate"):
        figures = measured_on(evaluate(made.student, loaded.model, texts.heldout, goal), f"{texts.source}, held out")
    metrics = record(loaded, made.plan, measured, texts, figures) | {
        "seed": options.seed,
        "timing": seconds,
        "plans": plan_rows([made.plan], [score], 0, describe(loaded.model)),
        "plan_quality": score.likeness[0],
        "refit": False,
        "operator_gains": [],
        **rounding_record(made),
    }
    if healing is not None:
        metrics["healing"] = healing.as_metrics()
    folder = None if output is None else write(made.student, output, made.plan, metrics, loaded)
    return Compression(made.student, made.plan, metrics, folder)


def rounding_record(made: CodedPlan) -> dict[str, Any]:
    """The part of metrics.json that says how the numbers were rounded."""
    return {
        "rounding": {
            "step": made.plan.rounding.step if made.plan.rounding else None,
            "damage": made.plan.diagnostics.get("rounding_damage", made.plan.damage),
            "decibels": made.plan.diagnostics.get("decibels"),
        },
        "dampings": [{"output": left, "input": right, "measured": value} for (left, right), value in made.tried.items()],
    }


def healed(
    made: CodedPlan, limit: int, loaded: LoadedModel, measured: Profile, texts: Splits, recipe: Recipe
) -> tuple[CodedPlan, Healing]:
    """The same with trained codes. The plan says how the codes began, and how many bytes they have now."""
    from hpr.healing.coded.budget import ByteBudget
    from hpr.healing.coded.heal import heal_codes

    assert made.plan.rounding is not None
    healing = heal_codes(made.student, loaded, texts, recipe, ByteBudget(limit, made.plan.rounding, measured.others))
    size, coded = disk_bytes(made.student), codes_of(made.student)
    bits = (
        stored_bits(made.plan, coded)
        if made.plan.rounding.factors
        else {site: round(8 * len(one.stream) / one.codes().numbers, 3) for site, one in coded.items()}
    )
    diagnostics = {**made.plan.diagnostics, "bytes": size, "bits": bits}
    return replace(made, plan=replace(made.plan, diagnostics=diagnostics), bytes=size), healing
