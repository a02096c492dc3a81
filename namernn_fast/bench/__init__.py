"""`python -m namernn_fast bench`, and code that this command shares with `benchmarks/`."""
