"""Sharing attaches factors to a copy of a model, fits them, keeps ties, and turns a shared model back into a dense one."""
