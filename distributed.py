"""One run by several processes, each with a device of its own: who is who, a model in shards, and sums over all.

`torchrun --nproc-per-node N train.py ...` starts N processes that all run the same file. Of a step's rows each computes
its part. How the model lies in them is --shard:

    none    every process holds all of it; gradients are added up once a step
    full    of every tensor each process holds a block of rows, FSDP2's `fully_shard` (Zhao et al. 2023, arXiv
            2304.11277): a block's weights are gathered just before it computes, and dropped behind it; gradients are
            added up and scattered to whom they belong. Optimizer and clipping see the own rows alone
    hybrid  full inside a node, and each node holds a copy: the sums across nodes are of a shard's size

A tensor in shards is a DTensor: `local` is the own rows, `whole` gathers it. With one process all of this is nothing.
"""

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.errors import UserError
from kernels.context_parallel import ContextParallel

SETUP_TIMEOUT = timedelta(hours=12)  # rank 0 may tokenise a large corpus while the others wait
SAVE_TIMEOUT = timedelta(hours=1)  # the same while it writes a checkpoint
BUCKET_NUMEL = 1 << 24  # elements all-reduced per message: enough for the network's full speed, little beside a model
# A frozen base that takes less than this fraction of the device's memory is replicated rather than sharded.
REPLICATE_BELOW = 0.25

context_parallel: ContextParallel | None = None  # where several ranks share each batch
pg_timeout = SETUP_TIMEOUT  # the timeout of collectives at present
process_groups: list = []  # those beside the group of all ranks


def launched_by_torchrun() -> bool:
    """Whether torchrun started this process, alone or among others."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def init_distributed(device: torch.device) -> torch.device:
    """Joins the group of processes that torchrun started; without it a group of this process alone. Returns the
    process's own device. Only the first process prints."""
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: several processes work on cpu and cuda, not on {device.type}")
    if device.type == "cuda":
        number = local_rank()
        if number >= torch.cuda.device_count():
            raise UserError(f"{number + 1} processes on this machine and {torch.cuda.device_count()} GPUs")
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if dist.is_initialized():
        pass  # several runs in a row, as in tests
    elif launched_by_torchrun():
        dist.init_process_group(backend, timeout=SETUP_TIMEOUT)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=SETUP_TIMEOUT)
    if not is_rank0():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)
    return device


def start_training_timeout(seconds: float) -> None:
    """The long waits are over: from now on a process that hears nothing for so many seconds gives up."""
    global pg_timeout
    pg_timeout = timedelta(seconds=seconds)
    set_pg_timeouts(pg_timeout)


def set_pg_timeouts(time: timedelta) -> None:
    if dist.is_initialized():
        for group in (None, *process_groups):
            dist.distributed_c10d._set_pg_timeout(time, group)


@contextlib.contextmanager
def extended_timeout() -> Iterator[None]:
    """While the first process writes something large, which the others wait for."""
    set_pg_timeouts(max(SAVE_TIMEOUT, pg_timeout))
    try:
        yield
    finally:
        set_pg_timeouts(pg_timeout)


def new_group(ranks: list[int] | None = None, backend: str | None = None):
    """Of these processes; those of no others call it as well. It gives up as the group of all does."""
    group = dist.new_group(ranks, timeout=pg_timeout, backend=backend)
    if ranks is None or rank() in ranks:
        process_groups.append(group)
    return group


def destroy_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
        device_mesh.cache_clear()
        process_groups.clear()


