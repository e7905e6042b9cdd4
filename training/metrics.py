"""What a run says while it goes: metrics.jsonl, the progress bar, and wandb where it is asked for.

Nothing here may slow the loop down: a step's numbers are copied to the host while the device goes
on, and read when the next step has been launched.
"""

import contextlib
import json
import math
import os
import shutil
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from common.console import format_duration
from common.device import peak_memory
from common.errors import UserError
from common.progress import LINE_SECONDS
from common.remote_names import shown
from common.threads import LEAST_BUSY, OtherLoad
from common.threads import VARIABLE as WAIT_POLICY
from dataset.examples import Example
from distributed import all_gather_object, is_rank0, world_size
from flags import Flags, as_dict
from objectives import Losses, StepTotals
from planning.memory import PEAK_FLOPS
from training.state import TrainState

# After so many steps in a row without a finite loss or gradient a run ends.
MAX_SKIPPED_IN_A_ROW = 10
# A run is slow where the median of so many steps is under this share of the median of all of them.
SLOW_STEPS = 5
SLOW_SHARE = 0.6
# How many examples of such a step the error names; bad_batch.jsonl has them all.
NAMED_EXAMPLES = 8


class PendingStep(NamedTuple):
    """A step whose numbers are on their way to the host.

    values: loss, gradient norm, and a number for each of `extra_names`.
    examples: of this rank.
    seconds: what the step has taken.
    """

    step: int
    values: "PendingScalars"
    extra_names: list[str]
    lr: float
    totals: StepTotals
    examples: list[Example]
    seconds: float


class NoMetrics:
    """Stands where the loop wants a `MetricsLogger`, for steps of which nothing is reported."""

    def log_step(self, *_) -> None:
        """Takes a step's numbers, and leaves them."""


