"""From gradients to steps: AdamW, AdamW with 8-bit moments, AdamW on bf16 weights, Muon, and AdamW
whose state lives in the host's memory.

Bytes for each trained number (weight + gradient + optimizer state):

    adamw                         4 + 4 + 8     fp32 weight, two fp32 moments
    adamw8bit                     4 + 4 + 2     fp32 weight, two 8-bit moments
    adamw8bit, --weights bf16     2 + 2 + 2
    muon                          4 + 4 + 4     one fp32 momentum
    --optimizer-offload           2 + 2         on the device, in bf16; the rest is on the host

The training loop gets a list of optimizers. It sets their learning rates and calls `step` on each.
"""

import functools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.adamw import adamw

from common.device import pick_dtype
from distributed import (
    all_reduce_sum,
    is_sharded,
    num_shards,
    shard_group,
    shard_row_slice,
    to_local,
)
from kernels.adamw import adamw_step
from kernels.nf4 import NESTED_BLOCK, dequantize_8bit, dynamic_codebook
from kernels.triton_utils import use_triton
from quant import quantize_8bit

# Tensors with fewer elements keep fp32 moments. They are norms and biases, and need little memory.
MIN_8BIT_NUMEL = 4096
# Elements that are fp32 at a time while 8-bit moments or bf16 weights are updated: a multiple of
# NESTED_BLOCK.
CHUNK_NUMEL = {"cpu": 1 << 18, "cuda": 1 << 24}
# The learning rate after the warm-up, as a share of its peak, by progress: 0 at the peak, 1 a step
# after the last.
SCHEDULES = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}
DESCRIPTIONS = {
    "adamw": "AdamW",
    "adamw8bit": "AdamW with moments in 8 bits",
    "muon": "Muon on matrices, AdamW on the rest",
}


