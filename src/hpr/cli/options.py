"""Options that several verbs have, with their help, and how their text is read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="Folder or hub id. The packaged all-MiniLM-L6-v2 if left out.")
]
Data = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Text: one a line, .jsonl, .csv or .tsv. The standard library's docstrings if left out."),
]
Budget = Annotated[str, typer.Option(metavar="SIZE", help="Of all unique parameters: 50%, 11M parameters, or 45MB on disk.")]
Only = Annotated[str | None, typer.Option(metavar="PATTERN", help="Change only sites that match: 'encoder.*,pooler*'.")]
Operators = Annotated[str | None, typer.Option(metavar="A,B", help="Use only these operators, beside keep.")]
Align = Annotated[
    bool | None,
    typer.Option("--align/--no-align", help="Also plan with aligned layers; by default where a look at a few says it pays."),
]
Goal = Annotated[str | None, typer.Option("--objective", metavar="NAME", help="What the model is for; else by its class.")]
Examples = Annotated[int, typer.Option(min=1, metavar="N", help="At most this many texts are read.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Seed of everything that is drawn.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on stdout.")]
Folder = Annotated[Path, typer.Argument(help="A folder that hpr wrote.")]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="PATH", help="Where to write.")]
Teacher = Annotated[str | None, typer.Option(metavar="MODEL", help="The original; the packaged one if left out.")]


def operator_names(text: str | None) -> list[str] | None:
    """``tie+scale, low-rank`` as the names that the planner knows; what is unknown is left for it to refuse."""
    from hpr.operators import OPERATORS, segments

    if text is None:
        return None

    def squeezed(name: str) -> str:
        return "".join(name.lower().replace("-", " ").split())

    known = {squeezed(name): name for name in (*OPERATORS, segments.NAME)}
    return [known.get(squeezed(part), part.strip()) for part in text.split(",")]
