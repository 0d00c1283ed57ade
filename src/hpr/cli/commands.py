"""The commands that profile, plan, measure and report, and the one that does it all. Heavy imports stay inside them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hpr.cli.console import bars, err, lines, quiet, show
from hpr.cli.options import (
    Align,
    Bits,
    Budget,
    Bytes,
    Column,
    Data,
    Device,
    Examples,
    Flops,
    Folder,
    Goal,
    Json,
    Label,
    Latency,
    Model,
    Only,
    Operators,
    Output,
    Seed,
    Shape,
    Teacher,
    mixture,
    operator_names,
)


def inspect(model: Model = None, as_json: Json = False) -> None:
    """Show what is in a model: stacks, layers, sites, ties, and what profiling it would take."""
    quiet()
    from hpr.checkpoints.open import open_model
    from hpr.cli import tables
    from hpr.cli.describing import anatomy_of
    from hpr.reporting import formatting

    anatomy = anatomy_of(open_model(model))
    notes = [line for stack in anatomy["stacks"] for line in tables.stack_lines(stack)]
    notes += [f"tied: {' = '.join([tie['site'], *tie['aliases']])}" for tie in anatomy["ties"]]
    notes += [f"cannot be shared: {reason}" for reason in anatomy["not_swappable"].values()]
    notes += [f"no site: {tables.uncovered_line(row)}" for row in anatomy["uncovered"]]
    memory = formatting.byte_count(anatomy["profile_bytes"])
    notes += [f"objective: {anatomy['objective']}", f"a profile needs {memory} of memory"]
    show(anatomy, as_json, tables.parts_table(anatomy), lines(*notes))


def profile(
    model: Model = None,
    output: Output = Path("profile.safetensors"),
    data: Data = None,
    column: Column = None,
    label: Label = None,
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
    from hpr.profiling.profile import is_profile
    from hpr.profiling.run import profile as profile_batches
    from hpr.runtime.files import check_file

    check_file(output, "a profile", is_profile)
    loaded = open_model(model, device, objective=objective)
    batches, _ = open_data(mixture(data, column, label), loaded, "calibration", examples)
    with bars():
        measured = profile_batches(loaded.model, batches, loaded.objective, seed)
    measured.save(output)
    layers = {name: vars(features) for name, features in measured.layers.items()}
    result = {"output": str(output), "about": dict(measured.about), "layers": layers}
    show(result, as_json, tables.layers_table(layers), lines(*tables.profile_lines(measured.about), f"written: {output}"))


def plan(
    model: Model = None,
    profile: Annotated[Path, typer.Option(metavar="FILE", help="What `hpr profile` wrote.")] = Path("profile.safetensors"),
    budget: Budget = "50%",
    only: Only = None,
    operators: Operators = None,
    align: Align = None,
    bits: Bits = None,
    file_bytes: Bytes = None,
    latency: Latency = None,
    flops: Flops = None,
    shape: Shape = "1x128",
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
    from hpr.evaluation.cost import disk_bytes
    from hpr.pipeline.steps import plan as plan_module
    from hpr.planning import planner
    from hpr.planning.options import PlanOptions
    from hpr.plans.budget import byte_limit, parse_budget
    from hpr.plans.plan import is_plan
    from hpr.profiling.profile import Profile
    from hpr.reporting.formatting import speed_lines
    from hpr.runtime.files import check_file

    check_file(output, "a plan", is_plan)
    measured = Profile.load(profile)
    loaded = open_model(model, device)
    options = PlanOptions(
        *(only, operator_names(operators), align), bits=bits, bytes=file_bytes, latency=latency, flops=flops, shape=shape
    )
    size = disk_bytes(loaded.model)
    if byte_limit(budget, size) is not None or options.file_limit(budget, size) is not None:
        with bars():
            rounded = plan_module(loaded, measured, budget, options)
        rounded.save(output)
        as_dict = rounded.to_dict()
        keys = ("model", "budget", "rounding", "predicted_damage", "diagnostics")
        result = {"output": str(output)} | {key: as_dict[key] for key in keys}
        show(result, as_json, tables.plan_table(as_dict), lines(tables.rounding_line(as_dict), f"written: {output}"))
        return
    bytes_each = bytes_per_parameter(loaded.model)
    limit = parse_budget(budget, describe(loaded.model), bytes_each, only)  # a wrong budget is refused before the curves
    with bars():
        draft = planner.draft(loaded.model, measured, options)
    best = draft.best(limit)
    best.save(output)
    as_dict, used = best.to_dict(), best.parameters(draft.anatomy)
    result = {"output": str(output), "parameters": used} | {
        key: as_dict[key] for key in ("model", "budget", "predicted_damage", "diagnostics")
    }
    gain = [tables.alignment_line(best.damage, draft.plain.best(limit).damage)] if best.alignment else []
    speed = speed_lines(as_dict["diagnostics"])
    notes = lines(tables.solver_line(as_dict, used), *speed, *gain, f"written: {output}")
    show(result, as_json, tables.plan_table(as_dict), tables.operators_table(as_dict), notes)


def evaluate(
    folder: Folder,
    teacher: Teacher = None,
    data: Data = None,
    column: Column = None,
    label: Label = None,
    objective: Goal = None,
    examples: Examples = 1024,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Compare a compressed model with its original, and add the figures to its metrics.json."""
    quiet()
    from hpr.checkpoints.open import open_model
    from hpr.cli import tables
    from hpr.data.splits import open_data
    from hpr.evaluation.evaluate import evaluate as evaluate_batches
    from hpr.evaluation.evaluate import measured_on
    from hpr.nn.bank import recorded_objective
    from hpr.pipeline.record import check_original, note_metrics

    student = open_model(folder, device)
    original = open_model(teacher, device, objective=recorded_objective(student.model) if objective is None else objective)
    check_original(folder, original)
    batches, source = open_data(mixture(data, column, label), original, "heldout", examples)
    with err.status("evaluating"):
        metrics = measured_on(evaluate_batches(student.model, original.model, batches, original.goal), source)
    note_metrics(folder, original, metrics)
    show(metrics, as_json, *tables.before_after({}, metrics))


