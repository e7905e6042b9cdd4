"""One run on several ranks, each a process with a device of its own.

`torchrun --nproc-per-node N train.py ...` starts N processes that run the same file. Each computes
its part of a step's rows (data parallel). --shard says how the model lies in them:

    none    Every rank has a full copy. The gradients are summed over the ranks once a step.
    full    Every rank has a block of rows of each tensor, by FSDP2's `fully_shard` (Zhao et al.
            2023, arXiv 2304.11277). The weights of a block are gathered just before it computes,
            and freed after it. The gradients are summed and scattered to the ranks that have the
            rows. Optimizer and clipping see only a rank's own rows.
    hybrid  As full, but inside each node, and every node has a full copy. Only sums of a shard's
            size cross nodes.

A sharded tensor is a DTensor: `to_local` returns this rank's rows, `full_tensor` gathers all rows.
With one process all functions here do nothing, or return what they are given.
"""

import atexit
import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.errors import UserError
from kernels.context_parallel import ContextParallel

if TYPE_CHECKING:
    # Importing these takes a while, and a run on one device needs none of them.
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs

# Rank 0 may tokenise a large corpus while the others wait.
SETUP_TIMEOUT = timedelta(hours=12)
# Rank 0 may write a checkpoint while the others wait.
SAVE_TIMEOUT = timedelta(hours=1)
# Elements that are all-reduced in one message: enough for the network's full speed, little memory
# beside a model.
BUCKET_NUMEL = 1 << 24
# A frozen base that takes less than this fraction of the device's memory is replicated rather than
# sharded.
REPLICATE_BELOW = 0.25

context_parallel: ContextParallel | None = None  # set if several ranks share each batch
pg_timeout = SETUP_TIMEOUT  # the present timeout of collectives
process_groups: list["ProcessGroup"] = []  # all groups but that of all ranks


def launched_by_torchrun() -> bool:
    """True if torchrun started this process, alone or with others."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def init_distributed(device: torch.device) -> torch.device:
    """Joins the process group that torchrun started, or makes a group of this process alone.

    Afterwards only rank 0 prints.

    device: its type must be cpu or cuda.
    Returns this rank's own device.
    Raises UserError on another type of device, and if there are more processes than GPUs.
    """
    if device.type not in ("cpu", "cuda"):
        raise UserError(
            f"--device {device}: several processes work on cpu and cuda, not on {device.type}"
        )
    if device.type == "cuda":
        number = local_rank()
        num_gpus = torch.cuda.device_count()
        if number >= num_gpus:
            raise UserError(
                f"{number + 1} processes need a GPU each, but this machine has {num_gpus};"
                " lower torchrun's --nproc-per-node"
            )
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    # Also on GPUs there are messages between CPUs: objects, and whether all ranks agree.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # A process that does several runs in a row, as tests do, has its group already.
    if not dist.is_initialized():
        if launched_by_torchrun():
            dist.init_process_group(backend, timeout=SETUP_TIMEOUT)
        else:
            dist.init_process_group(
                backend, store=dist.HashStore(), rank=0, world_size=1, timeout=SETUP_TIMEOUT
            )
    if not is_rank0():
        # It stays open for as long as the process lives.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return device


def start_training_timeout(seconds: float) -> None:
    """Ends the long waits of the set-up: from now on a rank that waits for another gives up after
    this time."""
    global pg_timeout
    pg_timeout = timedelta(seconds=seconds)
    set_pg_timeouts(pg_timeout)


def set_pg_timeouts(timeout: timedelta) -> None:
    """Sets the timeout of the collectives of all process groups."""
    if dist.is_initialized():
        for group in (None, *process_groups):
            dist.distributed_c10d._set_pg_timeout(timeout, group)


@contextlib.contextmanager
def extended_timeout() -> Iterator[None]:
    """A block in which ranks wait for each other longer, since rank 0 writes something large."""
    set_pg_timeouts(max(SAVE_TIMEOUT, pg_timeout))
    try:
        yield
    finally:
        set_pg_timeouts(pg_timeout)


def new_group(ranks: list[int] | None = None, backend: str | None = None) -> "ProcessGroup":
    """Returns a process group of `ranks` (None: all), with the present timeout. Every rank must
    call this, whether it is one of them or not."""
    group = dist.new_group(ranks, timeout=pg_timeout, backend=backend)
    if ranks is None or rank() in ranks:
        process_groups.append(group)
    return group


def destroy_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
        device_mesh.cache_clear()
        process_groups.clear()


@contextlib.contextmanager
def safe_exit() -> Iterator[None]:
    """A block, the whole program, after which a rank that torchrun started ends at once, with the
    exit code that it would have had.

    Python's own end takes its objects apart while threads of gloo may still hold tensors. A thread
    that frees one then aborts the process (pytorch issue 190489), and torchrun calls a run failed
    that has done all of its work. So what is registered with atexit runs, what is buffered is
    written, and nothing is taken apart.
    """
    code = 0
    try:
        yield
    except SystemExit as end:
        if not launched_by_torchrun() or isinstance(end.code, str):
            raise
        code = end.code or 0
    if launched_by_torchrun():
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            # A console that is gone.
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def init_context_parallel(size: int) -> None:
    """Lets `size` neighbouring ranks compute each batch together (kernels/context_parallel.py).

    Raises UserError if the number of ranks is not a multiple of `size`.
    """
    global context_parallel
    if world_size() % size:
        count = world_size()
        raise UserError(
            f"--context-parallel {size}: {count}, the number of processes, is not a multiple of it"
        )
    context_parallel = None
    if size > 1:
        # Every rank has to call new_group for every group.
        groups = []
        for start in range(0, world_size(), size):
            groups.append(new_group(list(range(start, start + size))))
        context_parallel = ContextParallel(size, rank() % size, groups[rank() // size])


def dp_size() -> int:
    """Returns into how many parts the rows of a step are split: one for each rank or, with
    --context-parallel, for each group of ranks that share a batch."""
    if context_parallel is None:
        return world_size()
    return world_size() // context_parallel.size


def dp_rank() -> int:
    """Returns which of the dp_size() parts of a step's rows this rank computes."""
    if context_parallel is None:
        return rank()
    return rank() // context_parallel.size


