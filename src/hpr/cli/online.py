"""The verb that learns on from a stream."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from hpr.cli.console import err, lines, quiet, show
from hpr.cli.options import Folder, Json, Seed, Teacher
from hpr.cli.verbs import app, example
from hpr.errors import HprError


@app.command(
    epilog=example(
        "online out --teacher path/to/model --guard texts.txt --data stream.jsonl --state out-state -o out-later",
        "online out --guard rated.jsonl --labels --state out-state -o out-later < stream.jsonl",
    )
)
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
    as_json: Json = False,
) -> None:
    """Learn on from a stream of JSON lines with a "text"; what hurts the guard is undone, and nothing is lost in a crash."""
    quiet()
    from hpr import evaluation, hub, records
    from hpr.cli.describing import check_original, with_figures
    from hpr.healing import OnlineHealer, Weights
    from hpr.healing.stream import Log, chunks
    from hpr.models import open_model
    from hpr.planning.plan import Plan
    from hpr.splits import open_splits

    if output.resolve() == folder.resolve():
        raise HprError(f"{folder} is where learning starts: write what comes of it to another folder")
    hub.check_folder(output)
    plan = Plan.load(folder / "plan.json")
    student, original = open_model(folder), open_model(teacher)
    check_original(folder, original)
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
    with err.status("evaluating"):
        label = f"{known.source}, held out"
        figures = evaluation.evaluate(student.model, original.model, known.heldout, healer.loss.objective, data=label)
    metrics = with_figures(folder, original, figures) | {"online": found}
    records.write(student.model, output, plan, metrics, original)
    text = f"{healer.step} batches, {refused} refused, {undone} times undone: guard {healer.start:.4g} → {guarded:.4g}"
    show(metrics | {"output": str(output)}, as_json, lines(text, f"written: {output}"))


def _incoming(data: Path | None) -> Iterator[str]:
    if data is None:
        yield from sys.stdin
        return
    try:
        with data.open(encoding="utf-8") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise HprError(f"{data} is not UTF-8 at byte {error.start}: convert it to UTF-8") from error
