"""Triton, where it can be used: on NVIDIA and AMD GPUs, and, for the tests of its kernels, wherever TRITON_INTERPRET=1.

A kernel stands in the file of its function, beside the plain form that computes everywhere else; `on_gpu` is the switch
between the two. On machines without a GPU triton is not even imported: two stand-ins let the kernels be written down.
"""

import os

import torch
from torch import Tensor


class Absent:
    """In place of a module that is not there: its decorators leave functions as they are."""

    def __getattr__(self, name: str):
        return lambda function, *_: function


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
triton = tl = Absent()
if INTERPRETED or torch.cuda.is_available():
    try:
        import triton
        import triton.language as tl
    except ImportError:  # as on Windows: the plain forms compute there
        triton = tl = Absent()


def on_gpu(x: Tensor) -> bool:
    """Whether a kernel in Triton takes x."""
    return x.is_cuda and not isinstance(triton, Absent)


def blocks(size: int) -> int:
    """The next power of two: Triton's ranges have no other sizes."""
    return 1 << max(0, size - 1).bit_length()
