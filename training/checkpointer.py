"""The state of a run on disk, so that one that is killed at any instant goes on as if it had not been.

`--out`/checkpoints/step-N holds

    shard-*.safetensors   trained weights and the optimizer's moments, by torch.distributed.checkpoint: each process
                          writes its rows; fewer or more processes may read them
    state.json            the step, the position in the data, random numbers, flags, what was best so far
    manifest.json         each file's SHA-256

A folder is written under another name, synced to the disk and renamed, so it is there whole or not at all. When it is
read, each file's hash is compared; where one differs the folder is left aside, and the one before it is taken. Nothing
is ever unpickled. `latest` is a link to the newest.
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
from common.files import atomic_file, atomic_folder, file_sha256, write_json
from dataset.sampler import Sampler
from distributed import dtensor_like, is_rank0, is_sharded, to_local
from flags import FORMER_NAMES, OPTIONS, PER_LAUNCH, Flags, as_dict, dashed
from optimizers import dequantize_moment, quantize_moment
from training.state import TrainState

FOLDER, STATE_FILE, MANIFEST, LATEST = "checkpoints", "state.json", "manifest.json", "latest"
LEFTOVER = re.compile(
    r"\.(?P<name>.+)\.(?P<kind>partial|replaced)-\d+"
)  # of files.atomic_folder, in a process that died
TRIAL_BYTES = 64 << 20  # that are written to see whether a disk takes them; beyond, its word is believed
RESUME_RULES = {name: each.metadata.get("resume") for name, each in OPTIONS.items()}
PER_LAUNCH_OPTIONS = {name for name, rule in RESUME_RULES.items() if rule == PER_LAUNCH}
SAFE_TO_CHANGE = {name for name, rule in RESUME_RULES.items() if rule is not None}


@dataclass
class Checkpoint:
    """A whole checkpoint: its folder and its state.json; and what was said about others."""

    folder: Path
    state: dict
    notes: list[str]


# ------------------------------------------------------------------------------------------------- what is kept


def trainable_state(model: nn.Module, steppers: list) -> dict[str, Tensor]:
    """Everything that training changes, by name: `weight NAME` and `KEY NAME` of an optimizer's state. Tensors in
    shards are DTensors. What is cut into blocks within a shard (moments in 8 bits) is named by shard as well."""
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    found = {f"weight {name}": p.detach() for p, name in names.items()}
    for optimizer in steppers:
        for p, state in optimizer.states():
            for key, value in state.items():
                if value.dtype == torch.uint8 or key.endswith("_scale"):
                    found[f"{key} {names[p]} {shard_name(p)}"] = value
                elif value.dim():
                    value = value.view(to_local(p).shape)
                    found[f"{key} {names[p]}"] = dtensor_like(p, value) if is_sharded(p) else value
                else:
                    found[f"{key} {names[p]}"] = value
    return found


def shard_name(p: Tensor) -> str:
    count = distributed.num_shards(p)
    return f"{p.device_mesh.get_local_rank('shard') if count > 1 else 0}/{count}"


def random_state() -> list[str]:
    """Of this process's generators."""
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])
    return [base64.b64encode(state.numpy().tobytes()).decode() for state in states]


def set_random_state(states: list[str]) -> None:
    found = [torch.frombuffer(bytearray(base64.b64decode(state)), dtype=torch.uint8) for state in states]
    torch.set_rng_state(found[0])
    if torch.cuda.is_available() and len(found) > 1:
        torch.cuda.set_rng_state(found[1])


