"""Which trials a sweep runs: a grid, drawn ones, successive halving, or Optuna's choice.

Trial n of a sweep is the same each time it is asked for, so that a sweep which was interrupted goes on with
the same trials; what Optuna chose is kept in a file.

Successive halving: Jamieson and Talwalkar 2016, "Non-stochastic best arm identification and hyperparameter
optimization". Each rung trains its runs from the beginning, so that every one of them has a whole schedule
of its own and is what its command gives; continuing the shorter ones would save a third and give runs that no
command repeats.
"""

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from common.errors import UserError, read_json
from common.files import atomic_file, write_json
from training.sweep_results import Result, rows_of_trials
from training.sweep_words import (
    REDUCTION,
    Range,
    Sweep,
    num_rungs,
    number_word,
    share_of_rung,
    takes_whole_numbers,
)

# Draws of a combination that no other trial has, before fewer are taken.
MOST_DRAWS = 1000


class Trial(NamedTuple):
    """A combination of values. number: from 1. rung: in successive halving, from 0; else None.
    share: of a whole run's steps."""

    number: int
    values: dict[str, str]
    rung: int | None = None
    share: float = 1.0


class Search:
    """The trials of a sweep.

    has_rungs: whether it is successive halving.
    total_cost: of all runs: their number, or in halving the shortest runs that would take as long.
    """

    def __init__(self, sweep: Sweep):
        self.sweep = sweep
        self.has_rungs = sweep.search == "halving"
        self.rungs = num_rungs(sweep.trials) if self.has_rungs else 1
        self.total_cost = sweep.repeats * sum(
            (sweep.trials // REDUCTION**rung) * REDUCTION**rung for rung in range(self.rungs)
        )

    def cost(self, rung: int | None) -> int:
        """Returns what a run costs, in those of the first rung."""
        return REDUCTION ** (rung or 0)

    def rounds(self, results: list[Result]) -> Iterator[list[Trial]]:
        """Yields trials that can run beside each other. results: of all runs, to which those of a round
        have been added when the next one is asked for."""
        if self.sweep.search == "tpe":
            yield from self.chosen_by_optuna(results)
            return
        drawn = self.combinations()
        trials = [Trial(number, values) for number, values in enumerate(drawn, start=1)]
        if not self.has_rungs:
            yield trials
            return
        for rung in range(self.rungs):
            share = share_of_rung(rung, self.rungs)
            yield [Trial(trial.number, trial.values, rung, share) for trial in trials]
            rows = rows_of_trials([each for each in results if each.rung == rung and each.outcome])
            kept = max(1, len(drawn) // REDUCTION ** (rung + 1))
            best = [row.number for row in rows[:kept]]
            trials = [Trial(number, drawn[number - 1]) for number in sorted(best)]
            if not trials:
                return

    def combinations(self) -> list[dict[str, str]]:
        """Returns the values of all trials: the grid, or drawn ones, of which none comes twice."""
        space = self.sweep.space
        generator = random.Random(self.sweep.draw_seed)
        lists = [values for values in space.values() if not isinstance(values, Range)]
        if len(lists) == len(space):
            if self.sweep.search == "grid":
                return [dict(zip(space, each, strict=True)) for each in itertools.product(*lists)]
            # By their numbers, as there may be more combinations than fit in memory.
            numbers = generator.sample(range(math.prod(map(len, lists))), self.sweep.trials)
            return [combination(space, number) for number in numbers]
        drawn: list[dict[str, str]] = []
        for _ in range(MOST_DRAWS * self.sweep.trials):
            values = {name: draw_value(name, each, generator) for name, each in space.items()}
            if values not in drawn:
                drawn.append(values)
            if len(drawn) == self.sweep.trials:
                return drawn
        raise UserError(
            f"--trials {self.sweep.trials}: the ranges have only {len(drawn)} different values"
        )

    # ---- Optuna ----

    def chosen_by_optuna(self, results: list[Result]) -> Iterator[list[Trial]]:
        """Yields as many trials as run at the same time, chosen from the results so far by TPE, the
        tree-structured Parzen estimator (Bergstra et al. 2011)."""
        file = Path(self.sweep.out) / "chosen.json"
        chosen = read_json(file, list) if file.is_file() else []
        while True:
            ended = Counter(each.trial for each in results)
            numbers = range(1, len(chosen) + 1)
            waiting = [number for number in numbers if ended[number] < self.sweep.repeats]
            if not waiting:
                count = min(self.sweep.at_once, self.sweep.trials - len(chosen))
                if not count:
                    return
                chosen += self.ask_optuna(results, chosen, count)
                with atomic_file(file) as tmp:
                    write_json(chosen, tmp)
                waiting = list(range(len(chosen) - count + 1, len(chosen) + 1))
            yield [Trial(number, chosen[number - 1]) for number in waiting]

    def ask_optuna(
        self, results: list[Result], chosen: list[dict], count: int
    ) -> list[dict[str, str]]:
        """Returns the values of the next trials."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        distributions = {name: self.distribution(name, optuna) for name in self.sweep.space}
        # The sampler begins afresh each time: what it knows are the results.
        sampler = optuna.samplers.TPESampler(seed=self.sweep.draw_seed + len(chosen))
        study = optuna.create_study(sampler=sampler)
        for row in rows_of_trials([each for each in results if each.outcome]):
            study.add_trial(
                optuna.trial.create_trial(
                    params={
                        name: self.as_optuna_has_it(name, value)
                        for name, value in row.values.items()
                    },
                    distributions=distributions,
                    value=row.key,
                )
            )
        asked = []
        for _ in range(count):
            params = study.ask(distributions).params
            values = {}
            for name in self.sweep.space:
                is_range = isinstance(self.sweep.space[name], Range)
                values[name] = number_word(name, params[name]) if is_range else params[name]
            asked.append(values)
        return asked

    def distribution(self, name: str, optuna):
        """Returns an option's values as Optuna has them."""
        values = self.sweep.space[name]
        if not isinstance(values, Range):
            return optuna.distributions.CategoricalDistribution(values)
        if takes_whole_numbers(name):
            return optuna.distributions.IntDistribution(int(values.low), int(values.high), log=True)
        return optuna.distributions.FloatDistribution(values.low, values.high, log=True)

    def as_optuna_has_it(self, name: str, value: str) -> str | int | float:
        """Returns a trial's value of an option as Optuna has it."""
        limits = self.sweep.space[name]
        if not isinstance(limits, Range):
            return value
        if takes_whole_numbers(name):
            return int(value)
        # It was rounded to two digits.
        return min(max(float(value), limits.low), limits.high)


def combination(lists: dict[str, tuple[str, ...]], number: int) -> dict[str, str]:
    """Returns a combination of a grid by its number, as itertools.product counts: the last value fastest."""
    values = {}
    for name in reversed(lists):
        number, place = divmod(number, len(lists[name]))
        values[name] = lists[name][place]
    return {name: values[name] for name in lists}


def draw_value(name: str, values: tuple[str, ...] | Range, generator: random.Random) -> str:
    """Returns a value of an option: of a list any, of a range so that each factor of ten is equally likely."""
    if not isinstance(values, Range):
        return generator.choice(values)
    low, high = math.log(values.low), math.log(values.high)
    return number_word(name, math.exp(generator.uniform(low, high)))
