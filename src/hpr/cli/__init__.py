"""The command line: thin, every verb reads and writes the artifacts and leaves the work to the library."""

from hpr.cli.program import app, main

__all__ = ["app", "main"]
