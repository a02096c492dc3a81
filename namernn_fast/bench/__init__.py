"""The command `python -m namernn_fast bench`, and code shared with `benchmarks/`."""
