"""The machine code that the compiler generates for the GPU kernels, and the resources it needs."""
