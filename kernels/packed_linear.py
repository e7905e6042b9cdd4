"""Products with weights that oneDNN has brought into its own layout once, instead of anew in every call.

On CPUs F.linear in bf16 re-orders the weight each time. With thousands of rows that is lost in the product; with the
few rows of a decoding step it is a third of the time (16 rows, 265 MB of weights, 2 cores: 14.3 ms plain, 10.6 ms
packed; the same bits come out). It is what torch.compile does for inference, by the same operator.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = 2 << 30  # bytes of a model whose weights are packed: the copy takes as much again


def can_pack(weight: Tensor, total: int) -> bool:
    """Whether a weight can be packed here, of a model of `total` bytes."""
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and there and total <= LARGEST


def pack(weight: Tensor, rows: int) -> Tensor:
    """weight: bf16 [out, in]; rows: of the inputs to come. Returns an opaque tensor for packed_linear."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b for bf16 x [rows, in], without gradients. Returns [rows, out]."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def packed_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)
