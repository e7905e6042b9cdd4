"""Counts what people judged on the pages of `evaluate.py pairs`: who is preferred, how sure that
is, and whether the raters agree.

    python evaluate.py tally judgements-ann.json judgements-bob.json

The unit is the pair. Several raters' judgements of one pair are not independent of each other, so
they are averaged before an interval is computed: otherwise ten raters of ten pairs would look as
sure as one rater of a hundred.

Shares have Wilson's interval (Wilson 1927), means and differences Student's t, both at 95 %.
Agreement is Cohen's kappa for two raters (scikit-learn), Fleiss' kappa for more (statsmodels) and
Krippendorff's alpha (krippendorff), which takes pairs that some have not judged.
"""

import argparse
import base64
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from common import cli, console
from common.errors import UserError, printable, read_json
from evals.intervals import wilson_interval
from evals.pairwise import JUDGEMENTS_FORMAT, LONGEST_MODEL_NAME

# What a rater may give from 1 to 5, and whether the answer did what was asked.
SCALES = ("accuracy", "helpfulness", "fluency")
# Of a choice, as the share of the second model.
CHOICE_SCORES = {"A": 0.0, "tie": 0.5, "B": 1.0}
# Below this probability a rater's preference for one side is warned of.
SIDE_BIAS_P = 0.05
NO_NUMBER = "-"
# No page has more; a damaged file might say so.
MOST_IDENTICAL = 10_000_000


class JudgedPage(NamedTuple):
    """What the judgements say of their page.

    number: the page's hash. names: of the models, A and B. sides: whose answer is on the left of
    each pair. identical: pairs whose answers are the same, which are not on the page.
    """

    number: str
    names: tuple[str, str]
    sides: str
    identical: int


class Judgement(NamedTuple):
    """What a rater said of a pair.

    choice: "A", "B" or "tie", or None. chose_left: None for a tie. ratings: {scale: (of A, of B)}
    and "success" from 0 to 1, None where there is none. at: when, in milliseconds.
    """

    choice: str | None
    chose_left: bool | None
    ratings: dict[str, tuple[float | None, float | None]]
    at: float


@dataclass
class Raters:
    """The judgements of all raters of a page: {rater: {pair, from 0 on: Judgement}}."""

    page: JudgedPage
    judgements: dict[str, dict[int, Judgement]]

    def choices(self, rater: str) -> dict[int, str]:
        """Returns {pair: choice} of the pairs for which the rater made one."""
        chosen = {}
        for pair, judgement in self.judgements[rater].items():
            if judgement.choice is not None:
                chosen[pair] = judgement.choice
        return chosen


class TallySection(NamedTuple):
    """A part of the result: a table with its heading, and lines below it."""

    heading: str
    rows: list[list[str]]
    notes: list[str]


def tally_arguments(argv: list[str]) -> argparse.Namespace:
    """Parses the words behind `evaluate.py tally`. Raises UserError naming the flag that is wrong."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py tally",
        description="Counts the judgements that people exported from a page of `evaluate.py pairs`:"
        " win rates, ratings, and how far the raters agree.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="judgements.json",
        help="files that the page's Export has saved, of one rater or more; all of one page: those of"
        " another page than the first file's are left out, with a warning",
    )
    parser.add_argument(
        "--html", type=Path, metavar="PAGE", help="write the result as an HTML page as well"
    )
    return cli.parse_args(parser, argv)


def print_tally(args: argparse.Namespace) -> None:
    """Prints the result, and writes it as a page if --html is given."""
    if args.html is not None:
        from evals.report import check_report_file

        check_report_file(args.html, RESULT_PAGE_MARK, "a tally")
    raters, warnings = read_raters(args.files)
    a, b = raters.page.names
    title = f"{b} against {a}"
    num_pairs = with_noun(len(raters.page.sides), "pair")
    num_raters = with_noun(len(raters.judgements), "rater")
    intro = f"page {raters.page.number}: {num_pairs}, {num_raters}; intervals are at 95 %"
    warnings += missing_pairs(raters)
    sides, bias = side_section(raters)
    warnings += bias
    sections = [win_section(raters), rating_section(raters), sides]
    if len(raters.judgements) > 1:
        sections.append(agreement_section(raters))
    print(f"{title}; {intro}")
    for section in sections:
        print(f"\n{section.heading}\n{console.table(section.rows)}")
        for note in section.notes:
            print(note)
    if warnings:
        print()
    for warning in warnings:
        print(f"WARNING: {warning}")
    if args.html is not None:
        write_result_page(args.html, title, intro, sections, warnings)
        print(f"\npage      {args.html}")


def with_noun(number: int, noun: str) -> str:
    """Returns a number with its noun: 1 rater, 2 raters."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


