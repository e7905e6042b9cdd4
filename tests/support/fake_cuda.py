"""A GPU that is not there: the program's CUDA path runs on fake tensors, in torch's CPU build.

Import this before torch. It loads a device guard for "cuda" (cuda_guard.cpp, built by cuda_guard.py), and tells torch
that a GPU of compute capability 9.0 is available. Under `fake_tensors()` a whole training step then runs, forward and
backward: no number is computed, but every shape, dtype and device is checked as on a card, a wrong one raises. Launches
of Triton kernels are intercepted: their grid and their tensors' devices are checked, and `on_launch` may do more, such
as compile them (compiled_kernels.py) or count them (census.py).

Each script that imports this has a process to itself: torch is not the same afterwards.
"""

import ctypes
import os
import sys
import tempfile
import types
from pathlib import Path

from cuda_guard import build_guard

SUPPORT = Path(__file__).resolve().parent
ROOT = SUPPORT.parents[1]
GUARD_VARIABLE = "PLAINTUNE_CUDA_GUARD"  # the built guard's path, for scripts that a test starts
GRID_LIMITS = (2**31 - 1, 65535, 65535)  # of a launch, in each of its three dimensions
H100 = {
    "name": "NVIDIA H100 80GB HBM3",
    "major": 9,
    "minor": 0,
    "multi_processor_count": 132,
    "total_memory": 85_000_000_000,
    "warp_size": 32,
    "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 2048,
    "shared_memory_per_block_optin": 232448,
    "L2_cache_size": 50 << 20,
    "gcnArchName": "",
}

assert "torch" not in sys.modules, "fake_cuda changes torch, and has to be imported before it"
if GUARD_VARIABLE not in os.environ:
    os.environ[GUARD_VARIABLE] = str(build_guard(Path(tempfile.mkdtemp(prefix="plaintune-guard-"))))
ctypes.CDLL(os.environ[GUARD_VARIABLE], mode=ctypes.RTLD_GLOBAL)

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._device import _device_constructors

sys.path.insert(0, str(ROOT))


class Event:
    """In place of torch.cuda.Event: everything has happened already."""

    def __init__(self, **_):
        pass

    def record(self, *_):
        pass

    def synchronize(self):
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, _) -> float:
        return 1.0


