"""What this machine can compute with: devices, dtypes, how much memory a process has taken.

A choice that the user did not make is returned with its reason, to be printed. Importing this file also sets how oneDNN
and glibc keep memory, which has to happen before torch computes anything.
"""

import ctypes
import os
import sys
from pathlib import Path

import torch

from common.errors import UserError

# oneDNN (torch's products on CPU) keeps what it prepared for the last 1,024 shapes, and every batch brings new ones: a
# gigabyte after 200 steps. A step has fewer than 128. Read when the first product runs.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")

# glibc hands freed memory back to the system, which zeroes it anew, page by page, for the next tensor of the same size:
# two fifths of the time of answering 32 prompts of 600 tokens on CPU. Two numbers make it keep a gigabyte: mallopt(3).
if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
    libc.mallopt(-1, 1 << 30), libc.mallopt(-3, 1 << 30)  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD

# The values of --dtype in scripts that compute. convert.py, which only stores weights, knows float16 as well.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STORAGE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def pick_device(name: str = "auto") -> torch.device:
    """auto: the first of CUDA, MPS and CPU that there is."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, yes in there.items() if yes)
    if not there.get(name, False):
        raise UserError(
            f"--device {name}: not on this machine (there is {', '.join(k for k, yes in there.items() if yes)})"
        )
    if name == "cuda":
        use_expandable_segments()
    return torch.device(name)


def use_expandable_segments() -> None:
    """Has torch's allocator extend the memory that it holds of a GPU in place of asking for new segments: batches are
    of all sizes, and what is left between tensors of other sizes would add up. What the user has set stays."""
    if sys.platform == "linux" and not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & os.environ.keys():
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def pick_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype to compute in, and why. auto: bf16 where the hardware has it, elsewhere it is slower than fp32."""
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
    if hasattr(torch.cpu, "get_capabilities"):  # not in every torch from 2.11 on
        return {feature for feature, yes in torch.cpu.get_capabilities().items() if yes is True}
    cpuinfo = Path("/proc/cpuinfo")  # Linux; elsewhere nothing is known, so nothing is promised
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return {feature for line in lines if line.startswith("flags") for feature in line.split()}


def peak_memory(device: torch.device) -> float:
    """Bytes: the most that torch has held on a GPU, or that this process has had in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path(
        "/proc/self/status"
    )  # Linux; getrusage's figure begins with that of the process that started this one
    lines = status.read_text().splitlines() if status.is_file() else []
    for line in lines:
        if line.startswith("VmHWM"):
            return 1024.0 * int(line.split()[1])
    import resource  # not on Windows, where this file does not run

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
