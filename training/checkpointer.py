"""The state of a run on disk: one that is killed at any instant goes on as if it had not been.

`--out`/checkpoints/step-N holds

    shard-*.safetensors   trained weights and the optimizer's moments, by
                          torch.distributed.checkpoint: each process writes its rows; fewer or more
                          processes may read them
    state.json            the step, the position in the data, the states of the random generators,
                          flags, losses so far
    manifest.json         each file's SHA-256, written last

A folder is written under another name, synced to the disk and renamed, so it is there whole or not
at all. When it is read, each file's hash is compared; where one differs the folder is left aside,
and the one before it is taken. Nothing is ever unpickled.
"""

import base64
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import distributed
from checkpoint import open_safetensors, read_tensor
from common.errors import UserError, describe_os_error, read_json
from common.files import atomic_file, atomic_folder, file_sha256, utf8_path, write_json
from dataset.sampler import Sampler
from distributed import dtensor_like, is_rank0, is_sharded, to_local
from flags import (
    FORMER_NAMES,
    OPTIONS,
    PER_LAUNCH,
    Flags,
    as_dict,
    check_paths_exist,
    dashed,
    relocate_paths,
    saved_value,
)
from optimizers import dequantize_moment, quantize_moment
from training.state import TrainState

FOLDER, STATE_FILE, MANIFEST = "checkpoints", "state.json", "manifest.json"
# What a run writes. metrics.jsonl is the last to be removed, because by it a run is known.
RUN_FILES = (
    "config.json",
    "added_tokens.txt",
    "loss.png",
    "report.html",
    "trace.json",
    "bad_batch.jsonl",
    "comparison.json",
    "gauge.safetensors",
    "reference.safetensors",
    "validation.safetensors",
    "ewc.safetensors",
    "safety.json",
    "adapter",
    "best",
    "final",
    "wandb",
    "tensorboard",
    FOLDER,
    "metrics.jsonl",
)
# What files.atomic_folder leaves where its process died.
LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<kind>partial|replaced)-\d+")
# So many bytes are written to see whether a disk takes them; beyond, its word is believed.
TRIAL_BYTES = 64 << 20
# For each option whether a resumed run may change it: see `option` in flags.py.
RESUME_RULES = {name: each.metadata.get("resume") for name, each in OPTIONS.items()}
PER_LAUNCH_OPTIONS = {name for name, rule in RESUME_RULES.items() if rule == PER_LAUNCH}
SAFE_TO_CHANGE = {name for name, rule in RESUME_RULES.items() if rule is not None}


@dataclass
class Checkpoint:
    """A whole checkpoint: its folder and its state.json; and what was said about others."""

    folder: Path
    state: dict
    notes: list[str]


# ---- what a checkpoint holds ----


def trainable_state(model: nn.Module, optimizers: list) -> dict[str, Tensor]:
    """Returns all that training changes, by name: `weight NAME`, and `KEY NAME` of optimizer state.

    Tensors of sharded parameters are DTensors. What is cut into blocks within a shard, as moments
    in 8 bits are, has the shard's number in its name as well.
    """
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    tensors = {f"weight {name}": p.detach() for p, name in names.items()}
    for optimizer in optimizers:
        for p, state in optimizer.states():
            for key, value in state.items():
                name = f"{key} {names[p]}"
                if value.dtype == torch.uint8 or key.endswith("_scale"):
                    tensors[f"{name} {shard_name(p)}"] = value
                    continue
                # A scalar, such as the number of steps, is the same on every rank.
                if value.dim() > 0:
                    value = value.view(to_local(p).shape)
                    if is_sharded(p):
                        value = dtensor_like(p, value)
                tensors[name] = value
    return tensors


def shard_name(p: Tensor) -> str:
    """Returns NUMBER/COUNT of this rank's shard of a parameter."""
    count = distributed.num_shards(p)
    number = p.device_mesh.get_local_rank("shard") if count > 1 else 0
    return f"{number}/{count}"


