"""Running any model: batches, devices, modes, hooks, progress, files written at once."""
