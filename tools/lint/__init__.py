"""A lint for the machine code of the GPU kernels; `make gpu-lint` runs `__main__.py`."""
