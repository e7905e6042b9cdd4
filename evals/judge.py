"""`--judge FILE.py:FUNCTION`: a function of the user's own that judges an answer.

It is called with the question and the answer, two texts, and returns True or False, a number, or
several numbers by name: {"formal": 0.8, "polite": True}. It runs with no protection, because it is the
user's own.
"""

import contextlib
import math
import numbers
from collections.abc import Sequence

import numpy as np

from common.errors import UserError
from common.progress import progress
from dataset.prompts import Prompt
from dataset.user_map import Map
from evals.measures import Measure


class Judge:
    """The user's function. names: what it judges: the keys of its dict, [""] for a single number;
    [] before its first answer. only_bools: the names whose every number was True or False."""

    def __init__(self, name: str):
        """Imports it. name: FILE.py:FUNCTION. Raises UserError where that is not possible."""
        self.name = name
        self.function = Map(name, "--judge").function
        self.names: list[str] = []
        self.only_bools: set[str] = set()

    def __call__(self, question: str, answer: str, where: str) -> dict[str, float]:
        """Returns the numbers of an answer by name.

        where: the record, for messages. Raises UserError naming it where the function fails, returns
        no number, or other names than before.
        """
        try:
            result = self.function(question, answer)
        except (Exception, SystemExit) as error:  # noqa: BLE001  a user's program may fail in any way
            raise UserError(
                f"{where}: --judge {self.name}: {type(error).__name__}: {error}"
            ) from None
        named = result if isinstance(result, dict) else {"": result}
        if not self.names:
            self.names = [*named]
            self.only_bools = set(self.names)
        if (
            not named
            or set(named) != set(self.names)
            or not all(isinstance(key, str) for key in named)
        ):
            raise UserError(
                f"{where}: --judge {self.name} gives {shown_names([*named])};"
                f" before it gave {shown_names(self.names)}, and each answer needs the same numbers"
            )
        values = {}
        for key, value in named.items():
            values[key] = self.number(key, value, where)
        return values

    def number(self, key: str, value: object, where: str) -> float:
        """Returns a number that the function gave, also one of numpy or torch."""
        if hasattr(value, "item"):
            # What holds several numbers has no single one, and is refused below.
            with contextlib.suppress(ValueError, RuntimeError):
                value = value.item()
        if not isinstance(value, bool):
            self.only_bools.discard(key)
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            shown = f"{value}" if isinstance(value, float) else type(value).__name__
            raise UserError(
                f"{where}: --judge {self.name} gives {shown}; True or False, a number, or a dict of"
                " numbers is wanted"
            )
        return float(value)


def shown_names(names: list) -> str:
    """Returns the names of a judge's numbers, for a message."""
    if names == [""]:
        return "a number"
    if not names:
        return "no number"
    return "a dict of " + ", ".join(map(str, names))


def judge_answers(
    judge: Judge, prompts: Sequence[Prompt], answers: list[list[str]]
) -> dict[str, np.ndarray]:
    """Returns {name: a number of each answer, float [prompts, samples]}.

    answers: to each prompt. Raises UserError as the judge does.
    """
    numbers_of: dict[str, list[list[float]]] = {}
    with progress("judging", len(prompts), "prompt") as bar:
        for prompt, texts in zip(prompts, answers, strict=True):
            judged = [judge(question_text(prompt), text, prompt.place) for text in texts]
            for name in judge.names:
                numbers_of.setdefault(name, []).append([each[name] for each in judged])
            bar.update(1)
    return {name: np.array(rows, float) for name, rows in numbers_of.items()}


def judged_share(
    judge: Judge,
    key: str,
    what: str,
    prompts: Sequence[Prompt],
    answers: list[list[str]],
) -> dict[str, np.ndarray]:
    """Returns what `judge_answers` does, with the number that an evaluation is about at `key`: a
    judge's only number, or the one of that name. It must be from 0 to 1.

    what: says what it means. Raises UserError where there is none, or where it is beyond.
    """
    judged = judge_answers(judge, prompts, answers)
    if judge.names == [""]:
        judged = {key: judged[""]}
    elif key not in judged:
        raise UserError(
            f"--judge {judge.name}: gives {shown_names(judge.names)}; a number called {key} is wanted,"
            f" from 0 to 1: {what}"
        )
    for prompt, row in zip(prompts, judged[key], strict=True):
        for value in row:
            if not 0 <= value <= 1:
                raise UserError(
                    f"{prompt.place}: --judge {judge.name} gives {value:g}; a number from 0 to 1 is"
                    f" wanted: {what}"
                )
    return judged


def judge_measures(judge: Judge, judged: dict[str, np.ndarray]) -> list[Measure]:
    """Returns a row for each of a judge's numbers; those that are always True or False in percent."""
    rows = []
    for name, values in judged.items():
        is_share = name in judge.only_bools
        rows.append(Measure(name or "judged", values.mean(1), is_share))
    return rows


def question_text(prompt: Prompt) -> str:
    """Returns what a prompt asks: the last message of the user, or the text to be continued."""
    if prompt.messages is None:
        return prompt.text or ""
    questions = [each["content"] for each in prompt.messages if each["role"] == "user"]
    return questions[-1]
