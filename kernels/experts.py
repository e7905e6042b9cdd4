"""The MLPs of all routed experts of a layer in a few grouped products (kernels/grouped.py), without
a wait for the GPU.

Pairs of a token and an expert are sorted by expert, so that an expert's rows follow each other. A
loop over the experts would have to know on the host how many rows each has, wait for that number in
every layer, and launch kernels for each expert: with 128 experts, thousands a layer.

The router's weight of a pair is multiplied with act(gate) * up instead of with the expert's output.
Since down is linear, the result is the same, and the experts' outputs need not be saved. Saved are
x, gate, up and, with adapters, their x A^T; the sorted rows are gathered again in the backward.

In shapes: E experts, N tokens, active experts of each token, M = N * active pairs, D hidden size, F
the experts' intermediate size.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.grouped import (
    ALIGNMENT,
    MOST_GROUPS,
    Groups,
    Product,
    input_gradient,
    multiplies_groups,
    multiply,
    tensor_gradients,
)
from kernels.swiglu import ACTIVATIONS, gated_backward
from kernels.triton_utils import tl, triton, use_triton

COLUMNS_PER_BLOCK = 1024  # numbers of a row that a program of the kernels takes at a time


class Routes(NamedTuple):
    """Which tokens go to which expert, all on the GPU."""

    token: Tensor  # int64 [M]: the token of each pair, sorted by expert
    place: Tensor  # int64 [N, active]: where each token's pairs are among the sorted pairs
    expert: Tensor  # int64 [M]: as in kernels.grouped.Groups
    ends: Tensor  # int32 [E]: as in kernels.grouped.Groups

    @property
    def groups(self) -> Groups:
        return Groups(self.expert, self.ends)


def can_group(x: Tensor, experts: int, inner: int) -> bool:
    """True if a layer of experts can be computed here for x.

    x: [N, D].
    experts: E.
    inner: F.
    """
    hidden_size = x.shape[1]
    if hidden_size % ALIGNMENT or inner % ALIGNMENT:
        return False
    return experts <= MOST_GROUPS and multiplies_groups(x)


def sort_pairs(chosen: Tensor, experts: int) -> Routes:
    """Returns the routes of a batch.

    chosen: int64 [N, active], the experts of each token.
    experts: E.
    """
    # Pair p is of token p // active. Stable, since the order of an expert's rows decides how its
    # sums are rounded.
    active = chosen.shape[1]
    expert, order = chosen.flatten().sort(stable=True)  # [M] each
    token = order // active
    # The inverse of `order`: where the sort has put each pair.
    place = torch.empty_like(order)
    sorted_places = torch.arange(len(order), device=order.device)
    place.scatter_(0, order, sorted_places)
    # A search in the sorted pairs finds where each expert's end; torch.bincount would wait for the
    # GPU.
    all_experts = torch.arange(experts, device=expert.device)
    ends = torch.searchsorted(expert, all_experts, right=True, out_int32=True)  # [E]
    return Routes(token, place.view_as(chosen), expert, ends)


def routed_mlp(
    x: Tensor,
    weights: Tensor,
    routes: Routes,
    gate_up: Product,
    down: Product,
    activation: str,
    dropout_seeds: Tensor | None = None,
) -> Tensor:
    """Returns for each token the weighted sum of its experts' outputs, [N, D] in x's dtype.

    An expert's output is down(act(gate x) * up x).

    x: [N, D].
    weights: float32 [N, active], the router's weight of each pair.
    routes: what `sort_pairs` returned.
    gate_up, down: the linears of all experts.
    activation: the name of act, a key of kernels.swiglu.ACTIVATIONS.
    dropout_seeds: int64 [N], which decide what the adapters' dropout drops of each token; None:
        they are drawn.

    Experts that no token chose get gradients of zeros. The gradients of weights and adapters are in
    their own dtypes.
    """

    def pair_seeds() -> Tensor:
        seeds = dropout_seeds
        if seeds is None:
            seeds = torch.randint(2**31, (len(x),), device=x.device)
        return seeds.index_select(0, routes.token)

    gate_up = gate_up.bind_dropout(routes.groups, pair_seeds)
    down = down.bind_dropout(routes.groups, pair_seeds)
    # Autograd only sees tensors that are arguments of their own.
    tensors = gate_up.tensors() + down.tensors()
    layout = [gate_up.without_tensors(), down.without_tensors()]
    return RoutedMLP.apply(x, weights, routes, activation, layout, *tensors)


class RoutedMLP(torch.autograd.Function):
    """`routed_mlp` with its backward."""

    @staticmethod
    def forward(ctx, x, weights, routes, activation, layout, *tensors):
        remaining = iter(tensors)
        gate_up = layout[0].with_tensors(remaining)
        down = layout[1].with_tensors(remaining)
        rows = routes.groups
        pair_weights = weights.new_empty(weights.numel())  # [M], sorted by expert
        pair_weights.scatter_(0, routes.place.flatten(), weights.flatten())
        sorted_x = x.index_select(0, routes.token)  # [M, D]
        inner, lows = multiply(sorted_x, gate_up, rows)  # [M, 2 F]
        # Neither these rows nor `hidden` are saved: the backward computes them again.
        del sorted_x
        hidden = gated_experts(inner, pair_weights, activation)  # [M, F]
        out, lows_down = multiply(hidden, down, rows)  # [M, D]
        del hidden
        ctx.save_for_backward(x, pair_weights, inner, *routes, *lows, *lows_down, *tensors)
        ctx.activation = activation
        ctx.layout = layout
        return sum_rows(out, routes.place)

    @staticmethod
    def backward(ctx, grad):
        x, pair_weights, inner, *rest = ctx.saved_tensors
        routes = Routes(*rest[:4])
        lows, lows_down = rest[4:6], rest[6:7]  # of gate and up, and of down
        remaining = iter(rest[7:])
        gate_up = ctx.layout[0].with_tensors(remaining)
        down = ctx.layout[1].with_tensors(remaining)
        rows = routes.groups
        num_gate_up = len(gate_up.tensors())
        # Of the tensors, which follow the five other arguments of forward.
        needs_grad = ctx.needs_input_grad[5:]
        gate_up_needs_grad = needs_grad[:num_gate_up]
        down_needs_grad = needs_grad[num_gate_up:]

        grad = grad.contiguous().index_select(0, routes.token)  # [M, D]
        dhidden, dlows_down = input_gradient(grad, down, rows)  # [M, F]
        dinner, dpair_weights, hidden = gated_backward_with_weights(
            dhidden, inner, pair_weights, ctx.activation
        )
        ddown = tensor_gradients(grad, hidden, down, lows_down, dlows_down, down_needs_grad, rows)
        # Freed here, so that their memory is there for the gradients of gate and up.
        del grad, dhidden, hidden

        drows, dlows = input_gradient(dinner, gate_up, rows)  # [M, D]
        dx = sum_rows(drows, routes.place)
        del drows
        sorted_x = None
        if any(gate_up_needs_grad):
            sorted_x = x.index_select(0, routes.token)
        dgate_up = tensor_gradients(
            dinner, sorted_x, gate_up, lows, dlows, gate_up_needs_grad, rows
        )
        # Back from the order of the experts to that of the tokens.
        dweights = dpair_weights.index_select(0, routes.place.flatten())  # [M]
        dweights = dweights.view_as(routes.place)  # [N, active]
        return dx, dweights, None, None, None, *dgate_up, *ddown


def gated_experts(inner: Tensor, pair_weights: Tensor, activation: str) -> Tensor:
    """Returns act(gate) * up times the weight of each row, [M, F].

    inner: [M, 2 F], the columns of gate and then those of up.
    pair_weights: float32 [M].
    """
    if activation == "silu" and use_triton(inner):
        rows, width = inner.shape[0], inner.shape[1] // 2
        out = inner.new_empty(rows, width)
        grid = (rows, -(-width // COLUMNS_PER_BLOCK))
        gated_kernel[grid](inner, pair_weights, out, width, BLOCK=COLUMNS_PER_BLOCK)
        return out
    gate, up = inner.chunk(2, 1)
    # The product is in fp32, as the weights are.
    weighted = ACTIVATIONS[activation](gate).mul_(up) * pair_weights[:, None]
    return weighted.to(inner.dtype)


def gated_backward_with_weights(
    grad: Tensor, inner: Tensor, pair_weights: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of `gated_experts`, and what it returned.

    grad: [M, F], the gradient of what `gated_experts` returned.
    inner, pair_weights, activation: the arguments of `gated_experts`.

    The gradients are of inner, [M, 2 F], and of pair_weights, float32 [M]. The output, [M, F], is
    computed again in the same pass; down's matrices need it for their gradients.
    """
    dinner = torch.empty_like(inner, memory_format=torch.contiguous_format)
    if activation == "silu" and use_triton(inner):
        grad = grad.contiguous()
        rows, width = grad.shape
        dpair_weights = torch.empty_like(pair_weights)
        hidden = torch.empty_like(grad)
        gated_backward_kernel[(rows,)](
            grad, inner, pair_weights, dinner, dpair_weights, hidden, width, BLOCK=COLUMNS_PER_BLOCK
        )  # fmt: skip
        return dinner, dpair_weights, hidden
    gate, up = inner.chunk(2, 1)
    hidden = ACTIVATIONS[activation](gate).mul_(up)
    dpair_weights = (grad * hidden).sum(1, dtype=pair_weights.dtype)
    dhidden = (grad * pair_weights[:, None]).to(grad.dtype)
    dgate, dup, _ = gated_backward(dhidden, gate, up, activation)
    del dhidden
    torch.cat([dgate, dup], 1, out=dinner)
    weighted = (hidden * pair_weights[:, None]).to(inner.dtype)
    return dinner, dpair_weights, weighted


