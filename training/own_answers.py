"""Answers that the model writes while it is trained, to the prompts of a step: for reinforcement learning
(training/on_policy.py) and for distillation on the student's own answers (training/distillation.py).

They are drawn from the model as it is before the step, at temperature 1 with nothing left out, each token by
a random number of its own that is kept (kernels/draws.py). `AnswerWriter.settle` draws every token once more
from the logits of the batches that will train it.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from common.errors import UserError
from data import Batch, collate, split_micro_batches
from dataset.example_records import records_with_columns
from dataset.examples import DUMMY_EXAMPLE, Dataset, Example, ExampleIndex, SampledAnswer
from dataset.prompts import split_prompt
from decoding import Draws, packed_weights
from evals.answers import decode_answer
from evals.batch_answers import prompt_batches
from kernels.draws import linear_draws
from model import Transformer, eager_mode
from tokenizer import Tokenizer
from training.defaults import Settings
from training.rewards import AskedQuestion, GivenAnswer

# Tokens of prompts and answers whose keys and values are kept at a time.
CACHED_TOKENS_AT_ONCE = 16384
# After so many rounds in which tokens were drawn otherwise, something else is wrong.
MOST_ROUNDS = 50


class Draft:
    """An answer that is being written.

    example: its prompt. group: the number of its prompt in the step.
    uniforms: float32 [max_new_tokens], the random number of each token, on the CPU.
    ids: of the answer so far. logps: the log-probability with which each was drawn.
    was_redrawn: a token of it came out otherwise from the logits that train it.
    """

    def __init__(self, example: Example, group: int, uniforms: Tensor):
        self.example = example
        self.group = group
        self.uniforms = uniforms
        self.ids: list[int] = []
        self.logps: list[float] = []
        self.was_redrawn = False

    def has_ended(self, stop_ids: set[int] | frozenset[int]) -> bool:
        return bool(self.ids) and (self.ids[-1] in stop_ids or len(self.ids) == len(self.uniforms))

    def as_example(self, sampled: SampledAnswer) -> Example:
        """Returns the prompt with the answer, of which each token is trained."""
        prompt = list(map(int, self.example.ids))
        loss_weights = [0.0] * len(prompt) + [self.example.weight] * len(self.ids)
        return replace(
            self.example,
            ids=prompt + self.ids,
            loss_weights=loss_weights,
            sampled=sampled,
        )


class AnswerWriter:
    """Lets the model answer prompts.

    is_exact: the policy that answers is to be the one that is trained, to the bit: on a CPU in fp32.
    """

    def __init__(self, settings: Settings, tokenizer: Tokenizer):
        self.settings = settings
        self.tokenizer = tokenizer
        self.is_exact = settings.dtype == "fp32" and settings.device == "cpu"

    def answer_step(self, model: Transformer, batches: Sequence[Batch], step: int) -> list[Draft]:
        """Returns --group-size answers to each prompt of this rank's batches of a step."""
        drafts = self.begin_drafts(prompts_of(batches), step)
        self.write(model, drafts)
        if self.is_exact:
            self.settle(model, drafts)
        return drafts

    @property
    def max_new_tokens(self) -> int:
        assert self.settings.max_new_tokens is not None, "chosen in resolve_defaults"
        return self.settings.max_new_tokens

    def answer_greedily(self, model: Transformer, batch: Batch) -> list[Draft]:
        """Returns the likeliest answer to each prompt of a batch."""
        no_numbers = torch.zeros(self.max_new_tokens)
        drafts = [Draft(each, i, no_numbers) for i, each in enumerate(prompts_of([batch]))]
        self.write(model, drafts, greedily=True)
        return drafts

    def begin_drafts(self, prompts: Sequence[Example], step: int) -> list[Draft]:
        """Returns --group-size answers to each prompt, which have their random numbers and no token yet.

        The numbers follow from the run's seed, the step, the prompt's record and the seed of its place in the
        step (data.MicroBatches; None in a validation), so that a resumed run and another number of processes
        draw the same ones, and a prompt that comes twice in a step gets others.
        """
        drafts = []
        for group, example in enumerate(prompts):
            key = example.key
            assert key is not None
            text = f"{self.settings.seed} {step} {key[0]} {key[1]} {example.dropout_seed}"
            digest = hashlib.blake2b(text.encode(), digest_size=7).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
            assert self.settings.group_size is not None
            shape = (self.settings.group_size, self.max_new_tokens)
            drafts += [Draft(example, group, row) for row in torch.rand(shape, generator=generator)]
        return drafts

    def write(self, model: Transformer, drafts: Sequence[Draft], greedily: bool = False) -> None:
        """Continues answers to their ends: by their random numbers, or by the likeliest tokens."""
        stop_ids = self.tokenizer.stop_ids
        texts = [[*map(int, draft.example.ids), *draft.ids] for draft in drafts]
        if not drafts:
            return
        left = max(self.max_new_tokens - len(draft.ids) for draft in drafts)
        longest = max(map(len, texts)) + left
        room = CACHED_TOKENS_AT_ONCE
        if model.device.type != "cpu":
            # A token that is trained takes more memory than its keys and values do.
            room = min(room, self.settings.max_tokens)
        at_once = max(1, room // longest)
        with eager_mode(model), packed_weights(model, left):
            for numbers in prompt_batches([len(text) for text in texts], at_once):
                rows = [texts[i] for i in numbers]
                if greedily:
                    answers = model.generate(rows, left, stop=stop_ids)
                    for i, ids in zip(numbers, answers, strict=True):
                        drafts[i].ids += ids
                    continue
                self.draw(model, [drafts[i] for i in numbers], rows)

    def draw(self, model: Transformer, drafts: Sequence[Draft], rows: list[list[int]]) -> None:
        """Continues a batch of answers by their random numbers. rows: the ids of prompt and answer."""
        most = max(self.max_new_tokens - len(draft.ids) for draft in drafts)
        uniforms = torch.zeros(len(drafts), most)
        for row, draft in zip(uniforms, drafts, strict=True):
            numbers = draft.uniforms[len(draft.ids) :]
            row[: len(numbers)] = numbers
        draws = Draws(uniforms.to(model.device))
        answers = model.generate(rows, most, stop=self.tokenizer.stop_ids, draws=draws)
        logps = draws.logps.tolist()
        for draft, ids, row in zip(drafts, answers, logps, strict=True):
            # One that was begun before the others had fewer tokens left.
            ids = ids[: self.max_new_tokens - len(draft.ids)]
            draft.ids += ids
            draft.logps += row[: len(ids)]

    def settle(self, model: Transformer, drafts: Sequence[Draft]) -> None:
        """Draws every token once more from the logits of the batches that will train it, and continues an
        answer from where another one comes out, until none does."""
        stop_ids = self.tokenizer.stop_ids
        # The micro-batches of the round before, as they were drawn then.
        drawn: set[tuple] = set()
        for _ in range(MOST_ROUNDS):
            lengths = [len(draft.example.ids) + len(draft.ids) for draft in drafts]
            has_changed = False
            keys = set()
            for group in self.micro_batches(lengths):
                key = tuple((i, tuple(drafts[i].ids)) for i in group)
                keys.add(key)
                if key not in drawn:
                    has_changed |= self.draw_again(model, [drafts[i] for i in group])
            if not has_changed:
                return
            drawn = keys
            self.write(model, [draft for draft in drafts if not draft.has_ended(stop_ids)])
        raise UserError("the answers of a step can't be drawn alike twice: is this machine sound?")

    def draw_again(self, model: Transformer, drafts: Sequence[Draft]) -> bool:
        """Draws the tokens of a micro-batch of answers from the logits that train them. Returns True if an
        answer has become another one."""
        examples = [draft.as_example(SampledAnswer(draft.logps)) for draft in drafts]
        batch = self.collate(examples, model)
        uniforms = torch.cat([draft.uniforms[: len(draft.ids)] for draft in drafts])
        # With gradients, as in the step: some kernels round otherwise without.
        with torch.enable_grad():
            hidden = model.flat(batch.tokens, batch.documents)  # [N, D]
        to_head = hidden.detach().index_select(0, batch.logit_positions)  # [K, D]
        softcap = model.config.logit_softcap
        with torch.no_grad():
            tokens, logps = linear_draws(
                to_head, model.head_weight(), uniforms.to(to_head.device), softcap
            )
        counts = [len(draft.ids) for draft in drafts]
        has_changed = False
        for draft, found, of_found in zip(
            drafts, tokens.split(counts), logps.split(counts), strict=True
        ):
            ids = found.tolist()
            draft.logps = of_found.tolist()
            if ids == draft.ids:
                continue
            first = next(i for i, id in enumerate(ids) if id != draft.ids[i])
            draft.ids = ids[: first + 1]
            draft.logps = draft.logps[: first + 1]
            draft.was_redrawn = True
            has_changed = True
        return has_changed

    def answers(
        self, drafts: Sequence[Draft], questions: dict[tuple[int, int], AskedQuestion]
    ) -> list[GivenAnswer]:
        """Returns the answers as texts."""
        answers = []
        for draft in drafts:
            text, is_cut = decode_answer(self.tokenizer, draft.ids)
            assert draft.example.key is not None
            answers.append(GivenAnswer(questions[draft.example.key], text, is_cut))
        return answers

    def micro_batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Returns the numbers of a step's answers in micro-batches. lengths: with their prompts."""
        assert self.settings.group_size is not None
        most = self.settings.batch_size * self.settings.group_size
        return split_micro_batches(lengths, most, self.settings.max_tokens)

    def batches_of(self, examples: Sequence[Example], model: Transformer) -> list[Batch]:
        """Returns the micro-batches of a step's answers; where there are none, one of an example that counts
        nothing."""
        groups = self.micro_batches([len(example.ids) for example in examples])
        batches = [self.collate([examples[i] for i in group], model) for group in groups]
        return batches or [self.collate([DUMMY_EXAMPLE], model)]

    def collate(self, examples: Sequence[Example], model: Transformer) -> Batch:
        return collate(examples, model.device, whole=True)

    def trial_batch(self, batch: Batch) -> Batch:
        """Returns answers as long as they may be to as many of a batch's prompts as a micro-batch holds."""
        prompts = prompts_of([batch])
        lengths = [len(each.ids) + self.max_new_tokens for each in prompts]
        numbers = self.micro_batches(lengths)[0] if prompts else []
        sampled = SampledAnswer([0.0] * self.max_new_tokens, advantage=1.0)
        examples = []
        for i in numbers:
            draft = Draft(prompts[i], i, torch.zeros(self.max_new_tokens))
            prompt = list(map(int, prompts[i].ids))
            draft.ids = (prompt * (1 + self.max_new_tokens // len(prompt)))[: self.max_new_tokens]
            examples.append(draft.as_example(sampled))
        return collate(examples or [DUMMY_EXAMPLE], batch.tokens.device, whole=True)


def prompts_of(batches: Sequence[Batch]) -> list[Example]:
    """Returns the prompts of some batches; a rank without any has an example that is none."""
    return [each for batch in batches for each in batch.examples if each.key is not None]


def asked_questions(dataset: Dataset) -> dict[tuple[int, int], AskedQuestion]:
    """Returns the question of each example of a dataset, by `Example.key`."""
    index = dataset.examples
    assert isinstance(index, ExampleIndex)
    questions = {}
    keys = zip(index.source.tolist(), index.row.tolist(), strict=True)
    for key, (record, columns) in zip(keys, records_with_columns(dataset), strict=True):
        prompt = split_prompt(record, record.where, False, Counter())
        references = record.references
        if references is None:
            said = (prompt.reference or {}).get("content")
            references = [said] if said else []
        questions[key] = AskedQuestion(record, prompt.messages or [], references, columns)
    return questions
