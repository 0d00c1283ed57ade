"""Options that several commands have, with their help, and how their text is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpr.data.files import format_of, suffixes
from hpr.errors import DataError

if TYPE_CHECKING:
    from hpr.data.sources import Columns

Model = Annotated[str | None, typer.Argument(metavar="MODEL", help="Folder or hub id. Default: the packaged all-MiniLM-L6-v2.")]
Data = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE[=SHARE]",
        help=f"Data file ({suffixes()}); repeat for several, with shares. Default: Python's docstrings.",
    ),
]
Column = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME|NUMBER",
        help="The column of texts in --data, if it is not 'text'; numbers count from 0. Repeat, one for each table.",
    ),
]
Label = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME|NUMBER",
        help="The column of labels in --data, if it is not 'label'. Repeat, one for each table.",
    ),
]
Budget = Annotated[
    str, typer.Option(metavar="SIZE", help="Bytes on disk, weights are rounded (8MB, 10%bytes), or parameters (50%, 11M).")
]
Only = Annotated[str | None, typer.Option(metavar="PATTERN", help="Change only sites that match: 'encoder.*,pooler*'.")]
Operators = Annotated[str | None, typer.Option(metavar="A,B", help="Consider only these operators, and keep.")]
Align = Annotated[
    bool | None,
    typer.Option(
        "--align/--no-align", help="Also plan with aligned layers; by default if a look at a few layers promises a gain."
    ),
]
Goal = Annotated[
    str | None,
    typer.Option("--objective", metavar="NAME", help="What the outputs mean; by default what the model's class says."),
]
Device = Annotated[str | None, typer.Option(metavar="NAME", help="cpu, cuda or cuda:1. Default: a CUDA GPU if there is one.")]
Examples = Annotated[int, typer.Option(min=1, metavar="N", help="At most this many texts are read.")]
Bits = Annotated[
    int | None,
    typer.Option(metavar="8|4", help="Where numbers are coded: keep codes in −127..127 (8) or −7..7 (4), for runtimes."),
]
Bytes = Annotated[
    str | None,
    typer.Option(
        "--bytes", metavar="SIZE", help="Budgets in parameters: round what is stored until the file has this size: 6MB."
    ),
]
Latency = Annotated[
    str | None,
    typer.Option(metavar="SHARE", help="Budgets in parameters: the time of one call on this machine as well, such as 0.7x."),
]
Flops = Annotated[
    str | None, typer.Option(metavar="SHARE", help="The same for operations, which are counted instead of timed: 0.7x.")
]
Shape = Annotated[
    str, typer.Option(metavar="NxT", help="With --latency or --flops: the examples x tokens of a typical call, such as 32x128.")
]
Seed = Annotated[int, typer.Option(metavar="N", help="Seed of all random numbers.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on stdout.")]
Folder = Annotated[Path, typer.Argument(help="A folder that HPR wrote.")]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="PATH", help="Where to write.")]
Teacher = Annotated[
    str | None, typer.Option(metavar="MODEL", help="The original model. Default: the packaged all-MiniLM-L6-v2.")
]


def mixture(given: Sequence[str] | None, column: Sequence[str] | None = None, label: Sequence[str] | None = None) -> Any:
    """The data that ``--data`` names: nothing, one file, or a ``Mixture`` of several files with their shares.

    ``column`` and ``label`` are what ``--column`` and ``--label`` name.
    """
    from hpr.data.sources import Mixture

    pairs = [_with_share(text) for text in given or ()]
    paths = [path for path, _ in pairs]
    sources = with_columns(paths, column, label)
    if len(pairs) < 2:
        return next(iter(sources), None)
    if twice := next((path for path in paths if paths.count(path) > 1), None):
        raise DataError(f"--data names {twice} twice: give it once, with a share")
    return Mixture(dict(zip(paths, sources, strict=True)), dict(pairs))


def with_columns(paths: Sequence[str], column: Sequence[str] | None, label: Sequence[str] | None) -> list[Columns]:
    """Files as sources of data, with the columns that ``--column`` and ``--label`` name.

    A single name is for every file with columns. Several names are for the files with columns in their order, one for each.
    """
    from hpr.data.sources import Columns

    with_key = _places(paths, column, "column", ("table", "array"))
    marked = _places(paths, label, "label", ("table",))
    return [Columns(path, with_key.get(place), marked.get(place)) for place, path in enumerate(paths)]


def _places(paths: Sequence[str], names: Sequence[str] | None, flag: str, kinds: Sequence[str]) -> dict[int, str]:
    """The name of a column for each file that takes one, by the place of the file."""
    if not names:
        return {}
    able = [place for place, path in enumerate(paths) if any(getattr(format_of(path), kind) for kind in kinds)]
    if not able:
        files = ", ".join(paths) or "no --data"
        raise DataError(f"--{flag} {names[0]} needs a file with columns, not {files}: give one as --data ({suffixes('table')})")
    if len(names) not in (1, len(able)):
        given = ", ".join(names)
        raise DataError(
            f"--{flag} is given for {len(names)} files ({given}), but {len(able)} have columns: give one, or {len(able)}"
        )
    return dict(zip(able, list(names) * (len(able) // len(names)), strict=True))


def _with_share(text: str) -> tuple[str, float]:
    path, mark, share = text.rpartition("=")
    if not mark or Path(text).exists():
        return text, 1.0
    try:
        return path, float(share)
    except ValueError as error:
        raise DataError(f"--data {text}: the share {share!r} is no number; say FILE=2, or FILE alone") from error


def operator_names(text: str | None) -> tuple[str, ...] | None:
    """The names in ``tie+scale, low-rank``. The planner accepts several spellings of a name, and refuses unknown names."""
    return None if text is None else tuple(part.strip() for part in text.split(","))
