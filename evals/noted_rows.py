"""Rows of a file about which something is noted before they are read as prompts: whether one is harmful,
or how toxic it is, which no prompt has a place for."""

from common.errors import UserError
from dataset.formats import Map
from dataset.records import ReadStats


class NotedRows:
    """What every row goes through before it is read, called as a Map is.

    map_fn: the user's function, which comes first.
    notes: {where a row stands: what is noted of it}.
    """

    def __init__(self, map_fn: Map | None = None):
        self.map_fn = map_fn
        self.notes: dict = {}

    @property
    def name(self) -> str:
        return self.map_fn.name if self.map_fn else ""

    def __call__(self, value: object, where: str, stats: ReadStats) -> list:
        """Returns the rows that a row is read as. Raises UserError where --map has made rows of which
        different things are to be noted, since they stand in one place."""
        values = self.map_fn(value, where, stats) if self.map_fn else [value]
        rows = []
        noted = set()
        for each in values:
            rows.append(self.take_note(each, where))
            noted.add(self.notes.get(where))
        if len(noted) > 1:
            raise UserError(
                f"{where}: --map makes several prompts of it, with different labels; write them into a file"
                " with a record each"
            )
        return rows

    def take_note(self, value: object, where: str) -> object:
        """Notes what a row says of its prompt, and returns the row that is read as the prompt."""
        raise NotImplementedError
