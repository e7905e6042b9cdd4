"""From examples back to the records that they were made of: their words, where an example has tokens.

What a model is to answer, and what its answer is compared with, stands in the records. They are read
from the files once more, and only those that are asked for.
"""

import numpy as np

from common.errors import UserError
from dataset.examples import Dataset, ExampleIndex
from dataset.records import ReadStats, Record, pack_nested
from dataset.token_cache import IS_CHAT, record_hashes


def is_whole_conversation(dataset: Dataset) -> np.ndarray:
    """Returns for each example whether it is a conversation of which nothing was cut: neither the
    last answer nor a part of the prompt. bool [N]"""
    assert isinstance(dataset.examples, ExampleIndex)
    index = dataset.examples
    is_whole = np.zeros(len(index), bool)
    for i, rows in enumerate(index.rows):
        own = np.flatnonzero(index.source == i)
        record = index.row[own]
        is_chat = (rows.records[record, 2] & IS_CHAT) > 0
        last_span = rows.span_starts[record + 1] - 1
        ends_with_answer = index.stop[own] >= rows.spans[last_span, 1]
        is_whole[own] = is_chat & ends_with_answer & (index.heads()[own] < 0)
    return is_whole


def records_of_examples(dataset: Dataset) -> list[Record]:
    """Returns the record of each example, in their order.

    dataset: with its `sources`, and conversations alone, since a text has several examples.
    Raises UserError where a record is another one now.
    """
    return [record for record, _ in records_with_columns(dataset)]


def records_with_columns(dataset: Dataset) -> list[tuple[Record, object]]:
    """Returns what `records_of_examples` does, each with what stands in the file for it, before --map: an
    object of all its columns, or a text."""
    assert isinstance(dataset.examples, ExampleIndex)
    index = dataset.examples
    # (source, file, number, place in a nested file, hash of all that the record says)
    keys = []
    for source, row in zip(index.source.tolist(), index.row.tolist(), strict=True):
        rows = index.rows[source]
        file, number, _, nested = rows.records[row].tolist()
        keys.append((source, file, number, nested, int(rows.texts[row])))
    wanted = {key[:3] for key in keys}
    records: dict[tuple, tuple[Record, object]] = {}
    for i, source in enumerate(dataset.sources):
        if not any(key[0] == i for key in wanted):
            continue
        for file, number, payload in source.payloads():
            if (i, file, number) not in wanted:
                continue
            columns = source.containers[file].value(number, payload)
            for record in source.read(file, number, payload, ReadStats()):
                _, text = record_hashes(record)
                place = (i, file, number, pack_nested(record.nested), text)
                records.setdefault(place, (record, columns))
    for key in keys:
        if key not in records:
            source, file, number = key[:3]
            place = dataset.sources[source].containers[file].place(number)
            raise UserError(f"{place}: is another record when it is read once more (by --map?)")
    return [records[key] for key in keys]