def local_rank() -> int:
    """Returns this rank's number among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Returns how many ranks this machine has."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_rank0() -> bool:
    return rank() == 0


@contextlib.contextmanager
def local_rank0_first() -> Iterator[None]:
    """A block that the first rank of each machine runs before the others: they can use what it
    leaves in the cache."""
    is_first = local_rank() == 0
    if not is_first:
        all_ranks_agree(True)
    yield
    if is_first:
        all_ranks_agree(True)


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sums x over all ranks, in place, and returns it."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def all_ranks_agree(fine: bool, group=None) -> bool:
    """True if `fine` is true on every rank. All ranks wait for each other here."""
    if world_size() == 1:
        return fine
    # A tensor on the CPU, since gloo notices at once that a rank has died.
    num_against = torch.tensor(int(not fine))
    dist.all_reduce(num_against, group=group)
    return int(num_against) == 0


def broadcast_object(value, group=None):
    """Returns rank 0's value on every rank. value: anything made of Python's own types."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, group=group, device=torch.device("cpu"))
    return box[0]


def run_on_rank0(work: Callable):
    """Runs work() on rank 0 and returns its result on every rank; an error there is raised on every
    rank."""
    with synced_errors():
        result = work() if is_rank0() else None
    return broadcast_object(result)


class RemoteRankError(OSError):
    """Another rank has failed, and says why itself."""

    def __init__(self):
        super().__init__("another process has failed")


@contextlib.contextmanager
def synced_errors(group=None) -> Iterator[None]:
    """A block in which a UserError or OSError of one rank is raised on every rank: on that rank as
    it is, on the others as RemoteRankError. All ranks wait for each other at the end of the
    block."""
    error: Exception | None = None
    try:
        yield
    except (UserError, OSError) as caught:
        error = caught
    fine = all_ranks_agree(error is None, group)
    if error is not None:
        raise error
    if not fine:
        raise RemoteRankError


@contextlib.contextmanager
def rank0_context(block, group=None) -> Iterator:
    """A context manager that only rank 0 enters; the others get None. If entering it, leaving it or
    the block itself fails on one rank, it fails on all."""
    with contextlib.ExitStack() as stack:
        with synced_errors(group):
            value = stack.enter_context(block) if is_rank0() else None
        # An error in the block leaves the stack too, so that `block` removes what is half done.
        with synced_errors(group):
            yield value
        with synced_errors(group):
            stack.close()


def all_gather_object(value, group=None) -> list:
    """Returns the values of all ranks, in the order of ranks."""
    if world_size() == 1:
        return [value]
    values: list = [None] * world_size()
    dist.all_gather_object(values, value, group=group)
    return values


# ---- shards ----