def random_state() -> list[str]:
    """Returns the states of this rank's random generators, of the CPU and of its GPU, as base64."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states.append(torch.cuda.get_rng_state())
    return [base64.b64encode(state.numpy().tobytes()).decode() for state in states]


def set_random_state(states: list[str]) -> None:
    """Puts the generators into the states that `random_state` returned."""
    tensors = []
    for state in states:
        # A bytearray, since torch warns of a tensor over bytes that can't be written to.
        buffer = bytearray(base64.b64decode(state))
        tensors.append(torch.frombuffer(buffer, dtype=torch.uint8))
    torch.set_rng_state(tensors[0])
    if torch.cuda.is_available() and len(tensors) > 1:
        torch.cuda.set_rng_state(tensors[1])


def data_digest(*parts) -> str:
    """Returns the SHA-256 of arrays, and of whatever else decides which examples come when."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.tobytes() if hasattr(part, "tobytes") else repr(part).encode())
    return digest.hexdigest()


# ---- writing ----


class Checkpointer:
    """Saves the whole state of a run every `save_every` steps, and restores it in a resumed run.

    origin: what the run is made from, by hashes (run_folder.identify_run).
    print_fn: prints what a user must know.
    """

    def __init__(
        self,
        settings: Flags,
        out: Path,
        model: nn.Module,
        optimizers: list,
        sampler: Sampler,
        origin: dict,
        print_fn: Callable[[str], None],
    ):
        self.settings = settings
        self.out = out
        self.model = model
        self.optimizers = optimizers
        self.sampler = sampler
        self.origin = origin
        # Now, for a file that is named may be moved or deleted while the run goes on.
        self.flags = as_dict(settings)
        self.directory = os.getcwd()
        self.writer = CheckpointWriter(out, settings.keep, settings.save_async, print_fn)

    @property
    def newest(self) -> str | None:
        """The name of the newest whole checkpoint."""
        return self.writer.newest

    def due(self, state: TrainState) -> bool:
        """True every --save-every steps, and at the end, from where a run can be prolonged."""
        every = self.settings.save_every
        if not every:
            return False
        return state.step % every == 0 or state.step >= self.settings.steps

    def save(self, state: TrainState) -> None:
        """Writes a checkpoint of this step. All ranks call it."""
        sampler = self.sampler
        stored = state.as_dict()
        stored["position"] = [sampler.epoch, sampler.window, sampler.row]
        stored["random"] = distributed.all_gather_object(random_state())
        # Into how many parts the rows of a step are split. The ranks are as many as "random" has.
        stored["processes"] = distributed.dp_size()
        stored["flags"] = self.flags
        stored["directory"] = self.directory
        stored["torch"] = torch.__version__
        stored |= self.origin
        with distributed.extended_timeout():
            self.writer.save(stored, trainable_state(self.model, self.optimizers))

    def restore(self, found: Checkpoint, state: TrainState) -> None:
        """Gives model, optimizers, sampler and random generators what the checkpoint holds."""
        stored = found.state
        sampler = self.sampler
        read_checkpoint(found, self.model, self.optimizers)
        sampler.epoch, sampler.window, sampler.row = stored["position"]
        self.writer.newest = found.folder.name
        steps_before = stored["flags"]["steps"]
        if steps_before != self.settings.steps:
            state.earlier_ends.append(steps_before)
        if len(stored["random"]) == distributed.world_size():
            set_random_state(stored["random"][distributed.rank()])
        else:
            # On another number of ranks their states fit none, so each begins anew.
            torch.manual_seed(self.settings.seed + state.step)

    def wait(self) -> None:
        self.writer.wait()


