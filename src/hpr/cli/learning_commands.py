"""The commands that train: ``heal`` on data that is there, ``online`` on a stream. Heavy imports stay inside them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpr.cli.console import bars, err, lines, quiet, show
from hpr.cli.options import Column, Data, Device, Folder, Json, Label, Seed, Teacher, mixture, with_columns
from hpr.errors import HprError

if TYPE_CHECKING:
    from hpr.data.loaded_model import LoadedModel
    from hpr.data.splits import Splits
    from hpr.healing.online.healer import OnlineHealer

_STREAM = "stream.jsonl"


def heal(
    folder: Folder,
    teacher: Teacher = None,
    data: Data = None,
    column: Column = None,
    label: Label = None,
    duration: Annotated[str, typer.Option("--for", metavar="DURATION", help="500steps, 90s, 10min or 2h.")] = "300steps",
    learning_rate: Annotated[
        float, typer.Option(min=0, metavar="RATE", help="The peak learning rate, relative to the scale of each factor.")
    ] = 4e-4,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="PATH", help="Where to write; in place if left out.")
    ] = None,
    checkpoints: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Keep checkpoints here; the same command continues from the last. None if left out."),
    ] = None,
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train a smaller model to imitate its original (distillation). Only better weights replace the present ones."""
    quiet()
    from hpr.cli import tables
    from hpr.data.splits import prepare
    from hpr.healing.heal import heal as healed
    from hpr.healing.recipe import Recipe
    from hpr.healing.resume import check_place

    target = output or folder
    recipe = Recipe(duration=duration, checkpoints=checkpoints, learning_rate=learning_rate, seed=seed)
    if checkpoints is not None:
        check_place(checkpoints, target)
    student, original = _opened(folder, teacher, target, device)
    splits = prepare(mixture(data, column, label), original)
    with bars():
        healing = healed(student.model, original, splits, recipe)
    metrics = _written(folder, target, student, original, splits, {"healing": healing.as_metrics()})
    show(metrics, as_json, lines(tables.healing_line(metrics["healing"]), f"written: {target}"))


