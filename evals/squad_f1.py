"""Exact match and token F1 as SQuAD defines them (Rajpurkar et al. 2016; version 2.0's script).

Both compare words: in lower case, without punctuation, without the articles a, an and the, with
single spaces. F1 is the harmonic mean of precision and recall over the words that answer and
reference share, each counted as often as it occurs in both. Of several references the best counts,
for each of the two numbers. A word is what stands between spaces, so that in languages which write
none between words (Chinese, Thai) a whole clause is one.
"""

import re
import string
from collections import Counter

from evals.answers import Answers
from evals.scores import ItemScores

ARTICLES = re.compile(r"\b(a|an|the)\b")
WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def f1_scores(answers: Answers) -> ItemScores:
    """ItemScores answers by SQuAD's token F1 and exact match."""
    f1_of_each = []
    exact_of_each = []
    for text, references in zip(answers.texts, answers.references, strict=True):
        words = squad_words(text)
        # A reference of articles and punctuation alone counts where there is no other.
        accepted = [words for words in map(squad_words, references) if words] or [[]]
        f1_of_each.append(max(words_f1(words, each) for each in accepted))
        exact_of_each.append(float(words in accepted))
    count = len(answers)
    columns = {
        "F1 %": 100 * sum(f1_of_each) / count,
        "exact %": 100 * sum(exact_of_each) / count,
        "of": float(count),
    }
    formats = {"F1 %": ".2f", "exact %": ".2f", "of": ",.0f"}
    note = (
        "F1 and exact match of SQuAD 2.0: lower case, no punctuation, no a, an, the; the best of an"
        " answer's references"
    )
    return ItemScores({"f1": f1_of_each, "squad exact": exact_of_each}, columns, formats, [note])


def squad_words(text: str) -> list[str]:
    """Returns the words of a text as SQuAD compares them."""
    text = text.lower().translate(WITHOUT_PUNCTUATION)
    return ARTICLES.sub(" ", text).split()


def words_f1(words: list[str], reference: list[str]) -> float:
    """Returns the F1 of two lists of words, from 0 to 1; 1 if both are empty, 0 if one is."""
    if not words or not reference:
        return float(words == reference)
    num_shared = (Counter(words) & Counter(reference)).total()
    if num_shared == 0:
        return 0.0
    precision = num_shared / len(words)
    recall = num_shared / len(reference)
    return 2 * precision * recall / (precision + recall)
