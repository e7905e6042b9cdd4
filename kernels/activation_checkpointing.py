"""Activation checkpointing, also called gradient checkpointing: less memory until the backward, for
more time.

A block of hidden size D, intermediate size F, H query heads and G key-value heads of size d saves,
for each token, in the model's dtype:

    none       its input, the outputs of both norms, x after attention, q, k, v, attention's output,
               gate and up: 4 D + 2 (H + G) d + 2 F numbers; on CPUs also attention's probabilities,
               about H T / 2 numbers in a document of T tokens
    selective  the same without what is cheap to compute again, the norms' outputs and the
               probabilities; the outputs of matrix products are saved: 2 D + 2 (H + G) d + 2 F
               numbers
    full       its input alone, D numbers: every block is run forward twice (Chen et al. 2016, arXiv
               1604.06174)
    offload    nothing on the GPU: the input is copied to the host's memory while the next blocks
               run, and copied back while the backward of the block after it runs

Losses and gradients are the same to the bit, except where a GPU adds in another order.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

MIN_OFFLOAD_NUMEL = 1024  # a tensor with fewer numbers stays on the GPU


def recompute_norms(block, *inputs) -> tuple[Tensor, Tensor | None]:
    """Returns block(*inputs). The norms' outputs are not saved for the backward, which computes
    them again."""
    # (output, a function that computes it again). The list holds the outputs while the block runs,
    # so that no other tensor gets their memory: `pack` recognizes a tensor by its address.
    norm_outputs: list[tuple[Tensor, Callable[[], Tensor]]] = []

    def record_output(norm, norm_inputs, output) -> None:
        # A norm that adds the residual first returns that sum as well, and the sum is what it is
        # computed again from.
        if isinstance(output, tuple):
            x, normal = output
        else:
            x, normal = norm_inputs[0], output
        x = x.detach()
        norm_outputs.append((normal, lambda: norm(x)))

    def pack(tensor: Tensor) -> Tensor | Callable[[], Tensor]:
        for output, recompute in norm_outputs:
            if tensor.data_ptr() == output.data_ptr() and tensor.shape == output.shape:
                return recompute
        return tensor

    def unpack(packed: Tensor | Callable[[], Tensor]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        # Without gradients a norm would be computed in another way, and round differently.
        with torch.enable_grad():
            return packed().detach()

    handles = []
    for norm in (block.attention_norm, block.mlp_norm):
        # An Identity's output is its input, which others may save as well.
        if not isinstance(norm, torch.nn.Identity):
            handles.append(norm.register_forward_hook(record_output))
    try:
        with saved_tensors_hooks(pack, unpack):
            return block(*inputs)
    finally:
        norm_outputs.clear()
        for handle in handles:
            handle.remove()


class OffloadedActivation:
    """A block's input, which is copied to the host's memory and back."""

    def __init__(self, x: Tensor, stream: "torch.cuda.Stream | None"):
        """Starts the copy to the host, on `stream`; None, as on a CPU, copies at once."""
        self.device = x.device
        self.stream = stream
        self.on_device: Tensor | None = None  # the copy back on the device, once it is started
        if stream is None:
            self.on_host = x.to("cpu", copy=True)
            return
        self.on_host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.on_host.copy_(x, non_blocking=True)
        # The memory of x may be used again only when the copy is complete.
        x.record_stream(stream)

    def prefetch(self) -> None:
        """Starts the copy back to the device, if it is not started yet."""
        if self.on_device is not None:
            return
        if self.stream is None:
            self.on_device = self.on_host.to(self.device)
            return
        # The same stream as the copy to the host, so that this one comes after it.
        with torch.cuda.stream(self.stream):
            self.on_device = self.on_host.to(self.device, non_blocking=True)

    def fetch(self) -> Tensor:
        """Returns the tensor on the device; the current stream waits for its copy."""
        self.prefetch()
        x = self.on_device
        assert x is not None, "prefetch has started the copy"
        if self.stream is not None:
            current = torch.cuda.current_stream()
            current.wait_stream(self.stream)
            # The memory was taken on the other stream, and is used on this one.
            x.record_stream(current)
        self.on_device = None
        return x


@cache
def offload_stream(device: torch.device) -> "torch.cuda.Stream":
    """Returns the one stream of a device on which activations are copied.

    There is one for all forwards: the allocator keeps freed memory for the stream that used it, so
    that with a new stream for each forward the memory of the ones before could not be used again.
    """
    return torch.cuda.Stream(device)


class ActivationCheckpointing:
    """Runs the blocks of one forward.

    kind: one of CHECKPOINTING_KINDS in common/choices.py but "none".
    """

    def __init__(self, kind: str, device: torch.device):
        self.kind = kind
        self.offloaded: list[OffloadedActivation] = []  # in the order of the blocks
        self.stream = None
        if kind == "offload" and device.type == "cuda":
            self.stream = offload_stream(device)

    def run(
        self, block, last: bool, x: Tensor, added: Tensor | None, *rest
    ) -> tuple[Tensor, Tensor | None]:
        """Returns block(x, added, *rest). last: whether it is the model's last block."""
        if self.kind == "selective":
            return recompute_norms(block, x, added, *rest)
        # The sum is the block's input: one tensor is saved instead of two.
        if added is not None:
            x = x + added
        # The last block's backward comes first, right after the forward, so its input stays on the
        # GPU.
        if self.kind != "offload" or last:
            return checkpoint(block, x, None, *rest, use_reentrant=False)
        # `checkpoint` saves the block's input through these hooks.
        with saved_tensors_hooks(self.pack, self.unpack):
            return checkpoint(block, x, None, *rest, use_reentrant=False)

    def pack(self, x: Tensor) -> Tensor | OffloadedActivation:
        if x.numel() < MIN_OFFLOAD_NUMEL:
            return x
        activation = OffloadedActivation(x.detach(), self.stream)
        self.offloaded.append(activation)
        return activation

    def unpack(self, packed: Tensor | OffloadedActivation) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        x = packed.fetch()
        # The input of the block before is copied while the backward of this block runs.
        before = self.offloaded.index(packed) - 1
        if before >= 0:
            self.offloaded[before].prefetch()
        return x
