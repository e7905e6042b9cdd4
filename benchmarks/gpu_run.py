"""Runs the rows of gpu_rows.py, each in a process of its own with a limit, and keeps what they found. See gpu_run.sh.

Nothing here touches the GPU, so nothing here can hang on it. A row's process and all that it starts are killed when its
limit is over, which is its own or what is left of the budget; a measurement that ends its process is noted as failed,
and the row is started again for the rest. The file is written whole and renamed into place whenever something is new,
so whatever ends this script, the file has all that was measured by then.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import gpu_rows

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
FORMAT = 1
LEAST = 15.0  # seconds; with less left of the budget no row is begun
POLL = 0.2
SLOWER = 5  # times as long as on a card may a row of a rehearsal take: other work runs beside it, as in tests
SAME = ("device", "torch", "triton", "commit")  # what a file's runs must have in common
ENDED = ("done", "left out")  # a row with this status is not run again by a run that goes on


class Results:
    """The file of results, and what it holds."""

    def __init__(self, file: Path, head: dict):
        self.file, self.content = file, head | {"rows": []}
        if file.is_file():
            self.content = json.loads(file.read_text())
            if self.content.get("format") != FORMAT:
                sys.exit(f"{file}: holds no results of this script; name another --out")

    def row(self, name: str) -> dict | None:
        return next((row for row in self.content["rows"] if row["name"] == name), None)

    def put(self, row: dict) -> None:
        """Puts a row in, in place of one of its name, and writes the file."""
        rows = [other for other in self.content["rows"] if other["name"] != row["name"]]
        order = [known.name for known in gpu_rows.ROWS]
        self.content["rows"] = sorted([*rows, row], key=lambda each: order.index(each["name"]))
        self.write()

    def write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        tmp = self.file.with_name(f".{self.file.name}.{os.getpid()}")
        with tmp.open("w") as file:
            json.dump(self.content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        tmp.replace(self.file)


@dataclass
class Ending:
    """How a process ended: its exit code, or None where it was killed at its limit."""

    code: int | None


def run_in_group(words: list[str], limit: float, log, on_poll=lambda: None, **settings) -> Ending:
    """Runs a command in a process group of its own, all of which is killed after `limit` seconds, and also if this
    process is interrupted. on_poll is called now and then meanwhile."""
    end = time.monotonic() + limit
    process = subprocess.Popen(words, stdout=log, stderr=log, process_group=0, **settings)
    try:
        while time.monotonic() < end:
            try:
                code = process.wait(POLL)
            except subprocess.TimeoutExpired:
                on_poll()
                continue
            return Ending(code)
        return Ending(None)
    finally:
        kill_group(process)


def kill_group(process: subprocess.Popen) -> None:
    """Kills what is left of a process and of all that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # nothing is left
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:  # inside the driver, which may never let it go
        print(f"          process {process.pid} does not end; going on without it", flush=True)


class RowRun:
    """One row's way through its processes."""

    def __init__(self, row: gpu_rows.Row, limit: float, rehearse: bool, work: Path, put, known: dict | None):
        """known: the row's record so far, of which what was measured is kept."""
        self.row, self.rehearse, self.put = row, rehearse, put
        self.limit, self.end = limit, time.monotonic() + limit
        self.lines, self.log = work / f"{row.name}.jsonl", work / f"{row.name}.log"
        settings = row.settings | (row.rehearsal if rehearse else {})
        self.record = {"name": row.name, "what": row.what, "status": "running", "why": "", "limit": round(limit)}
        self.record |= {"seconds": 0.0, "settings": settings, "measurements": []}
        kept = [each for each in known["measurements"] if each["status"] == "done"] if known else []
        self.record["measurements"] = kept
        self.begun = [each["name"] for each in kept]
        self.open, self.read, self.start = None, 0, time.monotonic()

    def words(self) -> list[str]:
        words = [sys.executable, "-W", "ignore", str(HERE / "gpu_rows.py"), self.row.name, "--lines", str(self.lines)]
        words += ["--rehearse"] if self.rehearse else []
        return words + (["--skip", *self.begun] if self.begun else [])

    def run(self) -> dict:
        """The row's record at its end."""
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        if self.rehearse:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        # not from the repository's root: its folders would hide packages that the peer imports
        settings = {"cwd": tempfile.gettempdir(), "env": environment}
        while True:
            before = len(self.begun)
            with self.log.open("a") as log:
                ending = run_in_group(self.words(), self.end - time.monotonic(), log, self.look, **settings)
            self.look()
            if ending.code is None:
                self.finish("killed", f"it had not ended after {self.limit:.0f} s")
                break
            if ending.code in (0, gpu_rows.LEFT_OUT):
                self.finish("done" if ending.code == 0 else "left out", self.record["why"])
                break
            died = self.open is not None
            self.close_open(f"its process ended with {name_of_code(ending.code)}: {self.last_line()}")
            if not (died or ending.code == gpu_rows.CONTEXT_LOST) or len(self.begun) == before:
                self.finish("failed", self.last_line())
                break
        return self.record

    def look(self) -> None:
        """Takes up what the row's process has written since the last look."""
        if not self.lines.is_file():
            return
        with self.lines.open("rb") as file:
            file.seek(self.read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]  # a line may be half-written
        self.read += len(whole)
        for line in map(json.loads, whole.splitlines()):
            if "begin" in line:
                self.open = line["begin"]
                self.begun.append(self.open)
            elif "left_out" in line:
                self.record["why"] = line["left_out"]
            else:
                self.open = None if line["end"] == self.open else self.open
                self.record["measurements"].append({"name": line.pop("end"), **line})
        self.record["seconds"] = round(time.monotonic() - self.start, 1)
        if whole:
            self.put(self.record)

    def close_open(self, why: str) -> None:
        if self.open is not None:
            failed = {"name": self.open, "status": "failed", "values": {}, "error": why, "seconds": 0.0}
            self.record["measurements"].append(failed)
            self.open = None

    def finish(self, status: str, why: str) -> None:
        self.close_open(why)
        self.record |= {"status": status, "why": why, "seconds": round(time.monotonic() - self.start, 1)}
        if status in ("failed", "killed") and self.log.is_file():
            self.record["log"] = self.log.read_text(errors="replace")[-2000:]

    def last_line(self) -> str:
        lines = self.log.read_text(errors="replace").split("\n") if self.log.is_file() else []
        return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "no word")


