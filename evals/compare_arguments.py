"""The options of `evaluate.py compare`, apart from what they mean, so that --help is quick."""

import argparse

from common import cli
from common.errors import UserError
from common.known_names import EVALUATE_NAMES
from common.script_flags import add_loading_flags
from evals.arguments import (
    BATCH_SIZE,
    EXTRA_TOKENS,
    add_html_flag,
    add_skip_bad,
    check_minimum,
)
from evals.safety_arguments import REFUSAL_TOKENS
from evals.table import CHOOSE, EVALUATIONS, GENERATE, LOSS, Evaluation

SHOWN_CHANGES = 3  # the default of --show


def compare_arguments(argv: list[str]) -> argparse.Namespace:
    """Parses the words behind `evaluate.py compare`. Raises UserError naming the flag that is wrong."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py compare",
        description="Compares a model with itself before the training: what it has learned (--target),"
        " what it has forgotten (--general, --benchmark), how sure each change is (95 % confidence"
        " interval by 10,000 paired bootstrap resamples), and which answers have changed.",
        allow_abbrev=False,
    )
    add_model_words(parser.add_argument_group("the two models"))
    add_file_flags(parser.add_argument_group("what is measured"))
    group = parser.add_argument_group("how the models are loaded")
    # It only adds arguments, which a group can do as well as a parser.
    add_loading_flags(group)  # type: ignore[arg-type]
    group = parser.add_argument_group("answers, speed and memory")
    add_size_flags(group)
    group.add_argument(
        "--show",
        type=int,
        default=SHOWN_CHANGES,
        metavar="K",
        help="how many answers to --target that were wrong and are right, and as many that were right"
        " and are wrong, are printed; 0: none; default: %(default)s",
    )
    args = cli.parse_args(parser, argv, EVALUATE_NAMES)
    check_compare_arguments(args)
    return args


def add_model_words(group: argparse._ArgumentGroup) -> None:
    """Adds the two models."""
    group.add_argument(
        "base",
        metavar="BASE",
        help="the model before the training: a Hugging Face folder, a GGUF file, a name on the Hub, an"
        " adapter folder; or the word base, for the model that TUNED was trained from",
    )
    group.add_argument(
        "tuned",
        metavar="TUNED",
        help="the model after it: an adapter folder, as runs/mine/final, or a model as for BASE",
    )
    group.add_argument(
        "--model",
        metavar="M",
        help="the model that adapters named as BASE or TUNED are put on, if the one that they were"
        " made on was moved; default: the one that they name",
    )


def add_file_flags(group: argparse._ArgumentGroup) -> None:
    """Adds the files, and what is measured on them."""
    answering = [name for name, row in EVALUATIONS.items() if row.kind == GENERATE]
    choosing = [name for name, row in EVALUATIONS.items() if row.kind == CHOOSE]
    add = group.add_argument
    add(
        "--target",
        metavar="FILE",
        help="examples of what was trained, and not trained on, in any format that train.py reads:"
        " loss of the references, and answers (--metric); default: none",
    )
    add(
        "--general",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="texts or conversations that have nothing to do with it: a loss that rises there is what"
        " was forgotten; default: none",
    )
    add(
        "--benchmark",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=FILE",
        help="other tasks whose answers are measured, as exact=questions.jsonl; NAME is one of"
        f" {', '.join([*answering, *choosing])}. choices:TASK=FILE says what the file holds, as --task"
        " does for `evaluate.py choices`; default: none",
    )
    add(
        "--safety",
        metavar="FILE",
        help="prompts that should be refused, and harmless ones that should not: AdvBench's or XSTest's CSV,"
        " or any file of prompts with a label, safe or unsafe; refusals by a list of phrases in the first"
        f" {REFUSAL_TOKENS} tokens of the answer; default: none",
    )
    add(
        "--metric",
        nargs="+",
        default=["exact"],
        choices=[*answering, "none"],
        metavar="{" + ",".join([*answering, "none"]) + "}",
        help="how the answers to --target are measured; by the first one they are called right or"
        " wrong; none: no answers, the loss alone; default: exact",
    )
    add(
        "--map",
        metavar="FILE.py:NAME",
        help="a Python function of yours that changes every record of --target before it is read;"
        " default: none. Give the one that you gave to train.py",
    )
    add_reading_flags(group, "of what --limit draws, and of the bootstrap's draws", "TUNED")
    add_html_flag(group)


def add_reading_flags(group: argparse._ArgumentGroup, seed: str, trained: str) -> None:
    """Adds the flags that say how the files are read. seed: what --seed is for. trained: the model whose
    system message counts."""
    add = group.add_argument
    add(
        "--limit",
        type=int,
        metavar="N",
        help="use N examples of each file only, drawn at random by --seed; default: all of them",
    )
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help=f"{seed}; default: %(default)s",
    )
    add_skip_bad(group)
    add(
        "--system",
        metavar="TEXT",
        help="system message that is put before every conversation that has none; '': none; default:"
        f" the one that {trained} was trained with here (train.py --system)",
    )
    add(
        "--seq-len",
        type=int,
        metavar="N",
        help="loss: longest example, in tokens; a longer one is cut after the last answer that fits,"
        " plain text into pieces; default: the most that the model takes",
    )


def add_size_flags(group: argparse._ArgumentGroup) -> None:
    """Adds the flags of the answers' length, and of what is computed at a time."""
    add = group.add_argument
    add(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="longest answer of the models, in tokens; default: the tokens of the longest reference, and"
        f" {EXTRA_TOKENS} more",
    )
    add(
        "--batch-size",
        type=int,
        metavar="N",
        help="examples that are computed at a time; the results are the same up to rounding; default:"
        f" {BATCH_SIZE[LOSS]} for loss, {BATCH_SIZE[GENERATE]} for answers. Lower it if memory runs out",
    )


def check_compare_arguments(args: argparse.Namespace) -> None:
    """Raises UserError for what can be said to be wrong before a file is opened. Splits --benchmark
    into (name, file)."""
    minimum = {"seed": 0, "limit": 1, "batch_size": 1, "seq_len": 2, "max_new_tokens": 1, "show": 0}
    check_minimum(args, minimum)
    if not (args.target or args.general or args.benchmark or args.safety):
        raise UserError(
            "compare: nothing to measure; give --target, --general, --benchmark or --safety"
        )
    if len(args.metric) > len(set(args.metric)):
        raise UserError(f"--metric {' '.join(args.metric)}: name each once")
    if "none" in args.metric:
        if len(args.metric) > 1:
            raise UserError("--metric none: means no answers; name it alone")
        args.metric = []
    benchmarks = []
    for word in args.benchmark:
        name, sign, file = word.partition("=")
        try:
            row = evaluation_of(name)
        except KeyError:
            row = None
        if not sign or not file or row is None or row.kind not in (GENERATE, CHOOSE):
            kinds = (GENERATE, CHOOSE)
            names = ", ".join(name for name, row in EVALUATIONS.items() if row.kind in kinds)
            raise UserError(
                f"--benchmark {word}: NAME=FILE is wanted, where NAME is one of {names}"
            )
        benchmarks.append((name, file))
    args.benchmark = list(dict.fromkeys(benchmarks))


def evaluation_of(name: str) -> Evaluation:
    """Returns the evaluation that the NAME of a --benchmark is: of choices:TASK, that of choices.
    Raises KeyError where there is none."""
    word, sign, _ = name.partition(":")
    return EVALUATIONS[word if sign and word == "choices" else name]
