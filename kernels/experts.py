"""The MLPs of all routed experts of a layer in a few grouped products (kernels/grouped.py), without a wait for the GPU.

Pairs of a token and an expert are sorted by expert, so that an expert's rows follow each other. A loop over the experts
would have to know on the host how many rows each has, wait for that number in every layer, and launch kernels for each
expert: with 128 experts, thousands a layer.

The router's weight of a pair is multiplied with act(gate) * up instead of with the expert's output. Since down is
linear, the result is the same, and the experts' outputs need not be saved. Saved are x, gate, up and, with adapters,
their x A^T; the sorted rows are gathered again in the backward.

In shapes: E experts, N tokens, active experts of each token, M = N * active pairs, D hidden size, F the experts'
intermediate size.
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
    """True if a layer of `experts` experts of intermediate size `inner` can be computed here for x [N, D]."""
    is_aligned = x.shape[1] % ALIGNMENT == 0 and inner % ALIGNMENT == 0
    return multiplies_groups(x) and experts <= MOST_GROUPS and is_aligned


def sort_pairs(chosen: Tensor, experts: int) -> Routes:
    """Returns the routes of a batch. chosen: int64 [N, active], the experts of each token. experts: E."""
    expert, order = chosen.flatten().sort(stable=True)
    place = torch.empty_like(order)
    place.scatter_(0, order, torch.arange(len(order), device=order.device))
    all_experts = torch.arange(experts, device=expert.device)
    ends = torch.searchsorted(expert, all_experts, right=True, out_int32=True)
    return Routes(order // chosen.shape[1], place.view_as(chosen), expert, ends)


def routed_mlp(
    x: Tensor,
    weights: Tensor,
    routes: Routes,
    gate_up: Product,
    down: Product,
    activation: str,
    dropout_seeds: Tensor | None = None,
) -> Tensor:
    """Returns for each token the weighted sum of its experts' outputs, down(act(gate x) * up x): [N, D] in x's dtype.

    x: [N, D].
    weights: float32 [N, active], the router's weight of each pair.
    routes: what `sort_pairs` returned.
    gate_up, down: the linears of all experts.
    activation: the name of act, a key of kernels.swiglu.ACTIVATIONS.
    dropout_seeds: int64 [N], which decide what the adapters' dropout drops of each token; None: they are drawn.

    Experts that no token chose get gradients of zeros. The gradients of weights and adapters are in their own dtypes.
    """

    def pair_seeds() -> Tensor:
        seeds = dropout_seeds
        if seeds is None:
            seeds = torch.randint(2**31, (len(x),), device=x.device)
        return seeds.index_select(0, routes.token)

    products = [product.bind_dropout(routes.groups, pair_seeds) for product in (gate_up, down)]
    tensors = products[0].tensors() + products[1].tensors()
    layout = [product.without_tensors() for product in products]
    return RoutedMLP.apply(x, weights, routes, activation, layout, *tensors)


class RoutedMLP(torch.autograd.Function):
    """`routed_mlp` with its backward."""

    @staticmethod
    def forward(ctx, x, weights, routes, activation, layout, *tensors):
        remaining = iter(tensors)
        gate_up, down = (product.with_tensors(remaining) for product in layout)
        pair_weights = weights.new_empty(weights.numel())  # [M], sorted by expert
        pair_weights.scatter_(0, routes.place.flatten(), weights.flatten())
        inner, lows = multiply(x.index_select(0, routes.token), gate_up, routes.groups)  # [M, 2 F]
        out, lows_down = multiply(
            gated_experts(inner, pair_weights, activation), down, routes.groups
        )  # [M, D]
        ctx.save_for_backward(x, pair_weights, inner, *routes, *lows, *lows_down, *tensors)
        ctx.activation, ctx.layout = activation, layout
        return sum_rows(out, routes.place)

    @staticmethod
    def backward(ctx, grad):
        x, pair_weights, inner, *rest = ctx.saved_tensors
        routes = Routes(*rest[:4])
        lows, lows_down = rest[4:6], rest[6:7]  # of gate and up, and of down
        remaining = iter(rest[7:])
        gate_up, down = (product.with_tensors(remaining) for product in ctx.layout)
        rows = routes.groups
        needs_grad = ctx.needs_input_grad[5:]
        num_gate_up = len(gate_up.tensors())

        grad = grad.contiguous().index_select(0, routes.token)  # [M, D]
        dhidden, dlows_down = input_gradient(grad, down, rows)
        dinner, dpair_weights, hidden = gated_backward_with_weights(
            dhidden, inner, pair_weights, ctx.activation
        )
        ddown = tensor_gradients(
            grad, hidden, down, lows_down, dlows_down, needs_grad[num_gate_up:], rows
        )
        # Freed here, so that their memory is there for the gradients of gate and up.
        del grad, dhidden, hidden

        drows, dlows = input_gradient(dinner, gate_up, rows)
        dx = sum_rows(drows, routes.place)
        del drows
        sorted_x = None
        if any(needs_grad[:num_gate_up]):
            sorted_x = x.index_select(0, routes.token)
        dgate_up = tensor_gradients(
            dinner, sorted_x, gate_up, lows, dlows, needs_grad[:num_gate_up], rows
        )
        dweights = dpair_weights.index_select(0, routes.place.flatten()).view_as(routes.place)
        return dx, dweights, None, None, None, *dgate_up, *ddown


def gated_experts(inner: Tensor, pair_weights: Tensor, activation: str) -> Tensor:
    """Returns act(gate) * up times the weight of each row, [M, F].

    inner: [M, 2 F], the columns of gate and then those of up.
    pair_weights: float32 [M].
    """
    if activation == "silu" and use_triton(inner):
        rows, width = inner.shape[0], inner.shape[1] // 2
        out = inner.new_empty(rows, width)
        gated_kernel[(rows, -(-width // COLUMNS_PER_BLOCK))](
            inner, pair_weights, out, width, BLOCK=COLUMNS_PER_BLOCK
        )
        return out
    gate, up = inner.chunk(2, 1)
    return (ACTIVATIONS[activation](gate).mul_(up) * pair_weights[:, None]).to(inner.dtype)


def gated_backward_with_weights(
    grad: Tensor, inner: Tensor, pair_weights: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of inner [M, 2 F] and pair_weights, float32 [M], and what `gated` returned, [M, F].

    grad: [M, F], the gradient of what `gated` returned.
    inner, pair_weights, activation: the arguments of `gated`.
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
    dgate, dup, _ = gated_backward(
        (grad * pair_weights[:, None]).to(grad.dtype), gate, up, activation
    )
    torch.cat([dgate, dup], 1, out=dinner)
    return dinner, dpair_weights, (hidden * pair_weights[:, None]).to(inner.dtype)


def sum_rows(rows: Tensor, place: Tensor) -> Tensor:
    """Returns for each token the sum of its rows, added in fp32: [N, D].

    rows: [M, D].
    place: int64 [N, active], the rows of each token.
    """
    if use_triton(rows):
        tokens, active = place.shape
        width = rows.shape[1]
        out = rows.new_empty(tokens, width)
        sum_rows_kernel[(tokens, -(-width // COLUMNS_PER_BLOCK))](
            rows, place, out, width, ACTIVE=active, BLOCK=COLUMNS_PER_BLOCK
        )
        return out
    each = rows.index_select(0, place.flatten()).view(*place.shape, -1)
    return each.sum(1, dtype=torch.promote_types(rows.dtype, torch.float32)).to(rows.dtype)


@triton.jit
def gated_kernel(inner, pair_weights, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    g = tl.load(inner + row * 2 * width + at, inside, 0.0).to(tl.float32)
    u = tl.load(inner + row * 2 * width + width + at, inside, 0.0).to(tl.float32)
    tl.store(out + row * width + at, g * tl.sigmoid(g) * u * tl.load(pair_weights + row), inside)


@triton.jit
def gated_backward_kernel(
    grad, inner, pair_weights, dinner, dpair_weights, hidden, width, BLOCK: tl.constexpr
):  # fmt: skip
    """Computes one row a program, since the gradient of the row's weight is a sum over the row."""
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(pair_weights + row)
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
    tl.store(dpair_weights + row, tl.sum(total, 0))


@triton.jit
def sum_rows_kernel(rows, place, out, width, ACTIVE: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(ACTIVE):
        row = tl.load(place + token * ACTIVE + i)
        total += tl.load(rows + row * width + at, inside, 0.0).to(tl.float32)
    tl.store(out + token * width + at, total, inside)
