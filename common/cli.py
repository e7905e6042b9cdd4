"""Parses command lines, with every error as one line that names the flag.

argparse by itself prints the usage text with every error, which is long for a script with many
flags. Here the user sees the error alone and, for an unknown flag, the nearest right one.
"""

import argparse
import difflib
import sys

from common.errors import UserError


def parse_args(
    parser: argparse.ArgumentParser, argv: list[str] | None = None
) -> argparse.Namespace:
    """Returns what parser.parse_args returns. Raises UserError, with a message of one line, for
    every error.

    Unknown flags are looked for first: argparse itself would rather report that the flag which was
    meant is missing.

    parser: made with allow_abbrev=False.
    argv: the words of the command line; default: those of this process.
    """
    if argv is None:
        argv = sys.argv[1:]
    known = []
    # argparse has no public list of a parser's flags.
    for action in parser._actions:
        known += action.option_strings
    for word in argv:
        flag = word.partition("=")[0]  # of --flag=value
        if not word.startswith("--") or flag in known:
            continue
        # A flag that is cut short is the likelier mistake than one that is misspelt.
        similar = [option for option in known if option.startswith(flag)]
        if not similar:
            similar = difflib.get_close_matches(flag, known)
        hint = f"did you mean {similar[0]}?" if similar else "see --help"
        raise UserError(f"{flag}: no such flag; {hint}")

    def raise_user_error(message: str):
        # argparse writes "argument --flag: ..."; all messages here begin with what they are about.
        raise UserError(message.removeprefix("argument ") + "; see --help")

    # By itself, `error` prints the usage and ends the process.
    parser.error = raise_user_error
    return parser.parse_args(argv)
