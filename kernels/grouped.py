"""Products of many groups of rows, each with its own matrix, in one launch: linears of all routed experts of a layer.

Rows lie sorted by group; where each group's rows end is a tensor on the GPU, which a grouped product reads there
(`torch._grouped_mm`), so that the host need not know. The matrices stay parameters of their own, one a linear of an
expert: `lay_together` makes them parts of one tensor, so that the product reads them where they are; where they are
not, they are copied into one each time. In NF4 they are made whole in one tensor for the time of a product: in bf16,
gate and up of a layer of Mixtral 8x7B take 1.9 GB, those of Qwen3 30B-A3B 0.8 GB.

A linear may have an adapter (Hu et al. 2021, LoRA) in each group, or in some: y = x W^T + scale * (x A^T) B^T, as in
kernels/lora_linear.py. In comments: E experts, the groups; M rows.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.nf4 import BLOCK as NF4_BLOCK
from kernels.nf4 import BYTES, FEW, NF4, Frozen, dynamic_codebook, nf4_codebook, nf4_dequantize, scales_of
from kernels.triton_utils import next_power_of_2, tl, triton, use_triton

ALIGNMENT = 8  # bf16 numbers in the 16 bytes of which a grouped product wants its rows' lengths to be multiples
MOST_GROUPS = 1023  # of one grouped product
ROWS, COLUMNS = 64, 64  # of a tile of add_low_rank_kernel
MOST_RANKS = 64  # that it takes, of which shared memory holds a tile; with more, the update is made whole
FEW_COLUMNS = 32  # of a program of multiply_few_kernel


def multiplies_groups(x: Tensor) -> bool:
    """Whether x's device has a grouped product for x's dtype that reads the groups' sizes where they are.

    That is bf16 on NVIDIA GPUs of compute capability 9 and 10. Elsewhere (A100, consumer cards, AMD, fp32) torch's
    grouped product copies the sizes to the host, in every product, and loops over the groups.
    """
    if not x.is_cuda or x.dtype != torch.bfloat16 or torch.version.hip is not None:
        return False
    return capability(x.device) in (9, 10)


@cache
def capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


class Groups(NamedTuple):
    expert: Tensor  # int64 [M]: the group of each row, sorted
    ends: Tensor  # int32 [E]: where each group's rows end

    @property
    def counts(self) -> Tensor:  # int32 [E]
        return self.ends.diff(prepend=self.ends.new_zeros(1))


# ---- what a product multiplies with ----


class Member(NamedTuple):
    """A linear of one expert."""

    frozen: Frozen  # its matrix [out, in], which may be trained all the same
    A: Tensor | None = None  # of its adapter: [rank, in]
    B: Tensor | None = None  # [out, rank]
    scale: float = 1.0
    drop: Callable | None = None  # of (x, keys, layer): dropout of what the adapter reads
    number: int = 0  # the layer, for drop


class Adapters(NamedTuple):
    """Those of one linear of all experts."""

    A: list[Tensor | None]  # of each expert [rank, in], None where it has none; or one tensor for all: [E, rank, in]
    B: list[Tensor | None]  # likewise [out, rank], or [E, out, rank]
    rank: int
    scale: float
    drop: Callable | None  # linear, and its own transpose; as a Member's, until `bind` leaves it x alone
    numbers: tuple[int, ...]

    @property
    def padded(self) -> int:
        """The rank with zeros, as a grouped product takes it."""
        return -(-self.rank // ALIGNMENT) * ALIGNMENT


class Product(NamedTuple):
    """Linears of all experts that read the same rows: gate and up for instance."""

    matrices: list[Tensor | None]  # each one's tensor, or the four of its NF4, gate, up, gate, up; or of all in one
    parts: int  # 1, or 4 in NF4
    joint: bool  # whether a tensor is that of all, [E * linears, ...]
    experts: int
    adapters: list[Adapters | None]  # of each linear

    def tensors(self) -> list[Tensor | None]:
        return self.matrices + [t for each in self.adapters if each for t in each.A + each.B]

    def hollow(self) -> "Product":
        """Without tensors, which autograd saves apart from the rest."""
        empty = [each and each._replace(A=[None] * len(each.A), B=[None] * len(each.B)) for each in self.adapters]
        return self._replace(matrices=[None] * len(self.matrices), adapters=empty)

    def filled(self, tensors: Iterator) -> "Product":
        """The way back, from what `tensors` returned."""
        take = lambda old: [next(tensors) for _ in old]
        matrices = take(self.matrices)
        adapters = [each and each._replace(A=take(each.A), B=take(each.B)) for each in self.adapters]
        return self._replace(matrices=matrices, adapters=adapters)

    def bind(self, rows: Groups, keys: Callable[[], Tensor]) -> "Product":
        """With the dropout of these rows. keys: makes int64 [M], by which it tells rows apart."""
        bound = []
        for each in self.adapters:
            if each and each.drop:
                layer = layer_numbers(each.numbers, rows.expert.device).index_select(0, rows.expert)
                each = each._replace(drop=partial(each.drop, keys=keys(), layer=layer))
            bound.append(each)
        return self._replace(adapters=bound)


@cache
def layer_numbers(numbers: tuple[int, ...], device: torch.device) -> Tensor:  # int64 [E]
    return torch.tensor(numbers, device=device)


def make_product(linears: list[list[Member | None]]) -> Product | None:
    """linears: gates, and ups; of each linear every expert's. None where they are not alike."""
    members = [member for each in zip(*linears, strict=True) for member in each]
    if any(member is None for member in members):
        return None
    if len({(len(m.frozen), m.frozen[0].dtype, m.frozen[-1] is None) for m in members}) > 1:
        return None
    adapters = [make_adapters(each) for each in linears]
    if any(len(kinds) > 1 for kinds in map(kinds_of_adapters, linears)):
        return None
    columns, joint = [*zip(*(member.frozen for member in members), strict=True)], None
    if not wants_gradients(columns[0]):
        joint = [None if column[0] is None else as_one(column) for column in columns]
        joint = None if joint[0] is None else joint
        if joint and any(new is None and column[0] is not None for new, column in zip(joint, columns)):
            joint = None
    apart = [t for member in members for t in member.frozen]
    return Product(joint or apart, len(columns), joint is not None, len(linears[0]), adapters)


