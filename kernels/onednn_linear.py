"""Products with weights that oneDNN has brought into its own layout once, instead of anew in every call.

On CPUs F.linear in bf16 re-orders the weight each time. With thousands of rows that is lost in the product; with the
few rows of a decoding step it is nearly half of the time (the default base's 212 MB of blocks, 2 cores: 1 row 12.1 ms
plain, 5.1 ms packed; 16 rows 15.4 and 8.7; 770 rows 260 and 181). It is what torch.compile does for inference, by the
same operator.

GPUs know no such layout; there it is enough that matrices which read the same input lie in one (`can_join`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 512  # oneDNN picks a layout by the inputs' rows: this one is best for prompts, and as good as any for steps
LARGEST = 2 << 30  # bytes of a model whose weights are packed: the copy takes as much again


def can_pack(weight: Tensor, total: int) -> bool:
    """Whether a weight can be packed here, of a model of `total` bytes."""
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and there and total <= LARGEST


def can_join(size: int, device: torch.device) -> bool:
    """Whether a GPU has room for a copy of `size` bytes, and as much again for what is computed."""
    return device.type == "cuda" and torch.cuda.mem_get_info(device)[0] >= 2 * size


def pack(weight: Tensor) -> Tensor:
    """weight: bf16 [out, in]. Returns an opaque tensor for packed_linear."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b for bf16 x [rows, in], without gradients. Returns [rows, out]."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def packed_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)
