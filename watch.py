"""Between the steps: validation, what is kept of a run (best/, final/, checkpoints), when it stops, and how it goes on.

The folder of a run, --out, is made, emptied or taken up here. What a checkpoint holds and how it is read: resume.py.
"""

import contextlib
import dataclasses
import itertools
import math
import shlex
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import checkpoint
import distributed
import lora
import optimizers
import resume
from data import batches_by_length
from errors import UserError, reason
from examples import Dataset
from flags import Flags
from log import Log
from model import Transformer, evaluating
from objectives import mean_loss
from order import Stream
from tokenizer import Tokenizer

SAVE_SECONDS = 1800  # between checkpoints, at most
# what a run writes
RUN = ("config.json", "loss.png", "trace.json", "bad_batch.jsonl", "best", "final", "wandb", "checkpoints")
RUN = (*RUN, "metrics.jsonl")  # the last to go: by it a run is known
REMEMBERED = ("first", "last", "best", "since_best", "kept")  # of a Watch, in checkpoints


@dataclass
class Watch:
    """Validation before, during and after the training: what is best so far, and when to stop."""

    model: Transformer
    steppers: list
    val: Dataset
    replay_val: Dataset | None
    stream: Stream
    flags: Flags
    log: Log
    keep: Callable[[str], None]  # writes the model under this name
    saver: resume.Saver
    base: dict  # what the run is made from, by hashes
    device: torch.device
    most: int | None = None  # tokens of a batch that validates
    done: int = 0  # steps
    first: float = math.nan  # the loss before the training
    last: float = math.nan
    best: float = math.inf
    since_best: int = 0  # validations
    kept: bool = False  # is there a best/
    interrupted: int = 0  # by which signal

    def after_step(self, done: int, asked: int = 0) -> bool:
        """Validates and saves where it is due after so many steps, or a signal asks for it; True stops the training."""
        every, end = self.flags.eval_every, done == self.flags.steps
        validated = bool(len(self.val)) and (end or bool(every and done % every == 0))
        stop = validated and self.validate(done)
        asked = asked or (self.log.stop.asked if distributed.size() == 1 else 0)
        due = bool(self.flags.save_every) and done % self.flags.save_every == 0
        if (due or asked) and 0 < done < self.flags.steps and not stop:
            self.checkpoint(done, validated)
        if asked and 0 < done < self.flags.steps:
            self.interrupted = self.log.stop.asked or signal.SIGTERM  # asked is a sum over processes
            self.saver.wait()
            since = f", from {self.saver.newest}" if self.saver.newest != f"step-{done}" else ""
            goes_on = f"python train.py --out {shlex.quote(self.flags.out)} --resume goes on{since}"
            self.log.bar.write(f"stopped   after step {done}; {goes_on if self.saver.newest else 'nothing is saved'}")
            return True
        return stop

    def checkpoint(self, done: int, validated: bool) -> None:
        paused = self.log.pause()
        stream, mine = self.stream, {name: getattr(self, name) for name in REMEMBERED}
        state = self.log.state(done) | {
            "position": [stream.epoch, stream.window, stream.row],
            "val_loss": self.last if validated else None,
            "watch": {name: value if math.isfinite(value) else None for name, value in mine.items()},
            "random": distributed.gathered(resume.random_state()),
            "processes": distributed.hands(),  # among which rows are dealt; "random" has one of each process
            "flags": dataclasses.asdict(self.flags),
            "torch": torch.__version__,
            **self.base,
        }
        with distributed.patient():
            self.saver.save(state, resume.tensors_of(self.model, self.steppers))
        self.log.go_on(paused)

    def go_on(self, found: resume.Found) -> None:
        """Takes up where the checkpoint was made."""
        state, stream = found.state, self.stream
        resume.read(found, self.model, self.steppers)
        for name, value in state["watch"].items():
            setattr(self, name, value if value is not None else getattr(Watch, name))
        stream.epoch, stream.window, stream.row = state["position"]
        self.done, self.saver.newest = state["step"], found.folder.name
        if len(state["random"]) == distributed.size():
            resume.set_random_state(state["random"][distributed.rank()])
        else:
            torch.manual_seed(self.flags.seed + self.done)

    def validate(self, done: int) -> bool:
        end = done == self.flags.steps
        paused = self.log.pause()
        with eagerly(self.flags):
            self.last = validate(self.model, self.val, self.device, self.most)
            replay = validate(self.model, self.replay_val, self.device, self.most) if self.replay_val else None
        if not math.isfinite(self.last):
            raise UserError(f"step {done}: the validation loss is {self.last:g}; stopped, try a lower --lr")
        self.log.write({"step": done, "val_loss": self.last} | ({} if replay is None else {"replay_val_loss": replay}))
        said = "" if replay is None else f", of the replay {replay:.4f}"
        self.log.bar.write(f"step {done:>5}: validation loss {self.last:.4f}{said}")
        better = self.last < self.best
        self.since_best = 0 if better else self.since_best + 1
        self.best = min(self.best, self.last)
        if done == 0:
            self.first = self.last  # of what was there before: nothing to keep
        elif better:
            try:
                with distributed.patient():
                    self.keep("best")
                self.kept = True
            except OSError as error:
                older = "; the one before it stays" if self.kept else ""
                why = reason(error, self.flags.out)
                self.log.bar.write(f"WARNING   best/ was not written: {why}{older}; training goes on")
        self.log.go_on(paused)
        stop = bool(self.flags.patience) and self.since_best >= self.flags.patience and not end
        if stop:
            self.log.bar.write(f"stopped   {self.since_best} validations without a new best (--patience)")
        return stop

    def verdict(self) -> str:
        """Which of best and final is the one to use; says so where the end is not the best of the run."""
        if self.first <= self.best:
            print(f"WARNING   no validation was better than the {self.first:.4f} before training; try a lower --lr")
        if not (self.kept and self.best < self.last):
            return "final"
        print(f"          best/ has validation loss {self.best:.4f}, final/ {self.last:.4f}")
        return "best"


