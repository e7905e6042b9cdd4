"""Times this run's own work on this machine before it says how long it will take.

A rate computed from operations misses by a third or more: what a step reaches of a product's rate
depends on the dtype, the widths of the model, the lengths of the examples and the machine's memory.
So a micro-batch goes forward and backward twice, the first time to warm up; its gradients are
thrown away, and nothing that trains is changed. Attention makes a token of a long example dearer
than one of a short example, so its examples are about as long as one that costs the mean.
"""

import dataclasses
import time
from typing import NamedTuple

import numpy as np
import torch

import distributed
from data import Batch, MicroBatches, TrainingData, needs_seeds
from model import Transformer
from objectives import Losses, RunObjective, StepTotals
from training.defaults import Settings

# A micro-batch that is expected to take longer is timed by some of its examples.
TRIAL_SECONDS = 4.0
# The trial's examples are chosen among those of so many steps.
TRIAL_STEPS = 16
# Bytes that a step moves for each trained weight in fp32: AdamW reads weight, gradient and two
# moments and writes all but the gradient; clipping reads and writes the gradient once more.
OPTIMIZER_BYTES = 40


class Pace(NamedTuple):
    """What training takes on this machine. seconds_per_step: of the optimizer."""

    seconds_per_token: float
    seconds_per_step: float

    def expected(self, settings: Settings) -> Settings:
        """Returns the settings with `expected_seconds` of their steps and validations."""
        tokens_take = settings.workload.tokens * self.seconds_per_token
        seconds = tokens_take + settings.steps * self.seconds_per_step
        return dataclasses.replace(settings, expected_seconds=seconds)


def measure_pace(
    settings: Settings,
    model: Transformer,
    objective: RunObjective,
    data: TrainingData,
    device: torch.device,
) -> Pace:
    """Returns the pace of this run, by a trial on its own data."""
    expected_pace = settings.expected_seconds / settings.workload.tokens
    if distributed.world_size() > 1:
        # Several ranks keep the time that was computed from operations: in a trial of theirs every
        # collective would have to match.
        return Pace(expected_pace, 0.0)
    # A copy of the sampler, since a step moves its position.
    sampler = dataclasses.replace(data.sampler)
    loader = MicroBatches(
        data.train, sampler, device, settings.batch_size, settings.accumulate, settings.max_tokens,
        settings.seed, seeded=needs_seeds(settings),
    )  # fmt: skip
    if settings.compile == "on":
        # The trial would be of blocks that are not compiled.
        return Pace(expected_pace, 0.0)
    model.train()
    try:
        most = TRIAL_SECONDS / expected_pace
        lengths = np.asarray(settings.workload.all_lengths, dtype=np.float64)
        batch = trial_batch(loader, settings.steps, lengths, most)
        batch = objective.trial_batch(batch)
        seconds_per_token = time_micro_batch(batch, model, objective, device)
    except torch.cuda.OutOfMemoryError:
        # The first step will run out of memory too, and say what would have taken less.
        model.zero_grad(set_to_none=True)
        return Pace(expected_pace, 0.0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    seconds_per_step = 0.0
    if not settings.optimizer_offload:
        seconds_per_step = trained * OPTIMIZER_BYTES / memory_bandwidth(device)
    return Pace(seconds_per_token, seconds_per_step)


def time_micro_batch(
    batch: Batch, model: Transformer, objective: RunObjective, device: torch.device
) -> float:
    """Returns the seconds that a token takes, forward and backward, the second time."""
    for _ in range(2):
        start = time.perf_counter()
        losses = Losses(device)
        objective(model, batch, StepTotals.of([batch]), losses).backward()
        # Reading the loss waits for a GPU.
        float(losses.loss)
        seconds = time.perf_counter() - start
        model.zero_grad(set_to_none=True)
    return seconds / batch.num_tokens


def trial_batch(loader: MicroBatches, num_steps: int, lengths: np.ndarray, most: float) -> Batch:
    """Returns a micro-batch for the trial: as many tokens as the first one of the run has, and at
    most about `most`, in examples of the first steps; at least one example.

    num_steps: of the run. lengths: those of all examples, in tokens.
    """
    micro_batches: list[list] = []
    for step in range(min(TRIAL_STEPS, num_steps)):
        micro_batches += loader.examples_of_step(step)
    examples = [example for micro_batch in micro_batches for example in micro_batch]
    most = min(most, sum(len(example.ids) for example in micro_batches[0]))
    # An example of n tokens takes a n + b n^2, of which b n^2 is attention, so a token a + b n. The
    # mean of that over all tokens is a + b typical.
    typical = np.square(lengths).sum() / lengths.sum()
    examples.sort(key=lambda example: abs(len(example.ids) - typical))
    chosen = examples[:1]
    num_tokens = len(chosen[0].ids)
    for example in examples[1:]:
        num_tokens += len(example.ids)
        if num_tokens > most:
            break
        chosen.append(example)
    return loader.collate(chosen)


def memory_bandwidth(device: torch.device) -> float:
    """Returns the bytes a second that an elementwise operation on large tensors moves."""
    x = torch.ones(1 << 24, device=device)
    y = torch.ones_like(x)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        x.add_(y)
        # Reading a number waits for a GPU.
        float(x[0])
        times.append(time.perf_counter() - start)
    # x and y are read, and x is written.
    return 3 * x.nbytes / min(times)
