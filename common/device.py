"""Chooses the device and the dtype that this machine computes with, and measures the memory of the
process.

A dtype that the user did not choose is returned with the reason for it, which is printed. Importing
this file also sets how much memory oneDNN and glibc keep, which has to happen before torch computes
anything.
"""

import ctypes
import os
import sys
from pathlib import Path

import torch

from common.errors import UserError

# oneDNN (torch's products on CPU) caches what it prepares for the last 1,024 shapes, and every
# batch brings new shapes: a gigabyte after 200 steps. A step has fewer than 128 shapes. oneDNN
# reads the variable when the first product runs.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")

# glibc returns freed memory to the system, which zeroes it again, page by page, for the next tensor
# of the same size: two fifths of the time of answering 32 prompts of 600 tokens on CPU. These two
# settings make glibc keep a gigabyte: see mallopt(3); the numbers are those of malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
if sys.platform == "linux":
    libc = ctypes.CDLL(None)
    # Other C libraries for Linux have no mallopt.
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)

# The values of --dtype in scripts that compute. convert.py, which only stores weights, has float16
# as well.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STORAGE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def pick_device(name: str = "auto") -> torch.device:
    """Returns the device to compute on. Raises UserError if this machine does not have it.

    name: "cuda", "mps", "cpu", or "auto" for the first of these that this machine has.
    """
    available = []
    if torch.cuda.is_available():
        available.append("cuda")
    if torch.backends.mps.is_available():
        available.append("mps")
    available.append("cpu")
    if name == "auto":
        name = available[0]
    if name not in available:
        present = ", ".join(available)
        raise UserError(f"--device {name}: this machine does not have it, only {present}")
    if name == "cuda":
        use_expandable_segments()
    return torch.device(name)


def use_expandable_segments() -> None:
    """Makes torch's allocator extend its segments of GPU memory instead of asking for new ones.

    Batches are of all sizes, and the gaps between tensors of different sizes would add up. A
    setting of the user stays.
    """
    is_set_by_user = "PYTORCH_CUDA_ALLOC_CONF" in os.environ or "PYTORCH_ALLOC_CONF" in os.environ
    if sys.platform == "linux" and not is_set_by_user:
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def pick_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """Returns the dtype to compute in, and the reason for it.

    name: a key of DTYPES, or "auto": bf16 if the hardware has it; without such hardware it is
    slower than fp32.
    """
    if name != "auto":
        return DTYPES[name], f"asked for with --dtype {name}"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "GPU with bf16"
        return torch.float32, "GPU without bf16"
    if device.type == "cpu" and {"avx512_bf16", "amx_bf16"} & cpu_features():
        return torch.bfloat16, "CPU with bf16 instructions"
    return torch.float32, f"{device.type.upper()} without bf16 instructions"


def cpu_features() -> set[str]:
    """Returns the names of the CPU's instruction sets, as in "avx512_bf16"; an empty set if they
    are not known."""
    # Not every torch from 2.11 on has this function.
    if hasattr(torch.cpu, "get_capabilities"):
        # Some values are no booleans, as the number of cores.
        capabilities = torch.cpu.get_capabilities()
        return {feature for feature, value in capabilities.items() if value is True}
    # Only Linux has this file.
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return set()
    features = set()
    for line in cpuinfo.read_text().splitlines():
        if line.startswith("flags"):
            features.update(line.split())
    return features


def peak_memory(device: torch.device) -> float:
    """Returns the most bytes that torch has allocated on a GPU or, for other devices, that this
    process has had in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # On Linux. The number of getrusage begins with that of the process that started this one.
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM"):
                return 1024.0 * int(line.split()[1])
    # Windows has no such module; this line does not run there.
    import resource

    # macOS counts bytes, other systems KiB.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
