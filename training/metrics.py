"""What a run says while it goes: metrics.jsonl, the progress bar, and wandb where it is asked for."""

import contextlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.device import peak_memory
from common.errors import UserError
from dataset.examples import Example
from distributed import all_gather_object, is_rank0, world_size
from flags import Flags, as_dict
from objectives import Losses, StepTotals
from planning.memory import PEAK_FLOPS
from training.state import TrainState

MAX_SKIPPED_IN_A_ROW = 10  # steps without a finite loss, before a run ends


class MetricsLogger:
    """Writes a line of metrics.jsonl for each step and each evaluation, and moves the progress bar.

    A step's tensors are read when the next step has been launched, so that nothing in the loop waits for the device.
    flops: floating point operations a token, for the model FLOPs utilisation (mfu).
    """

    def __init__(
        self, flags: Flags, out: Path, flops: float, device: torch.device, state: TrainState
    ):
        resumed = state.step > 0
        file = out / "metrics.jsonl" if is_rank0() else None
        self.file = DurableJSONL(file, resumed, lambda line: self.bar.write(line))
        self.wandb = start_wandb(flags, out, state.wandb) if flags.wandb and is_rank0() else None
        state.wandb = self.wandb.id if self.wandb else state.wandb
        self.state, self.out, self.flops, self.device = state, out, flops, device
        shown = is_rank0() and sys.stderr.isatty()
        self.bar = tqdm(
            total=flags.steps,
            initial=state.step,
            unit="step",
            disable=not shown,
            dynamic_ncols=True,
        )
        self.pending = None  # the step whose numbers are on their way
        self.last = time.perf_counter()  # when the newest step had been launched
        self.start = self.last - state.seconds
        chip = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak_flops = next((peak for name, peak in PEAK_FLOPS.items() if name in chip), None)

    def log_step(
        self,
        step: int,
        losses: Losses,
        grad_norm: torch.Tensor,
        lr: float,
        totals: StepTotals,
        examples: list[Example],
    ) -> None:
        """Takes a step's numbers; writes those of the step before."""
        extra = losses.extra(totals)
        values = PendingScalars(
            torch.stack([losses.loss, grad_norm, *extra.values()]).detach().float()
        )
        self.flush()  # waits for the step before this one, so the clock below ticks at the device's pace
        now = time.perf_counter()
        self.pending = (step, values, [*extra], lr, totals, examples, now - self.last)
        self.last = now

    def flush(self) -> None:
        """Writes the line of the step that is pending, if one is."""
        if self.pending is None:
            return
        (step, values, names, lr, totals, examples, seconds), self.pending = self.pending, None
        state = self.state
        loss, grad_norm, *extra = values.read()
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        state.skipped_in_a_row = 0 if finite else state.skipped_in_a_row + 1
        problem = f"step {step}: the loss is {loss:g}, the gradient's norm {grad_norm:g}"
        if not finite:
            state.skipped += 1
            count = f"{state.skipped_in_a_row} in a row of at most {MAX_SKIPPED_IN_A_ROW}"
            self.bar.write(f"WARNING   {problem}; skipped, {count}")
        tokens = int(totals.num_tokens)
        speed = tokens / seconds
        state.tokens += tokens
        line = {
            "step": step,
            "loss": loss if finite else None,
            "lr": lr,
            "grad_norm": grad_norm if finite else None,
        }
        line |= {"tokens": tokens, "trained_tokens": int(totals.num_trained)}
        if not finite:
            line["skipped"] = state.skipped
        line["tokens_per_s"] = speed
        line["mfu"] = self.peak_flops and self.flops * speed / (self.peak_flops * world_size())
        line |= {name: value if finite else None for name, value in zip(names, extra, strict=True)}
        line["seconds"] = time.perf_counter() - self.start
        line["memory_mb"] = peak_memory(self.device) / 1e6
        self.write(line)
        self.bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s")
        self.bar.update()
        if state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            self.give_up(problem, examples)

    def give_up(self, problem: str, examples: list[Example]) -> None:
        """Names the examples of a step, of all ranks, writes them to bad_batch.jsonl and ends the run."""
        mine = [
            (
                example.source,
                np.asarray(example.ids).tolist(),
                np.asarray(example.loss_weights, float).tolist(),
            )
            for example in examples
        ]
        gathered = [example for part in all_gather_object(mine) for example in part if example[0]]
        unique = {
            source: (ids, weights) for source, ids, weights in gathered
        }  # ranks may share a batch
        file = self.out / "bad_batch.jsonl"
        lines = [
            {"where": source, "ids": ids, "trained": weights}
            for source, (ids, weights) in unique.items()
        ]
        if is_rank0():
            with contextlib.suppress(OSError):
                file.write_text(
                    "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
                )
        names = [*unique]
        named = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        raise UserError(
            f"{problem}, the {MAX_SKIPPED_IN_A_ROW}th step in a row; stopped. Its examples: {named} (in {file});"
            " try a lower --lr"
        )

    def write(self, line: dict) -> None:
        self.file.write(json.dumps(line, allow_nan=False) + "\n")
        if self.wandb:
            self.wandb.log(
                {key: value for key, value in line.items() if key != "step"}, step=line["step"]
            )

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around work that is no training, so that no step is charged with its time."""
        self.flush()
        begin = time.perf_counter()
        yield
        self.last += time.perf_counter() - begin

    def sync(self) -> None:
        """Brings all lines so far to the disk, and the run's time into its state, before a checkpoint is written."""
        self.flush()
        self.file.sync()
        self.state.seconds = time.perf_counter() - self.start

    def close(self) -> None:
        self.flush()
        self.bar.close()
        self.file.close()
        if self.wandb:
            self.wandb.finish()


