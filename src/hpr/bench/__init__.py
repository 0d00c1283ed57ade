"""Benchmarks: a compressed model, its original and the original's int8 and int4, in torch and ONNX Runtime, in one run."""
