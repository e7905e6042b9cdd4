"""The options of `evaluate.py report`, apart from what they mean, so that --help is quick."""

import argparse
from pathlib import Path

from common import cli
from common.errors import UserError


def report_arguments(argv: list[str]) -> argparse.Namespace:
    """Parses the words behind `evaluate.py report`. Raises UserError naming the word that is wrong."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py report",
        description="Lays runs of train.py side by side: what came of each, in which settings they differ, and"
        " with --html a page with their curves and answers. Of a single run the page is the one that train.py"
        " writes into its folder, made anew: also of a run that still goes on, or was killed.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="folders of runs, as runs/mine (--out of train.py)"
    )
    parser.add_argument(
        "--html",
        metavar="FILE",
        help="write the page, as runs.html; one that is there is replaced if it is such a page; default: no page",
    )
    args = cli.parse_args(parser, argv)
    runs = [Path(run) for run in args.runs]
    places = [run.resolve() for run in runs]
    for run, place in zip(runs, places, strict=True):
        if places.count(place) > 1:
            raise UserError(f"{run}: is named twice")
    args.runs = runs
    return args
