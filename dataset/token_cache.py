"""Token rows on disk: the tokenised records of a source, as a folder of plain arrays that are
mapped into memory.

`tokenized_rows(source, tokenizer)` returns them out of the cache, or makes them first: a process a
core reads, renders and tokenises records (dataset/tokenize_pool.py), and this one writes them in
the order of the file as they come, so that memory does not grow with the file. The folder's name is
a hash of everything that its content depends on, the bytes of the files included. It appears whole
or not at all; a process that needs what another one is making waits for it. Nothing is cut here to
--seq-len: dataset/examples.py does that.

    ids.bin          uint16 or uint32 [T]  tokens, record after record
    starts.bin       int64 [N + 1]         where each record starts in them
    spans.bin        int32 [S, 2]          trained: [start, end) in a record
    span_starts.bin  int64 [N + 1]         where each record's spans start
    weights.bin      float32 [S]           loss weight of each span
    records.bin      int64 [N, 4]          file and number, to name the record; its flags (IS_CHAT
                                           and others); its place in a nested file
    prompts.bin      uint64 [N]            hash of the text before the first answer
    contents.bin     uint64 [N]            hash of the record's ids
    texts.bin        uint64 [N]            hash of all that the record says, letter case and spaces
                                           aside
    heads.bin        int32 [N]             ids before the words of the first user, for --truncate
                                           prompt; else 0
    splits.bin       int32 [N]             where the second text of a pair begins in the record; 0
                                           where it holds one text
    labels.bin       int32 [N]             number of the record's label in meta.json's "labels"; -1
                                           without one
    meta.json                              what was read and what was left out; the size and CRC-32
                                           of each file, by which damage is noticed
"""

import atexit
import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
import uuid
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import (
    atomic_folder,
    cache_folder,
    check_cache_takes_files,
    file_crc32,
    file_sha256,
    process_exists,
    reported_full_cache,
    write_json,
)
from dataset.encoding import (
    AS_CLASSES,
    AS_PROMPTS,
    AS_TEXTS,
    EncodedRecord,
    encode_record,
    records_of_kind,
    talks_of_record,
)
from dataset.formats import Source
from dataset.markup import holds_rendered_chat
from dataset.prompt_cut import PromptHeads, TurnShape, turn_shape
from dataset.readers import CLASS_NAMES
from dataset.records import ReadStats, Record, nested_place, pack_nested
from dataset.text_stats import private_parts, text_hash
from dataset.tokenize_pool import ReadingProgress, chunks, in_order, processes_for
from tokenizer import EncodedChat, Tokenizer

# The version of the folders: a higher number makes all of them anew.
ROWS_FORMAT = 8
# Bytes of rows that the cache keeps; the ones unused for longest are deleted first.
KEPT = 20 << 30
# The age, a day, from which an unfinished folder of a process that does not exist is deleted.
ABANDONED_SECONDS = 86_400
# Conversations that the template's process is given at a time.
RENDER_BATCH = 256

# Flags of a record, the third column of `records`.
IS_CHAT = 1  # a conversation, not a text
ONE_WORD_ANSWER = 2  # an answer of one word
CONTROL_TOKEN = 4  # text that spells a control token
PRIVATE_PART = 8  # an address or a secret
RENDERED_CHAT = 16  # the markup of a chat template, in a text or a message

ARRAYS = {
    "starts": np.int64,
    "spans": np.int32,
    "span_starts": np.int64,
    "weights": np.float32,
    "records": np.int64,
    "prompts": np.uint64,
    "contents": np.uint64,
    "texts": np.uint64,
    "heads": np.int32,
    "splits": np.int32,
    "labels": np.int32,
}
ROW_SHAPES = {"spans": (-1, 2), "records": (-1, 4)}


