"""Validation before, during and after the training: what is best so far, and when to stop early."""

import contextlib
import math
from collections.abc import Callable
from pathlib import Path

import torch

import distributed
from common.errors import UserError, describe_os_error
from data import TrainingData, batches_by_length
from dataset.examples import Dataset
from model import Transformer, eval_mode
from objectives import mean_loss
from training.defaults import Settings
from training.metrics import MetricsLogger
from training.state import TrainState

VALIDATION_BATCH = 8  # examples


class Evaluator:
    """Computes the validation loss where it is due, keeps the best weights in best/, and counts for --patience.

    device: where the run computes, which offloaded weights don't tell. save_best: writes the model to best/.
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
        self.settings, self.out, self.model, self.data = settings, out, model, data
        self.metrics, self.device = metrics, device
        self.save_best = save_best

    def due(self, state: TrainState) -> bool:
        every = self.settings.eval_every
        return state.step == self.settings.steps or bool(every) and state.step % every == 0

    def run(self, state: TrainState) -> bool:
        """Validates after `state.step` steps. True if early stopping is due (--patience)."""
        if not len(self.data.val):
            return False
        with self.metrics.paused():
            self.validate(state)
        out_of_patience = 0 < self.settings.patience <= state.since_best
        stop = out_of_patience and state.step < self.settings.steps
        if stop:
            self.metrics.bar.write(
                f"stopped   {state.since_best} validations without a new best (--patience)"
            )
        return stop

    def validate(self, state: TrainState) -> None:
        val, replay_val, max_tokens = self.data.val, self.data.replay_val, self.settings.max_tokens
        with eager_mode(self.settings):
            loss = validation_loss(self.model, val, self.device, max_tokens)
            replay_loss = None
            if replay_val:
                replay_loss = validation_loss(self.model, replay_val, self.device, max_tokens)
        if not math.isfinite(loss):
            raise UserError(
                f"step {state.step}: the validation loss is {loss:g}; stopped, try a lower --lr"
            )
        line = {"step": state.step, "val_loss": loss}
        replay = ""
        if replay_loss is not None:
            line["replay_val_loss"] = replay_loss
            replay = f", replay loss {replay_loss:.4f}"
        self.metrics.write(line)
        self.metrics.bar.write(f"step {state.step:>5}: validation loss {loss:.4f}{replay}")
        is_best = loss < state.best_val_loss
        state.val_loss, state.validated_at = loss, state.step
        state.best_val_loss = min(state.best_val_loss, loss)
        state.since_best = 0 if is_best else state.since_best + 1
        if state.step == 0:
            state.first_val_loss = loss  # of the untouched base: nothing to keep
        elif is_best:
            self.keep_best(state)

    def keep_best(self, state: TrainState) -> None:
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
    """Which of best/ and final/ is the one to use; prints why where the end is not the best of the run."""
    if state.first_val_loss <= state.best_val_loss:
        before = f"{state.first_val_loss:.4f}"
        print(
            f"WARNING   no validation was better than the {before} before training; try a lower --lr"
        )
    if not (state.has_best and state.best_val_loss < state.val_loss):
        return "final"
    print(
        f"          best/ has validation loss {state.best_val_loss:.4f}, final/ {state.val_loss:.4f}"
    )
    return "best"


def eager_mode(settings: Settings):
    """Without compiled blocks: for work whose graphs would not pay, or whose shapes would each be compiled."""
    return (
        torch.compiler.set_stance("force_eager")
        if settings.compile == "on"
        else contextlib.nullcontext()
    )


def validation_loss(
    model: Transformer, val: Dataset, device: torch.device, max_tokens: int | None = None
) -> float:
    """The loss per trained token, over all ranks. max_tokens: of a batch."""
    ranks = distributed.dp_size(), distributed.dp_rank(), distributed.context_parallel
    with eval_mode(model):
        loss = mean_loss(
            model, batches_by_length(val, VALIDATION_BATCH, device, *ranks, max_tokens)
        )
    if distributed.has_shards(model):
        model.reshard()  # what is around the blocks waits for a backward, which does not come
    return loss