def shard_model(
    model: nn.Module,
    kind: str,
    device: torch.device,
    gathered_dtype: torch.dtype | None,
    offload: bool = False,
) -> None:
    """Turns the parameters of a model on the meta device into DTensors.

    Each block is gathered on its own. What is around the blocks (embeddings, the last norm, the
    LM head) is gathered once for a whole forward and backward. A score head is gathered when it is
    called, in its own dtype, float32: it is small, and its products are float32.

    kind: "full" or "hybrid".
    gathered_dtype: the dtype in which weights are gathered; None: their own. Gradients are summed
        in fp32.
    offload: shards, gradients and the optimizer's state live in the host's memory.

    Tensors that have no rows to divide stay whole on every rank: the second level of NF4's scales,
    which runs across rows.
    """
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    offload_policy = OffloadPolicy()
    if offload:
        offload_policy = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    replicated: set[nn.Parameter] = set()
    for name, p in model.named_parameters():
        is_second_level = name.endswith((".nf4.nested", ".nf4.offset"))
        is_single_level = name.endswith("nf4.absmax") and p.is_floating_point()
        if is_second_level or is_single_level:
            replicated.add(p)
    shard = functools.partial(
        fully_shard,
        mesh=device_mesh(kind, device.type),
        mp_policy=MixedPrecisionPolicy(gathered_dtype, torch.float32, cast_forward_inputs=False),
        offload_policy=offload_policy,
        ignored_params=replicated,
    )
    # fully_shard changes the class of a module in place, and returns the module.
    assert isinstance(model.blocks, nn.ModuleList)
    blocks: list[FSDPModule] = [shard(block) for block in model.blocks]
    around: list[FSDPModule] = []
    if model.score is not None:
        own_dtype = MixedPrecisionPolicy(None, torch.float32, cast_forward_inputs=False)
        around.append(shard(model.score, mp_policy=own_dtype))
    # What the blocks and the score head have taken is not sharded again.
    around.append(shard(model))
    # Training calls `flat` instead of `forward`.
    register_fsdp_forward_method(model, "flat")
    for module in (*blocks, *around):
        # The loss is divided by the tokens of all ranks already, so gradients are not averaged.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    # The next block is gathered while this one computes.
    for block, next_block in pairwise(blocks):
        block.set_modules_to_forward_prefetch([next_block])


@functools.cache
def device_mesh(kind: str, device: str) -> "DeviceMesh":
    """Returns the mesh of all ranks: [ranks] for "full", [nodes, ranks of a node] for "hybrid".
    device: its type."""
    from torch.distributed.device_mesh import init_device_mesh

    if kind == "full":
        return init_device_mesh(device, (world_size(),), mesh_dim_names=("shard",))
    shape = world_size() // local_world_size(), local_world_size()
    mesh = init_device_mesh(device, shape, mesh_dim_names=("copies", "shard"))
    process_groups.extend(mesh.get_all_groups())
    return mesh


def has_shards(model: nn.Module) -> bool:
    return any(is_sharded(p) for p in model.parameters())


def is_sharded(x: Tensor) -> "TypeIs[DTensor]":
    """True if x is a DTensor."""
    # isinstance would import DTensor, also in a run that has none.
    return hasattr(x, "placements")


def to_local(x: Tensor) -> Tensor:
    """Returns this rank's rows of a sharded tensor, as a view; any other tensor as it is."""
    return x.to_local() if is_sharded(x) else x


def full_tensor(x: Tensor) -> Tensor:
    """Returns all rows of a sharded tensor on every rank; any other tensor as it is. All ranks must
    call it."""
    return x.full_tensor() if is_sharded(x) else x


def local_row_slice(x: Tensor) -> slice:
    """Returns which rows of x `to_local` has."""
    if not is_sharded(x):
        return slice(0, x.shape[0])
    return shard_row_slice(x, x.device_mesh.get_local_rank("shard"))


