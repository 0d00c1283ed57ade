"""The command that compares a compressed model with its original in speed, memory and bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.table import Table

from hpr.cli.console import bars, lines, quiet, show
from hpr.cli.options import Folder, Json, Teacher


def bench(
    folder: Folder,
    teacher: Teacher = None,
    shapes: Annotated[
        list[str] | None,
        typer.Option(metavar="NxT", help="Texts x tokens; repeat. Default: 1 and 32 x 16, 128, 512."),
    ] = None,
    runtimes: Annotated[str | None, typer.Option(metavar="A,B", help="torch, onnxruntime. Default: both.")] = None,
    threads: Annotated[int, typer.Option(metavar="N", help="Threads of each runtime.")] = 1,
    rounds: Annotated[int, typer.Option(metavar="N", help="At most so many calls of each model.")] = 15,
    as_json: Json = False,
) -> None:
    """Time a compressed model, its original and the original's int8 and int4 in turns: calls, tokens, loading, memory."""
    quiet()
    from hpr.bench.run import bench as run

    names = None if runtimes is None else [part.strip() for part in runtimes.split(",")]
    with bars():
        found = run(folder, teacher, shapes, names, threads, rounds)
    machine = found["machine"]
    load = [f"{machine[key][0]:.1f}" for key in ("load_before", "load_after")]
    about = f"threads: {machine['threads']}; load of the machine: {load[0]} before, {load[1]} after"
    notes = [f"left out: {one['name']} {one.get('runtime', '')}: {one['reason']}" for one in found["left_out"]]
    show(found, as_json, *_tables(found), lines(about, *notes))


def _tables(found: Mapping[str, Any]) -> list[Table]:
    latency = Table("shape", "runtime", "model", "ms", "quartiles", "ratio")
    for row in found["latency"]:
        latency.add_row(row["shape"], *_cells(row))
    tables = [latency]
    if "decode" in found:
        decode = Table("runtime", "model", "tokens/s", "quartiles", "ratio")
        for row in found["decode"]:
            decode.add_row(*_cells(row))
        tables.append(decode)
    load = Table("runtime", "model", "load s", "quartiles", "ratio", "resident MB", "bytes MB")
    for row in found["load"]:
        size = "–" if row["bytes"] is None else f"{row['bytes'] / 1e6:.2f}"
        load.add_row(*_cells(row), f"{row['resident_bytes'] / 1e6:.0f}", size)
    return [*tables, load]


def _cells(row: Mapping[str, Any]) -> list[str]:
    ratio = f"{row['ratio']:.2f}x" if "ratio" in row else "–"
    return [row["runtime"], row["name"], f"{row['median']:.3g}", f"{row['low']:.3g} to {row['high']:.3g}", ratio]
