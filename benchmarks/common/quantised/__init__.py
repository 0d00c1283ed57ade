"""Peers at a number of bytes: each takes a model and gives a student, and the bytes that its numbers take."""
