"""The Triton kernels: the recurrence of a layer, forward and backward, the products around it, sums
of rows by token, and the upload of numbers.

Shapes are in brackets: B is a program's block of sequences, K a block of the hidden units that are
summed over, N a block of the hidden units that are computed.
"""

from .arguments import VARYING, Form, LayoutTensors
from .backward import backward_kernel
from .forward import forward_kernel
from .product import product_kernel
from .sums import sums_by_token_kernel
from .upload import upload_kernel

__all__ = [
    "VARYING",
    "Form",
    "LayoutTensors",
    "backward_kernel",
    "forward_kernel",
    "product_kernel",
    "sums_by_token_kernel",
    "upload_kernel",
]
