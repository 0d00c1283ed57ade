"""Healing with the rounding in the loop: codes are trained, and the coded file keeps its budget in bytes."""
