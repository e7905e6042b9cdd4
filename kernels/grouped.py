"""Products of many groups of rows, each with its own matrix, in one launch: linears of all routed experts of a layer.

Rows are sorted by group. A tensor on the GPU says where each group's rows end, and a grouped product reads it there
(`torch._grouped_mm`), so that the host need not know. Each linear of an expert keeps its matrix as a parameter of its
own: `make_contiguous` moves these parameters into one storage, so that the product reads them where they are. Otherwise
they are copied into one tensor each time. Matrices in NF4 are dequantised into one tensor for the time of a product: in
bf16, gate and up of a layer of Mixtral 8x7B take 1.9 GB, those of Qwen3 30B-A3B 0.8 GB.

A linear may have an adapter (Hu et al. 2021, LoRA) in each group, or in some: y = x W^T + scale * (x A^T) B^T, as in
kernels/lora_linear.py. In shapes, E is the number of experts, which are the groups, and M the number of rows.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.nf4 import (
    BYTES,
    FEW,
    NF4,
    NF4_BLOCK,
    Frozen,
    dynamic_codebook,
    nf4_codebook,
    nf4_dequantize,
    scales_of,
)
from kernels.triton_utils import next_power_of_2, tl, triton, use_triton

ALIGNMENT = 8  # a grouped product wants rows of a multiple of 16 bytes, which are 8 numbers in bf16
MOST_GROUPS = 1023  # the largest number of groups of one grouped product
TILE_ROWS, TILE_COLUMNS = 64, 64  # the size of a tile of add_low_rank_kernel
# The largest rank that add_low_rank_kernel takes, since shared memory holds a tile of so many columns. With a larger
# rank the whole update is computed first and then added.
MOST_RANKS = 64
FEW_COLUMNS = 32  # columns that a program of multiply_few_kernel computes


def multiplies_groups(x: Tensor) -> bool:
    """True if x's device has a grouped product for x's dtype that reads the sizes of the groups on the GPU.

    That is bf16 on NVIDIA GPUs of compute capability 9 and 10. Elsewhere (A100, consumer cards, AMD, fp32) torch's
    grouped product copies the sizes to the host, in every product, and loops over the groups.
    """
    if not x.is_cuda or x.dtype != torch.bfloat16 or torch.version.hip is not None:
        return False
    return capability(x.device) in (9, 10)


@cache
def capability(device: torch.device) -> int:
    """Returns the major number of a GPU's compute capability."""
    return torch.cuda.get_device_capability(device)[0]


class Groups(NamedTuple):
    """Which rows belong to which expert."""

    expert: Tensor  # int64 [M]: the expert of each row, sorted
    ends: Tensor  # int32 [E]: where each expert's rows end

    @property
    def counts(self) -> Tensor:
        """The number of rows of each expert, int32 [E]."""
        return self.ends.diff(prepend=self.ends.new_zeros(1))


# ---- the matrices and adapters of a product ----


class Member(NamedTuple):
    """A linear of one expert."""

    frozen: Frozen  # its matrix [out, in], which is trained all the same in full fine-tuning
    A: Tensor | None = None  # [rank, in], of its adapter
    B: Tensor | None = None  # [out, rank], of its adapter
    scale: float = 1.0
    drop: Callable | None = (
        None  # drop(x, keys=, layer=): dropout of the adapter's input, as lora.seeded_dropout
    )
    number: int = 0  # the layer that drop wants


