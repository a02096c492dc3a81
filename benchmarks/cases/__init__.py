"""Benchmarks of other packages' pretrained models, with torch's and with fused recurrent layers."""
