"""Benchmarks on GPUs, the model of one on paper, and what compiled kernels take."""
