"""`evaluate.py tally`: shares, means, agreement and side bias against independent computations; what it warns of."""

import base64
import json
import math
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from support.helpers import command

import evaluate
from common.errors import UserError
from evals import tally
from evals.pairwise import JUDGEMENTS_FORMAT

CHOICES = ["A", "B", "tie"]


def write_judgements(path: Path, choices: list, sides: str = "", rater: str = "ann", **changes) -> Path:
    """A file as the page exports it. choices: of each pair left, right, tie, or None for one that was not judged, or a
    whole judgement. sides: whose answer is on the left."""
    sides = sides or "AB" * (len(choices) // 2)
    key = {"names": ["base", "tuned"], "sides": sides, "identical": changes.pop("identical", 0), "records": []}
    entries = []
    for pair, choice in enumerate(choices, 1):
        if isinstance(choice, str):
            choice = {"choice": choice, "ratings": {"left": {}, "right": {}}, "success": {}, "at": pair}
        if choice is not None:
            entries.append({"pair": pair} | choice)
    content = {"format": JUDGEMENTS_FORMAT, "page": "0123456789abcdef", "pairs": len(sides), "rater": rater}
    content["key"] = base64.b64encode(json.dumps(key).encode()).decode()
    path.write_text(json.dumps(content | {"judgements": entries} | changes))
    return path


def said_by(monkeypatch, capsys, *words) -> str:
    out, err, code = command(evaluate, monkeypatch, capsys, "tally", *words)
    assert (err, code) == ("", 0)
    return out


# ---- the numbers ----


def test_shares_have_wilsons_interval():
    source = random.Random(1)
    cases = [(0, 1), (1, 1), (0, 50), (50, 50)]
    cases += [(source.randint(0, n), n) for n in (source.randint(1, 500) for _ in range(200))]
    for total, count in cases:
        expected = stats.binomtest(total, count).proportion_ci(0.95, "wilson")
        assert tally.wilson_interval(total, count) == pytest.approx((expected.low, expected.high), abs=1e-12)
    # That function takes whole numbers only, and no halves.
    for total, count in ((0.5, 1), (10.5, 40), (7, 9)):
        assert tally.wilson_interval(total, count) == pytest.approx(plain_wilson(total, count), abs=1e-12)


def plain_wilson(total: float, count: int) -> tuple[float, float]:
    """Wilson (1927): the shares from which `total` of `count` is 1.96 standard errors away."""
    z = stats.norm.ppf(0.975)
    p = total / count
    center = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return center - half, center + half


def share(total: float, count: int) -> str:
    low, high = plain_wilson(total, count)
    return f"{100 * total / count:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def test_means_have_students_interval():
    source = random.Random(2)
    for _ in range(200):
        values = [source.choice([1, 2, 3, 4, 5, 2.5]) for _ in range(source.randint(2, 60))]
        if len(set(values)) == 1:
            continue
        expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert tally.interval_of_mean(values) == pytest.approx((expected.low, expected.high), abs=1e-10)
    assert tally.interval_of_mean([3.0] * 5) == (3, 3)
    assert tally.interval_of_mean([3.0]) is None
    assert tally.mean_text([3.0], ".2f") == "3.00" and tally.mean_text([], ".2f") == "-"


def plain_cohen(first, second) -> float:
    """Cohen (1960), equation 1."""
    n = len(first)
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / n
    chance = sum(Counter(first)[c] * Counter(second)[c] for c in CHOICES) / n**2
    return (observed - chance) / (1 - chance)


def plain_fleiss(by_pair) -> float:
    """Fleiss (1971), equations 1 to 7."""
    raters = len(by_pair[0])
    agree = [sum(k * (k - 1) for k in Counter(each).values()) / (raters * (raters - 1)) for each in by_pair]
    shares = Counter(choice for each in by_pair for choice in each)
    chance = sum((k / (raters * len(by_pair))) ** 2 for k in shares.values())
    return (sum(agree) / len(agree) - chance) / (1 - chance)


def plain_alpha(table, level: str) -> float:
    """Krippendorff (2011), by the sum over pairs of values: 1 - observed / expected disagreement."""
    units = [[value for value in column if value is not None] for column in zip(*table, strict=True)]
    units = [values for values in units if len(values) > 1]
    counts = Counter(value for values in units for value in values)
    n = sum(counts.values())

    def distance(a, b) -> float:
        if level == "nominal":
            return float(a != b)
        low, high = min(a, b), max(a, b)
        between = sum(count for value, count in counts.items() if low <= value <= high)
        return (between - (counts[a] + counts[b]) / 2) ** 2

    observed = sum(distance(a, b) / (len(values) - 1) for values in units for a in values for b in values) / n
    expected = sum(counts[a] * counts[b] * distance(a, b) for a in counts for b in counts) / (n * (n - 1))
    return 1 - observed / expected


def random_table(source, raters: int, units: int, values, missing: float) -> list[list]:
    truth = [source.choice(values) for _ in range(units)]
    table = []
    for _ in range(raters):
        row = [each if source.random() < 0.5 else source.choice(values) for each in truth]
        table.append([None if source.random() < missing else value for value in row])
    return table


@pytest.mark.parametrize("seed", range(4))
def test_agreement_equals_its_definition(seed):
    source = random.Random(seed)
    compared = 0
    for _ in range(60):
        raters, units = source.randint(2, 5), source.randint(3, 30)
        choices = random_table(source, raters, units, CHOICES, 0)
        by_pair = [list(each) for each in zip(*choices, strict=True)]
        if len({choice for each in by_pair for choice in each}) > 1:
            assert tally.fleiss_kappa(by_pair) == pytest.approx(plain_fleiss(by_pair))
        if len({*choices[0], *choices[1]}) > 1:
            assert tally.cohen_kappa([each[:2] for each in by_pair]) == pytest.approx(plain_cohen(*choices[:2]))
        for level, values in (("nominal", [0.0, 0.5, 1.0]), ("ordinal", [1, 2, 3, 4, 5])):
            table = random_table(source, raters, units, values, 0.3)
            ours = tally.krippendorff_alpha(table, level)
            if ours is not None:
                assert ours == pytest.approx(plain_alpha(table, level))
                compared += 1
    assert compared > 100


def test_agreement_is_undefined_where_there_is_nothing_to_disagree_on():
    assert tally.cohen_kappa([["A", "A"]] * 3) is None and tally.cohen_kappa([]) is None
    assert tally.fleiss_kappa([["tie", "tie", "tie"]]) is None and tally.fleiss_kappa([]) is None
    assert tally.krippendorff_alpha([[1, 1, None], [1, 1, 2]], "ordinal") is None
    assert tally.krippendorff_alpha([[1, None], [None, 1]], "nominal") is None
    assert tally.kappa_text(None) == "undefined"


# ---- what is printed ----


def test_one_raters_judgements(tmp_path, monkeypatch, capsys):
    rated = {
        "choice": "left",
        "ratings": {"left": {"accuracy": 5, "fluency": 4}, "right": {"accuracy": 2}},
        "success": {"left": True, "right": False},
        "at": 1,
    }
    # base is on the left of pairs 1, 3, 5 and 7: it wins 1 and 5, tuned wins 2, 3, 4, 6 and 8.
    choices = [rated, "left", "right", "left", "left", "left", "tie", "left"]
    file = write_judgements(tmp_path / "ann.json", choices, identical=2)
    out = said_by(monkeypatch, capsys, file)
    lines = [re.split(r"  +", line) for line in out.splitlines()]
    assert out.startswith("tuned against base; page 0123456789abcdef: 8 pairs, 1 rater; intervals are at 95 %\n")
    assert ["ann", "8", "2", "1", "5", share(5, 7), share(5.5, 8)] in lines
    assert ["with 2 identical pairs as ties", "10", "2", "3", "5", share(5, 7), share(6.5, 10)] in lines
    assert "5 or more of 7 decided pairs for one of them would come about with p = 0.45 (two-sided sign test)" in out
    assert ["accuracy, 1 to 5", "1", "5.00", "2.00", "-3.00"] in lines
    assert ["helpfulness, 1 to 5", "0", "-", "-", "-"] in lines
    assert ["fluency, 1 to 5", "0", "4.00", "-", "-"] in lines
    assert ["did what was asked, %", "1", "100.0 % (20.7 to 100.0)", "0.0 % (0.0 to 79.3)", "-100.0"] in lines
    assert ["ann", "6", "1", f"{stats.binomtest(6, 7).pvalue:.2g}"] in lines
    assert "WARNING" not in out and "Agreement" not in out


def test_several_raters_are_averaged_over_each_pair(tmp_path, monkeypatch, capsys):
    # Of the pairs: all for base; two of three for tuned; one for each and a tie; two ties and one for tuned.
    by_rater = [["left", "left", "left", "tie"], ["left", "left", "right", "tie"], ["left", "right", "tie", "left"]]
    rating = lambda n: {"ratings": {"left": {"accuracy": n}, "right": {"accuracy": 1}}, "success": {"left": n > 2}}
    files = []
    for number, choices in enumerate(by_rater):
        entries = [{"choice": choice, "at": 1} | rating(2 + number) for choice in choices]
        file = tmp_path / f"{number}.json"
        files.append(write_judgements(file, entries, sides="ABBB", rater="xyz"[number]))
    out = said_by(monkeypatch, capsys, *files)
    lines = [re.split(r"  +", line) for line in out.splitlines()]
    scores = [0, 2 / 3, 1 / 2, 2 / 3]
    (row,) = [line for line in lines if line[0] == "all raters, pair by pair"]
    assert row[1:5] == ["4", "1", "1", "2"]
    assert row[6] == share(sum(scores), 4)
    # Three raters' 2, 3 and 4 are one number of each pair, their mean: it is base's in pair 1, tuned's in the others.
    of_base = tally.mean_text([3, 1, 1, 1], ".2f")
    of_tuned = tally.mean_text([1, 3, 3, 3], ".2f")
    assert ["accuracy, 1 to 5", "4", of_base, of_tuned, tally.mean_text([-2, 2, 2, 2], "+.2f")] in lines
    by_pair = [["A"] * 3, ["B", "B", "A"], ["B", "A", "tie"], ["tie", "tie", "B"]]
    assert ["all choose the same", "4 pairs", "25.0 %"] in lines
    assert ["Fleiss' kappa", "4 pairs", f"{plain_fleiss(by_pair):.3f}"] in lines
    codes = [[tally.CHOICE_SCORES[each] for each in row] for row in zip(*by_pair, strict=True)]
    assert [
        "better answer, Krippendorff's alpha",
        "4 units",
        f"{plain_alpha(codes, 'nominal'):.3f}",
    ] in lines
    assert ["accuracy, Krippendorff's alpha (ordinal)", "8 units"] in [line[:2] for line in lines]
    two = said_by(monkeypatch, capsys, *files[:2])
    assert "Cohen's kappa" in two and "Fleiss" not in two


# ---- what it warns of ----


def test_a_rater_who_prefers_a_side_is_warned_of(tmp_path, monkeypatch, capsys):
    file = write_judgements(tmp_path / "a.json", ["left"] * 15 + ["right"] * 4 + ["tie"])
    out = said_by(monkeypatch, capsys, file)
    p = stats.binomtest(15, 19).pvalue
    assert f"WARNING: ann chose the left answer in 15 of 19 decided pairs (p = {p:.2g}), though each model" in out
    # Who always prefers one model chooses both sides.
    file = write_judgements(tmp_path / "b.json", ["left", "right"] * 10)
    assert "WARNING" not in said_by(monkeypatch, capsys, file)


def test_other_pages_doubled_raters_and_missing_pairs_are_warned_of(tmp_path, monkeypatch, capsys):
    one = write_judgements(tmp_path / "one.json", ["left", "right", None, None])
    newer = {"choice": "right", "at": 99}
    two = write_judgements(tmp_path / "two.json", [newer, {"choice": "left", "at": 0}, None, "tie"])
    other = write_judgements(tmp_path / "other.json", ["left"] * 4, rater="bob", page="f" * 16)
    idle = write_judgements(tmp_path / "idle.json", [None] * 4, rater="cy")
    out = said_by(monkeypatch, capsys, one, two, other, idle)
    latest = "of each pair the latest judgement counts; if these are different people, give one another `rater`"
    pages = f"another page (ffffffffffffffff) than {one} (0123456789abcdef)"
    assert [line for line in out.splitlines() if line.startswith("WARNING")] == [
        f"WARNING: rater ann is in {one} and in {two}: {latest}",
        f"WARNING: {other}: holds judgements of {pages}, left out",
        "WARNING: cy judged nothing, left out",
        "WARNING: ann judged 3 of 4 pairs; 1 missing",
    ]
    raters, _ = tally.read_raters([one, two])
    assert raters.choices("ann") == {0: "B", 1: "A", 3: "tie"}


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"pair": 5}, "judgement 1: `pair` must be a number from 1 to 4"),
        ({"pair": 0}, "judgement 1: `pair` must be a number from 1 to 4"),
        ({"pair": True}, "judgement 1: `pair` must be a number from 1 to 4"),
        ("left", "judgement 1: `pair` must be a number"),
        ({"choice": "both"}, "judgement 1: `choice` must be left, right, tie or null"),
        ({"choice": ["left"]}, "judgement 1: `choice` must be left, right, tie or null"),
        ({"ratings": {"left": {"accuracy": 6}}}, "judgement 1: accuracy of left must be a whole number from 1 to 5"),
        ({"ratings": {"right": {"fluency": 2.5}}}, "judgement 1: fluency of right must be a whole number from 1 to 5"),
        ({"ratings": "5"}, "accuracy of left must be a whole number"),
        ({"success": {"left": 1}}, "judgement 1: `success` of left must be true, false or left out"),
        ({"at": "now"}, "judgement 1: `at` must be a time in milliseconds"),
    ],
)
def test_a_judgement_that_is_none_is_named(tmp_path, entry, said):
    whole = {"pair": 1, "choice": "left", "at": 1} | entry if isinstance(entry, dict) else entry
    file = write_judgements(tmp_path / "a.json", ["left"], sides="ABAB", judgements=[whole])
    with pytest.raises(UserError, match=re.escape(f"{file} {said}" if said.startswith("judg") else said)):
        tally.read_raters([file])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "other"}, "holds no judgements that the Export of a page of `evaluate.py pairs` has saved"),
        ({"key": "!"}, "its `key` is damaged, so nobody knows whose answer was on which side"),
        ({"key": base64.b64encode(b"[1]").decode()}, "its `key` is damaged"),
        ({"key": None}, "its `key` is damaged"),
        ({"pairs": 3}, "its `key` is damaged"),
        ({"identical": -1}, "its `key` is damaged"),
        ({"rater": " "}, "has no name of a rater as `rater`"),
        ({"judgements": {}}, "has no list as `judgements`"),
        ({"judgements": []}, "holds no judgement of any pair"),
        ({"judgements": [{"pair": 1, "choice": "tie"}] * 2}, "judgement 2: pair 1 was judged already in this file"),
    ],
)
def test_a_file_that_is_none_ends_with_one_line(tmp_path, monkeypatch, capsys, changes, said):
    file = write_judgements(tmp_path / "a.json", ["left", "right"], **changes)
    _, err, code = command(evaluate, monkeypatch, capsys, "tally", file, "--html", tmp_path / "page.html")
    assert code == 2 and err.startswith(f"error: {file}") and said in err and err.count("\n") == 1
    assert not (tmp_path / "page.html").exists()