class CheckpointWriter:
    """Writes checkpoints and removes old ones; a disk that is full ends no training.

    keep: how many checkpoints stay, besides the best one.
    asynchronous: a thread writes a copy while the training goes on; the next one, and the end, wait
        for it.
    print_fn: prints what a user must know.
    """

    def __init__(self, out: Path, keep: int, asynchronous: bool, print_fn: Callable[[str], None]):
        self.folder = out / FOLDER
        self.keep = keep
        self.print_fn = print_fn
        self.newest: str | None = None  # the name of the newest whole checkpoint
        self.thread: threading.Thread | None = None  # that writes
        self.failed: str | None = None  # why the newest could not be written
        self.broken: BaseException | None = None  # what the thread ended with
        self.asynchronous = asynchronous
        self.group = None
        if asynchronous and distributed.world_size() > 1:
            # A group of its own, since its messages must not mix with those of the training in
            # another thread.
            self.group = distributed.new_group(backend="gloo")

    def save(self, state: dict, tensors: dict[str, Tensor]) -> None:
        """Writes a checkpoint. All ranks call it, after the same step. state: of state.json."""
        self.wait()
        if not self.asynchronous:
            self.write(state, tensors)
            self.wait()
            return
        copies = {name: copy_to_host(tensor) for name, tensor in tensors.items()}
        self.thread = threading.Thread(
            target=self.write_in_thread, args=(state, copies), daemon=True
        )
        self.thread.start()

    def write_in_thread(self, state: dict, tensors: dict[str, Tensor]) -> None:
        """Writes a checkpoint, and keeps any error for `wait`."""
        try:
            self.write(state, tensors)
        except BaseException as error:  # noqa: BLE001 (the training's thread raises it)
            self.broken = error

    def wait(self) -> None:
        """Waits for a write that is under way, and prints why it failed if it did."""
        if self.thread:
            self.thread.join()
        if self.broken:
            raise self.broken
        if self.failed:
            older = f"; {self.newest} is the newest that is whole" if self.newest else ""
            self.print_fn(f"WARNING   no checkpoint: {self.failed}{older}; training goes on")
        self.thread = self.failed = None

    def write(self, state: dict, tensors: dict[str, Tensor]) -> None:
        """Writes a checkpoint under another name, renames it, and removes old ones.

        An OSError is kept for `wait`.
        """
        name = f"step-{state['step']}"
        group = self.group
        new_folder = atomic_folder(self.folder / name, replace=True)
        try:
            with distributed.rank0_context(new_folder, group) as tmp:
                # Every rank writes its shards into the folder that rank 0 has made.
                path = Path(distributed.broadcast_object(str(tmp), group))
                write_shards(tensors, path, group)
                with distributed.synced_errors(group):
                    mine = hashes_of_own_shards(path)
                hashes: dict[str, str] = {}
                for part in distributed.all_gather_object(mine, group):
                    hashes |= part
                # Rank 0 alone has `tmp`, and completes it.
                if tmp:
                    check_all_files_are_there(tmp, hashes)
                    write_json(state, tmp / STATE_FILE)
                    hashes[STATE_FILE] = file_sha256(tmp / STATE_FILE)
                    write_json(hashes, tmp / MANIFEST)
            self.newest = name
            if is_rank0():
                self.prune(state["step"])
        except OSError as error:
            self.failed = describe_os_error(error, self.folder)

    def prune(self, step: int) -> None:
        """Removes all but the newest `keep` checkpoints and the one with the best validation.
        step: of the checkpoint that was written just now."""
        folders = [path for path in list_checkpoints(self.folder) if step_of(path) <= step]
        best = None
        lowest = None
        for path in folders:
            badness = stored_badness(path)
            # The oldest of equally good ones stays.
            if badness is not None and (lowest is None or badness < lowest):
                best = path
                lowest = badness
        for path in folders[: -self.keep]:
            if path != best:
                remove_checkpoint(path)


def hashes_of_own_shards(folder: Path) -> dict[str, str]:
    """Returns {file name: SHA-256} of the files that this rank has written."""
    # torch.distributed.checkpoint counts ranks from 1 in these names.
    own_files = folder.glob(f"shard-{distributed.rank() + 1:05}-*")
    return {file.name: file_sha256(file) for file in own_files}


