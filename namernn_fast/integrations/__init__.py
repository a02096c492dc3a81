"""Makes torch's compilers, exporters, transforms and FLOP counter support the fused layers."""
