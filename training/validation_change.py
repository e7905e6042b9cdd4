"""How sure the change of the validation loss is: the losses of each validation example before step 1 and
at the end, and the paired bootstrap over them (evals/bootstrap.py).

They come with the validations that a run makes anyway. Those of step 0 stand in the run's folder, for a run
that is resumed.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import distributed
from common.files import atomic_file, save_tensors
from evals.bootstrap import paired_interval
from evals.compare import Change

CHANGE_FILE = "validation.safetensors"


class ValidationChange:
    """Keeps the losses of the first validation and of the newest.

    out: the run's folder.
    unit: of the loss; "" for none.
    """

    def __init__(self, out: Path, unit: str = "nats a token"):
        self.title = f"validation loss, {unit}" if unit else "validation loss"
        self.file = out / CHANGE_FILE
        self.first: Tensor | None = None
        self.newest: Tensor | None = None

    def take(self, step: int, sums: Sequence[Tensor]) -> None:
        """Takes what `validation_loss` gave of each batch. All ranks must call it.

        step: after which it was. sums: float32 [2, examples] each.
        """
        if not sums:
            return
        mine = [each.cpu() for each in sums]
        # Rank r of n has batches r, n + r, ...: so the examples stand in one order, however many ranks
        # there are when a run is resumed.
        batches = [
            each for several in zip(*distributed.all_gather_object(mine)) for each in several
        ]
        losses = torch.cat(batches, 1).double()
        # What fills up the ranks' batches has no weight, nor have examples without a trained token.
        losses = losses[:, losses[1] > 0].contiguous()
        if step:
            self.newest = losses
            return
        self.first = losses
        if distributed.is_rank0():
            # A disk that is full costs the interval of a resumed run, and no more.
            with contextlib.suppress(OSError), atomic_file(self.file) as tmp:
                save_tensors({"losses": losses}, tmp)

    def change(self) -> Change | None:
        """Returns the change of the validation loss from before step 1 to the newest validation; None
        where one of them was not made on the same examples."""
        if self.first is None:
            with contextlib.suppress(OSError, SafetensorError, KeyError):
                self.first = load_file(self.file)["losses"]
        first, newest = self.first, self.newest
        if first is None or newest is None or first.shape != newest.shape:
            return None
        (base, base_weights), (tuned, tuned_weights) = first.numpy(), newest.numpy()
        interval = paired_interval(base, tuned, base_weights, tuned_weights)
        means = (float(base.sum() / base_weights.sum()), float(tuned.sum() / tuned_weights.sum()))
        return Change(
            self.title,
            len(base),
            *means,
            interval,
            ".4f",
            lower_is_better=True,
        )
