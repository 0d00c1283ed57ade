"""The operators: ways to store a group of weights. Each has a curve, terms and a fit, all in the same metric (``metric``)."""