# ---- the files ----


def read_raters(files: list[Path]) -> tuple[Raters, list[str]]:
    """Reads judgements. Returns those of the first file's page, and warnings.

    Raises UserError for a file that holds none, or damaged ones.
    """
    warnings = []
    raters: Raters | None = None
    first_key = ""
    files_of: dict[str, list[str]] = {}
    for file in files:
        content = read_json(file)
        page = read_page(content, file)
        if raters is None:
            raters = Raters(page, {})
            first_key = content["key"]
        if page.number != raters.page.number or content["key"] != first_key:
            warnings.append(
                f"{file}: holds judgements of another page ({page.number}) than {files[0]}"
                f" ({raters.page.number}), left out"
            )
            continue
        name = rater_name(content, file)
        found = read_judgements(content, page, file)
        if name in raters.judgements:
            warnings.append(
                f"rater {name} is in {' and '.join(files_of[name])} and in {file}: of each pair the"
                " latest judgement counts; if these are different people, give one another `rater`"
            )
        own = raters.judgements.setdefault(name, {})
        files_of.setdefault(name, []).append(str(file))
        for pair, judgement in found.items():
            if pair not in own or judgement.at > own[pair].at:
                own[pair] = judgement
    assert raters is not None  # The parser wants at least one file.
    silent = [name for name, own in raters.judgements.items() if not own]
    for name in silent:
        del raters.judgements[name]
        warnings.append(f"{name} judged nothing, left out")
    if not raters.judgements:
        raise UserError(f"{files[0]}: holds no judgement of any pair")
    return raters, warnings


def read_page(content: dict, file: Path) -> JudgedPage:
    """Returns the page that a file of judgements is of. Raises UserError where it is none."""
    if content.get("format") != JUDGEMENTS_FORMAT:
        problem = "holds no judgements that the Export of a page of `evaluate.py pairs` has saved"
        raise UserError(f"{file}: {problem}")
    try:
        key = json.loads(base64.b64decode(content["key"], validate=True))
        a, b = key["names"]
        # Names go to the terminal.
        names = (printable(str(a))[:LONGEST_MODEL_NAME], printable(str(b))[:LONGEST_MODEL_NAME])
        number = printable(str(content["page"]))[:LONGEST_MODEL_NAME]
        page = JudgedPage(number, names, key["sides"], int(key["identical"]))
        is_whole = set(page.sides) <= {"A", "B"} and len(page.sides) == content["pairs"] > 0
        is_whole = is_whole and 0 <= page.identical <= MOST_IDENTICAL
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        is_whole = False
    if not is_whole:
        raise UserError(
            f"{file}: its `key` is damaged, so nobody knows whose answer was on which side"
        )
    return page


def rater_name(content: dict, file: Path) -> str:
    """Returns the rater's name. Raises UserError where there is none."""
    name = content.get("rater")
    if not isinstance(name, str) or not name.strip():
        raise UserError(
            f"{file}: has no name of a rater as `rater`; type one on the page, or there"
        )
    # It goes to the terminal.
    return printable(name.strip())


def read_judgements(content: dict, page: JudgedPage, file: Path) -> dict[int, Judgement]:
    """Returns {pair, from 0 on: Judgement} of a file. Raises UserError naming the one that is no
    judgement, is of no pair of the page, or is there twice."""
    entries = content.get("judgements")
    if not isinstance(entries, list):
        raise UserError(f"{file}: has no list as `judgements`")
    found: dict[int, Judgement] = {}
    for number, entry in enumerate(entries, 1):
        where = f"{file} judgement {number}"
        pair = entry.get("pair") if isinstance(entry, dict) else None
        if type(pair) is not int or not 1 <= pair <= len(page.sides):
            raise UserError(f"{where}: `pair` must be a number from 1 to {len(page.sides):,}")
        if pair - 1 in found:
            raise UserError(
                f"{where}: pair {pair} was judged already in this file; delete one of both"
            )
        judgement = read_judgement(entry, page.sides[pair - 1], where)
        if judgement is not None:
            found[pair - 1] = judgement
    return found