def kinds_of_adapters(members: list[Member]) -> set:
    return {(m.A.shape[0], m.scale, m.drop is None) for m in members if m.A is not None}


def make_adapters(members: list[Member]) -> Adapters | None:
    first = next((member for member in members if member.A is not None), None)
    if first is None:
        return None
    sides = []
    for side in ([member.A for member in members], [member.B for member in members]):
        partial_or_trained = any(t is None for t in side) or wants_gradients(side)
        joint = None if partial_or_trained else as_one(side)
        sides.append(side if joint is None else [joint])
    numbers = tuple(member.number for member in members)
    return Adapters(*sides, first.A.shape[0], first.scale, first.drop, numbers)


def wants_gradients(tensors) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


# ---- the products ----


def grouped(x: Tensor, matrices: Tensor, rows: Groups) -> Tensor:
    """Each expert's rows of x [M, in] times its matrix of [E, in, out]: [M, out]."""
    return torch._grouped_mm(x, matrices, offs=rows.ends)


def grouped_outer(grad: Tensor, x: Tensor, rows: Groups) -> Tensor:
    """grad^T x of each expert's rows: [M, out], [M, in] -> [E, out, in], zeros where an expert has no rows.

    Both are read along their rows, so that an expert's rows may begin anywhere: other layouts want counts that are
    multiples of 8, and not 0. Of an expert without rows, GPUs of compute capability 10 return what their registers held
    (NVIDIA/cutlass#2674, pytorch#172439).
    """
    made = torch._grouped_mm(grad.t(), x, offs=rows.ends)
    if leaves_garbage(x):
        made.masked_fill_((rows.counts == 0)[:, None, None], 0)
    return made


def leaves_garbage(x: Tensor) -> bool:
    return x.is_cuda and capability(x.device) > 9


