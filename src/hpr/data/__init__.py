"""Data turns texts, arrays and data sets into batches, and divides them between profiling, choosing, healing and evaluation."""
