"""The MLPs of all routed experts of a layer in a few products, without the host knowing who chose whom.

Token-expert pairs are sorted by expert, so that an expert's rows lie together; where each expert's rows end is a tensor
on the GPU, which a grouped product reads there (`torch._grouped_mm`). A loop over the experts would have to know the
counts on the host, and wait for them in every layer, and launch each expert's kernels by themselves: with 128 experts,
thousands a layer. The weights stay parameters of their own, one a linear of an expert; `lay_together` makes them parts
of one tensor, so that the product reads them where they are, else they are copied into one each time.

The weight that the router gives a pair is multiplied with the product of gate and up instead of with what the expert
returns: down is linear, so that is the same, and what the experts return need not be kept. Kept are x, gate, up and,
with adapters, their x A^T; the sorted rows are gathered again in the backward.

In comments: E experts, N tokens, M = N * active pairs, D hidden, F the experts' inner size.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kernels.gpu import blocks, on_gpu, tl, triton
from kernels.nf4 import BLOCK as NF4_BLOCK
from kernels.nf4 import BYTES, NF4, Frozen, code, dynamic_code, nf4_dequantize, scales_of
from kernels.swiglu import ACTIVATIONS, gated_backward

ALIGNMENT = 8  # bf16 numbers in the 16 bytes of which a grouped product wants its rows' lengths to be multiples
MOST_GROUPS = 1023  # of one grouped product
BLOCK = 1024
ROWS, COLUMNS = 64, 128  # of a tile of add_low_rank_kernel
MOST_RANKS = 64  # that it takes: with more, a tile wants more than 128 registers a thread


class Routes(NamedTuple):
    """Which rows go to which expert, all on the GPU."""

    token: Tensor  # int64 [M]: the token of each pair, sorted by expert
    place: Tensor  # int64 [N, active]: where a token's pairs stand among the sorted ones
    expert: Tensor  # int64 [M]: the expert of each sorted pair
    ends: Tensor  # int32 [E]: where each expert's rows end

    @property
    def counts(self) -> Tensor:  # int32 [E]
        return self.ends.diff(prepend=self.ends.new_zeros(1))


class Member(NamedTuple):
    """A linear of one expert."""

    frozen: Frozen  # its matrix, which may be trained all the same
    A: Tensor | None = None  # of its adapter: [rank, in]
    B: Tensor | None = None  # [out, rank]
    scale: float = 1.0
    drop: Callable | None = None  # of (x, keys, layer): dropout of what the adapter reads
    number: int = 0  # the layer, for drop


class Bank(NamedTuple):
    """One linear of every expert, all gates for instance, with or without adapters."""

    matrices: list[Frozen]  # of each expert: [out, in], trained or frozen, or in NF4
    A: list[Tensor | None]  # of each expert: [rank, in], or None where it has no adapter; [] where none has
    B: list[Tensor | None]  # [out, rank], likewise
    scale: float = 1.0
    drop: Callable[[Tensor], Tensor] | None = None  # dropout of what the adapters read; linear, and its own transpose

    def tensors(self) -> list[Tensor | None]:
        return [*(t for matrix in self.matrices for t in matrix), *self.A, *self.B]

    def hollow(self) -> "Bank":
        """Without tensors, which are saved apart from the rest."""
        return self._replace(
            matrices=[(None,) * len(m) for m in self.matrices], A=[None] * len(self.A), B=[None] * len(self.B)
        )

    def filled(self, tensors: Iterator) -> "Bank":
        """The way back, from what `tensors` returned."""
        matrices = [tuple(next(tensors) for _ in matrix) for matrix in self.matrices]
        A = [next(tensors) for _ in self.A]
        B = [next(tensors) for _ in self.B]
        return self._replace(matrices=matrices, A=A, B=B)

    @property
    def rank(self) -> int:
        return next((A.shape[0] for A in self.A if A is not None), 0)

    @property
    def padded_rank(self) -> int:
        return -(-self.rank // ALIGNMENT) * ALIGNMENT


def can_group(x: Tensor, experts: int, inner: int) -> bool:
    """Whether the layer can be computed here for x [N, D]."""
    return multiplies_groups(x) and experts <= MOST_GROUPS and x.shape[1] % ALIGNMENT == inner % ALIGNMENT == 0


def multiplies_groups(x: Tensor) -> bool:
    """Whether x's device has a grouped product for x's dtype that reads the groups' sizes where they are.

    That is bf16 on NVIDIA GPUs of compute capability 9 and 10. Elsewhere (A100, consumer cards, AMD, fp32) torch's
    grouped product copies the sizes to the host, once a product, and loops over the groups: there the experts' own loop
    waits only once a layer.
    """
    if not x.is_cuda or x.dtype != torch.bfloat16 or torch.version.hip is not None:
        return False
    return capability(x.device) in (9, 10)


@cache
def capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def alike(members: list[Member | None]) -> bool:
    """Whether linears can be multiplied with together."""
    if None in members:
        return False
    kinds = {(len(m.frozen), m.frozen[0].dtype, m.frozen[-1] is None) for m in members}
    adapters = {(m.A.shape[0], m.scale, m.drop is None) for m in members if m.A is not None}
    return len(kinds) == 1 and len(adapters) <= 1


def make_bank(members: list[Member], routes: Routes, keys: Tensor | None) -> Bank:
    """keys: int64 [N], by which dropout tells the tokens apart; None: it is drawn."""
    matrices = [member.frozen for member in members]
    adapted = [member for member in members if member.A is not None]
    if not adapted:
        return Bank(matrices, [], [])
    drop, A, B = adapted[0].drop, [member.A for member in members], [member.B for member in members]
    if drop is None:
        return Bank(matrices, A, B, adapted[0].scale)
    if keys is None:
        keys = torch.randint(2**31, routes.place.shape[:1], device=routes.place.device)
    layers = layer_numbers(tuple(member.number for member in members), keys.device).index_select(0, routes.expert)
    left = partial(drop, keys=keys.index_select(0, routes.token), layer=layers)
    return Bank(matrices, A, B, adapted[0].scale, left)


@cache
def layer_numbers(numbers: tuple[int, ...], device: torch.device) -> Tensor:  # int64 [E]
    return torch.tensor(numbers, device=device)


def sort_pairs(chosen: Tensor, experts: int) -> Routes:
    """chosen: int64 [N, active], the experts of each token."""
    expert, order = chosen.flatten().sort(stable=True)
    place = torch.empty_like(order)
    place.scatter_(0, order, torch.arange(len(order), device=order.device))
    ends = torch.searchsorted(expert, torch.arange(experts, device=expert.device), right=True, out_int32=True)
    return Routes(order // chosen.shape[1], place.view_as(chosen), expert, ends)


def routed_mlp(x: Tensor, weights: Tensor, routes: Routes, gate: Bank, up: Bank, down: Bank, activation: str) -> Tensor:
    """The weighted sum of what a token's experts make of it: down(act(gate x) * up x), of each.

    x: [N, D]; weights: [N, active], fp32. Returns [N, D] in x's dtype. Experts that nobody chose get gradients of
    zeros. Gradients of weights and adapters are in their dtype.
    """
    banks = [gate, up, down]
    tensors = [t for bank in banks for t in bank.tensors()]
    return RoutedMLP.apply(x, weights, routes, activation, [bank.hollow() for bank in banks], *tensors)


class RoutedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, routes, activation, layout, *tensors):
        gate, up, down = filled(layout, tensors)
        share = weights.new_empty(weights.numel()).scatter_(0, routes.place.flatten(), weights.flatten())  # [M]
        inner, lows = multiply(x.index_select(0, routes.token), [gate, up], routes)  # [M, 2 F]
        out, lows_down = multiply(gated(inner, share, activation), [down], routes)
        ctx.save_for_backward(x, share, inner, *routes, *lows, *lows_down, *tensors)
        ctx.activation, ctx.layout = activation, layout
        return sum_rows(out, routes.place)

    @staticmethod
    def backward(ctx, grad):
        x, share, inner, *rest = ctx.saved_tensors
        routes, lows, lows_down, tensors = Routes(*rest[:4]), rest[4:6], rest[6:7], rest[7:]
        gate, up, down = filled(ctx.layout, tensors)
        flags = iter(ctx.needs_input_grad[5:])
        wanted = [[next(flags) for _ in bank.tensors()] for bank in (gate, up, down)]

        grad = grad.contiguous().index_select(0, routes.token)  # [M, D]
        dhidden, dlows_down = input_gradient(grad, [down], routes)
        dinner, dshare, hidden = gated_backward_with_share(dhidden, inner, share, ctx.activation)
        ddown = tensor_gradients(grad, hidden, [down], lows_down, dlows_down, wanted[2:], routes)
        del grad, dhidden, hidden

        drows, dlows = input_gradient(dinner, [gate, up], routes)
        dx = sum_rows(drows, routes.place) if ctx.needs_input_grad[0] else None
        del drows
        rows = x.index_select(0, routes.token) if any(map(any, wanted[:2])) else None
        dgate_up = tensor_gradients(dinner, rows, [gate, up], lows, dlows, wanted[:2], routes)
        dweights = dshare.index_select(0, routes.place.flatten()).view_as(routes.place)
        return dx, dweights, None, None, None, *dgate_up, *ddown


def filled(layout: list[Bank], tensors) -> list[Bank]:
    left = iter(tensors)
    return [bank.filled(left) for bank in layout]


# ---- products of sorted rows with all experts' matrices ----


def multiply(rows: Tensor, banks: list[Bank], routes: Routes) -> tuple[Tensor, list[Tensor | None]]:
    """rows: [M, in]. Returns [M, out of all banks, side by side], and what each bank's adapters make of rows, x A^T
    [M, padded rank], or None."""
    made = grouped(rows, stacked(banks, rows.dtype).transpose(1, 2), routes.ends)
    lows: list[Tensor | None] = [None] * len(banks)
    for numbers in same_input(banks):
        few = [banks[i] for i in numbers]
        left = rows if few[0].drop is None else few[0].drop(rows)
        low = grouped(left, stacked_A(few, rows.dtype).transpose(1, 2), routes.ends)
        for i, part in zip(numbers, low.split([bank.padded_rank for bank in few], 1), strict=True):
            B = stacked_B(banks[i], rows.dtype)
            add_low_rank(columns(made, i, banks), part, B.transpose(1, 2), banks[i].scale, routes)
            lows[i] = part
    return made, lows


def input_gradient(grad: Tensor, banks: list[Bank], routes: Routes) -> tuple[Tensor, list[Tensor | None]]:
    """From the gradient of what `multiply` returned, those of its rows, and of what each bank's adapters made of them,
    times the bank's scale."""
    drows = grouped(grad, stacked(banks, grad.dtype), routes.ends)
    dlows: list[Tensor | None] = [None] * len(banks)
    for numbers in same_input(banks):
        few = [banks[i] for i in numbers]
        for i in numbers:
            dlows[i] = grouped(columns(grad, i, banks), stacked_B(banks[i], grad.dtype), routes.ends)
            dlows[i].mul_(banks[i].scale)
        dlow, A = torch.cat([dlows[i] for i in numbers], 1), stacked_A(few, grad.dtype)
        if few[0].drop is None:
            add_low_rank(drows, dlow, A, 1.0, routes)
        else:
            drows.add_(few[0].drop(grouped(dlow, A, routes.ends)))
    return drows, dlows


