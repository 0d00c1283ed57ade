"""DESCRIBE: what is in a model; what may be swapped, and what is not covered."""
