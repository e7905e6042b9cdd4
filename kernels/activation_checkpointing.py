"""Memory for time: how much of a block is kept until its backward, and how much is computed again there.

A block of D hidden, F intermediate, H and G heads of d keeps, a token, in the model's dtype:

    none       its input, both norms' outputs, x after attention, q, k, v, attention's output, gate, up:
               4 D + 2 (H + G) d + 2 F numbers, and on CPUs attention's probabilities, about H T / 2 in a document of T
    selective  the same without what is cheap to make again, the norms' outputs and the probabilities: the products are
               kept, 2 D + 2 (H + G) d + 2 F
    block      its input alone, D: every block is run forward twice (Chen et al. 2016, arXiv 1604.06174)
    offload    nothing on the GPU: the input goes to the host's memory while the next blocks run, and comes back while
               the backward of the block after it runs

The numbers that come out are the same to the bit, except where a GPU adds in another order.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

KINDS = ("none", "selective", "full", "offload")
MIN_OFFLOAD_NUMEL = 1024  # numbers; a tensor of fewer does not travel


def recompute_norms(block, *inputs) -> tuple[Tensor, Tensor | None]:
    """block(*inputs), in which the norms' outputs are not kept but made again when they are asked for."""
    made: list[tuple[Tensor, Callable]] = []  # holds the outputs, so that no other tensor gets their memory meanwhile

    def watch(norm, inputs, output):
        given, normal = output if isinstance(output, tuple) else (inputs[0], output)
        given = given.detach()
        made.append((normal, lambda: norm(given)))

    def pack(tensor: Tensor):
        for output, again in made:
            if tensor.data_ptr() == output.data_ptr() and tensor.shape == output.shape:
                return again
        return tensor

    def unpack(kept) -> Tensor:
        if torch.is_tensor(kept):
            return kept
        with torch.enable_grad():  # without, a norm would go another way, and round otherwise
            return kept().detach()

    norms = [block.attention_norm, block.mlp_norm]
    handles = [norm.register_forward_hook(watch) for norm in norms if not isinstance(norm, torch.nn.Identity)]
    try:
        with saved_tensors_hooks(pack, unpack):
            return block(*inputs)
    finally:
        made.clear()
        for handle in handles:
            handle.remove()


class OffloadedActivation:
    """A block's input on its way to the host and back."""

    def __init__(self, x: Tensor, side: "torch.cuda.Stream | None"):
        self.device, self.side, self.back = x.device, side, None
        if side is None:
            self.host = x.to("cpu", copy=True)
            return
        self.host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.host.copy_(x, non_blocking=True)
        x.record_stream(side)  # its memory is free when it has left, not before

    def call(self) -> None:
        """Starts the way back."""
        if self.back is not None:
            return
        if self.side is None:
            self.back = self.host.to(self.device)
            return
        with torch.cuda.stream(self.side):  # after its way out, on the same stream
            self.back = self.host.to(self.device, non_blocking=True)

    def arrive(self) -> Tensor:
        self.call()
        if self.side is not None:
            torch.cuda.current_stream().wait_stream(self.side)
            self.back.record_stream(torch.cuda.current_stream())
        x, self.back = self.back, None
        return x


@cache
def offload_stream(device: torch.device) -> "torch.cuda.Stream":
    """The one stream on which tensors travel. A stream for each forward would leave the memory that was freed on the
    ones before to them alone."""
    return torch.cuda.Stream(device)


class ActivationCheckpointing:
    """Runs the blocks of one forward."""

    def __init__(self, kind: str, device: torch.device):
        self.kind, self.away = kind, []
        self.side = offload_stream(device) if kind == "offload" and device.type == "cuda" else None

    def run(self, block, last: bool, x: Tensor, added: Tensor | None, *rest) -> tuple[Tensor, Tensor | None]:
        if self.kind == "selective":
            return recompute_norms(block, x, added, *rest)
        if added is not None:  # a block's input is then one tensor, and not two that are kept
            x = x + added
        if self.kind != "offload" or last:  # the last block's input is wanted at once
            return checkpoint(block, x, None, *rest, use_reentrant=False)
        with saved_tensors_hooks(self.pack, self.unpack):  # checkpoint keeps the input where such hooks see it
            return checkpoint(block, x, None, *rest, use_reentrant=False)

    def pack(self, x: Tensor):
        if x.numel() < MIN_OFFLOAD_NUMEL:
            return x
        self.away.append(OffloadedActivation(x.detach(), self.side))
        return self.away[-1]

    def unpack(self, kept) -> Tensor:
        if torch.is_tensor(kept):
            return kept
        x = kept.arrive()
        before = self.away.index(kept) - 1
        if before >= 0:
            self.away[before].call()  # it comes while this block is computed
        return x
