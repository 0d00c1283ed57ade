"""DATA: from files, data sets and arrays to batches, dealt out to their uses."""
