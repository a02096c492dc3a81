"""A lint of the machine code of the GPU kernels; `__main__.py` is the command `make gpu-lint`."""
