"""Parses command lines, with every error as one line that names the flag.

argparse by itself prints the usage text with every error, which is long for a script with many
flags. Here the user sees the error alone and, for an unknown flag, the right one: what an option of
another program is called here (common/known_names.py), or else the nearest name.
"""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Mapping

from common.errors import UserError, printable
from common.known_names import Counterpart

# Characters of a value that are repeated in a message.
LONGEST_VALUE = 60
REQUIRED = "the following arguments are required: "
# What argparse calls by the names of Python's types.
NUMBERS = {"int": "a whole number", "float": "a number"}


def parse_args(
    parser: argparse.ArgumentParser,
    argv: list[str] | None = None,
    names: Mapping[str, Counterpart] | None = None,
) -> argparse.Namespace:
    """Returns what parser.parse_args returns. Raises UserError, with a message of one line, for
    every error.

    Unknown flags are looked for first, all of them: argparse itself would rather report that the
    flag which was meant is missing.

    parser: made with allow_abbrev=False.
    argv: the words of the command line; default: those of this process.
    names: what options of other programs are called here.
    """
    args, rest = parse_known_args(parser, argv, names)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def parse_known_args(
    parser: argparse.ArgumentParser,
    argv: list[str] | None = None,
    names: Mapping[str, Counterpart] | None = None,
) -> tuple[argparse.Namespace, list[str]]:
    """Returns what `parse_args` returns, and the words that are no flags and have no place."""
    if argv is None:
        argv = sys.argv[1:]
    refuse_unknown_flags(parser, argv, names or {})
    report_as_user_error(parser)
    return parser.parse_known_args(argv)


def report_as_user_error(parser: argparse.ArgumentParser) -> None:
    """Lets a parser, and those of its commands, raise UserError. By itself, argparse prints the
    usage and ends the process."""
    choices = {}
    for action in parser._actions:
        if action.choices and not action.option_strings:
            choices[str(action.metavar or action.dest)] = " or ".join(action.choices)

    def raise_user_error(message: str):
        # argparse writes "argument --flag: ..."; all messages here begin with what they are about.
        message = message.removeprefix("argument ")
        for name, words in choices.items():
            # argparse calls a place by a name that is written nowhere else.
            message = message.removeprefix(f"{name}: ")
            if message.startswith(REQUIRED):
                message = re.sub(rf"(?<= ){re.escape(name)}(?=,|$)", words, message)
        for kind, wanted in NUMBERS.items():
            message = message.replace(f": invalid {kind} value: ", f": {wanted} is wanted, not ")
        raise UserError(f"{message}; see --help")

    parser.error = raise_user_error
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                report_as_user_error(command)


def refuse_unknown_flags(
    parser: argparse.ArgumentParser, argv: list[str], names: Mapping[str, Counterpart]
) -> None:
    """Raises UserError if a command line has flags that the parser has not: what to type in place of
    each, so that the command is mended once.

    Settings in the style of other programs, key=value, are refused as well, if the key is known.
    """
    known = option_actions(parser)
    unknown = []
    # True for a word that a known flag takes as its one value, whatever it looks like.
    is_value = False
    for number, word in enumerate(argv):
        flag, sign, value = word.partition("=")
        if is_value:
            is_value = False
        elif flag in known:
            is_value = not sign and known[flag].nargs is None
        elif word.startswith("--") and word != "--":
            if not sign:
                value = " ".join(words_behind(argv[number + 1 :], known, names))
            unknown.append((flag, value))
        elif is_setting(word, known, names):
            unknown.append((flag, value))
    if not unknown:
        return
    answers = [mended(flag, value, known, names) for flag, value in unknown]
    if len(answers) == 1:
        flag, _ = unknown[0]
        sign = "" if flag.startswith("--") else f"={shortened(unknown[0][1])}"
        raise UserError(f"{flag}{sign}: no such flag; {answers[0]}")
    listed = [f"{flag}: {text}" for (flag, _), text in zip(unknown, answers, strict=True)]
    raise UserError(f"{len(answers)} flags are not known: {' | '.join(listed)}")


def option_actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Returns {flag: its action} of a parser and of its commands."""
    known: dict[str, argparse.Action] = {}
    # argparse has no public list of a parser's flags.
    for action in parser._actions:
        known |= dict.fromkeys(action.option_strings, action)
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                known |= option_actions(command)
    return known


def words_behind(
    words: list[str], known: Mapping[str, argparse.Action], names: Mapping[str, Counterpart]
) -> list[str]:
    """Returns the first words of a command line that are no flags: the values of the flag before."""
    values = []
    for word in words:
        if word.startswith("--") or is_setting(word, known, names):
            break
        values.append(word)
    return values


def is_setting(
    word: str, known: Mapping[str, argparse.Action], names: Mapping[str, Counterpart]
) -> bool:
    """Returns True for key=value where the key is an option's name here or in another program, and
    neither part is a file, as in FILE=WEIGHT and NAME=FOLDER."""
    match = re.match(r"([A-Za-z_][\w.]*)=(.*)", word, re.DOTALL)
    if match is None or any(os.path.exists(part) for part in (word, match[1], match[2])):
        return False
    name = plain_name(match[1])
    return name in names or f"--{name.replace('_', '-')}" in known


def plain_name(flag: str) -> str:
    """Returns learning_rate of --learning-rate, and lora_rank of torchtune's model.lora_rank."""
    return flag.lstrip("-").rpartition(".")[2].replace("-", "_").lower()


def mended(
    flag: str, value: str, known: Mapping[str, argparse.Action], names: Mapping[str, Counterpart]
) -> str:
    """Returns a clause that says what to type in place of a flag.

    value: what stands behind it, "" if nothing does.
    """
    name = plain_name(flag)
    own = f"--{name.replace('_', '-')}"
    if not flag.startswith("--") and own in known:
        return f"options are written {own} {shortened(value)} here"
    row = names.get(name)
    if row is not None:
        text = counterpart_clause(row, value, known)
        if text:
            return text
    # A flag that is cut short is the likelier mistake than one that is misspelt.
    similar = [option for option in known if option.startswith(flag)]
    if not similar:
        similar = difflib.get_close_matches(flag.replace("_", "-"), known)
    return f"did you mean {similar[0]}?" if similar else "see --help"


def counterpart_clause(
    row: Counterpart, value: str, known: Mapping[str, argparse.Action]
) -> str | None:
    """Returns what an option of another program is here, in words; None if it is an option that
    this script does not have."""
    note = f" ({row.note})" if row.note else ""
    if row.flag and row.flag not in known:
        return f"there is no such option here{note}"
    words = row.translate(value) if value else row.bare
    if row.flag and not words:
        return f"here it is {row.flag}{note}"
    if words:
        return f"here it is {shortened(words.strip())}{note if row.words is None else ''}"
    if row.needless:
        return f"it is not needed: {row.note}"
    return row.note or None


def shortened(value: str) -> str:
    """Returns a value as it is repeated in a message."""
    text = printable(value)
    return text if len(text) <= LONGEST_VALUE else text[:LONGEST_VALUE] + "..."