def data_digest(*parts) -> str:
    """Of arrays and whatever else decides which examples come when."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.tobytes() if hasattr(part, "tobytes") else repr(part).encode())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------- writing


class Checkpointer:
    """Saves the whole state of a run every `save_every` steps, and gives it back to a run that is resumed.

    origin: what the run is made from, by hashes (run_folder.identify_run). print_fn: for what a user must know.
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
        self.settings, self.model, self.optimizers, self.sampler = settings, model, optimizers, sampler
        self.origin, self.out = origin, out
        self.writer = CheckpointWriter(out, settings.keep, settings.save_async, print_fn)

    @property
    def newest(self) -> str | None:
        """The name of the newest whole checkpoint."""
        return self.writer.newest

    def due(self, state: TrainState) -> bool:
        every = self.settings.save_every
        return bool(every) and state.step % every == 0 and state.step < self.settings.steps

    def save(self, state: TrainState) -> None:
        """Writes a checkpoint of this step. All ranks call it."""
        sampler = self.sampler
        stored = state.as_dict() | {
            "position": [sampler.epoch, sampler.window, sampler.row],
            "random": distributed.all_gather_object(random_state()),
            "processes": distributed.dp_size(),  # among which rows are dealt; "random" has one of each rank
            "flags": as_dict(self.settings),
            "torch": torch.__version__,
            **self.origin,
        }
        with distributed.extended_timeout():
            self.writer.save(stored, trainable_state(self.model, self.optimizers))

    def restore(self, found: Checkpoint, state: TrainState) -> None:
        """Gives model, optimizers, sampler and random numbers what the checkpoint holds."""
        stored, sampler = found.state, self.sampler
        read_checkpoint(found, self.model, self.optimizers)
        sampler.epoch, sampler.window, sampler.row = stored["position"]
        self.writer.newest = found.folder.name
        if len(stored["random"]) == distributed.world_size():
            set_random_state(stored["random"][distributed.rank()])
        else:
            torch.manual_seed(self.settings.seed + state.step)

    def wait(self) -> None:
        self.writer.wait()


class CheckpointWriter:
    """Writes checkpoints and removes old ones; a disk that is full ends no training.

    asynchronous: a thread writes a copy while the training goes on; the next one, and the end, wait for it. print_fn:
    for what a user must know.
    """

    def __init__(self, out: Path, keep: int, asynchronous: bool, print_fn: Callable[[str], None]):
        self.folder, self.keep, self.print_fn = out / FOLDER, keep, print_fn
        self.thread, self.newest, self.failed, self.broken = None, None, None, None
        # A group of its own, since its messages must not mix with those of the training, which another thread sends.
        own_group = asynchronous and distributed.world_size() > 1
        self.asynchronous, self.group = asynchronous, distributed.new_group(backend="gloo") if own_group else None

    def save(self, state: dict, tensors: dict[str, Tensor]) -> None:
        """All processes call it, after the same step. state: for state.json, of which "step" is the number."""
        self.wait()
        if not self.asynchronous:
            self.write(state, tensors)
            self.wait()
            return
        copied = {name: copy_to_host(tensor) for name, tensor in tensors.items()}
        self.thread = threading.Thread(target=self.write_beside, args=(state, copied), daemon=True)
        self.thread.start()

    def write_beside(self, state: dict, tensors: dict[str, Tensor]) -> None:
        try:
            self.write(state, tensors)
        except BaseException as error:  # noqa: BLE001 (the training's thread raises it)
            self.broken = error

    def wait(self) -> None:
        """For a write that is under way; says how it went."""
        if self.thread:
            self.thread.join()
        if self.broken:
            raise self.broken
        if self.failed:
            kept = f"; {self.newest} is the newest that is whole" if self.newest else ""
            self.print_fn(f"WARNING   no checkpoint: {self.failed}{kept}; training goes on")
        self.thread = self.failed = None

    def write(self, state: dict, tensors: dict[str, Tensor]) -> None:
        name = f"step-{state['step']}"
        try:
            with distributed.rank0_context(atomic_folder(self.folder / name, replace=True), self.group) as tmp:
                path = Path(distributed.broadcast_object(str(tmp), self.group))
                write_shards(tensors, path, self.group)
                with distributed.synced_errors(self.group):
                    mine = {file.name: file_sha256(file) for file in path.glob(f"shard-{distributed.rank() + 1:05}-*")}
                hashes = {k: v for part in distributed.all_gather_object(mine, self.group) for k, v in part.items()}
                if tmp:
                    if lacking := sorted(name for name in hashes if not (tmp / name).is_file()):
                        raise OSError(0, f"{lacking[0]} is missing, not all machines see this folder", str(tmp))
                    write_json(state, tmp / STATE_FILE)
                    write_json(hashes | {STATE_FILE: file_sha256(tmp / STATE_FILE)}, tmp / MANIFEST)
            self.newest = name
            if is_rank0():
                with contextlib.suppress(OSError):  # the older one it leads to is whole as well
                    update_symlink(self.folder / LATEST, name)
                self.prune(state["step"])
        except OSError as error:
            self.failed = describe_os_error(error, self.folder)

    def prune(self, step: int) -> None:
        """Keeps the newest ones and the one with the lowest validation loss."""
        there = [path for path in list_checkpoints(self.folder) if step_of(path) <= step]
        losses = {path: stored_validation_loss(path) for path in there}
        validated = [path for path in there if losses[path] is not None]
        best = min(validated, key=losses.get, default=None)
        for path in there[: -self.keep]:
            if path != best:
                remove_checkpoint(path)