class Adapters(NamedTuple):
    """The adapters of one linear, of all experts."""

    A: list[
        Tensor | None
    ]  # [rank, in] of each expert, None where it has none; or one tensor [E, rank, in]
    B: list[
        Tensor | None
    ]  # [out, rank] of each expert, None where it has none; or one tensor [E, out, rank]
    rank: int
    scale: float
    # As a Member's; after `bind_dropout` a function of x alone. It is linear, and its own transpose.
    drop: Callable | None
    layers: tuple[int, ...]  # the layer of each expert's linear, for drop

    @property
    def padded_rank(self) -> int:
        """The rank rounded up to what a grouped product takes; the additional rows and columns are zeros."""
        return -(-self.rank // ALIGNMENT) * ALIGNMENT


class Product(NamedTuple):
    """Linears of all experts that read the same rows: gate and up for instance."""

    # The tensor of each matrix, or the four tensors of its NF4, expert by expert: gate, up, gate, up. If `joint`, one
    # tensor for all matrices, [E * linears, ...], or four.
    matrices: list[Tensor | None]
    parts: int  # tensors of a matrix: 1, or 4 in NF4
    joint: bool
    experts: int
    adapters: list[Adapters | None]  # of each linear

    def tensors(self) -> list[Tensor | None]:
        """Returns all tensors in one list, as autograd takes them."""
        tensors = list(self.matrices)
        for each in self.adapters:
            if each:
                tensors += each.A + each.B
        return tensors

    def without_tensors(self) -> "Product":
        """Returns a copy with None in the place of each tensor, since autograd saves the tensors separately."""
        adapters = []
        for each in self.adapters:
            if each:
                each = each._replace(A=[None] * len(each.A), B=[None] * len(each.B))
            adapters.append(each)
        return self._replace(matrices=[None] * len(self.matrices), adapters=adapters)

    def with_tensors(self, tensors: Iterator) -> "Product":
        """Returns a copy with the tensors that `tensors()` returned: the inverse of `without_tensors`."""

        def take(count: int) -> list[Tensor | None]:
            return [next(tensors) for _ in range(count)]

        matrices = take(len(self.matrices))
        adapters = []
        for each in self.adapters:
            if each:
                each = each._replace(A=take(len(each.A)), B=take(len(each.B)))
            adapters.append(each)
        return self._replace(matrices=matrices, adapters=adapters)

    def bind_dropout(self, rows: Groups, seeds: Callable[[], Tensor]) -> "Product":
        """Returns a copy whose adapters' `drop` needs x only.

        seeds: returns the dropout seed of each row, int64 [M]. It is called only where adapters have dropout.
        """
        adapters = []
        for each in self.adapters:
            if each and each.drop:
                layer = layer_numbers(each.layers, rows.expert.device).index_select(0, rows.expert)
                each = each._replace(drop=partial(each.drop, keys=seeds(), layer=layer))
            adapters.append(each)
        return self._replace(adapters=adapters)


@cache
def layer_numbers(layers: tuple[int, ...], device: torch.device) -> Tensor:
    """Returns the layer of each expert's linear as a tensor, int64 [E]."""
    return torch.tensor(layers, device=device)


def make_product(linears: list[list[Member | None]]) -> Product | None:
    """Returns the product of these linears, or None where they are not alike.

    linears: for each linear, gate and up for instance, those of all experts; None stands for a linear that a grouped
        product can't compute.
    """
    members = []  # expert by expert: gate, up, gate, up
    for of_one_expert in zip(*linears, strict=True):
        members += of_one_expert
    if any(member is None for member in members):
        return None
    formats = {
        (len(member.frozen), member.frozen[0].dtype, member.frozen[-1] is None)
        for member in members
    }
    if len(formats) > 1 or any(len(adapter_kinds(each)) > 1 for each in linears):
        return None
    columns = [*zip(*(member.frozen for member in members), strict=True)]
    # A trained matrix stays a tensor of its own, for its gradient.
    joint = None if wants_gradients(columns[0]) else join_columns(columns)
    matrices = joint
    if joint is None:
        matrices = [t for member in members for t in member.frozen]
    adapters = [make_adapters(each) for each in linears]
    return Product(matrices, len(columns), joint is not None, len(linears[0]), adapters)


def join_columns(columns: list[tuple[Tensor | None, ...]]) -> list[Tensor | None] | None:
    """Returns one tensor [n, ...] for each column of n tensors; None if the tensors of a column aren't contiguous.

    A column is one part of all matrices. It is None in all of them where their NF4 has no double quantisation.
    """
    joint = []
    for column in columns:
        if column[0] is None:
            joint.append(None)
            continue
        tensor = as_one(column)
        if tensor is None:
            return None
        joint.append(tensor)
    return joint


def adapter_kinds(members: list[Member]) -> set:
    """Returns the different (rank, scale, whether there is no dropout) of the adapters."""
    return {
        (member.A.shape[0], member.scale, member.drop is None)
        for member in members
        if member.A is not None
    }


def make_adapters(members: list[Member]) -> Adapters | None:
    """Returns the adapters of one linear of all experts, or None where no expert has one."""
    first = next((member for member in members if member.A is not None), None)
    if first is None:
        return None
    A = joined_or_separate([member.A for member in members])
    B = joined_or_separate([member.B for member in members])
    layers = tuple(member.number for member in members)
    return Adapters(A, B, first.A.shape[0], first.scale, first.drop, layers)


def joined_or_separate(tensors: list[Tensor | None]) -> list[Tensor | None]:
    """Returns a list of one tensor [n, ...] where that needs no copy and no gradients; else the tensors as they are."""
    if any(t is None for t in tensors) or wants_gradients(tensors):
        return tensors
    joint = as_one(tensors)
    return tensors if joint is None else [joint]


def wants_gradients(tensors) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


# ---- the products ----


def grouped(x: Tensor, matrices: Tensor, rows: Groups) -> Tensor:
    """Returns each expert's rows of x [M, in] times its matrix of `matrices` [E, in, out]: [M, out]."""
    return torch._grouped_mm(x, matrices, offs=rows.ends)


def grouped_outer(grad: Tensor, x: Tensor, rows: Groups) -> Tensor:
    """Returns grad^T x of each expert's rows, [E, out, in], with zeros where an expert has no rows.

    grad: [M, out].
    x: [M, in].

    Both are read along their rows, so that an expert's rows may begin anywhere: other layouts want counts that are
    multiples of 8, and not 0. For an expert without rows, GPUs of compute capability 10 return what their registers
    contained (NVIDIA/cutlass#2674, pytorch#172439).
    """
    products = torch._grouped_mm(grad.t(), x, offs=rows.ends)
    if leaves_garbage(x):
        products.masked_fill_((rows.counts == 0)[:, None, None], 0)
    return products


def leaves_garbage(x: Tensor) -> bool:
    return x.is_cuda and capability(x.device) > 9


def multiply(x: Tensor, product: Product, rows: Groups) -> tuple[Tensor, list[Tensor | None]]:
    """Returns the outputs of all linears, next to each other, and for each linear x A^T of its adapters.

    x: [M, in].

    The outputs are [M, out of all linears], each x A^T is [M, padded rank], or None without adapters.
    """
    if product.parts > 1 and product.joint and len(x) <= FEW and use_triton(x):
        out = multiply_few_on_gpu(x, product, rows)
    else:
        out = grouped(x, stacked(product, x.dtype).transpose(1, 2), rows)
    lows: list[Tensor | None] = [None] * len(product.adapters)
    for numbers in same_input(product.adapters):
        adapters = [product.adapters[i] for i in numbers]
        drop = adapters[0].drop
        inputs = drop(x) if drop else x
        low = grouped(inputs, stacked_A(adapters, x.dtype, product.experts).transpose(1, 2), rows)
        ranks = [each.padded_rank for each in adapters]
        for i, own_low in zip(numbers, low.split(ranks, 1), strict=True):
            B = stacked_B(product.adapters[i], x.dtype, product.experts)
            add_low_rank(
                columns(out, i, product),
                own_low,
                B.transpose(1, 2),
                product.adapters[i].scale,
                rows,
            )
            lows[i] = own_low
    return out, lows


def input_gradient(
    grad: Tensor, product: Product, rows: Groups
) -> tuple[Tensor, list[Tensor | None]]:
    """Returns the gradient of x [M, in], and for each linear that of x A^T of its adapters, times their scale.

    grad: [M, out of all linears], the gradient of the outputs of `multiply`.

    Each gradient of x A^T is [M, padded rank], or None without adapters.
    """
    dx = grouped(grad, stacked(product, grad.dtype), rows)
    dlows: list[Tensor | None] = [None] * len(product.adapters)
    for numbers in same_input(product.adapters):
        adapters = [product.adapters[i] for i in numbers]
        for i, each in zip(numbers, adapters, strict=True):
            B = stacked_B(each, grad.dtype, product.experts)
            dlows[i] = grouped(columns(grad, i, product), B, rows).mul_(each.scale)
        dlow = torch.cat([dlows[i] for i in numbers], 1)
        A = stacked_A(adapters, grad.dtype, product.experts)
        drop = adapters[0].drop
        if drop:
            dx.add_(drop(grouped(dlow, A, rows)))
        else:
            add_low_rank(dx, dlow, A, 1.0, rows)
    return dx, dlows


def tensor_gradients(
    grad: Tensor,
    x: Tensor | None,
    product: Product,
    lows: list[Tensor | None],
    dlows: list[Tensor | None],
    needs_grad: list[bool],
    rows: Groups,
) -> list[Tensor | None]:
    """Returns the gradients of the product's tensors, in the order of `Product.tensors`; None where none is needed.

    grad: [M, out of all linears], the gradient of the outputs of `multiply`.
    x: [M, in], the input of `multiply`; it may be None where no tensor needs a gradient.
    lows: what `multiply` returned.
    dlows: what `input_gradient` returned.
    needs_grad: of each tensor, whether it needs a gradient.
    """
    num_matrices = len(product.matrices)
    grads: list[Tensor | None] = [None] * num_matrices
    if any(needs_grad[:num_matrices]):
        dmatrices = grouped_outer(grad, x, rows).to(product.matrices[0].dtype)
        grads = [*dmatrices.view(num_matrices, -1, dmatrices.shape[-1]).unbind()]
    for i, each in enumerate(product.adapters):
        if each is None:
            continue
        start = len(grads)
        num_tensors = len(each.A) + len(each.B)
        if not any(needs_grad[start : start + num_tensors]):
            grads += [None] * num_tensors
            continue
        inputs = each.drop(x) if each.drop else x
        dA = grouped_outer(dlows[i], inputs, rows)[:, : each.rank]
        dB = grouped_outer(columns(grad, i, product), lows[i], rows)[..., : each.rank]
        dtype = next(A.dtype for A in each.A if A is not None)
        grads += dA.to(dtype).unbind()
        grads += dB.to(dtype).mul_(each.scale).unbind()
    return [each if needed else None for each, needed in zip(grads, needs_grad, strict=True)]


def columns(joint: Tensor, number: int, product: Product) -> Tensor:
    """Returns the columns of linear `number`, a view, of the outputs of all linears next to each other."""
    return joint.chunk(len(product.adapters), 1)[number]


def same_input(adapters: list[Adapters | None]) -> list[list[int]]:
    """Returns the numbers of the linears with adapters, grouped by what the adapters read.

    All adapters read the same x, except with dropout: each linear drops other numbers of it.
    """
    numbers = [i for i, each in enumerate(adapters) if each]
    if any(adapters[i].drop for i in numbers):
        return [[i] for i in numbers]
    return [numbers] if numbers else []


def add_low_rank(out: Tensor, low: Tensor, matrices: Tensor, scale: float, rows: Groups) -> None:
    """Adds scale times each expert's rows of low times its matrix to out, in one pass over out on GPUs.

    out: [M, out], a view of wider rows or not.
    low: [M, ranks].
    matrices: [E, ranks, out].
    """
    if not use_triton(out) or low.shape[1] > MOST_RANKS:
        out.add_(grouped(low, matrices, rows), alpha=scale)
        return
    count, width = out.shape
    ranks = low.shape[1]
    add_low_rank_kernel[(-(-count // TILE_ROWS), -(-width // TILE_COLUMNS))](
        out, low, matrices, rows.expert, count, width, ranks, scale,
        out.stride(0), low.stride(0), *matrices.stride(),
        RANKS=max(16, next_power_of_2(ranks)), ROWS=TILE_ROWS, COLUMNS=TILE_COLUMNS, num_warps=8,
    )  # fmt: skip


@triton.jit
def add_low_rank_kernel(
    out, low, matrices, experts, rows, width, ranks, scale,
    out_row, low_row, matrix_stride, rank_stride, column_stride,
    RANKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Computes one tile of out a program. Most tiles have rows of one expert; those of several are added one after the
    other."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    rank = tl.arange(0, RANKS)
    expert = tl.load(experts + row, row < rows, -1)
    first = tl.load(experts + tl.program_id(0) * ROWS)
    last = tl.load(experts + tl.minimum(tl.program_id(0) * ROWS + ROWS, rows) - 1)
    source = low + row[:, None].to(tl.int64) * low_row + rank[None, :]
    values = tl.load(source, (row[:, None] < rows) & (rank[None, :] < ranks), 0.0)
    inside = (row[:, None] < rows) & (column[None, :] < width)
    target = out + row[:, None].to(tl.int64) * out_row + column[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for number in range(first, last + 1):
        at = (
            matrices
            + number * matrix_stride
            + rank[:, None] * rank_stride
            + column[None, :] * column_stride
        )
        matrix = tl.load(at, (rank[:, None] < ranks) & (column[None, :] < width), 0.0)
        own = tl.where((expert == number)[:, None], values, 0.0).to(values.dtype)
        total = tl.dot(own, matrix, total, input_precision="ieee")
    tl.store(target, tl.load(target, inside, 0.0).to(tl.float32) + scale * total, inside)


# ---- the matrices of all experts as one tensor ----


@torch.no_grad()
def make_contiguous(tensors: list[Tensor | None]) -> None:
    """Moves parameters into one storage, in their order.

    Does nothing where one is missing, where they differ in shape, dtype or device, or where they are in one storage
    already.
    """
    if any(t is None for t in tensors):
        return
    if len({(t.shape, t.dtype, t.device) for t in tensors}) > 1:
        return
    if as_one(tensors) is not None:
        return
    joint = torch.stack([t.data for t in tensors])
    for t, part in zip(tensors, joint.unbind(), strict=True):
        t.data = part


def as_one(tensors) -> Tensor | None:
    """Returns a view [n, ...] of n tensors of one shape at equal distances in one storage, as `make_contiguous` leaves
    them; None where they are not so."""
    first = tensors[0].detach()
    storage = first.untyped_storage()._cdata
    start = first.storage_offset()
    step = first.numel() if len(tensors) == 1 else tensors[1].storage_offset() - start
    if step < first.numel():
        return None
    for i, t in enumerate(tensors):
        is_here = t.storage_offset() == start + i * step and t.untyped_storage()._cdata == storage
        if not is_here or not t.is_contiguous():
            return None
    return first.as_strided((len(tensors), *first.shape), (step, *first.stride()))


def stacked_copy(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Returns a copy of the tensors as one tensor [n, ...] in dtype."""
    copy = torch.empty(len(tensors), *tensors[0].shape, dtype=dtype, device=tensors[0].device)
    torch._foreach_copy_(list(copy.unbind()), [t.detach() for t in tensors])
    return copy


def stacked(product: Product, dtype: torch.dtype) -> Tensor:
    """Returns the matrices as [E, out of all linears, in] in dtype: a view where they are in one storage, in dtype."""
    if product.parts > 1:
        weights = dequantize(product, dtype)
    elif product.joint:
        weights = product.matrices[0].to(dtype)
    else:
        weights = as_one(product.matrices)
        weights = stacked_copy(product.matrices, dtype) if weights is None else weights.to(dtype)
    return weights.view(product.experts, -1, weights.shape[-1])


def stacked_A(adapters: list[Adapters], dtype: torch.dtype, experts: int) -> Tensor:
    """Returns A of several linears as [E, padded ranks of all, in], with zeros where there is no adapter."""
    parts = [padded(each.A, each.padded_rank, 1, dtype, experts) for each in adapters]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def stacked_B(adapters: Adapters, dtype: torch.dtype, experts: int) -> Tensor:
    """Returns B of one linear as [E, out, padded rank], with zeros where there is no adapter."""
    return padded(adapters.B, adapters.padded_rank, 2, dtype, experts)


def padded(
    tensors: list[Tensor | None], size: int, axis: int, dtype: torch.dtype, experts: int
) -> Tensor:
    """Returns the tensors as one contiguous tensor [E, ...] in dtype, with zeros up to `size` along the axis of ranks.

    tensors: one of each expert, None where it has none; or one tensor [E, ...].
    axis: 1 or 2, of the result.
    """
    first = next(t for t in tensors if t is not None)
    joint = first if first.dim() == 3 else None
    if joint is None and all(t is not None for t in tensors):
        joint = as_one(tensors)
        if joint is None:
            joint = stacked_copy(tensors, dtype)
    if joint is not None and joint.shape[axis] == size:
        return joint.to(dtype).contiguous()
    shape = [experts, *first.shape[-2:]]
    shape[axis] = size
    result = torch.zeros(shape, dtype=dtype, device=first.device)
    inside = result.narrow(axis, 0, first.shape[axis - 3])
    if joint is not None:
        inside.copy_(joint)
        return result
    targets, sources = [], []
    for target, t in zip(inside.unbind(), tensors, strict=True):
        if t is not None:
            targets.append(target)
            sources.append(t.detach())
    torch._foreach_copy_(targets, sources)
    return result


def dequantize(product: Product, dtype: torch.dtype) -> Tensor:
    """Returns the matrices [E * linears, out, in] of a product in NF4; on GPUs in one launch where they are `joint`."""
    if product.joint and use_triton(product.matrices[0]):
        return dequantize_experts_on_gpu(NF4(*product.matrices), dtype)
    if product.joint:
        count = len(product.matrices[0])
        separate = zip(*([None] * count if t is None else t for t in product.matrices), strict=True)
    else:
        starts = range(0, len(product.matrices), product.parts)
        separate = [product.matrices[start : start + product.parts] for start in starts]
    return torch.stack([nf4_dequantize(NF4(*matrix), dtype) for matrix in separate])


def dequantize_experts_on_gpu(parts: NF4, dtype: torch.dtype) -> Tensor:
    """Returns several matrices, [n, out, in] in dtype. parts: their NF4 with tensors [n, ...], each contiguous."""
    number, out, bytes_per_row = parts.packed.shape
    weights = torch.empty(number, out, 2 * bytes_per_row, dtype=dtype, device=parts.packed.device)
    count = out * bytes_per_row
    tables, nested_count = kernel_tables(parts, weights.device)
    dequantize_experts_kernel[(-(-count // BYTES), number)](
        parts.packed, *tables, weights, count, nested_count,
        DOUBLE=parts.nested is not None, BYTES=BYTES, PER_BLOCK=NF4_BLOCK // 2, enable_fp_fusion=False,
    )  # fmt: skip
    return weights


def kernel_tables(parts: NF4, device: torch.device) -> tuple[tuple[Tensor, ...], int]:
    """Returns absmax, the 16 numbers, nested, offset and the 256 numbers; and the length of each matrix's nested.

    As nf4.dequantize_tables, for several matrices: without double quantisation absmax stands in for nested and offset,
    which the kernels do not read then.
    """
    nested, offset, nested_count = parts.absmax, parts.absmax, 0
    if parts.nested is not None:
        nested, offset, nested_count = parts.nested, parts.offset, parts.nested.shape[1]
    return (
        parts.absmax,
        nf4_codebook(device),
        nested,
        offset,
        dynamic_codebook(device),
    ), nested_count


def multiply_few_on_gpu(x: Tensor, product: Product, rows: Groups) -> Tensor:
    """Returns the outputs of all linears in NF4, [M, out of all linears], for few rows, as when a text is generated.

    Only the matrices of the rows' experts are read, and none is written as a whole.
    """
    parts = NF4(*product.matrices)
    x = x.contiguous()
    linears = len(product.adapters)
    _, out, bytes_per_row = parts.packed.shape
    result = x.new_empty(len(x), linears * out)
    tables, nested_count = kernel_tables(parts, x.device)
    multiply_few_kernel[(len(x), -(-linears * out // FEW_COLUMNS))](
        x, parts.packed, *tables, rows.expert, result, 2 * bytes_per_row, out, nested_count,
        LINEARS=linears, DOUBLE=parts.nested is not None, COLUMNS=FEW_COLUMNS, enable_fp_fusion=False,
    )  # fmt: skip
    return result


@triton.jit
def multiply_few_kernel(
    x, packed, absmax, code, nested, offset, numbers, experts, y, size, out, nested_count,
    LINEARS: tl.constexpr, DOUBLE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Computes some columns of one row a program, in blocks of 64 along the rows of W."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < LINEARS * out
    # Each column of the outputs is a row of one of the matrices: which matrix, and which row of all matrices together.
    matrix = tl.load(experts + row) * LINEARS + column // out
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
    tl.store(y + row * LINEARS * out + column, total, there)


@triton.jit
def dequantize_experts_kernel(
    packed, absmax, code, nested, offset, numbers, out, count, nested_count,
    DOUBLE: tl.constexpr, BYTES: tl.constexpr, PER_BLOCK: tl.constexpr,
):  # fmt: skip
    """Does what nf4.dequantize_kernel does, for several matrices of one shape. count: bytes of each matrix."""
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
    high = tl.load(code + (byte >> 4)) * scale
    low = tl.load(code + (byte & 15)) * scale
    pair = tl.interleave(high, low)
    at = 2 * start + tl.arange(0, 2 * BYTES)
    tl.store(out + at, pair, at < 2 * count)
