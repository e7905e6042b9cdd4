"""What comparisons of trainings share: results by cell in a file, a script that is run, the scores of what came of it.

A cell is one training. Its result is written as soon as it is there, so that a comparison of hours goes on where it was
stopped, and several processes can measure at the same time.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

from checkpoint import read_config
from common.files import atomic_file
from evals.answers import answer_records
from evals.arguments import command_line
from evals.questions import read_questions
from evals.table import EVALUATIONS
from evals.targets import Opened, encode_files
from model import Transformer
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]


def read_results(file: Path) -> dict:
    """Returns {key of a cell: its result}; {} where there is no such file yet."""
    return json.loads(file.read_text()) if file.is_file() else {}


def add_result(file: Path, key: str, result: dict) -> None:
    """Adds a result to those in the file, to which another process may have added meanwhile."""
    results = read_results(file)
    results[key] = result
    with atomic_file(file) as tmp:
        tmp.write_text(json.dumps(results, indent=1) + "\n")


def run_script(script: str, *words: object) -> str:
    """Returns what a script of the project prints. Ends this program where it fails."""
    line = [sys.executable, script, *map(str, words)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(line)}: {done.stderr[-2000:]}")
    return done.stdout


def exact_answers(target: list[str], limit: int) -> tuple[float, Transformer, Tokenizer]:
    """Returns how many of the bundled task's questions a model answers exactly, in %; and the model with its tokenizer.

    target: words that name it, [] for the base. limit: questions.
    """
    asked = command_line(
        ["exact", "--data", "assets/booking_test.jsonl", "--limit", f"{limit}", *target]
    )
    opened = Opened(asked)
    (model_target,) = opened.targets
    tokenizer = opened.tokenizer_of(model_target)
    model = opened.load(model_target, tokenizer)
    records = read_questions(asked, opened.file, None, opened.system)
    answers = answer_records(model, tokenizer, records, None, limit)
    return EVALUATIONS["exact"].load()(answers).columns["exact %"], model, tokenizer


def loss_on_text(
    target: list[str], model: Transformer, tokenizer: Tokenizer, words: list[str]
) -> float:
    """Returns a model's loss on a text. target: words that name it. words: of evaluate.py loss, that name the text."""
    read = command_line(["loss", *words, *target])
    limit = read_config(model.source).max_positions
    dataset = encode_files(read, Opened(read).files, tokenizer, limit, None, print)
    return EVALUATIONS["loss"].load()(model, dataset, 8).columns()["loss"]


def spread(numbers: list[float], spec: str) -> str:
    """Returns a mean, with the lowest and the highest where there are several."""
    mean = format(statistics.mean(numbers), spec)
    if len(numbers) == 1:
        return mean
    return f"{mean} ({min(numbers):{spec}} to {max(numbers):{spec}})"
