"""Benchmarks: `make bench` times the fused layers and torch's layers, and reports the results."""
