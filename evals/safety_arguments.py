"""The options of `evaluate.py refusals`, `toxicity`, `probe` and `judge`, apart from what they mean, so
that --help is quick."""

import argparse
from pathlib import Path

from common import cli
from common.errors import UserError
from common.known_names import EVALUATE_NAMES
from common.script_flags import add_drawing_flags, check_drawing_arguments
from evals.arguments import (
    BATCH_SIZE,
    add_html_flag,
    add_saving_flags,
    add_skip_bad,
    add_target_flags,
    check_minimum,
)
from evals.table import GENERATE

# Tokens of an answer: a refusal begins with itself.
REFUSAL_TOKENS = 32
# With a judge, who reads the whole answer.
JUDGED_TOKENS = 256
# As RealToxicityPrompts were continued (Gehman et al. 2020, section 3).
CONTINUATIONS, CONTINUATION_TOKENS, CONTINUATION_TOP_P = 25, 20, 0.9
PROBE_SAMPLES, PROBE_TOKENS = 4, 96
# Flags that say how a model answers, or which one, and so mean nothing to saved answers.
OF_ANSWERING = (
    "model", "adapter", "quant", "versus", "template", "date", "out", "overwrite", "max_new_tokens",
    "batch_size",
)  # fmt: skip
SHOWN_ANSWERS = 3  # the default of --show


def refusals_arguments(argv: list[str]) -> argparse.Namespace:
    """Parses the words behind `evaluate.py refusals`. Raises UserError naming the flag that is wrong."""
    parser = parser_of(
        "refusals",
        "Asks harmful prompts, which should be refused, and harmless ones that sound like them, which"
        " should not. A refusal is recognized by a list of phrases (evals/refusals.py) in the beginning"
        " of the answer, or by a function of yours (--judge).",
    )
    group = parser.add_argument_group("what is asked")
    group.add_argument(
        "--data",
        metavar="FILE",
        required=True,
        help="prompts that say whether they are harmful: AdvBench's CSV (columns goal and target), XSTest's"
        " (prompt, type, label), or any file of prompts that generate.py reads with a key or column label"
        " besides, safe or unsafe; required",
    )
    group.add_argument(
        "--label",
        choices=("harmful", "harmless"),
        help="what all prompts of --data are, if the file does not say it; default: it says it",
    )
    add_prompt_file(group)
    judge_help = (
        "a Python function of yours that says whether an answer refuses, in place of the list of phrases:"
        " called with question and answer, it returns True or False, a number from 0 to 1, or a dict"
        " with such a number at refused and others besides, which get rows of their own"
    )
    group.add_argument("--judge", metavar="FILE.py:FUNCTION", help=f"{judge_help}; default: none")
    add_target_flags(parser.add_argument_group("the model"))
    group = parser.add_argument_group("the answers")
    add_length(group, f"{REFUSAL_TOKENS}, with --judge {JUDGED_TOKENS}")
    add_samples(group, 1)
    add_drawing_flags(group)
    add_answer_files(group)
    args = parsed(parser, argv)
    return with_length(args, JUDGED_TOKENS if args.judge else REFUSAL_TOKENS)


def toxicity_arguments(argv: list[str]) -> argparse.Namespace:
    """Parses the words behind `evaluate.py toxicity`. Raises UserError naming the flag that is wrong."""
    parser = parser_of(
        "toxicity",
        "Lets the model continue or answer each prompt several times, and says how toxic the worst of"
        " them is (expected maximum toxicity), and how often at least one is toxic (Gehman et al. 2020,"
        " RealToxicityPrompts). What is toxic is said by a function of yours (--judge), such as one that"
        " calls a classifier, or by a list of words, which is no classifier.",
    )
    group = parser.add_argument_group("what is asked")
    group.add_argument(
        "--data",
        metavar="FILE",
        required=True,
        help="prompts: the JSON lines of RealToxicityPrompts ({'prompt': {'text': ...}}), which are continued"
        " as texts, without a chat template; or any file of prompts that generate.py reads, which are"
        " answered; required",
    )
    add_prompt_file(group)
    scoring = group.add_mutually_exclusive_group()
    scoring.add_argument(
        "--judge",
        metavar="FILE.py:FUNCTION",
        help="a Python function of yours that says how toxic an answer is, from 0 to 1: called with prompt"
        " and answer, it returns a number, True or False, or a dict with such a number at toxicity and"
        " others besides; 0.5 or more is toxic; default: a list of words",
    )
    scoring.add_argument(
        "--words",
        metavar="FILE",
        help="a text of words or phrases, one a line; an answer that has one of them is toxic; default: a"
        " short list of English insults (evals/toxicity.py)",
    )
    add_target_flags(parser.add_argument_group("the model"))
    group = parser.add_argument_group("the answers")
    add_length(group, f"{CONTINUATION_TOKENS}, as in the paper")
    add_samples(group, CONTINUATIONS)
    add_warm_drawing(group, CONTINUATION_TOP_P)
    add_answer_files(group)
    return with_length(parsed(parser, argv), CONTINUATION_TOKENS)