def multiply(x: Tensor, product: Product, rows: Groups) -> tuple[Tensor, list[Tensor | None]]:
    """x: [M, in]. Returns [M, out of all linears, side by side], and what each linear's adapters make of x, x A^T
    [M, padded rank], or None."""
    if product.parts > 1 and product.joint and len(x) <= FEW and use_triton(x):
        made = multiply_few_on_gpu(x, product, rows)
    else:
        made = grouped(x, stacked(product, x.dtype).transpose(1, 2), rows)
    lows: list[Tensor | None] = [None] * len(product.adapters)
    for numbers in same_input(product.adapters):
        few = [product.adapters[i] for i in numbers]
        left = few[0].drop(x) if few[0].drop else x
        low = grouped(left, stacked_A(few, x.dtype, product.experts).transpose(1, 2), rows)
        for i, part in zip(numbers, low.split([each.padded for each in few], 1), strict=True):
            B = stacked_B(product.adapters[i], x.dtype, product.experts)
            add_low_rank(columns(made, i, product), part, B.transpose(1, 2), product.adapters[i].scale, rows)
            lows[i] = part
    return made, lows


def input_gradient(grad: Tensor, product: Product, rows: Groups) -> tuple[Tensor, list[Tensor | None]]:
    """From the gradient of what `multiply` returned, those of x, and of what each linear's adapters made of it, times
    their scale."""
    dx = grouped(grad, stacked(product, grad.dtype), rows)
    dlows: list[Tensor | None] = [None] * len(product.adapters)
    for numbers in same_input(product.adapters):
        few = [product.adapters[i] for i in numbers]
        for i, each in zip(numbers, few, strict=True):
            B = stacked_B(each, grad.dtype, product.experts)
            dlows[i] = grouped(columns(grad, i, product), B, rows).mul_(each.scale)
        dlow, A = torch.cat([dlows[i] for i in numbers], 1), stacked_A(few, grad.dtype, product.experts)
        if few[0].drop:
            dx.add_(few[0].drop(grouped(dlow, A, rows)))
        else:
            add_low_rank(dx, dlow, A, 1.0, rows)
    return dx, dlows


def tensor_gradients(
    grad: Tensor,
    x: Tensor | None,
    product: Product,
    lows: list[Tensor | None],
    dlows: list[Tensor | None],
    wanted: list[bool],
    rows: Groups,
) -> list[Tensor | None]:
    """The gradients of the product's tensors, in their order.

    x: the input of `multiply`, needed where a tensor wants a gradient. wanted: which of the tensors do. dlows: of
    input_gradient.
    """
    found: list[Tensor | None] = [None] * len(product.matrices)
    if any(wanted[: len(found)]):
        dmatrices = grouped_outer(grad, x, rows).to(product.matrices[0].dtype)
        found = [*dmatrices.view(len(found), -1, dmatrices.shape[-1]).unbind()]
    for i, each in enumerate(product.adapters):
        if each is None:
            continue
        if any(wanted[len(found) : len(found) + len(each.A + each.B)]):
            left = each.drop(x) if each.drop else x
            dA = grouped_outer(dlows[i], left, rows)[:, : each.rank]
            dB = grouped_outer(columns(grad, i, product), lows[i], rows)[..., : each.rank]
            dtype = next(A.dtype for A in each.A if A is not None)
            found += [*dA.to(dtype).unbind(), *dB.to(dtype).mul_(each.scale).unbind()]
        else:
            found += [None] * len(each.A + each.B)
    return [each if yes else None for each, yes in zip(found, wanted, strict=True)]


def columns(joint: Tensor, number: int, product: Product) -> Tensor:
    """Those of linear `number`, in what all linears return side by side."""
    return joint.chunk(len(product.adapters), 1)[number]


def same_input(adapters: list[Adapters | None]) -> list[list[int]]:
    """The numbers of the linears with adapters, together where the adapters read the same: not after dropout."""
    numbers = [i for i, each in enumerate(adapters) if each]
    if any(adapters[i].drop for i in numbers):
        return [[i] for i in numbers]
    return [numbers] if numbers else []


