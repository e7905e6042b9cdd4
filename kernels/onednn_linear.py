"""Products with weights in oneDNN's own memory layout, converted once instead of in every call.

On CPUs F.linear in bf16 reorders the weight in each call. With thousands of rows this takes little
time next to the product; with the few rows of a decoding step it takes nearly half of the time.
Measured on 2 cores with the default base's 212 MB of blocks: 1 row 12.1 ms plain, 5.1 ms packed; 16
rows 15.4 and 8.7 ms; 770 rows 260 and 181 ms. torch.compile does the same for inference, by the
same operator.

GPUs have no such layout. There it is enough to concatenate matrices that read the same input
(`can_join`).
"""

import torch
from torch import Tensor

# oneDNN chooses a layout by the number of rows of the input. The one for 512 rows is best for
# prompts, and as good as any other for decoding steps.
MAX_PACKED_ROWS = 512
# Bytes of the largest model whose weights are packed: the packed copy takes as much memory again.
MAX_PACKED_BYTES = 2 << 30


def can_pack(weight: Tensor, total: int) -> bool:
    """True if oneDNN can pack this weight, of a model whose weights take `total` bytes."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return False
    if total > MAX_PACKED_BYTES:
        return False
    # The operators are private ones of torch, which a later version may not have.
    has_operator = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and has_operator


def can_join(size: int, device: torch.device) -> bool:
    """True if a GPU has room for a copy of `size` bytes, and as much again for activations."""
    if device.type != "cuda":
        return False
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return free_bytes >= 2 * size


def pack_weight(weight: Tensor) -> Tensor:
    """Returns an opaque tensor for `packed_linear`. weight: bf16 [out, in]."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), MAX_PACKED_ROWS)


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns x W^T + b, [rows, out], without gradients.

    x: bf16 [rows, in].
    packed: W, as `pack_weight` returns it.
    """
    # The last three arguments are for a function that is fused onto the product: none.
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
