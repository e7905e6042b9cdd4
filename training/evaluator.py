"""Validation before, during and after the training: what is best so far, and when to stop early.

The loss of the untouched base is measured too, so that a run which makes the model worse says so.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

import distributed
from common.errors import UserError, describe_os_error
from common.progress import progress
from data import Batch, TrainingData, batches_by_length
from dataset.examples import Dataset
from model import Transformer, eval_mode
from objectives import mean_loss
from training.defaults import Settings
from training.metrics import MetricsLogger
from training.signals import GracefulStop
from training.state import TrainState

VALIDATION_BATCH = 8  # examples


class Evaluator:
    """Computes the validation loss, keeps the best weights in best/, and counts for --patience.

    device: where the run computes, which offloaded weights don't tell.
    save_best: writes the model to best/.
    """

    def __init__(
        self,
        settings: Settings,
        out: Path,
        model: Transformer,
        data: TrainingData,
        metrics: MetricsLogger,
        device: torch.device,
        save_best: Callable[[], None],
    ):
        self.settings = settings
        self.out = out
        self.model = model
        self.data = data
        self.metrics = metrics
        self.device = device
        self.save_best = save_best
        self.was_interrupted = False

    def due(self, state: TrainState) -> bool:
        """True every --eval-every steps, also before the first one; and at the end in any case."""
        if state.step == self.settings.steps:
            return True
        every = self.settings.eval_every
        return bool(every) and state.step % every == 0

    def run(self, state: TrainState, stop: GracefulStop) -> bool:
        """Validates after `state.step` steps. True if early stopping is due (--patience).

        A signal ends it at once: then `was_interrupted` is True, and a run that goes on from here
        validates first.
        """
        if not len(self.data.val):
            return False
        try:
            with self.metrics.paused():
                self.validate(state, stop)
        except ValidationInterrupted:
            self.was_interrupted = True
            return False
        out_of_patience = 0 < self.settings.patience <= state.since_best
        stop = out_of_patience and state.step < self.settings.steps
        if stop:
            count = state.since_best
            self.metrics.bar.write(f"stopped   {count} validations without a new best (--patience)")
        return stop

    def validate(self, state: TrainState, stop: GracefulStop) -> None:
        """Computes the losses, writes them to metrics.jsonl and into the state, and keeps the best.

        Raises UserError if the loss is not finite, ValidationInterrupted at a signal.
        """
        val = self.data.val
        replay_val = self.data.replay_val
        max_tokens = self.settings.max_tokens
        with eager_mode(self.settings):
            loss = validation_loss(self.model, val, self.device, max_tokens, stop)
            replay_loss = None
            if replay_val:
                replay_loss = validation_loss(self.model, replay_val, self.device, max_tokens, stop)
        if not math.isfinite(loss):
            problem = f"the validation loss is {loss:g}"
            raise UserError(f"step {state.step}: {problem}; stopped, try a lower --lr")

        line: dict[str, float] = {"step": state.step, "val_loss": loss}
        replay = ""
        if replay_loss is not None:
            line["replay_val_loss"] = replay_loss
            replay = f", replay loss {replay_loss:.4f}"
        self.metrics.write(line)
        self.metrics.bar.write(f"step {state.step:>5}: validation loss {loss:.4f}{replay}")

        is_best = loss < state.best_val_loss
        state.val_loss = loss
        state.validated_at = state.step
        state.best_val_loss = min(state.best_val_loss, loss)
        state.since_best = 0 if is_best else state.since_best + 1
        if state.step == 0:
            # These are the weights of the untouched base, which need no copy in best/.
            state.first_val_loss = loss
        elif is_best:
            self.keep_best(state)

    def keep_best(self, state: TrainState) -> None:
        """Writes best/. A disk that is full ends no training: it only prints a warning."""
        try:
            with distributed.extended_timeout():
                self.save_best()
            state.has_best = True
        except OSError as error:
            older = "; the one before it stays" if state.has_best else ""
            why = describe_os_error(error, self.out)
            self.metrics.bar.write(
                f"WARNING   best/ was not written: {why}{older}; training goes on"
            )


def best_or_final(state: TrainState) -> str:
    """Returns which of best/ and final/ is to be used. Says so where the end is not the best."""
    before = f"{state.first_val_loss:.4f}"
    best = f"{state.best_val_loss:.4f}"
    if state.first_val_loss <= state.best_val_loss:
        remark = f"no validation was better than the {before} before training"
        print(f"WARNING   {remark}; try a lower --lr")
    if state.has_best and state.best_val_loss < state.val_loss:
        print(f"          best/ has validation loss {best}, final/ {state.val_loss:.4f}")
        return "best"
    return "final"


def eager_mode(settings: Settings) -> contextlib.AbstractContextManager:
    """Returns a context in which blocks are not compiled: for work whose graphs would not pay, or
    whose shapes would each be compiled."""
    if settings.compile == "on":
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


class ValidationInterrupted(Exception):
    """A signal came during a validation, to this rank or another."""


def validation_loss(
    model: Transformer,
    val: Dataset,
    device: torch.device,
    max_tokens: int | None = None,
    stop: GracefulStop | None = None,
) -> float:
    """Returns the loss per trained token, over all ranks.

    max_tokens: the most of a batch.
    Raises ValidationInterrupted on all ranks soon after a signal has reached one.
    """
    batches = batches_by_length(
        val,
        VALIDATION_BATCH,
        device,
        distributed.dp_size(),
        distributed.dp_rank(),
        distributed.context_parallel,
        max_tokens,
    )
    with eval_mode(model):
        try:
            loss = mean_loss(model, until_signal(batches, val.tokens, stop))
        finally:
            if distributed.has_shards(model):
                # What is around the blocks stays gathered for a backward, which does not come here.
                model.reshard()
    return loss


def until_signal(
    batches: Iterable[Batch], num_tokens: int, stop: GracefulStop | None
) -> Iterator[Batch]:
    """Yields the batches of a validation, and shows its progress. num_tokens: of all ranks.

    Raises ValidationInterrupted, on all ranks at the same batch, once one has a signal.
    """
    bar = progress("validating", num_tokens, "token", shown=distributed.is_rank0())
    with bar:
        for batch in batches:
            if stop and not distributed.all_ranks_agree(not stop.signal):
                raise ValidationInterrupted
            yield batch
            bar.update(batch.num_tokens * distributed.world_size())