def remove_checkpoint(folder: Path) -> None:
    """Takes a checkpoint away, which is whole or has another name."""
    tmp = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    with contextlib.suppress(OSError):
        folder.rename(tmp)
    shutil.rmtree(tmp, ignore_errors=True)


def stored_validation_loss(folder: Path) -> float | None:
    with contextlib.suppress(UserError, OSError):  # a damaged one has none
        return read_json(folder / STATE_FILE).get("val_loss")


def copy_to_host(tensor: Tensor) -> Tensor:
    """The same in the host's memory, of its own."""
    mine = to_local(tensor).detach().to("cpu", copy=True)
    return dtensor_like(tensor, mine) if is_sharded(tensor) else mine


def distributed_checkpoint():
    """The module, imported where it is used: half a second."""
    import torch.distributed.checkpoint as dcp

    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process, which is meant
    return dcp


def write_shards(tensors: dict[str, Tensor], folder: Path, group) -> None:
    dcp = distributed_checkpoint()
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=not dist.is_initialized())
    except dcp.api.CheckpointException as error:  # of one process or more; no Exception, as torch has it
        for cause in error.failures.values():
            cause = cause[0] if isinstance(cause, tuple) else cause
            if isinstance(cause, OSError):
                raise OSError(cause.errno, cause.strerror, cause.filename or str(folder)) from None
        raise


def update_symlink(link: Path, name: str) -> None:
    """Makes a link, in one go."""
    tmp = link.parent / f".{link.name}.partial-{os.getpid()}"
    tmp.unlink(missing_ok=True)
    tmp.symlink_to(name)
    tmp.replace(link)


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints under a folder, the oldest first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def clear_leftovers(folder: Path) -> None:
    """Takes away what a process that died was writing; what it was replacing gets its name back."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        found = LEFTOVER.fullmatch(path.name)
        if found and found["kind"] == "replaced" and not (folder / found["name"]).exists():
            path.rename(folder / found["name"])
        elif found:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def format_bytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def check_disk_space(out: Path, size: float, what: str) -> None:
    """UserError where the disk has no room for so many bytes, or takes none."""
    there = sum(path.lstat().st_size for path in out.rglob("*"))  # of the run that goes on, which will be replaced
    free, trial, size = shutil.disk_usage(out).free, out / f".trial.partial-{os.getpid()}", max(0.0, size - there)
    if free < size:
        raise UserError(f"{out}: {what} take {format_bytes(size)}, and {format_bytes(free)} are free")
    try:
        with open(trial, "wb") as stream:
            left, zeros = min(int(size), TRIAL_BYTES), bytes(1 << 20)
            while left > 0:
                left -= stream.write(zeros[:left])
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise UserError(f"{out}: can't be written to ({error.strerror}); {what} take {format_bytes(size)}") from None
    finally:
        with contextlib.suppress(OSError):
            trial.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------- reading


def newest_checkpoint(out: Path) -> Checkpoint | None:
    """The newest checkpoint under --out whose files are what the manifest says; None where there is none."""
    notes = []
    for folder in reversed(list_checkpoints(out / FOLDER)):
        fault = find_corruption(folder)
        if fault is None:
            return Checkpoint(folder, read_json(folder / STATE_FILE), notes)
        notes.append(f"{fault}; the checkpoint before it is taken")
    if notes:
        raise UserError(f"{out / FOLDER}: no checkpoint is whole ({notes[0].partition(';')[0]})")
    return None


def find_corruption(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files."""
    try:
        manifest = read_json(folder / MANIFEST)
    except (UserError, OSError) as error:
        return str(error)
    if STATE_FILE not in manifest:
        return f"{folder / MANIFEST}: names no {STATE_FILE}"
    if strange := sorted(file.name for file in folder.glob("*.safetensors") if file.name not in manifest):
        return f"{folder / strange[0]}: is not in the manifest"
    for name, wanted in manifest.items():
        file = folder / Path(name).name
        if not file.is_file():
            return f"{file}: is missing"
        if file_sha256(file) != wanted:
            return f"{file}: is damaged, its SHA-256 is not the manifest's"
    return None