def check_all_files_are_there(folder: Path, hashes: dict[str, str]) -> None:
    """Raises OSError if this machine does not see a file that a rank has written into `folder`."""
    missing = sorted(name for name in hashes if not (folder / name).is_file())
    if missing:
        problem = f"{missing[0]} is missing, not all machines see this folder"
        raise OSError(0, problem, str(folder))


def remove_checkpoint(folder: Path) -> None:
    """Removes a checkpoint. If this is interrupted, the folder is whole or has another name."""
    tmp = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    with contextlib.suppress(OSError):
        folder.rename(tmp)
    shutil.rmtree(tmp, ignore_errors=True)


def stored_badness(folder: Path) -> tuple[float, float] | None:
    """Returns by what a checkpoint's weights are ranked, the lowest being the best: the score of
    --eval-metric below 0 where there is one, then the validation loss.

    None where they were not validated; also of a damaged one, and of one that has forgotten more than
    --forget-limit allows.
    """
    try:
        state = read_json(folder / STATE_FILE)
    except (UserError, OSError):
        return None
    loss = state.get("val_loss")
    if loss is None or state.get("over_forget_limit"):
        return None
    return -state.get("val_score", 0.0), loss


def copy_to_host(tensor: Tensor) -> Tensor:
    """Returns a copy in the host's memory, sharded as the tensor is."""
    mine = to_local(tensor).detach().to("cpu", copy=True)
    return dtensor_like(tensor, mine) if is_sharded(tensor) else mine


def distributed_checkpoint():
    """Returns the module torch.distributed.checkpoint, whose import takes half a second."""
    import torch.distributed.checkpoint as dcp

    # Without a process group it warns that it writes for one process, which is what is meant.
    warnings.filterwarnings("ignore", "torch.distributed is disabled")
    return dcp


def write_shards(tensors: dict[str, Tensor], folder: Path, group) -> None:
    """Writes this rank's part of the tensors.

    All ranks call it, and an OSError of one is raised on all.

    group: the process group that they talk through.
    """
    dcp = distributed_checkpoint()
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    alone = not dist.is_initialized()
    try:
        dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=alone)
    # It holds the errors of all ranks. torch derives it from BaseException.
    except dcp.api.CheckpointException as error:
        for cause in error.failures.values():
            # torch gives an error alone, or with its traceback.
            if isinstance(cause, tuple):
                cause = cause[0]
            if isinstance(cause, OSError):
                raise OSError(cause.errno, cause.strerror, cause.filename or str(folder)) from None
        raise


def list_checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints under a folder, the oldest first."""
    checkpoints = []
    for path in folder.glob("step-*"):
        if re.fullmatch(r"step-\d+", path.name) and path.is_dir():
            checkpoints.append(path)
    return sorted(checkpoints, key=step_of)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def clear_leftovers(folder: Path) -> None:
    """Removes what a process that died was writing; what it was replacing gets its name back."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        match = LEFTOVER.fullmatch(path.name)
        if match is None:
            continue
        if match["kind"] == "replaced" and not (folder / match["name"]).exists():
            path.rename(folder / match["name"])
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def format_bytes(size: float) -> str:
    """Returns a size in bytes as GB or MB."""
    if size >= 1e9:
        return f"{size / 1e9:.1f} GB"
    return f"{size / 1e6:.1f} MB"


def check_disk_space(out: Path, size: float, what: str) -> None:
    """Raises UserError where the disk under `out` has no room for `size` bytes, or takes none.

    what: names what takes that room. Files that are under `out` already belong to the run that is
    resumed, and will be replaced.
    """
    existing = sum(path.lstat().st_size for path in out.rglob("*"))
    size = max(0.0, size - existing)
    free = shutil.disk_usage(out).free
    needed = f"{what} take {format_bytes(size)}"
    if free < size:
        raise UserError(f"{out}: {needed}, and {format_bytes(free)} are free")
    # A quota or a limit of files shows only when something is written.
    trial = out / f".trial.partial-{os.getpid()}"
    try:
        with open(trial, "wb") as stream:
            left = min(int(size), TRIAL_BYTES)
            zeros = bytes(1 << 20)
            while left > 0:
                left -= stream.write(zeros[:left])
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise UserError(f"{out}: can't be written to ({error.strerror}); {needed}") from None
    finally:
        with contextlib.suppress(OSError):
            trial.unlink(missing_ok=True)


