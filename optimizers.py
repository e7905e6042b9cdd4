"""From gradients to steps: AdamW with moments in 8 bits, weights in bf16 that lose no small step, Muon, and the state
in the host's memory.

What is kept of a trained weight, in bytes: AdamW 4 + 4 + 8 (fp32 weight, its gradient, two moments); adamw8bit 4 + 4 +
2; adamw8bit on weights in bf16 2 + 2 + 2; muon 4 + 4 + 4; with the state on the host 2 + 2 on the device in bf16.
The loop sees a list of optimizers, and sets their rates.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.adamw import adamw

from distributed import all_reduce_sum, is_sharded, num_shards, shard_group, shard_row_slice, to_local
from kernels.adamw import adamw_step
from kernels.nf4 import NESTED_BLOCK, dequantize_8bit, dynamic_codebook
from kernels.triton_utils import use_triton
from quant import quantize_8bit

MIN_8BIT_NUMEL = 4096  # numbers; smaller tensors keep moments in fp32: they weigh nothing, and are norms and biases
CHUNK_NUMEL = {"cpu": 1 << 18, "cuda": 1 << 24}  # numbers that are 32 bits wide at a time, a multiple of a block's
DESCRIPTIONS = {
    "adamw": "AdamW",
    "adamw8bit": "AdamW with moments in 8 bits",
    "muon": "Muon on matrices, AdamW on the rest",
}


class Optimizer:
    """What the loop needs of an optimizer, as torch's have it. Those import the compiler when they are made, which is
    150 MB and a second. step(bad): nothing is changed where this float32 scalar is 1 and not 0; AdamW leaves that to
    the GPU, others wait for it to be known."""

    def __init__(self, groups: list[dict], **settings):
        self.param_groups = [settings | group for group in groups]
        self.state: dict[Tensor, dict] = {}

    def zero_grad(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def blank(self, p: Tensor, group: dict) -> dict[str, Tensor]:
        """A parameter's state before the first step, of the rows that are this process's."""
        raise NotImplementedError

    def states(self) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """Every parameter's state, to be saved or to be filled."""
        pairs = [(p, group) for group in self.param_groups for p in group["params"]]
        return [(p, self.state_of(p, group)) for p, group in pairs]

    def state_of(self, p: Tensor, group: dict) -> dict[str, Tensor]:
        if p not in self.state:
            self.state[p] = self.blank(p, group)
        return self.state[p]

    def with_gradients(self) -> list[tuple[dict, list[Tensor]]]:
        """Each group, and those of its parameters that have a gradient."""
        return [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]


