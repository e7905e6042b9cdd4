"""Command lines: every complaint about one is a line that names the flag."""

import argparse
import difflib
import sys

from common.errors import UserError


def parse_args(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """parser.parse_args (argv: default the process's own), with every complaint a UserError of one line.

    An unknown flag is looked for first and answered with the nearest right one: argparse itself would rather complain
    that the flag which was meant is missing. The parser wants allow_abbrev=False.
    """
    argv = sys.argv[1:] if argv is None else argv
    known = [option for action in parser._actions for option in action.option_strings]
    for typed in (word.partition("=")[0] for word in argv if word.startswith("--")):
        if typed not in known:
            near = [option for option in known if option.startswith(typed)] or difflib.get_close_matches(typed, known)
            raise UserError(f"{typed}: no such flag" + (f"; did you mean {near[0]}?" if near else "; see --help"))

    def complain(message: str):
        raise UserError(message.removeprefix("argument ") + "; see --help")

    parser.error = complain
    return parser.parse_args(argv)
