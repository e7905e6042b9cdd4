"""Triton, where it can be used: on NVIDIA and AMD GPUs, and, for the tests of its kernels, wherever TRITON_INTERPRET=1.

A kernel stands in the file of its function, beside the plain form that computes everywhere else; `on_gpu` is the switch
between the two. On machines without a GPU triton is not even imported: two stand-ins let the kernels be written down.

Triton builds a small C module when it first launches a kernel, so it needs a C compiler and Python's headers, which
many images leave out. `on_gpu` launches a kernel that does nothing first; where that fails, the plain forms compute.
"""

import os
import subprocess
import sys
from functools import cache

import numpy as np
import torch
from torch import Tensor


class TritonStub:
    """In place of a module that is not there: its decorators leave functions as they are."""

    def __getattr__(self, name: str):
        return lambda function, *_: function


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
triton = tl = TritonStub()
if INTERPRETED or torch.cuda.is_available():
    try:
        import triton
        import triton.language as tl
    except ImportError:  # as on Windows: the plain forms compute there
        triton = tl = TritonStub()


def use_triton(x: Tensor) -> bool:
    """Whether a kernel in Triton takes x."""
    return x.is_cuda and triton_launches()


@cache
def triton_launches() -> bool:
    """Whether Triton can launch kernels here. Tried once; a NOTE on stderr says why where it can't."""
    if isinstance(triton, TritonStub):
        return False
    try:
        launch_nothing()
    except (RuntimeError, OSError, ImportError, subprocess.CalledProcessError) as error:
        print(
            f"NOTE: Triton cannot launch its kernels ({launch_failure(error)}); plain PyTorch computes in their place,"
            " which takes longer and more memory",
            file=sys.stderr,
        )
        return False
    return True


def launch_nothing() -> None:
    nothing_kernel[(1,)](num_warps=1)


@triton.jit
def nothing_kernel():
    pass


def launch_failure(error: Exception) -> str:
    """What is missing, of what Triton's first launch ends with."""
    if isinstance(error, subprocess.CalledProcessError):  # the compiler has said more, on stderr
        return "its C module does not compile; Python's headers, often a package called python3-dev, may be missing"
    if "compiler" in str(error).lower():
        return "there is no C compiler; install gcc, or name one in CC"
    return str(error).strip().partition("\n")[0] or type(error).__name__


def to_device(x: np.ndarray, device: torch.device | str) -> Tensor:
    """x there; to a GPU out of pinned memory, for else the copy would wait for all that the GPU has still to do."""
    made = torch.from_numpy(x)
    on_gpu = torch.device(device).type == "cuda"
    return made.pin_memory().to(device, non_blocking=True) if on_gpu else made.to(device)


def next_power_of_2(size: int) -> int:
    """The next power of two: Triton's ranges have no other sizes."""
    return 1 << max(0, size - 1).bit_length()
