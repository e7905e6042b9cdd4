"""Which run this is: a new folder, or the one under --out that is resumed, whose flags it takes.

Rank 0 looks at the disk, and tells the other ranks what it has found.
"""

import contextlib
import dataclasses
import functools
import os
import shlex
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import distributed
from adapter_files import is_adapter, weights_file
from adapting.new_tokens import check_unchanged, keep_new_tokens
from checkpoint import fingerprint
from common.choices import SELF
from common.device import pick_device
from common.errors import UserError, read_json_if_there
from common.files import atomic_file, file_sha256, write_json
from common.folder_lock import FolderLock
from common.origin import base_facts
from data import TrainingData
from flags import Flags, as_dict, check_owned_options
from interop.push import check_can_push, make_repository
from interop.resolve import base_folder, trained_day, trained_system
from methods import keep_start
from model import Transformer
from tokenization.chat_template import today
from tokenizer import Tokenizer
from training import checkpointer
from training.checkpointer import RUN_FILES, Checkpoint
from training.defaults import Settings, sizes_on_disk


@dataclass
class Run:
    """A run that is to begin, to go on, or that has ended already.

    flags: of a resumed run, completed by those of its checkpoint.
    checkpoint: what a resumed run goes on from; None for a new one.
    is_complete: there is nothing left to do.
    """

    flags: Flags
    device: torch.device
    checkpoint: Checkpoint | None = None
    is_complete: bool = False


def open_run(flags: Flags, lock: FolderLock) -> Run:
    """Joins the other ranks, if there are any, and finds the checkpoint that --resume takes.

    lock: gets the folder of --out, so that no second run writes into it. Rank 0 has it for all.
    """
    device = pick_device(flags.device)
    if distributed.launched_by_torchrun() or flags.shard not in (None, "none"):
        device = distributed.init_distributed(device)
    # Only now, when all ranks have joined: none of them looks at the folder any more.
    if flags.out and not flags.plan:
        distributed.run_on_rank0(lambda: lock_folder(lock, flags.out))
    if flags.resume:
        run = find_run(flags, device)
    else:
        run = Run(flags, device)
    if run.is_complete:
        return run
    # Now --shard may be that of the run which is resumed.
    if run.flags.shard not in (None, "none"):
        run.device = distributed.init_distributed(device)
    if run.checkpoint is None:
        distributed.init_context_parallel(run.flags.context_parallel)
    if run.flags.deterministic:
        # Without a fixed size of its workspace, cuBLAS chooses among algorithms as it likes.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # That would also fill all new memory, which is for finding bugs and takes time.
        torch.utils.deterministic.fill_uninitialized_memory = False
    check_offload(run.flags, run.device)
    if run.flags.push and not run.flags.plan:
        # Now, so that a token which may not write costs seconds, not the run.
        distributed.run_on_rank0(functools.partial(check_can_push, run.flags.push))
    return run


def with_date_and_system(flags: Flags, folder: Path) -> Flags:
    """Returns the flags with the date that the chat template writes and the system message of
    conversations that have none, where they were left open: those with which --adapter or --model
    was trained here go on, else today, and no system message.

    The run keeps them, also where it is resumed on another day; and all ranks have the same.
    folder: of the base model.
    """
    source = flags.adapter or folder
    day = flags.date
    if day is None:
        day = distributed.run_on_rank0(lambda: trained_day(source) or today())
    system = flags.system
    if system is None:
        system = distributed.run_on_rank0(lambda: trained_system(source))
    return dataclasses.replace(flags, date=day, system=system)


def lock_folder(lock: FolderLock, out: str) -> None:
    """Locks --out, and prints what there is to be said about it. Raises UserError where another
    run has it."""
    try:
        remark = lock.acquire(Path(out))
    except UserError as error:
        raise UserError(f"--out {error}") from None
    if remark:
        print(f"NOTE      {remark}")


def check_offload(flags: Flags, device: torch.device) -> None:
    """Raises UserError if something is to move to the host's memory that is there already."""
    names = []
    if flags.shard_offload:
        names.append("--shard-offload")
    if flags.activation_checkpointing == "offload":
        names.append("--activation-checkpointing offload")
    if flags.optimizer_offload:
        names.append("--optimizer-offload")
    if names and device.type != "cuda":
        why = f"on {device.type} everything is in the host's memory as it is"
        raise UserError(f"{names[0]}: is for GPUs; {why}")