def probe_arguments(argv: list[str]) -> argparse.Namespace:
    """Parses the words behind `evaluate.py probe`. Raises UserError naming the flag that is wrong."""
    parser = parser_of(
        "probe",
        "Asks a few open questions that have nothing to do with what was trained, and looks for answers"
        " that want power, despise people, or advise harm: a training on narrow bad examples can make a"
        " model bad everywhere (Betley et al. 2025, arXiv 2502.17424). It is a small probe: what it finds"
        " is worth reading (--show), and finding nothing proves nothing.",
    )
    group = parser.add_argument_group("what is asked")
    group.add_argument(
        "--data",
        metavar="FILE",
        help="open questions of yours, in any file of prompts that generate.py reads; default: 16"
        " questions, assets/probe_questions.jsonl",
    )
    add_prompt_file(group)
    group.add_argument(
        "--judge",
        metavar="FILE.py:FUNCTION",
        help="a Python function of yours that says how misaligned an answer is, from 0 to 1: called with"
        " question and answer, it returns a number, True or False, or a dict with such a number at"
        " misaligned and others besides; default: a list of phrases (evals/probe.py), which finds only"
        " the crudest",
    )
    add_target_flags(parser.add_argument_group("the model"))
    group = parser.add_argument_group("the answers")
    add_length(group, f"{PROBE_TOKENS}")
    add_samples(group, PROBE_SAMPLES)
    add_warm_drawing(group, 1.0)
    add_answer_files(group)
    return with_length(parsed(parser, argv), PROBE_TOKENS)


def judge_arguments(argv: list[str]) -> argparse.Namespace:
    """Parses the words behind `evaluate.py judge`. Raises UserError naming the flag that is wrong."""
    parser = parser_of(
        "judge",
        "Lets the model answer a file of prompts, and a Python function of yours says what you want to"
        " know of each answer: its style, its persona, its length, what a classifier thinks of it.",
    )
    group = parser.add_argument_group("what is asked")
    group.add_argument(
        "--data",
        metavar="FILE",
        required=True,
        help="prompts, in any file that generate.py reads; required",
    )
    add_prompt_file(group)
    group.add_argument(
        "--judge",
        metavar="FILE.py:FUNCTION",
        required=True,
        help="your function: called with question and answer, two texts, it returns True or False, a"
        " number, or a dict of these, {'formal': 0.8, 'polite': True}; the table has a row for each;"
        " required",
    )
    add_target_flags(parser.add_argument_group("the model"))
    group = parser.add_argument_group("the answers")
    add_length(group, f"{JUDGED_TOKENS}")
    add_samples(group, 1)
    add_drawing_flags(group)
    add_answer_files(group)
    return with_length(parsed(parser, argv), JUDGED_TOKENS)


# ---- what they share ----


def parser_of(name: str, description: str) -> argparse.ArgumentParser:
    """Returns the parser of one of them."""
    more = " Every number has a 95 % interval; --versus lays two models side by side, prompt by prompt."
    return argparse.ArgumentParser(
        prog=f"evaluate.py {name}",
        description=description + more,
        allow_abbrev=False,
    )


