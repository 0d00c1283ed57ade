"""Console output of all commands: results on stdout, progress bars and notes on stderr, exit codes."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from typer.core import TyperGroup

from hpr.errors import HprError
from hpr.runtime.progress import reporting_to

BAD_INPUT, INTERRUPTED, TERMINATED = 2, 130, 143
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


class Commands(TyperGroup):
    """Turns errors into exit codes, for all commands. An unexpected error keeps its traceback and exits with 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except HprError as error:
            _say(str(error))
            raise typer.Exit(BAD_INPUT) from error
        except OSError as error:
            if error.filename is None:
                raise  # for example a closed pipe
            _say(f"{error.filename}: {error.strerror}; give another path")
            raise typer.Exit(BAD_INPUT) from error
        except KeyboardInterrupt as error:
            _say("interrupted; no file was left half-written", "")
            raise typer.Exit(INTERRUPTED) from error


def show(result: Any, as_json: bool, *tables: RenderableType) -> None:
    """Print a result: JSON for scripts, tables for people."""
    if as_json:
        typer.echo(json.dumps(result, indent=1))
    else:
        for table in tables:
            out.print(table)


def lines(*texts: str) -> Text:
    """Plain lines of text, in which nothing is taken for markup."""
    return Text("\n".join(texts), overflow="fold")


@contextmanager
def bars() -> Iterator[None]:
    """Show one progress bar for every stage on stderr, with the time left, inside the ``with`` block."""
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=err) as shown:

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = shown.add_task(stage, total=total)
            shown.update(tasks[stage], completed=done, total=total)

        with reporting_to(advance):
            yield


class _Notes(logging.Handler):
    """Shows what the library logs as dim lines on stderr, above the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        err.print(Text(record.getMessage(), style="dim" if record.levelno < logging.WARNING else "yellow"), soft_wrap=True)


def quiet() -> None:
    """Keep warnings of other libraries off the console, and show what HPR logs; errors stay."""
    from transformers.utils import logging as transformers_logging

    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logger = logging.getLogger("hpr")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if not any(isinstance(handler, _Notes) for handler in logger.handlers):
        logger.addHandler(_Notes())


def _say(message: str, kind: str = "error: ") -> None:
    err.print(Text.assemble((kind, "bold red"), message), soft_wrap=True)