def init_context_parallel(count: int) -> None:
    """From now on so many neighbouring processes compute each batch together (kernels/context_parallel.py)."""
    global context_parallel
    if world_size() % count:
        raise UserError(f"--context-parallel {count}: {world_size()} processes are no multiple")
    context_parallel = None
    if count > 1:
        starts = range(0, world_size(), count)
        all_of_them = [new_group(list(range(start, start + count))) for start in starts]
        context_parallel = ContextParallel(count, rank() % count, all_of_them[rank() // count])


def dp_size() -> int:
    """Among how many a step's rows are dealt."""
    return world_size() // (context_parallel.size if context_parallel else 1)


def dp_rank() -> int:
    return rank() // (context_parallel.size if context_parallel else 1)


def local_rank() -> int:
    """Which of the processes of this machine this one is."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Processes of this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_rank0() -> bool:
    return rank() == 0


@contextlib.contextmanager
def local_rank0_first() -> Iterator[None]:
    """The first process of each machine does the block, then the others: what it leaves in the cache serves them."""
    first = local_rank() == 0
    if not first:
        all_ranks_agree(True)
    yield
    if first:
        all_ranks_agree(True)


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def all_ranks_agree(fine: bool, group=None) -> bool:
    """Whether all processes say so; waits for them. (Between CPUs: it notices at once when one of them dies.)"""
    if world_size() == 1:
        return fine
    against = torch.tensor(int(not fine))
    dist.all_reduce(against, group=group)
    return int(against) == 0


def broadcast_object(value, group=None):
    """What the first process has, for all: anything made of Python's own types."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, group=group, device=torch.device("cpu"))
    return box[0]


def run_on_rank0(work: Callable):
    """Runs work() on rank 0 and returns its result on every rank; an error there is raised on every rank."""
    with synced_errors():
        result = work() if is_rank0() else None
    return broadcast_object(result)


class RemoteRankError(OSError):
    """Another rank has failed, and says why."""

    def __init__(self):
        super().__init__("another process has failed")


@contextlib.contextmanager
def synced_errors(group=None) -> Iterator[None]:
    """A block in which a UserError or OSError of one rank ends the block on every rank: there as it was raised, on the
    others as RemoteRankError. All ranks wait for each other at its end."""
    error = None
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
    """A context manager that rank 0 alone enters; the others get None. Where entering, leaving or the block itself
    fails on one rank it fails on all."""
    with contextlib.ExitStack() as stack:
        with synced_errors(group):
            value = stack.enter_context(block) if is_rank0() else None
        with synced_errors(group):  # its error leaves the stack, which takes away what is half done
            yield value
        with synced_errors(group):
            stack.close()


def all_gather_object(value, group=None) -> list:
    """What each process has, in order of ranks."""
    if world_size() == 1:
        return [value]
    found = [None] * world_size()
    dist.all_gather_object(found, value, group=group)
    return found


# ------------------------------------------------------------------------------------------------- shards


def shard_model(
    model: nn.Module, kind: str, device: torch.device, narrow: torch.dtype | None, offload: bool = False
) -> None:
    """Makes DTensors of the parameters of a model on the meta device: "full" or "hybrid". Every block is gathered on
    its own; what is around them (embeddings, the last norm, the head) once, for all of a forward and backward.

    narrow: the dtype in which weights are gathered; None: their own. Gradients are added up in fp32.
    Tensors that have no rows to share (the second level of NF4's scales, which runs across rows) stay whole
    everywhere. offload: shards, gradients and the optimizer's state live in the host's memory.
    """
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    policy = MixedPrecisionPolicy(narrow, torch.float32, cast_forward_inputs=False)
    whole = {p for name, p in model.named_parameters() if name.endswith((".nf4.nested", ".nf4.offset"))}
    whole |= {p for name, p in model.named_parameters() if name.endswith("nf4.absmax") and p.is_floating_point()}
    settings = {
        "mesh": device_mesh(kind, device.type),
        "mp_policy": policy,
        "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy(),
        "ignored_params": whole,
    }
    for block in model.blocks:
        fully_shard(block, **settings)
    fully_shard(model, **settings)
    register_fsdp_forward_method(model, "flat")  # the training path, which is not forward()
    for module in (*model.blocks, model):
        module.set_gradient_divide_factor(1.0)  # a loss is divided by the tokens of all processes already
        module.set_force_sum_reduction_for_comms(True)
    for block, after in zip(model.blocks, model.blocks[1:]):
        block.set_modules_to_forward_prefetch([after])


@functools.cache
def device_mesh(kind: str, device: str):
    """The processes as a row, or as nodes and the processes of each."""
    from torch.distributed.device_mesh import init_device_mesh

    if kind == "full":
        return init_device_mesh(device, (world_size(),), mesh_dim_names=("shard",))
    found = init_device_mesh(
        device, (world_size() // local_world_size(), local_world_size()), mesh_dim_names=("copies", "shard")
    )
    process_groups.extend(found.get_all_groups())
    return found


def has_shards(model: nn.Module) -> bool:
    return any(is_sharded(p) for p in model.parameters())


def is_sharded(x: Tensor) -> bool:
    return hasattr(x, "placements")


def to_local(x: Tensor) -> Tensor:
    """The rows of a tensor in shards that are this process's, in their own memory; of another, all of it."""
    return x.to_local() if is_sharded(x) else x


def full_tensor(x: Tensor) -> Tensor:
    """All rows of a tensor in shards, on every process; of another, itself. All processes must call it."""
    return x.full_tensor() if is_sharded(x) else x


def local_row_slice(x: Tensor) -> slice:
    """Which rows `local` has: of R rows by W processes each has ceil(R / W), the last ones fewer."""
    if not is_sharded(x):
        return slice(0, x.shape[0])
    return shard_row_slice(x, x.device_mesh.get_local_rank("shard"))


def shard_row_slice(x: Tensor, number: int) -> slice:
    """Which rows shard `number` of a DTensor has."""
    each = -(-x.shape[0] // num_shards(x))
    return slice(min(number * each, x.shape[0]), min((number + 1) * each, x.shape[0]))


def num_shards(x: Tensor) -> int:
    return x.device_mesh["shard"].size() if is_sharded(x) else 1


def shard_group(x: Tensor):
    """The processes among which a DTensor's rows are shared."""
    return x.device_mesh.get_group("shard")


def dtensor_like(x: Tensor, mine: Tensor) -> Tensor:
    """A DTensor laid out as x is, of rows of this process (with x's shape, or one number a row)."""
    from torch.distributed.tensor import DTensor

    shape = torch.Size((x.shape[0], *mine.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    where = x.device_mesh
    if mine.device.type != where.device_type:  # a copy on the host: on the GPUs' mesh it would be moved there
        where = device_mesh("full" if where.ndim == 1 else "hybrid", mine.device.type)
    return DTensor.from_local(mine, where, x.placements, run_check=False, shape=shape, stride=stride)


def gather_rows(mine: Tensor, x: Tensor) -> Tensor:
    """All rows of what each process has of x's rows, [own rows, ...] -> [rows, ...]."""
    return full_tensor(dtensor_like(x, mine)) if is_sharded(x) else mine


# ------------------------------------------------------------------------------------------------- a step


def balance_across_ranks(sizes: Sequence[int], hands: int) -> list[list[int]]:
    """The numbers of a step's rows, for so many processes: each gets as many, and about as many tokens (by size, to
    and fro). It follows from the sizes alone, so that every process knows what all have."""
    order = sorted(range(len(sizes)), key=lambda i: sizes[i])
    found: list[list[int]] = [[] for _ in range(hands)]
    for turn, i in enumerate(order):
        lap, place = divmod(turn, hands)
        found[place if lap % 2 == 0 else hands - 1 - place].append(i)
    return found


def set_gradient_sync(model: nn.Module, now: bool) -> None:
    """Before a micro-batch: whether its backward adds gradients up over the processes, or leaves them for the next."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(now)
        model.set_is_last_backward(now)


def all_reduce_gradients(parameters: list[Tensor]) -> None:
    """Without shards: the sum of all processes' gradients, in fp32, in messages of MESSAGE numbers and more."""
    if world_size() == 1 or is_sharded(parameters[0]):
        return
    waiting: list[Tensor] = []
    for number, p in enumerate(parameters, 1):
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        waiting.append(p.grad)
        if sum(grad.numel() for grad in waiting) < BUCKET_NUMEL and number < len(parameters):
            continue
        flat = all_reduce_sum(torch.cat([grad.flatten().float() for grad in waiting]))
        for grad, part in zip(waiting, flat.split([grad.numel() for grad in waiting]), strict=True):
            grad.copy_(part.view_as(grad))
        waiting = []


@torch.no_grad()
def clip_grad_norm_(parameters: list[Tensor], most: float) -> Tensor:
    """Scales the gradients down to a norm of at most `most` over all parameters and processes; returns the norm before
    that, float32 scalar."""
    if not is_sharded(parameters[0]):
        return nn.utils.clip_grad_norm_(parameters, most)
    grads = [to_local(p.grad) for p in parameters if p.grad is not None]
    squares = torch.stack([grad.float().square().sum() for grad in grads]).sum()
    where = torch.device(parameters[0].device_mesh.device_type)  # offloaded shards lie elsewhere
    squares = squares.to(where)
    dist.all_reduce(squares, group=shard_group(parameters[0]))
    norm = squares.sqrt().to(grads[0].device)
    torch._foreach_mul_(grads, (most / (norm + 1e-6)).clamp(max=1.0))
    return norm


def is_lost_rank(error: BaseException) -> bool:
    """Whether an error says that another process is gone, or was waited for too long."""
    of_a_group = isinstance(error, dist.DistError) or any(word in str(error).lower() for word in ("gloo", "nccl"))
    return world_size() > 1 and isinstance(error, RuntimeError) and of_a_group


def lost_rank_error(error: BaseException) -> UserError:
    return UserError(f"another process has ended, or was waited for too long ({str(error)[:200]})")
