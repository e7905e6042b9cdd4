"""The options of `evaluate.py continual`, apart from what they mean, so that --help is quick."""

import argparse

from common import cli
from common.errors import UserError
from common.known_names import EVALUATE_NAMES
from common.script_flags import add_loading_flags
from evals.arguments import add_html_flag, check_minimum
from evals.compare_arguments import add_reading_flags, add_size_flags
from evals.table import EVALUATIONS, GENERATE


def continual_arguments(argv: list[str]) -> argparse.Namespace:
    """Parses the words behind `evaluate.py continual`. Raises UserError naming the flag that is
    wrong."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py continual",
        description="Continual learning: after trainings on several tasks, one after the other, measures"
        " every task after every training, and prints the matrix with average accuracy, backward and"
        " forward transfer, and forgetting (Lopez-Paz and Ranzato 2017; Chaudhry et al. 2018).",
        allow_abbrev=False,
    )
    add_trained_models(parser.add_argument_group("the models"))
    add_task_flags(parser.add_argument_group("what is measured"))
    group = parser.add_argument_group("how the models are loaded")
    # It only adds arguments, which a group can do as well as a parser.
    add_loading_flags(group)  # type: ignore[arg-type]
    add_size_flags(parser.add_argument_group("answers, speed and memory"))
    args = cli.parse_args(parser, argv, EVALUATE_NAMES)
    check_continual_arguments(args)
    return args


def add_trained_models(group: argparse._ArgumentGroup) -> None:
    """Adds the models, in the order of the trainings."""
    group.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="what each training left, in their order: the folder of a run of train.py, of which final/"
        " is taken, an adapter folder, or a model",
    )
    group.add_argument(
        "--base",
        metavar="M",
        help="the model before the first training, for the first row and forward transfer; default: the"
        " one that the first RUN was trained from; none: leave it out",
    )
    group.add_argument(
        "--model",
        metavar="M",
        help="the model that adapters are put on, if the one that they were made on was moved; default:"
        " the one that they name",
    )


def add_task_flags(group: argparse._ArgumentGroup) -> None:
    """Adds the tasks, and what is measured on them."""
    answering = [name for name, row in EVALUATIONS.items() if row.kind == GENERATE]
    add = group.add_argument
    add(
        "--data",
        dest="files",
        nargs="+",
        required=True,
        metavar="FILE",
        help="examples of each task that were not trained on, in the order of the trainings, as many as"
        " RUNs, in any format that train.py reads",
    )
    add(
        "--metric",
        default="loss",
        choices=["loss", *answering],
        metavar="{" + ",".join(["loss", *answering]) + "}",
        help="loss of the references, or a score of the model's own answers (for accuracy: exact);"
        " default: %(default)s",
    )
    add_reading_flags(group, "of what --limit draws", "the last RUN")
    add_html_flag(group)


def check_continual_arguments(args: argparse.Namespace) -> None:
    """Raises UserError for what can be said to be wrong before a file is opened."""
    minimum = {"seed": 0, "limit": 1, "batch_size": 1, "seq_len": 2, "max_new_tokens": 1}
    check_minimum(args, minimum)
    if len(args.runs) != len(args.files):
        counts = f"{len(args.runs)} and {len(args.files)}"
        raise UserError(
            f"continual: wants a file of --data for each RUN, the task of that training; there are {counts}"
        )
    if len(args.runs) < 2:
        raise UserError(
            "continual: is about two trainings or more; `evaluate.py compare` is for one"
        )
    if len(set(args.files)) < len(args.files):
        raise UserError(f"--data {' '.join(args.files)}: name each file once")
    for option, metric in (("max_new_tokens", True), ("seq_len", False)):
        if getattr(args, option) is not None and (args.metric == "loss") == metric:
            raise UserError(f"--{option.replace('_', '-')}: --metric {args.metric} does not use it")