def shard_row_slice(x: Tensor, number: int) -> slice:
    """Returns which rows shard `number` of a DTensor has: of R rows in W shards ceil(R / W), the
    last ones fewer."""
    num_rows = x.shape[0]
    rows_per_shard = -(-num_rows // num_shards(x))
    start = min(number * rows_per_shard, num_rows)
    stop = min((number + 1) * rows_per_shard, num_rows)
    return slice(start, stop)


def num_shards(x: Tensor) -> int:
    return x.device_mesh["shard"].size() if is_sharded(x) else 1


def shard_group(x: Tensor) -> "ProcessGroup":
    """Returns the process group of the ranks that have the shards of a DTensor."""
    return cast("DTensor", x).device_mesh.get_group("shard")


def dtensor_like(x: "DTensor", local_rows: Tensor) -> "DTensor":
    """Returns a DTensor that is sharded as x is. local_rows: this rank's rows, of x's shape or any
    other width."""
    from torch.distributed.tensor import DTensor

    shape = torch.Size((x.shape[0], *local_rows.shape[1:]))
    # The stride of a contiguous tensor of this shape.
    stride = torch.empty(shape, device="meta").stride()
    mesh = x.device_mesh
    # Rows on the host would be moved to the GPUs of x's mesh, so they get a mesh of CPUs.
    if local_rows.device.type != mesh.device_type:
        mesh = device_mesh("full" if mesh.ndim == 1 else "hybrid", local_rows.device.type)
    return DTensor.from_local(
        local_rows, mesh, x.placements, run_check=False, shape=shape, stride=stride
    )


def gather_rows(local_rows: Tensor, x: Tensor) -> Tensor:
    """Returns all ranks' rows, [local rows, ...] -> [rows, ...], if x is sharded; else local_rows
    as it is."""
    return full_tensor(dtensor_like(x, local_rows)) if is_sharded(x) else local_rows


# ---- a step ----


def balance_across_ranks(sizes: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Divides the rows of a step among ranks: as many rows to each (to within one), and about as
    many tokens.

    sizes: the tokens of each row.
    Returns, for each rank, the numbers of its rows. Rows are given out in order of size, forwards
    and backwards over the ranks. The result follows from the sizes alone, so that every rank knows
    the rows of all ranks.
    """
    by_size = sorted(range(len(sizes)), key=lambda i: sizes[i])
    rows: list[list[int]] = [[] for _ in range(num_ranks)]
    for position, i in enumerate(by_size):
        lap, place = divmod(position, num_ranks)
        if lap % 2 == 1:
            place = num_ranks - 1 - place
        rows[place].append(i)
    return rows


def set_gradient_sync(model: nn.Module, now: bool) -> None:
    """Says, before a micro-batch, whether its backward sums the gradients over the ranks, or leaves
    that to a later micro-batch. Does nothing without FSDP."""
    if not hasattr(model, "set_requires_gradient_sync"):
        return
    sharded_model = cast("FSDPModule", model)
    sharded_model.set_requires_gradient_sync(now)
    sharded_model.set_is_last_backward(now)


def all_reduce_gradients(parameters: Sequence[Tensor]) -> None:
    """Sums the gradients of all ranks in fp32, in messages of about BUCKET_NUMEL elements. Does
    nothing with FSDP, which has summed them already."""
    if world_size() == 1 or is_sharded(parameters[0]):
        return
    bucket: list[Tensor] = []
    for number, p in enumerate(parameters, 1):
        # A rank whose rows did not use a parameter still has to take part in its sum.
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        bucket.append(p.grad)
        sizes = [grad.numel() for grad in bucket]
        is_full = sum(sizes) >= BUCKET_NUMEL
        is_last = number == len(parameters)
        if not is_full and not is_last:
            continue
        # One long fp32 vector: many small messages would each wait for the network.
        flat = torch.cat([grad.flatten().float() for grad in bucket])
        parts = all_reduce_sum(flat).split(sizes)
        for grad, part in zip(bucket, parts, strict=True):
            grad.copy_(part.view_as(grad))
        bucket = []


@torch.no_grad()
def clip_grad_norm_(parameters: Sequence[Tensor], max_norm: float) -> Tensor:
    """Scales the gradients down so that their norm over all parameters and ranks is at most
    max_norm.

    Returns the norm before that, a float32 scalar.
    """
    first = parameters[0]
    if not is_sharded(first):
        return nn.utils.clip_grad_norm_(parameters, max_norm)
    grads = [to_local(p.grad) for p in parameters if p.grad is not None]
    squares = torch.stack([grad.float().square().sum() for grad in grads]).sum()
    # Offloaded shards are on the host, but the sum is between the devices of the mesh.
    squares = squares.to(torch.device(first.device_mesh.device_type))
    dist.all_reduce(squares, group=shard_group(first))
    norm = squares.sqrt().to(grads[0].device)
    # The same 1e-6 as in torch's clip_grad_norm_. A factor on the device: nothing waits for it.
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(grads, scale)
    return norm


def is_lost_rank(error: BaseException) -> bool:
    """True if an error says that another rank has died, or that waiting for it took too long."""
    if world_size() == 1 or not isinstance(error, RuntimeError):
        return False
    if isinstance(error, dist.DistError):
        return True
    # The backends also raise plain RuntimeErrors, which only their text tells apart.
    message = str(error).lower()
    return "gloo" in message or "nccl" in message


def lost_rank_error(error: BaseException) -> UserError:
    """Returns what the user is told when `is_lost_rank(error)`."""
    detail = str(error)[:200]
    return UserError(f"another process has ended, or was waited for too long ({detail})")
