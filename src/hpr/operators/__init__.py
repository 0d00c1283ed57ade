"""What may become of a group of weights: curve, terms and fit of each operator; the metric; alignment."""
