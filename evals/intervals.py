"""How sure a share is."""

import math

Z95 = 1.959963984540054  # the 97.5 % quantile of the normal distribution


def wilson_interval(total: float, count: int) -> tuple[float, float]:
    """Returns the 95 % confidence interval of a share, `total` of `count` (Wilson 1927).

    Unlike the interval of a normal distribution around the share itself, it is no point where all
    or none are right.

    total: the sum of `count` numbers from 0 to 1. Where some are between, as halves are, they vary
        less than 0 and 1 do, and the interval is wider than it need be.
    """
    share = total / count
    center = (share + Z95**2 / (2 * count)) / (1 + Z95**2 / count)
    variance = share * (1 - share) / count + Z95**2 / (4 * count**2)
    half = Z95 * math.sqrt(variance) / (1 + Z95**2 / count)
    return max(0.0, center - half), min(1.0, center + half)
