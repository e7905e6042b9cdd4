"""Which run this is: a new folder, or the one under --out that is resumed, whose flags it takes."""

import contextlib
import dataclasses
import itertools
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import distributed
from checkpoint import fingerprint
from common.device import pick_device
from common.errors import UserError
from data import TrainingData
from flags import Flags
from model import Transformer
from training import checkpointer
from training.checkpointer import RUN_FILES, Checkpoint
from training.defaults import Settings, sizes_on_disk


@dataclass
class Run:
    """flags: completed by those of the checkpoint where a run is resumed. is_complete: there is nothing left to do."""

    flags: Flags
    device: torch.device
    checkpoint: Checkpoint | None = None
    is_complete: bool = False


def open_run(flags: Flags) -> Run:
    """Joins the other ranks, if there are any, and finds the checkpoint that --resume continues from."""
    device = pick_device(flags.device)
    if distributed.launched_by_torchrun() or flags.shard not in (None, "none"):
        device = distributed.init_distributed(device)
    run = find_run(flags, device) if flags.resume else Run(flags, device)
    if run.is_complete:
        return run
    if run.flags.shard not in (None, "none"):  # of the run that is resumed, it may be
        run.device = distributed.init_distributed(device)
    if run.checkpoint is None:
        distributed.init_context_parallel(run.flags.context_parallel)
    if run.flags.deterministic:
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # of two sizes, cuBLAS chooses as it likes
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    check_offload(run.flags, run.device)
    return run


def check_offload(flags: Flags, device: torch.device) -> None:
    asked = {
        "--shard-offload": flags.shard_offload,
        "--activation-checkpointing offload": flags.activation_checkpointing == "offload",
        "--optimizer-offload": flags.optimizer_offload,
    }
    names = [name for name, wanted in asked.items() if wanted]
    if names and device.type != "cuda":
        raise UserError(
            f"{names[0]}: is for GPUs; on {device.type} everything is in the host's memory as it is"
        )


def find_run(flags: Flags, device: torch.device) -> Run:
    """The run under --out, with its flags; one that is complete has nothing left to do. Where --resume auto finds
    nothing, a new one."""
    out = Path(flags.out)
    if distributed.run_on_rank0((out / "final").is_dir):
        print(f"complete  {out} has ended; its outcome is {out / 'final'}")
        return Run(flags, device, is_complete=True)
    found = distributed.run_on_rank0(lambda: checkpointer.newest_checkpoint(out))
    if found is None and flags.resume == "on":
        raise UserError(
            f"--resume: no checkpoint under {out / checkpointer.FOLDER}; --resume auto would begin"
        )
    if found is None:
        print(f"resume    nothing to go on from under {out}; beginning")
        return Run(dataclasses.replace(flags, resume=None), device)
    flags = checkpointer.restore_layout(flags, found.state)
    distributed.init_context_parallel(flags.context_parallel)  # before ranks are counted
    flags, notes = checkpointer.restore_flags(flags, found.state, found.folder)
    for line in found.notes + notes:
        print(f"NOTE      {line}")
    return Run(flags, device, found)


def make_run_folder(flags: Flags, resumed: Checkpoint | None = None) -> Path:
    """Makes the folder of the run: a new one, or --out, of which is removed what an earlier run wrote; if this run is
    resumed, only what was written after the checkpoint."""
    if resumed:
        out = Path(flags.out)
        for folder in (out, out / checkpointer.FOLDER):
            checkpointer.clear_leftovers(folder)
        for folder in checkpointer.list_checkpoints(out / checkpointer.FOLDER):
            if checkpointer.step_of(folder) > resumed.state["step"]:  # a damaged one
                checkpointer.remove_checkpoint(folder)
        checkpointer.truncate_metrics(out / "metrics.jsonl", resumed.state["step"])
        return out
    if flags.out is None:
        return make_numbered_folder(flags.method)
    out = Path(flags.out)
    out.mkdir(parents=True, exist_ok=True)
    checkpointer.clear_leftovers(out)
    for path in (out / name for name in RUN_FILES):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return out


def make_numbered_folder(method: str) -> Path:
    """A new folder runs/TIME-METHOD, with a number where another run began in the same second."""
    Path("runs").mkdir(exist_ok=True)
    for number in itertools.count(1):
        suffix = f"-{number}" if number > 1 else ""
        out = Path("runs") / (time.strftime(f"%Y%m%d-%H%M%S-{method}") + suffix)
        with contextlib.suppress(FileExistsError):
            out.mkdir()
            return out


def check_room(settings: Settings, model: Transformer, out: Path) -> None:
    """UserError where the disk has no room for the run's checkpoints and weights; a new folder is taken away then."""
    checkpoint_size, weights_size, count = sizes_on_disk(settings, model)
    size, what = 3 * weights_size, "best/ and final/"
    if settings.save_every:
        size, what = size + count * checkpoint_size, f"{count} checkpoints, {what}"
    try:
        distributed.run_on_rank0(lambda: checkpointer.check_disk_space(out, size, what))
    except UserError:
        with contextlib.suppress(OSError):
            out.rmdir()  # if it is new
        raise


def identify_run(flags: Flags, folder: Path, data: TrainingData) -> dict:
    """What a run is made from, by hashes. UserError where the ranks have different things."""
    sha = fingerprint(folder) if distributed.local_rank() == 0 else None  # once a machine
    train, val, replay_val = data.train, data.val, data.replay_val
    digest = checkpointer.data_digest(
        *(train.lengths, train.num_trained, train.prompts, val.lengths, val.prompts),
        *(
            tuple(data.sampler.samples_per_epoch),
            data.seq_len,
            data.pack,
            flags.seed,
            replay_val and replay_val.prompts,
        ),
        *(rows.contents for rows in train.examples.rows),
    )
    first = distributed.broadcast_object((sha, digest))
    if not distributed.all_ranks_agree(sha in (None, first[0]) and digest == first[1]):
        raise UserError(
            "the processes do not have the same base or the same examples (a --map that draws at random?)"
        )
    return {"base": str(folder.resolve()), "base_sha256": first[0], "data": digest}
