"""Integrations with other parts of torch: compilers, exporters, transforms, counters."""
