"""Code that all benchmarks share, in addition to `namernn_fast.bench`."""
