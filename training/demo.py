"""What `python train.py` shows without flags: the bundled task before and after training.

The notes of `assets/booking_test.jsonl` are answered by the untouched base, by the base with eight
examples in its prompt, and by the tuned model. The loss on `assets/general.txt`, which is never
trained on, measures what was forgotten, and `assets/safety_prompts.jsonl` what the model refuses. A
table says what the difference has cost. The loop knows nothing of this task.

All of it is to be done within --budget minutes. Where the whole epoch and all items would take
longer, fewer items are answered, and the training is as long as the rest of the time allows.
"""

import contextlib
import math
import time
from collections.abc import Sequence
from pathlib import Path

from common.console import one_line, table
from common.device import peak_memory
from common.files import atomic_file, write_json
from data import ASSETS, BUNDLED_TASK
from dataset.examples import Dataset, Example
from dataset.formats import open_source
from dataset.records import Record
from evals.bootstrap import paired_interval
from evals.compare import Change, ItemLosses, item_losses
from evals.exact_match import ExactResult, exact
from evals.intervals import wilson_interval
from model import Transformer
from tokenizer import Tokenizer
from training.defaults import Settings
from training.ewc import expected_fisher_seconds
from training.plots import read_metrics
from training.safety import SafetyCheck

FEW_SHOTS = 8  # examples in the prompt
# How many tokens of general text are read, and the length of the pieces that they are cut into.
GENERAL_TOKENS = 5000
GENERAL_LENGTH = 500
GENERAL_BATCH = 8  # pieces that are read at a time
QUESTION = "What is the capital of France?"

# About when the program was started, for --budget.
STARTED = time.perf_counter()
# Minutes of --budget, by the dtype that the machine computes with.
DEFAULT_BUDGET = {"fp32": 10.0, "bf16": 5.0}
# The share of the budget that is planned with. The rest is for what can't be foreseen: machines that are
# slower after some minutes than in the trial, by a quarter where it was measured.
BUDGET_USED = 0.75
# What all answers take, as a share of the time of training an epoch; measured.
ANSWERING_SHARE = 0.25
# Fewer steps do not teach the task.
LEAST_STEPS = 48


def elapsed() -> float:
    """Returns the seconds since the program was started."""
    return time.perf_counter() - STARTED


def has_budget(settings: Settings) -> bool:
    """True where the run's length is open, so that --budget decides it."""
    is_decided = settings.full_run or {"steps", "epochs"} & settings.given or settings.resume
    # Such a run depends on nothing that the clock says.
    is_decided = is_decided or settings.deterministic
    return not is_decided


def budget_seconds(settings: Settings) -> float:
    """Returns --budget in seconds, or its default on this hardware."""
    minutes = settings.budget
    if minutes is None:
        minutes = DEFAULT_BUDGET["fp32" if settings.dtype == "fp32" else "bf16"]
    return 60 * minutes


