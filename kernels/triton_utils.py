"""Triton, where it can be used: on NVIDIA and AMD GPUs.

Where TRITON_INTERPRET=1, Triton's interpreter runs the kernels on CPUs, for their tests.

Each kernel stands in the same file as its function and the plain PyTorch form of it, which computes
everywhere else. `use_triton` is the switch between the two. On a machine without a GPU, triton is
not even imported: `TritonStub` takes its place, so that files with kernels can still be imported.

Triton builds a small C module when it first launches a kernel. So it needs a C compiler and
Python's headers, which many images leave out. `use_triton` therefore launches a kernel that does
nothing first; if that fails, the plain forms compute.
"""

import os
import subprocess
import sys
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from common.errors import first_line


class TritonStub:
    """Stands in for a module that is not there: its decorators return functions unchanged."""

    def __getattr__(self, name: str):
        return lambda function, *_: function


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# A type checker reads the first branch only, so that `tl.constexpr` is a type for it.
if TYPE_CHECKING:
    import triton
    import triton.language as tl
elif INTERPRETED or torch.cuda.is_available():
    try:
        import triton
        import triton.language as tl
    except ImportError:
        # There is no triton, for example on Windows. The plain forms compute there.
        triton = tl = TritonStub()
else:
    triton = tl = TritonStub()


def use_triton(x: Tensor) -> bool:
    """True if Triton kernels compute with x: it is on a GPU, where Triton can launch kernels."""
    return x.is_cuda and triton_launches()


@cache
def triton_launches() -> bool:
    """True if Triton can launch kernels here.

    It is tried once. A NOTE on stderr says why it failed.
    """
    if isinstance(triton, TritonStub):
        return False
    try:
        launch_nothing()
    except (RuntimeError, OSError, ImportError, subprocess.CalledProcessError) as error:
        reason = launch_failure(error)
        print(
            f"NOTE: Triton cannot launch its kernels ({reason}); plain PyTorch computes instead,"
            " which takes more time and memory",
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
    """Says what is missing on this machine, given the error that ended Triton's first launch."""
    # The compiler itself failed. It has written the details to stderr already.
    if isinstance(error, subprocess.CalledProcessError):
        return (
            "its C module does not compile; Python's headers, often a package called python3-dev,"
            " may be missing"
        )
    # Triton raises a RuntimeError that says "Failed to find C compiler".
    if "compiler" in str(error).lower():
        return "there is no C compiler; install gcc, or set the environment variable CC to one"
    return first_line(error)


def to_device(x: np.ndarray, device: torch.device | str) -> Tensor:
    """Returns x as a tensor on `device`.

    The copy to a GPU starts from pinned memory: otherwise it would wait for all work that the GPU
    has queued.
    """
    tensor = torch.from_numpy(x)
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def next_power_of_2(size: int) -> int:
    """Returns the smallest power of two >= size, at least 1. `tl.arange` takes no other sizes."""
    return 1 << max(0, size - 1).bit_length()
