"""The loss of a model on a dataset: how probable it finds the right answers.

The loss is the mean of -log p over the trained tokens, in nats, and the perplexity is its
exponential. Each token is predicted from the right tokens before it, so nothing is generated. The
result depends on the model and the file alone: another batch size changes it by rounding only.
"""

import math
from collections.abc import Iterable, Iterator

import data
import objectives
from common.progress import Progress, progress
from dataset.examples import Dataset
from model import Transformer, eval_mode

# The exponential of 710 is beyond a float.
LARGEST_EXPONENT = 700


def loss(model: Transformer, dataset: Dataset, batch_size: int = 8) -> dict[str, float]:
    """Computes the loss of a model on a dataset. Dropout is off while it runs.

    batch_size: examples that are computed at a time.
    Returns "loss" (nats per trained token), "perplexity" (its exponential, infinite where a float
    can't hold it) and "tokens" (the number of trained tokens).
    """
    batches = data.batches_by_length(dataset, batch_size, model.device)
    bar = progress("reading", dataset.tokens, "token")
    with bar, eval_mode(model):
        value = objectives.mean_loss(model, counted(batches, bar))
    perplexity = math.exp(value) if value < LARGEST_EXPONENT else math.inf
    return {"loss": value, "perplexity": perplexity, "tokens": dataset.trained_tokens}


def counted(batches: Iterable[data.Batch], bar: Progress) -> Iterator[data.Batch]:
    """Yields the batches, and moves the bar by the tokens of each that is done."""
    for batch in batches:
        yield batch
        bar.update(batch.num_tokens)