@dataclass
class Rows:
    """N tokenised records, as the arrays that the head of this file lists.

    kind: what an example is, of dataset/encoding.py.
    label_names: the labels, by their numbers.
    stats: what was read, dropped and ignored.
    largest: the largest token id.
    turn: what the chat template writes around a user's messages, for --truncate prompt.
    units: for each file "FILE line", to which a record's number is added to name it.
    cached: True if the rows were in the cache already.
    notes: what a user must know about the cache.
    files: (name, SHA-256) of each file.
    """

    ids: np.ndarray
    starts: np.ndarray
    spans: np.ndarray
    span_starts: np.ndarray
    weights: np.ndarray
    records: np.ndarray
    prompts: np.ndarray
    contents: np.ndarray
    texts: np.ndarray
    heads: np.ndarray
    splits: np.ndarray
    labels: np.ndarray
    kind: str
    label_names: list[str]
    stats: ReadStats
    largest: int
    turn: TurnShape
    units: list[str]
    cached: bool
    notes: list[str]
    files: list[tuple[str, str]]

    def __len__(self) -> int:
        return len(self.prompts)

    def where(self, i: int) -> str:
        """Returns the place of record i for messages, e.g. "a.jsonl line 3"."""
        file, number, _, nested = self.records[i]
        return f"{self.units[file]} {number}{nested_place(int(nested))}"


def tokenized_rows(
    source: Source,
    tokenizer: Tokenizer,
    roles: tuple[str, ...] = ("assistant",),
    with_heads: bool = False,
    kind: str = AS_TEXTS,
) -> Rows:
    """Returns the rows of a source, out of the cache if they are there, else made and put into it.

    source: the files and their format.
    tokenizer: makes ids of texts, and of conversations by its chat template.
    roles: the roles whose messages are trained.
    with_heads: also find where the words of the first user begin, for --truncate prompt.
    kind: what an example is, of dataset/encoding.py.

    Raises UserError that names the records if some cannot be read; also if no record can be trained
    on, or if a file changes while it is read.
    """
    stamps = file_stamps(source)
    hashes = [file_sha256(container.path) for container in source.containers]
    key = cache_key(source, tokenizer, roles, hashes, with_heads, kind)
    folder = cache_folder() / f"rows-{key[:32]}"
    if source.map:
        # What the user's function reads besides the record cannot be known, so its rows serve this
        # run alone.
        folder = folder.with_name(f"rows-map-{uuid.uuid4().hex}")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    notes = []
    cached = folder.is_dir()
    if cached:
        damage = find_damage(folder)
        cached = damage is None
        if damage is not None:
            notes.append(f"{damage}; tokenised afresh")
    if not cached:
        try:
            check_cache_takes_files(folder.parent)
        except UserError as error:
            folder = folder_of_this_run(folder.name)
            notes.append(f"{error}; this run's token rows are in {folder.parent} until it ends")
        with locked(folder):
            # Another process may have made the rows while this one waited for the lock.
            cached = folder.is_dir() and find_damage(folder) is None
            if not cached:
                shutil.rmtree(folder, ignore_errors=True)
                make_room(folder.parent)
                with reported_full_cache(folder.parent):
                    make_folder(source, tokenizer, roles, with_heads, kind, stamps, folder)
    # The time of last use, for make_room.
    with contextlib.suppress(OSError):
        os.utime(folder)
    return open_rows(folder, source, cached, notes, hashes)


def folder_of_this_run(name: str) -> Path:
    """Returns a folder of this name, not made yet, in one that is deleted when the process ends."""
    try:
        parent = Path(tempfile.mkdtemp(prefix="plaintune-"))
    except OSError as error:
        problem = "neither the cache nor a temporary folder can be written to"
        advice = "set PLAINTUNE_CACHE to a folder that can"
        raise UserError(f"{problem} ({error.strerror}); {advice}") from None
    atexit.register(shutil.rmtree, parent, ignore_errors=True)
    return parent / name


