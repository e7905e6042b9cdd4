"""The user's function of --map FILE.py:NAME, which every record goes through before it is read."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from common.errors import UserError
from dataset.messages import require_object, type_name
from dataset.readers import Text
from dataset.records import ReadStats


class Map:
    """The user's function of --map FILE.py:NAME, through which every record goes first.

    It gets an object ({"text"} for plain text), and returns an object of any known format, a list
    of them, or None to leave the record out. The format is recognized by what it returns. It runs
    with no protection, because it is the user's own.
    """

    def __init__(self, name: str, flag: str = "--map"):
        """Imports the file.

        name: FILE.py:NAME.
        flag: what messages call it; that of another function which a user may name.
        Raises UserError if it can't be imported or has no such function.
        """
        self.name = name
        file, _, function = name.rpartition(":")
        if Path(name).is_file():
            raise UserError(f"{flag} {name}: names no function of the file; FILE.py:NAME is wanted")
        if not Path(file).is_file():
            raise UserError(
                f"{flag} {name}: FILE.py:NAME is wanted, and there is no file {file or name}"
            )
        spec = spec_from_file_location("user_map", file)
        if spec is None:
            raise UserError(f"{flag} {name}: {file} is no Python file")
        module = module_from_spec(spec)
        # Before it is executed, as an import does: dataclasses look their module up.
        sys.modules["user_map"] = module
        # So that it can import the files next to it.
        folder = Path(file).resolve().parent
        sys.path.append(str(folder))
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:  # noqa: BLE001  a user's program may fail in any way
            raise UserError(f"{flag} {name}: {type(error).__name__}: {error}") from None
        self.function = getattr(module, function, None)
        if not callable(self.function):
            raise UserError(f"{flag} {name}: {file} has no function {function}")

    def __call__(self, value: object, where: str, stats: ReadStats) -> list:
        """Returns the records that the function makes of one.

        Raises UserError if it fails or returns anything else.
        """
        is_text = isinstance(value, Text)
        if is_text:
            argument = {"text": value.text}
        else:
            argument = require_object(value, where)
        try:
            result = self.function(argument)
        except (Exception, SystemExit) as error:  # noqa: BLE001
            raise UserError(
                f"{where}: --map {self.name}: {type(error).__name__}: {error}"
            ) from None

        # The parts of a long text are put together again, so each must stay a text.
        if is_text and not (value.first and value.last):
            has_text_only = isinstance(result, dict) and result.keys() == {"text"}
            if not has_text_only or not isinstance(result["text"], str):
                raise UserError(
                    f"{where}: --map {self.name}: a text this long is read in parts; of each part"
                    ' {"text": string} is wanted'
                )
            return [value._replace(text=result["text"])]

        if result is None or result == []:
            stats.dropped["left out by --map"] += 1
            return []
        records = result if isinstance(result, list) else [result]
        for each in records:
            if not isinstance(each, dict):
                raise UserError(
                    f"{where}: --map {self.name} gives {type_name(each)};"
                    " a dict, a list of them, or None is wanted"
                )
        return records