class AdamW(Optimizer):
    """AdamW (Loshchilov & Hutter 2019), by torch's own fused step, and in the two forms that torch has not.

    bits 8: the moments in blocks of 256 numbers of 8 bits (Dettmers et al. 2022, arXiv 2110.02861), as bitsandbytes
    lays them out: the first with signs, the second without; made fp32 and back at every step, a piece at a time.
    Weights in bf16: a step is computed in fp32 and rounded up or down with the probability that makes it right on
    average, since to the nearest, steps below half of the distance to the next number would do nothing at all.

    On GPUs a kernel computes these two forms in one pass over memory (kernels/adamw.py).
    """

    def __init__(self, groups, lr: float, bits: int = 32, weight_decay: float = 0.0):
        super().__init__(groups, lr=lr, bits=bits, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, bad: Tensor | None = None) -> None:
        for group, parameters in self.with_gradients():
            wide = [p for p in parameters if group["bits"] == 32 and p.dtype == torch.float32]
            if wide:
                self.fused(wide, group, bad)
            narrow = [p for p in parameters if group["bits"] == 8 or p.dtype != torch.float32]
            by_kernel = [p for p in narrow if use_triton(to_local(p))]
            if by_kernel:
                self.update_on_gpu(by_kernel, group, bad)
            in_pieces = [p for p in narrow if not use_triton(to_local(p))]
            if in_pieces and not (bad is not None and bool(bad)):
                for p in in_pieces:
                    self.update(p, group)

    def blank(self, p: Tensor, group: dict) -> dict[str, Tensor]:
        mine = to_local(p)
        if group["bits"] == 32 and p.dtype == torch.float32:
            zeros = (torch.zeros_like(mine, memory_format=torch.preserve_format) for _ in range(2))
            return dict(zip(("m", "v", "step"), (*zeros, torch.zeros((), device=p.device))))
        if not is_sharded(p):
            p.data = p.data.contiguous()
        narrow = group["bits"] == 8 and p.numel() >= MIN_8BIT_NUMEL
        state = {"step": torch.zeros((), device=mine.device if use_triton(mine) else None)}
        for name in ("m", "v"):
            state[name] = torch.zeros(mine.numel(), dtype=torch.uint8 if narrow else torch.float32, device=p.device)
            if narrow:
                state[f"{name}_scale"] = torch.zeros(-(-mine.numel() // NESTED_BLOCK), device=p.device)
        return state

    def fused(self, parameters: list[Tensor], group: dict, bad: Tensor | None) -> None:
        if bad is not None:
            bad = bad.to(to_local(parameters[0]).device)  # waits, where the parameters live on the host
        states = [self.state_of(p, group) for p in parameters]
        columns = ([state[name] for state in states] for name in ("m", "v"))
        (beta1, beta2), steps = group["betas"], [state["step"] for state in states]
        adamw(
            [to_local(p) for p in parameters], [to_local(p.grad) for p in parameters], *columns, [], steps,
            fused=True, amsgrad=False, maximize=False, beta1=beta1, beta2=beta2, lr=group["lr"],
            weight_decay=group["weight_decay"], eps=group["eps"], found_inf=bad,
        )  # fmt: skip

    def update_on_gpu(self, parameters: list[Tensor], group: dict, bad: Tensor | None) -> None:
        """Without waiting for the GPU: it counts the steps, and skips one that is bad."""
        device = to_local(parameters[0]).device
        bad = None if bad is None else bad.to(device)
        states = [self.state_of(p, group) for p in parameters]
        taken = torch.ones((), device=device) if bad is None else 1 - bad
        # of tensors a list: one alone would be read by the host, as a number
        torch._foreach_add_([state["step"] for state in states], [taken] * len(states))
        # by the device's generator, whose state a checkpoint holds; of 16 bytes each: Triton compiles a kernel for
        # addresses that are multiples of 16, and another for others
        seeds = torch.randint(1 << 62, (len(parameters), 2), device=device)
        for p, state, seed in zip(parameters, states, seeds.unbind(), strict=True):
            adamw_step(to_local(p).view(-1), to_local(p.grad).reshape(-1), state, group, seed, bad)

    def update(self, p: Tensor, group: dict) -> None:
        state = self.state_of(p, group)
        state["step"] += 1
        weights, grads = to_local(p).view(-1), to_local(p.grad).reshape(-1)
        is_8bit = state["m"].dtype == torch.uint8
        size = CHUNK_NUMEL.get(p.device.type, CHUNK_NUMEL["cuda"])
        for start in range(0, len(weights), size):
            part = slice(start, start + size)
            blocks = slice(start // NESTED_BLOCK, (start + size) // NESTED_BLOCK)
            moments = {name: state[name].view(-1)[part] for name in ("m", "v")}
            if is_8bit:
                for name, codes in moments.items():
                    moments[name] = dequantize_moment(codes, state[f"{name}_scale"][blocks], name)
            new = adamw_update(
                weights[part].float(), grads[part].float(), moments["m"], moments["v"], int(state["step"]), group
            )
            weights[part] = round_stochastically(new) if p.dtype == torch.bfloat16 else new
            if is_8bit:
                for name, values in moments.items():
                    state[name][part], state[f"{name}_scale"][blocks] = quantize_moment(values, name)


def dequantize_moment(codes: Tensor, scales: Tensor, name: str) -> Tensor:
    """float32 [n] of a moment in 8 bits: "m" has signs, "v" has none."""
    return dequantize_8bit(codes, scales, dynamic_codebook(codes.device, name == "m"))


def quantize_moment(values: Tensor, name: str) -> tuple[Tensor, Tensor]:
    return quantize_8bit(values, name == "m")


def adamw_update(w: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, group: dict) -> Tensor:
    """The new weights; changes the moments, in place. All float32 [n]."""
    (beta1, beta2), rate = group["betas"], group["lr"]
    m.mul_(beta1).add_(g, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    spread = v.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    return (w * (1 - rate * group["weight_decay"])).addcdiv_(m, spread, value=-rate / (1 - beta1**step))


def round_stochastically(x: Tensor) -> Tensor:
    """float32 -> bf16, to one of the two neighbours, the nearer one more often: right on average. No numbers, which a
    carry would turn into others, stay."""
    bits = x.view(torch.int32)
    noise = torch.randint(1 << 16, x.shape, dtype=torch.int32, device=x.device)
    rounded = ((bits + noise) & -(1 << 16)).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)


class OffloadedAdamW(Optimizer):
    """AdamW whose masters and moments live in the host's memory, and whose steps its CPU computes in fp32 (Ren et al.
    2021, ZeRO-Offload): the device holds the weights, in any dtype, and their gradients. A tensor's gradient travels
    while the step of the one before it is computed."""

    def __init__(self, groups, lr: float, weight_decay: float = 0.0):
        super().__init__(groups, lr=lr, weight_decay=weight_decay)
        self.hosts, pin = {}, torch.cuda.is_available()
        for group in self.param_groups:
            for p in group["params"]:
                mine = to_local(p.detach())
                master = nn.Parameter(mine.to("cpu", torch.float32, copy=True))
                stage = torch.empty(mine.shape, dtype=p.dtype, pin_memory=pin)  # through which both directions go
                self.hosts[p] = master, stage, AdamW([{"params": [master]}], lr)

    def states(self) -> list[tuple[Tensor, dict[str, Tensor]]]:
        found = []
        for p, (master, _, optimizer) in self.hosts.items():
            ((_, state),) = optimizer.states()
            found.append((p, {"master": master.detach(), **state}))
        return found

    @torch.no_grad()
    def step(self, bad: Tensor | None = None) -> None:
        if bad is not None and bool(bad):
            return
        moving = []
        for group, parameters in self.with_gradients():
            for p in parameters:
                self.hosts[p][1].copy_(to_local(p.grad), non_blocking=True)
                there = torch.cuda.Event() if p.is_cuda else None
                moving.append((p, group, there))
                if there:
                    there.record()
        for p, group, there in moving:
            master, stage, optimizer = self.hosts[p]
            if there:
                there.synchronize()
            master.grad = stage.float()
            optimizer.param_groups[0].update(lr=group["lr"], weight_decay=group["weight_decay"])
            optimizer.step()
            master.grad = None
            to_local(p).copy_(stage.copy_(master), non_blocking=True)


class Muon(Optimizer):
    """Muon (Jordan et al. 2024): a matrix' momentum, with Nesterov's look ahead, is brought to singular values of about
    1, and steps are as long as AdamW's (Liu et al. 2025, arXiv 2502.16982), so that rates and decay are AdamW's too.

    Of matrices in shards as many as there are processes are done at a time: each gathers one, and scatters the outcome.
    """

    def __init__(self, groups, lr: float, weight_decay: float = 0.0):
        super().__init__(groups, lr=lr, momentum=0.95, weight_decay=weight_decay)

    def blank(self, p: Tensor, group: dict) -> dict[str, Tensor]:
        return {"m": torch.zeros_like(to_local(p), memory_format=torch.contiguous_format)}

    @torch.no_grad()
    def step(self, bad: Tensor | None = None) -> None:
        if bad is not None and bool(bad):
            return
        for group, parameters in self.with_gradients():
            ahead = []
            for p in parameters:
                grad, state = to_local(p.grad), self.state_of(p, group)
                state["m"].lerp_(grad, 1 - group["momentum"])
                ahead.append(grad.lerp(state["m"], group["momentum"]))
            at_once = num_shards(parameters[0])
            for start in range(0, len(parameters), at_once):
                part = parameters[start : start + at_once]
                for p, update in zip(part, newton_schulz_sharded(part, ahead[start : start + at_once]), strict=True):
                    to_local(p).mul_(1 - group["lr"] * group["weight_decay"])
                    to_local(p).add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape)))


