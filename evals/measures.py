"""A number that each prompt of a file has, such as whether its answer refuses, and what is said of them
together: their mean with its 95 % interval.
"""

from dataclasses import dataclass

import numpy as np

from evals.bootstrap import paired_interval
from evals.intervals import wilson_interval


@dataclass
class Measure:
    """One row of a table, for one model.

    values: float [prompts], of a prompt with several answers their mean.
    is_share: from 0 to 1, written in percent.
    lower_is_better: None where neither is.
    """

    name: str
    values: np.ndarray
    is_share: bool = True
    lower_is_better: bool | None = None

    @property
    def heading(self) -> str:
        return f"{self.name} %" if self.is_share else self.name

    @property
    def number_format(self) -> str:
        return ".1f" if self.is_share else ".3f"

    @property
    def shown_values(self) -> np.ndarray:
        """The values as they are written: in percent where they are shares."""
        return 100 * self.values if self.is_share else self.values

    @property
    def is_binary(self) -> bool:
        """True if every value is 0 or 1."""
        return set(self.values.tolist()) <= {0.0, 1.0}

    def interval(self, seed: int) -> tuple[float, float]:
        """Returns the 95 % interval of the mean, as it is written: Wilson's where every value is 0 or
        1, else that of the bootstrap. seed: of its draws."""
        if self.is_binary:
            low, high = wilson_interval(float(self.values.sum()), len(self.values))
            return (100 * low, 100 * high) if self.is_share else (low, high)
        return paired_interval(np.zeros(len(self.values)), self.shown_values, seed=seed)

    def cells(self, seed: int) -> list[str]:
        """Returns the row of a table of one model: name, prompts, mean, interval."""
        spec = self.number_format
        low, high = self.interval(seed)
        mean = format(float(self.shown_values.mean()), spec)
        return [self.heading, f"{len(self.values):,}", mean, f"{low:{spec}} to {high:{spec}}"]
