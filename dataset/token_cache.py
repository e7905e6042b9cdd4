"""Tokenised records on disk: a folder of plain arrays, mapped into memory, made once for a file, a tokenizer and a
template.

`tokenised(source, tokenizer)` returns them out of the cache, or makes them: records are read, rendered and tokenised by
a process a core, in the order of the file, and written as they come, so that memory does not grow with the file. A
folder's name is a hash of all that its content depends on, the files' bytes included. It appears whole or not at all; a
process that wants what another one is making waits for it. Lengths are not cut here: that is data.py's.

    ids.bin      uint16 or uint32 [T]   tokens, record after record        starts.bin       int64 [N + 1]
    spans.bin    int32 [S, 2]           trained: [start, end) in a record  span_starts.bin  int64 [N + 1]
    weights.bin  float32 [S]            of each span
    records.bin  int64 [N, 3]           file and number, to name it; CHAT and other signs of it
    prompts.bin  uint64 [N]             hash of what stands before the first answer
    contents.bin uint64 [N]             hash of the record's ids
    meta.json                           what was found and left out
"""

import atexit
import contextlib
import gc
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
import uuid
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.errors import UserError
from common.files import atomic_folder, cache_folder, file_sha256, write_json
from dataset.formats import Source
from dataset.readers import CLASS_NAMES
from dataset.records import ReadStats, Record
from dataset.text_stats import private_parts, text_hash
from tokenizer import TemplateError, Tokenizer

FORMAT = 3  # of the folders: counting it up makes all afresh
KEPT = 20 << 30  # bytes of rows that the cache keeps; what was not used for longest goes first
CHUNK_RECORDS, CHUNK_BYTES = 1024, 1 << 20  # what a process is given at a time
TOGETHER = 256  # conversations that the template's process is given at a time
ALONE = 1 << 20  # bytes of a source that other processes would not be started for
# Signs of a record: a conversation, not a text; an answer of one word; words that spell a control token; an address or
# a secret
CHAT, ONE_WORD, CONTROL, PRIVATE = 1, 2, 4, 8
ARRAYS = {"starts": np.int64, "spans": np.int32, "span_starts": np.int64, "weights": np.float32, "records": np.int64}
ARRAYS |= {"prompts": np.uint64, "contents": np.uint64}
SHAPES = {"spans": (-1, 2), "records": (-1, 3)}


@dataclass
class Rows:
    """N tokenised records, as the arrays above."""

    ids: np.ndarray
    starts: np.ndarray
    spans: np.ndarray
    span_starts: np.ndarray
    weights: np.ndarray
    records: np.ndarray
    prompts: np.ndarray
    contents: np.ndarray
    stats: ReadStats
    largest: int  # id
    units: list[str]  # of each file: "FILE line", to which a record's number is put
    cached: bool  # whether they were there already

    def __len__(self) -> int:
        return len(self.prompts)

    def where(self, i: int) -> str:
        file, number, _ = self.records[i]
        return f"{self.units[file]} {number}"


def tokenized_rows(source: Source, tokenizer: Tokenizer, roles: tuple[str, ...] = ("assistant",)) -> Rows:
    """The rows of a source. roles: whose turns are trained. Raises UserError that names the record which can't be read,
    and where nothing is left."""
    before = file_stamps(source)
    folder = cache_folder() / f"rows-{key(source, tokenizer, roles)[:32]}"
    if source.map:  # what it reads besides the record can't be known: its rows are for this run alone
        folder = folder.with_name(f"rows-map-{uuid.uuid4().hex}")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if not (cached := folder.is_dir()):
        with locked(folder):
            if not (cached := folder.is_dir()):  # else another process made it while this one waited
                make_room(folder.parent)
                try:
                    with atomic_folder(folder) as tmp:
                        write(source, tokenizer, roles, tmp)
                        if file_stamps(source) != before:
                            raise UserError(f"{source.path}: changed while it was read; start again when it is whole")
                except OSError:
                    if not folder.is_dir():  # else another one was faster, where there are no locks
                        raise
    with contextlib.suppress(OSError):
        os.utime(folder)
    return open_rows(folder, source, cached)


