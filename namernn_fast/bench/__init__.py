"""`python -m namernn_fast bench`, and what it shares with the benchmarks of the repository."""
