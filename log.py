"""What a run says while it goes: metrics.jsonl, the progress bar, and wandb where it is asked for."""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Self

import numpy as np
import torch
from tqdm import tqdm

import report
from distributed import gathered, is_first, size
from errors import UserError
from examples import Example
from flags import Flags
from plan import PEAK_FLOPS

MOST_IN_A_ROW = 10  # steps without a finite loss, before a run ends
SIGNALS = (signal.SIGTERM, signal.SIGINT)
TWICE = 1.0  # seconds in which signals count as one


class Log:
    """metrics.jsonl, the progress bar and wandb. A step's tensors are read when the next step has been launched, so
    that nothing waits for the device."""

    def __init__(self, flags: Flags, out: Path, flops: float, device: torch.device, state: dict | None = None):
        """state: of a run that goes on, what `state` returned."""
        begun = state or {"step": 0, "tokens": 0, "seconds": 0.0, "skipped": 0, "in_a_row": 0}
        self.lines = Lines(
            out / "metrics.jsonl" if is_first() else None, bool(state), lambda line: self.bar.write(line)
        )
        self.wandb = start_wandb(flags, out, begun.get("wandb")) if flags.wandb and is_first() else None
        self.out, self.stop, self.skipped, self.in_a_row = out, Stop(), begun["skipped"], begun["in_a_row"]
        shown = is_first() and sys.stderr.isatty()
        self.bar = tqdm(total=flags.steps, initial=begun["step"], unit="step", disable=not shown, dynamic_ncols=True)
        self.waiting, self.tokens, self.last = None, begun["tokens"], time.perf_counter()
        self.start, self.flops, self.device = self.last - begun["seconds"], flops, device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak = next((peak for chip, peak in PEAK_FLOPS.items() if chip in name), None)

    def step(self, step, loss, norm, rate, tokens: int, trained: int, examples: list[Example], more: dict) -> None:
        values = Later(torch.stack([loss, norm, *more.values()]).detach().float())
        self.flush()  # waits for the step before this one, so the clock below ticks at the device's pace
        now = time.perf_counter()
        self.waiting = (step, values, [*more], rate, tokens, trained, examples, now - self.last)
        self.last = now

    def flush(self) -> None:
        if self.waiting is None:
            return
        (step, values, names, rate, tokens, trained, examples, seconds), self.waiting = self.waiting, None
        loss, norm, *more = values.read()
        fine = math.isfinite(loss) and math.isfinite(norm)
        self.in_a_row = 0 if fine else self.in_a_row + 1
        if not fine:
            self.skipped += 1
            said = f"step {step}: the loss is {loss:g}, the gradient's norm {norm:g}"
            self.bar.write(f"WARNING   {said}; skipped, {self.in_a_row} in a row of at most {MOST_IN_A_ROW}")
        speed, total = tokens / seconds, time.perf_counter() - self.start
        self.tokens += tokens
        line = {"step": step, "loss": loss if fine else None, "lr": rate, "grad_norm": norm if fine else None}
        line |= {"tokens": tokens, "trained_tokens": trained} | ({} if fine else {"skipped": self.skipped})
        line |= {"tokens_per_s": speed, "mfu": self.peak and self.flops * speed / (self.peak * size())}
        line |= {name: value if fine else None for name, value in zip(names, more, strict=True)}
        self.write(line | {"seconds": total, "memory_mb": report.peak_memory(self.device) / 1e6})
        self.bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s")
        self.bar.update()
        if self.in_a_row >= MOST_IN_A_ROW:
            self.give_up(said, examples)

    def give_up(self, said: str, examples: list[Example]) -> None:
        """Names a step's examples, of all processes, writes them down and ends the run."""
        mine = [[e.where, np.asarray(e.ids).tolist(), np.asarray(e.trained, float).tolist()] for e in examples]
        found = [dict(zip(("where", "ids", "trained"), e)) for part in gathered(mine) for e in part if e[0]]
        found = list({e["where"]: e for e in found}.values())  # several processes may share a batch
        file = self.out / "bad_batch.jsonl"
        if is_first():
            with contextlib.suppress(OSError):
                file.write_text("".join(json.dumps(e) + "\n" for e in found), encoding="utf-8")
        named = ", ".join(e["where"] for e in found[:8]) + f" and {len(found) - 8} more" * (len(found) > 8)
        raise UserError(f"{said}, the {MOST_IN_A_ROW}th step in a row; stopped. Its examples: {named} (in {file});"
                        " try a lower --lr")  # fmt: skip

    def write(self, line: dict) -> None:
        self.lines.write(json.dumps(line, allow_nan=False) + "\n")
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
        self.lines.sync()
        counted = {"tokens": self.tokens, "skipped": self.skipped, "in_a_row": self.in_a_row}
        counted |= {"wandb": self.wandb.id} if self.wandb else {}
        return {"step": step, "seconds": time.perf_counter() - self.start} | counted

    def close(self) -> None:
        self.flush()
        self.bar.close()
        self.lines.close()
        if self.wandb:
            self.wandb.finish()