class MetricsLogger:
    """Writes a line of metrics.jsonl for each step and each evaluation, and moves the progress bar.

    A step's tensors are read when the next step has been launched, so that nothing in the loop
    waits for the device.

    flops: floating point operations a token, for the model FLOPs utilisation (mfu).
    state: is told what was skipped, and how many tokens and seconds the run has had.
    """

    def __init__(
        self, flags: Flags, out: Path, flops: float, device: torch.device, state: TrainState
    ):
        resumed = state.step > 0
        file = out / "metrics.jsonl" if is_rank0() else None
        # A lambda, because the bar is made below.
        self.file = DurableJSONL(file, resumed, lambda line: self.bar.write(line))
        self.wandb = None
        if flags.wandb and is_rank0():
            self.wandb = start_wandb(flags, out, state.wandb)
        if self.wandb:
            state.wandb = self.wandb.id
        self.tensorboard = None
        if flags.tensorboard and is_rank0():
            self.tensorboard = TensorBoardFiles(out, state.step, lambda line: self.bar.write(line))
        self.state = state
        # What the bar says of the newest validation: the score, what was forgotten.
        self.validated = ""
        self.out = out
        self.flops = flops
        self.device = device
        shown = is_rank0() and sys.stderr.isatty()
        self.bar = tqdm(
            total=flags.steps,
            initial=state.step,
            unit="step",
            disable=not shown,
            dynamic_ncols=True,
        )
        # Lines for whom the bar does not reach: every `log_every` steps, or every LINE_SECONDS.
        self.log_every = flags.log_every
        if self.log_every is None and shown:
            self.log_every = 0
        self.first_step = state.step
        self.launched = time.perf_counter()
        self.last_line = self.launched
        self.slowdown = SlowdownWatch(device)
        self.pending: PendingStep | None = None
        # When the newest step had been launched.
        self.last = time.perf_counter()
        self.start = self.last - state.seconds
        # None for a device that is not in the table: mfu is null then.
        chip = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        known_peaks = (peak for name, peak in PEAK_FLOPS.items() if name in chip)
        self.peak_flops = next(known_peaks, None)

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
        scalars = torch.stack([losses.loss, grad_norm, *extra.values()])
        values = PendingScalars(scalars.detach().float())
        # This waits for the step before this one, so the clock below ticks at the device's pace.
        self.flush()
        now = time.perf_counter()
        seconds = now - self.last
        self.pending = PendingStep(step, values, list(extra), lr, totals, examples, seconds)
        self.last = now

    def flush(self) -> None:
        """Writes the line of the step that is pending, if one is.

        Raises UserError after MAX_SKIPPED_IN_A_ROW steps that were skipped.
        """
        if self.pending is None:
            return
        pending = self.pending
        self.pending = None
        state = self.state
        loss, grad_norm, *extra = pending.values.read()
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        problem = f"step {pending.step}: the loss is {loss:g}, the gradient's norm {grad_norm:g}"
        if finite:
            state.skipped_in_a_row = 0
        else:
            state.skipped += 1
            state.skipped_in_a_row += 1
            count = f"{state.skipped_in_a_row} in a row of at most {MAX_SKIPPED_IN_A_ROW}"
            self.bar.write(f"WARNING   {problem}; skipped, {count}")

        tokens = int(pending.totals.num_tokens)
        speed = tokens / pending.seconds
        state.tokens += tokens
        mfu = self.peak_flops
        if self.peak_flops:
            mfu = self.flops * speed / (self.peak_flops * world_size())
        # JSON has no NaN, so what is not finite is null.
        line = {
            "step": pending.step,
            "loss": loss if finite else None,
            "lr": pending.lr,
            "grad_norm": grad_norm if finite else None,
            "tokens": tokens,
            "trained_tokens": int(pending.totals.num_trained),
        }
        if not finite:
            line["skipped"] = state.skipped
        line["tokens_per_s"] = speed
        line["mfu"] = mfu
        for name, value in zip(pending.extra_names, extra, strict=True):
            # A mean of no example is no number, and JSON has none for it.
            line[name] = value if finite and math.isfinite(value) else None
        line["seconds"] = time.perf_counter() - self.start
        line["memory_mb"] = peak_memory(self.device) / 1e6
        self.write(line)
        self.bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s{self.validated}")
        self.bar.update()
        slowdown = self.slowdown.note(speed)
        if slowdown and is_rank0():
            self.bar.write(f"NOTE      {slowdown}")
        if self.line_is_due(pending.step):
            left = format_duration(self.seconds_left(pending.step))
            # The loss is that of all trained tokens, and replayed ones may be most of them.
            replay = line.get("replay_loss")
            of_replay = "" if replay is None else f" (of the replay {replay:.4f})"
            penalty = line.get("ewc_penalty")
            of_ewc = "" if penalty is None else f", EWC penalty {penalty:.2g}"
            accuracy = line.get("accuracy")
            right = "" if accuracy is None else f", accuracy {100 * accuracy:.0f} %"
            reward = line.get("reward")
            if reward is not None:
                alike = 100 * (line.get("alike") or 0)
                gap = line.get("sampling_gap") or 0
                right = (
                    f", reward {reward:.3f}, {alike:.0f} % in groups alike, sampling gap {gap:.1g}"
                )
            self.bar.write(
                f"step {pending.step:>5} of {self.bar.total:,}: loss {loss:.4f}{right}{of_replay}{of_ewc},"
                f" {speed:,.0f} tokens/s, {left} left"
            )
        if state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            self.give_up(problem, pending.examples)

    def line_is_due(self, step: int) -> bool:
        """True if a line is to be printed for this step, as --log-every says."""
        if not is_rank0():
            return False
        if self.log_every is not None:
            return self.log_every > 0 and step % self.log_every == 0
        now = time.perf_counter()
        if now - self.last_line < LINE_SECONDS:
            return False
        self.last_line = now
        return True

    def seconds_left(self, step: int) -> float:
        """Returns how long the run goes on after a step, by the pace of this launch so far,
        validations and checkpoints included."""
        elapsed = time.perf_counter() - self.launched
        return elapsed / (step - self.first_step) * (self.bar.total - step)

    def give_up(self, problem: str, examples: list[Example]) -> None:
        """Ends the run: writes a step's examples, of all ranks, to bad_batch.jsonl and names them.

        Raises UserError in any case.
        """
        mine = []
        for example in examples:
            # Lists of Python's own numbers, which can be sent and written.
            ids = np.asarray(example.ids).tolist()
            weights = np.asarray(example.loss_weights, float).tolist()
            mine.append((example.source, ids, weights))

        # By its source each example is there once, also if ranks share a batch. A dummy has none.
        lines = {}
        for examples_of_rank in all_gather_object(mine):
            for source, ids, weights in examples_of_rank:
                if source:
                    lines[source] = {"where": source, "ids": ids, "trained": weights}
        file = self.out / "bad_batch.jsonl"
        if is_rank0():
            text = "".join(json.dumps(line) + "\n" for line in lines.values())
            with contextlib.suppress(OSError):
                file.write_text(text, encoding="utf-8")

        sources = list(lines)
        names = ", ".join(sources[:NAMED_EXAMPLES])
        if len(sources) > NAMED_EXAMPLES:
            names += f" and {len(sources) - NAMED_EXAMPLES} more"
        raise UserError(
            f"{problem}, the {MAX_SKIPPED_IN_A_ROW}th step in a row; stopped. Its examples: {names}"
            f" (in {file}); try a lower --lr"
        )

    def write(self, line: dict) -> None:
        """Appends a line to metrics.jsonl, and gives it to wandb and TensorBoard. line: its keys include
        "step"."""
        self.file.write(json.dumps(line, allow_nan=False) + "\n")
        if self.wandb:
            values = {key: value for key, value in line.items() if key != "step"}
            self.wandb.log(values, step=line["step"])
        if self.tensorboard:
            self.tensorboard.write(line)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A block of work that is no training: no step is charged with its time."""
        self.flush()
        begin = time.perf_counter()
        yield
        self.last += time.perf_counter() - begin

    def sync(self) -> None:
        """Brings all lines to the disk and the run's time into its state, before a checkpoint."""
        self.flush()
        self.file.sync()
        if self.tensorboard:
            self.tensorboard.sync()
        self.state.seconds = time.perf_counter() - self.start

    def close(self) -> None:
        self.flush()
        self.bar.close()
        self.file.close()
        if self.wandb:
            self.wandb.finish()
        if self.tensorboard:
            self.tensorboard.close()


