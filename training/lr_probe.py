"""--lr auto: a learning rate from what is known of the run, refined by short trainings on its own data.

The first guess follows from method, hidden size, alpha and batch (`auto_factor`). Then the run's first
steps are trained several times, each time from the same weights and with a whole schedule of their own, at
rates a factor of RATIO apart, until one is better than both of its neighbours; the rate is where a parabola
through the three losses (over the rate's logarithm) is lowest.

In fine-tuning, the best rate of the first eighth of the steps is about that of all of them: docs/sweeps.md
has a table of what the result costs against a sweep's best. Where a model is trained from scratch it is not:
there a short training wants a higher rate.

Nothing is left of the probes: weights and random numbers are put back, so that the run is to the bit the
one of which --lr was typed.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import distributed
from common.choices import AUTO
from common.console import number_of
from common.errors import UserError
from common.progress import progress
from data import MicroBatches, TrainingData
from dataset.encoding import AS_PROMPTS
from flags import Flags
from methods import lr_factors
from model import Transformer, eager_mode
from objectives import RunObjective, kind_of_examples
from optimizers import make_optimizers
from training.defaults import Settings
from training.reference import is_under_adapter, needs_reference
from training.validation import validate

# A probe takes this share of the run's steps, and at least and at most so many.
PROBE_SHARE = 1 / 8
LEAST_PROBE_STEPS, MOST_PROBE_STEPS = 8, 50
# Between two rates that are tried.
RATIO = 2.5
# No more rates than that are tried, whatever they say.
MOST_PROBES = 7
# A probe validates on as many examples as it trains on, and on at least so many.
LEAST_EXAMPLES = 32
# Nats a token: a rise of the loss beyond which all are alike.
LARGE = 1e6

# Trains all steps of some settings: train.py's loop, without validations and checkpoints.
TrainSteps = Callable[[Settings, list, MicroBatches], None]


class Probe(NamedTuple):
    """A short training. loss: on validation examples after it; infinite if it is no number."""

    lr: float
    loss: float


def check_lr_auto(flags: Flags) -> None:
    """Raises UserError where --lr auto has nothing to compare by, or where a probe would not be what the
    run is."""
    if flags.lr != AUTO:
        return
    if kind_of_examples(flags) == AS_PROMPTS:
        raise UserError(
            "--lr auto: not where the model writes answers in each step, a probe would take as long as the run;"
            " python sweep.py compares whole runs"
        )
    if flags.ewc:
        raise UserError("--lr auto: is not for --ewc, whose penalty a few steps hardly feel")
    if flags.val_fraction == 0:
        raise UserError("--lr auto: compares validation losses, and --val-fraction 0 has none")


def choose_lr(
    settings: Settings,
    model: Transformer,
    objective: RunObjective,
    data: TrainingData,
    loader: MicroBatches,
    train_steps: TrainSteps,
) -> Settings:
    """Returns the settings with the rate that the probes say, and prints how it was found.

    settings: their rate is the first guess.
    loader: of the run, whose sampler stays where it is.
    Raises UserError where nothing validates, or where no rate trains.
    """
    if not len(data.val):
        raise UserError(
            "--lr auto: compares validation losses, and nothing validates; give --val FILE"
        )
    if needs_reference(settings) and not is_under_adapter(settings, model):
        raise UserError(
            "--lr auto: the objective compares with the model before step 1, which is computed later than the"
            " rate is chosen, where no adapter can be switched off; give --lr"
        )
    steps = probe_steps(settings.steps)
    probing = ProbingRun(settings, model, objective, data, loader, train_steps, steps)
    with progress("trying rates", None, "step", shown=distributed.is_rank0()) as bar:

        def probe(lr: float) -> float:
            loss = probing.loss_after(lr)
            bar.update(steps)
            bar.set_postfix_str(f"rate {lr:.1e}: validation loss {loss:.4f}")
            return loss

        probes = bracket_best(probe, settings.lr)
    tried = ", ".join(f"{each.lr:.1e}: {each.loss:.4f}" for each in probes)
    if not any(math.isfinite(each.loss) for each in probes):
        raise UserError(f"--lr auto: no rate trains, all losses are infinite ({tried}); give --lr")
    # Two digits, so that what is printed and typed again is the rate to the bit.
    lr = float(f"{lowest_of_parabola(probes):.1e}")
    print(
        f"lr auto   --lr {lr:g}, from {settings.lr:g} (by method, size and batch) and {len(probes)} trainings of"
        f" {number_of(steps, 'step')}: validation loss by rate {tried}"
    )
    return dataclasses.replace(settings, lr=lr)


def probe_steps(steps: int) -> int:
    """Returns how many steps a probe of a run trains."""
    wanted = min(max(round(PROBE_SHARE * steps), LEAST_PROBE_STEPS), MOST_PROBE_STEPS)
    return min(wanted, math.ceil(steps / 2))


def bracket_best(probe: Callable[[float], float], first: float) -> list[Probe]:
    """Tries rates a factor of RATIO apart until the best one has a worse one on either side, or MOST_PROBES
    are tried. Returns them by rate.

    probe: returns the loss at a rate, infinite where it is no number.
    first: the rate to begin at.
    """
    losses = {0: probe(first)}

    def loss_at(place: int) -> float:
        """place: how many factors of RATIO above the first rate."""
        if place not in losses:
            losses[place] = probe(first * RATIO**place)
        return losses[place]

    best = 0
    while len(losses) < MOST_PROBES:
        # A higher rate first: the guess errs on the low side more often.
        neighbours = [place for place in (best + 1, best - 1) if place not in losses]
        if not neighbours:
            break
        if loss_at(neighbours[0]) < losses[best]:
            best = neighbours[0]
    return [Probe(first * RATIO**place, losses[place]) for place in sorted(losses)]


def lowest_of_parabola(probes: list[Probe]) -> float:
    """Returns the rate at which a parabola through the best probe and its neighbours is lowest; the best
    probe's own rate where it has no neighbour on one side.

    It is never further from the best probe than halfway to a neighbour, which is where it is beside a
    neighbour that has diverged.
    """
    place = min(range(len(probes)), key=lambda i: probes[i].loss)
    if place in (0, len(probes) - 1):
        return probes[place].lr
    below, best, above = probes[place - 1 : place + 2]
    # Capped, since of a rate that diverges the loss may be infinite.
    rise_below = min(below.loss - best.loss, LARGE)
    rise_above = min(above.loss - best.loss, LARGE)
    if rise_below + rise_above == 0:
        return best.lr
    # Of the parabola through (-1, rise_below), (0, 0) and (1, rise_above).
    vertex = 0.5 * (rise_below - rise_above) / (rise_below + rise_above)
    return best.lr * RATIO**vertex


class ProbingRun:
    """Trains the first steps of a run, any number of times, and leaves no trace.

    steps: of each training.
    """

    def __init__(
        self,
        settings: Settings,
        model: Transformer,
        objective: RunObjective,
        data: TrainingData,
        loader: MicroBatches,
        train_steps: TrainSteps,
        steps: int,
    ):
        # A step of warm-up at least, where the run has some: the first step is the roughest.
        warmup = min(settings.warmup, max(1, round(settings.warmup * steps / settings.steps)))
        self.settings = dataclasses.replace(settings, steps=steps, warmup=warmup)
        self.model = model
        self.objective = objective
        self.loader = loader
        self.train_steps = train_steps
        trained = steps * settings.batch_size * settings.accumulate * distributed.dp_size()
        limit = max(LEAST_EXAMPLES, trained)
        if settings.val_limit:
            limit = min(limit, settings.val_limit)
        self.val = data.validating_on(limit).val
        # On the host: a copy beside the weights might be what a GPU has no room for.
        self.start = [distributed.to_local(p.detach()).cpu().clone() for p in self.parameters()]

    def parameters(self) -> list[Tensor]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def loss_after(self, lr: float) -> float:
        """Returns the validation loss after the steps at a rate; infinite if it is no number."""
        settings = dataclasses.replace(self.settings, lr=lr)
        loader = self.loader.from_here()
        is_training = self.model.training
        device = self.loader.device
        devices = [device] if device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices):
                optimizers = make_optimizers(
                    self.model, settings.optimizer, lr, settings.weight_decay, settings.optimizer_offload,
                    lr_factors(settings),
                )  # fmt: skip
                self.train_steps(settings, optimizers, loader)
                with eager_mode(self.model):
                    measured = validate(
                        self.objective, self.model, self.val, device, settings.max_tokens
                    )
        finally:
            self.put_back()
            self.model.train(is_training)
        loss = measured["loss"]
        return loss if math.isfinite(loss) else math.inf

    @torch.no_grad()
    def put_back(self) -> None:
        """Gives the weights the values of before."""
        for p, value in zip(self.parameters(), self.start, strict=True):
            distributed.to_local(p).copy_(value)
            p.grad = None