def tensor_gradients(
    grad: Tensor,
    rows: Tensor | None,
    banks: list[Bank],
    lows: list[Tensor | None],
    dlows: list[Tensor | None],
    wanted: list[list[bool]],
    routes: Routes,
) -> list[Tensor | None]:
    """The gradients of the banks' tensors, in their order.

    rows: the input of `multiply`, needed where a tensor wants a gradient. wanted: of each bank, which of its tensors
    do. dlows: of input_gradient.
    """
    found: list[list[Tensor | None]] = [[None] * len(flags) for flags in wanted]
    if any(yes for bank, flags in zip(banks, wanted) for yes in flags[: number_of_matrices(bank)]):
        dmatrices = grouped_outer(grad, rows, routes).to(banks[0].matrices[0][0].dtype)
        for i, (part, flags) in enumerate(zip(dmatrices.chunk(len(banks), 1), wanted, strict=True)):
            found[i][: len(part)] = [each if yes else None for each, yes in zip(part.unbind(), flags)]
    for i, bank in enumerate(banks):
        start = number_of_matrices(bank)
        if any(wanted[i][start:]):
            left = rows if bank.drop is None else bank.drop(rows)
            dA = grouped_outer(dlows[i], left, routes)[:, : bank.rank]
            dB = grouped_outer(columns(grad, i, banks), lows[i], routes)[..., : bank.rank]
            dtype = next(A.dtype for A in bank.A if A is not None)
            grads = [*dA.to(dtype).unbind(), *dB.to(dtype).mul_(bank.scale).unbind()]
            found[i][start:] = [each if yes else None for each, yes in zip(grads, wanted[i][start:], strict=True)]
    return [each for grads in found for each in grads]