def test_names_can_not_move_the_cursor(tmp_path, monkeypatch, capsys):
    file = write_judgements(tmp_path / "a.json", ["left", "right"], rater="a\x1b[2Jnn")
    assert "a\\x1b[2Jnn" in said_by(monkeypatch, capsys, file)


# ---- the page of the result ----


def test_the_result_as_a_page(tmp_path, monkeypatch, capsys):
    files = []
    for name in ("<b>ann", "bob"):
        files.append(write_judgements(tmp_path / f"{name[-3:]}.json", ["left"] * 15 + ["right"] * 5, "AB" * 10, name))
    page = tmp_path / "page.html"
    for _ in range(2):
        out = said_by(monkeypatch, capsys, *files, "--html", page)
    text = page.read_text()
    assert "&lt;b&gt;ann" in text and "<b>" not in text and "<script" not in text and "http://" not in text
    # Every cell of the tables that are printed.
    for line in out.split("\nWARNING")[0].splitlines()[2:]:
        for cell in re.split(r"  +", line.strip()):
            assert (
                set(cell) == {"-"}
                and len(cell) > 1
                or cell.replace("<", "&lt;").replace(">", "&gt;").replace("'", "&#39;") in text
            )
    assert text.count('class="warning"') == out.count("WARNING: ") == 2
    (tmp_path / "mine.html").write_text("mine")
    _, err, code = command(evaluate, monkeypatch, capsys, "tally", *files, "--html", tmp_path / "mine.html")
    assert code == 2 and "is there already and no page of a tally; give another name" in err
    assert (tmp_path / "mine.html").read_text() == "mine"


def test_a_random_preference_is_found_in_its_interval():
    # 300 simulated raters of 100 pairs who prefer B with probability 0.6: near 95 % of the intervals hold it.
    source = np.random.default_rng(0)
    held = 0
    for wins in source.binomial(100, 0.6, 300):
        low, high = tally.wilson_interval(int(wins), 100)
        held += low <= 0.6 <= high
    assert 0.92 <= held / 300 <= 0.98
