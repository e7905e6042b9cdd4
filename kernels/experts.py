"""The MLPs of all routed experts of a layer in a few grouped products (kernels/grouped.py), without a wait for the GPU.

Token-expert pairs are sorted by expert, so that an expert's rows lie together. A loop over the experts would have to
know on the host how many each has, wait for that in every layer, and launch each expert's kernels by themselves: with
128 experts, thousands a layer.

The weight that the router gives a pair is multiplied with the product of gate and up instead of with what the expert
returns: down is linear, so that is the same, and what the experts return need not be kept. Kept are x, gate, up and,
with adapters, their x A^T; the sorted rows are gathered again in the backward.

In comments: E experts, N tokens, M = N * active pairs, D hidden, F the experts' inner size.
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

BLOCK = 1024


class Routes(NamedTuple):
    """Which rows go to which expert, all on the GPU."""

    token: Tensor  # int64 [M]: the token of each pair, sorted by expert
    place: Tensor  # int64 [N, active]: where a token's pairs stand among the sorted ones
    expert: Tensor  # as in Groups
    ends: Tensor

    @property
    def groups(self) -> Groups:
        return Groups(self.expert, self.ends)


def can_group(x: Tensor, experts: int, inner: int) -> bool:
    """Whether the layer can be computed here for x [N, D]."""
    return multiplies_groups(x) and experts <= MOST_GROUPS and x.shape[1] % ALIGNMENT == inner % ALIGNMENT == 0


def sort_pairs(chosen: Tensor, experts: int) -> Routes:
    """chosen: int64 [N, active], the experts of each token."""
    expert, order = chosen.flatten().sort(stable=True)
    place = torch.empty_like(order)
    place.scatter_(0, order, torch.arange(len(order), device=order.device))
    ends = torch.searchsorted(expert, torch.arange(experts, device=expert.device), right=True, out_int32=True)
    return Routes(order // chosen.shape[1], place.view_as(chosen), expert, ends)


def routed_mlp(
    x: Tensor,
    weights: Tensor,
    routes: Routes,
    gate_up: Product,
    down: Product,
    activation: str,
    keys: Tensor | None = None,
) -> Tensor:
    """The weighted sum of what a token's experts make of it: down(act(gate x) * up x), of each.

    x: [N, D]; weights: [N, active], fp32; keys: int64 [N], by which dropout on adapters tells tokens apart, None: they
    are drawn. Returns [N, D] in x's dtype. Experts that nobody chose get gradients of zeros. Gradients of weights and
    adapters are in their dtype.
    """

    def keys_of_rows() -> Tensor:
        drawn = torch.randint(2**31, (len(x),), device=x.device) if keys is None else keys
        return drawn.index_select(0, routes.token)

    products = [product.bind(routes.groups, keys_of_rows) for product in (gate_up, down)]
    tensors = [t for product in products for t in product.tensors()]
    return RoutedMLP.apply(x, weights, routes, activation, [product.hollow() for product in products], *tensors)


class RoutedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, routes, activation, layout, *tensors):
        left = iter(tensors)
        gate_up, down = (product.filled(left) for product in layout)
        share = weights.new_empty(weights.numel()).scatter_(0, routes.place.flatten(), weights.flatten())  # [M]
        inner, lows = multiply(x.index_select(0, routes.token), gate_up, routes.groups)  # [M, 2 F]
        out, lows_down = multiply(gated(inner, share, activation), down, routes.groups)  # [M, D]
        ctx.save_for_backward(x, share, inner, *routes, *lows, *lows_down, *tensors)
        ctx.activation, ctx.layout = activation, layout
        return sum_rows(out, routes.place)

    @staticmethod
    def backward(ctx, grad):
        x, share, inner, *rest = ctx.saved_tensors
        routes, lows, lows_down, tensors = Routes(*rest[:4]), rest[4:6], rest[6:7], iter(rest[7:])
        gate_up, down = (product.filled(tensors) for product in ctx.layout)
        rows, wanted, first = routes.groups, ctx.needs_input_grad[5:], len(gate_up.tensors())

        grad = grad.contiguous().index_select(0, routes.token)  # [M, D]
        dhidden, dlows_down = input_gradient(grad, down, rows)
        dinner, dshare, hidden = gated_backward_with_share(dhidden, inner, share, ctx.activation)
        ddown = tensor_gradients(grad, hidden, down, lows_down, dlows_down, wanted[first:], rows)
        del grad, dhidden, hidden

        drows, dlows = input_gradient(dinner, gate_up, rows)
        dx = sum_rows(drows, routes.place)
        del drows
        again = x.index_select(0, routes.token) if any(wanted[:first]) else None
        dgate_up = tensor_gradients(dinner, again, gate_up, lows, dlows, wanted[:first], rows)
        dweights = dshare.index_select(0, routes.place.flatten()).view_as(routes.place)
        return dx, dweights, None, None, None, *dgate_up, *ddown


def gated(inner: Tensor, share: Tensor, activation: str) -> Tensor:
    """share * act(gate) * up. inner: [M, 2 F], gate's columns and then up's; share: fp32 [M]. Returns [M, F]."""
    if activation == "silu" and use_triton(inner):
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
    if activation == "silu" and use_triton(inner):
        grad, (rows, width) = grad.contiguous(), grad.shape
        dshare, hidden = torch.empty_like(share), torch.empty_like(grad)
        gated_backward_kernel[(rows,)](grad, inner, share, dinner, dshare, hidden, width, BLOCK=BLOCK)
        return dinner, dshare, hidden
    gate, up = inner.chunk(2, 1)
    hidden = ACTIVATIONS[activation](gate).mul_(up)
    dshare = (grad * hidden).sum(1, dtype=share.dtype)
    dgate, dup, _ = gated_backward((grad * share[:, None]).to(grad.dtype), gate, up, activation)
    torch.cat([dgate, dup], 1, out=dinner)
    return dinner, dshare, (hidden * share[:, None]).to(inner.dtype)


def sum_rows(rows: Tensor, place: Tensor) -> Tensor:
    """rows: [M, D]; place: int64 [N, active]. Returns [N, D], the sums of the rows that stand there, added up in
    fp32."""
    if use_triton(rows):
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
