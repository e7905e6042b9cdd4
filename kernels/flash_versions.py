"""FlashAttention 3 (Shah et al. 2024, arXiv 2407.08608) or 4 in place of version 2: `--attention flash3|flash4`.

Both are packages of their own, faster on Hopper and Blackwell, and marked as prototypes by torch, whose
`activate_flash_attention_impl` puts them behind the operator that kernels/attention.py calls. So they are never taken
without being asked for, and not before one training step has given the same loss and gradients as with version 2.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from common.errors import UserError

VERSIONS = {"flash3": "FA3", "flash4": "FA4"}  # of --attention, and torch's names of them
TOLERANCE = 5e-2  # of bf16: the length of the gradients' difference over theirs; rounding alone makes some 1e-2


def use(name: str, device: torch.device, step: Callable[[], list[Tensor]]) -> float:
    """Puts a version in place for the rest of the process; returns by how much its numbers differ from version 2's.

    step(): computes one training step and returns its loss and its gradients. Raises UserError where torch finds no
    such version on this machine, and where loss or gradients are others.
    """
    if device.type != "cuda":
        raise UserError(f"--attention {name}: is for GPUs, and this run computes on {device.type}; leave it out")
    before = [x.detach().cpu() for x in step()]
    activate(name)
    after = [x.detach().cpu() for x in step()]
    error = difference(before, after)
    if not error <= TOLERANCE:
        raise UserError(
            f"--attention {name}: loss or gradients of the first step differ by {error:.1e} from FlashAttention 2's,"
            f" and rounding makes no more than {TOLERANCE:.0e}; leave --attention out"
        )
    return error


def activate(name: str) -> None:
    try:
        from torch.nn.attention import activate_flash_attention_impl

        activate_flash_attention_impl(VERSIONS[name])
    except (ImportError, RuntimeError, ValueError, AttributeError, OSError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"--attention {name}: torch {torch.__version__} finds no such kernels here ({reason}); install its package,"
            " or leave --attention out"
        ) from None


def difference(before: list[Tensor], after: list[Tensor]) -> float:
    """The loss's difference, or that of all gradients together if it is larger, each relative to what it was before."""
    loss, *gradients = zip(before, after, strict=True)
    of_loss = float((loss[1] - loss[0]).abs() / loss[0].abs().clamp(min=1e-12))
    squares = sum(float((b.float() - a.float()).square().sum()) for a, b in gradients)
    length = sum(float(a.float().square().sum()) for a, _ in gradients)
    return max(of_loss, (squares / max(length, 1e-30)) ** 0.5)
