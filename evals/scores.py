"""What an evaluation of answers returns, whatever it compares."""

from dataclasses import dataclass, field


@dataclass
class AnswerScores:
    """What an evaluation says of N answers.

    items: {name: a number for each answer, from 0 to 1}, the first of which says how good the answer
        is. What has no number for one answer (BLEU of a corpus) has none here.
    columns: {heading: the number of all answers}, the columns of the table.
    formats: {heading: how the number is written}, as ".1f".
    notes: lines that belong below the table, such as the version and settings of a metric.
    """

    items: dict[str, list[float]]
    columns: dict[str, float]
    formats: dict[str, str]
    notes: list[str] = field(default_factory=list)

    @property
    def hits(self) -> list[bool]:
        """For each answer, True if its first number is 1: it can't be better."""
        return [number == 1 for number in next(iter(self.items.values()))]