def online(
    folder: Folder,
    validation: Annotated[
        Path, typer.Option(metavar="FILE", help="Text that is never learnt from, and on which the model must not get worse.")
    ],
    state: Annotated[Path, typer.Option(metavar="PATH", help="Where to keep the state; the same command continues from it.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="PATH", help="Where to write the model at the end.")],
    teacher: Teacher = None,
    data: Annotated[Path | None, typer.Option(metavar="FILE", help="JSON lines; standard input if left out.")] = None,
    column: Column = None,
    label: Label = None,
    labels: Annotated[bool, typer.Option("--labels", help="Learn from the label of each line, not from the original.")] = False,
    learning_rate: Annotated[
        float, typer.Option(min=0, metavar="RATE", help="The learning rate, relative to the scale of each factor.")
    ] = 1e-4,
    batch: Annotated[int, typer.Option(min=1, max=65536, metavar="N", help="Lines in a batch.")] = 16,
    every: Annotated[int, typer.Option(min=1, metavar="N", help="Batches between two checks on the validation text.")] = 8,
    replay: Annotated[int, typer.Option(min=0, metavar="N", help="Past batches that are kept and learnt from again.")] = 64,
    tolerance: Annotated[
        float, typer.Option(min=0, metavar="SHARE", help="How far the validation loss may rise above its best.")
    ] = 0.01,
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Keep training on a stream of JSON lines with a "text". Steps that raise the validation loss are undone.

    The same command continues after a crash at any point.
    """
    quiet()
    from hpr.data.splits import prepare
    from hpr.healing.loss import Weights
    from hpr.healing.online.healer import OnlineHealer
    from hpr.healing.online.options import OnlineOptions
    from hpr.healing.resume import check_place
    from hpr.runtime.files import resolved

    if resolved(output) == resolved(folder):
        raise HprError(f"{folder} is the model that learning starts from: write the result to another folder")
    check_place(state, output)
    _check_stream(data)
    known, stream = with_columns([str(validation), _STREAM], column, label)  # the stream is JSON lines, whatever its name
    fields = (str(stream.column or "text"), str(stream.label or "label"))
    weights = Weights(outputs=0.0, labels=1.0) if labels else None
    student, original = _opened(folder, teacher, output, device)
    options = OnlineOptions(learning_rate, replay, every, tolerance, seed, weights, original.objective)
    splits = prepare({"validation": known}, original, labels=labels)
    with err.status("reading the state"):
        healer = OnlineHealer.open(state, student.model, splits.rescoring, None if labels else original.model, options)
    counts = _learn(healer, original, state, data, batch, fields)
    value = healer.settle()
    result = {"batches": healer.step, **counts, "validation": value, "validation_at_start": healer.start, "labels": labels}
    metrics = _written(folder, output, student, original, splits, {"online": result})
    counted = f"{healer.step} batches, {counts['refused']} refused, {counts['undone']} times undone"
    text = f"{counted}: validation loss {healer.start:.4g} → {value:.4g}"
    show(metrics, as_json, lines(text, f"written: {output}"))


def _learn(
    healer: OnlineHealer, original: LoadedModel, state: Path, data: Path | None, size: int, fields: tuple[str, str]
) -> dict[str, Any]:
    """Learn from the lines of a file or of standard input, ``size`` at a time. Return the counts of what happened."""
    from hpr.healing.online.stream import Log, chunks

    log, labels = Log(state, healer.step, size), healer.teacher is None
    refused, undone, drifts = 0, 0, []
    after = log.line if data is not None else 0  # lines of a pipe are all new
    for chunk in chunks(_incoming(data), original, size, labels, after, fields):
        for fault in chunk.faults:
            err.print(lines(f"left out: {fault}"))
        update = healer.update(chunk.batch)
        log.add(update, chunk.line)
        refused, undone = refused + (update.refused is not None), undone + update.rolled_back
        if update.refused:
            err.print(lines(f"batch {update.step} is refused: {update.refused}"))
        if update.drift:
            drifts.append(update.step)
            err.print(lines(f"batch {update.step}: the stream has become harder than before"))
        if update.validation is not None:
            end = ", worse, so undone" if update.rolled_back else ""
            value = f"validation loss {update.validation:.4g}, {healer.start:.4g} at the start"
            err.print(lines(f"batch {update.step}: {value}{end}"))
    return {"refused": refused, "undone": undone, "drift": drifts}


def _opened(folder: Path, teacher: str | None, target: Path, device: str | None) -> tuple[LoadedModel, LoadedModel]:
    """Open a smaller model and its original. Raises ``HprError`` at once if the result could not be written later."""
    from hpr.checkpoints import save
    from hpr.checkpoints.open import open_model
    from hpr.nn.bank import recorded_objective
    from hpr.pipeline.record import check_original
    from hpr.plans.plan import Plan

    save.check_folder(target)
    Plan.load(folder / "plan.json")  # raises now, not after minutes of training
    student = open_model(folder, device)
    original = open_model(teacher, device, objective=recorded_objective(student.model))
    check_original(folder, original)
    save.check_output(student.model, target, original.tokenizer, original.folder)
    return student, original


def _written(
    folder: Path,
    target: Path,
    student: LoadedModel,
    original: LoadedModel,
    splits: Splits,
    done: Mapping[str, Any],
) -> dict[str, Any]:
    """Measure a student on held-out data, write it with its plan and metrics, and return the metrics."""
    from hpr.evaluation import evaluate
    from hpr.pipeline import record
    from hpr.pipeline.record import with_figures
    from hpr.plans.plan import Plan
    from hpr.profiling.objectives import objective_for
    from hpr.routing.usage import routes_taken

    goal = objective_for(original.model, original.objective)
    with err.status("evaluating"):
        figures = evaluate.evaluate(student.model, original.model, splits.heldout, goal)
    figures = evaluate.measured_on(figures, f"{splits.source}, held out")
    metrics = {
        **with_figures(folder, original, figures),
        **done,
        **routes_taken(student.model, splits.parts, original.tokenizer),
    }
    record.write(student.model, target, Plan.load(folder / "plan.json"), metrics, original)
    return metrics | {"output": str(target)}


def _check_stream(data: Path | None) -> None:
    """Raise ``HprError`` for a stream that cannot be read to its end. A pipe can."""
    if data is None:
        return
    if not data.exists():
        raise HprError(f"no file at {data}: check the path of --data, or leave it out to read standard input")
    if data.is_dir() or data.is_char_device() or data.is_block_device():
        raise HprError(f"--data {data} is a folder or a device, not a file: give a file of JSON lines")


def _incoming(data: Path | None) -> Iterator[str]:
    try:
        if data is None:
            yield from sys.stdin
            return
        with data.open(encoding="utf-8-sig") as file:
            yield from file
    except UnicodeDecodeError as error:
        name = data or "standard input"
        raise HprError(f"{name} is not {error.encoding.upper()} at byte {error.start}: convert it to UTF-8") from error