class Optimizer:
    """A minimal torch.optim.Optimizer. (To construct torch's own imports the compiler: 150 MB, 1 s.)

    groups: dicts of "params" and of settings for these parameters.
    settings: for the groups that have none of their own.
    """

    def __init__(self, groups: list[dict], **settings):
        self.param_groups = [settings | group for group in groups]
        self.state: dict[Tensor, dict] = {}

    def step(self, found_inf: Tensor | None = None) -> None:
        """Updates every parameter that has a gradient.

        found_inf: float32 scalar, 1 = skip this update, 0 or None = take it. On a GPU AdamW reads
            it on the device; the other optimizers wait until the host knows its value.
        """
        raise NotImplementedError

    def zero_grad(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def init_state(self, p: Tensor, group: dict) -> dict[str, Tensor]:
        """Returns the state, before the first step, of the rows of a parameter that this rank has."""
        raise NotImplementedError

    def states(self) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """Returns (parameter, state) of every parameter, for checkpoints to save or to fill."""
        pairs = []
        for group in self.param_groups:
            for p in group["params"]:
                pairs.append((p, self.state_of(p, group)))
        return pairs

    def state_of(self, p: Tensor, group: dict) -> dict[str, Tensor]:
        if p not in self.state:
            self.state[p] = self.init_state(p, group)
        return self.state[p]

    def with_gradients(self) -> list[tuple[dict, list[Tensor]]]:
        """Returns each group with those of its parameters that have a gradient."""
        pairs = []
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            pairs.append((group, parameters))
        return pairs


def must_skip(found_inf: Tensor | None) -> bool:
    """True if a step must change nothing (see `Optimizer.step`). It waits for the device."""
    return found_inf is not None and bool(found_inf)


def local_grad(p: Tensor) -> Tensor:
    """Returns this rank's rows of the gradient of a parameter that has one."""
    assert p.grad is not None
    return to_local(p.grad)


# ---- AdamW ----


class AdamW(Optimizer):
    """AdamW (Loshchilov & Hutter 2019).

    fp32 weights with fp32 moments are updated by torch's fused step. There are two more forms.

    bits=8: the moments are stored in 8 bits, in blocks of 256 numbers (Dettmers et al. 2022, arXiv
    2110.02861), in the layout of bitsandbytes: the first moment is signed, the second is unsigned.
    Each step dequantises and quantises them again, CHUNK_NUMEL elements at a time.

    bf16 weights: the update is computed in fp32 and rounded stochastically, so that it is right on
    average. Rounding to the nearest number would lose every update smaller than half of the
    distance to the next bf16 number.

    On GPUs one kernel computes these two forms in a single pass over memory (kernels/adamw.py).
    """

    def __init__(self, groups, lr: float, bits: int = 32, weight_decay: float = 0.0):
        super().__init__(
            groups, lr=lr, bits=bits, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay
        )

    @torch.no_grad()
    def step(self, found_inf: Tensor | None = None) -> None:
        for group, parameters in self.with_gradients():
            fused, on_gpu, in_chunks = [], [], []
            for p in parameters:
                if has_fused_step(p, group):
                    fused.append(p)
                elif use_triton(to_local(p)):
                    on_gpu.append(p)
                else:
                    in_chunks.append(p)
            if fused:
                self.fused(fused, group, found_inf)
            if on_gpu:
                self.update_on_gpu(on_gpu, group, found_inf)
            # Only these parameters wait for the device: the other two forms read found_inf there.
            if in_chunks and not must_skip(found_inf):
                for p in in_chunks:
                    self.update(p, group)

    def init_state(self, p: Tensor, group: dict) -> dict[str, Tensor]:
        rows = to_local(p)
        if has_fused_step(p, group):
            return {
                "m": torch.zeros_like(rows, memory_format=torch.preserve_format),
                "v": torch.zeros_like(rows, memory_format=torch.preserve_format),
                "step": torch.zeros((), device=p.device),
            }
        # Both other forms read the weight as a flat vector.
        if not is_sharded(p):
            p.data = p.data.contiguous()
        # The kernel counts steps on the GPU; the CPU form needs the count on the host.
        step_device = rows.device if use_triton(rows) else None
        state = {"step": torch.zeros((), device=step_device)}
        numel = rows.numel()
        is_8bit = group["bits"] == 8 and p.numel() >= MIN_8BIT_NUMEL
        for name in ("m", "v"):
            if is_8bit:
                # Whatever the codes are, a scale of 0 makes all numbers 0.
                num_blocks = -(-numel // NESTED_BLOCK)
                state[name] = torch.zeros(numel, dtype=torch.uint8, device=p.device)
                state[f"{name}_scale"] = torch.zeros(num_blocks, device=p.device)
            else:
                state[name] = torch.zeros(numel, dtype=torch.float32, device=p.device)
        return state

    def fused(self, parameters: list[Tensor], group: dict, found_inf: Tensor | None) -> None:
        """Updates fp32 weights with fp32 moments by torch's fused AdamW."""
        if found_inf is not None:
            # This waits for the device if the parameters live on the host.
            found_inf = found_inf.to(to_local(parameters[0]).device)
        states = [self.state_of(p, group) for p in parameters]
        beta1, beta2 = group["betas"]
        adamw(
            params=[to_local(p) for p in parameters],
            grads=[local_grad(p) for p in parameters],
            exp_avgs=[state["m"] for state in states],
            exp_avg_sqs=[state["v"] for state in states],
            max_exp_avg_sqs=[],
            state_steps=[state["step"] for state in states],
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            found_inf=found_inf,
        )

    def update_on_gpu(
        self, parameters: list[Tensor], group: dict, found_inf: Tensor | None
    ) -> None:
        """Updates 8-bit moments or bf16 weights by the kernel, without waiting for the GPU.

        The GPU itself counts the steps, and skips the update if found_inf is 1.
        """
        device = to_local(parameters[0]).device
        if found_inf is None:
            steps_taken = torch.ones((), device=device)
        else:
            found_inf = found_inf.to(device)
            steps_taken = 1 - found_inf
        states = [self.state_of(p, group) for p in parameters]
        # A list of tensors is added: a single tensor would be read by the host, as a number.
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, [steps_taken] * len(steps))
        # The seeds come from the device's generator, whose state is part of a checkpoint. Each has
        # 16 bytes, because Triton compiles one kernel for addresses that are multiples of 16, and
        # another one for all others.
        seeds = torch.randint(1 << 62, (len(parameters), 2), device=device)
        for p, state, seed in zip(parameters, states, seeds.unbind(), strict=True):
            weights = to_local(p).view(-1)
            grads = local_grad(p).reshape(-1)
            adamw_step(weights, grads, state, group, seed, found_inf)

    def update(self, p: Tensor, group: dict) -> None:
        """Updates one parameter with plain PyTorch operations, CHUNK_NUMEL elements at a time."""
        state = self.state_of(p, group)
        state["step"] += 1
        step = int(state["step"])
        weights = to_local(p).view(-1)
        grads = local_grad(p).reshape(-1)
        is_8bit = state["m"].dtype == torch.uint8
        chunk_numel = CHUNK_NUMEL.get(p.device.type, CHUNK_NUMEL["cuda"])
        for start in range(0, len(weights), chunk_numel):
            end = start + chunk_numel
            chunk = slice(start, end)
            blocks = slice(start // NESTED_BLOCK, end // NESTED_BLOCK)
            m = state["m"].view(-1)[chunk]
            v = state["v"].view(-1)[chunk]
            if is_8bit:
                m = dequantize_moment(m, state["m_scale"][blocks], "m")
                v = dequantize_moment(v, state["v_scale"][blocks], "v")
            # The fp32 copies have no names, so that their memory is free again after the update.
            new_weights = adamw_update(
                weights[chunk].float(), grads[chunk].float(), m, v, step, group
            )
            if p.dtype == torch.bfloat16:
                new_weights = round_stochastically(new_weights)
            weights[chunk] = new_weights
            # fp32 moments are views of the state: adamw_update has changed them in place already.
            if is_8bit:
                state["m"][chunk], state["m_scale"][blocks] = quantize_moment(m, "m")
                state["v"][chunk], state["v_scale"][blocks] = quantize_moment(v, "v")


def has_fused_step(p: Tensor, group: dict) -> bool:
    """True if torch's fused step updates a parameter: weight and moments are fp32."""
    return group["bits"] == 32 and p.dtype == torch.float32


def dequantize_moment(codes: Tensor, scales: Tensor, name: str) -> Tensor:
    """Returns float32 [n]: the numbers of an 8-bit moment.

    codes: uint8 [n].
    scales: float32 [ceil(n / 256)].
    name: "m", whose numbers are signed, or "v", whose numbers are unsigned.
    """
    return dequantize_8bit(codes, scales, dynamic_codebook(codes.device, name == "m"))


def quantize_moment(values: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Returns (codes, scales) of a moment, float32 [n], as `dequantize_moment` takes them."""
    return quantize_8bit(values, name == "m")


def adamw_update(w: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, group: dict) -> Tensor:
    """Returns the new weights and changes the moments in place (Loshchilov & Hutter 2019, alg. 2).

    w, g, m, v: weight, gradient, first and second moment, each float32 [n].
    step: the number of steps, this one included.
    group: lr, betas, eps and weight_decay.
    """
    lr = group["lr"]
    beta1, beta2 = group["betas"]
    m.mul_(beta1).add_(g, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    # The moments start at zero, so that early ones are too small by these factors.
    correction1 = 1 - beta1**step
    correction2 = 1 - beta2**step
    denominator = v.sqrt().div_(math.sqrt(correction2)).add_(group["eps"])
    decayed = w * (1 - lr * group["weight_decay"])
    return decayed.addcdiv_(m, denominator, value=-lr / correction1)


def round_stochastically(x: Tensor) -> Tensor:
    """Rounds float32 to one of the two neighbouring bf16 numbers, right on average.

    The nearer of the two has the higher probability.
    """
    # bf16 is the upper half of the bits of fp32. Noise in the lower half carries into the upper one
    # as often as the lower half is large.
    bits = x.view(torch.int32)
    noise = torch.randint(1 << 16, x.shape, dtype=torch.int32, device=x.device)
    upper_half = -(1 << 16)
    rounded = ((bits + noise) & upper_half).view(torch.float32)
    # The carry would turn infinity and NaN into other numbers.
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)


class HostWeight(NamedTuple):
    """What the host holds of a parameter on the device."""

    master: nn.Parameter  # the rows of this rank, fp32
    staging: Tensor  # gradients and weights travel between device and host through this buffer
    optimizer: AdamW  # of the master weight


class OffloadedAdamW(Optimizer):
    """AdamW in the host's memory (Ren et al. 2021, ZeRO-Offload).

    fp32 master weights and moments live there, and the CPU computes the steps.

    The device holds the weights, in any dtype, and their gradients. The gradient of a tensor is
    copied to the host while the CPU computes the step of the tensor before it.
    """

    def __init__(self, groups, lr: float, weight_decay: float = 0.0):
        super().__init__(groups, lr=lr, weight_decay=weight_decay)
        pin_memory = torch.cuda.is_available()
        self.hosts: dict[Tensor, HostWeight] = {}
        for group in self.param_groups:
            for p in group["params"]:
                rows = to_local(p.detach())
                master = nn.Parameter(rows.to("cpu", torch.float32, copy=True))
                # Only copies from and to pinned memory run while the host goes on.
                staging = torch.empty(rows.shape, dtype=p.dtype, pin_memory=pin_memory)
                optimizer = AdamW([{"params": [master]}], lr)
                self.hosts[p] = HostWeight(master, staging, optimizer)

    def states(self) -> list[tuple[Tensor, dict[str, Tensor]]]:
        pairs = []
        for p, host in self.hosts.items():
            # This optimizer has one parameter.
            _, state = host.optimizer.states()[0]
            pairs.append((p, {"master": host.master.detach(), **state}))
        return pairs

    @torch.no_grad()
    def step(self, found_inf: Tensor | None = None) -> None:
        if must_skip(found_inf):
            return
        # All copies to the host are queued first, each with an event that says when it is complete.
        copies = []
        for group, parameters in self.with_gradients():
            for p in parameters:
                self.hosts[p].staging.copy_(local_grad(p), non_blocking=True)
                copied = None
                if p.is_cuda:
                    copied = torch.cuda.Event()
                    copied.record()
                copies.append((p, group, copied))
        for p, group, copied in copies:
            master, staging, optimizer = self.hosts[p]
            if copied:
                copied.synchronize()
            master.grad = staging.float()
            optimizer.param_groups[0].update(lr=group["lr"], weight_decay=group["weight_decay"])
            optimizer.step()
            master.grad = None
            # The gradient has been read, so the buffer is free to take the weights back.
            staging.copy_(master)
            to_local(p).copy_(staging, non_blocking=True)


# ---- Muon ----


class Muon(Optimizer):
    """Muon (Jordan et al. 2024).

    The momentum of a matrix, with Nesterov's look-ahead, is brought to singular values of about 1.
    The updates are scaled to the length of AdamW's (Liu et al. 2025, arXiv 2502.16982), so that
    AdamW's learning rates and weight decay fit Muon too.

    Sharded matrices are computed several at a time, one for each rank: each rank gathers one whole
    matrix, and scatters the result.
    """

    def __init__(self, groups, lr: float, weight_decay: float = 0.0):
        super().__init__(groups, lr=lr, momentum=0.95, weight_decay=weight_decay)

    def init_state(self, p: Tensor, group: dict) -> dict[str, Tensor]:
        return {"m": torch.zeros_like(to_local(p), memory_format=torch.contiguous_format)}

    @torch.no_grad()
    def step(self, found_inf: Tensor | None = None) -> None:
        if must_skip(found_inf):
            return
        for group, parameters in self.with_gradients():
            lr = group["lr"]
            momentum = group["momentum"]
            lookahead = []
            for p in parameters:
                grad = local_grad(p)
                m = self.state_of(p, group)["m"]
                m.lerp_(grad, 1 - momentum)
                lookahead.append(grad.lerp(m, momentum))
            at_a_time = num_shards(parameters[0])
            for start in range(0, len(parameters), at_a_time):
                end = start + at_a_time
                matrices = parameters[start:end]
                updates = newton_schulz_sharded(matrices, lookahead[start:end])
                for p, update in zip(matrices, updates, strict=True):
                    rows = to_local(p)
                    rows.mul_(1 - lr * group["weight_decay"])
                    # With singular values of 1, the root mean square of the numbers of a matrix is
                    # 1 / sqrt(max(p.shape)). That of AdamW's updates is about 0.2.
                    rows.add_(update, alpha=-lr * 0.2 * math.sqrt(max(p.shape)))


def newton_schulz_sharded(parameters: list[Tensor], local_rows: list[Tensor]) -> list[Tensor]:
    """Returns this rank's rows of the `newton_schulz` of several matrices.

    parameters: at most as many as there are shards. They say how the matrices are sharded.
    local_rows: this rank's rows of each matrix.
    """
    if not is_sharded(parameters[0]):
        return [newton_schulz(matrix) for matrix in local_rows]
    group = shard_group(parameters[0])
    group_rank = dist.get_rank(group)
    ranks = dist.get_process_group_ranks(group)

    def padded(rows: Tensor, p: Tensor) -> Tensor:
        # Gather and scatter need as many rows from each rank. The last ranks may have fewer.
        rows_per_rank = -(-p.shape[0] // len(ranks))
        return F.pad(rows, (0, 0, 0, rows_per_rank - rows.shape[0])).contiguous()

    # Matrix number i goes to rank number i of the group. A rank gets none if there are fewer
    # matrices than ranks.
    own_matrix = None
    for i, (p, rows) in enumerate(zip(parameters, local_rows, strict=True)):
        sent = padded(rows, p)
        parts = None
        if i == group_rank:
            parts = [torch.empty_like(sent) for _ in ranks]
        dist.gather(sent, parts, ranks[i], group)
        if parts is not None:
            own_matrix = torch.cat(parts)[: p.shape[0]]  # [out, in]
    own_update = None
    if own_matrix is not None:
        own_update = newton_schulz(own_matrix)
    # The way back: rank number i sends every rank its rows of update number i.
    updates = []
    for i, (p, rows) in enumerate(zip(parameters, local_rows, strict=True)):
        received = torch.empty_like(padded(rows, p), dtype=update_dtype(rows.device))
        parts = None
        if i == group_rank:
            assert own_update is not None, "matrix number i came to this rank"
            shards = [own_update[shard_row_slice(p, shard)] for shard in range(len(ranks))]
            parts = [padded(shard, p) for shard in shards]
        dist.scatter(received, parts, ranks[i], group)
        updates.append(received[: len(rows)])
    return updates


@functools.cache
def update_dtype(device: torch.device) -> torch.dtype:
    """Returns the dtype of Muon's products."""
    return pick_dtype("auto", device)[0]


def newton_schulz(matrix: Tensor) -> Tensor:
    """Returns a matrix [out, in] with all singular values between about 0.7 and 1.2: in bf16, or in
    fp32 on hardware without bf16 instructions, where products in bf16 take many times as long.

    Its singular vectors stay as they are.

    Five steps of an odd polynomial, with the coefficients of Jordan et al. 2024: they rise steeply
    at 0 instead of meeting 1 exactly.
    """
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.to(update_dtype(matrix.device))
    # x @ x.t() is smaller for a wide matrix.
    x = x.t() if is_tall else x
    # The polynomial converges for singular values up to 1, and no singular value exceeds the norm.
    x = x / x.norm().clamp(min=1e-7)
    a, b, c = 3.4445, -4.775, 2.0315
    for _ in range(5):
        # a x + (b s + c s^2) x, with s = x x^T
        square = x @ x.t()
        polynomial = torch.addmm(square, square, square, beta=b, alpha=c)
        x = torch.addmm(x, polynomial, x, beta=a)
    return x.t() if is_tall else x


# ---- the optimizers of a run ----


def make_optimizers(
    model: nn.Module,
    kind: str,
    lr: float,
    weight_decay: float,
    offload: bool = False,
    lr_factors: Mapping[str, float] = MappingProxyType({}),
) -> list[Optimizer]:
    """Returns the optimizers of all trainable parameters, which the loop steps one after the other.

    kind: a key of DESCRIPTIONS. "muon": Muon trains the matrices of the blocks, AdamW the
        embeddings, head, norms and biases.
    lr: the learning rate before the loop sets it.
    weight_decay: for matrices. Norms and biases never decay.
    offload: the state of AdamW lives in the host's memory.
    lr_factors: {the end of a parameter's name: its rate over that of all others}. The loop sets a
        group's rate to its `lr_factor` times the schedule's.
    """
    # By (trained by Muon, a matrix, the factor of its rate), in the model's order.
    sorted_parameters: dict[tuple[bool, bool, float], list[Tensor]] = {}
    factors = [1.0, *(factor for factor in dict.fromkeys(lr_factors.values()) if factor != 1)]
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        is_matrix = p.dim() >= 2
        by_muon = kind == "muon" and p.dim() == 2 and name.startswith("blocks.")
        factor = next((f for end, f in lr_factors.items() if name.endswith(end)), 1.0)
        sorted_parameters.setdefault((by_muon, is_matrix, factor), []).append(p)

    def groups_of(by_muon: bool) -> list[dict]:
        found = []
        for is_matrix in (True, False):
            for factor in factors:
                parameters = sorted_parameters.get((by_muon, is_matrix, factor))
                if parameters:
                    decay = weight_decay if is_matrix else 0.0
                    found.append({"params": parameters, "weight_decay": decay, "lr_factor": factor})
        return found

    optimizers: list[Optimizer] = []
    muon_groups = groups_of(by_muon=True)
    if muon_groups:
        optimizers.append(Muon(muon_groups, lr))
    groups = groups_of(by_muon=False)
    if groups and offload:
        optimizers.append(OffloadedAdamW(groups, lr))
    elif groups:
        bits = 8 if kind == "adamw8bit" else 32
        optimizers.append(AdamW(groups, lr, bits=bits))
    return optimizers


def state_bytes(kind: str) -> float:
    """Returns the bytes of optimizer state for each trained number."""
    # Two codes of a byte, and two fp32 scales for every block of them.
    adamw8bit = 2 + 8 / NESTED_BLOCK
    by_kind = {"adamw": 8, "adamw8bit": adamw8bit, "muon": 4}
    return by_kind[kind]


@torch.no_grad()
def share_too_small_to_move(parameters: list[Tensor], lr: float) -> float:
    """Returns the fraction of the weights, over all ranks, that rounding would keep where they are.

    A step of length `lr`, rounded to the nearest number, changes nothing if it is below half of the
    distance to the next number of the weight's dtype. A step of Adam is about as long as its
    learning rate.
    """
    counts = []
    for p in parameters:
        magnitude = to_local(p).abs()
        unmoved = int((magnitude + lr == magnitude).sum())
        counts.append([unmoved, magnitude.numel()])
    local_counts = torch.tensor(counts, dtype=torch.float64).sum(0)
    total_unmoved, total_numel = all_reduce_sum(local_counts).tolist()
    return total_unmoved / total_numel
