"""Benchmarks of the names application: its speed, and the reference result on several splits."""
