"""Reinforcement learning in the loop: the model answers the prompts of a step, the answers get rewards, and
the step makes those likelier that are better than the others of their group (GRPO; objectives.py has the
equation).

A step's answers are drawn from the model as it is before that step, at temperature 1 with nothing left
out, and are trained once. So the log-probability with which a token was drawn is to be the one that
trains it, and their ratio 1. Decoding and training compute the same sums in another order, though, and
what is 1e-6 in fp32 is some hundredths in bf16: the policy that answers would be another one than that
which is trained. Here

- on a CPU in fp32 it is the same one, to the bit. A token is drawn by a random number that is kept
  (training/own_answers.py). Each answer then goes through the very batches that will train it, and every token is
  drawn once more from their logits, by the same number. Where another one comes out, the answer ends
  there with that one, and is continued. What remains was drawn from the policy that is trained.
- elsewhere the difference is measured in every step (sampling_gap in metrics.jsonl and in the lines that
  are printed) and must stay under GAP_LIMIT; the ratio in GRPO's equation corrects for it.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

import distributed
from common.errors import UserError
from data import Batch, TrainingData
from dataset.examples import DUMMY_EXAMPLE, Example, SampledAnswer
from distributed import all_reduce_sum
from model import Transformer
from objectives import (
    Losses,
    ReferenceFn,
    StepTotals,
    add_balance,
    experts_with_loads,
    group_advantages,
    grpo_losses,
    token_logps,
    weighted_mean,
)
from tokenizer import Tokenizer
from training.defaults import Settings
from training.own_answers import AnswerWriter, Draft, asked_questions
from training.rewards import AskedQuestion, GivenAnswer, Rewards

# The mean difference, in nats, between the log-probabilities that sampled tokens and those that train
# them, beyond which the answers are of another model. In bf16 it is some hundredths (docs/objectives.md).
GAP_LIMIT = 0.1


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
        self.writer = AnswerWriter(settings, tokenizer)
        self.rewards = rewards
        self.reference = reference
        self.questions = asked_questions(data.train)
        # Of the same files, or of others whose numbers are their own.
        self.val_questions = asked_questions(data.val) if len(data.val) else {}
        self.gaps: list[Tensor] = []
        self.has_begun = False  # trials come before the first step
        first = next(iter(self.questions.values()))
        self.rewards([GivenAnswer(first, first.references[0] if first.references else "")])

    # ---- what the loop calls ----

    def begin_step(
        self, model: Transformer, batches: list[Batch], step: int, stop_signal: int
    ) -> tuple[list[Batch], StepTotals]:
        """Returns the micro-batches of answers to this rank's prompts, and the step's totals."""
        self.check_gap()
        self.has_begun = True
        # One rank's answers may be longer, or their rewards slower, than those of others, which wait then.
        with distributed.extended_timeout():
            drafts = self.writer.answer_step(model, batches, step)
            answered = self.writer.batches_of(self.judged(drafts, self.questions), model)
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
            lengths = torch.full_like(lengths, self.writer.max_new_tokens)
        share = texts.weights / (lengths * totals.num_examples)
        loss = (token_losses * share[of_answer]).sum()

        rewards = torch.tensor([each.reward for each in answers], device=device)
        kl_of_tokens = weighted_mean(kl, torch.ones_like(kl))
        losses.loss -= (rewards * texts.weights).sum() / totals.num_examples
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
            drafts = self.writer.answer_greedily(model, batch)
            answers = self.writer.answers(drafts, self.val_questions)
            rewards = torch.tensor(self.rewards(answers), dtype=torch.float64)
            num_cut = sum(answer.is_cut for answer in answers)
            num_tokens = sum(len(draft.ids) for draft in drafts)
            sums += torch.tensor([float(rewards.sum()), num_cut, num_tokens, len(answers)])
            take(torch.stack([-rewards.float(), torch.ones(len(rewards))]).to(model.device))
        with distributed.extended_timeout():
            reward, num_cut, num_tokens, count = all_reduce_sum(sums).tolist()
        return {
            "loss": -reward / count,
            "reward": reward / count,
            "answer_tokens": num_tokens / count,
            "cut": num_cut / count,
        }

    def judged(
        self, drafts: Sequence[Draft], questions: dict[tuple[int, int], AskedQuestion]
    ) -> list[Example]:
        """Returns the answers as examples, with their rewards and advantages."""
        answers = self.writer.answers(drafts, questions)
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
                    drafts[i].was_redrawn,
                )
                examples[i] = drafts[i].as_example(sampled)
        return examples

    def trial_batch(self, batch: Batch) -> Batch:
        """Returns answers as long as they may be to prompts of a batch."""
        return self.writer.trial_batch(batch)

    # ---- what is reported and asserted ----

    def means(
        self, answers: Sequence[SampledAnswer], rewards: Tensor, lengths: Tensor
    ) -> dict[str, Tensor]:
        """Returns what is reported of a batch's answers: {name in metrics.jsonl: (sum, count)}.

        reward; answer_tokens; cut: the share of answers that were cut off; alike: the share of those in
        groups whose rewards are all equal, which teach nothing; where that is looked at, redrawn: the share
        of those in which a token came out otherwise from the logits that train it, which is near 0 unless
        decoding is broken.
        """
        ones = torch.ones_like(rewards)
        is_cut = torch.tensor([float(each.is_cut) for each in answers], device=rewards.device)
        is_alike = torch.tensor([float(each.is_alike) for each in answers], device=rewards.device)
        values = {"reward": rewards, "answer_tokens": lengths, "cut": is_cut, "alike": is_alike}
        if self.writer.is_exact:
            redrawn = [float(each.was_redrawn) for each in answers]
            values["redrawn"] = torch.tensor(redrawn, device=rewards.device)
        return {name: weighted_mean(value, ones) for name, value in values.items()}

    def check_gap(self) -> None:
        """Raises UserError if the log-probabilities that train tokens are not those that sampled them. On a
        GPU, which need not be waited for then, it is called when the step is over."""
        gaps, self.gaps = self.gaps, []
        if not gaps or not self.has_begun:
            return
        total, count = torch.stack(gaps).sum(0).tolist()
        mean = total / max(count, 1)
        limit = 0.0 if self.writer.is_exact else GAP_LIMIT
        # A step whose numbers are not finite is skipped (train.py).
        if mean > limit:
            raise UserError(
                f"the log-probabilities that train tokens differ from those that sampled them, by {mean:.2g}"
                f" nats in the mean (at most {limit:g} are allowed): these answers are of another model"
            )