class Demo:
    """Answers with the base when it is made, before the training; `finish` answers again.

    ITEMS: test notes, and FEW_SHOT_ITEMS of them are answered with examples in the prompt as well.
    SHORT_ITEMS, SHORT_FEW_SHOT_ITEMS: as many where the time is short.
    """

    FEW_SHOT_ITEMS, ITEMS = 50, 200
    SHORT_FEW_SHOT_ITEMS, SHORT_ITEMS = 16, 100

    def __init__(self, model: Transformer, tokenizer: Tokenizer, settings: Settings):
        """Answers with the untouched base. settings: with the time that training is to take."""
        self.model, self.tokenizer = model, tokenizer
        self.budget = budget_seconds(settings) if has_budget(settings) else math.inf
        start = time.perf_counter()
        self.safety = SafetyCheck(ASSETS / "safety_prompts.jsonl", tokenizer, is_printed=False)
        self.safety.measure_base(model)
        # They are answered again after the training.
        whole = (1 + ANSWERING_SHARE) * settings.expected_seconds + elapsed() + self.safety.seconds
        self.is_short = whole > BUDGET_USED * self.budget
        num_items, num_few_shot = self.ITEMS, self.FEW_SHOT_ITEMS
        if self.is_short:
            num_items = min(num_items, self.SHORT_ITEMS)
            num_few_shot = min(num_few_shot, self.SHORT_FEW_SHOT_ITEMS)

        test_file = BUNDLED_TASK["test"][0]
        train_file = BUNDLED_TASK["train"][0]
        self.test = open_source(test_file).read_all()[:num_items]
        self.examples = open_source(train_file).read_all()[:FEW_SHOTS]
        self.general = self.general_text()
        by_base = f"{len(self.test)} test items by the untouched base"
        safety = f"{len(self.safety.prompts)} prompts on safety"
        print(f"before    {by_base}, {num_few_shot} with eight examples; {safety}", flush=True)
        answering_start = time.perf_counter()
        self.base = self.score(self.test)
        # After the training, the tuned model answers the same items.
        self.answering_seconds = time.perf_counter() - answering_start + self.safety.seconds
        few_shot_items = self.test[:num_few_shot]
        self.few_shot = self.score(few_shot_items, self.examples)
        self.base_loss = self.general_loss()
        self.base_answer = self.answer(QUESTION)
        # What `finish` has shown, for the report: the table, and (question, reference, base, tuned).
        self.rows: list[list[str]] = []
        self.shown_answers: list[tuple[str, str, str, str]] = []
        print(f"          {time.perf_counter() - start:.0f} s", flush=True)

    def steps_within_budget(self, settings: Settings) -> int:
        """Returns how many steps to train: those of the settings, or as many as the time allows."""
        seconds_per_step = settings.expected_seconds / settings.steps
        left = BUDGET_USED * self.budget - elapsed() - self.answering_seconds
        left -= expected_fisher_seconds(settings)
        if left >= settings.expected_seconds:
            return settings.steps
        return min(settings.steps, max(LEAST_STEPS, int(left / seconds_per_step)))

    def print_budget(self, settings: Settings, whole: Settings) -> None:
        """Prints what --budget has chosen, and when all will be done.

        whole: the settings of the run without a budget.
        """
        finish = settings.expected_seconds + self.answering_seconds
        end = (elapsed() + finish) / 60
        if settings.steps < whole.steps or self.is_short:
            full = ((1 + ANSWERING_SHARE) * whole.expected_seconds) / 60
            print(
                f"budget    {self.budget / 60:g} min in all (--budget MINUTES):"
                f" {settings.steps} of {whole.steps} steps, {len(self.test)} test items;"
                f" --full-run takes {whole.steps} steps, {self.ITEMS} items and about {full:.0f} min"
            )
            if end > self.budget / 60:
                print(
                    f"          fewer than {LEAST_STEPS} steps teach too little, so this machine"
                    " needs more than that"
                )
        print(
            f"          from here about {finish / 60:.1f} min, {end:.1f} since the start",
            flush=True,
        )

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

    def general_loss(self) -> ItemLosses:
        return item_losses(self.model, self.general, GENERAL_BATCH)

    def answer(self, question: str) -> str:
        messages = [{"role": "user", "content": question}]
        prompt, _ = self.tokenizer.render(messages, add_generation_prompt=True)
        stop_ids = self.tokenizer.stop_ids
        ids = self.model.generate([prompt], 48, stop=stop_ids)[0]
        return self.tokenizer.decode([i for i in ids if i not in stop_ids])

    def finish(self, out: Path, kl_base: float) -> None:
        """Answers with the tuned model, prints the comparison and writes comparison.json.

        out: the run's folder, in which metrics.jsonl is whole.
        kl_base: what the gauge has measured of the tuned model; NaN where it was off.
        """
        tuned = self.score(self.test)
        tuned_loss = self.general_loss()
        tuned_answer = self.answer(QUESTION)
        results = {"base": self.base, "base, 8 examples in the prompt": self.few_shot}
        results["tuned"] = tuned

        rows = self.comparison_rows(results, tuned_loss, kl_base, out)
        changes = self.safety.measure_tuned(self.model)
        # Below the loss, the other number of what training costs.
        rows[5:5] = [safety_row(change) for change in changes]
        self.rows = rows
        print(f"\n{table(rows)}\n")
        for i in (0, 1):
            question = self.test[i].messages[-2]["content"]
            print_answers(question, self.base.answers[i], tuned.answers[i])
            texts = (self.base.references[i], self.base.answers[i], tuned.answers[i])
            self.shown_answers.append((question, *texts))
        print_answers(QUESTION, self.base_answer, tuned_answer)
        self.shown_answers.append((QUESTION, "", self.base_answer, tuned_answer))
        print()
        print(
            "intervals in brackets, of 95 %, are of the change; refusals are told by a list of phrases"
            " (evals/refusals.py)"
        )
        of_budget = f" of the {self.budget / 60:g} of --budget" if self.budget < math.inf else ""
        print(f"took      {elapsed() / 60:.1f} min in all{of_budget}")

        exact_answers = {name: [result.right, result.total] for name, result in results.items()}
        losses = {"base": self.base_loss.mean, "tuned": tuned_loss.mean}
        losses["interval"] = list(self.loss_interval(tuned_loss))
        comparison = {"exact": exact_answers, "loss_on_general_text": losses}
        comparison["kl_base"] = kl_base if math.isfinite(kl_base) else None
        comparison["safety"] = {
            each.name: {"base": each.base, "tuned": each.tuned, "interval": list(each.interval)}
            for each in changes
        }
        # A disk that is full now must not cost a run that has ended well.
        with contextlib.suppress(OSError), atomic_file(out / "comparison.json") as tmp:
            write_json(comparison, tmp)

    def loss_interval(self, tuned: ItemLosses) -> tuple[float, float]:
        """Returns the 95 % interval of the change of the loss on general text, over its pieces."""
        base = self.base_loss
        return paired_interval(base.sums, tuned.sums, base.tokens, tuned.tokens)

    def comparison_rows(
        self, results: dict[str, ExactResult], tuned_loss: ItemLosses, kl_base: float, out: Path
    ) -> list[list[str]]:
        """Returns the rows of the comparison, the heading first: a column for each result."""
        exact_answers = []
        intervals = []
        prompt_tokens = []
        for result in results.values():
            exact_answers.append(f"{100 * result.accuracy:.1f} % of {result.total}")
            low, high = wilson_interval(result.right, result.total)
            intervals.append(f"{100 * low:.1f} to {100 * high:.1f} %")
            prompt_tokens.append(f"{result.prompt_tokens:.0f}")
        low, high = self.loss_interval(tuned_loss)
        tuned_loss_cell = f"{tuned_loss.mean:.3f} ({low:+.3f} to {high:+.3f})"
        distance = f"{kl_base:.3f}" if math.isfinite(kl_base) else "not measured"
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        steps = [line for line in read_metrics(out / "metrics.jsonl") if "loss" in line]
        # The speed of the median step: single slow ones do not count.
        speeds = sorted(line["tokens_per_s"] for line in steps)
        speed = speeds[len(speeds) // 2]
        memory = peak_memory(self.model.device)
        return [
            ["", *results],
            ["exact answers", *exact_answers],
            ["95 % interval of that", *intervals],
            ["loss on general text", f"{self.base_loss.mean:.3f}", "", tuned_loss_cell],
            ["KL(base || tuned), nats a token", "0", "", distance],
            ["prompt tokens an answer", *prompt_tokens],
            ["trained parameters", "0", "0", f"{trained:,}"],
            ["training tokens/s", "", "", f"{speed:,.0f}"],
            ["peak memory", "", "", f"{memory / 1e9:.2f} GB"],
        ]


def safety_row(change: Change) -> list[str]:
    """Returns a row of the comparison: a share of the prompts on safety, and how it changed with the 95 %
    interval of that."""
    name = change.name.removesuffix(" %").replace(" of ", f" of {change.items} ")
    low, high = change.interval
    tuned = f"{change.tuned:.1f} % ({low:+.1f} to {high:+.1f})"
    return [name, f"{change.base:.1f} %", "", tuned]


def print_answers(question: str, base: str, tuned: str) -> None:
    """Prints a question and both answers to it, on a line each."""
    print(f"> {question}")
    for name, answer in (("base:", base), ("tuned:", tuned)):
        words = " ".join(answer.split())
        print(f"  {name:6} {one_line(words, 110)}")
