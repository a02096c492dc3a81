"""Benchmarks: `make bench` races the fused layers against torch's, times, prints and plots."""
