"""What `python train.py` shows when it has no flags: the bundled task before and after training, and what that cost.

The notes of `assets/booking_test.jsonl` are answered by the untouched base, by the base with eight examples in its
prompt, and by the tuned model; `assets/general.txt`, never trained on, measures what was forgotten. Nothing here is
seen by the loop, and nothing in the loop knows of the bundled task.
"""

import time
from pathlib import Path

from common import console as report
from common.console import one_line
from common.device import peak_memory
from data import ASSETS, BUNDLED_TASK
from dataset.examples import Dataset, Example
from dataset.formats import open_source
from evals.exact_match import exact
from evals.loss import loss
from model import Transformer
from tokenizer import Tokenizer
from training import plots


class Demo:
    """Made before the training: answers with the untouched base. finish: answers again, and prints the comparison."""

    SHOTS, ITEMS = 50, 200
    QUESTION = "What is the capital of France?"

    def __init__(self, model: Transformer, tokenizer: Tokenizer, training_seconds: float):
        self.model, self.tokenizer = model, tokenizer
        self.test = open_source(BUNDLED_TASK["test"][0]).read_all()[: self.ITEMS]
        self.examples = open_source(BUNDLED_TASK["train"][0]).read_all()[:8]
        self.general = self.general_text()
        print(
            f"before    {len(self.test)} test items by the untouched base, {self.SHOTS} with eight examples", flush=True
        )
        start = time.perf_counter()
        self.base = self.score(self.test)
        answering = time.perf_counter() - start
        self.shots = self.score(self.test[: self.SHOTS], self.examples)
        self.base_loss, self.base_answer = self.general_loss(), self.answer(self.QUESTION)
        spent = time.perf_counter() - start
        print(f"          {spent:.0f} s; from here about {(training_seconds + answering) / 60:.1f} min", flush=True)

    def score(self, records, shots=()):
        return exact(self.model, self.tokenizer, records, shots=shots)

    def general_text(self) -> Dataset:
        record = open_source(ASSETS / "general.txt").read_all()[0]
        ids = self.tokenizer.encode(record.text)[:5000]
        pieces = [ids[i : i + 500] for i in range(0, len(ids), 500)]
        return Dataset([Example(piece, [True] * len(piece)) for piece in pieces])

    def general_loss(self) -> float:
        return loss(self.model, self.general)["loss"]

    def answer(self, question: str) -> str:
        prompt = self.tokenizer.render([{"role": "user", "content": question}], add_generation_prompt=True)[0]
        ids = self.model.generate([prompt], 48, stop=self.tokenizer.stop_ids)[0]
        return self.tokenizer.decode([i for i in ids if i not in self.tokenizer.stop_ids])

    def finish(self, metrics: Path) -> None:
        tuned = self.score(self.test)
        tuned_loss = self.general_loss()
        answer = self.answer(self.QUESTION)
        results = (self.base, self.shots, tuned)
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        speeds = [line["tokens_per_s"] for line in plots.read_metrics(metrics) if "loss" in line]
        rows = [["", "base", "base, 8 examples in the prompt", "tuned"]]
        rows.append(["exact answers", *(f"{100 * r.accuracy:.1f} % of {r.total}" for r in results)])
        change = tuned_loss - self.base_loss
        rows.append(["loss on general text", f"{self.base_loss:.3f}", "", f"{tuned_loss:.3f} ({change:+.3f})"])
        rows.append(["prompt tokens an answer", *(f"{r.prompt_tokens:.0f}" for r in results)])
        rows.append(["trained parameters", "0", "0", f"{trained:,}"])
        rows.append(["training tokens/s", "", "", f"{sorted(speeds)[len(speeds) // 2]:,.0f}"])
        rows.append(["peak memory", "", "", f"{peak_memory(self.model.device) / 1e9:.2f} GB"])
        print("\n" + report.table(rows) + "\n")
        for i in (0, 1):
            question = self.test[i].messages[-2]["content"]
            self.show(question, self.base.answers[i], tuned.answers[i])
        self.show(self.QUESTION, self.base_answer, answer)
        print()

    def show(self, question: str, base: str, tuned: str) -> None:
        base, tuned = (one_line(" ".join(text.split()), 110) for text in (base, tuned))
        print(f"> {question}\n  base:  {base}\n  tuned: {tuned}")
