"""Runtime runs any model: batches, devices, evaluation mode, hooks, progress, and files written whole or not at all."""