def find_run(flags: Flags, device: torch.device) -> Run:
    """Returns the run under --out, with its flags; where --resume auto finds none, a new one.

    Raises UserError where --resume finds none.
    """
    out = Path(flags.out)
    ended_after = distributed.run_on_rank0(lambda: steps_of_final(out))
    is_prolonged = False
    if ended_after is not None:
        is_prolonged = "steps" in flags.given and flags.steps > ended_after > 0
        if not is_prolonged:
            more = f"; --steps above {ended_after} prolongs it" if ended_after else ""
            print(f"complete  {out} has ended; its outcome is {out / 'final'}{more}")
            if flags.push:
                command = f"python convert.py push {shlex.quote(str(out / 'final'))} {flags.push}"
                print(f"NOTE      nothing is pushed again; {command} does it")
            return Run(flags, device, is_complete=True)
    found = distributed.run_on_rank0(lambda: checkpointer.newest_checkpoint(out))
    if is_prolonged:
        check_can_be_prolonged(out, found, ended_after)
    if found is None and flags.resume == "on":
        raise UserError(
            f"--resume: no checkpoint under {out / checkpointer.FOLDER}; --resume auto would begin"
        )
    if found is None:
        check_owned_options(flags)
        print(f"resume    nothing to go on from under {out}; beginning")
        return Run(dataclasses.replace(flags, resume=None), device)
    flags = checkpointer.restore_layout(flags, found.state)
    # Before restore_flags, which counts into how many parts a step's rows are split.
    distributed.init_context_parallel(flags.context_parallel)
    flags, notes = checkpointer.restore_flags(flags, found.state, found.folder, is_prolonged)
    check_owned_options(flags)
    for line in found.notes + notes:
        print(f"NOTE      {line}")
    return Run(flags, device, found)


def steps_of_final(out: Path) -> int | None:
    """Returns after how many steps the run in `out` has ended, 0 if that is not known; None if it
    has not ended.

    A run that is being prolonged has the final/ of its former end until the new one. No checkpoint
    is read, which would take long for a large run that a scheduler starts again.
    """
    if not (out / "final").is_dir():
        return None
    # Runs of earlier versions don't say it; they can't be prolonged.
    steps = read_json_if_there(out / "final" / "plaintune.json").get("steps", 0)
    checkpoints = checkpointer.list_checkpoints(out / checkpointer.FOLDER)
    newest = max((checkpointer.step_of(folder) for folder in checkpoints), default=0)
    return None if 0 < steps < newest else steps


def check_can_be_prolonged(out: Path, newest: Checkpoint | None, ended_after: int) -> None:
    """Raises UserError if a run that has ended has no checkpoint of its end to go on from."""
    if newest is not None and newest.state["step"] == ended_after:
        return
    last = "it has none"
    if newest is not None:
        last = f"the newest is of step {newest.state['step']} of {ended_after}"
    raise UserError(
        f"--steps: {out} has ended, and to prolong it takes the checkpoint of its last step, but"
        f" {last} (stopped early, --save-every 0, or an earlier version); to train on from"
        f" {out / 'final'}, start a new run with it as --adapter or --model"
    )


def make_run_folder(flags: Flags, lock: FolderLock, resumed: Checkpoint | None = None) -> Path:
    """Makes the folder of the run, and returns it: a new one, or --out.

    What an earlier run wrote into --out is removed. If this run is resumed, that is only what was
    written after the checkpoint.

    lock: has --out already, and gets a new folder.
    """
    if resumed:
        out = Path(flags.out)
        for folder in (out, out / checkpointer.FOLDER):
            checkpointer.clear_leftovers(folder)
        for folder in checkpointer.list_checkpoints(out / checkpointer.FOLDER):
            # A newer one than that which is resumed is damaged.
            if checkpointer.step_of(folder) > resumed.state["step"]:
                checkpointer.remove_checkpoint(folder)
        checkpointer.truncate_metrics(out / "metrics.jsonl", resumed.state["step"])
        return out
    if flags.out is None:
        out = make_numbered_folder(flags.method)
        lock.acquire(out, is_new=True)
        return out
    out = Path(flags.out)
    out.mkdir(parents=True, exist_ok=True)
    checkpointer.clear_leftovers(out)
    for name in RUN_FILES:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return out


