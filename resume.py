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
import hashlib
import json
import os
import re
import shutil
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import distributed
from checkpoint import opened, read_tensor
from distributed import is_first, is_sharded, like, local
from errors import UserError, read_json, reason
from files import file_sha256, new_file, new_folder, write_json
from flags import Flags
from optimizers import narrowed, widened

FOLDER, STATE, MANIFEST, LATEST = "checkpoints", "state.json", "manifest.json", "latest"
LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<kind>partial|replaced)-\d+")  # of files.new_folder, in a process that died
TRIAL = 64 << 20  # bytes that are written to see whether a disk takes them; beyond, its word is believed
# flags that change no number of a run, or only how it is computed; the data and the base are compared by what they hold
FREE = set(
    "model data replay val val_fraction out overwrite resume plan gpus profile wandb save_every keep save_async shard "
    "shard_offload reduce timeout context_parallel remat compile attention device eval_every patience batch_size "
    "accumulate deterministic".split()
)
# what belongs to a start and not to the run, or is taken up before the others (take_layout)
OF_THIS_START = {"out", "resume", "overwrite", "plan", "gpus", "timeout", "device", "shard", "context_parallel"}


# ------------------------------------------------------------------------------------------------- what is kept


def tensors_of(model: nn.Module, steppers: list) -> dict[str, Tensor]:
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
                    value = value.view(local(p).shape)
                    found[f"{key} {names[p]}"] = like(p, value) if is_sharded(p) else value
                else:
                    found[f"{key} {names[p]}"] = value
    return found


def shard_name(p: Tensor) -> str:
    count = distributed.shards(p)
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


class Saver:
    """Writes checkpoints and takes old ones away. asynchronous: a thread writes a copy while the training goes on; the
    next one, and the end, wait for it. say: for what a user must know; a disk that is full ends no training."""

    def __init__(self, out: Path, keep: int, asynchronous: bool, say):
        self.folder, self.keep, self.say = out / FOLDER, keep, say
        self.thread, self.newest, self.failed, self.broken = None, None, None, None
        # its messages must not mix with those of the training, which another thread sends meanwhile
        apart = asynchronous and distributed.size() > 1
        self.asynchronous, self.group = asynchronous, distributed.new_group(backend="gloo") if apart else None

    def save(self, state: dict, tensors: dict[str, Tensor]) -> None:
        """All processes call it, after the same step. state: for state.json, of which "step" is the number."""
        self.wait()
        if not self.asynchronous:
            self.write(state, tensors)
            self.wait()
            return
        copied = {name: copy(tensor) for name, tensor in tensors.items()}
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
            self.say(f"WARNING   no checkpoint: {self.failed}{kept}; training goes on")
        self.thread = self.failed = None

    def write(self, state: dict, tensors: dict[str, Tensor]) -> None:
        name = f"step-{state['step']}"
        try:
            with distributed.by_first_alone(new_folder(self.folder / name, replace=True), self.group) as aside:
                path = Path(distributed.from_first(str(aside), self.group))
                write_shards(tensors, path, self.group)
                mine = path.glob(f"shard-{distributed.rank() + 1:05}-*")
                mine = distributed.tried(lambda: {file.name: file_sha256(file) for file in mine}, self.group)
                hashes = {k: v for part in distributed.gathered(mine, self.group) for k, v in part.items()}
                if aside:
                    if lacking := sorted(name for name in hashes if not (aside / name).is_file()):
                        raise OSError(0, f"{lacking[0]} is missing, not all machines see this folder", str(aside))
                    write_json(state, aside / STATE)
                    write_json(hashes | {STATE: file_sha256(aside / STATE)}, aside / MANIFEST)
            self.newest = name
            if is_first():
                with contextlib.suppress(OSError):  # the older one it leads to is whole as well
                    point(self.folder / LATEST, name)
                self.prune(state["step"])
        except OSError as error:
            self.failed = reason(error, self.folder)

    def prune(self, step: int) -> None:
        """Keeps the newest ones and the one with the lowest validation loss."""
        there = [path for path in steps(self.folder) if step_of(path) <= step]
        losses = {path: validation_loss(path) for path in there}
        validated = [path for path in there if losses[path] is not None]
        best = min(validated, key=losses.get, default=None)
        for path in there[: -self.keep]:
            if path != best:
                remove(path)