def read_checkpoint(found: Checkpoint, model: nn.Module, steppers: list) -> None:
    """Gives model and optimizers what a checkpoint holds."""
    dcp = distributed_checkpoint()
    wanted, stored = trainable_state(model, steppers), stored_tensors(found.folder)
    apart = {name for name in wanted if name.count(" ") == 2}
    if apart <= stored.keys():  # as many shards as then
        apart = set()
    whole = {name: tensor for name, tensor in wanted.items() if name not in apart}
    missing = sorted(whole.keys() - stored.keys())
    if missing:
        raise UserError(f"{found.folder}: holds no {missing[0]!r}; it is of another method or optimizer")
    reader = dcp.HuggingFaceStorageReader(str(found.folder))
    dcp.load(whole, storage_reader=reader, no_dist=not dist.is_initialized())
    for name, p in model.named_parameters():
        parts = {part for part in apart if part.split(" ")[1] == name}
        if parts:
            requantize_moments(name, p, {part: wanted[part] for part in parts}, stored, found.folder)


def check_same_run(found: Checkpoint, base: dict) -> None:
    """UserError where base or data of a run that goes on are others than they were."""
    if found.state["base_sha256"] != base["base_sha256"]:
        raise UserError(f"--resume: {base['base']} holds other weights than when {found.folder} was made")
    if found.state["data"] != base["data"]:
        raise UserError(f"--resume: the examples are others, or in another order, than when {found.folder} was made")


def stored_tensors(folder: Path) -> dict[str, Path]:
    """{name: file} of all tensors; of one that lies in several files, any of them."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with open_safetensors(file) as shard:
            found |= dict.fromkeys(shard.keys(), file)
    return found


def requantize_moments(name: str, p: Tensor, mine: dict[str, Tensor], stored: dict, folder: Path) -> None:
    """Moments in 8 bits, of which other shards than today's were cut into blocks: made whole, and cut again."""
    for key in ("m", "v"):
        pieces = [part for part in stored if part.startswith(f"{key} {name} ")]
        if not pieces:
            raise UserError(f"{folder}: holds no {key} of {name}; it is of another optimizer")
        pieces.sort(key=lambda part: int(part.rpartition(" ")[2].partition("/")[0]))
        parts = []
        for piece in pieces:
            codes, scales = (read_tensor(stored[n], n) for n in (piece, f"{key}_scale{piece.removeprefix(key)}"))
            parts.append(dequantize_moment(codes, scales, key))
        flat = torch.cat(parts).view(p.shape)[distributed.local_row_slice(p)].flatten()
        for end, new in zip(("", "_scale"), quantize_moment(flat, key), strict=True):
            mine[f"{key}{end} {name} {shard_name(p)}"].copy_(new)