def find_damage(folder: Path) -> str | None:
    """Returns what is wrong with the files of a folder of rows, or None.

    A disk may lose what was written, and copies may be cut short. Without this, a run would end in
    the middle of an epoch, or train on other tokens.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta.pop("crc32") != meta_crc32(meta):
            return f"{folder / 'meta.json'} was damaged"
        for name, (size, crc32) in meta["files"].items():
            file = folder / name
            if file.stat().st_size != size:
                return f"{file} had {file.stat().st_size:,} bytes, not {size:,}"
            if file_crc32(file) != crc32:
                return f"{file} was damaged"
    except OSError as error:
        return f"{error.filename or folder} could not be read ({error.strerror})"
    except (ValueError, KeyError, AttributeError, TypeError):
        return f"{folder / 'meta.json'} was damaged"
    return None


def meta_crc32(meta: dict) -> int:
    """Returns the CRC-32 of what meta.json holds besides it."""
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def make_folder(
    source: Source,
    tokenizer: Tokenizer,
    roles: tuple[str, ...],
    with_heads: bool,
    kind: str,
    stamps: list[tuple[int, int]],
    folder: Path,
) -> None:
    """Writes the rows of a source to `folder`.

    stamps: the `file_stamps` from before the files were read.
    """
    try:
        with atomic_folder(folder) as tmp:
            write(source, tokenizer, roles, with_heads, kind, tmp)
            if file_stamps(source) != stamps:
                raise UserError(
                    f"{source.path}: changed while it was read; start again when it is whole"
                )
    except OSError:
        # On a system without locks another process may have made the folder first.
        if not folder.is_dir():
            raise


def cache_key(
    source: Source,
    tokenizer: Tokenizer,
    roles: tuple[str, ...],
    hashes: list[str],
    with_heads: bool = False,
    kind: str = AS_TEXTS,
) -> str:
    """Returns a hash, in hexadecimal, of everything that rows depend on. hashes: the SHA-256 of each
    file."""
    files = []
    for container, sha256 in zip(source.containers, hashes, strict=True):
        class_names = Path(container.path).parent / CLASS_NAMES
        # Labels of a CSV may be numbers, whose names are in a file next to it.
        is_table = container.kind.startswith(("CSV", "TSV"))
        class_names_hash = ""
        if is_table and class_names.is_file():
            class_names_hash = file_sha256(class_names)
        files.append((container.kind, sha256, class_names_hash))
    reading = [*source.reading_key(), roles, with_heads, kind]
    parts = [ROWS_FORMAT, files, *reading, tokenizer.fingerprint]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def file_stamps(source: Source) -> list[tuple[int, int]]:
    """Returns (size in bytes, time of change in ns) of each file.

    By these a change of a file is noticed.
    """
    stats = [os.stat(container.path) for container in source.containers]
    return [(stat.st_size, stat.st_mtime_ns) for stat in stats]


def open_rows(
    folder: Path, source: Source, cached: bool, notes: list[str], hashes: list[str]
) -> Rows:
    """Maps the arrays of a folder into memory. hashes: the SHA-256 of each file."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))

    def open_array(name: str, dtype) -> np.ndarray:
        file = folder / f"{name}.bin"
        shape = ROW_SHAPES.get(name, -1)
        # An empty file cannot be mapped.
        if not file.stat().st_size:
            return np.empty(0, dtype).reshape(shape)
        return np.memmap(file, dtype, "r").reshape(shape)

    stats = ReadStats(
        records=meta["records"],
        dropped=Counter(meta["dropped"]),
        altered=Counter(meta["altered"]),
        ignored=dict.fromkeys(meta["ignored"], True),
        facts=dict.fromkeys(meta["facts"], True),
        num_faults=meta["num_faults"],
        faults=[(file, fault) for file, fault in meta["faults"]],
    )
    names = [container.path.name for container in source.containers]
    return Rows(
        ids=open_array("ids", meta["dtype"]),
        **{name: open_array(name, dtype) for name, dtype in ARRAYS.items()},
        kind=meta["kind"],
        label_names=meta["labels"],
        stats=stats,
        largest=meta["largest"],
        turn=TurnShape(tuple(meta["turn_header"]), meta["turn_ending"]),
        units=[f"{container.path} {container.unit}" for container in source.containers],
        cached=cached,
        notes=notes,
        files=list(zip(names, hashes, strict=True)),
    )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a lock for this folder during the block, on systems that have file locks."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:
        # Windows has none: two processes may do the same work there, and the second rename fails.
        yield
        return
    with open(folder.parent / f".{folder.name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            # A process that waits still has this file open, and looks for the folder first when it
            # gets the lock.
            with contextlib.suppress(OSError):
                os.unlink(file.name)


def make_room(cache: Path) -> None:
    """Deletes what crashed processes left, and beyond KEPT bytes the rows unused for longest."""
    for tmp in cache.glob(".rows-*.partial-*"):
        pid = tmp.name.rpartition("-")[2]
        with contextlib.suppress(OSError):
            # The process may be alive on another machine, or in another container, that has this
            # cache too.
            is_old = time.time() - tmp.stat().st_mtime > ABANDONED_SECONDS
            if pid.isdecimal() and is_old and not process_exists(int(pid)):
                shutil.rmtree(tmp, ignore_errors=True)
    size = 0
    # Another process may delete the same folders at the same time.
    with contextlib.suppress(OSError):
        newest_first = sorted(cache.glob("rows-*"), key=lambda folder: -folder.stat().st_mtime)
        for folder in newest_first:
            size += sum(file.stat().st_size for file in folder.iterdir())
            if size > KEPT:
                shutil.rmtree(folder, ignore_errors=True)


# ---- making them ----


@dataclass
class EncodedChunk:
    """The tokenised records of a chunk: the arrays of `Rows`.

    They have lengths and counts in place of starts, which depend on the chunks before. Labels are
    numbered by their place in `label_names`, those of this chunk alone.
    """

    ids: np.ndarray
    lengths: np.ndarray
    spans: np.ndarray
    span_counts: np.ndarray
    weights: np.ndarray
    records: np.ndarray
    prompts: np.ndarray
    contents: np.ndarray
    texts: np.ndarray
    heads: np.ndarray
    splits: np.ndarray
    labels: np.ndarray
    label_names: list[str]
    stats: ReadStats


def write(
    source: Source,
    tokenizer: Tokenizer,
    roles: tuple[str, ...],
    with_heads: bool,
    kind: str,
    folder: Path,
) -> None:
    """Writes the arrays and meta.json of a source into `folder`, chunk after chunk.

    Raises UserError that names the records that can't be read. From the first of them on, the others
    are only looked for: nothing is tokenised that would not be kept.
    """
    if tokenizer.vocab_size > 1 << 32:
        raise UserError(f"{tokenizer.source}: the tokenizer has an id beyond 32 bits")
    dtype = np.dtype(np.uint32)
    if tokenizer.vocab_size <= 1 << 16:
        dtype = np.dtype(np.uint16)
    turn = turn_shape(tokenizer) if with_heads else TurnShape()
    heads = PromptHeads(tokenizer) if with_heads else None
    work = partial(encode_unless_faulty, source, tokenizer, roles, dtype, heads, kind)
    processes = processes_for(source)
    stats = ReadStats()
    num_tokens = 0
    num_spans = 0
    largest = 0
    label_numbers: dict[str, int] = {}
    files = {name: open(folder / f"{name}.bin", "wb") for name in ("ids", *ARRAYS)}  # noqa: SIM115
    checksums = dict.fromkeys(files, 0)

    def append(name: str, values: np.ndarray) -> None:
        files[name].write(values.data)
        checksums[name] = zlib.crc32(values.data, checksums[name])

    # One process alone is given little to do, which needs no bar; and of several ranks of a machine
    # one shows it. (torchrun's variable: importing torch for it would slow --help down.)
    is_shown = processes > 1 and os.environ.get("LOCAL_RANK", "0") == "0"
    reading = ReadingProgress("tokenizing", source, shown=is_shown)
    try:
        append("starts", np.zeros(1, np.int64))
        append("span_starts", np.zeros(1, np.int64))
        wanted = wanted_chunks(source, stats, reading.of(chunks(source)))
        for part in in_order(work, wanted, processes, tokenizer.forget_processes):
            for name in part.label_names:
                label_numbers.setdefault(name, len(label_numbers))
            # The last one is found by -1, which stands for no label.
            numbers_of_part = [*(label_numbers[name] for name in part.label_names), -1]
            arrays = {
                "ids": part.ids,
                "starts": num_tokens + np.cumsum(part.lengths),
                "spans": part.spans,
                "span_starts": num_spans + np.cumsum(part.span_counts),
                "weights": part.weights,
                "records": part.records,
                "prompts": part.prompts,
                "contents": part.contents,
                "texts": part.texts,
                "heads": part.heads,
                "splits": part.splits,
                "labels": np.array(numbers_of_part)[part.labels],
            }
            for name in files:
                # The ids are in their dtype already, which is not in the table.
                append(name, np.ascontiguousarray(arrays[name], ARRAYS.get(name)))
            num_tokens += len(part.ids)
            num_spans += len(part.weights)
            largest = max(largest, int(part.ids.max(initial=0)))
            stats.add(part.stats)
            reading.update(f"{stats.records:,} records, {num_tokens:,} tokens")
    except UserError as error:
        source.complain_of_faults(stats, error)
        raise
    finally:
        reading.close()
        for file in files.values():
            file.close()
    source.complain_of_faults(stats)
    stats.complain_if_empty(source.path)
    meta = reading_facts(stats, turn)
    meta["kind"] = kind
    meta["labels"] = list(label_numbers)
    meta["largest"] = largest
    meta["dtype"] = dtype.name
    meta["tokens"] = num_tokens
    sizes = {name: (folder / f"{name}.bin").stat().st_size for name in files}
    meta["files"] = {f"{name}.bin": [sizes[name], checksums[name]] for name in files}
    write_meta(meta, folder)


def write_meta(meta: dict, folder: Path) -> None:
    """Writes meta.json, with its own CRC-32."""
    # As a reader will have it: JSON has neither tuples nor keys that are no texts.
    meta = json.loads(json.dumps(meta))
    meta["crc32"] = meta_crc32(meta)
    write_json(meta, folder / "meta.json")


def wanted_chunks(
    source: Source, stats: ReadStats, source_chunks: Iterator[list]
) -> Iterator[tuple[bool, list]]:
    """Yields the chunks of a source, each with whether anything of it will be kept: not from the
    first faulty record on, unless these are left out. stats: of what was read so far."""
    for chunk in source_chunks:
        yield stats.num_faults == 0 or bool(source.skip_bad), chunk


def reading_facts(stats: ReadStats, turn: TurnShape) -> dict:
    """Returns what was read and left out, and what stands around messages, as values of JSON."""
    meta = dict(vars(stats))
    meta["ignored"] = list(stats.ignored)
    meta["facts"] = list(stats.facts)
    meta["turn_header"] = turn.header
    meta["turn_ending"] = turn.ending
    return meta


def encode_unless_faulty(
    source: Source,
    tokenizer: Tokenizer,
    roles: tuple[str, ...],
    dtype: np.dtype,
    heads: PromptHeads | None,
    kind: str,
    wanted: tuple[bool, list],
) -> EncodedChunk:
    """Does what `encode` does with a chunk, in a worker process. wanted: whether anything will be
    kept; if not, only faults are looked for. The chunk."""
    is_kept, chunk = wanted
    if is_kept:
        return encode(source, tokenizer, roles, dtype, chunk, heads, kind)
    result = encode(source, tokenizer, roles, dtype, [])
    for container, number, payload in chunk:
        source.read(container, number, payload, result.stats)
    return result


def encode(
    source: Source,
    tokenizer: Tokenizer,
    roles: tuple[str, ...],
    dtype: np.dtype,
    chunk: list,
    heads: PromptHeads | None = None,
    kind: str = AS_TEXTS,
) -> EncodedChunk:
    """Reads, renders and tokenises the payloads of a chunk; this runs in a worker process.

    dtype: of the ids. heads: finds where the words of the first user begin, if that is asked for.
    kind: what an example is, of dataset/encoding.py.
    """
    stats = ReadStats()
    records = []
    places = []  # (file, number) of each record
    for container, number, payload in chunk:
        new = records_of_kind(source.read(container, number, payload, stats), kind)
        records += new
        places += [(container, number)] * len(new)
    if stats.num_faults and not source.skip_bad:
        # Nothing of these data will be kept.
        records, places = [], []

    rendered = render(records, tokenizer, roles, kind)
    # Of each record that can be trained on; spans and weights of each span of those.
    lengths, span_counts, rows, prompts, hashes, texts = [], [], [], [], [], []
    spans, weights = [], []
    head_lengths, splits, labels = [], [], []
    label_numbers: dict[str, int] = {}
    # An array takes 2 or 4 bytes a token, where a list takes 8 and more.
    all_ids = array(dtype.char)
    for record, talks, (container, number) in zip(records, rendered, places, strict=True):
        encoded = encode_record(record, talks, tokenizer, kind)
        if not isinstance(encoded, EncodedRecord):
            stats.drop(encoded)
            continue
        ids = array(dtype.char, encoded.ids)
        all_ids.extend(ids)
        lengths.append(len(ids))
        span_counts.append(len(encoded.spans))
        for start, end, weight in encoded.spans:
            spans.append((start, end))
            weights.append(weight)
        splits.append(encoded.split)
        label = encoded.label
        labels.append(label_numbers.setdefault(label, len(label_numbers)) if label else -1)
        words = words_of(record)
        nested = pack_nested(record.nested)
        rows.append((container, number, flags_of(record, words, tokenizer), nested))
        prompt, text = record_hashes(record)
        prompts.append(prompt)
        texts.append(text)
        head_lengths.append(heads.length(record, ids) if heads and talks else 0)
        hashes.append(hashlib.blake2b(ids, digest_size=8).digest())
        if talks and isinstance(talks[0], EncodedChat) and talks[0].is_altered:
            stats.altered.update(altered_by_template(record, talks[0], tokenizer.empty_think))
    stats.records = len(rows)
    return EncodedChunk(
        ids=np.frombuffer(all_ids, dtype),
        lengths=np.array(lengths, np.int64),
        spans=np.array(spans, np.int32).reshape(-1, 2),
        span_counts=np.array(span_counts, np.int64),
        weights=np.array(weights, np.float32),
        records=np.array(rows, np.int64).reshape(-1, 4),
        prompts=np.array(prompts, np.uint64),
        contents=np.frombuffer(b"".join(hashes), np.uint64),
        texts=np.array(texts, np.uint64),
        heads=np.array(head_lengths, np.int32),
        splits=np.array(splits, np.int32),
        labels=np.array(labels, np.int32),
        label_names=list(label_numbers),
        stats=stats,
    )


def render(
    records: list[Record], tokenizer: Tokenizer, roles: tuple[str, ...], kind: str = AS_TEXTS
) -> list[list]:
    """Returns what is made of the conversations of each record, as many as `talks_of_record` makes: by
    `Tokenizer.render_each`, or for a class by `classification_texts`."""
    talks_of_records = [talks_of_record(record, kind) for record in records]
    chats = []
    for record, talks in zip(records, talks_of_records, strict=True):
        chats += [(talk, record.tools) for talk in talks]
    # Of a prompt, the ids end with what stands before an answer.
    asks = kind == AS_PROMPTS
    rendered = []
    for i in range(0, len(chats), RENDER_BATCH):
        batch = chats[i : i + RENDER_BATCH]
        if kind == AS_CLASSES:
            # This late, as it imports torch.
            from adapting.score_head import classification_texts

            rendered += classification_texts(tokenizer, batch)
        else:
            rendered += tokenizer.render_each(batch, asks, roles=roles)
    each = iter(rendered)
    return [[next(each) for _ in talks] for talks in talks_of_records]


def altered_by_template(
    record: Record, conversation: EncodedChat, empty_think: str
) -> Counter[str]:
    """Returns counts of what a chat template leaves out of a record or adds to it.

    empty_think: of the tokenizer.
    """
    counts: Counter[str] = Counter()
    for kind, count in conversation.hidden.items():
        counts[f"{kind} not shown by the template"] = count

    def num_trained(messages: list[int]) -> int:
        return sum(record.weights is None or record.weights[i] > 0 for i in messages)

    num_empty = num_trained(conversation.empty_thinks)
    if num_empty and empty_think == "train":
        counts["answers trained to begin with an empty <think></think>"] = num_empty
    elif num_empty:
        counts["answers behind an empty <think></think> that is not trained"] = num_empty
    num_asked_otherwise = num_trained(conversation.asked_otherwise)
    if num_asked_otherwise:
        what = "answers that the template asks for in other words than it writes before them"
        counts[what] = num_asked_otherwise
    return counts


def prompt_hash(record: Record) -> int:
    """Returns `text_hash` of the messages before the first answer to a user, or of the text."""
    if record.messages is None:
        return text_hash(record.text)
    contents = [message.get("content") or "" for message in record.messages]
    return text_hash("\n".join(contents[: num_asking(record.messages)]))


def num_asking(messages: list[dict]) -> int:
    """Returns how many messages stand before the first answer to a user."""
    # An answer before any question belongs to the prompt: some data begins with a greeting.
    has_question = False
    for i, message in enumerate(messages):
        if message["role"] == "user":
            has_question = True
        if message["role"] == "assistant" and has_question:
            return i
    return len(messages)


def record_hashes(record: Record) -> tuple[int, int]:
    """Returns `prompt_hash` of a record, and 64 bits of a hash of all that it says.

    That is who says what, letter case and the number of spaces aside, with tool calls and tools, and
    of a preference with the rejected answer.
    """
    messages = record.messages
    if messages is None:
        text = text_hash(record.text)
        return text, text
    contents = [message.get("content") or "" for message in messages]
    first_answer = num_asking(messages)
    prompt = text_hash("\n".join(contents[:first_answer]))
    if record.rejected:
        messages = messages + record.rejected
        contents += [message.get("content") or "" for message in record.rejected]
    # The prompt's hash stands for its words, so that these are read once.
    answers = " ".join("\n".join(contents[first_answer:]).lower().split())
    roles = " ".join([message["role"] for message in messages])
    whole = f"{prompt}\n{roles}\n{answers}"
    calls = [message["tool_calls"] for message in messages if "tool_calls" in message]
    # Most conversations have neither.
    if calls or record.tools:
        whole += f"\n{calls}{record.tools}"
    digest = hashlib.blake2b(whole.encode("utf-8", "replace"), digest_size=8).digest()
    return prompt, int.from_bytes(digest, "big")


def words_of(record: Record) -> str:
    """Returns the text of a record, or the contents of its messages, one after the other."""
    if record.messages is None:
        return record.text
    contents = [message.get("content") or "" for message in record.messages]
    return "\n".join(contents)


def flags_of(record: Record, words: str, tokenizer: Tokenizer) -> int:
    """Returns the sum of the flags that hold for a record. words: of `words_of`.

    They are IS_CHAT, ONE_WORD_ANSWER, CONTROL_TOKEN, PRIVATE_PART and RENDERED_CHAT.
    """
    flags = 0
    if record.messages is not None:
        flags |= IS_CHAT
        for message in record.messages:
            # An answer that calls a tool need not say anything.
            if message["role"] != "assistant" or message.get("tool_calls"):
                continue
            # Split once: whether there is a second word is all that matters.
            if len(message["content"].split(None, 1)) == 1:
                flags |= ONE_WORD_ANSWER
                break
    if tokenizer.spells_control(words):
        flags |= CONTROL_TOKEN
    if private_parts(words):
        flags |= PRIVATE_PART
    if holds_rendered_chat(words) or tokenizer.spells_answer_header(words):
        flags |= RENDERED_CHAT
    return flags
