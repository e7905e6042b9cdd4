"""FlashAttention 3 (Shah et al. 2024, arXiv 2407.08608) or 4 instead of version 2.

The flag is `--attention flash3` or `flash4`.

Both are packages of their own, faster on Hopper and Blackwell, and marked as prototypes by torch.
torch's `activate_flash_attention_impl` puts them behind the operator that kernels/attention.py
calls. So they are used only if the flag asks for them, and only after one training step has given
the same loss and gradients as with version 2.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from common.errors import UserError, first_line

# The values of --attention, and torch's names for them.
VERSIONS = {"flash3": "FA3", "flash4": "FA4"}

# The largest norm of the gradients' difference, relative to the gradients' norm, in bf16. Rounding
# alone makes about 1e-2.
FLASH_TOLERANCE = 5e-2


def use(name: str, device: torch.device, step: Callable[[], list[Tensor]]) -> float:
    """Switches to a version for the rest of the process, and compares it with version 2.

    name: a key of VERSIONS.
    device: the device that the run computes on.
    step: computes one training step; returns its loss and its gradients.
    Returns the relative difference from version 2, as `difference` computes it.
    Raises UserError if the device is no GPU, if torch finds no such version on this machine, or if
    the loss or the gradients differ by more than FLASH_TOLERANCE.
    """
    if device.type != "cuda":
        raise UserError(
            f"--attention {name}: is for GPUs, and this run computes on {device.type}; leave it out"
        )
    before = [x.detach().cpu() for x in step()]
    activate_version(name)
    after = [x.detach().cpu() for x in step()]
    error = difference(before, after)
    # Written so that NaN is refused as well.
    if not error <= FLASH_TOLERANCE:
        raise UserError(
            f"--attention {name}: loss or gradients of the first step differ by {error:.1e} from"
            f" FlashAttention 2's, and rounding makes no more than {FLASH_TOLERANCE:.0e};"
            " leave --attention out"
        )
    return error


def activate_version(name: str) -> None:
    """Puts a version in the place of version 2, for the rest of the process.

    Raises UserError if torch finds no such version on this machine.
    """
    try:
        # The import is late because older versions of torch do not have it.
        from torch.nn.attention import activate_flash_attention_impl

        activate_flash_attention_impl(VERSIONS[name])
    except (ImportError, RuntimeError, ValueError, AttributeError, OSError) as error:
        reason = first_line(error)
        raise UserError(
            f"--attention {name}: torch {torch.__version__} finds no such kernels here ({reason});"
            " install its package, or leave --attention out"
        ) from None


def difference(before: list[Tensor], after: list[Tensor]) -> float:
    """Returns the larger of two relative differences: of the loss, and of all gradients together.

    before, after: the loss, then the gradients. A difference is relative to what was before; that
    of the gradients is the norm of their difference over their norm.
    """
    loss_before, *grads_before = before
    loss_after, *grads_after = after
    # The small numbers keep the ratios of zeros from being NaN.
    loss_size = loss_before.abs().clamp(min=1e-12)
    loss_difference = float((loss_after - loss_before).abs() / loss_size)
    squared_difference = 0.0
    squared_norm = 0.0
    for old, new in zip(grads_before, grads_after, strict=True):
        change = new.float() - old.float()
        squared_difference += float(change.square().sum())
        squared_norm += float(old.float().square().sum())
    gradients_difference = (squared_difference / max(squared_norm, 1e-30)) ** 0.5
    if math.isnan(gradients_difference):  # max() of 0 and NaN is 0
        return gradients_difference
    return max(loss_difference, gradients_difference)
