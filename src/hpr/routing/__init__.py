"""Weights that follow the input. Experimental, and off by default."""
