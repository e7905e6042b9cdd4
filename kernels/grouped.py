"""Products of many groups of rows, each with its own matrix, in one launch: linears of all routed
experts of a layer.

Rows are sorted by group. A tensor on the GPU says where each group's rows end, and a grouped
product reads it there (`torch._grouped_mm`), so that the host need not know. Each linear of an
expert keeps its matrix as a parameter of its own: `make_contiguous` moves these parameters into one
storage, so that the product reads them where they are. Otherwise they are copied into one tensor
each time. Matrices in NF4 are dequantised into one tensor for the time of a product: in bf16, gate
and up of a layer of Mixtral 8x7B take 1.9 GB, those of Qwen3 30B-A3B 0.8 GB.

A linear may have an adapter (Hu et al. 2021, LoRA) in each group, or in some:
y = x W^T + scale * (x A^T) B^T, as in kernels/lora_linear.py. In shapes, E is the number of
experts, which are the groups, and M the number of rows.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from typing import NamedTuple, cast

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

# A grouped product wants rows of a multiple of 16 bytes, which are 8 numbers in bf16.
ALIGNMENT = 8
# The largest number of groups of one grouped product.
MOST_GROUPS = 1023
# The size of a tile of add_low_rank_kernel.
TILE_ROWS = 64
TILE_COLUMNS = 64
# The largest rank that add_low_rank_kernel takes, since shared memory holds a tile of so many
# columns. With a larger rank the whole update is computed first and then added.
MOST_RANKS = 64
# The columns that a program of multiply_few_kernel computes.
FEW_COLUMNS = 32


def multiplies_groups(x: Tensor) -> bool:
    """True if the grouped product of x's dtype reads the groups' sizes on x's device.

    That is bf16 on NVIDIA GPUs of compute capability 9 and 10. Elsewhere (A100, consumer cards,
    AMD, fp32) torch's grouped product copies the sizes to the host, in every product, and loops
    over the groups.
    """
    is_nvidia = x.is_cuda and torch.version.hip is None
    if not is_nvidia or x.dtype != torch.bfloat16:
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
    # drop(x, keys=, layer=): dropout of the adapter's input, as lora.seeded_dropout.
    drop: Callable | None = None
    number: int = 0  # the layer that drop wants


class Adapters(NamedTuple):
    """The adapters of one linear, of all experts."""

    # A: [rank, in] of each expert, None where it has none; or one tensor [E, rank, in].
    A: list[Tensor | None]
    # B: [out, rank] of each expert, None where it has none; or one tensor [E, out, rank].
    B: list[Tensor | None]
    rank: int
    scale: float
    # As a Member's; after `bind_dropout` a function of x alone. It is linear, and its own
    # transpose.
    drop: Callable | None
    layers: tuple[int, ...]  # the layer of each expert's linear, for drop

    @property
    def padded_rank(self) -> int:
        """The rank rounded up to what a grouped product takes.

        The additional rows and columns are zeros.
        """
        return -(-self.rank // ALIGNMENT) * ALIGNMENT


class Product(NamedTuple):
    """Linears of all experts that read the same rows: gate and up for instance."""

    # The tensor of each matrix, or the four tensors of its NF4, expert by expert: gate, up, gate,
    # up. If `joint`, one tensor for all matrices, [E * linears, ...], or four.
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
        """Returns a copy with None in the place of each tensor.

        Autograd saves the tensors separately.
        """
        adapters = []
        for each in self.adapters:
            if each:
                each = each._replace(A=[None] * len(each.A), B=[None] * len(each.B))
            adapters.append(each)
        nothing: list[Tensor | None] = [None] * len(self.matrices)
        return self._replace(matrices=nothing, adapters=adapters)

    def with_tensors(self, tensors: Iterator[Tensor | None]) -> "Product":
        """Returns a copy with the next tensors of `tensors`, in the order of `tensors()`.

        It is the inverse of `without_tensors`.
        """

        def take(count: int) -> list[Tensor | None]:
            return [next(tensors) for _ in range(count)]

        matrices = take(len(self.matrices))
        adapters = []
        for each in self.adapters:
            if each:
                A = take(len(each.A))
                B = take(len(each.B))
                each = each._replace(A=A, B=B)
            adapters.append(each)
        return self._replace(matrices=matrices, adapters=adapters)

    def bind_dropout(self, rows: Groups, seeds: Callable[[], Tensor]) -> "Product":
        """Returns a copy whose adapters' `drop` needs x only.

        seeds: returns the dropout seed of each row, int64 [M]. It is called only where adapters
            have dropout.
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

    linears: for each linear, gate and up for instance, those of all experts; None stands for a
        linear that a grouped product can't compute.
    """
    complete: list[list[Member]] = []
    for of_all_experts in linears:
        present = [member for member in of_all_experts if member is not None]
        if len(present) < len(of_all_experts):
            return None
        complete.append(present)
    members: list[Member] = []  # expert by expert: gate, up, gate, up
    for of_one_expert in zip(*complete, strict=True):
        members += of_one_expert
    formats = set()
    for member in members:
        # The last tensor is None in NF4 without double quantisation.
        is_last_missing = member.frozen[-1] is None
        formats.add((len(member.frozen), member.frozen[0].dtype, is_last_missing))
    if len(formats) > 1:
        return None
    if any(len(adapter_kinds(each)) > 1 for each in complete):
        return None
    # Of NF4, a column each of the packed codes, of absmax, of nested and of the offsets.
    columns = list(zip(*[member.frozen for member in members], strict=True))
    joint = None
    # A trained matrix stays a tensor of its own, for its gradient.
    if not wants_gradients(columns[0]):
        joint = join_columns(columns)
    matrices: list[Tensor | None] = []
    if joint is not None:
        matrices = joint
    else:
        for member in members:
            matrices += member.frozen
    adapters = [make_adapters(each) for each in complete]
    return Product(matrices, len(columns), joint is not None, len(complete[0]), adapters)


def join_columns(columns: list[tuple[Tensor | None, ...]]) -> list[Tensor | None] | None:
    """Returns one tensor [n, ...] for each column of n tensors.

    A column is one part of all matrices. It is None in all of them where their NF4 has no double
    quantisation. Returns None if the tensors of a column aren't contiguous.
    """
    joint: list[Tensor | None] = []
    for column in columns:
        if column[0] is None:
            joint.append(None)
            continue
        tensor = as_one(cast("tuple[Tensor, ...]", column))
        if tensor is None:
            return None
        joint.append(tensor)
    return joint


def adapter_kinds(members: list[Member]) -> set:
    """Returns the different (rank, scale, whether there is no dropout) of the adapters."""
    kinds = set()
    for member in members:
        if member.A is not None:
            rank = member.A.shape[0]
            kinds.add((rank, member.scale, member.drop is None))
    return kinds


def make_adapters(members: list[Member]) -> Adapters | None:
    """Returns the adapters of one linear of all experts, or None where no expert has one."""
    ranks = [member.A.shape[0] for member in members if member.A is not None]
    if not ranks:
        return None
    # All adapters are alike, as `make_product` has made sure.
    first = next(member for member in members if member.A is not None)
    A = joined_or_separate([member.A for member in members])
    B = joined_or_separate([member.B for member in members])
    layers = tuple(member.number for member in members)
    return Adapters(A, B, ranks[0], first.scale, first.drop, layers)


def joined_or_separate(tensors: list[Tensor | None]) -> list[Tensor | None]:
    """Returns a list of one tensor [n, ...] where that needs no copy and no gradients.

    Otherwise returns the tensors as they are.
    """
    present = [t for t in tensors if t is not None]
    if len(present) < len(tensors) or wants_gradients(present):
        return tensors
    joint = as_one(present)
    if joint is None:
        return tensors
    return [joint]


def wants_gradients(tensors: Iterable[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


# ---- the products ----


def grouped(x: Tensor, matrices: Tensor, rows: Groups) -> Tensor:
    """Returns each expert's rows of x times its matrix, [M, out].

    x: [M, in].
    matrices: [E, in, out].
    """
    return torch._grouped_mm(x, matrices, offs=rows.ends)


def grouped_outer(grad: Tensor, x: Tensor, rows: Groups) -> Tensor:
    """Returns grad^T x of each expert's rows, [E, out, in], with zeros where an expert has no rows.

    grad: [M, out].
    x: [M, in].

    Both are read along their rows, so that an expert's rows may begin anywhere: other layouts want
    counts that are multiples of 8, and not 0. For an expert without rows, GPUs of compute
    capability 10 return what their registers contained (NVIDIA/cutlass#2674, pytorch#172439).
    """
    products = torch._grouped_mm(grad.t(), x, offs=rows.ends)
    if leaves_garbage(x):
        is_empty = rows.counts == 0  # [E]
        products.masked_fill_(is_empty[:, None, None], 0)
    return products


def leaves_garbage(x: Tensor) -> bool:
    """True if x's device leaves garbage in the products of experts without rows."""
    return x.is_cuda and capability(x.device) > 9


def multiply(x: Tensor, product: Product, rows: Groups) -> tuple[Tensor, list[Tensor | None]]:
    """Returns the outputs of all linears, next to each other, and each linear's x A^T.

    x: [M, in].

    The outputs are [M, out of all linears]. Each x A^T, of the linear's adapters, is
    [M, padded rank], or None without adapters.
    """
    is_joint_nf4 = product.parts > 1 and product.joint
    if is_joint_nf4 and len(x) <= FEW and use_triton(x):
        out = multiply_few_on_gpu(x, product, rows)
    else:
        weights = stacked(product, x.dtype)  # [E, out, in]
        out = grouped(x, weights.transpose(1, 2), rows)
        # Of NF4 they are a copy, of up to 1.9 GB.
        del weights
    lows: list[Tensor | None] = [None] * len(product.adapters)
    for adapters in same_input(product.adapters):
        in_order = list(adapters.values())
        # One product for all of them: their A stand below each other.
        A = stacked_A(in_order, x.dtype, product.experts)  # [E, ranks of all, in]
        drop = in_order[0].drop
        inputs = drop(x) if drop else x
        low = grouped(inputs, A.transpose(1, 2), rows)  # [M, ranks of all]
        ranks = [each.padded_rank for each in in_order]
        own_lows = low.split(ranks, 1)
        for (i, each), own_low in zip(adapters.items(), own_lows, strict=True):
            B = stacked_B(each, x.dtype, product.experts)  # [E, out, rank]
            own_out = columns(out, i, product)
            add_low_rank(own_out, own_low, B.transpose(1, 2), each.scale, rows)
            lows[i] = own_low
    return out, lows


def input_gradient(
    grad: Tensor, product: Product, rows: Groups
) -> tuple[Tensor, list[Tensor | None]]:
    """Returns the gradient of x [M, in], and each linear's gradient of x A^T, times the scale.

    grad: [M, out of all linears], the gradient of the outputs of `multiply`.

    Each gradient of x A^T is [M, padded rank], or None without adapters.
    """
    dx = grouped(grad, stacked(product, grad.dtype), rows)
    dlows: list[Tensor | None] = [None] * len(product.adapters)
    for adapters in same_input(product.adapters):
        own_dlows = []
        for i, each in adapters.items():
            B = stacked_B(each, grad.dtype, product.experts)  # [E, out, rank]
            own_dlow = grouped(columns(grad, i, product), B, rows).mul_(each.scale)
            own_dlows.append(own_dlow)
            dlows[i] = own_dlow
        dlow = torch.cat(own_dlows, 1)  # [M, ranks of all]
        in_order = list(adapters.values())
        A = stacked_A(in_order, grad.dtype, product.experts)  # [E, ranks of all, in]
        drop = in_order[0].drop
        # Dropout is its own transpose, and has to see the whole product before it is added.
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
    """Returns the gradients of the product's tensors, in the order of `Product.tensors`.

    They are None where none is needed.

    grad: [M, out of all linears], the gradient of the outputs of `multiply`.
    x: [M, in], the input of `multiply`; it may be None where no tensor needs a gradient.
    lows: what `multiply` returned.
    dlows: what `input_gradient` returned.
    needs_grad: of each tensor, whether it needs a gradient.
    """
    num_matrices = len(product.matrices)
    grads: list[Tensor | None] = [None] * num_matrices
    if any(needs_grad[:num_matrices]):
        # Trained matrices are neither in NF4 nor joint: each is one tensor.
        first = product.matrices[0]
        assert x is not None and first is not None
        dmatrices = grouped_outer(grad, x, rows).to(first.dtype)  # [E, out of all linears, in]
        separate = dmatrices.view(num_matrices, -1, dmatrices.shape[-1])  # [E * linears, out, in]
        grads = list(separate.unbind())
    # `grads` grows in the order of the tensors, so that its length is the number of the next one.
    for i, each in enumerate(product.adapters):
        if each is None:
            continue
        start = len(grads)
        num_tensors = len(each.A) + len(each.B)
        if not any(needs_grad[start : start + num_tensors]):
            grads += [None] * num_tensors
            continue
        low = lows[i]
        dlow = dlows[i]
        assert x is not None and low is not None and dlow is not None
        inputs = each.drop(x) if each.drop else x
        # Without the rows and columns of the padded rank.
        dA = grouped_outer(dlow, inputs, rows)[:, : each.rank]  # [E, rank, in]
        dB = grouped_outer(columns(grad, i, product), low, rows)[..., : each.rank]  # [E, out, rank]
        dtype = next(A.dtype for A in each.A if A is not None)
        # `input_gradient` has put the scale into dlow, and so into dA.
        grads += dA.to(dtype).unbind()
        grads += dB.to(dtype).mul_(each.scale).unbind()
    needed_grads: list[Tensor | None] = []
    for tensor_grad, is_needed in zip(grads, needs_grad, strict=True):
        needed_grads.append(tensor_grad if is_needed else None)
    return needed_grads


def columns(joint: Tensor, number: int, product: Product) -> Tensor:
    """Returns the columns of linear `number`, a view.

    joint: the outputs of all linears, next to each other.
    """
    return joint.chunk(len(product.adapters), 1)[number]


def same_input(adapters: list[Adapters | None]) -> list[dict[int, Adapters]]:
    """Returns the adapters by the number of their linear, grouped by what they read.

    All adapters read the same x, except with dropout: each linear drops other numbers of it.
    """
    present = {i: each for i, each in enumerate(adapters) if each}
    if not present:
        return []
    if any(each.drop for each in present.values()):
        return [{i: each} for i, each in present.items()]
    return [present]


def add_low_rank(out: Tensor, low: Tensor, matrices: Tensor, scale: float, rows: Groups) -> None:
    """Adds scale times each expert's rows of low times its matrix to out.

    On GPUs this takes one pass over out.

    out: [M, out], a view of wider rows or not.
    low: [M, ranks].
    matrices: [E, ranks, out].
    """
    if not use_triton(out) or low.shape[1] > MOST_RANKS:
        out.add_(grouped(low, matrices, rows), alpha=scale)
        return
    count, width = out.shape
    ranks = low.shape[1]
    matrix_stride, rank_stride, column_stride = matrices.stride()
    # tl.dot takes no side below 16.
    padded_ranks = max(16, next_power_of_2(ranks))
    grid = (-(-count // TILE_ROWS), -(-width // TILE_COLUMNS))
    add_low_rank_kernel[grid](
        out, low, matrices, rows.expert, count, width, ranks, scale,
        out.stride(0), low.stride(0), matrix_stride, rank_stride, column_stride,
        RANKS=padded_ranks, ROWS=TILE_ROWS, COLUMNS=TILE_COLUMNS, num_warps=8,
    )  # fmt: skip


@triton.jit
def add_low_rank_kernel(
    out, low, matrices, experts, rows, width, ranks, scale,
    out_row, low_row, matrix_stride, rank_stride, column_stride,
    RANKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Computes one tile of out a program.

    Most tiles have rows of one expert; those of several are added one after the other.
    """
    start = tl.program_id(0) * ROWS
    row = start + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    rank = tl.arange(0, RANKS)
    row_inside = (row < rows)[:, None]
    column_inside = (column < width)[None, :]
    rank_below = rank < ranks
    # The experts of the tile's rows. They are sorted, so that all are from `first` to `last`.
    expert = tl.load(experts + row, row < rows, -1)
    first = tl.load(experts + start)
    last = tl.load(experts + tl.minimum(start + ROWS, rows) - 1)
    # 64 bits: a row's place in memory may be beyond 2^31.
    wide_row = row[:, None].to(tl.int64)
    source = low + wide_row * low_row + rank[None, :]
    values = tl.load(source, row_inside & rank_below[None, :], 0.0)  # [ROWS, RANKS]
    target = out + wide_row * out_row + column[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for number in range(first, last + 1):
        matrix_start = matrices + number * matrix_stride
        at = matrix_start + rank[:, None] * rank_stride + column[None, :] * column_stride
        matrix = tl.load(at, rank_below[:, None] & column_inside, 0.0)  # [RANKS, COLUMNS]
        own = tl.where((expert == number)[:, None], values, 0.0).to(values.dtype)
        total = tl.dot(own, matrix, total, input_precision="ieee")
    inside = row_inside & column_inside
    before = tl.load(target, inside, 0.0).to(tl.float32)
    tl.store(target, before + scale * total, inside)


# ---- the matrices of all experts as one tensor ----


@torch.no_grad()
def make_contiguous(tensors: list[Tensor | None]) -> None:
    """Moves parameters into one storage, in their order.

    Does nothing where one is missing, where they differ in shape, dtype or device, or where they
    are in one storage already.
    """
    present = [t for t in tensors if t is not None]
    if len(present) < len(tensors):
        return
    if len({(t.shape, t.dtype, t.device) for t in present}) > 1:
        return
    if as_one(present) is not None:
        return
    joint = torch.stack([t.data for t in present])
    for t, part in zip(present, joint.unbind(), strict=True):
        t.data = part


def as_one(tensors: Sequence[Tensor]) -> Tensor | None:
    """Returns a view [n, ...] of n tensors of one shape, without a copy.

    They have to be at equal distances in one storage, as `make_contiguous` leaves them; returns
    None where they are not.
    """
    first = tensors[0].detach()
    storage = first.untyped_storage()._cdata
    start = int(first.storage_offset())
    step = first.numel()
    if len(tensors) > 1:
        # Another linear's matrix may stand between two of them: gate, up, gate, up.
        step = int(tensors[1].storage_offset()) - start
    if step < first.numel():
        return None
    for i, t in enumerate(tensors):
        if t.storage_offset() != start + i * step or not t.is_contiguous():
            return None
        if t.untyped_storage()._cdata != storage:
            return None
    return first.as_strided((len(tensors), *first.shape), (step, *first.stride()))


def stacked_copy(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Returns a copy of the tensors as one tensor [n, ...] in dtype."""
    first = tensors[0]
    copy = torch.empty(len(tensors), *first.shape, dtype=dtype, device=first.device)
    targets = list(copy.unbind())
    sources = [t.detach() for t in tensors]
    # One launch for all tensors, or few.
    torch._foreach_copy_(targets, sources)
    return copy


def stacked(product: Product, dtype: torch.dtype) -> Tensor:
    """Returns the matrices as [E, out of all linears, in] in dtype.

    That is a view where they are in one storage, in dtype.
    """
    if product.parts > 1:
        weights = dequantize(product, dtype)
    else:
        # Only tensors of NF4 may be None.
        matrices = cast("list[Tensor]", product.matrices)
        view = matrices[0] if product.joint else as_one(matrices)
        weights = stacked_copy(matrices, dtype) if view is None else view.to(dtype)
    return weights.view(product.experts, -1, weights.shape[-1])


def stacked_A(adapters: list[Adapters], dtype: torch.dtype, experts: int) -> Tensor:
    """Returns A of several linears as [E, padded ranks of all, in].

    It has zeros where there is no adapter.
    """
    parts = [padded(each.A, each.padded_rank, 1, dtype, experts) for each in adapters]
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts, 1)


def stacked_B(adapters: Adapters, dtype: torch.dtype, experts: int) -> Tensor:
    """Returns B of one linear as [E, out, padded rank], with zeros where there is no adapter."""
    return padded(adapters.B, adapters.padded_rank, 2, dtype, experts)


def padded(
    tensors: list[Tensor | None], size: int, axis: int, dtype: torch.dtype, experts: int
) -> Tensor:
    """Returns the tensors as one contiguous tensor [E, ...] in dtype, padded with zeros.

    tensors: one of each expert, None where it has none; or one tensor [E, ...].
    size: the result's along the axis of ranks.
    axis: 1 or 2, of the result.
    """
    present = [t for t in tensors if t is not None]
    first = present[0]
    joint = first if first.dim() == 3 else None
    if joint is None and len(present) == len(tensors):
        joint = as_one(present)
        if joint is None:
            joint = stacked_copy(present, dtype)
    if joint is not None and joint.shape[axis] == size:
        return joint.to(dtype).contiguous()
    shape = [experts, *first.shape[-2:]]
    shape[axis] = size
    result = torch.zeros(shape, dtype=dtype, device=first.device)
    # From the end, since `first` is of one expert or of all.
    rank = first.shape[axis - 3]
    inside = result.narrow(axis, 0, rank)
    if joint is not None:
        inside.copy_(joint)
        return result
    targets = []
    sources = []
    for target, t in zip(inside.unbind(), tensors, strict=True):
        if t is not None:
            targets.append(target)
            sources.append(t.detach())
    torch._foreach_copy_(targets, sources)
    return result


def as_nf4(parts: Sequence[Tensor | None]) -> NF4:
    """Returns the four tensors of an NF4. The last two are None without double quantisation."""
    packed, absmax, nested, offset = parts
    assert packed is not None and absmax is not None
    return NF4(packed, absmax, nested, offset)


def dequantize(product: Product, dtype: torch.dtype) -> Tensor:
    """Returns the matrices [E * linears, out, in] of a product in NF4.

    On GPUs this is one launch where they are `joint`.
    """
    separate = []
    if product.joint:
        joint = as_nf4(product.matrices)
        if use_triton(joint.packed):
            return dequantize_experts_on_gpu(joint, dtype)
        for i in range(len(joint.packed)):
            separate.append(as_nf4([None if t is None else t[i] for t in joint]))
    else:
        for start in range(0, len(product.matrices), product.parts):
            separate.append(as_nf4(product.matrices[start : start + product.parts]))
    return torch.stack([nf4_dequantize(matrix, dtype) for matrix in separate])


def dequantize_experts_on_gpu(parts: NF4, dtype: torch.dtype) -> Tensor:
    """Returns several matrices, [n, out, in] in dtype.

    parts: their NF4 with tensors [n, ...], each contiguous.
    """
    number, out, bytes_per_row = parts.packed.shape
    # A byte has two numbers.
    weights = torch.empty(number, out, 2 * bytes_per_row, dtype=dtype, device=parts.packed.device)
    count = out * bytes_per_row
    tables, nested_count = kernel_tables(parts, weights.device)
    grid = (-(-count // BYTES), number)
    # Without fused multiply-add, the numbers are bit for bit those of nf4_dequantize.
    dequantize_experts_kernel[grid](
        parts.packed, *tables, weights, count, nested_count,
        DOUBLE=parts.nested is not None, BYTES=BYTES, PER_BLOCK=NF4_BLOCK // 2, enable_fp_fusion=False,
    )  # fmt: skip
    return weights


def kernel_tables(parts: NF4, device: torch.device) -> tuple[tuple[Tensor, ...], int]:
    """Returns absmax, the 16 numbers, nested, offset and the 256 numbers; and nested's length.

    The length is that of each matrix. As nf4.dequantize_tables, for several matrices: without
    double quantisation absmax stands in for nested and offset, which the kernels do not read then.
    """
    nested = parts.absmax
    nested_count = 0
    offset = parts.absmax
    if parts.nested is not None:
        nested = parts.nested
        nested_count = parts.nested.shape[1]
    if parts.offset is not None:
        offset = parts.offset
    tables = (parts.absmax, nf4_codebook(device), nested, offset, dynamic_codebook(device))
    return tables, nested_count


def multiply_few_on_gpu(x: Tensor, product: Product, rows: Groups) -> Tensor:
    """Returns the outputs of all linears in NF4 for few rows, as when a text is generated.

    The outputs are [M, out of all linears]. Only the matrices of the rows' experts are read, and
    none is written as a whole.
    """
    parts = as_nf4(product.matrices)
    x = x.contiguous()
    linears = len(product.adapters)
    _, out, bytes_per_row = parts.packed.shape
    width = linears * out
    result = x.new_empty(len(x), width)
    tables, nested_count = kernel_tables(parts, x.device)
    grid = (len(x), -(-width // FEW_COLUMNS))
    multiply_few_kernel[grid](
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
    # Each column of the outputs is a row of one of the matrices: which matrix, which of its rows,
    # and which row of all matrices together.
    matrix = tl.load(experts + row) * LINEARS + column // out
    row_of_matrix = column % out
    row_of_all = (matrix * out + row_of_matrix).to(tl.int64)
    blocks_per_row = size // 64
    bytes_per_row = size // 2
    if DOUBLE:
        nested += matrix * nested_count
        offset += matrix
    total = tl.zeros([COLUMNS], tl.float32)
    for block in range(blocks_per_row):
        at = row_of_all[:, None] * bytes_per_row + block * 32 + tl.arange(0, 32)[None, :]
        byte = tl.load(packed + at, there[:, None], 0).to(tl.int32)  # [COLUMNS, 32]
        scale = tl.load(absmax + row_of_all * blocks_per_row + block, there, 0)
        if DOUBLE:
            # 256 blocks of a matrix share a number of nested.
            second = (row_of_matrix.to(tl.int64) * blocks_per_row + block) // 256
            scale = tl.load(numbers + scale.to(tl.int32)) * tl.load(nested + second, there, 0.0)
            scale += tl.load(offset, there, 0.0)
        high = tl.load(code + (byte >> 4)) * scale[:, None]
        low = tl.load(code + (byte & 15)) * scale[:, None]
        weights = tl.interleave(high, low)  # [COLUMNS, 64]
        values = tl.load(x + row * size + block * 64 + tl.arange(0, 64))
        # Rounded to x's dtype, as the dequantised matrices of the grouped product are.
        rounded = weights.to(values.dtype).to(tl.float32)
        total += tl.sum(rounded * values.to(tl.float32)[None, :], 1)
    tl.store(y + row * LINEARS * out + column, total, there)


@triton.jit
def dequantize_experts_kernel(
    packed, absmax, code, nested, offset, numbers, out, count, nested_count,
    DOUBLE: tl.constexpr, BYTES: tl.constexpr, PER_BLOCK: tl.constexpr,
):  # fmt: skip
    """Does what nf4.dequantize_nf4_kernel does, for several matrices of one shape.

    count: bytes of each matrix.
    """
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