def read_judgement(entry: dict, left: str, where: str) -> Judgement | None:
    """Returns a judgement, with A and B in place of left and right; None if nothing was said.

    left: whose answer is on the left.
    """
    choice = entry.get("choice")
    if choice not in ("left", "right", "tie", None):
        raise UserError(f"{where}: `choice` must be left, right, tie or null")
    order = ("left", "right") if left == "A" else ("right", "left")
    ratings: dict[str, tuple[float | None, float | None]] = {}
    said_something = choice is not None
    for scale in (*SCALES, "success"):
        values = []
        for side in order:
            value = rating_of(entry, scale, side, where)
            said_something = said_something or value is not None
            values.append(value)
        ratings[scale] = (values[0], values[1])
    if not said_something:
        return None
    models = {"tie": "tie", order[0]: "A", order[1]: "B", None: None}
    chose_left = None if choice in ("tie", None) else choice == "left"
    at = entry.get("at", 0)
    if type(at) not in (int, float) or not math.isfinite(at):
        raise UserError(f"{where}: `at` must be a time in milliseconds")
    return Judgement(models[choice], chose_left, ratings, at)


def rating_of(entry: dict, scale: str, side: str, where: str) -> float | None:
    """Returns a rating from 1 to 5, or success as 0 or 1; None where there is none. Raises UserError
    for anything else."""
    if scale == "success":
        by_side = entry.get("success") or {}
        value = by_side.get(side) if isinstance(by_side, dict) else by_side
        if value is None or isinstance(value, bool):
            return None if value is None else float(value)
        raise UserError(f"{where}: `success` of {side} must be true, false or left out")
    value = entry.get("ratings") or {}
    for name in (side, scale):
        value = value.get(name) if isinstance(value, dict) else value
    if value is None or (type(value) is int and 1 <= value <= 5):
        return value
    raise UserError(f"{where}: {scale} of {side} must be a whole number from 1 to 5, or left out")


def missing_pairs(raters: Raters) -> list[str]:
    """Returns a warning for each rater who has not judged all pairs."""
    warnings = []
    for rater in raters.judgements:
        judged = len(raters.choices(rater))
        missing = len(raters.page.sides) - judged
        if missing:
            pairs = with_noun(len(raters.page.sides), "pair")
            warnings.append(f"{rater} judged {judged:,} of {pairs}; {missing:,} missing")
    return warnings


# ---- intervals ----


def interval_of_mean(values: list[float]) -> tuple[float, float] | None:
    """Returns the 95 % interval of the mean by Student's t; None for a single value."""
    import numpy as np
    from scipy import stats

    if len(values) < 2:
        return None
    standard_error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * standard_error
    mean = float(np.mean(values))
    return mean - half, mean + half


def share_text(total: float, count: int) -> str:
    """Returns a share with its interval, as "62.5 % (45.1 to 77.3)"."""
    if count == 0:
        return NO_NUMBER
    low, high = wilson_interval(total, count)
    return f"{100 * total / count:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def mean_text(values: list[float], spec: str, scale: float = 1) -> str:
    """Returns a mean with its interval, as "3.42 (3.10 to 3.74)". spec: of the numbers' format."""
    if not values:
        return NO_NUMBER
    text = format(scale * sum(values) / len(values), spec)
    interval = interval_of_mean(values)
    if interval is None:
        return text
    low, high = interval
    return f"{text} ({format(scale * low, spec)} to {format(scale * high, spec)})"


# ---- the sections ----


def win_section(raters: Raters) -> TallySection:
    """Returns how often each model was preferred, by each rater and by all."""
    a, b = raters.page.names
    rows = [["", "judged", f"{a} wins", "ties", f"{b} wins"]]
    rows[0] += [f"{b} of decided pairs", "ties as halves"]
    for rater in raters.judgements:
        scores = [CHOICE_SCORES[choice] for choice in raters.choices(rater).values()]
        rows.append(win_row(rater, scores))
    scores = mean_scores(raters)
    notes = []
    if len(raters.judgements) > 1:
        rows.append(win_row("all raters, pair by pair", scores))
        notes.append(
            "All raters: a pair is won by the model that more of its raters prefer, else it is a tie."
        )
    if raters.page.identical:
        label = f"with {with_noun(raters.page.identical, 'identical pair')} as ties"
        rows.append(win_row(label, scores + [0.5] * raters.page.identical))
    wins = sum(score > 0.5 for score in scores)
    losses = sum(score < 0.5 for score in scores)
    if wins + losses:
        p = binomial_p(wins, wins + losses)
        notes.append(
            f"If both were equally good, {max(wins, losses):,} or more of {wins + losses:,} decided"
            f" pairs for one of them would come about with p = {p:.2g} (two-sided sign test)."
        )
    return TallySection("Which answer is better", rows, notes)