class PendingScalars:
    """Numbers of a device that are on their way to the host while the device goes on."""

    def __init__(self, values: torch.Tensor):
        self.values, self.arrived = values, None
        if values.is_cuda:
            self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.values.copy_(values, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self) -> list[float]:
        if self.arrived:
            self.arrived.synchronize()  # with this copy, not with what was launched after it
        return self.values.tolist()


class DurableJSONL:
    """A file of lines that a full disk does not end: what can't be written waits in memory.

    path: None for a rank that writes nothing. append: to the lines of the run that is resumed.
    """

    def __init__(self, path: Path | None, append: bool, print_fn: Callable[[str], None]):
        self.print_fn, self.waiting, self.warned = print_fn, b"", False
        mode = os.O_WRONLY | os.O_CREAT | (0 if append else os.O_TRUNC)
        self.file = None if path is None else os.open(path, mode, 0o666)
        self.path = path
        self.end = 0 if self.file is None else os.lseek(self.file, 0, os.SEEK_END)

    def write(self, line: str = "") -> None:
        if self.file is None:
            return
        self.waiting += line.encode()
        try:
            while self.waiting:
                written = os.pwrite(self.file, self.waiting, self.end)
                self.end, self.waiting = self.end + written, self.waiting[written:]
            self.warned = False
        except OSError as error:
            if not self.warned:
                self.print_fn(
                    f"WARNING   {self.path}: {error.strerror}; its lines wait in memory, training goes on"
                )
            self.warned = True

    def sync(self) -> None:
        if self.file is not None:
            self.write()
            with contextlib.suppress(OSError):
                os.fsync(self.file)

    def close(self) -> None:
        self.sync()
        if self.file is not None:
            os.close(self.file)
            self.file = None
        if self.waiting:
            self.print_fn(f"WARNING   {self.path}: its last lines were not written")


def start_wandb(flags: Flags, out: Path, run_id: str | None = None):
    """The wandb run, whose complaints become one line. run_id: of the run that is resumed."""
    import wandb

    fresh = not (out / "wandb").exists()
    try:
        settings = {"id": run_id, "resume": "allow"} if run_id else {}
        return wandb.init(project=flags.wandb, config=as_dict(flags), dir=str(out), **settings)
    except wandb.errors.Error as error:
        if fresh:  # nothing half-written
            shutil.rmtree(out / "wandb", ignore_errors=True)
            if run_id is None:
                (out / "metrics.jsonl").unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                out.rmdir()
        raise UserError(f"--wandb {flags.wandb}: {error} Or set WANDB_MODE=offline") from None
