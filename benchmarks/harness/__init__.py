"""What every benchmark shares, besides `namernn_fast.bench`: grid, gate, tape, machine, pages."""
