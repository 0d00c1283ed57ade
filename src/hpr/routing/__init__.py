"""Routing makes weights depend on the input; it is experimental and off by default."""
