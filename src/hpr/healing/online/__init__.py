"""Learn on from a stream, with a validation set that undoes what hurts."""