def mean_scores(raters: Raters) -> list[float]:
    """Returns for each pair with a choice the mean of its raters: 0 for A, 1 for B."""
    by_pair: dict[int, list[float]] = {}
    for rater in raters.judgements:
        for pair, choice in raters.choices(rater).items():
            by_pair.setdefault(pair, []).append(CHOICE_SCORES[choice])
    return [sum(scores) / len(scores) for _, scores in sorted(by_pair.items())]


def win_row(label: str, scores: list[float]) -> list[str]:
    """Returns a row of the win table. scores: of each pair, from 0 (A is better) to 1 (B)."""
    wins = sum(score > 0.5 for score in scores)
    losses = sum(score < 0.5 for score in scores)
    ties = len(scores) - wins - losses
    row = [label, f"{len(scores):,}", f"{losses:,}", f"{ties:,}", f"{wins:,}"]
    return [*row, share_text(wins, wins + losses), share_text(sum(scores), len(scores))]


def binomial_p(successes: int, count: int) -> float:
    """Returns the probability of a result as unlikely as this where both are equally likely."""
    from scipy import stats

    return float(stats.binomtest(successes, count, 0.5).pvalue)


def rating_section(raters: Raters) -> TallySection:
    """Returns the mean ratings and the share of tasks that were done, of each model and by how much
    they differ on the pairs for which both were rated."""
    a, b = raters.page.names
    rows = [["", "pairs with both rated", a, b, f"{b} minus {a}"]]
    for scale in SCALES:
        of_a, of_b, changes = mean_ratings(raters, scale)
        row = [f"{scale}, 1 to 5", f"{len(changes):,}"]
        row += [mean_text(of_a, ".2f"), mean_text(of_b, ".2f"), mean_text(changes, "+.2f")]
        rows.append(row)
    of_a, of_b, changes = mean_ratings(raters, "success")
    row = ["did what was asked, %", f"{len(changes):,}"]
    row += [share_text(sum(of_a), len(of_a)), share_text(sum(of_b), len(of_b))]
    rows.append([*row, mean_text(changes, "+.1f", 100)])
    notes = [
        "Each number is of the pairs that were rated for it; those of several raters are averaged."
    ]
    if raters.page.identical:
        identical = with_noun(raters.page.identical, "pair")
        notes.append(
            f"Not rated: {identical} with identical answers (--keep-identical shows them)."
        )
    return TallySection("Ratings", rows, notes)


def mean_ratings(raters: Raters, scale: str) -> tuple[list[float], list[float], list[float]]:
    """Returns the ratings of A and of B, and B minus A where a rater gave both: a number for each
    pair, the mean of its raters."""
    lists: tuple[dict[int, list[float]], ...] = ({}, {}, {})
    for own in raters.judgements.values():
        for pair, judgement in own.items():
            of_a, of_b = judgement.ratings[scale]
            change = None if of_a is None or of_b is None else of_b - of_a
            for by_pair, value in zip(lists, (of_a, of_b, change), strict=True):
                if value is not None:
                    by_pair.setdefault(pair, []).append(value)
    means = []
    for by_pair in lists:
        means.append([sum(values) / len(values) for values in by_pair.values()])
    return means[0], means[1], means[2]


def side_section(raters: Raters) -> tuple[TallySection, list[str]]:
    """Returns how often the left and the right answer was chosen, and a warning for each rater who
    prefers a side. Each model is on the left in half of the pairs, so whoever judges by the answers
    chooses both sides about as often."""
    rows = [["", "left", "right", "p"]]
    warnings = []
    for rater, own in raters.judgements.items():
        chosen = [each.chose_left for each in own.values() if each.chose_left is not None]
        left = sum(chosen)
        right = len(chosen) - left
        p = binomial_p(left, len(chosen)) if chosen else 1.0
        rows.append([rater, f"{left:,}", f"{right:,}", f"{p:.2g}"])
        if p < SIDE_BIAS_P:
            side = "left" if left > right else "right"
            warnings.append(
                f"{rater} chose the {side} answer in {max(left, right):,} of {len(chosen):,} decided"
                f" pairs (p = {p:.2g}), though each model is on both sides equally often: perhaps a"
                " preference for the side"
            )
    return TallySection("Sides (binomial test of left against right)", rows, []), warnings


# ---- agreement ----


