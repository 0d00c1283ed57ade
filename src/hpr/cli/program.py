"""The program: its commands with an example of each, in the order of the help, and its entry point."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, Any

import typer

from hpr.cli import bench_command, commands, learning_commands, writing_commands
from hpr.cli.console import TERMINATED, Commands

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 fine, 1 unexpected error, 2 bad input, 130 interrupted.",
)


def print_version(wanted: bool) -> None:
    """Print the version and exit."""
    if wanted:
        typer.echo(f"hpr {version('hpr')}")
        raise typer.Exit


@app.callback()
def common(
    show_version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make a pretrained Transformer smaller by letting its layers share parameters.

    Start with `hpr compress`; the other commands are its steps, one by one.
    """


def add(command: Callable[..., None], *examples: str, name: str | None = None) -> None:
    """Register a command, with the examples that its help shows below the options."""
    app.command(name, epilog="\n".join(["[bold]Example[/bold]", *(f"  hpr {example}" for example in examples)]))(command)


add(commands.inspect, "inspect", "inspect path/to/model --json")
add(commands.profile, "profile path/to/model --data texts.txt -o profile.safetensors")
add(commands.plan, "plan path/to/model --profile profile.safetensors --budget 50% --only 'encoder.*' -o plan.json")
add(writing_commands.share, "share path/to/model --plan plan.json --profile profile.safetensors -o out")
add(writing_commands.unshare, "unshare out -o dense")
add(writing_commands.export, "export out --to onnx -o out-onnx")
add(learning_commands.heal, "heal out --teacher path/to/model --data texts.txt --for 10min")
add(
    learning_commands.online,
    "online out --teacher path/to/model --validation texts.txt --data stream.jsonl --state out-state -o out-later",
    "online out --validation rated.jsonl --labels --state out-state -o out-later < stream.jsonl",
)
add(commands.evaluate, "eval out --teacher path/to/model --data held_out.txt", name="eval")
add(bench_command.bench, "bench out --shapes 1x128 --runtimes onnxruntime")
add(commands.report, "report out")
add(
    commands.compress,
    "compress --budget 8MB -o out",
    "compress path/to/model --budget 50% --data texts.txt --heal 10min -o out",
    "compress path/to/model --budget 50% --bytes 6MB -o out",
    "compress path/to/model --data reviews.csv --column review -o out",
    "compress path/to/model --data reviews.tsv=2 --data news.txt -o out",
)


def main() -> None:
    """The entry point."""
    signal.signal(signal.SIGTERM, _leave)  # so that half-written files are cleared away then, too
    app()


def _leave(*_: Any) -> None:
    sys.exit(TERMINATED)
