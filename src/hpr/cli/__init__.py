"""The command line: thin, every verb reads and writes the artifacts and leaves the work to the library."""

from hpr.cli.verbs import app, main

__all__ = ["app", "main"]
