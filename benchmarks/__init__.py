"""Benchmarks: `make bench` races the fused layers against torch's and reports the results."""
