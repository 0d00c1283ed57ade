"""Runtime runs any model: batches, devices, evaluation mode, hooks, progress, and files that are written whole or not at all."""
