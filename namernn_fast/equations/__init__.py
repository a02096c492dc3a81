"""Cells that users write as equations: a Python function of one step becomes a program.

`tracing` and `compiling` turn the function into a `Program`; `csrc/library/arguments/program.cpp`
checks programs, and `csrc/cells/equation.h` runs them.
"""

from .cell import EQUATION, cell_of_program, find_cell, initial_values, products_of_h, program_of
from .program import Program

__all__ = [
    "EQUATION",
    "Program",
    "cell_of_program",
    "find_cell",
    "initial_values",
    "products_of_h",
    "program_of",
]
