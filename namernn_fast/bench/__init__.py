"""`python -m namernn_fast bench`, and the code it shares with the repository's benchmarks."""
