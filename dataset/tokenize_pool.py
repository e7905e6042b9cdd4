"""Worker processes that read and tokenise records: one a core, each with a pipe to the parent.

`in_order` applies a function to chunks of records and yields the results in the order of the
chunks, as if a single process had done it; errors come in that order too. Few chunks are under way
at a time, so that memory is bounded.

Workers are forked and may not outlive their parent. A worker that waits for work sees the end of
its pipe when the parent is gone, even if the parent was killed. That needs every other copy of the
parent's end to be closed: a fork inherits the ends of all workers that were started before it, so
each worker closes those first. (concurrent.futures.ProcessPoolExecutor does not promise that
orphans end.)
"""

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

from common.errors import UserError
from common.progress import progress
from dataset.formats import Source
from dataset.readers import number_of_rows

# A chunk ends at this many records or at this many bytes, whichever comes first.
CHUNK_RECORDS = 1024
CHUNK_BYTES = 1 << 20
# Bytes of a source up to which one process reads it, since starting others would not pay.
ALONE = 1 << 20
# Chunks that were sent and whose results were not yielded yet.
MAX_CHUNKS_PER_PROCESS = 4
WORKER_ENDED = "a process that read the data ended, killed perhaps because memory ran out"

WorkerAnswer = tuple[bool, Any]  # of a worker to a chunk: (True, result) or (False, exception)


def processes_for(source: Source) -> int:
    """Returns how many processes read a source: one a core if there is enough to do, else 1.

    Also 1 on systems other than Linux, where a process cannot be forked safely.
    """
    size = sum(os.stat(container.path).st_size for container in source.containers)
    if size > ALONE and sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return 1


def chunks(source: Source) -> Iterator[list[tuple[int, int, object]]]:
    """Yields the payloads of a source, (container, number, payload), in lists of CHUNK_RECORDS or
    CHUNK_BYTES."""
    chunk = []
    size = 0
    for payload in source.payloads():
        content = payload[2]
        chunk.append(payload)
        if isinstance(content, bytes):
            size += len(content)
        else:
            # The size of a decoded record is not known; it counts as one of CHUNK_RECORDS.
            size += CHUNK_BYTES // CHUNK_RECORDS
        if len(chunk) >= CHUNK_RECORDS or size >= CHUNK_BYTES:
            yield chunk
            chunk = []
            size = 0
    if chunk:
        yield chunk


class ReadingProgress:
    """Shows how much of a source was read: bytes of JSONL and rows of Parquet, whose totals are
    known beforehand, else records alone.

    `of` counts the chunks as they are handed out, and `update` those that have come back, in the
    same order.
    """

    def __init__(self, what: str, source: Source, shown: bool = True):
        kinds = {container.kind for container in source.containers}
        paths = [container.path for container in source.containers]
        total, unit = None, "record"
        if kinds == {"JSONL"} and not source.format.group:
            total, unit = sum(os.stat(path).st_size for path in paths), "byte"
        elif kinds == {"Parquet"}:
            total = sum(number_of_rows(path) for path in paths)
        self.counts_bytes = unit == "byte"
        self.amounts: deque[int] = deque()
        self.bar = progress(what, total, unit, shown)

    def of(self, chunks: Iterable[list]) -> Iterator[list]:
        """Yields the chunks."""
        for chunk in chunks:
            amount = len(chunk)
            if self.counts_bytes:
                # The ends of the lines are no part of them.
                amount += sum(len(content) for _, _, content in chunk if isinstance(content, bytes))
            self.amounts.append(amount)
            yield chunk

    def update(self, remark: str) -> None:
        """Counts the oldest chunk that was handed out as done. remark: is shown beside the count."""
        self.bar.set_postfix_str(remark, refresh=False)
        self.bar.update(self.amounts.popleft())

    def close(self) -> None:
        self.bar.close()


def nothing() -> None:
    """Does nothing: the default of `prepare`."""


