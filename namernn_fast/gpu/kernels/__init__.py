"""The Triton kernels. They run a layer's recurrence, forward and backward, compute the products
around it, sum rows by token, and upload integers.

Square brackets give the shape of a block: B sequences, N hidden units to compute, K hidden units to
sum over.
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
