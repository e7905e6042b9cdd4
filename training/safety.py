"""`train.py --safety FILE`: does training change what the model refuses?

The prompts of a file (evals/refusals.py: AdvBench, XSTest, or prompts with a label) are answered by the
model before step 1 and after the last step, and the table at the end says how many of the harmful ones
were refused, and how many of the harmless ones, with the 95 % interval of each change. A refusal is a
phrase of a list. The bundled task asks assets/safety_prompts.jsonl.

It is made to cost little: MOST_PROMPTS prompts, REFUSAL_TOKENS tokens of each answer.
"""

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

import distributed
from common import console
from common.errors import UserError
from common.files import atomic_file, write_json
from dataset.folders import TEST
from dataset.token_cache import prompt_hash
from evals.arguments import BATCH_SIZE
from evals.compare import HEADINGS, Change, changes_of_measures
from evals.measures import Measure
from evals.prompt_answers import answer_all, greedy_settings
from evals.refusals import (
    SafetyPrompt,
    counted,
    read_safety_prompts,
    refusal_measures,
    refused_by_phrases,
)
from evals.safety_arguments import REFUSAL_TOKENS
from evals.table import GENERATE
from interop.remote_data import fetch_data
from model import Transformer, eager_mode, eval_mode
from tokenizer import Tokenizer
from training.defaults import Settings

MOST_PROMPTS = 100  # of each kind, harmful and harmless
SAFETY_FILE = "safety.json"


class SafetyCheck:
    """Asks the prompts of a file before the training and after it.

    seconds: that the answers before the training took.
    """

    def __init__(self, file: str | Path, tokenizer: Tokenizer, is_printed: bool = True):
        """Reads the file. is_printed: says what it holds, and how long the answers take.

        Raises UserError as read_safety_prompts does.
        """
        lines: list[str] = []
        all_prompts = read_safety_prompts(
            fetch_data(file, TEST), system=tokenizer.system, print_fn=lines.append
        )
        self.tokenizer = tokenizer
        self.prompts = bounded_prompts(all_prompts)
        self.seconds = 0.0
        self.base_answers: list[list[str]] = []
        self.tuned_answers: list[list[str]] = []
        # What measure_tuned has found.
        self.changes: list[Change] = []
        self.is_printed = is_printed
        if is_printed:
            print(lines[0].replace("data     ", "safety   ", 1))
            cut = ""
            if len(self.prompts) < len(all_prompts):
                cut = f"; asked are {MOST_PROMPTS} of each kind at most: {counted(self.prompts)}"
            print(f"{lines[1]}{cut}")

    def check_shard(self, settings: Settings) -> None:
        """Raises UserError if the model is sharded, so that no process can write answers with it."""
        if settings.shard == "none":
            return
        raise UserError(
            f"--safety: a model that is sharded over processes (--shard {settings.shard}) writes no"
            " answers; give --shard none if it fits, or train without --safety, and run `evaluate.py"
            " refusals --versus base` afterwards"
        )

    def measure_base(self, model: Transformer) -> None:
        """Answers with the model as it is before step 1."""
        start = time.perf_counter()
        self.base_answers = self.answers_of(model)
        self.seconds = time.perf_counter() - start
        if self.is_printed:
            what = (
                f"{console.number_of(len(self.prompts), 'prompt')} by the model before the training"
            )
            print(f"safety    answered {what}: {self.seconds:.0f} s", flush=True)

    def answers_of(self, model: Transformer) -> list[list[str]]:
        """Returns the model's answer to each prompt, in a list of its own. All ranks compute the
        same, so that none waits for another."""
        plain_prompts = [each.prompt for each in self.prompts]
        with eval_mode(model), eager_mode(model):
            settings = greedy_settings(REFUSAL_TOKENS)
            answers = answer_all(
                model, self.tokenizer, plain_prompts, settings, BATCH_SIZE[GENERATE]
            )
        return answers.texts

    def measure_tuned(self, model: Transformer) -> list[Change]:
        """Answers with the tuned model. Returns the change of each number."""
        self.tuned_answers = self.answers_of(model)
        before, after = self.measures(self.base_answers), self.measures(self.tuned_answers)
        self.changes = changes_of_measures("", before, after, seed=0)
        return self.changes

    def measures(self, answers: list[list[str]]) -> list[Measure]:
        return refusal_measures(self.prompts, refused_by_phrases(answers), answers)

    def finish(self, model: Transformer, out: Path) -> None:
        """Answers with the tuned model, prints the comparison, and writes safety.json.

        out: the run's folder.
        """
        changes = self.measure_tuned(model)
        print(f"\n{changes_table(changes)}")
        print(
            f"safety    refusals by a list of phrases in {REFUSAL_TOKENS} tokens of each answer, after the"
            f" last step against before the first; 95 % intervals by paired bootstrap; the answers are in"
            f" {out / SAFETY_FILE}"
        )
        if distributed.is_rank0():
            self.write(out, changes)

    def write(self, out: Path, changes: list[Change]) -> None:
        """Writes the numbers and all answers. A disk that is full now ends nothing."""
        rows = {}
        for change in changes:
            rows[change.name] = {
                "prompts": change.items,
                "base": change.base,
                "tuned": change.tuned,
                "interval": list(change.interval),
            }
        answers = []
        for each, base, tuned in zip(
            self.prompts, self.base_answers, self.tuned_answers, strict=True
        ):
            answers.append(
                {
                    "place": each.prompt.place,
                    "harmful": each.is_harmful,
                    "base": base[0],
                    "tuned": tuned[0],
                }
            )
        with contextlib.suppress(OSError), atomic_file(out / SAFETY_FILE) as tmp:
            write_json({"changes": rows, "answers": answers}, tmp)


def changes_table(changes: list[Change]) -> str:
    """Returns the table of base against tuned."""
    heading = ["", "prompts", *HEADINGS[2:]]
    return console.table([heading, *(change.cells() for change in changes)])


def bounded_prompts(prompts: Sequence[SafetyPrompt]) -> list[SafetyPrompt]:
    """Returns at most MOST_PROMPTS of each kind, in their order: the ones with the lowest hashes, so
    that the choice depends on nothing but the file."""
    chosen: set[int] = set()
    for is_harmful in (True, False):
        numbers = [i for i, each in enumerate(prompts) if each.is_harmful == is_harmful]
        numbers.sort(key=lambda i: (prompt_hash(prompts[i].prompt.record), i))
        chosen.update(numbers[:MOST_PROMPTS])
    return [each for i, each in enumerate(prompts) if i in chosen]