def open_run_folder(
    settings: Settings,
    lock: FolderLock,
    resumed: Checkpoint | None,
    origin: dict,
    model: Transformer,
    tokenizer: Tokenizer,
) -> tuple[Settings, Path]:
    """Makes the run's folder, if it is not there. Returns the settings with its name, and the folder.

    origin: what the run is made from, which a resumed run must be made from as well.
    Raises UserError where it is not, or where the disk lacks room.
    """
    if resumed:
        checkpointer.check_same_run(resumed, origin)
    if settings.push:
        distributed.run_on_rank0(functools.partial(make_repository, settings.push))
    # Now, since the folder that is replaced may hold their file.
    tokens = check_unchanged(settings, model.source, tokenizer)
    out = Path(distributed.run_on_rank0(lambda: make_run_folder(settings, lock, resumed)))
    settings = dataclasses.replace(settings, out=str(out))
    distributed.run_on_rank0(lambda: keep_start(settings))
    distributed.run_on_rank0(lambda: keep_new_tokens(tokens, out))
    check_room(settings, model, out)
    print(f"saves     {settings.reasons['save_every']}")
    return settings, out


def save_config(settings: Settings, out: Path) -> None:
    """Writes config.json: every option with its value, and the names of those that were typed, also
    at an earlier start of a resumed run."""
    config = as_dict(settings)
    given = set(settings.given)
    if settings.resume:
        # One that was damaged is replaced, and its names are lost.
        with contextlib.suppress(UserError, TypeError):
            given |= set(read_json_if_there(out / "config.json").get("given", []))
    config["given"] = sorted(given)
    with atomic_file(out / "config.json") as tmp:
        write_json(config, tmp)


def make_numbered_folder(method: str) -> Path:
    """Makes a new folder runs/TIME-METHOD, with a number if another began in the same second."""
    Path("runs").mkdir(exist_ok=True)
    number = 1
    while True:
        name = time.strftime(f"%Y%m%d-%H%M%S-{method}")
        if number > 1:
            name += f"-{number}"
        out = Path("runs") / name
        try:
            out.mkdir()
            return out
        except FileExistsError:
            number += 1


def check_room(settings: Settings, model: Transformer, out: Path) -> None:
    """Raises UserError if the disk has no room for the run's checkpoints and weights.

    A new folder is removed then.
    """
    checkpoint_size, weights_size, count = sizes_on_disk(settings, model)
    # best/, final/, and a best/ that is being written beside the old one.
    size = 3 * weights_size
    what = "best/ and final/"
    if settings.save_every:
        size += count * checkpoint_size
        what = f"{count} checkpoints, {what}"
    try:
        distributed.run_on_rank0(lambda: checkpointer.check_disk_space(out, size, what))
    except UserError:
        # A folder that holds something is not removed by this.
        with contextlib.suppress(OSError):
            out.rmdir()
        raise


def identify_run(flags: Flags, folder: Path, data: TrainingData) -> dict:
    """Returns what a run is made from: what common/origin.py says of the base, with "base_sha256", the
    hash of its weights, "data", that of the examples, and where another model teaches or rewards it
    "other_sha256", that of its weights.

    folder: the base model.
    Raises UserError where the ranks have different things.
    """
    # The weights are large, so one rank of each machine reads them.
    sha256 = None
    other_sha256 = None
    if distributed.local_rank() == 0:
        sha256 = fingerprint(folder)
        other_sha256 = fingerprint_of_other(flags)
    train = data.train
    replay_prompts = data.replay_val and data.replay_val.prompts
    digest = checkpointer.data_digest(
        train.lengths,
        train.num_trained,
        train.prompts,
        data.val.lengths,
        data.val.prompts,
        tuple(data.sampler.samples_per_epoch),
        data.seq_len,
        data.pack,
        flags.seed,
        replay_prompts,
        # The order of the classes is that of the score head's rows.
        *([train.label_names] if train.label_names else []),
        *(rows.contents for rows in train.examples.rows),
    )
    sha256_of_rank0, digest_of_rank0 = distributed.broadcast_object((sha256, digest))
    same_base = sha256 is None or sha256 == sha256_of_rank0
    same_data = digest == digest_of_rank0
    if not distributed.all_ranks_agree(same_base and same_data):
        raise UserError(
            "the processes do not have the same base or the same examples"
            " (a --map that draws at random?)"
        )
    origin = base_facts(folder) | {"base_sha256": sha256_of_rank0, "data": digest}
    other_sha256 = distributed.broadcast_object(other_sha256)
    if other_sha256 is not None:
        origin["other_sha256"] = other_sha256
    return origin


def fingerprint_of_other(flags: Flags) -> str | None:
    """Returns the hash of the weights of the model that --teacher or --reward names; None where neither does.
    Of an adapter it is that of its own weights."""
    named = flags.teacher
    if flags.reward is not None and Path(flags.reward).is_dir():
        named = flags.reward
    if named is None or named == SELF:
        return None
    if is_adapter(named):
        return file_sha256(weights_file(named))
    return fingerprint(base_folder(named, None))