def number_of_matrices(bank: Bank) -> int:
    """How many of a bank's tensors are its matrices'."""
    return sum(map(len, bank.matrices))


def columns(joint: Tensor, number: int, banks: list[Bank]) -> Tensor:
    """Those of bank `number`, in what all banks return side by side."""
    return joint.chunk(len(banks), 1)[number]


def same_input(banks: list[Bank]) -> list[list[int]]:
    """The numbers of the banks with adapters, together where the adapters read the same: not after dropout."""
    with_adapters = [i for i, bank in enumerate(banks) if bank.A]
    if any(banks[i].drop for i in with_adapters):
        return [[i] for i in with_adapters]
    return [with_adapters] if with_adapters else []


def grouped(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Each expert's rows of x [M, in] times its matrix of [E, in, out]: [M, out]."""
    return torch._grouped_mm(x, matrices, offs=ends)


def grouped_outer(grad: Tensor, x: Tensor, routes: Routes) -> Tensor:
    """grad^T x of each expert's rows: [M, out], [M, in] -> [E, out, in], zeros where an expert has no rows.

    Both are read along their rows, so that an expert's rows may begin anywhere: other layouts want counts that are
    multiples of 8, and not 0. Of an expert without rows, GPUs of compute capability 10 return what their registers held
    (NVIDIA/cutlass#2674, pytorch#172439).
    """
    made = torch._grouped_mm(grad.t(), x, offs=routes.ends)
    if leaves_garbage(x):
        made.masked_fill_((routes.counts == 0)[:, None, None], 0)
    return made


def add_low_rank(made: Tensor, low: Tensor, matrices: Tensor, scale: float, routes: Routes) -> None:
    """Adds scale times each expert's rows of low [M, ranks] times its matrix of [E, ranks, out] to made [M, out], whose
    rows may be far apart: in one pass over made."""
    if not on_gpu(made) or low.shape[1] > MOST_RANKS:
        made.add_(grouped(low, matrices, routes.ends), alpha=scale)
        return
    (rows, width), ranks = made.shape, low.shape[1]
    add_low_rank_kernel[(-(-rows // ROWS), -(-width // COLUMNS))](
        made, low, matrices, routes.expert, rows, width, ranks, scale,
        made.stride(0), low.stride(0), *matrices.stride(),
        RANKS=max(16, blocks(ranks)), ROWS=ROWS, COLUMNS=COLUMNS, num_warps=8,
    )  # fmt: skip


@triton.jit
def add_low_rank_kernel(
    made, low, matrices, experts, rows, width, ranks, scale,
    made_row, low_row, matrix_stride, rank_stride, column_stride,
    RANKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of rows, which are mostly of one expert: of several, one after the other."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    rank = tl.arange(0, RANKS)
    expert = tl.load(experts + row, row < rows, -1)
    first = tl.load(experts + tl.program_id(0) * ROWS)
    last = tl.load(experts + tl.minimum(tl.program_id(0) * ROWS + ROWS, rows) - 1)
    source = low + row[:, None].to(tl.int64) * low_row + rank[None, :]
    values = tl.load(source, (row[:, None] < rows) & (rank[None, :] < ranks), 0.0)
    inside = (row[:, None] < rows) & (column[None, :] < width)
    target = made + row[:, None].to(tl.int64) * made_row + column[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for number in range(first, last + 1):
        at = matrices + number * matrix_stride + rank[:, None] * rank_stride + column[None, :] * column_stride
        matrix = tl.load(at, (rank[:, None] < ranks) & (column[None, :] < width), 0.0)
        own = tl.where((expert == number)[:, None], values, 0.0).to(values.dtype)
        total = tl.dot(own, matrix, total, input_precision="ieee")
    tl.store(target, tl.load(target, inside, 0.0).to(tl.float32) + scale * total, inside)


def leaves_garbage(x: Tensor) -> bool:
    return x.is_cuda and capability(x.device) > 9


# ---- matrices of all experts as one tensor ----


def stacked(banks: list[Bank], dtype: torch.dtype) -> Tensor:
    """[E, out of all banks, in] in dtype: a view where the matrices lie so in memory already, in dtype."""
    matrices = [bank.matrices[i] for i in range(len(banks[0].matrices)) for bank in banks]  # by expert
    experts = len(banks[0].matrices)
    if len(matrices[0]) > 1:
        made = dequantize([NF4(*matrix) for matrix in matrices], dtype)
    else:
        plain = [matrix[0] for matrix in matrices]
        made = as_one(plain)
        made = copied(plain, dtype) if made is None else made.to(dtype)
    return made.view(experts, -1, made.shape[-1])


def as_one(tensors: list[Tensor]) -> Tensor | None:
    """[n, ...]: a view of tensors that lie one after the other in one storage, as lay_together leaves them; else
    None."""
    first = tensors[0]
    storage, start, size = first.untyped_storage()._cdata, first.storage_offset(), first.numel()
    for i, t in enumerate(tensors):
        if t.storage_offset() != start + i * size or t.untyped_storage()._cdata != storage or not t.is_contiguous():
            return None
    return first.as_strided((len(tensors), *first.shape), (size, *first.stride()))


@torch.no_grad()
def lay_together(parameters: list[nn.Parameter]) -> None:
    """Moves parameters of one shape and dtype into one storage, in their order."""
    joint = torch.stack([p.data for p in parameters])
    for p, part in zip(parameters, joint.unbind(), strict=True):
        p.data = part


def copied(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    made = torch.empty(len(tensors), *tensors[0].shape, dtype=dtype, device=tensors[0].device)
    torch._foreach_copy_(list(made.unbind()), [t.detach() for t in tensors])
    return made


def stacked_A(banks: list[Bank], dtype: torch.dtype) -> Tensor:
    """[E, padded ranks of all banks, in], zeros where there is no adapter."""
    size = next(A.shape[1] for A in banks[0].A if A is not None)
    made = blank(banks, (len(banks[0].A), sum(bank.padded_rank for bank in banks), size), dtype)
    parts = made.split([bank.padded_rank for bank in banks], 1)
    places = [(part[i, : bank.rank], A) for bank, part in zip(banks, parts) for i, A in enumerate(bank.A)]
    return fill(made, places)


def stacked_B(bank: Bank, dtype: torch.dtype) -> Tensor:
    """[E, out, padded rank], zeros where there is no adapter."""
    out = next(B.shape[0] for B in bank.B if B is not None)
    made = blank([bank], (len(bank.B), out, bank.padded_rank), dtype)
    return fill(made, [(made[i, :, : bank.rank], B) for i, B in enumerate(bank.B)])


def blank(banks: list[Bank], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Room for adapters: zeros where they do not fill it."""
    device = next(A.device for A in banks[0].A if A is not None)
    full = all(bank.rank == bank.padded_rank and None not in bank.A for bank in banks)
    return torch.empty(shape, dtype=dtype, device=device) if full else torch.zeros(shape, dtype=dtype, device=device)


def fill(made: Tensor, places: list[tuple[Tensor, Tensor | None]]) -> Tensor:
    there = [(place, each.detach()) for place, each in places if each is not None]
    torch._foreach_copy_([place for place, _ in there], [each for _, each in there])
    return made


def dequantize(matrices: list[NF4], dtype: torch.dtype) -> Tensor:
    """[n, out, in]: as large as the matrices unquantised, for the time of a product. In one launch where their parts
    lie together in memory."""
    parts = None
    if on_gpu(matrices[0].packed):
        parts = NF4(*(None if column[0] is None else as_one(list(column)) for column in zip(*matrices)))
    if parts is None or any(new is None and old is not None for new, old in zip(parts, matrices[0])):
        return torch.stack([nf4_dequantize(matrix, dtype) for matrix in matrices])
    return dequantize_on_gpu(parts, dtype)


def dequantize_on_gpu(parts: NF4, dtype: torch.dtype) -> Tensor:
    """parts: the tensors of an NF4, of several matrices: [n, ...] each."""
    number, out, half = parts.packed.shape
    made = torch.empty(number, out, 2 * half, dtype=dtype, device=parts.packed.device)
    double, count = parts.nested is not None, out * half
    scales = (parts.nested, parts.offset) if double else (parts.absmax, parts.absmax)
    dequantize_kernel[(-(-count // BYTES), number)](
        parts.packed, parts.absmax, code(made.device), *scales, dynamic_code(made.device), made, count,
        parts.nested.shape[1] if double else 0,
        DOUBLE=double, BYTES=BYTES, PER_BLOCK=NF4_BLOCK // 2, enable_fp_fusion=False,
    )  # fmt: skip
    return made


@triton.jit
def dequantize_kernel(
    packed, absmax, code, nested, offset, numbers, out, count, nested_count,
    DOUBLE: tl.constexpr, BYTES: tl.constexpr, PER_BLOCK: tl.constexpr,
):  # fmt: skip
    """nf4.dequantize_kernel, for several matrices of one shape; count: bytes of each."""
    number = tl.program_id(1).to(tl.int64)
    packed += number * count
    absmax += number * (count // PER_BLOCK)
    out += number * count * 2
    if DOUBLE:
        nested += number * nested_count
        offset += number
    start = tl.program_id(0).to(tl.int64) * BYTES
    at = start + tl.arange(0, BYTES)
    inside = at < count
    byte = tl.load(packed + at, inside, 0).to(tl.int32)
    scale = scales_of(absmax, nested, offset, numbers, at // PER_BLOCK, inside, DOUBLE)
    pair = tl.interleave(tl.load(code + (byte >> 4)) * scale, tl.load(code + (byte & 15)) * scale)
    at = 2 * start + tl.arange(0, 2 * BYTES)
    tl.store(out + at, pair, at < 2 * count)


# ---- what is computed a pair or a token ----


def gated(inner: Tensor, share: Tensor, activation: str) -> Tensor:
    """share * act(gate) * up. inner: [M, 2 F], gate's columns and then up's; share: fp32 [M]. Returns [M, F]."""
    if activation == "silu" and on_gpu(inner):
        rows, width = inner.shape[0], inner.shape[1] // 2
        out = inner.new_empty(rows, width)
        gated_kernel[(rows, -(-width // BLOCK))](inner, share, out, width, BLOCK=BLOCK)
        return out
    gate, up = inner.chunk(2, 1)
    return (ACTIVATIONS[activation](gate).mul_(up) * share[:, None]).to(inner.dtype)


def gated_backward_with_share(
    grad: Tensor, inner: Tensor, share: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of inner [M, 2 F] and share, fp32 [M], from that of what `gated` returned, and that itself anew."""
    dinner = torch.empty_like(inner, memory_format=torch.contiguous_format)
    if activation == "silu" and on_gpu(inner):
        grad, (rows, width) = grad.contiguous(), grad.shape
        dshare, hidden = torch.empty_like(share), torch.empty_like(grad)
        gated_backward_kernel[(rows,)](grad, inner, share, dinner, dshare, hidden, width, BLOCK=BLOCK)
        return dinner, dshare, hidden
    gate, up = inner.chunk(2, 1)
    hidden = ACTIVATIONS[activation](gate).mul_(up)
    dshare = (grad * hidden).sum(1, dtype=share.dtype)
    dgate, dup = gated_backward((grad * share[:, None]).to(grad.dtype), gate, up, activation)
    torch.cat([dgate, dup], 1, out=dinner)
    return dinner, dshare, (hidden * share[:, None]).to(inner.dtype)


def sum_rows(rows: Tensor, place: Tensor) -> Tensor:
    """rows: [M, D]; place: int64 [N, active]. Returns [N, D], the sums of the rows that stand there, added up in
    fp32."""
    if on_gpu(rows):
        (tokens, active), width = place.shape, rows.shape[1]
        out = rows.new_empty(tokens, width)
        sum_rows_kernel[(tokens, -(-width // BLOCK))](rows, place, out, width, ACTIVE=active, BLOCK=BLOCK)
        return out
    each = rows.index_select(0, place.flatten()).view(*place.shape, -1)
    return each.sum(1, dtype=torch.promote_types(rows.dtype, torch.float32)).to(rows.dtype)


@triton.jit
def gated_kernel(inner, share, out, width, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    g = tl.load(inner + row * 2 * width + at, inside, 0.0).to(tl.float32)
    u = tl.load(inner + row * 2 * width + width + at, inside, 0.0).to(tl.float32)
    tl.store(out + row * width + at, g * tl.sigmoid(g) * u * tl.load(share + row), inside)


@triton.jit
def gated_backward_kernel(grad, inner, share, dinner, dshare, hidden, width, BLOCK: tl.constexpr):
    """A row a program, since the gradient of its share is a sum over the row."""
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(share + row)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < width
        d = tl.load(grad + row * width + at, inside, 0.0).to(tl.float32)
        g = tl.load(inner + row * 2 * width + at, inside, 0.0).to(tl.float32)
        u = tl.load(inner + row * 2 * width + width + at, inside, 0.0).to(tl.float32)
        s = tl.sigmoid(g)
        product = g * s * u
        total += d * product
        tl.store(hidden + row * width + at, weight * product, inside)
        d *= weight
        tl.store(dinner + row * 2 * width + at, d * u * s * (1 + g * (1 - s)), inside)
        tl.store(dinner + row * 2 * width + width + at, d * g * s, inside)
    tl.store(dshare + row, tl.sum(total, 0))


@triton.jit
def sum_rows_kernel(rows, place, out, width, ACTIVE: tl.constexpr, BLOCK: tl.constexpr):
    token, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(ACTIVE):
        row = tl.load(place + token * ACTIVE + i)
        total += tl.load(rows + row * width + at, inside, 0.0).to(tl.float32)
    tl.store(out + token * width + at, total, inside)
