"""Code shared by all benchmarks, in addition to `namernn_fast.bench`."""