# ---- reading ----


def newest_checkpoint(out: Path) -> Checkpoint | None:
    """Returns the newest whole checkpoint under --out: its files are what its manifest says.

    Its notes name those that are damaged. None where there is no checkpoint; raises UserError where
    all are damaged.
    """
    notes: list[str] = []
    for folder in reversed(list_checkpoints(out / FOLDER)):
        fault = find_corruption(folder)
        if fault is None:
            return Checkpoint(folder, read_json(folder / STATE_FILE), notes)
        notes.append(f"{fault}; the checkpoint before it is taken")
    if notes:
        fault_of_newest = notes[0].partition(";")[0]
        raise UserError(f"{out / FOLDER}: no checkpoint is whole ({fault_of_newest})")
    return None


def find_corruption(folder: Path) -> str | None:
    """Returns what is wrong with a checkpoint's files, or None."""
    try:
        manifest = read_json(folder / MANIFEST)
    except (UserError, OSError) as error:
        return str(error)
    if STATE_FILE not in manifest:
        return f"{folder / MANIFEST}: names no {STATE_FILE}"
    names = [file.name for file in folder.glob("*.safetensors")]
    unknown = sorted(name for name in names if name not in manifest)
    if unknown:
        return f"{folder / unknown[0]}: is not in the manifest"
    for name, sha256 in manifest.items():
        # The name alone: a manifest must not lead out of its folder.
        file = folder / Path(name).name
        if not file.is_file():
            return f"{file}: is missing"
        if file_sha256(file) != sha256:
            return f"{file}: is damaged, its SHA-256 is not the manifest's"
    return None


def read_checkpoint(found: Checkpoint, model: nn.Module, optimizers: list) -> None:
    """Gives model and optimizers the tensors that a checkpoint holds.

    Raises UserError where one is missing.
    """
    dcp = distributed_checkpoint()
    own = trainable_state(model, optimizers)
    stored = stored_tensors(found.folder)
    # Moments in 8 bits, whose names end with a shard: `KEY NAME SHARD`.
    by_shard = {name for name in own if name.count(" ") == 2}
    # With as many shards as when they were written, they are loaded as they are.
    if by_shard <= stored.keys():
        by_shard = set()
    loaded = {name: tensor for name, tensor in own.items() if name not in by_shard}
    missing = sorted(loaded.keys() - stored.keys())
    if missing:
        problem = f"holds no {missing[0]!r}; it is of another method or optimizer"
        raise UserError(f"{found.folder}: {problem}")
    with utf8_path(found.folder) as folder:
        reader = dcp.HuggingFaceStorageReader(str(folder))
        dcp.load(loaded, storage_reader=reader, no_dist=not dist.is_initialized())
    for name, p in model.named_parameters():
        parts = {part: own[part] for part in by_shard if part.split(" ")[1] == name}
        if parts:
            requantize_moments(name, p, parts, stored, found.folder)


def check_same_run(found: Checkpoint, base: dict) -> None:
    """Raises UserError if base or data of a resumed run are not those of its checkpoint.

    base: what the run is made from, by hashes (run_folder.identify_run).
    """
    before = f"than when {found.folder} was made"
    if found.state["base_sha256"] != base["base_sha256"]:
        raise UserError(f"--resume: {base['base']} holds other weights {before}")
    if found.state.get("other_sha256") != base.get("other_sha256"):
        flag = "--teacher" if found.state["flags"].get("teacher") else "--reward"
        raise UserError(f"--resume: the model of {flag} holds other weights {before}")
    if found.state["data"] != base["data"]:
        hint = ""
        if found.state["flags"].get("date") is None:
            # Of an earlier version, whose runs did not hold it.
            hint = "; if the chat template writes the date, give the day it was begun as --date"
        raise UserError(f"--resume: the examples are others, or in another order, {before}{hint}")


