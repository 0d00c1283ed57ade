"""The verbs that profile, plan, share, measure and report, and the one that does it all. Heavy imports stay inside them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from hpr.cli.console import bars, err, lines, quiet, show
from hpr.cli.options import (
    Align,
    Budget,
    Data,
    Device,
    Examples,
    Folder,
    Goal,
    Json,
    Model,
    Only,
    Operators,
    Output,
    Seed,
    Teacher,
    operator_names,
    sources,
)


def inspect(model: Model = None, as_json: Json = False) -> None:
    """Show what is in a model: stacks, layers, sites, ties, and what profiling it would take."""
    quiet()
    from hpr.checkpoints.open import open_model
    from hpr.cli import tables
    from hpr.cli.describing import anatomy_of
    from hpr.reporting import formatting

    opened = open_model(model)
    found = anatomy_of(opened)
    notes = [line for stack in found["stacks"] for line in tables.stack_lines(stack)]
    notes += [f"tied: {' = '.join([tie['site'], *tie['aliases']])}" for tie in found["ties"]]
    notes += [f"cannot be shared: {reason}" for reason in found["not_swappable"].values()]
    notes += [f"no site: {tables.uncovered_line(row)}" for row in found["uncovered"]]
    notes += [f"objective: {found['objective']}", f"a profile needs {formatting.byte_count(found['profile_bytes'])} of memory"]
    show(found, as_json, tables.parts_table(found), lines(*notes))


def profile(
    model: Model = None,
    output: Output = Path("profile.safetensors"),
    data: Data = None,
    objective: Goal = None,
    examples: Examples = 4096,
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Measure every site and layer of a model on unlabelled text."""
    quiet()
    from hpr.checkpoints.open import open_model
    from hpr.cli import tables
    from hpr.data.splits import open_data
    from hpr.profiling import run

    opened = open_model(model, device)
    files, shares = sources(data)
    batches, _ = open_data(files, opened, "calibration", examples, shares=shares)
    with bars():
        found = run.profile(opened.model, batches, objective or opened.objective, seed)
    found.save(output)
    layers = {name: vars(features) for name, features in found.layers.items()}
    result = {"output": str(output), "about": dict(found.about), "layers": layers}
    show(result, as_json, tables.layers_table(layers), lines(*tables.profile_lines(found.about), f"written: {output}"))


