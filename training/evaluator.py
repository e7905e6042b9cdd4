"""Validation before, during and after the training: what is best so far, and when to stop early.

The best is the lowest validation loss or, with --eval-metric, the highest score of the answers.

The loss of the untouched base is measured too, so that a run which makes the model worse says so.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import distributed
from common.errors import UserError, describe_os_error
from data import TrainingData
from model import Transformer, eager_mode
from objectives import PER_TOKEN, RunObjective
from training.answer_score import AnswerScorer
from training.defaults import Settings
from training.gauge import Gauge
from training.general_loss import GeneralLoss
from training.metrics import MetricsLogger
from training.signals import GracefulStop, ValidationInterrupted
from training.state import TrainState
from training.validation import validate, validation_loss
from training.validation_change import ValidationChange


class Evaluator:
    """Validates, keeps the best weights in best/, and counts for --patience.

    It has to be made before the weights of a checkpoint are loaded or a step is taken: the gauge and
    the loss on general data measure against the base.

    objective: of which the loss is that of the run.
    data: --val-limit takes a part of its validation examples.
    state: is told what the gauge and the general loss measure, for a resumed run to measure the same.
    device: where the run computes, which offloaded weights don't tell.
    save: writes the weights into a folder.
    scorer: lets the model answer, for --eval-metric.
    gauge: measures how far the model has moved from the base, which --forget-limit bounds.
    general: measures how far the loss on --forget-data has risen, which it bounds where there is such
        a file.
    """

    def __init__(
        self,
        settings: Settings,
        out: Path,
        model: Transformer,
        objective: RunObjective,
        data: TrainingData,
        metrics: MetricsLogger,
        state: TrainState,
        device: torch.device,
        save: Callable[[Path], None],
        scorer: AnswerScorer | None = None,
    ):
        self.settings = settings
        self.out = out
        self.model = model
        self.objective = objective
        self.data = data.validating_on(settings.val_limit)
        self.metrics = metrics
        self.device = device
        self.save = save
        self.scorer = scorer
        self.gauge = Gauge(settings, model, data.val, state, out, device)
        self.general = None
        if settings.forget_data:
            self.general = GeneralLoss(settings, model, data, state, device)
        self.change = ValidationChange(
            out, unit="nats a token" if settings.objective in PER_TOKEN else ""
        )
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
            what = "a new best"
            if self.scorer:
                what = f"a higher {self.scorer.heading}"
            self.metrics.bar.write(f"stopped   {count} validations without {what} (--patience)")
        return stop

    def validate(self, state: TrainState, stop: GracefulStop) -> None:
        """Computes the losses, writes them to metrics.jsonl and into the state, and keeps the best.

        Raises UserError if the loss is not finite, ValidationInterrupted at a signal.
        """
        val = self.data.val
        replay_val = self.data.replay_val
        max_tokens = self.settings.max_tokens
        sums: list[Tensor] = []
        with eager_mode(self.model):
            measured = validate(
                self.objective, self.model, val, self.device, max_tokens, stop, sums
            )
            replay_loss = None
            if replay_val:
                replay_loss = validation_loss(self.model, replay_val, self.device, max_tokens, stop)
        loss = measured.pop("loss")
        if not math.isfinite(loss):
            problem = f"the validation loss is {loss:g}"
            raise UserError(f"step {state.step}: {problem}; stopped, try a lower --lr")

        self.change.take(state.step, sums)
        line: dict[str, float | None] = {"step": state.step, "val_loss": loss}
        for name, value in measured.items():
            # JSON has no NaN: the mean of no example.
            line[f"val_{name}"] = value if math.isfinite(value) else None
        what = f"loss {loss:.4f}"
        if "reward" in measured:
            # The loss is minus that.
            what = f"reward {measured['reward']:.4f}"
        reported = ""
        if "accuracy" in measured:
            reported = f", accuracy {100 * measured['accuracy']:.1f} %"
        if "margin" in measured:
            reported += f", margin {measured['margin']:.3g}"
        replay = ""
        if replay_loss is not None:
            line["replay_val_loss"] = replay_loss
            replay = f", replay loss {replay_loss:.4f}"
        score = self.measure_score(state, line, stop)
        self.metrics.validated = ""
        general = self.measure_general(state, line, stop)
        distance = self.measure_distance(state, line)
        self.metrics.write(line)
        score_text = ""
        if self.scorer:
            score_text = f", {self.scorer.written(score)}"
            self.metrics.validated = score_text + self.metrics.validated
        self.metrics.bar.write(
            f"step {state.step:>5}: validation {what}{reported}{score_text}{replay}{general}"
            f"{distance}"
        )

        is_better = loss < state.best_val_loss
        # Many weights may have one score: of these, best/ are those of the lowest loss. But a run
        # whose score stays where it is has no more to learn, whatever its loss does.
        renews_patience = is_better
        if self.scorer:
            renews_patience = score > state.best_score
            is_better = renews_patience or (score == state.best_score and is_better)
        is_best = is_better and not state.over_forget_limit
        state.val_loss = loss
        state.validated_at = state.step
        if is_best:
            state.best_val_loss = loss
            state.best_kl_base = state.kl_base
            state.best_general_loss = state.general_loss
            state.best_score = score
        state.since_best = 0 if is_best and renews_patience else state.since_best + 1
        if state.step == 0:
            # These are the weights of the untouched base, which need no copy in best/.
            state.first_val_loss = loss
            state.first_score = score
        elif is_best:
            self.keep_best(state)

    def measure_score(
        self, state: TrainState, line: dict[str, float | None], stop: GracefulStop
    ) -> float:
        """Lets the model answer, if --eval-metric asks for it, and puts the score into the state and
        the line of metrics.jsonl. Returns it; 0 without."""
        if self.scorer is None:
            return 0.0
        score = self.scorer.measure(stop)
        state.score = score
        line[f"val_{self.settings.eval_metric}"] = score
        return score

    def measure_general(
        self, state: TrainState, line: dict[str, float | None], stop: GracefulStop
    ) -> str:
        """Measures the loss on --forget-data into the state and the line of metrics.jsonl. Returns
        what is printed of it, "" without such a file."""
        if self.general is None:
            return ""
        loss = state.first_general_loss
        if state.step:
            loss = self.general.measure(stop)
            is_lower = not loss >= state.lowest_general_loss
            state.lowest_general_loss = loss if is_lower else state.lowest_general_loss
        state.general_loss = loss
        rise = loss - state.first_general_loss
        # JSON has no NaN.
        line["general_loss"] = loss if math.isfinite(loss) else None
        line["general_loss_rise"] = rise if math.isfinite(rise) else None
        self.metrics.validated = f", general {rise:+.3f}"
        limit = self.settings.forget_limit
        state.over_forget_limit = limit is not None and not rise < limit
        return f", general loss {loss:.4f} ({rise:+.4f}{self.over(state)})"

    def measure_distance(self, state: TrainState, line: dict[str, float | None]) -> str:
        """Measures KL(base || tuned) into the state and the line of metrics.jsonl. Returns what is
        printed of it, "" where the gauge is off."""
        limit = self.settings.forget_limit
        is_limited = limit is not None and self.general is None
        distance = self.gauge.measure(state)
        if distance is None:
            if self.general is None:
                # Then no weights are known to be under the limit.
                state.over_forget_limit = is_limited
            return ""
        state.kl_base = distance
        # JSON has no NaN.
        line["kl_base"] = distance if math.isfinite(distance) else None
        self.metrics.validated += f", KL {distance:.3f}"
        if state.step:
            # min() would keep the NaN of a run that was not measured yet.
            is_lower = not distance >= state.lowest_kl_base
            state.lowest_kl_base = distance if is_lower else state.lowest_kl_base
        if self.general is not None:
            return f", KL to the base {distance:.4f}"
        state.over_forget_limit = is_limited and not distance < limit
        return f", KL to the base {distance:.4f}{self.over(state)}"

    def over(self, state: TrainState) -> str:
        """Returns a clause that says so where the model is not under --forget-limit, else ""."""
        if not state.over_forget_limit:
            return ""
        return f", not under --forget-limit {self.settings.forget_limit:g}"

    def keep_best(self, state: TrainState) -> None:
        """Writes best/. A disk that is full ends no training: it only prints a warning."""
        try:
            with distributed.extended_timeout():
                self.save(self.out / "best")
            state.has_best = True
        except OSError as error:
            older = "; the one before it stays" if state.has_best else ""
            why = describe_os_error(error, self.out)
            self.metrics.bar.write(
                f"WARNING   best/ was not written: {why}{older}; training goes on"
            )
