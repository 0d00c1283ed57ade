"""Runtime runs any model: batches, devices, evaluation mode, hooks, progress, and atomic files. It also imports lazy names."""
