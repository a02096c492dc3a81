"""Benchmarks of FusedRNN: `make bench` races it against torch.nn.RNN, times, prints and plots."""
