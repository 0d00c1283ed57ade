"""Sharing attaches factors to a copy of a model, fits them, ties what was tied, and turns a shared model back into a dense one."""
