"""How the layer appears to other parts of torch: compilers, exporters, transforms, counters."""
