"""--profile N: the first N steps under torch.profiler."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from distributed import is_rank0


@contextlib.contextmanager
def profiled(steps: int, device: torch.device, out: Path) -> Iterator[None]:
    """A block whose most expensive operations are printed, and written to trace.json.

    steps: how many optimizer steps the block has, for the message.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        yield
    # An operation's own time, without that of the operations it calls.
    sort_by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=sort_by, row_limit=25))
    if is_rank0():
        trace = out / "trace.json"
        profiler.export_chrome_trace(str(trace))
        print(f"profiled  {steps} steps; {trace} opens in chrome://tracing or ui.perfetto.dev")