def remove(folder: Path) -> None:
    """Takes a checkpoint away, which is whole or has another name."""
    aside = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    with contextlib.suppress(OSError):
        folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def validation_loss(folder: Path) -> float | None:
    with contextlib.suppress(UserError, OSError):  # a damaged one has none
        return read_json(folder / STATE).get("val_loss")


def copy(tensor: Tensor) -> Tensor:
    """The same in the host's memory, of its own."""
    mine = local(tensor).detach().to("cpu", copy=True)
    return like(tensor, mine) if is_sharded(tensor) else mine


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


def point(link: Path, name: str) -> None:
    """Makes a link, in one go."""
    aside = link.parent / f".{link.name}.partial-{os.getpid()}"
    aside.unlink(missing_ok=True)
    aside.symlink_to(name)
    aside.replace(link)


def steps(folder: Path) -> list[Path]:
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


def amount(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def check_room(out: Path, size: float, what: str) -> None:
    """UserError where the disk has no room for so many bytes, or takes none."""
    there = sum(path.lstat().st_size for path in out.rglob("*"))  # of the run that goes on, which will be replaced
    free, trial, size = shutil.disk_usage(out).free, out / f".trial.partial-{os.getpid()}", max(0.0, size - there)
    if free < size:
        raise UserError(f"{out}: {what} take {amount(size)}, and {amount(free)} are free")
    try:
        with open(trial, "wb") as stream:
            left, zeros = min(int(size), TRIAL), bytes(1 << 20)
            while left > 0:
                left -= stream.write(zeros[:left])
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise UserError(f"{out}: can't be written to ({error.strerror}); {what} take {amount(size)}") from None
    finally:
        with contextlib.suppress(OSError):
            trial.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------- reading


@dataclass
class Found:
    """A whole checkpoint: its folder and its state.json; and what was said about others."""

    folder: Path
    state: dict
    notes: list[str]
    complete: bool = False  # the run has ended


def newest(out: Path) -> Found | None:
    """The newest checkpoint under --out whose files are what the manifest says; None where there is none."""
    notes = []
    for folder in reversed(steps(out / FOLDER)):
        fault = damage(folder)
        if fault is None:
            return Found(folder, read_json(folder / STATE), notes)
        notes.append(f"{fault}; the checkpoint before it is taken")
    if notes:
        raise UserError(f"{out / FOLDER}: no checkpoint is whole ({notes[0].partition(';')[0]})")
    return None


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files."""
    try:
        manifest = read_json(folder / MANIFEST)
    except (UserError, OSError) as error:
        return str(error)
    if STATE not in manifest:
        return f"{folder / MANIFEST}: names no {STATE}"
    if strange := sorted(file.name for file in folder.glob("*.safetensors") if file.name not in manifest):
        return f"{folder / strange[0]}: is not in the manifest"
    for name, wanted in manifest.items():
        file = folder / Path(name).name
        if not file.is_file():
            return f"{file}: is missing"
        if file_sha256(file) != wanted:
            return f"{file}: is damaged, its SHA-256 is not the manifest's"
    return None


def read(found: Found, model: nn.Module, steppers: list) -> None:
    """Gives model and optimizers what a checkpoint holds."""
    dcp = distributed_checkpoint()
    wanted, stored = tensors_of(model, steppers), stored_tensors(found.folder)
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
            recut(name, p, {part: wanted[part] for part in parts}, stored, found.folder)


def check_same(found: Found, base: dict) -> None:
    """UserError where base or data of a run that goes on are others than they were."""
    if found.state["base_sha256"] != base["base_sha256"]:
        raise UserError(f"--resume: {base['base']} holds other weights than when {found.folder} was made")
    if found.state["data"] != base["data"]:
        raise UserError(f"--resume: the examples are others, or in another order, than when {found.folder} was made")


def stored_tensors(folder: Path) -> dict[str, Path]:
    """{name: file} of all tensors; of one that lies in several files, any of them."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with opened(file) as shard:
            found |= dict.fromkeys(shard.keys(), file)
    return found


def recut(name: str, p: Tensor, mine: dict[str, Tensor], stored: dict, folder: Path) -> None:
    """Moments in 8 bits, of which other shards than today's were cut into blocks: made whole, and cut again."""
    for key in ("m", "v"):
        pieces = [part for part in stored if part.startswith(f"{key} {name} ")]
        if not pieces:
            raise UserError(f"{folder}: holds no {key} of {name}; it is of another optimizer")
        pieces.sort(key=lambda part: int(part.rpartition(" ")[2].partition("/")[0]))
        parts = []
        for piece in pieces:
            codes, scales = (read_tensor(stored[n], n) for n in (piece, f"{key}_scale{piece.removeprefix(key)}"))
            parts.append(widened(codes, scales, key))
        flat = torch.cat(parts).view(p.shape)[distributed.my_rows(p)].flatten()
        for end, new in zip(("", "_scale"), narrowed(flat, key), strict=True):
            mine[f"{key}{end} {name} {shard_name(p)}"].copy_(new)


def truncate_metrics(file: Path, step: int) -> None:
    """Leaves the lines of steps up to this one, each of which stands there whole."""
    kept = []
    if file.is_file():
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            with contextlib.suppress(ValueError, TypeError, KeyError):
                if line.endswith("\n") and json.loads(line)["step"] <= step:
                    kept.append(line)
    with new_file(file) as aside:
        aside.write_text("".join(kept), encoding="utf-8")


# ------------------------------------------------------------------------------------------------- flags


def take_flags(flags: Flags, given: set[str], state: dict, where: Path) -> list[str]:
    """Completes the flags of a run that goes on by those of its checkpoint; lines about what changes. given: names of
    the flags that were typed. UserError lists those that would change what is computed."""
    saved, notes, others = state["flags"], [], []
    if saved["map"] and "map" not in given:
        raise UserError(f"--resume: the run goes through --map {saved['map']}; give it again, it is code to be run")
    for name, value in saved.items():
        now = getattr(flags, name, None)
        if name in OF_THIS_START:
            continue
        if name not in given or now == "auto":
            setattr(flags, name, value)
        elif name not in FREE and now != value and not (name == "epochs" and value is None):
            others.append(f"--{name.replace('_', '-')} {now} (it was {value})")
    if others:
        raise UserError(f"--resume: {where} was made with other flags: {', '.join(others)}; leave them out")
    for name in ("shard", "context_parallel", "compile", "remat", "attention"):
        now = getattr(flags, name)
        before = saved.get(name, "auto")  # a run of before --attention has none
        if now not in (None, before):
            notes.append(f"--{name.replace('_', '-')} {now}, {before} before: equal to rounding, not to the bit")
    product, hands = saved["batch_size"] * saved["accumulate"] * state["processes"], distributed.hands()
    if flags.batch_size * flags.accumulate * hands != product:
        times, rest = divmod(product, flags.batch_size * hands)
        if rest or not times or ("accumulate" in given and hands == state["processes"]):
            raise UserError(
                f"--resume: a step had {product} examples; --batch-size {flags.batch_size} x --accumulate"
                f" {flags.accumulate} x {hands} processes is not that, choose a --batch-size of which it is a multiple"
            )
        notes.append(f"--accumulate {times}: {flags.batch_size} x {times} x {hands} processes, as many as before")
        flags.accumulate = times
    if distributed.size() != len(state["random"]):
        before = len(state["random"])
        notes.append(f"{before} processes before, {distributed.size()} now: equal to rounding, not to the bit")
    return notes


def take_layout(flags: Flags, given: set[str], state: dict) -> None:
    """How processes share model and batches, which has to be known before anything else: as before, where it can be."""
    saved, alike = state["flags"], len(state["random"]) == distributed.size()
    if "context_parallel" not in given and distributed.size() % saved["context_parallel"] == 0:
        flags.context_parallel = saved["context_parallel"]
    if "shard" not in given and (alike or saved["shard"] == "none"):
        flags.shard = saved["shard"]
