"""The command line: thin, every verb reads and writes the artifacts and leaves the work to the library."""

from hpr.cli import online as _online  # noqa: F401  adds its verb
from hpr.cli.verbs import app, main

__all__ = ["app", "main"]
