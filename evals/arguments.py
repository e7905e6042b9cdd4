"""The options of evaluate.py. They stand apart from what they mean, so that --help and a mistake in a
flag are answered before torch is imported, which takes seconds.
"""

import argparse
import sys

from common import cli
from common.errors import UserError
from common.known_names import EVALUATE_NAMES
from common.script_flags import add_model_flags
from evals.code_arguments import (
    CODE_TOKENS,
    OF_PROGRAMS,
    add_program_flags,
    check_program_arguments,
)
from evals.table import COMMANDS, EVALUATIONS, EXECUTE, GENERATE, LOSS, imported

BATCH_SIZE = {LOSS: 8, GENERATE: 32, EXECUTE: 32}  # defaults of --batch-size
SHOWN_MISSES = 5  # the default of --show
# The default of --max-new-tokens: so many more than the longest reference has. Enough to see that
# an answer goes on, and cheap.
EXTRA_TOKENS = 8


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses evaluate.py's command line. `command` is the word of COMMANDS that it begins with, or
    None where it names evaluations. Raises UserError naming the flag that is wrong."""
    words = sys.argv[1:] if argv is None else argv
    name = words[0] if words and words[0] in COMMANDS else None
    if name is None:
        args = evaluation_arguments(words)
    else:
        args = imported(COMMANDS[name].arguments)(words[1:])
    args.command = name
    return args


def evaluation_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line. Raises UserError naming the flag that is wrong."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        description="Measures a model on a file of examples, or two models side by side (--versus).",
        epilog="; ".join(f"evaluate.py {name} ...: {row.help}" for name, row in COMMANDS.items()),
        allow_abbrev=False,
    )
    add_data_flags(parser.add_argument_group("what is measured"))
    add_target_flags(parser.add_argument_group("the model"))
    add_answer_flags(parser.add_argument_group("the model's answers"))
    add_program_flags(parser.add_argument_group("programs that the model writes (pass-at-k)"))
    add_batch_flags(parser.add_argument_group("speed and memory"))
    args = cli.parse_args(parser, argv, EVALUATE_NAMES)
    check_evaluation_arguments(args)
    # Only now, since the check has to know whether it was typed.
    if args.show is None:
        args.show = SHOWN_MISSES
    return args


def add_data_flags(group: argparse._ArgumentGroup) -> None:
    """Adds the flags that say what is measured, and on what."""
    add = group.add_argument
    add(
        "what",
        nargs="+",
        choices=[*EVALUATIONS],
        metavar="{" + ",".join(EVALUATIONS) + "}",
        help="; ".join(f"{name}: {row.help}" for name, row in EVALUATIONS.items())
        + ". Several of those for which the model writes answers can be named: it answers once",
    )
    add(
        "--data",
        metavar="FILE",
        required=True,
        help="file of examples that the model was not trained on, in any format that train.py"
        " reads, on this disk or by name (hf:org/name[:subset][:split], s3://bucket/key,"
        " gs://bucket/key, https://host/file); of a folder with parts, the part for tests; required."
        " Answers are compared with the last message of the assistant, the reference",
    )
    add(
        "--map",
        metavar="FILE.py:NAME",
        help="a Python function of yours that changes every record before it is read: from a"
        " record to a record of a known format, to a list of them, or to None to leave the record"
        " out; default: none. Give the one that you gave to train.py",
    )
    add(
        "--limit",
        type=int,
        metavar="N",
        help="use N examples only, drawn at random by --seed, for a quick look: records, or pieces of"
        " plain text; the same ones for the same seed; default: all of them",
    )
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="which examples --limit draws, and what --temperature draws; default: %(default)s",
    )
    add(
        "--skip-bad",
        action="store_true",
        help="leave out records that can't be read, counted by what is wrong with them; default: the"
        " first 20 of them are named, and nothing is measured",
    )
    add(
        "--system",
        metavar="TEXT",
        help="system message that is put before every conversation that has none; '': none; default:"
        " the one that the model or adapter was trained with here (train.py --system)",
    )
    add(
        "--seq-len",
        type=int,
        metavar="N",
        help="loss: longest example, in tokens; a longer one is cut after the last answer that"
        " fits, or left out if none does, and the numbers are printed; default: the most that the model"
        " takes. Lower it if memory runs"
        " out, or give the value that train.py had",
    )


def add_target_flags(group: argparse._ArgumentGroup) -> None:
    """Adds the flags of the model, and of a second one to compare it with."""
    # It only adds arguments, which a group can do as well as a parser.
    add_model_flags(group)  # type: ignore[arg-type]
    group.add_argument(
        "--versus",
        metavar="X",
        help="a second model to compare with. base: the model as it was before the training that made"
        " --adapter or --model; else another model, named as in --model, or an adapter folder. It is"
        " measured first, and the last row of the table is the change from it to your model; default:"
        " no comparison",
    )


def add_answer_flags(group: argparse._ArgumentGroup) -> None:
    """Adds the flags of the answers that the model writes, and of what is printed of them."""
    group.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="longest answer of the model, in tokens; default: the tokens of the longest reference, and"
        f" {EXTRA_TOKENS} more; for pass-at-k {CODE_TOKENS}. Change it to allow longer answers, or to save time",
    )
    group.add_argument(
        "--show",
        type=int,
        metavar="K",
        help="how many wrong answers of each model are printed, with question and reference; 0: none;"
        f" default: {SHOWN_MISSES}",
    )


def add_batch_flags(group: argparse._ArgumentGroup) -> None:
    """Adds the flag that trades memory for speed."""
    group.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="examples that are computed at a time; the results are the same up to rounding;"
        f" default: {BATCH_SIZE[LOSS]} for loss, {BATCH_SIZE[GENERATE]} where the model writes answers. Lower it if"
        " memory runs out; a higher one may be faster on a GPU",
    )


def check_evaluation_arguments(args: argparse.Namespace) -> None:
    """Raises UserError for a number out of its range, and for a flag that the chosen measurement
    does not use."""
    minimum = {"seed": 0, "limit": 1, "batch_size": 1, "seq_len": 2, "max_new_tokens": 1, "show": 0}
    answered = (GENERATE, EXECUTE)
    belongs_to = {"max_new_tokens": answered, "show": answered, "seq_len": (LOSS,)}
    kind = kind_of(args.what)
    for option, least in minimum.items():
        value = getattr(args, option)
        if value is None:
            continue
        flag = "--" + option.replace("_", "-")
        if value < least:
            raise UserError(f"{flag} {value}: must be {least} or more")
        # An option of all measurements is in no way wrong.
        refuse_unused(flag, belongs_to.get(option, (kind,)), args.what[0])
    for option, flag in OF_PROGRAMS.items():
        if getattr(args, option) not in (None, False):
            refuse_unused(flag, (EXECUTE,), args.what[0])
    if kind == EXECUTE:
        for option in ("map", "skip_bad"):
            if getattr(args, option):
                refuse_unused("--" + option.replace("_", "-"), (LOSS, GENERATE), args.what[0])
        check_program_arguments(args)


def refuse_unused(flag: str, kinds: tuple[str, ...], name: str) -> None:
    """Raises UserError where a flag that was typed is for evaluations of other kinds.

    kinds: those that use it. name: of the evaluation that was named.
    """
    if EVALUATIONS[name].kind not in kinds:
        names = "`, `".join(other for other, row in EVALUATIONS.items() if row.kind in kinds)
        raise UserError(f"{flag}: is for `{names}`; `{name}` does not use it")


def kind_of(names: list[str]) -> str:
    """Returns the kind of some evaluations. Raises UserError where they are of several kinds, which
    different loops measure, or where one is named twice."""
    kinds = {EVALUATIONS[name].kind for name in names}
    if len(kinds) > 1 or len(names) > len(set(names)):
        listed = " ".join(names)
        raise UserError(
            f"{listed}: only evaluations of the model's answers can be named together, each once; run"
            " evaluate.py for each of the others"
        )
    return kinds.pop()