def name_of_code(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def commit() -> str:
    """The commit of the files here, and whether they have been changed since."""
    words = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*words, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        status = subprocess.run(
            [*words, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + (", changed" if status.stdout.strip() else "")


def parse_limits(words: list[str], names: list[str]) -> dict[str, float]:
    """{row: seconds} of words like kernels=30."""
    limits = {}
    for word in words:
        name, _, seconds = word.partition("=")
        if name not in names or not seconds.replace(".", "", 1).isdigit():
            sys.exit(f"--limit {word}: ROW=SECONDS is wanted; --list names the rows")
        limits[name] = float(seconds)
    return limits


def parse_args() -> argparse.Namespace:
    names = [row.name for row in gpu_rows.ROWS]
    parser = argparse.ArgumentParser("gpu_run.sh", description="Measures everything that only a GPU can tell.")
    parser.add_argument("--minutes", type=float, default=12.0, help="budget of all rows together (default: 12)")
    parser.add_argument("--only", nargs="+", choices=names, metavar="ROW", help="these rows, and environment")
    parser.add_argument("--list", action="store_true", help="print the rows, what they measure, their limits; and stop")
    parser.add_argument("--out", type=Path, help="file of results (default: one in benchmarks/results/)")
    parser.add_argument("--limit", nargs="+", default=[], metavar="ROW=SECONDS", help="another limit of a row")
    parser.add_argument("--commit", help="where the files here are no git checkout: the commit that they are of")
    parser.add_argument("--rehearse", action="store_true", help="all rows on the CPU, with tiny shapes")
    args = parser.parse_args()
    args.limits = parse_limits(args.limit, names)
    return args


def default_out(rehearse: bool) -> Path:
    if rehearse:
        return Path(tempfile.gettempdir()) / "gpu_rehearsal.json"
    return HERE / "results" / f"{datetime.now(UTC):%Y-%m-%d-%H%M}.json"


def check_same_machine(results: Results, record: dict, args: argparse.Namespace) -> None:
    """Notes what the row `environment` has found; ends the script where the file is of another card or program."""
    values = {"commit": args.commit or commit()}
    for measurement in record["measurements"]:
        values |= measurement["values"] if measurement["name"] == "machine" else {}
    if "device" not in values:
        sys.exit(f"environment: {record['status']}, {record['why']}\n{record.get('log', '')}")
    before = results.content.get("environment")
    for key in SAME:
        if before and before.get(key) != values.get(key):
            sys.exit(f"{results.file}: is of {key} {before.get(key)}, here is {values.get(key)}; name another --out")
    results.content["environment"] = values
    results.write()


def say(record: dict) -> None:
    failed = [each["name"] for each in record["measurements"] if each["status"] == "failed"]
    count = len(record["measurements"])
    told = f"{record['name']:16}{record['status']:10}{record['seconds']:6.1f} s   {count} results"
    told += f", failed: {'; '.join(failed)}" if failed else ""
    told += f"   ({record['why']})" if record["why"] else ""
    print(told, flush=True)


def main() -> None:
    args = parse_args()
    if args.list:
        for row in gpu_rows.ROWS:
            print(f"{row.name:16}{row.limit:5} s   {row.what}")
        print(f"{'':16}{sum(row.limit for row in gpu_rows.ROWS):5} s   at most, of which --minutes takes what fits")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    end = time.monotonic() + 60 * args.minutes
    words = ["bash", "benchmarks/gpu_run.sh"]
    words += ["--minutes", f"{args.minutes:g}"] + (["--rehearse"] if args.rehearse else [])
    words += ["--only", *args.only] if args.only else []
    head = {"format": FORMAT, "command": shlex.join(words), "date": f"{datetime.now(UTC):%Y-%m-%d}"}
    head["rehearsal"] = args.rehearse
    results = Results(args.out or default_out(args.rehearse), head)
    if results.content["rehearsal"] != args.rehearse:
        sys.exit(f"{results.file}: a rehearsal and a measurement do not share a file; name another --out")
    with tempfile.TemporaryDirectory() as work:
        for row in gpu_rows.ROWS:
            known = results.row(row.name)
            wanted = row.name in args.only if args.only else known is None or known["status"] not in ENDED
            if not wanted and row.name != "environment":
                continue
            usual = row.limit * (SLOWER if args.rehearse else 1)
            limit = min(args.limits.get(row.name, usual), end - time.monotonic())
            if end - time.monotonic() < LEAST:
                why = f"the budget of {args.minutes:g} minutes was used up"
                record = {"name": row.name, "what": row.what, "status": "not run", "why": why, "seconds": 0.0}
                record |= {"measurements": []}
                if known:  # cut off by an earlier run: what it has stays
                    continue
            else:
                again = bool(args.only) or row.name == "environment"
                put, known = results.put, None if again else known
                record = RowRun(row, limit, args.rehearse, Path(work), put, known).run()
            results.put(record)
            say(record)
            if row.name == "environment":
                check_same_machine(results, record, args)
    print(f"results   {results.file}")


if __name__ == "__main__":
    main()
