"""What `python train.py` shows without flags: the bundled task before and after training.

The notes of `assets/booking_test.jsonl` are answered by the untouched base, by the base with eight
examples in its prompt, and by the tuned model. The loss on `assets/general.txt`, which is never
trained on, measures what was forgotten. A table says what the difference has cost. The loop knows
nothing of this task.
"""

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

import distributed
from common.console import one_line, table
from common.device import peak_memory
from common.files import atomic_file, write_json
from data import ASSETS, BUNDLED_TASK
from dataset.examples import Dataset, Example
from dataset.formats import open_source
from dataset.records import Record
from evals.exact_match import ExactResult, exact
from evals.loss import loss
from model import Transformer
from tokenizer import Tokenizer
from training.defaults import Settings
from training.plots import read_metrics

FEW_SHOTS = 8  # examples in the prompt
# How many tokens of general text are read, and the length of the pieces that they are cut into.
GENERAL_TOKENS = 5000
GENERAL_LENGTH = 500
QUESTION = "What is the capital of France?"


def is_bundled_task(settings: Settings) -> bool:
    """True for `python train.py`, also with options that keep the demonstration's task and base."""
    is_sharded = settings.shard != "none" or distributed.world_size() > 1
    # Options that give the run another task, another base or no end.
    asks_for_another = settings.data or settings.model or settings.adapter or settings.profile
    asks_for_another = asks_for_another or settings.system
    return not (asks_for_another or is_sharded)


class Demo:
    """Answers with the base when it is made, before the training; `finish` answers again.

    ITEMS: test notes.
    FEW_SHOT_ITEMS: how many of them are answered with examples in the prompt as well.
    """

    FEW_SHOT_ITEMS, ITEMS = 50, 200

    def __init__(self, model: Transformer, tokenizer: Tokenizer, training_seconds: float):
        """Answers with the untouched base. training_seconds: what training is expected to take."""
        self.model, self.tokenizer = model, tokenizer
        test_file = BUNDLED_TASK["test"][0]
        train_file = BUNDLED_TASK["train"][0]
        self.test = open_source(test_file).read_all()[: self.ITEMS]
        self.examples = open_source(train_file).read_all()[:FEW_SHOTS]
        self.general = self.general_text()
        by_base = f"{len(self.test)} test items by the untouched base"
        print(f"before    {by_base}, {self.FEW_SHOT_ITEMS} with eight examples", flush=True)
        start = time.perf_counter()
        self.base = self.score(self.test)
        answering = time.perf_counter() - start
        few_shot_items = self.test[: self.FEW_SHOT_ITEMS]
        self.few_shot = self.score(few_shot_items, self.examples)
        self.base_loss = self.general_loss()
        self.base_answer = self.answer(QUESTION)
        spent = time.perf_counter() - start
        # After the training, the tuned model answers the same items.
        minutes = (training_seconds + answering) / 60
        print(f"          {spent:.0f} s; from here about {minutes:.1f} min", flush=True)

    def score(self, records: list[Record], shots: Sequence[Record] = ()) -> ExactResult:
        return exact(self.model, self.tokenizer, records, shots=shots)

    def general_text(self) -> Dataset:
        """Returns the beginning of assets/general.txt in pieces, every token counting."""
        record = open_source(ASSETS / "general.txt").read_all()[0]
        ids = self.tokenizer.encode(record.text)[:GENERAL_TOKENS]
        examples = []
        for start in range(0, len(ids), GENERAL_LENGTH):
            piece = ids[start : start + GENERAL_LENGTH]
            loss_weights = [True] * len(piece)
            examples.append(Example(piece, loss_weights))
        return Dataset(examples)

    def general_loss(self) -> float:
        return loss(self.model, self.general)["loss"]

    def answer(self, question: str) -> str:
        messages = [{"role": "user", "content": question}]
        prompt, _ = self.tokenizer.render(messages, add_generation_prompt=True)
        stop_ids = self.tokenizer.stop_ids
        ids = self.model.generate([prompt], 48, stop=stop_ids)[0]
        return self.tokenizer.decode([i for i in ids if i not in stop_ids])

    def finish(self, out: Path) -> None:
        """Answers with the tuned model, prints the comparison and writes comparison.json.

        out: the run's folder, in which metrics.jsonl is whole.
        """
        tuned = self.score(self.test)
        tuned_loss = self.general_loss()
        tuned_answer = self.answer(QUESTION)
        results = {"base": self.base, "base, 8 examples in the prompt": self.few_shot}
        results["tuned"] = tuned

        rows = self.comparison_rows(results, tuned_loss, out)
        print(f"\n{table(rows)}\n")
        for i in (0, 1):
            question = self.test[i].messages[-2]["content"]
            print_answers(question, self.base.answers[i], tuned.answers[i])
        print_answers(QUESTION, self.base_answer, tuned_answer)
        print()

        exact_answers = {name: [result.right, result.total] for name, result in results.items()}
        losses = {"base": self.base_loss, "tuned": tuned_loss}
        comparison = {"exact": exact_answers, "loss_on_general_text": losses}
        # A disk that is full now must not cost a run that has ended well.
        with contextlib.suppress(OSError), atomic_file(out / "comparison.json") as tmp:
            write_json(comparison, tmp)

    def comparison_rows(
        self, results: dict[str, ExactResult], tuned_loss: float, out: Path
    ) -> list[list[str]]:
        """Returns the rows of the comparison, the heading first: a column for each result."""
        exact_answers = []
        prompt_tokens = []
        for result in results.values():
            exact_answers.append(f"{100 * result.accuracy:.1f} % of {result.total}")
            prompt_tokens.append(f"{result.prompt_tokens:.0f}")
        change = tuned_loss - self.base_loss
        tuned_loss_cell = f"{tuned_loss:.3f} ({change:+.3f})"
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        steps = [line for line in read_metrics(out / "metrics.jsonl") if "loss" in line]
        # The speed of the median step: single slow ones do not count.
        speeds = sorted(line["tokens_per_s"] for line in steps)
        speed = speeds[len(speeds) // 2]
        memory = peak_memory(self.model.device)
        return [
            ["", *results],
            ["exact answers", *exact_answers],
            ["loss on general text", f"{self.base_loss:.3f}", "", tuned_loss_cell],
            ["prompt tokens an answer", *prompt_tokens],
            ["trained parameters", "0", "0", f"{trained:,}"],
            ["training tokens/s", "", "", f"{speed:,.0f}"],
            ["peak memory", "", "", f"{memory / 1e9:.2f} GB"],
        ]


def print_answers(question: str, base: str, tuned: str) -> None:
    """Prints a question and both answers to it, on a line each."""
    print(f"> {question}")
    for name, answer in (("base:", base), ("tuned:", tuned)):
        words = " ".join(answer.split())
        print(f"  {name:6} {one_line(words, 110)}")
