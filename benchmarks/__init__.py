"""FusedRNN against torch.nn.RNN: `python benchmarks/run.py` times, prints and plots every cell."""