def eagerly(flags: Flags):
    """Without compiled blocks: for work whose graphs would not pay, or whose shapes would each be compiled."""
    return torch.compiler.set_stance("force_eager") if flags.compile == "on" else contextlib.nullcontext()


def validate(model: Transformer, val: Dataset, device: torch.device, most: int | None = None) -> float:
    with evaluating(model):
        hands = distributed.hands(), distributed.hand()
        loss = mean_loss(model, batches_by_length(val, 8, device, *hands, distributed.context, most))
    if distributed.sharded(model):
        model.reshard()  # what is around the blocks waits for a backward, which does not come
    return loss


def save(model: Transformer, tokenizer: Tokenizer, flags: Flags, folder: Path, base: dict, stored: torch.dtype) -> None:
    """`final/` and `best/`: a Hugging Face folder, or a PEFT adapter folder with the tokenizer and template it was
    trained with; beside it plaintune.json, which names the base and its weights' hash."""

    def also(aside: Path) -> None:
        if flags.method != "full":  # save_model carries them over by itself
            checkpoint.copy_tokenizer(tokenizer.source, aside)
        tokenizer.save_template(aside)
        checkpoint.write_json({**base, "method": flags.method, "quant": flags.quant}, aside / "plaintune.json")

    if flags.method == "full":
        checkpoint.save_model(model, folder, stored, also)
    else:
        lora.save_adapter(model, folder, also)


def choose_saves(flags: Flags, model: Transformer, out: Path, seconds: float) -> str:
    """Fills in --save-every where it is open, sees to it that the disk has room, and returns a line about it. seconds:
    that the run is expected to take."""
    asked = flags.save_every is not None
    if not asked:
        often = SAVE_SECONDS * flags.steps / max(seconds, 1)
        flags.save_every = max(1, min(math.ceil(flags.steps / 5), int(often)))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    state = trained * (4 if flags.weights == "fp32" else 2) + trained * optimizers.state_bytes(flags.optimizer)
    state += 4 * trained * flags.optimizer_offload
    made = 4 * trained if flags.lora else 2 * model.size  # best/ and final/
    many = flags.keep + 2  # the best one, and the one that is being written

    def check() -> int:
        every = flags.save_every
        if not asked and shutil.disk_usage(out).free < many * state + 3 * made:
            every = 0
        size, what = (many * state + 3 * made, f"{many} checkpoints, best/ and final/") if every else (0, "")
        resume.check_room(out, size or 3 * made, what or "best/ and final/")
        return every

    try:
        flags.save_every = distributed.by_first(check)
    except UserError:
        with contextlib.suppress(OSError):
            out.rmdir()  # if it is new
        raise
    if not flags.save_every:
        why = f", the disk has no room for {many} of {resume.amount(state)}"
        return "no checkpoints" + why * (not asked)
    return f"a checkpoint of {resume.amount(state)} every {flags.save_every:,} steps; the last {flags.keep} are kept"


def pick_up(flags: Flags) -> resume.Found | None:
    """The checkpoint that --resume goes on from, whose flags it takes; a run that is complete has none left to do; None
    where --resume auto is to begin."""
    out = Path(flags.out)
    if distributed.by_first((out / "final").is_dir):
        print(f"complete  {out} has ended; its outcome is {out / 'final'}")
        return resume.Found(out, {}, [], complete=True)
    found = distributed.by_first(lambda: resume.newest(out))
    if found is None and flags.resume == "on":
        raise UserError(f"--resume: no checkpoint under {out / resume.FOLDER}; --resume auto would begin")
    if found is None:
        print(f"resume    nothing to go on from under {out}; beginning")
        flags.resume = None
        return None
    resume.take_layout(flags, flags.given, found.state)
    distributed.share_batches(flags.context_parallel)
    for line in found.notes + resume.take_flags(flags, flags.given, found.state, found.folder):
        print(f"NOTE      {line}")
    return found


def run_folder(flags: Flags, found: resume.Found | None = None) -> Path:
    """The folder of the run: a new one, or --out, from which is taken what an earlier run wrote; if this one goes on
    from a checkpoint, only what was written after it."""
    if found:
        out = Path(flags.out)
        for folder in (out, out / resume.FOLDER):
            resume.clear_leftovers(folder)
        for folder in resume.steps(out / resume.FOLDER):
            if resume.step_of(folder) > found.state["step"]:  # a damaged one
                resume.remove(folder)
        resume.truncate_metrics(out / "metrics.jsonl", found.state["step"])
        return out
    if flags.out is None:
        Path("runs").mkdir(exist_ok=True)
        for number in itertools.count(1):
            out = Path("runs") / (time.strftime(f"%Y%m%d-%H%M%S-{flags.method}") + f"-{number}" * (number > 1))
            with contextlib.suppress(FileExistsError):  # of a run that began in the same second
                out.mkdir()
                flags.out = str(out)
                return out
    out = Path(flags.out)
    out.mkdir(parents=True, exist_ok=True)
    resume.clear_leftovers(out)
    for path in (out / name for name in RUN):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return out
