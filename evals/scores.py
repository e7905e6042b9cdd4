"""What an evaluation of answers returns, whatever it compares."""

from dataclasses import dataclass, field


@dataclass
class ItemScores:
    """What an evaluation says of N answers.

    items: {name: a number for each answer, from 0 to 1}, the first of which says how good the answer
        is. What has no number for one answer (BLEU of a corpus) has none here.
    columns: {heading: the number of all answers}, the columns of the table.
    formats: {heading: how the number is written}, as ".1f", those of the parts as well.
    notes: lines that belong below the table, such as the version and settings of a metric.
    parts: {part of the answers: its numbers by heading}, as for each subject or class.
    chosen: of questions with choices, the number of the choice that each answer is.
    """

    items: dict[str, list[float]]
    columns: dict[str, float]
    formats: dict[str, str]
    notes: list[str] = field(default_factory=list)
    parts: dict[str, dict[str, float]] = field(default_factory=dict)
    chosen: list[int] = field(default_factory=list)

    @property
    def hits(self) -> list[bool]:
        """For each answer, True if its first number is 1: it can't be better."""
        return [number == 1 for number in next(iter(self.items.values()))]