def truncate_metrics(file: Path, step: int) -> None:
    """Leaves the lines of steps up to this one, each of which stands there whole."""
    kept = []
    if file.is_file():
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            with contextlib.suppress(ValueError, TypeError, KeyError):
                if line.endswith("\n") and json.loads(line)["step"] <= step:
                    kept.append(line)
    with atomic_file(file) as tmp:
        tmp.write_text("".join(kept), encoding="utf-8")


# ------------------------------------------------------------------------------------------------- flags


def restore_flags(flags: Flags, state: dict, where: Path) -> tuple[Flags, list[str]]:
    """Completes what was typed by the flags of the checkpoint that is resumed; with it lines about what changes.
    UserError lists the flags that would change what is computed."""
    saved, given, notes, refused, taken = current_names(state["flags"]), flags.given, [], [], {}
    if saved["map"] and "map" not in given:
        raise UserError(f"--resume: the run goes through --map {saved['map']}; give it again, it is code to be run")
    for name, before in saved.items():
        if name in PER_LAUNCH_OPTIONS:
            continue
        now = getattr(flags, name)
        before = tuple(before) if isinstance(before, list) else before
        if name not in given or now == "auto":
            taken[name] = before
        elif name not in SAFE_TO_CHANGE and now != before and not (name == "epochs" and before is None):
            refused.append(f"{dashed(name)} {now} (it was {before})")
    if refused:
        raise UserError(f"--resume: {where} was made with other flags: {', '.join(refused)}; leave them out")
    flags = dataclasses.replace(flags, **taken)
    for name in ("shard", "context_parallel", "compile", "activation_checkpointing", "attention"):
        now, before = getattr(flags, name), saved.get(name, "auto")  # a run of before --attention has none
        if now not in (None, before):
            notes.append(f"{dashed(name)} {now}, {before} before: equal to rounding, not to the bit")
    flags, note = keep_step_size(flags, saved, state["processes"])
    notes += [note] if note else []
    if distributed.world_size() != len(state["random"]):
        before = len(state["random"])
        notes.append(f"{before} processes before, {distributed.world_size()} now: equal to rounding, not to the bit")
    return flags, notes


def current_names(saved: dict) -> dict:
    """The flags of a checkpoint by today's names."""
    flags = dict(saved)
    for old, (new, values) in FORMER_NAMES.items():
        if old in flags:
            value = flags.pop(old)
            flags[new] = values.get(value, value)
    return {name: value for name, value in flags.items() if name in OPTIONS}


def keep_step_size(flags: Flags, saved: dict, dp_size_before: int) -> tuple[Flags, str]:
    """Sets --accumulate so that a step has as many examples as before, on another number of ranks too; with it a line
    that says so. UserError where that doesn't divide."""
    product, dp_size = saved["batch_size"] * saved["accumulate"] * dp_size_before, distributed.dp_size()
    if flags.batch_size * flags.accumulate * dp_size == product:
        return flags, ""
    accumulate, rest = divmod(product, flags.batch_size * dp_size)
    if rest or not accumulate or ("accumulate" in flags.given and dp_size == dp_size_before):
        raise UserError(
            f"--resume: a step had {product} examples; --batch-size {flags.batch_size} x --accumulate"
            f" {flags.accumulate} x {dp_size} processes is not that, choose a --batch-size of which it is a multiple"
        )
    note = f"--accumulate {accumulate}: {flags.batch_size} x {accumulate} x {dp_size} processes, as many as before"
    return dataclasses.replace(flags, accumulate=accumulate), note


def restore_layout(flags: Flags, state: dict) -> Flags:
    """The flags with which ranks share model and batches, which have to be known before anything else: as before, where
    that is possible."""
    saved, taken = current_names(state["flags"]), {}
    as_many = len(state["random"]) == distributed.world_size()
    if "context_parallel" not in flags.given and distributed.world_size() % saved["context_parallel"] == 0:
        taken["context_parallel"] = saved["context_parallel"]
    if "shard" not in flags.given and (as_many or saved["shard"] == "none"):
        taken["shard"] = saved["shard"]
    return dataclasses.replace(flags, **taken)