def in_order(
    work: Callable, chunks: Iterable, processes: int, prepare: Callable = nothing
) -> Iterator:
    """Yields work(chunk) of each chunk, in the order of the chunks, computed by forked processes.

    work: the function of a chunk.
    chunks: what to work on; none of them is None.
    processes: the number of workers; 1 means that this process does the work itself.
    prepare: a function that each worker calls first.

    Raises here what `work` raised, for the first chunk that failed; a UserError of `chunks` after
    the results of the chunks before it; UserError if a worker ends.
    """
    if processes == 1:
        yield from map(work, chunks)
        return
    context = multiprocessing.get_context("fork")
    # A forked process would print what is still in these buffers once more.
    sys.stdout.flush()
    sys.stderr.flush()
    pipes: list[Connection] = []
    workers = []
    try:
        for _ in range(processes):
            parent_end, worker_end = context.Pipe()
            pipes.append(parent_end)
            arguments = (work, worker_end, list(pipes), prepare)
            worker = context.Process(target=serve, args=arguments, daemon=True)
            worker.start()
            workers.append(worker)
            # The worker has its own copy. With this one open, its end would go unnoticed here.
            worker_end.close()
        yield from exchange(work, chunks, pipes)
    finally:
        # A worker that waits for work ends by itself when its pipe is closed, and ends its
        # template's process.
        for pipe in pipes:
            pipe.close()
        for worker in workers:
            worker.join(1)
            worker.kill()
            worker.join()


def exchange(work: Callable, chunks: Iterable, pipes: list[Connection]) -> Iterator:
    """Sends chunks to the workers behind the pipes, and yields their results in the order of the
    chunks."""
    chunks = iter(chunks)
    idle = list(pipes)
    busy: dict[Connection, int] = {}  # pipe: number of the chunk that its worker has
    answers: dict[int, WorkerAnswer] = {}  # by the number of the chunk
    num_sent = 0
    num_yielded = 0
    max_under_way = MAX_CHUNKS_PER_PROCESS * len(pipes)
    exhausted = False
    while busy or not exhausted:
        # Every idle worker gets a chunk, unless a slow one holds up too many results of others.
        while idle and not exhausted and num_sent - num_yielded < max_under_way:
            try:
                chunk = next(chunks, None)
            except UserError as error:
                # It is raised in its place, behind the results and errors of the chunks before it.
                answers[num_sent] = (False, error)
                chunk = None
            if chunk is None:
                exhausted = True
                break
            try:
                idle[-1].send(chunk)
                # Only now, since a worker that could not be sent the chunk is still idle.
                busy[idle.pop()] = num_sent
            except RecursionError:
                # A record that is nested so deep cannot be sent, so this process does the work.
                answers[num_sent] = (True, work(chunk))
            except OSError:
                raise UserError(WORKER_ENDED) from None
            num_sent += 1
        if busy:
            for pipe in wait([*busy]):
                number = busy[pipe]
                answers[number] = receive(pipe)
                del busy[pipe]
                idle.append(pipe)
        while num_yielded in answers:
            yield result_of(answers.pop(num_yielded))
            num_yielded += 1


def receive(pipe: Connection) -> WorkerAnswer:
    """Returns a worker's answer. Raises UserError if the worker has ended."""
    try:
        return pipe.recv()
    except (EOFError, OSError):
        raise UserError(WORKER_ENDED) from None


def result_of(answer: WorkerAnswer) -> object:
    """Returns the result in a worker's answer, or raises the exception in it."""
    succeeded, result = answer
    if not succeeded:
        raise result
    return result


def serve(
    work: Callable, pipe: Connection, parent_ends: list[Connection], prepare: Callable
) -> None:
    """Runs a worker: receives chunks and sends back (True, work(chunk)) or (False, exception) until
    the pipe closes.

    parent_ends: the parent's ends of all pipes so far, inherited by the fork.
    """
    # Ctrl-C in a terminal reaches all processes; this one is ended by its parent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # With a copy of the parent's end open, a worker would never notice that its parent is gone.
    for end in parent_ends:
        end.close()
    prepare()
    # Nothing here makes reference cycles, and looking for them takes 4 % of the time.
    gc.disable()
    with contextlib.suppress(EOFError, OSError):
        while True:
            chunk = pipe.recv()
            try:
                answer = (True, work(chunk))
            except Exception as error:  # noqa: BLE001  the parent raises it again
                answer = (False, error)
            pipe.send(answer)
