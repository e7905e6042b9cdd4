"""Examples of which nothing is cut: pairs, judged answers and texts with a class (dataset/encoding.py).

What is compared or judged is a whole answer, so one that does not fit into --seq-len is left out,
and counted in `Dataset.dropped`.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from common.console import one_line
from common.errors import UserError
from dataset.encoding import AS_CLASSES, AS_JUDGED, JUDGMENTS
from dataset.examples import Dataset, ExampleIndex
from dataset.token_cache import Rows

# So many classes there may be however few the records are.
FEW_LABELS = 12
# Classes that are whole numbers of at most so many digits are sorted by their value.
MOST_DIGITS = 18


def whole_examples(
    rows: list[Rows], seq_len: int, label_names: Sequence[str] = (), answer_tokens: int = 0
) -> Dataset:
    """Makes an example of each record whose texts have at most seq_len tokens each.

    rows: the token rows of each source, all of one kind.
    answer_tokens: so many must fit behind a prompt.
    label_names: the classes, where they are known from other data; else they are those that occur, by
        the alphabet.
    Raises UserError for a class that is not among label_names.
    """
    sources, record_numbers, stops, labels, num_trained = [], [], [], [], []
    dropped: Counter[str] = Counter()
    kind = rows[0].kind
    names = tuple(label_names) or labels_of_rows(rows)
    for number, source_rows in enumerate(rows):
        lengths = np.diff(source_rows.starts)
        last_spans = source_rows.span_starts[1:] - 1
        stop = lengths
        if kind == AS_JUDGED:
            # Nothing stands behind the answer that is judged.
            stop = source_rows.spans[last_spans, 1].astype(np.int64)
        splits = source_rows.splits
        fits = np.maximum(splits, stop - splits) + answer_tokens <= seq_len
        num_too_long = int((~fits).sum())
        what = "of which a text does not fit"
        if answer_tokens:
            what = f"whose prompt and an answer of {answer_tokens:,} tokens do not fit"
        if num_too_long:
            dropped[f"{what} into --seq-len {seq_len}"] += num_too_long
        row = np.flatnonzero(fits)
        span_tokens = np.diff(source_rows.spans, axis=1)[:, 0]
        ends = np.cumsum(np.concatenate([[0], span_tokens]))
        trained = ends[source_rows.span_starts[1:]] - ends[source_rows.span_starts[:-1]]
        sources.append(np.full(len(row), number, np.int16))
        record_numbers.append(row.astype(np.int32))
        stops.append(stop[row])
        labels.append(numbers_of_labels(source_rows, names)[row])
        num_trained.append(trained[row])
    row = np.concatenate(record_numbers)
    source = np.concatenate(sources)
    stop = np.concatenate(stops)
    prompts = np.zeros(len(row), np.uint64)
    for number, source_rows in enumerate(rows):
        own = source == number
        prompts[own] = source_rows.prompts[row[own]]
    examples = ExampleIndex(
        rows, source, row, np.zeros_like(stop), stop,
        label=np.concatenate(labels) if names else None, seq_len=seq_len,
    )  # fmt: skip
    return Dataset(
        examples=examples,
        dropped=dict(dropped),
        lengths=stop,
        num_trained=np.concatenate(num_trained),
        prompts=prompts,
        chat=True,
        kind=kind,
        label_names=names,
    )


def labels_of_rows(rows: list[Rows]) -> tuple[str, ...]:
    """Returns the labels of some rows: both judgments, or the classes that occur, by the
    alphabet, or by their value where all are whole numbers."""
    if rows[0].kind == AS_JUDGED:
        return JUDGMENTS
    names = sorted({name for each in rows for name in each.label_names})
    are_numbers = all(name.isdecimal() and len(name) <= MOST_DIGITS for name in names)
    # Sorting keeps the order of equal ones, as 1 and 01, which must not depend on a set's.
    return tuple(sorted(names, key=int) if are_numbers else names)


def numbers_of_labels(rows: Rows, names: Sequence[str]) -> np.ndarray:
    """Returns the number in `names` of each record's label, int32 [N]; -1 for records without."""
    numbers = []
    for i, name in enumerate(rows.label_names):
        if name not in names:
            first = int(np.flatnonzero(rows.labels == i)[0])
            known = ", ".join(names)
            raise UserError(
                f"{rows.where(first)}: the class {one_line(name, 60)!r} is none of those that the model"
                f" learns or has ({one_line(known, 200)}); leave the record out, or give --data with it"
            )
        numbers.append(names.index(name))
    # The last one is found by -1, which stands for no label.
    return np.array([*numbers, -1], np.int32)[rows.labels]


def with_partners(dataset: Dataset) -> Dataset:
    """Returns judged answers, each with another example whose answer is put behind its own prompt: that
    in the same place among the answers to the next prompt, so that each is taken about once. Where there
    is one prompt alone, it is the next answer; a single answer has none."""
    count = len(dataset)
    assert isinstance(dataset.examples, ExampleIndex)
    index = dataset.examples
    if count < 2:
        return dataset
    prompts = dataset.prompts
    # Adjacent examples with one prompt are a run.
    begins = np.flatnonzero(np.concatenate([[True], prompts[1:] != prompts[:-1]]))
    sizes = np.diff(np.append(begins, count))
    run = np.repeat(np.arange(len(begins)), sizes)
    place = np.arange(count) - begins[run]
    next_run = (run + 1) % len(begins)
    if prompts[-1] == prompts[0] and len(begins) > 1:
        # The last run is of the first one's prompt.
        next_run[run == len(begins) - 1] = 1
    partner = begins[next_run] + np.minimum(place, sizes[next_run] - 1)
    if len(begins) == 1:
        partner = (np.arange(count) + 1) % count
    taken = index.take(np.arange(count))
    taken.partner = np.stack([index.source[partner], index.row[partner]], 1).astype(np.int64)
    result = dataset.take(np.arange(count))
    result.examples = taken
    result.dropped = dataset.dropped
    return result


def check_labels(dataset: Dataset, what: str, flag: str) -> None:
    """Raises UserError where all examples have one label: nothing could be told apart. what: the data.
    flag: that asks for them."""
    if dataset.kind not in (AS_JUDGED, AS_CLASSES) or not len(dataset):
        return
    assert isinstance(dataset.examples, ExampleIndex)
    found = np.unique(dataset.examples.label)
    if dataset.kind == AS_CLASSES and len(found) > FEW_LABELS and 2 * len(found) > len(dataset):
        counts = f"{len(found):,} different answers in {len(dataset):,} records"
        advice = "give more records of each class, or --objective sft for answers"
        raise UserError(f"{what}: {counts} are no classes, which {flag} wants; {advice}")
    if len(found) > 1:
        return
    name = dataset.label_names[int(found[0])]
    if dataset.kind == AS_JUDGED:
        raise UserError(f"{what}: all answers are {name}; {flag} learns from good and bad ones")
    raise UserError(f"{what}: all texts have the class {name!r}; {flag} wants two or more")
