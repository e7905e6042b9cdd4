"""The options of `evaluate.py pass-at-k`, beside those that it shares with the other evaluations."""

import argparse

from common.errors import UserError

# The default of --max-new-tokens: room for every solution of HumanEval and MBPP, and an explanation.
CODE_TOKENS = 512
# The defaults of --time-limit, in seconds (that of Chen et al. 2021's harness), and --memory-limit,
# in MB.
TIME_LIMIT, MEMORY_LIMIT = 3, 1024
# Of --memory-limit: Python itself needs so many MB.
LEAST_MEMORY = 64
ALLOW = "--allow-code-execution"
# Flags of this evaluation alone.
OF_PROGRAMS = ("allow_code_execution", "k", "complete", "time_limit", "memory_limit")


def add_program_flags(group: argparse._ArgumentGroup) -> None:
    """Adds the flags of programs that the model writes."""
    add = group.add_argument
    add(
        ALLOW,
        action="store_true",
        help="run the programs that the model has written. Required, since nobody has looked at them:"
        " each runs by itself in Linux namespaces, without a network, without your files and with"
        " limits, and nothing runs where the kernel refuses that; default: refuse",
    )
    add(
        "--k",
        metavar="K,...",
        help="pass@k is the probability that at least one of k answers to a problem passes its tests;"
        " several values are separated by commas, each at most --samples, and more samples make it"
        " more exact; default: 1. The paper draws with --temperature 0.2 for pass@1, 0.8 for pass@100",
    )
    add(
        "--complete",
        action="store_true",
        help="let the model continue the beginning of the program as a text, without its chat"
        " template, up to the paper's stop sequences, for base models; default: ask it as a user, and"
        " take the code block out of its answer",
    )
    add(
        "--time-limit",
        type=int,
        metavar="SECONDS",
        help="processor time of each program; one that only waits is ended after four times as long;"
        f" default: {TIME_LIMIT}",
    )
    add(
        "--memory-limit",
        type=int,
        metavar="MB",
        help=f"memory of each program; as many programs as cores run at a time; default: {MEMORY_LIMIT}",
    )


def check_program_arguments(args: argparse.Namespace) -> None:
    """Fills in the defaults; args.k becomes a list of numbers. Raises UserError for a value that is
    out of its range, and where programs may not be run."""
    if not args.allow_code_execution:
        raise UserError(
            "pass-at-k runs programs that the model writes, which nobody has looked at; give"
            f" {ALLOW} to run them, each shut off from your files and the network"
        )
    if args.data is None:
        raise UserError("pass-at-k: the tests are in the file of problems; add --data FILE")
    for option in ("template", "date", "system"):
        if args.complete and getattr(args, option):
            raise UserError(
                f"--{option}: is for conversations; --complete continues the problem as a text"
            )
    check_ranges(args)
    if args.answers is None and max(args.k) > (args.samples or 1):
        raise UserError(
            f"--k {max(args.k)}: needs at least {max(args.k)} answers to each problem; give --samples"
            f" {max(args.k)} or more, with a --temperature above 0"
        )


def check_ranges(args: argparse.Namespace) -> None:
    """Fills in the defaults, and raises UserError for a number that is out of its range."""
    defaults = {"time_limit": TIME_LIMIT, "memory_limit": MEMORY_LIMIT, "k": "1"}
    for option, value in defaults.items():
        if getattr(args, option) is None:
            setattr(args, option, value)
    if args.time_limit < 1:
        raise UserError(f"--time-limit {args.time_limit}: must be 1 or more")
    if args.memory_limit < LEAST_MEMORY:
        raise UserError(f"--memory-limit {args.memory_limit}: must be {LEAST_MEMORY} or more")
    words = args.k.split(",")
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise UserError(f"--k {args.k}: whole numbers above 0 are wanted, separated by commas")
    args.k = sorted({int(word) for word in words})