def key(source: Source, tokenizer: Tokenizer, roles: tuple[str, ...]) -> str:
    """A hash of everything that rows depend on."""
    files = []
    for container in source.containers:
        beside = container.path.parent / CLASS_NAMES
        named = container.kind.startswith(("CSV", "TSV")) and beside.is_file()
        files.append((container.kind, file_sha256(container.path), file_sha256(beside) if named else ""))
    today = time.strftime("%x") if any("strftime_now" in each for each in tokenizer.templates.values()) else ""
    parts = [FORMAT, files, source.format.name, source.trees, roles, tokenizer.fingerprint, today]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def file_stamps(source: Source) -> list[tuple[int, int]]:
    """Size and time of each file, by which a change is seen."""
    return [(state.st_size, state.st_mtime_ns) for state in (c.path.stat() for c in source.containers)]


def open_rows(folder: Path, source: Source, cached: bool) -> Rows:
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))

    def array(name: str, dtype) -> np.ndarray:
        file = folder / f"{name}.bin"
        if not file.stat().st_size:  # nothing that could be mapped
            return np.empty(0, dtype).reshape(SHAPES.get(name, -1))
        return np.memmap(file, dtype, "r").reshape(SHAPES.get(name, -1))

    counts = (Counter(meta[name]) for name in ("dropped", "altered"))
    stats = ReadStats(meta["records"], *counts, dict.fromkeys(meta["ignored"], True))
    units = [f"{container.path} {container.unit}" for container in source.containers]
    arrays = {name: array(name, dtype) for name, dtype in ARRAYS.items()}
    return Rows(array("ids", meta["dtype"]), **arrays, stats=stats, largest=meta["largest"], units=units, cached=cached)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a lock for this folder, where the system has such."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows: then two may do the same work, and the second rename fails
        yield
        return
    with open(folder.parent / f".{folder.name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.unlink(file.name)  # one who waits holds this file still, and looks for the folder first


def make_room(cache: Path) -> None:
    """Lets go of the rows unused for longest, where there are too many, and of what crashed processes left."""
    for tmp in cache.glob(".rows-*.partial-*"):
        pid = tmp.name.rpartition("-")[2]
        with contextlib.suppress(OSError):
            # it may be alive on another machine, or in another container, that has this cache too
            old = time.time() - tmp.stat().st_mtime > 86_400
            if pid.isdecimal() and old and not _runs(int(pid)):
                shutil.rmtree(tmp, ignore_errors=True)
    kept = 0
    with contextlib.suppress(OSError):  # another process may do the same
        for folder in sorted(cache.glob("rows-*"), key=lambda each: -each.stat().st_mtime):
            kept += sum(file.stat().st_size for file in folder.iterdir())
            if kept > KEPT:
                shutil.rmtree(folder, ignore_errors=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


# ---- making them ----


@dataclass
class Part:
    """Some records, tokenised; the arrays of `Rows`, without the two of starts."""

    ids: np.ndarray
    lengths: np.ndarray
    spans: np.ndarray
    span_counts: np.ndarray
    weights: np.ndarray
    records: np.ndarray
    prompts: np.ndarray
    contents: np.ndarray
    stats: ReadStats


def write(source: Source, tokenizer: Tokenizer, roles: tuple[str, ...], folder: Path) -> None:
    if tokenizer.vocab_size > 1 << 32:
        raise UserError(f"{tokenizer.source}: an id of its tokenizer is beyond 32 bits")
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    work = partial(encode, source, tokenizer, roles, dtype)
    processes = processes_for(source)
    stats, tokens, spans, largest = ReadStats(), 0, 0, 0
    files = {name: open(folder / f"{name}.bin", "wb") for name in ("ids", *ARRAYS)}  # noqa: SIM115
    bar = tqdm(unit="record", desc="tokenising", disable=None if processes > 1 else True, leave=False)
    try:
        files["starts"].write(np.zeros(1, np.int64))
        files["span_starts"].write(np.zeros(1, np.int64))
        for part in in_order(work, chunks(source), processes, tokenizer.forget_processes):
            starts, span_starts = tokens + np.cumsum(part.lengths), spans + np.cumsum(part.span_counts)
            tokens, spans = tokens + len(part.ids), spans + len(part.weights)
            largest = max(largest, int(part.ids.max(initial=0)))
            arrays = {"starts": starts, "span_starts": span_starts, "ids": part.ids}
            for name, file in files.items():
                file.write(np.ascontiguousarray(arrays.get(name, getattr(part, name, None)), ARRAYS.get(name)).data)
            stats.add(part.stats)
            bar.set_postfix_str(f"{tokens:,} tokens", refresh=False)
            bar.update(part.stats.records)
    finally:
        bar.close()
        for file in files.values():
            file.close()
    stats.complain_if_empty(source.path)
    meta = vars(stats) | {"ignored": [*stats.ignored]}
    write_json(meta | {"largest": largest, "dtype": dtype.name, "tokens": tokens}, folder / "meta.json")


def processes_for(source: Source) -> int:
    """A process a core, where there is enough to do. Elsewhere than on Linux a process can't be forked safely."""
    size = sum(container.path.stat().st_size for container in source.containers)
    return len(os.sched_getaffinity(0)) if size > ALONE and sys.platform == "linux" else 1


def chunks(source: Source) -> Iterator[list[tuple[int, int, object]]]:
    """Payloads in lists that are neither too short nor too large."""
    chunk, size = [], 0
    for payload in source.payloads():
        chunk.append(payload)
        size += len(payload[2]) if isinstance(payload[2], bytes) else CHUNK_BYTES // CHUNK_RECORDS
        if len(chunk) >= CHUNK_RECORDS or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def encode(source: Source, tokenizer: Tokenizer, roles: tuple[str, ...], dtype: np.dtype, chunk: list) -> Part:
    """What a process does with a chunk."""
    stats, numbered = ReadStats(), []
    for container, number, payload in chunk:
        numbered += [((container, number), r) for r in source.read(container, number, payload, stats)]
    chats = [record for _, record in numbered if record.messages is not None]
    rendered = []
    for i in range(0, len(chats), TOGETHER):
        rendered += tokenizer.render_each([(r.messages, r.tools) for r in chats[i : i + TOGETHER]], roles=roles)
    results, lines, kept = iter(rendered), [], 0
    for place, record in numbered:
        line, reason = encode_record(record, tokenizer, next(results) if record.messages is not None else None)
        if reason:
            stats.drop(reason)
        else:
            signs = flags_of(record, tokenizer)
            lines.append((*line, (*place, signs), prompt_hash(record)))
            kept += 1
            if record.messages is not None:
                stats.altered.update(hidden_by_template(record, tokenizer))
    stats.records = kept
    ids, hashes, spans = array(dtype.char), [], [span for line in lines for span in line[1]]
    for line in lines:
        new = array(dtype.char, line[0])
        ids.extend(new)
        hashes.append(hashlib.blake2b(new, digest_size=8).digest())
    return Part(
        ids=np.frombuffer(ids, dtype),
        lengths=np.array([len(line[0]) for line in lines], np.int64),
        spans=np.array([span[:2] for span in spans], np.int32).reshape(-1, 2),
        span_counts=np.array([len(line[1]) for line in lines], np.int64),
        weights=np.array([span[2] for span in spans], np.float32),
        records=np.array([line[2] for line in lines], np.int64).reshape(-1, 3),
        prompts=np.array([line[3] for line in lines], np.uint64),
        contents=np.frombuffer(b"".join(hashes), np.uint64),
        stats=stats,
    )


def encode_record(record: Record, tokenizer: Tokenizer, rendered) -> tuple[tuple | None, str | None]:
    """(ids, [(start, end, weight), ...]), or why there is nothing to train on."""
    if record.messages is None:
        bos = record.first and tokenizer.bos_id is not None and tokenizer.adds_bos
        try:
            ids = tokenizer.encode(record.text, bos=bos, eos=record.last)
        except UserError as error:
            return None, str(error)
        if len(ids) < 2:
            return None, "of a single token, which nothing predicts"
        return (ids, [(0, len(ids), 1.0)]), None
    if isinstance(rendered, UserError):
        return None, f"refused by the {rendered}" if isinstance(rendered, TemplateError) else str(rendered)
    if record.label is False:
        return None, "labelled as a bad answer"
    ids, turns = rendered
    weights = record.weights or [1.0] * len(record.messages)
    spans = [(a, b, float(np.float32(weights[message]))) for a, b, message in turns]
    return ((ids, spans), None) if any(weight for *_, weight in spans) else (None, "without a trained token")


def hidden_by_template(record: Record, tokenizer: Tokenizer) -> list[str]:
    """What a conversation has and its template never looks at."""
    source = tokenizer.templates[tokenizer.which_template(record.tools)]
    thinks = any("reasoning_content" in turn for turn in record.messages)
    missed = ["tools"] if record.tools and "tools" not in source else []
    missed += ["thoughts"] if thinks and "reasoning_content" not in source else []
    return [f"with {what} that the template does not show" for what in missed]


def prompt_hash(record: Record) -> int:
    """Of what stands before the first answer to a user, or of the text; letter case and spaces aside."""
    turns = record.messages
    if turns is None:
        text = record.text
    else:
        asked = next((i for i, turn in enumerate(turns) if turn["role"] == "user"), len(turns))
        answers = (i for i, turn in enumerate(turns) if turn["role"] == "assistant" and i > asked)
        text = "\n".join(turn.get("content") or "" for turn in turns[: next(answers, len(turns))])
    return text_hash(text)


def words_of(record: Record) -> str:
    if record.messages is None:
        return record.text
    return "\n".join(turn.get("content") or "" for turn in record.messages)


def flags_of(record: Record, tokenizer: Tokenizer) -> int:
    words = words_of(record)
    signs = CHAT * (record.messages is not None)
    if record.messages is not None:
        answers = (turn for turn in record.messages if turn["role"] == "assistant" and not turn.get("tool_calls"))
        signs |= ONE_WORD * any(len(turn["content"].split(None, 1)) == 1 for turn in answers)
    return signs | CONTROL * tokenizer.spells_control(words) | PRIVATE * bool(private_parts(words))


# ---- several processes ----


def in_order(work: Callable, chunks: Iterable, processes: int, prepare: Callable = lambda: None) -> Iterator:
    """work(chunk) of each chunk, in order, by forked processes; few chunks are under way, so that memory is bounded.
    prepare: called first in each. An exception of `work` is raised here, that of the first chunk first."""
    if processes == 1:
        yield from map(work, chunks)
        return
    context, ends, children = multiprocessing.get_context("fork"), [], []
    sys.stdout.flush(), sys.stderr.flush()
    try:
        for _ in range(processes):
            here, there = context.Pipe()
            ends.append(here)
            children.append(context.Process(target=serve, args=(work, there, list(ends), prepare), daemon=True))
            children[-1].start()
            there.close()
        chunks, more, taken, out = iter(chunks), True, 0, 0
        idle, busy, done = list(ends), {}, {}  # pipes; number of a pipe's chunk; results by number
        while more or busy:
            while more and idle and taken - out < 4 * processes:
                try:
                    chunk = next(chunks, None)
                except UserError as error:  # told in its turn, behind what stands before it
                    done[taken], chunk = (False, error), None
                if chunk is None:
                    more = False
                    break
                try:
                    idle[-1].send(chunk)
                    busy[idle.pop()] = taken
                except RecursionError:  # a record nested so deep that it can't be sent
                    done[taken] = True, work(chunk)
                except OSError:
                    raise UserError(ENDED) from None
                taken += 1
            for end in wait([*busy]) if busy else ():
                done[busy.pop(end)] = receive(end)
                idle.append(end)
            while out in done:
                yield unwrap(done.pop(out))
                out += 1
    finally:
        for end in ends:
            end.close()  # a child that waits for work ends by itself, and ends its template's process
        for child in children:
            child.join(1)
            child.kill()
            child.join()


ENDED = "a process that read the data ended, killed for want of memory perhaps"


def receive(end) -> tuple[bool, object]:
    try:
        return end.recv()
    except (EOFError, OSError):
        raise UserError(ENDED) from None


def unwrap(answer: tuple[bool, object]):
    ok, result = answer
    if not ok:
        raise result
    return result


def serve(work: Callable, end, others: list, prepare: Callable) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; this process's parent ends it
    for other in others:  # so that this process notices when its parent is gone
        other.close()
    prepare()
    gc.disable()  # nothing here goes round in circles, and to look for some takes 4 % of the time
    with contextlib.suppress(EOFError, OSError):
        while True:
            chunk = end.recv()
            try:
                result = True, work(chunk)
            except Exception as error:  # noqa: BLE001  raised again by the parent
                result = False, error
            end.send(result)