def report(folder: Folder, as_json: Json = False) -> None:
    """Write report.html again from plan.json and metrics.json."""
    from hpr.pipeline.record import write_report

    path = write_report(folder)
    show({"report": str(path)}, as_json, lines(f"written: {path}"))


def compress(
    model: Model = None,
    budget: Budget = "50%",
    output: Output = Path("out/compressed"),
    data: Data = None,
    column: Column = None,
    label: Label = None,
    only: Only = None,
    operators: Operators = None,
    objective: Goal = None,
    examples: Examples = 4096,
    plans: Annotated[int, typer.Option(min=1, metavar="N", help="Plans to run end to end; the best one is taken.")] = 4,
    refit: Annotated[
        bool | None,
        typer.Option("--refit/--no-refit", help="Fit again to what the smaller layers emit; by default if it measures better."),
    ] = None,
    align: Align = None,
    heal: Annotated[
        str | None,
        typer.Option(
            metavar="AMOUNT", help="Then train the result to imitate its original, within the same budget: 500steps, 10min."
        ),
    ] = None,
    curve: Annotated[
        bool, typer.Option("--curve", help="Also measure plans of other budgets, for the report's figure of quality by size.")
    ] = False,
    reuse: Annotated[
        bool, typer.Option("--reuse", help="Also try to drop layers, or let them reuse attention of the layer below.")
    ] = False,
    routers: Annotated[
        int,
        typer.Option(min=0, metavar="N", help="Experimental: weights follow the input, with N experts per router."),
    ] = 0,
    bits: Bits = None,
    file_bytes: Bytes = None,
    latency: Latency = None,
    flops: Flops = None,
    shape: Shape = "1x128",
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """All steps at once: profile, plan, share, choose by measurement, evaluate, report."""
    quiet()
    from hpr.checkpoints.open import open_model
    from hpr.cli import tables
    from hpr.pipeline.compress import compress as compress_model
    from hpr.planning.options import PlanOptions
    from hpr.reporting.formatting import speed_lines

    names = operator_names(operators)
    options = PlanOptions(
        *(only, names, align),
        plans=plans,
        refit=refit,
        reuse=reuse,
        routers=routers,
        curve=curve,
        examples=examples,
        seed=seed,
        bits=bits,
        bytes=file_bytes,
        latency=latency,
        flops=flops,
        shape=shape,
    )
    loaded = open_model(model, device, objective=objective)
    with bars():
        made = compress_model(loaded, budget, mixture(data, column, label), output, options, heal)
    as_dict = made.plan.to_dict()
    where = lines(f"model:  {output}", f"report: {output / 'report.html'}")
    notes = [lines(tables.healing_line(made.metrics["healing"]))] if heal else []
    notes += [lines(*speed_lines(made.metrics.get("speed", {})))] if options.target else []
    show(made.metrics | {"output": str(output)}, as_json, *tables.before_after(as_dict, made.metrics), *notes, where)