def stored_tensors(folder: Path) -> dict[str, Path]:
    """Returns {name: file} of all tensors in a folder; for one in several files, any of them."""
    files: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with open_safetensors(file) as shard:
            files |= dict.fromkeys(shard.keys(), file)
    return files


def requantize_moments(
    name: str, p: Tensor, parts: dict[str, Tensor], stored: dict[str, Path], folder: Path
) -> None:
    """Fills this rank's moments in 8 bits from those of another number of shards.

    These were cut into other blocks, so they are dequantized, joined, and quantized again.

    name, p: the parameter.
    parts: this rank's tensors by their names, to be filled.
    stored: what `stored_tensors` returns.
    folder: the checkpoint, for messages.
    """
    for key in ("m", "v"):
        pieces = [part for part in stored if part.startswith(f"{key} {name} ")]
        if not pieces:
            raise UserError(f"{folder}: holds no {key} of {name}; it is of another optimizer")
        pieces.sort(key=shard_number)
        moments = []
        for piece in pieces:
            scale_name = f"{key}_scale{piece.removeprefix(key)}"
            codes = read_tensor(stored[piece], piece)
            scales = read_tensor(stored[scale_name], scale_name)
            moments.append(dequantize_moment(codes, scales, key))
        whole = torch.cat(moments).view(p.shape)
        own_rows = whole[distributed.local_row_slice(p)]
        codes, scales = quantize_moment(own_rows.flatten(), key)
        shard = shard_name(p)
        parts[f"{key} {name} {shard}"].copy_(codes)
        parts[f"{key}_scale {name} {shard}"].copy_(scales)


def shard_number(tensor_name: str) -> int:
    """Returns 3 of "m blocks.0.q.weight 3/8"."""
    shard = tensor_name.rpartition(" ")[2]
    return int(shard.partition("/")[0])


def truncate_metrics(file: Path, step: int) -> None:
    """Leaves only the whole lines of steps up to this one in metrics.jsonl."""
    lines = []
    if file.is_file():
        text = file.read_text(encoding="utf-8", errors="replace")
        for line in text.splitlines(keepends=True):
            # A line that a crash has cut short, or the disk has damaged, is left out.
            with contextlib.suppress(ValueError, TypeError, KeyError):
                if line.endswith("\n") and json.loads(line)["step"] <= step:
                    lines.append(line)
    with atomic_file(file) as tmp:
        tmp.write_text("".join(lines), encoding="utf-8")


# ---- flags ----


def restore_flags(
    flags: Flags, state: dict, where: Path, is_prolonged: bool = False
) -> tuple[Flags, list[str]]:
    """Returns the flags of a resumed run, what was typed completed by those of its checkpoint, and
    lines about what changes.

    state: of state.json.
    where: the checkpoint's folder, for messages.
    is_prolonged: the run had ended, and goes on to more --steps.
    Raises UserError with a list of the flags that would change what is computed.
    """
    saved = relocate_paths(current_names(state["flags"]), state.get("directory"))
    if saved["map"] and "map" not in flags.given:
        advice = "give it again, it is code to be run"
        raise UserError(f"--resume: the run goes through --map {saved['map']}; {advice}")
    if is_prolonged:
        saved["steps"] = flags.steps
    flags = dataclasses.replace(flags, **unchanged_flags(flags, saved, where))
    notes = []
    for name in ("shard", "context_parallel", "compile", "activation_checkpointing", "attention"):
        now = getattr(flags, name)
        # A checkpoint from before there was --attention has no value for it.
        before = saved.get(name, "auto")
        if now is not None and now != before:
            change = f"{dashed(name)} {now}, {before} before"
            notes.append(f"{change}: equal to rounding, not to the bit")
    flags, note = keep_step_size(flags, saved, state["processes"])
    if note:
        notes.append(note)
    ranks_before = len(state["random"])
    ranks_now = distributed.world_size()
    if ranks_now != ranks_before:
        change = f"{ranks_before} processes before, {ranks_now} now"
        notes.append(f"{change}: equal to rounding, not to the bit")
    return flags, notes