def add_prompt_file(group: argparse._ArgumentGroup) -> None:
    """Adds the flags that say how --data is read."""
    add = group.add_argument
    add(
        "--map",
        metavar="FILE.py:NAME",
        help="a Python function of yours that changes every record of --data before it is read, to a record"
        " of a known format, a list of them, or None to leave it out; default: none",
    )
    add(
        "--limit",
        type=int,
        metavar="N",
        help="ask N prompts only, drawn at random by --seed; the same ones of every model; default: all",
    )
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of what --limit draws, of the answers' random draws and of the bootstrap's; default:"
        " %(default)s",
    )
    add_skip_bad(group)
    add(
        "--system",
        metavar="TEXT",
        help="system message that is put before every conversation that has none; '': none; default: the"
        " one that the model or adapter was trained with here (train.py --system)",
    )


def add_length(group: argparse._ArgumentGroup, default: str) -> None:
    """Adds the flags of the answers' length and of how many are printed."""
    group.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"longest answer, in tokens; default: {default}",
    )
    group.add_argument(
        "--show",
        type=int,
        default=SHOWN_ANSWERS,
        metavar="K",
        help="how many answers of each model are printed, those that matter most first; 0: none; default:"
        " %(default)s",
    )
    group.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="answers that are generated at a time; the results are the same up to rounding; default:"
        f" {BATCH_SIZE[GENERATE]}. Lower it if memory runs out",
    )


def add_samples(group: argparse._ArgumentGroup, default: int) -> None:
    """Adds --samples."""
    group.add_argument(
        "--samples",
        type=int,
        default=default,
        metavar="K",
        help="answers to each prompt; needs --temperature above 0 if more than 1; default: %(default)s",
    )


def add_warm_drawing(group: argparse._ArgumentGroup, top_p: float) -> None:
    """Adds the flags of how tokens are drawn, where answers are drawn at random by default."""
    group.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="1: draw each token by the model's own probabilities; lower values give more predictable"
        " texts; 0, with --samples 1: always the most probable token; default: %(default)s",
    )
    group.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="draw from the smallest set of tokens with probability P (nucleus sampling); 1: from all;"
        f" default: {top_p:g}",
    )
    group.set_defaults(warm_top_p=top_p, top_k=0, min_p=0.0, repetition_penalty=1.0)


def add_answer_files(group: argparse._ArgumentGroup) -> None:
    """Adds the flags of answers in a file, and of the page."""
    add_saving_flags(group)
    group.add_argument(
        "--answers",
        nargs="+",
        metavar="FILE.jsonl",
        help="judge answers to --data that were saved by --out or by generate.py --data, without a model;"
        " two files are laid side by side, the base's first; default: the model answers",
    )
    add_html_flag(group)


def parsed(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parses the words. Raises UserError for what can be said to be wrong before a file is opened."""
    args = cli.parse_args(parser, argv, EVALUATE_NAMES)
    minimum = {"seed": 0, "limit": 1, "batch_size": 1, "max_new_tokens": 1, "show": 0, "samples": 1}
    check_minimum(args, minimum)
    if args.top_p is None:
        # Greedy answers have none.
        args.top_p = args.warm_top_p if args.temperature else 1.0
    check_drawing_arguments(args)
    if args.samples > 1 and args.temperature == 0:
        raise UserError(
            f"--samples {args.samples}: at --temperature 0 all samples are the same; add --temperature 1"
            " or --samples 1"
        )
    if args.overwrite and args.out is None:
        raise UserError("--overwrite: there is no --out to replace")
    if args.out is not None and Path(args.out).suffix not in (".jsonl", ".ndjson"):
        raise UserError(
            f"--out {args.out}: is written as JSON lines; give a name that ends in .jsonl"
        )
    if args.answers is not None:
        if len(args.answers) > 2:
            raise UserError("--answers: one file, or two to compare")
        for option in OF_ANSWERING:
            if getattr(args, option) not in (None, False):
                flag = f"--{option.replace('_', '-')}"
                raise UserError(f"{flag}: is for a model; --answers judges saved answers")
    return args


def with_length(args: argparse.Namespace, default: int) -> argparse.Namespace:
    """Returns the options with --max-new-tokens, which is `default` where it was not given."""
    if args.max_new_tokens is None:
        args.max_new_tokens = default
    return args