def add_low_rank(made: Tensor, low: Tensor, matrices: Tensor, scale: float, rows: Groups) -> None:
    """Adds scale times each expert's rows of low [M, ranks] times its matrix of [E, ranks, out] to made [M, out], whose
    rows may be far apart: in one pass over made."""
    if not use_triton(made) or low.shape[1] > MOST_RANKS:
        made.add_(grouped(low, matrices, rows), alpha=scale)
        return
    (count, width), ranks = made.shape, low.shape[1]
    add_low_rank_kernel[(-(-count // ROWS), -(-width // COLUMNS))](
        made, low, matrices, rows.expert, count, width, ranks, scale,
        made.stride(0), low.stride(0), *matrices.stride(),
        RANKS=max(16, next_power_of_2(ranks)), ROWS=ROWS, COLUMNS=COLUMNS, num_warps=8,
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


# ---- matrices of all experts as one tensor ----


@torch.no_grad()
def make_contiguous(tensors: list[Tensor | None]) -> None:
    """Moves parameters into one storage, in their order; nothing where one is missing or of another shape or dtype, or
    where they lie so."""
    if any(t is None for t in tensors) or len({(t.shape, t.dtype, t.device) for t in tensors}) > 1:
        return
    if as_one(tensors) is not None:
        return
    joint = torch.stack([t.data for t in tensors])
    for t, part in zip(tensors, joint.unbind(), strict=True):
        t.data = part


def as_one(tensors) -> Tensor | None:
    """[n, ...]: a view of tensors of one shape at equal distances in one storage, as lay_together leaves them; else
    None."""
    first = tensors[0].detach()
    storage, start, shape = first.untyped_storage()._cdata, first.storage_offset(), first.shape
    step = tensors[1].storage_offset() - start if len(tensors) > 1 else first.numel()
    if step < first.numel():
        return None
    for i, t in enumerate(tensors):
        here = t.storage_offset() == start + i * step and t.untyped_storage()._cdata == storage
        if not here or not t.is_contiguous():
            return None
    return first.as_strided((len(tensors), *shape), (step, *first.stride()))


def copied(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    made = torch.empty(len(tensors), *tensors[0].shape, dtype=dtype, device=tensors[0].device)
    torch._foreach_copy_(list(made.unbind()), [t.detach() for t in tensors])
    return made


def stacked(product: Product, dtype: torch.dtype) -> Tensor:
    """[E, out of all linears, in] in dtype: a view where the matrices lie so in memory already, in dtype."""
    if product.parts > 1:
        made = dequantize(product, dtype)
    elif product.joint:
        made = product.matrices[0].to(dtype)
    else:
        made = as_one(product.matrices)
        made = copied(product.matrices, dtype) if made is None else made.to(dtype)
    return made.view(product.experts, -1, made.shape[-1])


def stacked_A(adapters: list[Adapters], dtype: torch.dtype, experts: int) -> Tensor:
    """[E, padded ranks of all, in], zeros where there is no adapter."""
    parts = [padded(each.A, each.padded, 1, dtype, experts) for each in adapters]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def stacked_B(adapters: Adapters, dtype: torch.dtype, experts: int) -> Tensor:
    """[E, out, padded rank], zeros where there is no adapter."""
    return padded(adapters.B, adapters.padded, 2, dtype, experts)


def padded(tensors: list[Tensor | None], size: int, axis: int, dtype: torch.dtype, experts: int) -> Tensor:
    """[E, ...] contiguous in dtype, with zeros up to `size` along the axis of the ranks."""
    first = next(t for t in tensors if t is not None)
    joint = first if first.dim() == 3 else None
    if joint is None and all(t is not None for t in tensors):
        joint = as_one(tensors)
        joint = copied(tensors, dtype) if joint is None else joint
    if joint is not None and joint.shape[axis] == size:
        return joint.to(dtype).contiguous()
    shape = [experts, *first.shape[-2:]]
    shape[axis] = size
    made = torch.zeros(shape, dtype=dtype, device=first.device)
    inside = made.narrow(axis, 0, first.shape[axis - 3])
    if joint is not None:
        inside.copy_(joint)
    else:
        there = [(place, t.detach()) for place, t in zip(inside.unbind(), tensors) if t is not None]
        torch._foreach_copy_([place for place, _ in there], [t for _, t in there])
    return made


def dequantize(product: Product, dtype: torch.dtype) -> Tensor:
    """[E * linears, out, in], in one launch where the matrices lie together in memory."""
    if product.joint and use_triton(product.matrices[0]):
        return dequantize_on_gpu(NF4(*product.matrices), dtype)
    if product.joint:
        count = len(product.matrices[0])
        each = zip(*([None] * count if t is None else t for t in product.matrices))
    else:
        each = zip(*[iter(product.matrices)] * product.parts)
    return torch.stack([nf4_dequantize(NF4(*matrix), dtype) for matrix in each])


def dequantize_on_gpu(parts: NF4, dtype: torch.dtype) -> Tensor:
    """parts: the tensors of an NF4, of several matrices: [n, ...] each, contiguous."""
    number, out, half = parts.packed.shape
    made = torch.empty(number, out, 2 * half, dtype=dtype, device=parts.packed.device)
    double, count = parts.nested is not None, out * half
    scales = (parts.nested, parts.offset) if double else (parts.absmax, parts.absmax)
    dequantize_kernel[(-(-count // BYTES), number)](
        parts.packed, parts.absmax, nf4_codebook(made.device), *scales, dynamic_codebook(made.device), made, count,
        parts.nested.shape[1] if double else 0,
        DOUBLE=double, BYTES=BYTES, PER_BLOCK=NF4_BLOCK // 2, enable_fp_fusion=False,
    )  # fmt: skip
    return made


def multiply_few_on_gpu(x: Tensor, product: Product, rows: Groups) -> Tensor:
    """Of few rows, as when a text is written: only the matrices of their experts are read, and none is made whole."""
    parts, x = NF4(*product.matrices), x.contiguous()
    linears, (_, out, half) = len(product.adapters), parts.packed.shape
    made, double = x.new_empty(len(x), linears * out), parts.nested is not None
    scales = (parts.nested, parts.offset) if double else (parts.absmax, parts.absmax)
    multiply_few_kernel[(len(x), -(-linears * out // FEW_COLUMNS))](
        x, parts.packed, parts.absmax, nf4_codebook(x.device), *scales, dynamic_codebook(x.device), rows.expert, made,
        2 * half, out, parts.nested.shape[1] if double else 0,
        LINEARS=linears, DOUBLE=double, COLUMNS=FEW_COLUMNS, enable_fp_fusion=False,
    )  # fmt: skip
    return made


@triton.jit
def multiply_few_kernel(
    x, packed, absmax, code, nested, offset, numbers, experts, made, size, out, nested_count,
    LINEARS: tl.constexpr, DOUBLE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some columns of a row a program, block of 64 by block along the rows of W."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < LINEARS * out
    matrix = tl.load(experts + row) * LINEARS + column // out  # of each column: which one it is in, and where there
    column_of = (matrix * out + column % out).to(tl.int64)
    if DOUBLE:
        nested += matrix * nested_count
        offset += matrix
    total = tl.zeros([COLUMNS], tl.float32)
    for block in range(size // 64):
        at = column_of[:, None] * (size // 2) + block * 32 + tl.arange(0, 32)[None, :]
        byte = tl.load(packed + at, there[:, None], 0).to(tl.int32)
        scale = tl.load(absmax + column_of * (size // 64) + block, there, 0)
        if DOUBLE:
            second = ((column % out).to(tl.int64) * (size // 64) + block) // 256
            scale = tl.load(numbers + scale.to(tl.int32)) * tl.load(nested + second, there, 0.0)
            scale += tl.load(offset, there, 0.0)
        high = tl.load(code + (byte >> 4)) * scale[:, None]
        low = tl.load(code + (byte & 15)) * scale[:, None]
        weights = tl.interleave(high, low)  # [COLUMNS, 64]
        values = tl.load(x + row * size + block * 64 + tl.arange(0, 64))
        total += tl.sum(weights.to(values.dtype).to(tl.float32) * values.to(tl.float32)[None, :], 1)
    tl.store(made + row * LINEARS * out + column, total, there)


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
