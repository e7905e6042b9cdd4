"""What a run says while it goes: metrics.jsonl, the progress bar, and wandb where it is asked for."""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import report
from distributed import is_first
from errors import UserError
from examples import Example
from flags import Flags

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # dense bf16, published


class Log:
    """metrics.jsonl, the progress bar and wandb. A step's tensors are read when the next step has been launched, so
    that nothing waits for the device."""

    def __init__(self, flags: Flags, out: Path, flops: float, device: torch.device, state: dict | None = None):
        """state: of a run that goes on, what `state` returned."""
        self.wandb = start_wandb(flags, out) if flags.wandb and is_first() else None
        path = out / "metrics.jsonl" if is_first() else os.devnull
        mode, begun = ("a", state) if state else ("w", {"step": 0, "tokens": 0, "seconds": 0.0})
        self.file = open(path, mode, encoding="utf-8", buffering=1)  # noqa: SIM115 (open all the while)
        shown = is_first() and sys.stderr.isatty()
        self.bar = tqdm(total=flags.steps, initial=begun["step"], unit="step", disable=not shown, dynamic_ncols=True)
        self.waiting, self.tokens, self.last = None, begun["tokens"], time.perf_counter()
        self.start, self.flops, self.device = self.last - begun["seconds"], flops, device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak = next((peak for chip, peak in PEAK_FLOPS.items() if chip in name), None)

    def step(self, step, loss, norm, rate, tokens: int, trained: int, examples: list[Example], more: dict) -> None:
        self.flush()  # waits for the step before this one, so the clock below ticks at the device's pace
        now = time.perf_counter()
        self.waiting = (step, loss, norm, rate, tokens, trained, examples, more, now - self.last)
        self.last = now

    def flush(self) -> None:
        if self.waiting is None:
            return
        (step, loss, norm, rate, tokens, trained, examples, more, seconds), self.waiting = self.waiting, None
        loss, norm = float(loss), float(norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise UserError(
                f"step {step}: the loss is {loss:g}, the gradient's norm {norm:g}; stopped. Its examples:"
                f" {', '.join(e.where for e in examples[:8])}; try a lower --lr"
            )
        speed, total = tokens / seconds, time.perf_counter() - self.start
        self.tokens += tokens
        line = {"step": step, "loss": loss, "lr": rate, "grad_norm": norm, "tokens": tokens, "trained_tokens": trained}
        line |= {"tokens_per_s": speed, "mfu": self.peak and self.flops * speed / self.peak}
        line |= {name: float(value) for name, value in more.items()}
        self.write(line | {"seconds": total, "memory_mb": report.peak_memory(self.device) / 1e6})
        self.bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s")
        self.bar.update()

    def write(self, line: dict) -> None:
        self.file.write(json.dumps(line, allow_nan=False) + "\n")
        if self.wandb:
            self.wandb.log({key: value for key, value in line.items() if key != "step"}, step=line["step"])

    def pause(self) -> float:
        """Call before work that is no training; give what it returns to `go_on`, so that no step is charged with it."""
        self.flush()
        return time.perf_counter()

    def go_on(self, paused_at: float) -> None:
        self.last += time.perf_counter() - paused_at

    def state(self, step: int) -> dict:
        """After so many steps: what is counted. Their lines are on the disk then."""
        self.flush()
        if is_first():
            os.fsync(self.file.fileno())
        return {"step": step, "tokens": self.tokens, "seconds": time.perf_counter() - self.start}

    def close(self) -> None:
        self.flush()
        self.bar.close()
        self.file.close()
        if self.wandb:
            self.wandb.finish()


def start_wandb(flags: Flags, out: Path):
    """The wandb run, whose complaints become one line."""
    import wandb

    try:
        return wandb.init(project=flags.wandb, config=dataclasses.asdict(flags), dir=str(out))
    except wandb.errors.Error as error:
        shutil.rmtree(out / "wandb", ignore_errors=True)
        with contextlib.suppress(OSError):
            out.rmdir()
        raise UserError(f"--wandb {flags.wandb}: {error} Or set WANDB_MODE=offline") from None
