"""Profiling measures a model on unlabelled data: what its outputs mean, the curvature of each site, features of each layer."""
