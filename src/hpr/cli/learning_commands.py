"""The verbs that train: on data at hand, and on a stream. Heavy imports stay inside them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpr.cli.console import bars, err, lines, quiet, show
from hpr.cli.options import Data, Device, Folder, Json, Seed, Teacher, sources
from hpr.errors import HprError

if TYPE_CHECKING:
    from hpr.data.loaded_model import LoadedModel
    from hpr.data.splits import Splits


def heal(
    folder: Folder,
    teacher: Teacher = None,
    data: Data = None,
    how_long: Annotated[str, typer.Option("--for", metavar="AMOUNT", help="500steps, 90s, 10min or 2h.")] = "300steps",
    rate: Annotated[
        float, typer.Option(min=0, metavar="RATE", help="The peak learning rate, relative to each factor's own scale.")
    ] = 4e-4,
    blocks: Annotated[
        float,
        typer.Option(min=0, max=1, metavar="SHARE", help="Of the steps: first each layer by itself."),
    ] = 0.0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="PATH", help="Where to write; in place if left out.")
    ] = None,
    checkpoints: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Keep checkpoints here; the same command goes on from the last. None if left out."),
    ] = None,
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train a smaller model until it does again what its original does; its weights are only replaced by better ones."""
    quiet()
    from hpr.cli import tables
    from hpr.data.splits import split_sources
    from hpr.healing.heal import HEALED
    from hpr.healing.heal import heal as healed
    from hpr.healing.recipe import Recipe

    target = output or folder
    student, original = _opened(folder, teacher, target, device)
    files, shares = sources(data)
    splits = split_sources(files, original, HEALED, shares=shares)
    with bars():
        found = healed(
            student.model,
            original,
            splits,
            how_long,
            shares=shares,
            recipe=Recipe(rate=rate, seed=seed, blocks=blocks),
            folder=checkpoints,
            watch=lambda row: err.print(tables.check_line(row)),
        )
    done = {"healing": found.as_metrics()}
    metrics = _written(folder, target, student, original, splits, done)
    show(metrics, as_json, lines(tables.healing_line(metrics["healing"]), f"written: {target}"))


def online(
    folder: Folder,
    guard: Annotated[Path, typer.Option(metavar="FILE", help="Text, never learnt from, that must not become worse.")],
    state: Annotated[Path, typer.Option(metavar="PATH", help="Where it is kept how far it got; the same command goes on.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="PATH", help="Where to write the model at the end.")],
    teacher: Teacher = None,
    data: Annotated[Path | None, typer.Option(metavar="FILE", help="JSON lines; standard input if left out.")] = None,
    labels: Annotated[bool, typer.Option("--labels", help="Learn from the label of each line, not from the teacher.")] = False,
    rate: Annotated[float, typer.Option(min=0, metavar="RATE", help="Of learning, relative to each factor's scale.")] = 1e-4,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Lines that are learnt from at a time.")] = 16,
    every: Annotated[int, typer.Option(min=1, metavar="N", help="Batches between two looks at the guard.")] = 8,
    replay: Annotated[int, typer.Option(min=0, metavar="N", help="Past batches that are kept and shown again.")] = 64,
    tolerance: Annotated[float, typer.Option(min=0, metavar="SHARE", help="How much worse the guard may become.")] = 0.01,
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Learn on from a stream of JSON lines with a "text"; what hurts the guard is undone, and nothing is lost in a crash."""
    quiet()
    from hpr.data.splits import open_splits
    from hpr.healing.loss import Weights
    from hpr.healing.online.healer import OnlineHealer
    from hpr.healing.online.stream import Log, chunks

    if output.resolve() == folder.resolve():
        raise HprError(f"{folder} is where learning starts: write what comes of it to another folder")
    student, original = _opened(folder, teacher, output, device)
    known = open_splits(guard, original, labels=labels)
    with err.status("taking up the state"):
        healer = OnlineHealer(
            student.model,
            known.rescoring,
            None if labels else original.model,
            weights=Weights(outputs=0.0, labels=1.0) if labels else None,
            objective=original.objective,
            rate=rate,
            replay=replay,
            every=every,
            tolerance=tolerance,
            seed=seed,
            folder=state,
        )
    log = Log(state, healer.step, batch)
    refused, undone, drifts = 0, 0, []
    after = log.line if data is not None else 0  # what comes through a pipe has not been seen
    for chunk in chunks(_incoming(data), original, batch, labels, after):
        for fault in chunk.faults:
            err.print(lines(f"left out: {fault}"))
        update = healer.update(chunk.batch)
        log.add(update, chunk.line)
        refused, undone = refused + (update.refused is not None), undone + update.rolled_back
        if update.refused:
            err.print(lines(f"batch {update.step} is refused: {update.refused}"))
        if update.drift:
            drifts.append(update.step)
            err.print(lines(f"batch {update.step}: what comes in has become harder than what came before"))
        if update.guard is not None:
            end = ", worse, so undone" if update.rolled_back else ""
            err.print(lines(f"batch {update.step}: guard {update.guard:.4g}, {healer.start:.4g} at the start{end}"))
    guarded = healer.settle()
    found = {"batches": healer.step, "refused": refused, "undone": undone, "drift": drifts, "guard": guarded}
    found |= {"guard_at_start": healer.start, "labels": labels}
    metrics = _written(folder, output, student, original, {"guard": known}, {"online": found})
    text = f"{healer.step} batches, {refused} refused, {undone} times undone: guard {healer.start:.4g} → {guarded:.4g}"
    show(metrics, as_json, lines(text, f"written: {output}"))


def _opened(folder: Path, teacher: str | None, target: Path, device: str | None) -> tuple[LoadedModel, LoadedModel]:
    """A smaller model and its original, once it is sure that what comes of it may be written."""
    from hpr.checkpoints import save
    from hpr.checkpoints.open import open_model
    from hpr.pipeline.record import check_original
    from hpr.plans.plan import Plan

    save.check_folder(target)
    Plan.load(folder / "plan.json")  # before minutes are spent on what could not be written
    student, original = open_model(folder, device), open_model(teacher, device)
    check_original(folder, original)
    return student, original


def _written(
    folder: Path,
    target: Path,
    student: LoadedModel,
    original: LoadedModel,
    dealt: Mapping[str, Splits],
    done: Mapping[str, Any],
) -> dict[str, Any]:
    """Measure a student on what was held out, write it with all that is known of it, and say what that is."""
    from hpr.data.splits import joined
    from hpr.evaluation import evaluate
    from hpr.pipeline import record
    from hpr.pipeline.record import with_figures
    from hpr.plans.plan import Plan
    from hpr.profiling.objectives import objective_for
    from hpr.routing.usage import routes_taken

    goal, known = objective_for(original.model, original.objective), joined(list(dealt.values()))
    with err.status("evaluating"):
        figures = evaluate.evaluate(student.model, original.model, known.heldout, goal, data=f"{known.source}, held out")
    metrics = {**with_figures(folder, original, figures), **done, **routes_taken(student.model, dealt, original.tokenizer)}
    record.write(student.model, target, Plan.load(folder / "plan.json"), metrics, original)
    return metrics | {"output": str(target)}


def _incoming(data: Path | None) -> Iterator[str]:
    if data is None:
        yield from sys.stdin
        return
    try:
        with data.open(encoding="utf-8") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise HprError(f"{data} is not UTF-8 at byte {error.start}: convert it to UTF-8") from error