class Stream:
    """In place of torch.cuda.Stream."""

    def __init__(self, *_, **__):
        pass

    def wait_stream(self, _):
        pass

    def wait_event(self, _):
        pass

    def synchronize(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


pinned_buffers = 0  # tensors in page-locked memory that were asked for; making one is slow on a real machine
_empty, _tensor = torch.empty, torch.tensor


def empty(*args, pin_memory=False, **settings):
    global pinned_buffers
    pinned_buffers += bool(pin_memory)
    return _empty(*args, **settings)


def tensor(data, *args, device=None, **settings):
    made = _tensor(data, *args, **settings)
    on_cpu = device is None or torch.device(device).type == "cpu"
    return made if on_cpu else made.to(device)


def pin_memory(self, *_):
    global pinned_buffers
    pinned_buffers += 1
    return self


def scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """What torch runs on a GPU, as far as kernels go: FlashAttention where it takes the inputs, else the
    memory-efficient kernel, which knows no grouped heads."""
    d = q.shape[-1]
    padding = -d % 8
    if padding:
        q, k, v = (torch.nn.functional.pad(x, (0, padding)) for x in (q, k, v))
    if q.dtype in (torch.bfloat16, torch.float16) and attn_mask is None:
        op = torch.ops.aten._scaled_dot_product_flash_attention
        out = op(q, k, v, 0.0, is_causal, False, scale=scale)[0]
    else:
        assert not enable_gqa, "no fused kernel takes these inputs with grouped heads"
        op = torch.ops.aten._scaled_dot_product_efficient_attention
        out = op(q, k, v, None, True, 0.0, is_causal, scale=scale)[0]
    return out[..., :d]


_device_constructors()  # a list that `with torch.device("meta")` keeps, of what stands here now
torch.empty, torch.tensor = empty, tensor
torch.Tensor.pin_memory = pin_memory
torch.Tensor.record_stream = lambda self, stream: None
torch.nn.functional.scaled_dot_product_attention = scaled_dot_product_attention
cuda = torch.cuda
cuda.is_available = lambda: True
cuda.is_bf16_supported = lambda *_, **__: True
cuda.device_count = lambda: 1
cuda.current_device = lambda: 0
cuda.set_device = lambda device: None
cuda._lazy_init = lambda: None
cuda.get_device_capability = lambda device=None: (H100["major"], H100["minor"])
cuda.get_device_properties = lambda device=None: types.SimpleNamespace(**H100)
cuda.get_device_name = lambda device=None: H100["name"]
cuda.mem_get_info = lambda device=None: (H100["total_memory"], H100["total_memory"])
cuda.max_memory_allocated = lambda device=None: 0
cuda.synchronize = lambda device=None: None
cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
cuda.set_rng_state = lambda state, device="cuda": None
cuda.random.get_rng_state, cuda.random.set_rng_state = cuda.get_rng_state, cuda.set_rng_state
cuda.Event, cuda.Stream = Event, Stream
cuda.current_stream = lambda device=None: Stream()
cuda.stream = lambda stream: stream
FakeTensorMode.avoid_device_init = property(lambda self: True)


from kernels import attention, flex, triton_utils
from kernels.nf4 import dynamic_numbers

triton_utils.triton_launches = lambda: True  # without trying it
attention.has_flash = lambda device: True
flex.passes_trial = lambda *_: True

for signed in (True, False):
    dynamic_numbers(signed)  # made with torch and read as numbers, which fake tensors have not; kept from here on
_mode = FakeTensorMode(allow_non_fake_inputs=True)  # one for the process: tensors of two modes do not mix


def fake_tensors() -> FakeTensorMode:
    """A context in which new tensors have shape, dtype and device, and no memory. Real ones may be read in it."""
    return _mode


# ---- launches of Triton kernels ----

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction, MockTensor


class Driver:
    """What a launch asks of Triton's driver before it compiles."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.arch  # a cache of compiled kernels for each

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cuda", 0)


class Pointer(MockTensor):
    """A tensor as the compiler sees it: it specialises on whether an address can be divided by 16."""

    def __init__(self, t: torch.Tensor):
        super().__init__(t.dtype, list(t.shape))
        self.offset = t.storage_offset() * t.element_size()

    def data_ptr(self) -> int:
        return 4096 + self.offset


def compile_for(arch: int) -> None:
    """Sets the GPU that launches are compiled for: 80, 90 or 100."""
    driver.set_active(Driver(arch))


def compile_launch(kernel: JITFunction, args: tuple, grid: tuple, options: dict):
    """The compiled kernel of a launch, which is not run."""
    wrap = lambda x: Pointer(x) if isinstance(x, torch.Tensor) else x
    wrapped = {name: wrap(value) for name, value in options.items()}
    return _run(kernel, *map(wrap, args), grid=grid, warmup=True, **wrapped)


class FlexAttention(torch.autograd.Function):
    """In place of the compiled kernels of FlexAttention: a launch forward, and one backward besides two small ones."""

    @staticmethod
    def forward(ctx, q, k, v):
        out, logsumexp = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        on_operator("flex_attention", [q, k, v, out, logsumexp])
        ctx.save_for_backward(q, k, v, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, logsumexp = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in (q, k, v)]
        on_operator("flex_attention_delta", [out, grad, logsumexp])
        on_operator("flex_attention_backward", [q, k, v, grad, logsumexp, *grads])
        return tuple(grads)


def ignore_operator(name: str, tensors: list[torch.Tensor]) -> None:
    """Stands for `on_operator` until a script sets another function."""


on_operator = ignore_operator
flex.compiled = lambda: lambda q, k, v, score_mod, mask, scale, grouped: FlexAttention.apply(q, k, v)


def kernel_name(kernel: JITFunction) -> str:  # norm.forward_kernel
    return f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"


def ignore_launch(kernel: JITFunction, args: tuple, grid: tuple, options: dict, bound: dict) -> None:
    """Stands for `on_launch` until a script sets another function."""


on_launch = ignore_launch
_run = JITFunction.run


def run(self, *args, grid, warmup=False, **options):
    names = [parameter.name for parameter in self.params]
    bound = dict(zip(names, args)) | {name: value for name, value in options.items() if name in names}
    for name, value in bound.items():
        if isinstance(value, torch.Tensor) and value.device.type == "cpu":
            raise AssertionError(f"{self.fn.__name__}: {name} is on the CPU")
    sizes = grid(bound) if callable(grid) else grid
    for axis, (size, most) in enumerate(zip(sizes, GRID_LIMITS)):
        assert 0 < size <= most, f"{self.fn.__name__}: grid {sizes}, axis {axis} is beyond {most}"
    on_launch(self, args, sizes, options, bound)


JITFunction.run = run