def plan(
    model: Model = None,
    profile: Annotated[Path, typer.Option(metavar="FILE", help="What `hpr profile` wrote.")] = Path("profile.safetensors"),
    budget: Budget = "50%",
    only: Only = None,
    operators: Operators = None,
    align: Align = None,
    output: Output = Path("plan.json"),
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Decide which sites share what, at which rank, under a budget."""
    quiet()
    from hpr.anatomy.describe import describe
    from hpr.anatomy.lookup import bytes_per_parameter
    from hpr.checkpoints.open import open_model
    from hpr.cli import tables
    from hpr.planning import planner
    from hpr.planning.options import PlanOptions
    from hpr.plans.budget import parse_budget
    from hpr.profiling.profile import Profile

    found = Profile.load(profile)
    opened = open_model(model, device)
    bytes_each = bytes_per_parameter(opened.model)
    limit = parse_budget(budget, describe(opened.model), bytes_each, only)  # before minutes are spent on curves
    with bars():
        sketch = planner.draft(opened.model, found, PlanOptions(only=only, operators=operator_names(operators), align=align))
    best = sketch.best(limit)
    best.save(output)
    as_dict, used = best.to_dict(), best.parameters(sketch.anatomy)
    result = {"output": str(output), "parameters": used} | {
        key: as_dict[key] for key in ("model", "budget", "predicted_damage", "diagnostics")
    }
    gain = [tables.alignment_line(best.damage, sketch.plain.best(limit).damage)] if best.alignment else []
    notes = lines(tables.solver_line(as_dict, used), *gain, f"written: {output}")
    show(result, as_json, tables.plan_table(as_dict), tables.operators_table(as_dict), notes)


def share(
    model: Model = None,
    plan: Annotated[Path, typer.Option(metavar="FILE", help="What `hpr plan` wrote, edited or not.")] = Path("plan.json"),
    profile: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Fit in the metric of this profile; else plain least squares.")
    ] = None,
    output: Output = Path("out/compressed"),
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Carry out a plan: write the smaller model, which transformers loads after `import hpr`."""
    quiet()
    from hpr.checkpoints import save
    from hpr.checkpoints.open import open_model
    from hpr.evaluation import cost
    from hpr.nn import bank
    from hpr.plans.plan import Plan
    from hpr.profiling.profile import Profile
    from hpr.reporting import formatting
    from hpr.sharing import share as sharing

    save.check_folder(output)
    wanted = Plan.load(plan)
    known = Profile.load(profile) if profile else None
    opened = open_model(model, device)
    student = sharing.share(opened.model, wanted, known)
    files = {"plan.json": plan.read_text(encoding="utf-8")}
    folder = save.save(student, output, opened.tokenizer, files, opened.folder)
    counted = {"parameters": bank.parameters(student), "bytes": cost.file_bytes(folder)}
    text = f"{formatting.exact(counted['parameters'])} parameters, {formatting.byte_count(counted['bytes'])} on disk"
    show({"output": str(folder), **counted}, as_json, lines(text, f"written: {output}"))


def evaluate(
    folder: Folder,
    teacher: Teacher = None,
    data: Data = None,
    objective: Goal = None,
    examples: Examples = 1024,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Compare a smaller model with its original, and note the figures in its metrics.json."""
    quiet()
    from hpr.checkpoints.open import open_model
    from hpr.cli import tables
    from hpr.data.splits import open_data
    from hpr.evaluation import evaluate as evaluation
    from hpr.pipeline.record import check_original, note_metrics
    from hpr.profiling.objectives import objective_for

    student, original = open_model(folder, device), open_model(teacher, device)
    check_original(folder, original)
    files, shares = sources(data)
    batches, label = open_data(files, original, "heldout", examples, shares=shares)
    goal = objective_for(original.model, objective or original.objective)
    with err.status("evaluating"):
        metrics = evaluation.evaluate(student.model, original.model, batches, goal, data=label)
    note_metrics(folder, original, metrics)
    show(metrics, as_json, *tables.before_after({}, metrics))


def report(folder: Folder, as_json: Json = False) -> None:
    """Write report.html anew from plan.json and metrics.json."""
    from hpr.pipeline.record import write_report

    path = write_report(folder)
    show({"report": str(path)}, as_json, lines(f"written: {path}"))


def compress(
    model: Model = None,
    budget: Budget = "50%",
    output: Output = Path("out/compressed"),
    data: Data = None,
    only: Only = None,
    operators: Operators = None,
    objective: Goal = None,
    examples: Examples = 4096,
    plans: Annotated[int, typer.Option(min=1, metavar="N", help="Plans to re-score end to end; the best one is taken.")] = 4,
    refit: Annotated[
        bool | None,
        typer.Option("--refit/--no-refit", help="Refit to what the smaller layers emit; by default where it measures better."),
    ] = None,
    align: Align = None,
    heal: Annotated[
        str | None, typer.Option(metavar="AMOUNT", help="Train afterwards to do what the original does: 500steps, 10min.")
    ] = None,
    reuse: Annotated[
        bool, typer.Option("--reuse", help="Also try to drop layers, or let them reuse attention of the layer below.")
    ] = False,
    routers: Annotated[
        int,
        typer.Option(min=0, metavar="N", help="Let weights follow the input: N experts to a router. It is not known to pay."),
    ] = 0,
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """All steps at once: profile, plan, share, choose by measurement, evaluate, report."""
    quiet()
    from hpr.cli import tables
    from hpr.pipeline import compress as compression

    names = operator_names(operators)
    wish: bool | Literal["auto"] = "auto" if refit is None else refit
    files, shares = sources(data)
    with bars():
        made = compression.compress(
            model,
            budget,
            output,
            files,
            only,
            names,
            objective,
            examples,
            plans,
            wish,
            seed,
            align="auto" if align is None else align,
            reuse=reuse,
            heal=heal,
            shares=shares,
            device=device,
            routers=routers,
        )
    as_dict = made.plan.to_dict()
    where = lines(f"model:  {output}", f"report: {output / 'report.html'}")
    healed = [lines(tables.healing_line(made.metrics["healing"]))] if heal else []
    show(made.metrics | {"output": str(output)}, as_json, *tables.before_after(as_dict, made.metrics), *healed, where)
