"""The picture of a sweep: a panel for each option, with the score of each trial by its value."""

from pathlib import Path

from common.errors import printable
from common.files import atomic_file
from flags import dashed
from training.sweep_results import Result, Row, as_value, rows_of_trials
from training.sweep_words import Sweep

# Trials that differ in one option alone are joined by a line; more lines than that would tell nothing.
MOST_LINES = 8
# Values of a number that are written at the axis; of more the axis has its usual numbers.
MOST_TICKS = 8
# Between the lowest and the highest number, from which on an axis is logarithmic.
LOG_AXIS_FROM = 5
LONGEST_LABEL = 20


def draw_sweep(sweep: Sweep, finished: list[Result], picture: Path) -> None:
    """Draws the scores of a sweep as a PNG. Of successive halving those of the first rung: scores of other
    rungs are of more steps, and the last one has a single trial."""
    import matplotlib

    # The backend that needs no display.
    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Without rungs it is None.
    rows = rows_of_trials([each for each in finished if not each.rung])
    names = list(sweep.space)
    figure, panels = pyplot.subplots(
        1, len(names), figsize=(4.2 * len(names) + 1, 3.8), dpi=120, sharey=True, squeeze=False
    )
    for axes, name in zip(panels[0], names, strict=True):
        draw_option(axes, name, rows, names, bool(sweep.seeds))
    what = rows[0].outcome.name
    panels[0][0].set_ylabel(f"{what}, first rung" if sweep.search == "halving" else what)
    scores = [row.mean for row in rows]
    if min(scores) > 0 and max(scores) > LOG_AXIS_FROM * min(scores):
        panels[0][0].set_yscale("log")
    figure.tight_layout()
    with atomic_file(picture) as tmp:
        figure.savefig(tmp, format="png")
    pyplot.close(figure)


def draw_option(axes, name: str, rows: list[Row], names: list[str], has_seeds: bool) -> None:
    """Draws the panel of one option. rows: the best first. names: of all options."""
    in_order = sorted(rows, key=lambda row: row.number)
    words = list(dict.fromkeys(row.values[name] for row in in_order))
    numbers = [value for value in map(as_value, words) if isinstance(value, float)]
    is_number = len(numbers) == len(words)
    places = dict(zip(words, numbers if is_number else range(len(words)), strict=True))
    groups = groups_without(in_order, name, names)
    joined = len(groups) <= MOST_LINES
    for label, group in groups.items():
        group.sort(key=lambda row: places[row.values[name]])
        x = [places[row.values[name]] for row in group]
        y = [row.mean for row in group]
        style = {"label": label} if joined and label else {}
        if not joined:
            style = {"color": "#3182bd"}
        if has_seeds:
            low = [row.mean - row.low for row in group]
            high = [row.high - row.mean for row in group]
            axes.errorbar(
                x, y, yerr=[low, high], marker="o", markersize=5, linewidth=1, capsize=2, **style
            )
        else:
            axes.plot(x, y, marker="o", markersize=5, linewidth=1, **style)
    best = rows[0]
    place = places[best.values[name]]
    axes.plot(
        [place],
        [best.mean],
        marker="*",
        markersize=15,
        color="black",
        linestyle="",
        label="best",
        zorder=5,
    )

    if is_number and min(numbers) > 0 and max(numbers) >= LOG_AXIS_FROM * min(numbers):
        axes.set_xscale("log")
    if not is_number or len(words) <= MOST_TICKS:
        # A $ in a name would begin a formula.
        labels = [printable(word)[:LONGEST_LABEL].replace("$", r"\$") for word in words]
        axes.set_xticks([places[word] for word in words], labels, rotation=30)
        axes.minorticks_off()
    axes.set_xlabel(dashed(name))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def groups_without(rows: list[Row], name: str, names: list[str]) -> dict[str, list[Row]]:
    """Returns the rows that differ in one option alone, by what they have in common: {"--rank 4": rows}."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        label = " ".join(f"{dashed(other)} {row.values[other]}" for other in names if other != name)
        groups.setdefault(label, []).append(row)
    return groups
