"""Trains with several values of train.py's options, and says which are best.

    python sweep.py --lr 1e-4,3e-4,1e-3 --rank 4,16 -- --model FOLDER --data FILE.json     every combination
    python sweep.py --lr 1e-5..1e-2 --trials 12 -- --model FOLDER --data FILE.json         drawn from a range
    python sweep.py --lr 1e-5..1e-2 --trials 27 --search halving -- ... --steps 300        many short, few long
    python sweep.py --out sweeps/mine --resume                                             go on

A trial is a run of train.py in a process and a folder of its own, and its score is what best/ holds: the
lowest validation loss, or the highest score of --eval-metric. Options behind `--` are those of all trials.
A trial that dies is counted, and the others go on.

Written to --out: sweep.json (what is tried), results.jsonl (a line for each run that has ended), a folder
and a log for each run, and at the end table.txt and sweep.png.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from common.console import format_duration, lasting_output, number_of
from common.errors import UserError, printable, run
from common.files import atomic_file
from common.folder_lock import FolderLock, find_holder
from common.progress import Progress, progress
from flags import dashed
from training.sweep_picture import draw_sweep
from training.sweep_results import (
    Result,
    edge_remarks,
    read_outcome,
    read_results,
    rows_of_trials,
    score_text,
    sweep_table,
)
from training.sweep_search import Search, Trial
from training.sweep_words import (
    REDUCTION,
    Sweep,
    num_rungs,
    save_sweep,
    share_of_rung,
    sweep_arguments,
    words_of_values,
)

TRAIN_SCRIPT = Path(__file__).resolve().parent / "train.py"
# Seconds between two looks at the runs at hand.
POLL_SECONDS = 0.2
# So many trials that end with the same words, and nothing else, end the sweep: its options are wrong.
SAME_FAILURES = 3
# Of a log, where its last words are; torchrun adds some hundred for each process.
LOG_END_BYTES = 16_384
# What a folder of a run holds that only its weights are: removed once another trial is better.
WEIGHT_FOLDERS = ("best", "final", "checkpoints")


def main() -> None:
    sweep = sweep_arguments()
    remark = "stdout is closed; what follows is not printed, results.jsonl has the results"
    # What these refuse is said before anything is written.
    devices = devices_of_slots(sweep)
    if sweep.search != "tpe":
        Search(sweep).combinations()
    with lasting_output(remark), FolderLock() as lock:
        open_sweep(sweep, lock)
        runner = Runner(sweep, devices)
        with StopSignals(runner):
            runner.run_all()
        if runner.stopped_by:
            where = shlex.quote(sweep.out)
            print(f"stopped   go on by: python sweep.py --out {where} --resume")
            sys.exit(128 + runner.stopped_by)
        report_sweep(sweep, runner.results)


def open_sweep(sweep: Sweep, lock: FolderLock) -> None:
    """Makes the sweep's folder and notes in it what is tried; one that is resumed is locked alone."""
    out = Path(sweep.out)
    try:
        lock.acquire(out)
    except UserError as error:
        raise UserError(f"--out {error}") from None
    if sweep.is_resumed:
        print(f"resumed   {out}: {describe(sweep)}")
        return
    save_sweep(sweep)
    print(f"sweep     {describe(sweep)}; in {out}")


def describe(sweep: Sweep) -> str:
    """Returns what is tried, in a line."""
    count = number_of(sweep.trials, "trial")
    names = " and ".join(dashed(name) for name in sweep.space)
    text = f"{count} of {names}, {sweep.why_search}"
    if sweep.seeds:
        text += f", each with {len(sweep.seeds)} seeds"
    if sweep.search == "halving":
        rungs = num_rungs(sweep.trials)
        kept = as_ordinal(REDUCTION)
        text += (
            f"; {rungs} rungs, of which each keeps a {kept} and trains it {REDUCTION} times as long"
        )
    return text


def as_ordinal(number: int) -> str:
    return {2: "half", 3: "third", 4: "quarter"}.get(number, f"{number}th part")


# ---- the runs ----


