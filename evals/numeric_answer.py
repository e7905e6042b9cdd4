"""Numeric answers, as to GSM8K's problems (Cobbe et al. 2021): right if the final number is.

The final number of a text is the first one behind `####`, which GSM8K's references write before it;
else the last number of the text. `1,234.50`, `$1234.5` and `1234.5` are one number, and so are 50 and
50%; a minus counts where it does not stand behind a number or a word, as in `10-3`. Numbers are
compared as decimals, so that no digit is rounded away. An exponent is not read (1e5 is 5), nor are
groups of digits behind spaces (1 000 is 0).
"""

import re
from decimal import Decimal

from common.errors import UserError
from evals.answers import Answers
from evals.scores import ItemScores

MARK = "####"
# Groups of three digits behind commas, or digits; then a fraction, or a fraction alone.
UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
CURRENCY = "$€£¥₹"
# The sign may stand on either side of a currency. U+2212 is the minus of typesetting.
ANSWER_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w.)\]%])[-+\u2212])?(?:[{CURRENCY}]\s?(?P<inner>[-+\u2212])?)?(?P<digits>{UNSIGNED})"
)


def numeric_scores(answers: Answers) -> ItemScores:
    """ItemScores answers by their final number: 1 where it equals that of a reference, else 0."""
    hits = []
    num_without = 0
    num_marked = 0
    for text, references in zip(answers.texts, answers.references, strict=True):
        number = final_number(text)
        num_without += number is None
        num_marked += marked_number(text) is not None
        accepted = [final_number(reference) for reference in references]
        hits.append(float(number is not None and number in accepted))
    count = len(hits)
    columns = {"right": sum(hits), "of": float(count), "numeric %": 100 * sum(hits) / count}
    formats = {"right": ",.0f", "of": ",.0f", "numeric %": ".1f"}
    note = (
        f"numbers behind {MARK} in {num_marked:,} answers, the last number of a text in"
        f" {count - num_marked - num_without:,}, no number in {num_without:,}"
    )
    notes = [note]
    return ItemScores({"numeric": hits}, columns, formats, notes)


def check_number(references: list[str], where: str) -> None:
    """Raises UserError if a record has no reference with a number. where: its place."""
    if not any(final_number(reference) is not None for reference in references):
        raise UserError(
            f"{where}: its reference has no number; `numeric` compares numbers, use `exact` or `f1`"
        )


def final_number(text: str) -> Decimal | None:
    """Returns the number that a text gives as its answer, None if it has none."""
    marked = marked_number(text)
    if marked is not None:
        return marked
    last = None
    for last in ANSWER_NUMBER.finditer(text):
        pass
    return value_of(last) if last else None


def marked_number(text: str) -> Decimal | None:
    """Returns the first number behind the first MARK of a text, None if there is none."""
    _, _, behind = text.partition(MARK)
    first = ANSWER_NUMBER.search(behind)
    return value_of(first) if first else None


def value_of(match: re.Match) -> Decimal:
    """Returns the value of a match of ANSWER_NUMBER."""
    number = Decimal(match["digits"].replace(",", ""))
    sign = match["sign"] or match["inner"] or "+"
    # The operator minus would round to the digits of Decimal's context.
    return number if sign == "+" else number.copy_negate()
