"""Data turns texts, files, arrays and data sets into batches, and divides them between profiling, choosing, healing and figures."""
