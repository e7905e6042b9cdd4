"""What `python train.py` shows when it has no flags: the bundled task before and after training, and what that cost.

The notes of `assets/booking_test.jsonl` are answered by the untouched base, by the base with eight examples in its
prompt, and by the tuned model. The loss on `assets/general.txt`, which is never trained on, measures what was
forgotten. The loop knows nothing of this task.
"""

import contextlib
import time
from pathlib import Path

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
from training.plots import read_metrics

FEW_SHOTS = 8  # examples in the prompt
GENERAL_TOKENS, GENERAL_LENGTH = (
    5000,
    500,
)  # how much general text is read, in pieces of this length
QUESTION = "What is the capital of France?"


class Demo:
    """Answers with the untouched base when it is made, before the training; `finish` answers again and compares.

    ITEMS: test notes. FEW_SHOT_ITEMS: of these, the ones that are answered with examples in the prompt as well.
    """

    FEW_SHOT_ITEMS, ITEMS = 50, 200

    def __init__(self, model: Transformer, tokenizer: Tokenizer, training_seconds: float):
        self.model, self.tokenizer = model, tokenizer
        self.test = open_source(BUNDLED_TASK["test"][0]).read_all()[: self.ITEMS]
        self.examples = open_source(BUNDLED_TASK["train"][0]).read_all()[:FEW_SHOTS]
        self.general = self.general_text()
        print(
            f"before    {len(self.test)} test items by the untouched base, {self.FEW_SHOT_ITEMS} with eight examples",
            flush=True,
        )
        start = time.perf_counter()
        self.base = self.score(self.test)
        answering = time.perf_counter() - start
        self.few_shot = self.score(self.test[: self.FEW_SHOT_ITEMS], self.examples)
        self.base_loss = self.general_loss()
        self.base_answer = self.answer(QUESTION)
        spent = time.perf_counter() - start
        print(
            f"          {spent:.0f} s; from here about {(training_seconds + answering) / 60:.1f} min",
            flush=True,
        )

    def score(self, records: list[Record], shots: list[Record] = ()) -> ExactResult:
        return exact(self.model, self.tokenizer, records, shots=shots)

    def general_text(self) -> Dataset:
        record = open_source(ASSETS / "general.txt").read_all()[0]
        ids = self.tokenizer.encode(record.text)[:GENERAL_TOKENS]
        pieces = [ids[i : i + GENERAL_LENGTH] for i in range(0, len(ids), GENERAL_LENGTH)]
        return Dataset([Example(piece, [True] * len(piece)) for piece in pieces])

    def general_loss(self) -> float:
        return loss(self.model, self.general)["loss"]

    def answer(self, question: str) -> str:
        prompt, _ = self.tokenizer.render(
            [{"role": "user", "content": question}], add_generation_prompt=True
        )
        ids = self.model.generate([prompt], 48, stop=self.tokenizer.stop_ids)[0]
        return self.tokenizer.decode([i for i in ids if i not in self.tokenizer.stop_ids])

    def finish(self, out: Path) -> None:
        """Answers with the tuned model; prints the comparison, and writes it to comparison.json in the run's folder."""
        tuned = self.score(self.test)
        tuned_loss = self.general_loss()
        tuned_answer = self.answer(QUESTION)
        results = (self.base, self.few_shot, tuned)
        change = tuned_loss - self.base_loss
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        speeds = sorted(
            line["tokens_per_s"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line
        )
        memory = peak_memory(self.model.device)
        rows = [
            ["", "base", "base, 8 examples in the prompt", "tuned"],
            [
                "exact answers",
                *(f"{100 * result.accuracy:.1f} % of {result.total}" for result in results),
            ],
            [
                "loss on general text",
                f"{self.base_loss:.3f}",
                "",
                f"{tuned_loss:.3f} ({change:+.3f})",
            ],
            ["prompt tokens an answer", *(f"{result.prompt_tokens:.0f}" for result in results)],
            ["trained parameters", "0", "0", f"{trained:,}"],
            ["training tokens/s", "", "", f"{speeds[len(speeds) // 2]:,.0f}"],
            ["peak memory", "", "", f"{memory / 1e9:.2f} GB"],
        ]
        print("\n" + table(rows) + "\n")
        for i in (0, 1):
            question = self.test[i].messages[-2]["content"]
            print_answers(question, self.base.answers[i], tuned.answers[i])
        print_answers(QUESTION, self.base_answer, tuned_answer)
        print()
        names = ("base", "base, 8 examples in the prompt", "tuned")
        comparison = {
            "exact": {
                name: [result.right, result.total]
                for name, result in zip(names, results, strict=True)
            },
            "loss_on_general_text": {"base": self.base_loss, "tuned": tuned_loss},
        }
        with (
            contextlib.suppress(OSError),
            atomic_file(out / "comparison.json") as tmp,
        ):  # a full disk costs no run
            write_json(comparison, tmp)


def print_answers(question: str, base: str, tuned: str) -> None:
    print(f"> {question}")
    for name, answer in (("base", base), ("tuned", tuned)):
        print(f"  {name + ':':6} {one_line(' '.join(answer.split()), 110)}")
