"""The operators define how a group of weights can be stored: each has a curve, terms and a fit in a common metric."""