class Later:
    """Numbers of a device that are on their way to the host while it goes on."""

    def __init__(self, values: torch.Tensor):
        self.values, self.there = values, None
        if values.is_cuda:
            self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.values.copy_(values, non_blocking=True)
            self.there = torch.cuda.Event()
            self.there.record()

    def read(self) -> list[float]:
        if self.there:
            self.there.synchronize()  # with this copy, not with what was launched after it
        return self.values.tolist()


class Lines:
    """A file of lines that a full disk does not end: what can't be written waits in memory. path: None for nothing."""

    def __init__(self, path: Path | None, go_on: bool, say):
        self.say, self.waiting, self.told = say, b"", False
        flags = os.O_WRONLY | os.O_CREAT | (0 if go_on else os.O_TRUNC)
        self.file = None if path is None else os.open(path, flags, 0o666)
        self.path, self.end = path, 0 if self.file is None else os.lseek(self.file, 0, os.SEEK_END)

    def write(self, line: str = "") -> None:
        if self.file is None:
            return
        self.waiting += line.encode()
        try:
            while self.waiting:
                written = os.pwrite(self.file, self.waiting, self.end)
                self.end, self.waiting = self.end + written, self.waiting[written:]
            self.told = False
        except OSError as error:
            if not self.told:
                self.say(f"WARNING   {self.path}: {error.strerror}; its lines wait in memory, training goes on")
            self.told = True

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
            self.say(f"WARNING   {self.path}: its last lines were not written")


class Stop:
    """While it is entered, SIGTERM and SIGINT ask for an end after the step at hand; a second one ends at once. Their
    bytes are read by a thread, for the main one may be waiting for another process, where it hears of no signal."""

    def __init__(self):
        self.asked, self.since = 0, 0.0

    def __enter__(self) -> Self:
        self.mine = threading.current_thread() is threading.main_thread()
        if not self.mine:
            return self
        self.read, self.sent = os.pipe()
        os.set_blocking(self.sent, False)
        self.wakeup = signal.set_wakeup_fd(self.sent, warn_on_full_buffer=False)
        self.before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        threading.Thread(target=self.listen, daemon=True).start()
        return self

    def listen(self) -> None:
        while received := os.read(self.read, 1):
            number, now = received[0], time.monotonic()
            if number not in SIGNALS:
                continue
            if not self.asked:
                self.asked, self.since = number, now
                if is_first():
                    os.write(2, b"\nstopping  after this step, with a checkpoint; once more to stop at once\n")
            elif now - self.since > TWICE:  # torchrun passes on what the terminal has sent already
                os._exit(128 + number)
        os.close(self.read)

    def __exit__(self, *_) -> None:
        if not self.mine:
            return
        for number, handler in self.before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.wakeup)
        os.close(self.sent)  # which ends the thread


def start_wandb(flags: Flags, out: Path, number: str | None = None):
    """The wandb run, whose complaints become one line. number: of a run that goes on."""
    import wandb

    fresh = not (out / "wandb").exists()
    try:
        settings = {"id": number, "resume": "allow"} if number else {}
        return wandb.init(project=flags.wandb, config=dataclasses.asdict(flags), dir=str(out), **settings)
    except wandb.errors.Error as error:
        if fresh:  # nothing half-written
            shutil.rmtree(out / "wandb", ignore_errors=True)
            for file in (out / "metrics.jsonl",) * (number is None):
                file.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                out.rmdir()
        raise UserError(f"--wandb {flags.wandb}: {error} Or set WANDB_MODE=offline") from None