def sum_rows(rows: Tensor, place: Tensor) -> Tensor:
    """Returns for each token the sum of its rows, added in fp32: [N, D].

    rows: [M, D].
    place: int64 [N, active], the rows of each token.
    """
    if use_triton(rows):
        tokens, active = place.shape
        width = rows.shape[1]
        out = rows.new_empty(tokens, width)
        grid = (tokens, -(-width // COLUMNS_PER_BLOCK))
        sum_rows_kernel[grid](rows, place, out, width, ACTIVE=active, BLOCK=COLUMNS_PER_BLOCK)
        return out
    by_token = rows.index_select(0, place.flatten()).view(*place.shape, -1)  # [N, active, D]
    sum_dtype = torch.promote_types(rows.dtype, torch.float32)  # float64 stays as it is
    return by_token.sum(1, dtype=sum_dtype).to(rows.dtype)


@triton.jit
def gated_kernel(inner, pair_weights, out, width, BLOCK: tl.constexpr):
    """Computes silu(gate) * up * weight of BLOCK columns of one row a program."""
    # 64 bits: a row's place in memory may be beyond 2^31.
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate_row = inner + row * 2 * width
    up_row = gate_row + width
    g = tl.load(gate_row + at, inside, 0.0).to(tl.float32)
    u = tl.load(up_row + at, inside, 0.0).to(tl.float32)
    weight = tl.load(pair_weights + row)
    tl.store(out + row * width + at, g * tl.sigmoid(g) * u * weight, inside)


@triton.jit
def gated_backward_kernel(
    grad, inner, pair_weights, dinner, dpair_weights, hidden, width, BLOCK: tl.constexpr
):  # fmt: skip
    """Computes one row a program, since the gradient of the row's weight is a sum over the row.

    With s = sigmoid(g), the gradient of silu(g) = g s is s (1 + g (1 - s)).
    """
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(pair_weights + row)
    # Where the row begins in each tensor: of F columns, or of 2 F.
    grad_row = grad + row * width
    hidden_row = hidden + row * width
    gate_row = inner + row * 2 * width
    up_row = gate_row + width
    dgate_row = dinner + row * 2 * width
    dup_row = dgate_row + width
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < width
        d = tl.load(grad_row + at, inside, 0.0).to(tl.float32)
        g = tl.load(gate_row + at, inside, 0.0).to(tl.float32)
        u = tl.load(up_row + at, inside, 0.0).to(tl.float32)
        s = tl.sigmoid(g)
        product = g * s * u
        total += d * product
        tl.store(hidden_row + at, weight * product, inside)
        d *= weight
        tl.store(dgate_row + at, d * u * s * (1 + g * (1 - s)), inside)
        tl.store(dup_row + at, d * g * s, inside)
    tl.store(dpair_weights + row, tl.sum(total, 0))


@triton.jit
def sum_rows_kernel(rows, place, out, width, ACTIVE: tl.constexpr, BLOCK: tl.constexpr):
    """Computes BLOCK columns of the sum of one token a program, in fp32."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(ACTIVE):
        row = tl.load(place + token * ACTIVE + i)
        total += tl.load(rows + row * width + at, inside, 0.0).to(tl.float32)
    tl.store(out + token * width + at, total, inside)
