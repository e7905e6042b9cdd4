"""Reinforcement learning in the loop: the model answers the prompts of a step, the answers get rewards, and
the step makes those likelier that are better than the others of their group (GRPO; objectives.py has the
equation).

A step's answers are drawn from the model as it is before that step, at temperature 1 with nothing left
out, and are trained once. So the log-probability with which a token was drawn is to be the one that
trains it, and their ratio 1. Decoding and training compute the same sums in another order, though, and
what is 1e-6 in fp32 is some hundredths in bf16: the policy that answers would be another one than that
which is trained. Here

- on a CPU in fp32 it is the same one, to the bit. A token is drawn by a random number that is kept
  (kernels/draws.py). Each answer then goes through the very batches that will train it, and every token is
  drawn once more from their logits, by the same number. Where another one comes out, the answer ends
  there with that one, and is continued. What remains was drawn from the policy that is trained.
- elsewhere the difference is measured in every step (sampling_gap in metrics.jsonl and in the lines that
  are printed) and must stay under GAP_LIMIT; the ratio in GRPO's equation corrects for it.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from common.errors import UserError
from data import Batch, TrainingData, collate, split_micro_batches
from dataset.encoding import AS_PROMPTS
from dataset.example_records import records_with_columns
from dataset.examples import DUMMY_EXAMPLE, Dataset, Example, ExampleIndex, SampledAnswer
from dataset.prompts import split_prompt
from decoding import Draws, packed_weights
from distributed import all_reduce_sum
from evals.answers import decode_answer
from evals.batch_answers import prompt_batches
from kernels.draws import linear_draws
from model import Transformer, eager_mode
from objectives import (
    OBJECTIVES,
    Losses,
    ReferenceFn,
    RunObjective,
    StepTotals,
    add_balance,
    experts_with_loads,
    group_advantages,
    grpo_losses,
    make_objective,
    token_logps,
    weighted_mean,
)
from tokenizer import Tokenizer
from training.defaults import Settings
from training.reference import reference_of_run
from training.rewards import Answer, Question, Rewards, rewards_of_run

# Tokens of prompts and answers whose keys and values are kept at a time.
TOKENS_AT_ONCE = 16384
# The mean difference, in nats, between the log-probabilities that sampled tokens and those that train
# them, beyond which the answers are of another model. In bf16 it is some hundredths (docs/objectives.md).
GAP_LIMIT = 0.1
# After so many rounds in which tokens were drawn otherwise, something else is wrong.
MOST_ROUNDS = 50


def objective_of_run(
    settings: Settings, model: Transformer, tokenizer: Tokenizer, data: TrainingData
) -> RunObjective:
    """Returns a run's objective: of examples as the data hold them, or of answers that the model writes."""
    if OBJECTIVES[settings.objective].kind != AS_PROMPTS:
        return make_objective(settings, reference_of_run(settings, model))
    rewards = rewards_of_run(settings, model.dtype, model.device)
    reference = reference_of_run(settings, model, lambda batch: token_logps(model, batch))
    return OnPolicyRun(settings, tokenizer, data, rewards, reference)


class Draft:
    """An answer that is being written.

    example: its prompt. group: the number of its prompt in the step.
    uniforms: float32 [max_new_tokens], the random number of each token, on the CPU.
    ids: of the answer so far. logps: the log-probability with which each was drawn.
    """

    def __init__(self, example: Example, group: int, uniforms: Tensor):
        self.example = example
        self.group = group
        self.uniforms = uniforms
        self.ids: list[int] = []
        self.logps: list[float] = []

    def has_ended(self, stop_ids: set[int] | frozenset[int]) -> bool:
        return bool(self.ids) and (self.ids[-1] in stop_ids or len(self.ids) == len(self.uniforms))

    def as_example(self, sampled: SampledAnswer) -> Example:
        """Returns the prompt with the answer, of which each token is trained."""
        prompt = list(map(int, self.example.ids))
        loss_weights = [0.0] * len(prompt) + [1.0] * len(self.ids)
        return replace(
            self.example,
            ids=prompt + self.ids,
            loss_weights=loss_weights,
            weight=1.0,
            sampled=sampled,
        )


