"""What --eval-metric says at each validation: the model answers validation prompts, and the answers are
scored as evaluate.py scores them.

The prompts are those of whole validation conversations, the ones with the smallest hash first, so
that each validation of a run, and a resumed one, answers the same. They are answered greedily, as
evaluate.py does it without flags: on the same records the score is the one that

    python evaluate.py METRIC --data VAL --adapter RUN/best

prints. Of several processes each has the whole model and answers its share of the batches. Nothing is
drawn at random and no weight is touched, so the training goes on as if it had not been asked.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

import distributed
from common.errors import UserError
from common.progress import progress
from data import sample_by_hash
from dataset.example_records import is_whole_conversation, records_of_examples
from dataset.examples import Dataset
from dataset.records import Record
from evals.answers import Answers, decode_answer, longest_answer, question_of
from evals.arguments import BATCH_SIZE
from evals.batch_answers import generate_batches, prompt_batches, prompt_ids
from evals.table import EVALUATIONS, GENERATE, imported
from evals.tool_calls import tool_questions
from model import Transformer, eager_mode
from tokenizer import Tokenizer
from training.defaults import Settings
from training.signals import GracefulStop, ValidationInterrupted

# Tokens of prompts and answers of a batch, whose keys and values are kept. On a GPU it is no more
# than the tokens that a step can hold, each of which takes more memory than its keys and values do.
TOKENS_AT_ONCE = 16384


class AskedPrompt(NamedTuple):
    """What is asked. record: where it is from. ids: of the prompt. references: accepted answers."""

    record: Record
    ids: list[int]
    references: list[str]


class AnswerScorer:
    """Lets the model of a run answer validation prompts, and scores the answers by --eval-metric.

    heading: the name of the score, as in evaluate.py's table; number_format: how it is written.
    seconds: spent on answers in this launch.
    """

    def __init__(
        self,
        settings: Settings,
        model: Transformer,
        tokenizer: Tokenizer,
        val: Dataset,
        device: torch.device,
    ):
        """val: all validation examples. Raises UserError naming the record whose reference the metric
        can't use."""
        assert settings.eval_metric is not None
        self.evaluation = EVALUATIONS[settings.eval_metric]
        self.heading = self.evaluation.score
        self.number_format = ".2f"
        self.model = model
        self.tokenizer = tokenizer
        self.device = device
        self.seconds = 0.0
        chosen = val.take(is_whole_conversation(val))
        if settings.eval_metric_limit:
            chosen = sample_by_hash(chosen, settings.eval_metric_limit)
        print(
            f"metric    {settings.eval_metric}: each validation answers"
            f" {settings.reasons['eval_metric']}; best/ is that of the highest {self.heading}"
        )
        self.questions = self.ask(settings.eval_metric, records_of_examples(chosen))
        references = [question.references for question in self.questions]
        self.max_new_tokens = longest_answer(tokenizer, references)
        room = TOKENS_AT_ONCE
        if device.type != "cpu":
            room = min(room, settings.max_tokens)
        lengths = [len(question.ids) for question in self.questions]
        longest = max(lengths) + self.max_new_tokens
        batch_size = max(1, min(BATCH_SIZE[GENERATE], room // longest))
        self.batches = prompt_batches(lengths, batch_size)
        # References as answers: a scorer that is not installed is missed now, not after the training.
        perfect = {i: (accepted[0], False) for i, accepted in enumerate(references)}
        distributed.run_on_rank0(lambda: self.score(perfect))

    def ask(self, name: str, records: Sequence[Record]) -> list[AskedPrompt]:
        """Returns the records as questions. name: of the metric."""
        check = imported(self.evaluation.check) if self.evaluation.check else None
        questions = []
        try:
            if name == "tools":
                records = tool_questions([*records])
            for record in records:
                messages, references = question_of(record)
                if check:
                    check(references, record.where)
                ids = prompt_ids(self.model, self.tokenizer, record, messages)
                questions.append(AskedPrompt(record, ids, references))
        except UserError as error:
            raise UserError(f"--eval-metric {name}: {error}") from None
        return questions

    def measure(self, stop: GracefulStop | None = None) -> float:
        """Returns the score of the model as it is now. All ranks call it.

        Raises ValidationInterrupted, on all ranks at the same batch, once one has a signal.
        """
        with self.timed(), distributed.extended_timeout(), eager_mode(self.model):
            texts = self.answer_all(stop)
            return distributed.run_on_rank0(lambda: self.score(texts))

    def answer_all(self, stop: GracefulStop | None) -> dict[int, tuple[str, bool]]:
        """Returns {number of the question: the answer, and whether it was cut off}, of all ranks."""
        count, rank = distributed.world_size(), distributed.rank()
        mine = self.batches[rank::count]
        stop_ids = self.tokenizer.stop_ids
        prompts = [question.ids for question in self.questions]
        generator = generate_batches(self.model, prompts, mine, self.max_new_tokens, stop=stop_ids)
        answers = {}
        bar = progress("answering", len(prompts), "prompt", shown=distributed.is_rank0())
        # Closed in any case, which gives the model its own weights back.
        with contextlib.closing(generator) as generated, bar:
            # Every rank comes here as often, since all are asked about signals.
            for _ in range(0, len(self.batches), count):
                if stop and not distributed.all_ranks_agree(not stop.signal):
                    raise ValidationInterrupted
                numbers, texts = next(generated, ((), ()))
                for i, ids in zip(numbers, texts, strict=True):
                    answers[i] = decode_answer(self.tokenizer, ids)
                    bar.update(count)
        merged: dict[int, tuple[str, bool]] = {}
        for of_rank in distributed.all_gather_object(answers):
            merged |= of_rank
        return merged

    def score(self, texts: dict[int, tuple[str, bool]]) -> float:
        """Returns the score of the answers, and remembers how it is written."""
        numbers = range(len(self.questions))
        answers = Answers(
            [question.record for question in self.questions],
            [question.references for question in self.questions],
            [texts[i][0] for i in numbers],
            prompt_tokens=0.0,
            num_cut=sum(texts[i][1] for i in numbers),
        )
        scores = self.evaluation.load()(answers)
        self.number_format = scores.formats[self.heading]
        return scores.columns[self.heading]

    def written(self, score: float) -> str:
        """Returns a score as it is printed: "exact 84.0 %", "BLEU 31.20"."""
        name, sign, _ = self.heading.partition(" %")
        return f"{name} {score:{self.number_format}}{sign}"

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """A block whose time counts as the answers'."""
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start
