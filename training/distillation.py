"""Distillation: the student learns the teacher's probabilities of each next token, where supervised
fine-tuning learns the one token that is written (objectives.py: --objective distill).

Given answers: those of the data. Own answers (--own-answers): those that the student writes itself while it
is trained, so that it learns what to do where it gets to, and not where others do (on-policy
distillation; Agarwal et al. 2023, GKD, arXiv 2306.13649; Lu et al. 2025). The teacher is another model with the same
tokens, or with `--teacher self` the model before step 1 that is shown the reference answer in its prompt
(Shenfeld et al. 2026, arXiv 2601.19897): what an answer should hold comes from the data, how it is said from the model.

The equation is in kernels/divergence.py.
"""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from adapter_files import is_adapter
from adapting.score_head import require_lm_head
from checkpoint import load_model, read_config
from common.choices import SELF
from common.console import one_line
from common.errors import UserError
from common.progress import progress
from data import Batch, TrainingData, collate
from dataset.examples import SampledAnswer
from distributed import all_reduce_sum, extended_timeout, is_rank0, local_rank0_first
from interop.resolve import base_folder, pick_tokenizer
from kernels.attention import Documents
from kernels.divergence import linear_divergence
from methods import model_of_step_0, put_adapter_on, start_of
from model import Transformer, eval_mode
from objectives import (
    Losses,
    StepTotals,
    add_balance,
    experts_with_loads,
    sums_of_examples,
    weighted_mean,
)
from tokenizer import Tokenizer
from training.defaults import Settings
from training.own_answers import AnswerWriter, asked_questions
from training.rewards import AskedQuestion

# What the model before step 1 is asked where it is its own teacher.
ASKS_AS_TEACHER = (
    "{prompt}\n\nA right answer to this is:\n\n{reference}\n\nNow give an answer of your own."
)
# So many prompts go through the chat template at a time.
TALKS_AT_ONCE = 256


class Teacher:
    """The model that is learnt from. It is never trained.

    model: its own, or the student itself, where `as_teacher` gives its context: the adapter off.
    shows_reference: it is the model before step 1, which is shown the reference answer.
    """

    def __init__(self, settings: Settings, student: Transformer, tokenizer: Tokenizer):
        """Loads it. Raises UserError if its tokens are not those of the student, or it takes no texts as long
        as the examples may be."""
        self.shows_reference = settings.teacher == SELF
        self.as_teacher: Callable[[], AbstractContextManager] = contextlib.nullcontext
        self.model = student
        if self.shows_reference and model_of_step_0(student, settings) is not None:
            self.as_teacher = lambda: step_0_of(student, settings)
            print("teacher   the model without its adapter, which is shown the reference answer")
            return
        adapter: str | Path | None = None
        named = settings.teacher
        assert named is not None, "see check_distillation"
        if self.shows_reference:
            if settings.add_tokens:
                raise UserError(
                    "--add-tokens: the model before step 1, which --teacher self learns from, has no such"
                    " tokens, but under a new adapter such as lora's; take that, or leave one of the two out"
                )
            # Trained weights are no longer those of step 1: they are loaded once more.
            folder = student.source
            adapter = start_of(settings)
        else:
            adapter = named if is_adapter(named) else None
            with local_rank0_first():
                folder = base_folder(None if adapter else named, adapter)
        require_lm_head(folder, read_config(folder), adapter)
        if not self.shows_reference:
            check_same_tokens(named, pick_tokenizer(folder, adapter, None), tokenizer)
        self.model = load_model(folder, student.dtype, student.device, settings.quant)
        if adapter:
            put_adapter_on(self.model, adapter)
        self.model.requires_grad_(False)
        self.model.eval()
        if settings.seq_len and self.model.max_positions < settings.seq_len:
            most = self.model.max_positions
            raise UserError(
                f"--teacher {named}: takes texts of {most:,} tokens, and those of the data may have"
                f" {settings.seq_len:,}; add --seq-len {most}, or less"
            )
        name = "the model before step 1, shown the reference" if self.shows_reference else named
        size = sum(p.numel() for p in self.model.parameters())
        print(
            f"teacher   {name}: {self.model.config.family}, {size:,} numbers beside the student's"
        )

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Tensor:
        """Returns what goes into the teacher's output head for each trained token, [K, E]."""
        with self.as_teacher(), eval_mode(self.model):
            hidden = self.model.flat(batch.tokens, batch.documents)
        return hidden.index_select(0, batch.logit_positions)

    @torch.no_grad()
    def head(self) -> Tensor:
        """Returns the weight of its output head, [V, E]."""
        with self.as_teacher():
            return self.model.head_weight()


def step_0_of(model: Transformer, settings: Settings) -> AbstractContextManager:
    """Returns a context in which a model computes as before step 1."""
    context = model_of_step_0(model, settings)
    assert context is not None, "asked before"
    return context