class OnPolicyRun:
    """Reinforcement learning of a run: what the loop and the validation call.

    reference: log-probabilities of tokens by the model before step 1; None without --beta.
    """

    def __init__(
        self,
        settings: Settings,
        tokenizer: Tokenizer,
        data: TrainingData,
        rewards: Rewards,
        reference: ReferenceFn | None,
    ):
        """Asks for the reward of a first answer, so that a function that fails ends the run before it has
        begun."""
        self.settings = settings
        self.tokenizer = tokenizer
        self.rewards = rewards
        self.reference = reference
        self.questions = questions_of(data.train)
        # Of the same files, or of others whose numbers are their own.
        self.val_questions = questions_of(data.val) if len(data.val) else {}
        self.is_exact = settings.dtype == "fp32" and settings.device == "cpu"
        self.gaps: list[Tensor] = []
        self.has_begun = False  # trials come before the first step
        first = next(iter(self.questions.values()))
        self.rewards([Answer(first, first.references[0] if first.references else "")])

    # ---- what the loop calls ----

    def begin_step(
        self, model: Transformer, batches: list[Batch], step: int, stop_signal: int
    ) -> tuple[list[Batch], StepTotals]:
        """Returns the micro-batches of answers to this rank's prompts, and the step's totals."""
        self.check_gap()
        self.has_begun = True
        prompts = [each for batch in batches for each in batch.examples if each.key is not None]
        drafts = self.begin_drafts(prompts, step)
        self.write(model, drafts)
        if self.is_exact:
            self.settle(model, drafts)
        examples = self.judged(drafts, self.questions)
        groups = self.micro_batches([len(example.ids) for example in examples])
        answered = [self.collate([examples[i] for i in group], model) for group in groups]
        if not answered:
            # A rank without a prompt: what it computes counts nothing.
            answered = [self.collate([DUMMY_EXAMPLE], model)]
        return answered, StepTotals.of(answered, stop_signal)

    def __call__(
        self, model: Transformer, batch: Batch, totals: StepTotals, losses: Losses
    ) -> Tensor:
        """Returns a micro-batch's share of a step's loss, a float32 scalar.

        GRPO's is the mean over the answers of the mean over their tokens; Dr. GRPO's the sum over the
        tokens, divided by the answers and the most tokens that one may have. The gradient is that of
        this surrogate. Its value says nothing, as the advantages of a group add up to 0; so what is
        reported as the loss is what is minimised in the end: minus the mean reward, plus beta times the KL.
        """
        reference = self.reference(batch) if self.reference else None
        routed = experts_with_loads(model)
        texts = batch.texts
        assert texts is not None
        device = model.device
        answers = [example.sampled for example in batch.examples if example.sampled is not None]
        logps = token_logps(model, batch)
        sampled = torch.tensor([logp for each in answers for logp in each.logps], device=device)
        # How far apart they are, in nats: the sum over the tokens, and their number.
        gap = weighted_mean((logps.detach() - sampled).abs(), torch.ones_like(sampled))
        self.gaps.append(gap)
        if device.type == "cpu":
            self.check_gap()

        of_answer = texts.text_of_target
        advantages = torch.tensor([each.advantage for each in answers], device=device)
        token_losses, kl = grpo_losses(
            logps, sampled, advantages[of_answer], reference, self.settings.beta or 0.0
        )
        lengths = texts.lengths
        if self.settings.dr_grpo:
            lengths = torch.full_like(lengths, self.settings.max_new_tokens)
        share = 1 / (lengths * totals.num_examples)
        loss = (token_losses * share[of_answer]).sum()

        rewards = torch.tensor([each.reward for each in answers], device=device)
        kl_of_tokens = weighted_mean(kl, torch.ones_like(kl))
        losses.loss -= rewards.sum() / totals.num_examples
        if reference is not None:
            losses.loss += (self.settings.beta or 0.0) * (kl.detach() * share[of_answer]).sum()
        # A loss that is not finite has to be seen, since the step is skipped then.
        losses.loss += 0 * loss.detach()
        losses.add_means(self.means(answers, rewards, texts.lengths))
        losses.add_means({"sampling_gap": gap})
        if reference is not None:
            losses.add_means({"kl_reference": kl_of_tokens})
        return add_balance(loss, model, routed, batch, totals, losses)

    @torch.no_grad()
    def validate(
        self, model: Transformer, batches: Iterable[Batch], take: Callable[[Tensor], None]
    ) -> dict[str, float]:
        """Returns {"loss": minus the mean reward, "reward": it, ...} of the likeliest answer to each
        prompt, of all ranks. take: as of RunObjective."""
        self.check_gap()
        sums = torch.zeros(4, dtype=torch.float64)
        for batch in batches:
            prompts = [each for each in batch.examples if each.key is not None]
            drafts = [
                Draft(each, i, torch.zeros(self.max_new_tokens)) for i, each in enumerate(prompts)
            ]
            self.write(model, drafts, greedily=True)
            answers = self.answers(drafts, self.val_questions)
            rewards = torch.tensor(self.rewards(answers), dtype=torch.float64)
            num_cut = sum(answer.is_cut for answer in answers)
            num_tokens = sum(len(draft.ids) for draft in drafts)
            sums += torch.tensor([float(rewards.sum()), num_cut, num_tokens, len(answers)])
            take(torch.stack([-rewards.float(), torch.ones(len(rewards))]).to(model.device))
        reward, num_cut, num_tokens, count = all_reduce_sum(sums).tolist()
        return {
            "loss": -reward / count,
            "reward": reward / count,
            "answer_tokens": num_tokens / count,
            "cut": num_cut / count,
        }

    def trial_batch(self, batch: Batch) -> Batch:
        """Returns answers as long as they may be to as many of a batch's prompts as a micro-batch holds."""
        prompts = [each for each in batch.examples if each.key is not None]
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

    # ---- answers ----

    @property
    def max_new_tokens(self) -> int:
        assert self.settings.max_new_tokens is not None, "chosen in resolve_defaults"
        return self.settings.max_new_tokens

    def begin_drafts(self, prompts: Sequence[Example], step: int) -> list[Draft]:
        """Returns --group-size answers to each prompt, which have their random numbers and no token yet.

        The numbers follow from the run's seed, the step and the prompt's record, so that a resumed run and
        another number of processes draw the same ones.
        """
        drafts = []
        times: dict[tuple, int] = {}
        for group, example in enumerate(prompts):
            key = example.key
            assert key is not None
            # A prompt may come twice in a step, where an epoch ends.
            times[key] = times.get(key, 0) + 1
            text = f"{self.settings.seed} {step} {key[0]} {key[1]} {times[key]}"
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
        at_once = max(1, TOKENS_AT_ONCE // longest)
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
            has_changed = True
        return has_changed

    def judged(
        self, drafts: Sequence[Draft], questions: dict[tuple[int, int], Question]
    ) -> list[Example]:
        """Returns the answers as examples, with their rewards and advantages."""
        answers = self.answers(drafts, questions)
        rewards = self.rewards(answers)
        groups: dict[int, list[int]] = {}
        for i, draft in enumerate(drafts):
            groups.setdefault(draft.group, []).append(i)
        examples: list[Example] = [DUMMY_EXAMPLE] * len(drafts)
        for numbers in groups.values():
            own = [rewards[i] for i in numbers]
            advantages = group_advantages(own, self.settings.dr_grpo)
            is_alike = max(own) == min(own)
            for i, advantage in zip(numbers, advantages, strict=True):
                sampled = SampledAnswer(
                    drafts[i].logps,
                    rewards[i],
                    0.0 if is_alike else advantage,
                    answers[i].is_cut,
                    is_alike,
                )
                examples[i] = drafts[i].as_example(sampled)
        return examples

    def answers(
        self, drafts: Sequence[Draft], questions: dict[tuple[int, int], Question]
    ) -> list[Answer]:
        """Returns the answers as texts."""
        answers = []
        for draft in drafts:
            text, is_cut = decode_answer(self.tokenizer, draft.ids)
            assert draft.example.key is not None
            answers.append(Answer(questions[draft.example.key], text, is_cut))
        return answers

    def micro_batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Returns the numbers of a step's answers in micro-batches. lengths: with their prompts."""
        assert self.settings.group_size is not None
        most = self.settings.batch_size * self.settings.group_size
        return split_micro_batches(lengths, most, self.settings.max_tokens)

    def collate(self, examples: Sequence[Example], model: Transformer) -> Batch:
        return collate(examples, model.device, whole=True)

    # ---- what is reported and asserted ----

    def means(
        self, answers: Sequence[SampledAnswer], rewards: Tensor, lengths: Tensor
    ) -> dict[str, Tensor]:
        """Returns what is reported of a batch's answers: {name in metrics.jsonl: (sum, count)}.

        reward; answer_tokens; cut: the share of answers that were cut off; alike: the share of those in
        groups whose rewards are all equal, which teach nothing.
        """
        ones = torch.ones_like(rewards)
        is_cut = torch.tensor([float(each.is_cut) for each in answers], device=rewards.device)
        is_alike = torch.tensor([float(each.is_alike) for each in answers], device=rewards.device)
        values = {"reward": rewards, "answer_tokens": lengths, "cut": is_cut, "alike": is_alike}
        return {name: weighted_mean(value, ones) for name, value in values.items()}

    def check_gap(self) -> None:
        """Raises UserError if the log-probabilities that train tokens are not those that sampled them. On a
        GPU, which need not be waited for then, it is called when the step is over."""
        gaps, self.gaps = self.gaps, []
        if not gaps or not self.has_begun:
            return
        total, count = torch.stack(gaps).sum(0).tolist()
        mean = total / max(count, 1)
        limit = 0.0 if self.is_exact else GAP_LIMIT
        if not mean <= limit:
            raise UserError(
                f"the log-probabilities that train tokens differ from those that sampled them, by {mean:.2g}"
                f" nats in the mean (at most {limit:g} are allowed): these answers are of another model"
            )


def questions_of(dataset: Dataset) -> dict[tuple[int, int], Question]:
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
        questions[key] = Question(record, prompt.messages or [], references, columns)
    return questions
