"""Benchmarks on GPUs, and what compiled kernels take."""