def check_same_tokens(name: str, teacher: Tokenizer, student: Tokenizer) -> None:
    """Raises UserError if an id means another token to the teacher: their probabilities are compared id by
    id."""
    difference = student.first_difference(teacher)
    if difference:
        raise UserError(
            f"--teacher {name}: has another vocabulary than the student ({difference}); a teacher with the"
            " student's tokens is wanted, such as a larger model of its family"
        )


class DistillRun:
    """Distillation on given answers: what the loop and the validation call."""

    def __init__(self, settings: Settings, teacher: Teacher):
        self.settings = settings
        self.teacher = teacher

    def begin_step(
        self, model: Transformer, batches: list[Batch], step: int, stop_signal: int
    ) -> tuple[list[Batch], StepTotals]:
        """Returns the step's micro-batches as they are, and its totals."""
        return batches, StepTotals.of(batches, stop_signal)

    def __call__(
        self, model: Transformer, batch: Batch, totals: StepTotals, losses: Losses
    ) -> Tensor:
        """Returns a micro-batch's share of a step's loss, a float32 scalar: the mean divergence of the
        step's trained tokens, and the balance loss of routed experts where there are any."""
        teacher_hidden = self.teacher.hidden(self.teacher_batch(batch))
        routed = experts_with_loads(model)
        total, token_losses = self.divergence(model, batch, teacher_hidden)
        loss = total / totals.loss_weight_sum
        losses.loss += loss.detach()
        if batch.replay_weights is not None:
            losses.replay_loss += token_losses @ batch.replay_weights
        return add_balance(loss, model, routed, batch, totals, losses)

    def divergence(
        self, model: Transformer, batch: Batch, teacher_hidden: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns what `linear_divergence` does of a batch's trained tokens."""
        hidden = model.flat(batch.tokens, batch.documents)  # [N, D]
        to_head = hidden.index_select(0, batch.logit_positions)  # [K, D]
        softcaps = model.config.logit_softcap, self.teacher.model.config.logit_softcap
        return linear_divergence(
            to_head,
            model.head_weight(),
            teacher_hidden,
            self.teacher.head(),
            self.settings.divergence == "reverse",
            softcaps,
            batch.loss_weights,
            model.head_rows(),
        )

    def teacher_batch(self, batch: Batch) -> Batch:
        """Returns what the teacher reads of a batch: the same."""
        return batch

    @torch.no_grad()
    def validate(
        self, model: Transformer, batches: Iterable[Batch], take: Callable[[Tensor], None]
    ) -> dict[str, float]:
        """Returns {"loss": the divergence per trained token over all batches, of all ranks}. take: as of
        RunObjective."""
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in batches:
            total, token_losses = self.divergence(
                model, batch, self.teacher.hidden(self.teacher_batch(batch))
            )
            assert isinstance(batch.documents, Documents), "--context-parallel is refused"
            take(sums_of_examples(batch, batch.documents, token_losses))
            sums += torch.tensor([float(total), batch.loss_weight_sum], dtype=torch.float64)
        total_loss, weight = all_reduce_sum(sums).tolist()
        return {"loss": total_loss / weight}

    def trial_batch(self, batch: Batch) -> Batch:
        """Returns the batch itself: a step would train it as it is."""
        return batch


class OwnAnswersRun(DistillRun):
    """Distillation on the student's own answers.

    data: of prompts. Their references are read where the teacher is shown them.
    """

    def __init__(
        self, settings: Settings, tokenizer: Tokenizer, data: TrainingData, teacher: Teacher
    ):
        super().__init__(settings, teacher)
        self.writer = AnswerWriter(settings, tokenizer)
        # Of each prompt, by its key, what the teacher is asked.
        self.shown: dict[tuple[int, int], list[int]] = {}
        self.val_shown: dict[tuple[int, int], list[int]] = {}
        if teacher.shows_reference:
            room = teacher.model.max_positions - self.writer.max_new_tokens
            self.shown = shown_prompts(asked_questions(data.train), tokenizer, room)
            if len(data.val):
                self.val_shown = shown_prompts(asked_questions(data.val), tokenizer, room)
        self.validates = False

    def begin_step(
        self, model: Transformer, batches: list[Batch], step: int, stop_signal: int
    ) -> tuple[list[Batch], StepTotals]:
        """Returns the micro-batches of answers to this rank's prompts, and the step's totals."""
        # One rank's answers may be longer than those of others, which wait then.
        with extended_timeout():
            answered = self.answered(model, batches, step)
            return answered, StepTotals.of(answered, stop_signal)

    def answered(self, model: Transformer, batches: Sequence[Batch], step: int) -> list[Batch]:
        """Returns micro-batches of the model's answers to the prompts of some batches."""
        drafts = self.writer.answer_step(model, batches, step)
        stop_ids = self.writer.tokenizer.stop_ids
        examples = []
        for draft in drafts:
            is_cut = draft.ids[-1] not in stop_ids
            examples.append(draft.as_example(SampledAnswer(draft.logps, is_cut=is_cut)))
        return self.writer.batches_of(examples, model)

    def __call__(
        self, model: Transformer, batch: Batch, totals: StepTotals, losses: Losses
    ) -> Tensor:
        """Returns what DistillRun does, and reports the answers' lengths."""
        loss = super().__call__(model, batch, totals, losses)
        losses.add_means(means_of_answers(batch))
        return loss

    def teacher_batch(self, batch: Batch) -> Batch:
        """Returns what the teacher reads of a batch of answers: the same ones, behind its own prompts where
        it is shown the references."""
        shown = self.val_shown if self.validates else self.shown
        if not shown:
            return batch
        examples = []
        for example in batch.examples:
            if example.key is None or example.sampled is None:
                examples.append(example)
                continue
            answer = list(example.ids)[-len(example.sampled.logps) :]
            prompt = shown[example.key]
            loss_weights = [0.0] * len(prompt) + [1.0] * len(answer)
            examples.append(replace(example, ids=prompt + answer, loss_weights=loss_weights))
        return collate(examples, batch.tokens.device, whole=True)

    @torch.no_grad()
    def validate(
        self, model: Transformer, batches: Iterable[Batch], take: Callable[[Tensor], None]
    ) -> dict[str, float]:
        """Returns {"loss": the divergence per token of the model's answers to the prompts, ...}, drawn by
        the same random numbers at each validation."""
        means = {name: torch.zeros(2) for name in means_of_answers(None)}

        def answered() -> Iterable[Batch]:
            for batch in batches:
                for of_answers in self.answered(model, [batch], -1):
                    for name, mean in means_of_answers(of_answers).items():
                        means[name] += mean.cpu()
                    yield of_answers

        self.validates = True
        try:
            measured = super().validate(model, answered(), take)
        finally:
            self.validates = False
        sums = all_reduce_sum(torch.stack([*means.values()]))
        values = (sums[:, 0] / sums[:, 1]).tolist()
        return measured | dict(zip(means, values, strict=True))

    def trial_batch(self, batch: Batch) -> Batch:
        """Returns answers as long as they may be to prompts of a batch."""
        return self.writer.trial_batch(batch)


def means_of_answers(batch: Batch | None) -> dict[str, Tensor]:
    """Returns {name in metrics.jsonl: (sum, count)} of a batch of answers, float32 [2] each: their tokens,
    and the share that was cut off."""
    sampled = [each.sampled for each in batch.examples if each.sampled] if batch else []
    lengths = torch.tensor([float(len(each.logps)) for each in sampled])
    is_cut = torch.tensor([float(each.is_cut) for each in sampled])
    device = batch.tokens.device if batch else torch.device("cpu")
    values = {"answer_tokens": lengths, "cut": is_cut}
    ones = torch.ones(len(sampled))
    return {name: weighted_mean(value, ones).to(device) for name, value in values.items()}


def shown_prompts(
    questions: dict[tuple[int, int], AskedQuestion], tokenizer: Tokenizer, room: int
) -> dict[tuple[int, int], list[int]]:
    """Returns of each question the ids of a prompt that shows the reference.

    room: the most tokens that it may have.
    Raises UserError naming a record without a reference, or whose prompt is too long.
    """
    prompts = {}
    keys = list(questions)
    bar = progress("tokenizing", len(keys), "prompt", shown=is_rank0())
    with bar:
        for start in range(0, len(keys), TALKS_AT_ONCE):
            some = keys[start : start + TALKS_AT_ONCE]
            talks = [(shown_messages(questions[key]), questions[key].record.tools) for key in some]
            chats = tokenizer.render_each(talks, add_generation_prompt=True)
            for key, chat in zip(some, chats, strict=True):
                where = questions[key].record.where
                if isinstance(chat, UserError):
                    raise UserError(f"{where}: {one_line(str(chat), 200)}")
                if len(chat.ids) > room:
                    raise UserError(
                        f"{where}: {len(chat.ids):,} tokens with its reference, and the model has room for"
                        f" {room:,} before an answer; leave the record out, or lower --max-new-tokens"
                    )
                prompts[key] = chat.ids
            bar.update(len(some))
    return prompts


def shown_messages(question: AskedQuestion) -> list[dict]:
    """Returns the messages of a question whose last one shows the reference answer."""
    if not question.references:
        raise UserError(
            f"{question.record.where}: has no answer that the teacher could be shown; --teacher self wants one"
            " in each record"
        )
    last = question.messages[-1]
    said = ASKS_AS_TEACHER.format(
        prompt=last.get("content") or "", reference=question.references[0]
    )
    return [*question.messages[:-1], last | {"content": said}]