def newton_schulz_sharded(parameters: list[Tensor], matrices: list[Tensor]) -> list[Tensor]:
    """This process's rows of the `newton_schulz` of matrices, of which it has its rows of these parameters'."""
    if not is_sharded(parameters[0]):
        return [newton_schulz(matrix) for matrix in matrices]
    group = shard_group(parameters[0])
    me, ranks, mine = dist.get_rank(group), dist.get_process_group_ranks(group), None
    padded = lambda x, p: F.pad(x, (0, 0, 0, -(-p.shape[0] // len(ranks)) - x.shape[0])).contiguous()  # rows all have
    for number, (p, matrix) in enumerate(zip(parameters, matrices, strict=True)):
        sent = padded(matrix, p)
        parts = [torch.empty_like(sent) for _ in ranks] if number == me else None
        dist.gather(sent, parts, ranks[number], group)
        mine = torch.cat(parts)[: p.shape[0]] if parts else mine
    done, found = None if mine is None else newton_schulz(mine), []
    for number, (p, matrix) in enumerate(zip(parameters, matrices, strict=True)):
        got = torch.empty_like(padded(matrix, p), dtype=torch.bfloat16)
        parts = [padded(done[shard_row_slice(p, i)], p) for i in range(len(ranks))] if number == me else None
        dist.scatter(got, parts, ranks[number], group)
        found.append(got[: len(matrix)])
    return found


def newton_schulz(matrix: Tensor) -> Tensor:
    """bf16 [out, in]: its singular vectors with singular values between about 0.7 and 1.2, by five steps of an odd
    polynomial (coefficients of Jordan et al. 2024, which rise steeply at 0 rather than meet 1)."""
    x = matrix.to(torch.bfloat16)
    x = x.t() if matrix.shape[0] > matrix.shape[1] else x  # the smaller product
    x = x / x.norm().clamp(min=1e-7)
    a, b, c = 3.4445, -4.775, 2.0315
    for _ in range(5):
        square = x @ x.t()
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.t() if matrix.shape[0] > matrix.shape[1] else x


def make_optimizers(model: nn.Module, kind: str, rate: float, decay: float, offload: bool = False) -> list:
    """The optimizers of all trainable parameters, for the loop to step one after the other. Decay on matrices, never on
    norms and biases.

    muon: the matrices of the blocks by Muon; embeddings, head, norms and biases by AdamW.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    inner = {n for n, p in named.items() if kind == "muon" and p.dim() == 2 and n.startswith("blocks.")}
    found = []
    if inner:
        matrices = [p for name, p in named.items() if name in inner]  # in one order in every process
        found.append(Muon([{"params": matrices, "weight_decay": decay}], rate))
    rest = [p for name, p in named.items() if name not in inner]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        return found
    if offload:
        return [*found, OffloadedAdamW(groups, rate)]
    return [*found, AdamW(groups, rate, 8 if kind == "adamw8bit" else 32)]


def state_bytes(kind: str) -> float:
    """Of a trained weight's moments."""
    return {"adamw": 8, "adamw8bit": 2 + 8 / NESTED_BLOCK, "muon": 4}[kind]


@torch.no_grad()
def share_too_small_to_move(parameters: list[Tensor], rate: float) -> float:
    """The share of the weights that a step as long as `rate`, which is about Adam's, would not move if it were rounded
    to the nearest: it is below half of the distance to the next number of their dtype."""
    mine = [to_local(p) for p in parameters]
    counts = [[int((p.abs() + rate == p.abs()).sum()), p.numel()] for p in mine]
    stuck, count = all_reduce_sum(torch.tensor(counts, dtype=torch.float64).sum(0)).tolist()
    return stuck / count
