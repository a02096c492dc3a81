"""A lint for the machine code of the GPU kernels; `make gpu ONLY=lint` runs `__main__.py`."""