class SlowdownWatch:
    """Notices, once, that the run has become slow since another program takes its cores."""

    def __init__(self, device: torch.device):
        # One thread waits for nobody; and threads that sleep while they wait do so by choice.
        spins = os.environ.get(WAIT_POLICY, "").lower() != "passive"
        self.active = device.type == "cpu" and torch.get_num_threads() > 1 and spins
        self.load = OtherLoad()
        self.steps = 0
        # Of the newest steps.
        self.speeds: deque[float] = deque(maxlen=40 * SLOW_STEPS)

    def note(self, speed: float) -> str:
        """Returns a line where the newest steps are slow and others are busy; else "".

        speed: of the newest step, in tokens/s.
        """
        if not self.active:
            return ""
        self.speeds.append(speed)
        self.steps += 1
        if self.steps % SLOW_STEPS:
            return ""
        busy = self.load.cores()
        usual = statistics.median(self.speeds)
        newest = statistics.median([*self.speeds][-SLOW_STEPS:])
        if newest > SLOW_SHARE * usual or busy < LEAST_BUSY:
            return ""
        self.active = False
        return (
            f"{newest:,.0f} tokens/s, {usual:,.0f} before: others keep {busy:.1f} cores busy while"
            " this run's threads spin as they wait for each other. Ctrl-C, and --resume goes on"
            " with threads that sleep"
        )


class PendingScalars:
    """Numbers of a device that are on their way to the host while the device goes on."""

    def __init__(self, values: torch.Tensor):
        self.values = values
        self.arrived = None
        if values.is_cuda:
            self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.values.copy_(values, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self) -> list[float]:
        """Returns the numbers, and waits for them if need be."""
        if self.arrived:
            # Waits for this copy alone, not for what was launched after it.
            self.arrived.synchronize()
        return self.values.tolist()