def agreement_section(raters: Raters) -> TallySection:
    """Returns how far the raters agree: on the better answer, and on each scale."""
    names = list(raters.judgements)
    choices = {name: raters.choices(name) for name in names}
    shared = sorted(set.intersection(*(set(each) for each in choices.values())))
    rows = [["", "of", "value"]]
    by_pair = [[choices[name][pair] for name in names] for pair in shared]
    pairs = with_noun(len(shared), "pair")
    same = sum(len(set(each)) == 1 for each in by_pair)
    rows.append(
        ["all choose the same", pairs, f"{100 * same / len(shared):.1f} %" if shared else NO_NUMBER]
    )
    if len(names) == 2:
        rows.append(["Cohen's kappa", pairs, kappa_text(cohen_kappa(by_pair))])
    else:
        rows.append(["Fleiss' kappa", pairs, kappa_text(fleiss_kappa(by_pair))])
    all_pairs = range(len(raters.page.sides))
    table = [[choice_code(choices[name].get(pair)) for pair in all_pairs] for name in names]
    rows.append(alpha_row("better answer, Krippendorff's alpha", table, "nominal"))
    for scale in (*SCALES, "success"):
        table = []
        for name in names:
            own = raters.judgements[name]
            # An answer is a unit: A's and B's of each pair.
            values: list[float | None] = []
            for pair in all_pairs:
                values += own[pair].ratings[scale] if pair in own else (None, None)
            table.append(values)
        level = "nominal" if scale == "success" else "ordinal"
        rows.append(alpha_row(f"{scale}, Krippendorff's alpha ({level})", table, level))
    note = "1: they always agree; 0: as often as by chance; below 0: less often. Kappas: pairs that all judged."
    return TallySection("Agreement between raters", rows, [note])


def choice_code(choice: str | None) -> float | None:
    return None if choice is None else CHOICE_SCORES[choice]


def kappa_text(value: float | None) -> str:
    """Returns a number of agreement; "undefined" where chance alone makes all agree."""
    return "undefined" if value is None else f"{value:.3f}"


def cohen_kappa(by_pair: list[list[str]]) -> float | None:
    """Returns Cohen's kappa of two raters' choices (Cohen 1960); None where both always made the
    same single choice, or none, so that it is 0 / 0."""
    from sklearn.metrics import cohen_kappa_score

    if len({choice for each in by_pair for choice in each}) < 2:
        return None
    first, second = zip(*by_pair, strict=True)
    return float(cohen_kappa_score(first, second))


def fleiss_kappa(by_pair: list[list[str]]) -> float | None:
    """Returns Fleiss' kappa of three or more raters' choices (Fleiss 1971); None where all made the
    same single choice, or none."""
    from statsmodels.stats import inter_rater

    if len({choice for each in by_pair for choice in each}) < 2:
        return None
    counts, _ = inter_rater.aggregate_raters(by_pair)
    return float(inter_rater.fleiss_kappa(counts))


def alpha_row(label: str, table: list[list[float | None]], level: str) -> list[str]:
    """Returns a row with Krippendorff's alpha. table: for each rater a number for each unit, or
    None. level: of measurement."""
    units = 0
    for column in zip(*table, strict=True):
        units += sum(value is not None for value in column) > 1
    return [label, with_noun(units, "unit"), kappa_text(krippendorff_alpha(table, level))]


def krippendorff_alpha(table: list[list[float | None]], level: str) -> float | None:
    """Returns Krippendorff's alpha (Krippendorff 2011); None where fewer than two values occur among
    the units that two raters or more judged."""
    import krippendorff
    import numpy as np

    values = np.array(table, dtype=float)
    paired = values[:, np.sum(~np.isnan(values), axis=0) > 1]
    if len(np.unique(paired[~np.isnan(paired)])) < 2:
        return None
    return float(krippendorff.alpha(reliability_data=paired, level_of_measurement=level))


# ---- the page of the result ----

# Only a file with this text near its beginning is a page of this program, which --html may replace.
RESULT_PAGE_MARK = '<meta name="generator" content="plaintune tally">'


def write_result_page(
    file: Path, title: str, intro: str, sections: list[TallySection], warnings: list[str]
) -> None:
    """Writes the result as one HTML file that loads nothing (evals/tally.html.jinja)."""
    from common.files import atomic_file
    from evals.pairwise import csp_hash
    from evals.report import PAGES_FOLDER, page_template

    style = (PAGES_FOLDER / "tally.css").read_text(encoding="ascii")
    page = page_template("tally.html.jinja").render(
        mark=RESULT_PAGE_MARK,
        title=title,
        intro=intro,
        sections=sections,
        warnings=warnings,
        style=style,
        style_hash=csp_hash(style),
    )
    with atomic_file(file) as tmp:
        tmp.write_text(page, encoding="utf-8", errors="backslashreplace")
