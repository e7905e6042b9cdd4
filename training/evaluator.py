"""Validation before, during and after the training: what is best so far, and when to stop early.

The loss of the untouched base is measured too, so that a run which makes the model worse says so.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

import distributed
from common.errors import UserError, describe_os_error
from common.progress import progress
from data import Batch, TrainingData, batches_by_length
from dataset.examples import Dataset
from model import Transformer, eager_mode, eval_mode
from objectives import mean_loss
from training.defaults import Settings
from training.gauge import Gauge
from training.metrics import MetricsLogger
from training.signals import GracefulStop
from training.state import TrainState

VALIDATION_BATCH = 8  # examples


class Evaluator:
    """Computes the validation loss, keeps the best weights in best/, and counts for --patience.

    device: where the run computes, which offloaded weights don't tell.
    save_best: writes the model to best/.
    gauge: measures how far the model has moved from the base, which --forget-limit bounds.
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
        gauge: Gauge,
    ):
        self.settings = settings
        self.out = out
        self.model = model
        self.data = data
        self.metrics = metrics
        self.device = device
        self.save_best = save_best
        self.gauge = gauge
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
        with eager_mode(self.model):
            loss = validation_loss(self.model, val, self.device, max_tokens, stop)
            replay_loss = None
            if replay_val:
                replay_loss = validation_loss(self.model, replay_val, self.device, max_tokens, stop)
        if not math.isfinite(loss):
            problem = f"the validation loss is {loss:g}"
            raise UserError(f"step {state.step}: {problem}; stopped, try a lower --lr")

        line: dict[str, float | None] = {"step": state.step, "val_loss": loss}
        replay = ""
        if replay_loss is not None:
            line["replay_val_loss"] = replay_loss
            replay = f", replay loss {replay_loss:.4f}"
        distance = self.measure_distance(state, line)
        self.metrics.write(line)
        self.metrics.bar.write(
            f"step {state.step:>5}: validation loss {loss:.4f}{replay}{distance}"
        )

        is_best = loss < state.best_val_loss and not state.over_forget_limit
        state.val_loss = loss
        state.validated_at = state.step
        if is_best:
            state.best_val_loss = loss
            state.best_kl_base = state.kl_base
        state.since_best = 0 if is_best else state.since_best + 1
        if state.step == 0:
            # These are the weights of the untouched base, which need no copy in best/.
            state.first_val_loss = loss
        elif is_best:
            self.keep_best(state)

    def measure_distance(self, state: TrainState, line: dict[str, float | None]) -> str:
        """Measures KL(base || tuned) into the state and the line of metrics.jsonl. Returns what is
        printed of it, "" where the gauge is off."""
        limit = self.settings.forget_limit
        distance = self.gauge.measure(state)
        if distance is None:
            # Then no weights are known to be under the limit.
            state.over_forget_limit = limit is not None
            return ""
        state.kl_base = distance
        # JSON has no NaN.
        line["kl_base"] = distance if math.isfinite(distance) else None
        self.metrics.distance = f", KL {distance:.3f}"
        if state.step:
            # min() would keep the NaN of a run that was not measured yet.
            is_lower = not distance >= state.lowest_kl_base
            state.lowest_kl_base = distance if is_lower else state.lowest_kl_base
        state.over_forget_limit = limit is not None and not distance < limit
        over = f", not under --forget-limit {limit:g}" if state.over_forget_limit else ""
        return f", KL to the base {distance:.4f}{over}"

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


def best_or_final(state: TrainState, forget_limit: float | None = None) -> str:
    """Returns which of best/ and final/ is to be used. Says so where the end is not the best, or has
    forgotten more than forget_limit (--forget-limit) allows."""
    if forget_limit is not None and not state.has_best:
        print(f"WARNING   {why_none_is_kept(state, forget_limit)}")
        return "final"
    before = f"{state.first_val_loss:.4f}"
    best = f"{state.best_val_loss:.4f}"
    if state.first_val_loss <= state.best_val_loss:
        remark = f"no validation was better than the {before} before training"
        print(f"WARNING   {remark}; try a lower --lr")
    if state.has_best and state.over_forget_limit:
        print(
            f"          best/ is the best under --forget-limit {forget_limit:g}: validation loss"
            f" {best}, KL to the base {state.best_kl_base:.4f} nats a token; final/"
            f" {state.val_loss:.4f} and {state.kl_base:.4f}"
        )
        return "best"
    if state.has_best and state.best_val_loss < state.val_loss:
        print(f"          best/ has validation loss {best}, final/ {state.val_loss:.4f}")
        return "best"
    return "final"


def why_none_is_kept(state: TrainState, forget_limit: float) -> str:
    """Returns why there is no best/ with --forget-limit."""
    if math.isnan(state.lowest_kl_base):
        return "--forget-limit: KL(base || tuned) was not measured, so there is no best/"
    if state.lowest_kl_base < forget_limit:
        return (
            f"no validation under --forget-limit {forget_limit:g} was better than the"
            f" {state.first_val_loss:.4f} before training, so there is no best/"
        )
    return (
        f"no validation was under --forget-limit {forget_limit:g}, so there is no best/: the lowest KL"
        f" to the base was {state.lowest_kl_base:.4f} nats a token; try a lower --lr, fewer steps,"
        " or --replay"
    )


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
