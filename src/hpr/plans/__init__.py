"""A plan is an artifact without an algorithm: it holds the terms of every site, the budget and the states of layers."""