class DurableJSONL:
    """A file of lines that a full disk does not end: what can't be written waits in memory.

    path: None for a rank that writes nothing.
    append: keep the lines that are there, those of the run that is resumed.
    print_fn: prints a warning.
    """

    def __init__(self, path: Path | None, append: bool, print_fn: Callable[[str], None]):
        self.path = path
        self.print_fn = print_fn
        self.waiting = b""
        # True after a warning, until something could be written again.
        self.warned = False
        self.file: int | None = None
        # Where the next byte goes. A file descriptor and pwrite, because a write that a full disk
        # cuts short then says how much of it is there.
        self.end = 0
        if path is not None:
            mode = os.O_WRONLY | os.O_CREAT
            if not append:
                mode |= os.O_TRUNC
            self.file = os.open(path, mode, 0o666)
            self.end = os.lseek(self.file, 0, os.SEEK_END)

    def write(self, line: str = "") -> None:
        """Writes what waits and a line, as far as the disk takes them."""
        if self.file is None:
            return
        self.waiting += line.encode()
        try:
            while self.waiting:
                written = os.pwrite(self.file, self.waiting, self.end)
                self.end += written
                self.waiting = self.waiting[written:]
            self.warned = False
        except OSError as error:
            if not self.warned:
                problem = f"{self.path}: {error.strerror}"
                self.print_fn(f"WARNING   {problem}; its lines wait in memory, training goes on")
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


class TensorBoardFiles:
    """The event files in the run's folder, which hold each number of metrics.jsonl at its step.

    step: that of the checkpoint that a resumed run goes on from: what was written after it does not
    count any more. print_fn: prints a warning.
    """

    def __init__(self, out: Path, step: int, print_fn: Callable[[str], None]):
        # It takes seconds, and few runs ask for it.
        from torch.utils.tensorboard import SummaryWriter

        self.folder = out / "tensorboard"
        self.print_fn = print_fn
        purge = step + 1 if step else None
        self.writer: SummaryWriter | None = SummaryWriter(str(self.folder), purge_step=purge)

    def write(self, line: dict) -> None:
        """Writes the numbers of a line of metrics.jsonl; a null, as of a skipped step, has no place."""
        numbers = {name: value for name, value in line.items() if name != "step"}
        for name, value in numbers.items():
            if isinstance(value, int | float):
                self.carry_out(
                    lambda writer, *what: writer.add_scalar(*what), name, value, line["step"]
                )

    def sync(self) -> None:
        """Brings everything to the disk, before a checkpoint."""
        self.carry_out(lambda writer: writer.flush())

    def close(self) -> None:
        self.carry_out(lambda writer: writer.close())

    def carry_out(self, function: Callable, *what) -> None:
        """Calls a function of the writer. A disk that is full ends the event files and not the run."""
        if self.writer is None:
            return
        try:
            function(self.writer, *what)
        except (OSError, RuntimeError) as error:
            self.writer = None
            self.print_fn(
                f"WARNING   {self.folder}: no more is written ({error}); training goes on"
            )


def start_wandb(flags: Flags, out: Path, run_id: str | None = None):
    """Starts a wandb run and returns it. run_id: of the run that is resumed.

    Raises UserError with wandb's own complaint; a folder that was made for this run is removed.
    """
    import wandb

    fresh = not (out / "wandb").exists()
    settings: dict = {}
    if run_id:
        settings = {"id": run_id, "resume": "allow"}
    if any(word and shown(word) != word for word in (*flags.data, *flags.replay, flags.val)):
        # wandb would send the command line, which holds the secret of a URL.
        settings["settings"] = wandb.Settings(x_disable_meta=True)
    try:
        return wandb.init(project=flags.wandb, config=as_dict(flags), dir=str(out), **settings)
    except wandb.errors.Error as error:
        if fresh:
            # Nothing half-written stays.
            shutil.rmtree(out / "wandb", ignore_errors=True)
            if run_id is None:
                (out / "metrics.jsonl").unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                out.rmdir()
        raise UserError(f"--wandb {flags.wandb}: {error} Or set WANDB_MODE=offline") from None