def unchanged_flags(flags: Flags, saved: dict, where: Path) -> dict:
    """Returns {option: value} for the options that a resumed run takes from its checkpoint.

    saved: the checkpoint's flags by today's names. where: its folder, for messages.
    Raises UserError with a list of the flags that would change what is computed.
    """
    taken = {}
    refused = []
    for name, before in saved.items():
        if name in PER_LAUNCH_OPTIONS:
            continue
        now = getattr(flags, name)
        # JSON knows no tuples.
        if isinstance(before, list):
            before = tuple(before)
        # Where --steps said how long the run is, --epochs is open.
        was_open = name == "epochs" and before is None
        if name not in flags.given or now == "auto":
            taken[name] = before
            continue
        # Runs of earlier versions hold paths as they were typed.
        is_other = saved_value(name, now) != saved_value(name, before)
        if is_other and name not in SAFE_TO_CHANGE and not was_open:
            refused.append(f"{dashed(name)} {now} (it was {before})")
    if refused:
        changes = ", ".join(refused)
        raise UserError(f"--resume: {where} was made with other flags: {changes}; leave them out")
    check_paths_exist(taken, where)
    return taken


def current_names(saved: dict) -> dict:
    """Returns the flags of a checkpoint by today's names, without options that are gone."""
    flags = dict(saved)
    for old, (new, values) in FORMER_NAMES.items():
        if old in flags:
            value = flags.pop(old)
            flags[new] = values.get(value, value)
    # Runs of earlier versions validated on all examples, and their losses go on so.
    flags.setdefault("val_limit", 0)
    return {name: value for name, value in flags.items() if name in OPTIONS}


def keep_step_size(flags: Flags, saved: dict, dp_size_before: int) -> tuple[Flags, str]:
    """Sets --accumulate so that a step has as many examples as before, on other ranks too.

    Returns the flags, and a line that says so, or "" if nothing changes.
    Raises UserError where that doesn't divide.
    """
    dp_size = distributed.dp_size()
    examples = saved["batch_size"] * saved["accumulate"] * dp_size_before
    if flags.batch_size * flags.accumulate * dp_size == examples:
        return flags, ""
    accumulate, rest = divmod(examples, flags.batch_size * dp_size)
    # What was typed counts, as long as the ranks are not the reason for another number.
    contradicts_typed = "accumulate" in flags.given and dp_size == dp_size_before
    if rest or not accumulate or contradicts_typed:
        product = f"--batch-size {flags.batch_size} x --accumulate {flags.accumulate} x {dp_size}"
        raise UserError(
            f"--resume: a step had {examples} examples; {product} processes is not that, choose a"
            " --batch-size of which it is a multiple"
        )
    factors = f"{flags.batch_size} x {accumulate} x {dp_size} processes"
    note = f"--accumulate {accumulate}: {factors}, as many as before"
    return dataclasses.replace(flags, accumulate=accumulate), note


def restore_layout(flags: Flags, state: dict) -> Flags:
    """Returns the flags with the old values of those by which ranks share model and batches.

    These have to be known before anything else. They are as before where that is possible.
    """
    saved = current_names(state["flags"])
    taken = {}
    if "context_parallel" not in flags.given:
        size = saved["context_parallel"]
        if distributed.world_size() % size == 0:
            taken["context_parallel"] = size
    as_many_ranks = len(state["random"]) == distributed.world_size()
    if "shard" not in flags.given and (as_many_ranks or saved["shard"] == "none"):
        taken["shard"] = saved["shard"]
    return dataclasses.replace(flags, **taken)
