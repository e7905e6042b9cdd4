"""The paired bootstrap (Efron and Tibshirani 1993, chapters 13 and 16): how sure a difference is.

Two models are measured on the same items, so what is drawn, with replacement, are items, and the
difference between the models is computed anew for each draw. The interval runs between quantiles of
these differences (the percentile method). Items that are hard for both models are so in every draw:
a paired interval is narrower than the difference of two separate ones.
"""

import numpy as np

RESAMPLES = 10_000
CONFIDENCE = 0.95
# Numbers that are drawn at a time, so that memory does not grow with the items.
DRAWN_AT_ONCE = 1 << 22


def paired_interval(
    base: np.ndarray,
    tuned: np.ndarray,
    base_weights: np.ndarray | None = None,
    tuned_weights: np.ndarray | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Returns the 95 % confidence interval of a change: sum(tuned) / sum(tuned_weights) minus
    sum(base) / sum(base_weights).

    base, tuned: float [items], a number of each item, such as the sum of its token losses.
    base_weights, tuned_weights: float [items], how much it counts, such as its tokens; None: 1 each,
        so that the change is one of means.
    seed: of the draws.
    """
    count = len(base)
    ones = np.ones(count)
    columns = (
        np.asarray(base, float),
        ones if base_weights is None else np.asarray(base_weights, float),
        np.asarray(tuned, float),
        ones if tuned_weights is None else np.asarray(tuned_weights, float),
    )
    draws = np.random.default_rng(seed)
    rows = max(1, DRAWN_AT_ONCE // count)
    changes = []
    for start in range(0, resamples, rows):
        size = (min(rows, resamples - start), count)
        chosen = draws.integers(0, count, size)
        sums = [column[chosen].sum(1) for column in columns]
        changes.append(sums[2] / sums[3] - sums[0] / sums[1])
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(changes), [tail, 1 - tail])
    return float(low), float(high)
