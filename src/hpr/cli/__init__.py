"""The command line: each command reads options, calls the library, and prints the result."""

from hpr.cli.program import app, main

__all__ = ["app", "main"]