class SweepRun(NamedTuple):
    """A trial with one seed: a run of train.py. seed: None where seeds are not swept."""

    trial: Trial
    seed: str | None

    @property
    def name(self) -> str:
        """Its folder in the sweep's."""
        name = f"trial-{self.trial.number:03}"
        if self.trial.rung is not None:
            name += f"-rung-{self.trial.rung + 1}"
        return name if self.seed is None else f"{name}-seed-{self.seed}"


class Running(NamedTuple):
    """A run that has been started. slot: which share of the machine it has."""

    run: SweepRun
    process: subprocess.Popen
    slot: int
    start: float


class Runner:
    """Starts the runs of a sweep, at most --at-once at a time, and gathers what came of them.

    devices: the environment variables of each of --at-once runs.
    stopped_by: the number of the signal that ends the sweep; 0: none.
    results: of all runs that have ended.
    """

    def __init__(self, sweep: Sweep, devices: list[dict[str, str]]):
        self.sweep = sweep
        self.devices = devices
        self.out = Path(sweep.out)
        self.running: list[Running] = []
        self.stopped_by = 0
        self.results = self.finished_before()
        # Runs that failed one after the other, with the words of their last lines.
        self.failures = [""] if self.results else []
        self.start = time.monotonic()
        self.cost_done = 0.0

    def finished_before(self) -> list[Result]:
        """Returns what an earlier start of this sweep has finished. What failed then is tried again."""
        file = self.out / "results.jsonl"
        if not self.sweep.is_resumed or not file.is_file():
            return []
        results = read_results(file)
        finished = [result for result in results if not result.error]
        again = len(results) - len(finished)
        tried = f", {number_of(again, 'run')} failed: tried again" if again else ""
        print(f"          {number_of(len(finished), 'run')} done before{tried}")
        with atomic_file(file) as tmp:
            tmp.write_text("".join(result.line() for result in finished), encoding="utf-8")
        return finished

    def run_all(self) -> None:
        """Runs all trials that have no result yet, in the order of the search."""
        search = Search(self.sweep)
        bar = progress("sweep", search.total_cost, "part" if search.has_rungs else "run")
        with bar:
            for trials in search.rounds(self.results):
                runs = [
                    SweepRun(trial, seed) for trial in trials for seed in self.sweep.seeds or [None]
                ]
                done = {result.name for result in self.results}
                bar.update(sum(search.cost(run.trial.rung) for run in runs if run.name in done))
                missing = [run for run in runs if run.name not in done]
                self.run_batch(missing, search, bar)
                if self.stopped_by:
                    return

    def run_batch(self, runs: list[SweepRun], search: Search, bar: Progress) -> None:
        """Runs some trials, several at a time if asked for, and waits for all of them."""
        waiting = list(runs)
        while self.running or (waiting and not self.stopped_by):
            while waiting and len(self.running) < self.sweep.at_once and not self.stopped_by:
                self.start_run(waiting.pop(0))
            time.sleep(POLL_SECONDS)
            for each in [each for each in self.running if each.process.poll() is not None]:
                self.running.remove(each)
                if self.stopped_by:
                    continue
                self.take(each, search, bar)
            bar.set_postfix_str(self.state_of_runs())
            bar.update(0)

    def start_run(self, run: SweepRun) -> None:
        """Starts train.py. A run that was interrupted goes on from its newest checkpoint."""
        folder = self.out / run.name
        holder = find_holder(folder) if folder.is_dir() else None
        if holder is not None:
            raise UserError(f"{folder}: {holder}, from an earlier start; wait for it or end it")
        trial = run.trial
        words = [
            *self.sweep.words_of(trial.values, run.seed, trial.share),
            "--out",
            str(folder),
            "--resume",
            "auto",
        ]
        slots = {each.slot for each in self.running}
        slot = next(i for i in range(self.sweep.at_once) if i not in slots)
        program = [sys.executable, str(TRAIN_SCRIPT)]
        if self.sweep.processes > 1:
            per_node = ["--standalone", "--nproc-per-node", str(self.sweep.processes)]
            program = [sys.executable, "-m", "torch.distributed.run", *per_node, str(TRAIN_SCRIPT)]
        with (self.out / f"{run.name}.log").open("ab") as log:
            process = subprocess.Popen(
                [*program, *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | self.devices[slot],
            )
        self.running.append(Running(run, process, slot, time.monotonic()))
        # The signal may have come before the run was among those at hand.
        if self.stopped_by:
            self.stop_running()

    def take(self, ended: Running, search: Search, bar: Progress) -> None:
        """Reads what came of a run, notes it, and prints a line about it.

        Raises UserError where the trials so far have all ended with the same words.
        """
        run = ended.run
        folder = self.out / run.name
        seconds = time.monotonic() - ended.start
        values = dict(run.trial.values)
        error = ""
        outcome = None
        if ended.process.returncode:
            error = last_words(self.out / f"{run.name}.log", ended.process.returncode)
        else:
            outcome, error = read_outcome(folder)
        result = Result(
            run.name,
            run.trial.number,
            run.trial.rung,
            values,
            run.seed,
            round(seconds, 1),
            error,
            outcome,
        )
        self.results.append(result)
        with (self.out / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(result.line())
        if not error:
            self.drop_weights()
        bar.set_postfix_str("")
        bar.update(search.cost(run.trial.rung))
        self.cost_done += search.cost(run.trial.rung)
        print(self.line_about(result, search), flush=True)
        self.failures = [*self.failures, error.replace(run.name, "")] if error else [""]
        if len(self.failures) == SAME_FAILURES and len({*self.failures}) == 1:
            self.stop_running()
            raise UserError(
                f"the first {SAME_FAILURES} runs have ended with the same words, and no other has ended:"
                f" {error} (their logs are in {self.out})"
            )

    def line_about(self, result: Result, search: Search) -> str:
        """Returns the line that is printed when a run has ended."""
        name = f"{result.name} {words_of_values(result.values, result.seed)}"
        if result.outcome is None:
            return f"{name}: FAILED, {result.error}"
        left = ""
        remaining = search.total_cost - sum(search.cost(each.rung) for each in self.results)
        if remaining > 0:
            seconds = (time.monotonic() - self.start) / self.cost_done * remaining
            left = f", {format_duration(seconds)} left"
        return f"{name}: {score_text(result.outcome)}, {format_duration(result.seconds)}{left}"

    def drop_weights(self) -> None:
        """Removes the weights of all runs but the best one's, if --keep-all does not ask for them. A trial
        that has seeds to come may still be the best."""
        if self.sweep.keep_all:
            return
        ended = Counter((result.trial, result.rung) for result in self.results)
        finished = [
            result
            for result in self.results
            if result.outcome and ended[result.trial, result.rung] == self.sweep.repeats
        ]
        if not finished:
            return
        best = rows_of_trials(finished)[0].results[0]
        for result in finished:
            if result is best:
                continue
            for name in WEIGHT_FOLDERS:
                shutil.rmtree(self.out / result.name / name, ignore_errors=True)

    def state_of_runs(self) -> str:
        """Returns how far the runs at hand are: their step, loss and tokens per second."""
        parts = []
        for each in self.running:
            part = each.run.name
            line = last_step(self.out / each.run.name / "metrics.jsonl")
            if line and line.get("loss") is not None:
                part += f" step {line['step']:,}, loss {line['loss']:.3f}, {line['tokens_per_s']:,.0f} tokens/s"
            parts.append(part)
        return "; ".join(parts)

    def stop_running(self, number: int = signal.SIGTERM) -> None:
        """Sends a signal to the runs at hand: they end after their step, with a checkpoint."""
        for each in self.running:
            if each.process.poll() is None:
                each.process.send_signal(number)


class StopSignals:
    """A block in which a signal ends the runs at hand, which keep a checkpoint, and then the sweep; a
    second one ends them at once."""

    def __init__(self, runner: Runner):
        self.runner = runner

    def __enter__(self) -> None:
        self.before = {}
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # Under nohup the sweep is to outlive its terminal. (A shell has its background jobs ignore
            # SIGINT, which who sends it all the same means.)
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self.before[number] = signal.signal(number, self.note)

    def note(self, number: int, frame) -> None:
        is_second = bool(self.runner.stopped_by)
        self.runner.stopped_by = number
        # train.py takes two signals within a second for one: Ctrl-C reaches it from the terminal as well.
        self.runner.stop_running(signal.SIGKILL if is_second else signal.SIGTERM)

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        # After an error: no run is left behind.
        self.runner.stop_running()


def devices_of_slots(sweep: Sweep) -> list[dict[str, str]]:
    """Returns the environment variables of each of --at-once runs: its own GPUs, or its share of the cores.

    Raises UserError if there are fewer GPUs than the runs take.
    """
    if sweep.at_once == 1:
        return [{}]
    # This late, as it takes seconds.
    import torch

    from common.threads import num_threads

    needed = sweep.at_once * sweep.processes
    if not torch.cuda.is_available():
        threads = max(1, num_threads() // needed)
        return [
            {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
        ] * sweep.at_once
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = listed.split(",") if listed else [str(i) for i in range(torch.cuda.device_count())]
    if len(gpus) < needed:
        raise UserError(
            f"--at-once {sweep.at_once}: takes {needed} GPUs, and there are {len(gpus)}"
        )
    environments = []
    for slot in range(sweep.at_once):
        own = gpus[slot * sweep.processes : (slot + 1) * sweep.processes]
        environments.append({"CUDA_VISIBLE_DEVICES": ",".join(own)})
    return environments


def last_words(log: Path, code: int) -> str:
    """Returns why a run has ended: the last line of its log, and its exit code or signal. Of several
    processes it is the last error of one, as torchrun's own lines follow."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_END_BYTES))
        lines = file.read().decode(errors="replace").strip().splitlines()
    if lines and not lines[-1].strip("= "):
        own = [line for line in lines if re.match(r"(rank \d+: )?error: ", line)]
        lines = own or lines
    said = printable(lines[-1].strip())[:300] if lines else "it said nothing"
    if code < 0:
        name = signal.Signals(-code).name if -code in {*signal.Signals} else str(-code)
        return f"killed by {name}; the last line of its log: {said}"
    return f"exit code {code}: {said}"


def last_step(metrics: Path) -> dict | None:
    """Returns the newest line about a step in a metrics.jsonl that is being written; None if there is none."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, metrics.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return None
    for text in reversed(lines):
        try:
            line = json.loads(text)
        except ValueError:
            # A line of which a part is there.
            continue
        if isinstance(line, dict) and "tokens_per_s" in line:
            return line
    return None


# ---- what came of them ----


def report_sweep(sweep: Sweep, results: list[Result]) -> None:
    """Prints the table, the best trial's command and where its weights are; draws the picture.

    Raises UserError where no run has a score.
    """
    out = Path(sweep.out)
    finished = [result for result in results if result.outcome]
    failed = len(results) - len(finished)
    if not finished:
        first = results[0]
        raise UserError(
            f"none of {number_of(len(results), 'run')} has a score; the first, {first.name}: {first.error}"
        )
    text = sweep_table(sweep, results)
    print(f"\n{text}")
    (out / "table.txt").write_text(text + "\n", encoding="utf-8")
    draw_sweep(sweep, finished, out / "sweep.png")
    best = rows_of_trials(finished)[0]
    winner = best.results[0]
    outcome = best.outcome
    if failed:
        print(
            f"WARNING   {number_of(failed, 'run')} of {len(results)} failed; the lines above and the logs in"
            f" {out} say why"
        )
    for remark in edge_remarks(sweep, best):
        print(f"NOTE      {remark}")
    if outcome.first is not None and not outcome.is_better_than_first:
        print(f"WARNING   no trial was better than the {outcome.first:.4f} before the training")
    weights = out / winner.name / outcome.weights
    where = f"its weights: {weights}" if weights.is_dir() else "its weights were not kept"
    print(f"\nbest      trial {best.number}, {score_text(outcome)}; {where}")
    print(f"picture   {out / 'sweep.png'}")
    share = share_of_rung(best.rung, num_rungs(sweep.trials))
    words = sweep.words_of(winner.values, winner.seed, share)
    program = "python train.py"
    if sweep.processes > 1:
        program = f"torchrun --standalone --nproc-per-node {sweep.processes} train.py"
    print(f"command   {program} {shlex.join(words)}")


if __name__ == "__main__":
    run(main)
