"""What is minimised, each objective beside its equation: a row of OBJECTIVES is what --objective means.

One definition of a supervised loss everywhere, training and evaluation: the sum of token losses
divided by the number of trained tokens, over the whole optimizer step (or file), whatever the
micro-batches, gradient accumulation or ranks. So a batch of 8 is 2 x 4 to rounding, and a short
answer weighs by its tokens, never by its place in a batch. Where records or messages have weights,
both sums are weighted, as torch's own weighted cross-entropy is. Losses of whole examples (pairs,
judged answers, classes) are likewise summed over a step's examples and divided by their number.

To add an objective of whole examples: its equation, a function of `ScoredAnswers` and settings, and its
row.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from adapting.score_head import REWARD, document_scores, head_labels
from common.choices import SELF
from common.errors import UserError
from data import Batch
from dataset.encoding import (
    AS_CLASSES,
    AS_JUDGED,
    AS_PAIRS,
    AS_PROMPTS,
    AS_SCORED_PAIRS,
    AS_TEXTS,
    GOOD,
    JUDGMENTS,
    PAIR_KINDS,
)
from dataset.examples import Dataset
from distributed import all_reduce_sum
from families import Config
from flags import OPTIONS, Flags, check_options_of_row, dashed
from kernels.attention import Documents
from kernels.cross_entropy import linear_cross_entropy, linear_token_losses
from methods import METHODS, SCORE_METHODS, start_of
from model import Experts, Transformer, eval_mode


class StepTotals(NamedTuple):
    """What an optimizer step has in all its micro-batches, on all ranks.

    num_trained: trained tokens.
    loss_weight_sum: the sum of their weights, equal to num_trained where all weights are 1.
    num_tokens: tokens without padding.
    replay_weight_sum: as loss_weight_sum, of replayed examples.
    stop_signal: the sum over ranks of the signals that ask for an end, which all have to hear of at
    the same step.
    num_examples: the sum of the weights of examples that are taken as wholes.
    kl: of KTO, the estimate of KL(policy || reference) that its equation holds, a scalar on the device.
    """

    num_trained: float
    loss_weight_sum: float
    num_tokens: float
    replay_weight_sum: float = 0.0
    stop_signal: float = 0.0
    num_examples: float = 0.0
    kl: Tensor | float = 0.0

    @classmethod
    def of(cls, batches: list[Batch], stop_signal: int = 0) -> "StepTotals":
        """Sums over this rank's micro-batches, then over all ranks."""
        rows: list[list[float]] = []  # of each micro-batch, the fields in their order
        for batch in batches:
            num_trained = len(batch.targets)
            weights = [batch.loss_weight_sum, batch.num_tokens, batch.replay_weight_sum]
            num_examples = batch.texts.weight_sum if batch.texts else 0.0
            rows.append([num_trained, *weights, 0, num_examples])
        # The signal came to this rank, and not to each micro-batch.
        rows[0][4] = stop_signal
        # In float64, so that counts are exact.
        sums = torch.tensor(rows, dtype=torch.float64).sum(0)
        return cls(*all_reduce_sum(sums).tolist())


class Losses:
    """A step's losses, summed over its micro-batches, as float32 scalars on the device, without
    gradients.

    loss: that of the objective.
    means: of an objective of whole examples, {name in metrics.jsonl: (sum, count)}, scalars each; every
        micro-batch of every rank has the same names.
    replay_loss: the sum of the token losses of replayed examples.
    balance_loss: of routed experts; None where there are none.
    ewc_penalty: of --ewc (training/ewc.py), which is no part of `loss`; None without it.
    """

    def __init__(self, device: torch.device):
        self.loss = torch.zeros((), device=device)
        self.replay_loss = torch.zeros((), device=device)
        self.means: dict[str, Tensor] = {}
        self.balance_loss: Tensor | None = None
        self.ewc_penalty: Tensor | None = None

    def add_balance(self, balance: Tensor) -> None:
        if self.balance_loss is None:
            self.balance_loss = balance
        else:
            self.balance_loss = balance + self.balance_loss

    def add_means(self, means: dict[str, Tensor]) -> None:
        """Adds those of a micro-batch, float32 [2] each: a sum and a count."""
        for name, mean in means.items():
            self.means[name] = self.means[name] + mean if name in self.means else mean

    def all_reduce(self) -> None:
        """Sums over all ranks."""
        # Without experts, a zero takes the place: there are always three numbers, in one message.
        balance = self.balance_loss
        if balance is None:
            balance = torch.zeros_like(self.loss)
        parts = [self.loss, self.replay_loss, balance]
        # The numbers of all means are in the same message.
        parts += [number for mean in self.means.values() for number in mean]
        sums = all_reduce_sum(torch.stack(parts))
        for i, name in enumerate(self.means):
            self.means[name] = sums[3 + 2 * i : 5 + 2 * i]
        self.loss = sums[0]
        self.replay_loss = sums[1]
        if self.balance_loss is not None:
            self.balance_loss = sums[2]

    def extra(self, totals: StepTotals) -> dict[str, Tensor]:
        """Returns what is reported beside the loss: {name in metrics.jsonl: value}."""
        values = {}
        if self.balance_loss is not None:
            values["balance_loss"] = self.balance_loss
        if totals.replay_weight_sum:
            values["replay_loss"] = self.replay_loss / totals.replay_weight_sum
        if self.ewc_penalty is not None:
            values["ewc_penalty"] = self.ewc_penalty
        for name, mean in self.means.items():
            values[name] = mean[0] / mean[1]
        if isinstance(totals.kl, Tensor):
            values["kl"] = totals.kl
        return values


def token_losses(
    model: Transformer, batch: Batch, smoothing: float = 0.0, by_confidence: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns the weighted sum of -log p(next token) over the batch's trained tokens, a float32
    scalar, and each token's own, float32 [K], without a gradient.

    smoothing, by_confidence: as in `linear_cross_entropy`, which makes other losses of it.
    """
    hidden = model.flat(batch.tokens, batch.documents)  # [N, D]
    # Logits exist only where the next token is trained: each takes as many numbers as the
    # vocabulary has ids.
    to_head = hidden.index_select(0, batch.logit_positions)  # [K, D]
    head = model.head_weight()
    softcap = model.config.logit_softcap
    rows = model.head_rows()
    return linear_cross_entropy(
        to_head, head, batch.targets, softcap, batch.loss_weights, rows, smoothing, by_confidence
    )


def supervised_loss(
    model: Transformer,
    batch: Batch,
    totals: StepTotals,
    losses: Losses,
    smoothing: float = 0.0,
    by_confidence: bool = False,
) -> Tensor:
    """Returns a micro-batch's share of a step's loss, a float32 scalar whose gradients are to be
    accumulated: cross-entropy per trained token and, where experts are routed, the balance loss
    times the configuration's coefficient.

    totals: of the whole step.
    losses: to which this batch's part is added.
    smoothing: --label-smoothing: a token's loss is (1 - smoothing) of its own and smoothing of the mean
        over the vocabulary (Szegedy et al. 2016, arXiv 1512.00567, section 7).
    by_confidence: each token's loss is multiplied by its probability, which has no gradient there (DFT,
        Wu et al. 2025, arXiv 2508.05629, equation 9).

    A balance loss is a product of means, so it is not quite the same for another cut of the step
    into batches: each batch's weighs by its tokens.
    """
    routed = experts_with_loads(model)
    loss_sum, token_loss = token_losses(model, batch, smoothing, by_confidence)
    # By the step's weights, not the batch's: so the gradients of micro-batches only add up.
    loss = loss_sum / totals.loss_weight_sum
    losses.loss += loss.detach()
    if batch.replay_weights is not None:
        losses.replay_loss += token_loss @ batch.replay_weights
    return add_balance(loss, model, routed, batch, totals, losses)


def experts_with_loads(model: Transformer) -> list[Experts]:
    """Returns the layers that route to experts, each of which leaves its load in the next forward."""
    routed = [block.mlp for block in model.blocks if isinstance(block.mlp, Experts)]
    # None lets the forward leave a load, and () keeps a block that is computed again in the
    # backward from leaving another one.
    for experts in routed:
        experts.load = None
    return routed


def add_balance(
    loss: Tensor,
    model: Transformer,
    routed: list[Experts],
    batch: Batch,
    totals: StepTotals,
    losses: Losses,
) -> Tensor:
    """Returns a micro-batch's loss with its share of the balance loss of routed experts, if there are
    any. routed: of `experts_with_loads`, before the forward."""
    if not routed:
        return loss

    loads = []
    for experts in routed:
        assert experts.load, "in training, the forward leaves each layer's load"
        loads.append(experts.load)
        experts.load = ()
    balance = balance_loss(loads) * (batch.num_tokens / totals.num_tokens)
    losses.add_balance(balance.detach())
    rules = model.config.experts
    assert rules is not None, "layers are routed only if the configuration has experts"
    return loss + rules.balance * balance


def balance_loss(loads: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Returns the balance loss of Fedus et al. 2021 (Switch Transformer), equations 4 to 6, over
    all routed layers together, as Mixtral trains.

    loads: of each layer, the fraction of the tokens that chose each expert and the mean probability
    of each, [E].

    It is as large as the number of experts that are active for a token where all experts are used
    alike; larger where they are not.
    """
    fractions, probabilities = zip(*loads, strict=True)
    chosen = torch.stack(fractions).mean(0)  # [E]
    probability = torch.stack(probabilities).mean(0)  # [E]
    return len(chosen) * (chosen * probability).sum()


@torch.no_grad()
def mean_loss(
    model: Transformer,
    batches: Iterable[Batch],
    take: Callable[[Batch, Tensor], None] | None = None,
) -> float:
    """Returns the loss per trained token over all batches, of all ranks: independent of how they
    were cut.

    take: is given each batch with its tokens' losses, float32 [K].
    """
    losses = []
    weights = []
    for batch in batches:
        loss_sum, token_loss = token_losses(model, batch)
        if take is not None:
            take(batch, token_loss)
        losses.append(loss_sum)
        weights.append(batch.loss_weight_sum)
    # The losses are read when all are asked for: a GPU need not wait in between.
    total_loss = sum(torch.stack(losses).tolist())
    total_weight = sum(weights)
    sums = torch.tensor([total_loss, total_weight], dtype=torch.float64)
    loss, weight = all_reduce_sum(sums).tolist()
    return loss / weight


# ---- objectives of whole examples: preferences, judgments, classes ----


class ScoredAnswers(NamedTuple):
    """What the equation of a preference is computed from: E examples of T answers each, 2 of a pair, of
    which the first is the chosen one, else 1.

    logps: float32 [E, T], the log-probability of each answer, the sum over its tokens; of an objective
        with a score head, its scores, [E, T] of pairs and [E, classes] of classes.
    reference: float32 [E, T], the same by the model before step 1; None where it is not needed.
    lengths: float32 [E, T], tokens of each answer.
    labels: int64 [E], of judged answers and classes.
    kl: KTO's estimate of KL(policy || reference), which has no gradient.
    """

    logps: Tensor
    reference: Tensor | None
    lengths: Tensor
    labels: Tensor
    kl: Tensor | float = 0.0

    @property
    def ratios(self) -> Tensor:
        """log(policy / reference) of each answer, [E, T]."""
        assert self.reference is not None, "the objective's row asks for it"
        return self.logps - self.reference

    @property
    def mean_logps(self) -> Tensor:
        """The log-probability of each answer per token, [E, T]."""
        return self.logps / self.lengths


# The loss of each example, [E], and what rewards its answers, [E, T].
LossesAndRewards = tuple[Tensor, Tensor]


def dpo_loss(answers: ScoredAnswers, settings) -> LossesAndRewards:
    """Rafailov et al. 2023, arXiv 2305.18290, equation 7: -log sigmoid(r_chosen - r_rejected), where the
    reward is r = beta log(policy / reference).

    --label-smoothing: the share of pairs whose answers are taken to be exchanged; Mitchell 2023,
    https://ericmitchell.ai/cdpo.pdf, equation 3.
    --length-normalized: r is divided by the answer's tokens; Lambert et al. 2024, arXiv 2411.15124.
    """
    ratios = answers.ratios
    if settings.length_normalized:
        ratios = ratios / answers.lengths
    rewards = settings.beta * ratios
    margins = rewards[:, 0] - rewards[:, 1]
    exchanged = settings.label_smoothing
    losses = -F.logsigmoid(margins)
    if exchanged:
        losses = (1 - exchanged) * losses - exchanged * F.logsigmoid(-margins)
    return losses, rewards


def ipo_loss(answers: ScoredAnswers, settings) -> LossesAndRewards:
    """Azar et al. 2023, arXiv 2310.12036, equation 17: (h - 1 / (2 tau))^2, where h is the difference of
    log(policy / reference) and tau is --beta.

    The logarithms are means over the answer's tokens, else the square of a sum would grow with them.
    """
    ratios = answers.ratios / answers.lengths
    margins = ratios[:, 0] - ratios[:, 1]
    losses = (margins - 1 / (2 * settings.beta)).square()
    return losses, settings.beta * ratios


def simpo_loss(answers: ScoredAnswers, settings) -> LossesAndRewards:
    """Meng et al. 2024, arXiv 2405.14734, equation 6: -log sigmoid(r_chosen - r_rejected - gamma), where
    r = beta (log policy) / tokens and gamma is --margin. There is no reference."""
    rewards = settings.beta * answers.mean_logps
    losses = -F.logsigmoid(rewards[:, 0] - rewards[:, 1] - settings.margin)
    return losses, rewards


def orpo_loss(answers: ScoredAnswers, settings) -> LossesAndRewards:
    """Hong et al. 2024, arXiv 2403.07691, equations 3 to 7: the chosen answer's own loss, plus beta times
    -log sigmoid of the logarithm of the ratio of the odds p / (1 - p), where log p is (log policy) /
    tokens. (beta is their lambda.) There is no reference."""
    logp = answers.mean_logps
    log_odds = logp - log_of_complement(logp)
    odds_ratio = -F.logsigmoid(log_odds[:, 0] - log_odds[:, 1])
    losses = -logp[:, 0] + settings.beta * odds_ratio
    return losses, settings.beta * logp


def log_of_complement(logp: Tensor) -> Tensor:
    """Returns log(1 - exp(logp)) for logp <= 0, without cancellation (Maechler 2012). A probability that
    is 1 but for rounding counts as the largest below 1."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    # expm1 is exact near 0 and log1p far from it.
    is_near = logp > -0.5
    near = torch.log(-torch.expm1(torch.where(is_near, logp, -1.0)))
    far = torch.log1p(-torch.exp(torch.where(is_near, -1.0, logp)))
    return torch.where(is_near, near, far)


def kto_loss(answers: ScoredAnswers, settings) -> LossesAndRewards:
    """Ethayarajh et al. 2024, arXiv 2402.01306, equations 7 and 8: w (1 - sigmoid(r - beta z)) of a good
    answer and w (1 - sigmoid(beta z - r)) of a bad one, where r = beta log(policy / reference), z is
    the estimate of KL(policy || reference), and w is --desirable-weight or --undesirable-weight.
    """
    rewards = settings.beta * answers.ratios  # [E, 1]
    above = rewards[:, 0] - settings.beta * answers.kl
    is_good = answers.labels == JUDGMENTS.index(GOOD)
    signed = torch.where(is_good, above, -above)
    weights = torch.where(is_good, settings.desirable_weight, settings.undesirable_weight)
    return weights * torch.sigmoid(-signed), rewards


def reward_loss(answers: ScoredAnswers, settings) -> LossesAndRewards:
    """Bradley and Terry 1952, as reward models are trained; Ouyang et al. 2022, arXiv 2203.02155,
    equation 1 for pairs: -log sigmoid(score of the chosen - score of the rejected answer)."""
    scores = answers.logps
    return -F.logsigmoid(scores[:, 0] - scores[:, 1]), scores


def class_loss(answers: ScoredAnswers, settings) -> LossesAndRewards:
    """Cross-entropy over the classes: -log softmax(scores)[class]."""
    scores = answers.logps
    smoothing = settings.label_smoothing
    losses = F.cross_entropy(scores, answers.labels, reduction="none", label_smoothing=smoothing)
    return losses, scores


# The range of importance ratios beyond which GRPO learns no more from a token.
CLIP = 0.2
# Added to a standard deviation before it divides.
TINY_DEVIATION = 1e-4


def group_advantages(rewards: Sequence[float], dr_grpo: bool) -> list[float]:
    """Returns by how much each answer of a group is better than the others: the reward minus the group's
    mean, divided by its standard deviation (Shao et al. 2024, arXiv 2402.03300, section 4.1.2).

    dr_grpo: without that division, by which groups that almost agree weigh as much as others; Liu et al.
        2025 (Dr. GRPO), arXiv 2503.20783, section 3.2.
    """
    mean = math.fsum(rewards) / len(rewards)
    differences = [reward - mean for reward in rewards]
    if dr_grpo or len(rewards) == 1:
        return differences
    variance = math.fsum(each * each for each in differences) / (len(rewards) - 1)
    return [each / (math.sqrt(variance) + TINY_DEVIATION) for each in differences]


def grpo_losses(
    logps: Tensor, sampled: Tensor, advantages: Tensor, reference: Tensor | None, beta: float
) -> tuple[Tensor, Tensor]:
    """Returns the loss of each token of sampled answers, and its share of KL(policy || reference), float32
    [K] each: Shao et al. 2024, arXiv 2402.03300, equations 3 and 4.

    -min(r A, clip(r, 0.8, 1.2) A) + beta (q - log q - 1), where r = policy / policy that sampled, A is the
    advantage of the token's answer, and q = reference / policy.

    logps: float32 [K], of the tokens, with gradients. sampled: the same when they were drawn.
    advantages: float32 [K]. reference: float32 [K], by the model before step 1; None: no such term.
    """
    ratios = (logps - sampled).exp()
    clipped = ratios.clamp(1 - CLIP, 1 + CLIP)
    losses = -torch.minimum(ratios * advantages, clipped * advantages)
    if reference is None:
        return losses, torch.zeros_like(logps)
    log_q = reference - logps
    kl = log_q.exp() - log_q - 1
    return losses + beta * kl, kl


def means_of_pairs(answers: ScoredAnswers, rewards: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Returns what is reported of pairs: {name in metrics.jsonl: [weighted sum, sum of weights]}.

    accuracy: the share of pairs whose chosen answer has the higher reward, equal ones count half.
    margin: by how much it is higher. reward_chosen, reward_rejected: both rewards.
    weights: float32 [E].
    """
    margins = rewards[:, 0] - rewards[:, 1]
    values = {
        "accuracy": (margins.sign() + 1) / 2,
        "margin": margins,
        "reward_chosen": rewards[:, 0],
        "reward_rejected": rewards[:, 1],
    }
    return {name: weighted_mean(value, weights) for name, value in values.items()}


def means_of_logps(answers: ScoredAnswers, rewards: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Returns `means_of_pairs`, and the log-probabilities of both answers: that of the chosen one may
    fall too, as long as that of the other one falls faster."""
    means = means_of_pairs(answers, rewards, weights)
    for i, name in enumerate(("logp_chosen", "logp_rejected")):
        means[name] = weighted_mean(answers.logps[:, i], weights)
    return means


def means_of_judged(answers: ScoredAnswers, rewards: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Returns the mean rewards of good and of bad answers, and the share of answers that lie on their
    own side of the KL: above it the good ones, below it the bad ones."""
    is_good = answers.labels == JUDGMENTS.index(GOOD)
    above = answers.ratios[:, 0] - answers.kl
    is_right = (torch.where(is_good, above, -above).sign() + 1) / 2
    return {
        "accuracy": weighted_mean(is_right, weights),
        "reward_good": weighted_mean(rewards[:, 0], weights * is_good),
        "reward_bad": weighted_mean(rewards[:, 0], weights * ~is_good),
    }


def means_of_classes(answers: ScoredAnswers, rewards: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Returns the share of texts whose own class has the highest score."""
    is_right = (answers.logps.argmax(-1) == answers.labels).float()
    return {"accuracy": weighted_mean(is_right, weights)}


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Returns the weighted sum of some values and the sum of the weights, float32 [2]."""
    return torch.stack([(values.detach() * weights).sum(), weights.sum()])


# --max-new-tokens, where it is left open.
LONGEST_ANSWER = 256


class Objective(NamedTuple):
    """What is minimised.

    kind: what an example is, of dataset/encoding.py.
    equation: the loss of each example; None for a supervised loss, of tokens.
    means: what is reported of a batch's examples.
    has_reference: it compares with the model before step 1.
    has_head: a score head takes the place of the output head.
    options: names of the options that this objective reads, and not all others do.
    defaults: of these, where they are left open.
    lr_factor: of the default learning rate.
    title: in a few words, for the summary.
    loss_unit: what its losses are, after "Losses are", for people. lower_loss: what a lower one means.
    """

    kind: str
    title: str
    equation: Callable[[ScoredAnswers, "object"], LossesAndRewards] | None = None
    means: Callable[[ScoredAnswers, Tensor, Tensor], dict[str, Tensor]] = means_of_logps
    has_reference: bool = False
    has_head: bool = False
    options: tuple[str, ...] = ()
    defaults: Mapping[str, float] = MappingProxyType({})
    lr_factor: float = 1.0
    loss_unit: str = "means over the examples, of the objective"
    lower_loss: str = (
        "that the model tells good answers from bad ones, or the classes, more clearly"
    )


# The factor of the learning rate is a cautious one, not that of a sweep: DPO with three times that rate
# learnt faster in the one run that compares them (experiments/LOG.md).
OBJECTIVES = {
    "sft": Objective(
        AS_TEXTS,
        "supervised fine-tuning: cross-entropy of the trained tokens",
        options=("label_smoothing", "neftune"),
        loss_unit="in nats a token, over the trained tokens alone",
        lower_loss="that the model finds their answers more probable",
    ),
    "dft": Objective(
        AS_TEXTS,
        "dynamic fine-tuning: each token's cross-entropy times its probability",
        options=("neftune",),
        loss_unit="in nats a token, over the trained tokens alone",
        lower_loss="that the model finds their answers more probable",
    ),
    "dpo": Objective(
        AS_PAIRS,
        "direct preference optimization",
        dpo_loss,
        has_reference=True,
        options=("beta", "label_smoothing", "length_normalized"),
        defaults={"beta": 0.1},
        lr_factor=0.1,
    ),
    "ipo": Objective(
        AS_PAIRS,
        "identity preference optimization",
        ipo_loss,
        has_reference=True,
        options=("beta",),
        defaults={"beta": 0.1},
        lr_factor=0.1,
    ),
    "kto": Objective(
        AS_JUDGED,
        "Kahneman-Tversky optimization",
        kto_loss,
        means_of_judged,
        has_reference=True,
        options=("beta", "desirable_weight", "undesirable_weight"),
        defaults={"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
        lr_factor=0.1,
    ),
    "orpo": Objective(
        AS_PAIRS,
        "odds ratio preference optimization",
        orpo_loss,
        options=("beta",),
        defaults={"beta": 0.1},
        lr_factor=0.1,
    ),
    "simpo": Objective(
        AS_PAIRS,
        "simple preference optimization",
        simpo_loss,
        options=("beta", "margin"),
        defaults={"beta": 2.0, "margin": 1.0},
        lr_factor=0.1,
    ),
    "reward": Objective(
        AS_SCORED_PAIRS,
        "reward model: a score of each answer, the chosen one's higher",
        reward_loss,
        means_of_pairs,
        has_head=True,
        lr_factor=0.1,
    ),
    "classify": Objective(
        AS_CLASSES,
        "classification: a score of each class after a text",
        class_loss,
        means_of_classes,
        has_head=True,
        options=("label_smoothing",),
    ),
    "grpo": Objective(
        AS_PROMPTS,
        "group relative policy optimization: answers with a higher reward than others of their group",
        has_reference=True,
        options=("beta", "group_size", "dr_grpo", "reward", "reward_timeout", "max_new_tokens"),
        defaults={
            "beta": 0.0,
            "group_size": 8,
            "reward_timeout": 60.0,
            "max_new_tokens": LONGEST_ANSWER,
        },
        lr_factor=0.1,
        loss_unit="minus the mean reward of the answers",
        lower_loss="that the model's answers have a higher reward",
    ),
    "distill": Objective(
        AS_TEXTS,
        "distillation: the teacher's probabilities of the next token",
        options=("teacher", "divergence", "own_answers", "max_new_tokens", "group_size"),
        loss_unit="divergences from the teacher, in nats a token",
        lower_loss="that the model's probabilities of the next token are closer to the teacher's",
    ),
}


# The objectives whose losses are in nats a token.
PER_TOKEN = ("sft", "dft", "distill")


def kind_of_examples(flags: Flags) -> str:
    """Returns what a run's examples are, of dataset/encoding.py: prompts alone, where the model answers
    them itself."""
    return AS_PROMPTS if flags.own_answers else OBJECTIVES[flags.objective].kind


# What goes only with a loss of tokens: {option: why}.
OF_TOKENS = {
    "replay": "mixes in texts whose tokens are trained",
    "eval_metric": "compares answers with references",
    "budget": "is for the bundled task",
    "full_run": "is for the bundled task",
}
# What needs an output head.
OF_OUTPUT_HEAD = ("safety", "forget_data", "forget_limit", "ewc")


def with_options_of_objective(flags: Flags) -> Flags:
    """Returns the flags with the defaults of their objective where they leave its options open."""
    defaults: dict = dict(OBJECTIVES[flags.objective].defaults)
    if flags.objective == "distill":
        defaults = {"divergence": "reverse" if flags.own_answers else "forward"}
        if flags.own_answers:
            defaults |= {"max_new_tokens": LONGEST_ANSWER, "group_size": 1}
    chosen: dict = {name: each for name, each in defaults.items() if getattr(flags, name) is None}
    return dataclasses.replace(flags, **chosen)


def check_objective(flags: Flags) -> None:
    """Raises UserError for options that --objective does not go with."""
    rows = {name: row.options for name, row in OBJECTIVES.items()}
    check_options_of_row(flags, "objective", rows)
    row = OBJECTIVES[flags.objective]
    kind = kind_of_examples(flags)
    name = f"--objective {flags.objective}"
    smoothing = flags.label_smoothing
    if flags.objective == "dpo" and smoothing >= 0.5:
        why = "as half of the pairs and more would be taken the other way round"
        raise UserError(f"--label-smoothing {smoothing:g}: must be below 0.5 for dpo, {why}")
    if smoothing >= 1:
        raise UserError(f"--label-smoothing {smoothing:g}: must be below 1")
    if flags.objective == "distill":
        check_distillation(flags)
    if kind == AS_TEXTS:
        return
    if kind == AS_PROMPTS:
        check_sampling(flags)
    elif not flags.data:
        raise UserError(f"{name}: the bundled task has no such data; give --data FILE")
    without = dict(OF_TOKENS)
    if kind == AS_PROMPTS:
        # The model writes answers, which can be compared with references.
        del without["eval_metric"]
    if row.has_head:
        without |= dict.fromkeys(
            OF_OUTPUT_HEAD, "needs an output head, which a score head replaces"
        )
    for option, why in without.items():
        if getattr(flags, option):
            raise UserError(f"{dashed(option)}: {why}; not with {name}")
    if row.has_head and not METHODS[flags.method].trains_score_head:
        raise UserError(f"{name}: is for --method {SCORE_METHODS}, not {flags.method}")
    if row.has_head and flags.init == "loftq":
        raise UserError(f"--init loftq: brings a base with an output head; not with {name}")
    for option in ("truncate", "train_on"):
        if getattr(flags, option) != OPTIONS[option].default:
            raise UserError(f"{dashed(option)}: {name} takes whole answers; leave it out")
    if flags.context_parallel > 1:
        raise UserError(f"--context-parallel: shares the tokens of a text; not with {name}")


def check_distillation(flags: Flags) -> None:
    """Raises UserError for options that do not go with a teacher."""
    name = "--objective distill"
    if flags.teacher is None:
        why = (
            "whose probabilities are learnt? --teacher MODEL, or --teacher self with --own-answers"
        )
        raise UserError(f"{name}: {why}")
    if flags.teacher == SELF and not flags.own_answers:
        why = "shown the reference, it knows each of its tokens, as sft does; add --own-answers"
        raise UserError(f"--teacher self: {why}")
    for option in ("max_new_tokens", "group_size"):
        if getattr(flags, option) is not None and not flags.own_answers:
            raise UserError(f"{dashed(option)}: is for --own-answers")
    if flags.context_parallel > 1:
        raise UserError(f"--context-parallel: shares the tokens of a text; not with {name}")
    for option in ("budget", "full_run"):
        if getattr(flags, option):
            raise UserError(f"{dashed(option)}: {OF_TOKENS[option]}; not with {name}")


def check_sampling(flags: Flags) -> None:
    """Raises UserError for options that do not go with answers which the model writes while it is trained."""
    name = f"--objective {flags.objective}"
    if flags.objective == "grpo" and flags.reward is None:
        why = "what scores the answers? --reward FILE.py:NAME, or the folder of a reward model"
        raise UserError(f"{name}: {why}")
    if flags.objective == "grpo" and flags.group_size == 1:
        raise UserError("--group-size 1: an answer is compared with others of its group; 2 or more")
    if flags.dropout:
        why = "the model that answers would be another one than that which is trained"
        raise UserError(f"--dropout {flags.dropout:g}: {why}; leave it out")
    if flags.forget_limit is not None and not flags.forget_data:
        raise UserError(
            f"--forget-limit: {name} has no answers of others to measure KL(base || tuned) on; give"
            " --forget-data FILE"
        )


# ---- a run's objective, as the loop calls it ----

# Returns the log-probability of each text of a batch by the model before step 1, float32 [count].
ReferenceFn = Callable[[Batch], Tensor]


class SupervisedRun:
    """A supervised objective of a run: what the loop and the validation call."""

    def __init__(self, settings):
        self.settings = settings

    def __call__(
        self, model: Transformer, batch: Batch, totals: StepTotals, losses: Losses
    ) -> Tensor:
        """Returns a micro-batch's share of a step's loss, see `supervised_loss`."""
        smoothing = self.settings.label_smoothing
        by_confidence = self.settings.objective == "dft"
        return supervised_loss(model, batch, totals, losses, smoothing, by_confidence)

    def begin_step(
        self, model: Transformer, batches: list[Batch], step: int, stop_signal: int
    ) -> tuple[list[Batch], StepTotals]:
        """Returns the step's micro-batches as they are, and its totals."""
        return batches, StepTotals.of(batches, stop_signal)

    def trial_batch(self, batch: Batch) -> Batch:
        """Returns the batch itself: a step would train it as it is."""
        return batch

    def validate(
        self, model: Transformer, batches: Iterable[Batch], take: Callable[[Tensor], None]
    ) -> dict[str, float]:
        """Returns {"loss": the plain cross-entropy per trained token over all batches, of all ranks}.

        take: is given what `sums_of_examples` makes of this rank's batches.
        """

        def take_sums(batch: Batch, token_loss: Tensor) -> None:
            # Ranks that share a batch have no whole examples.
            if isinstance(batch.documents, Documents):
                take(sums_of_examples(batch, batch.documents, token_loss))

        return {"loss": mean_loss(model, batches, take_sums)}


def sums_of_examples(batch: Batch, documents: Documents, token_loss: Tensor) -> Tensor:
    """Returns the weighted sum of the token losses of each example of a batch, and the sum of their
    weights: float32 [2, examples]. token_loss: float32 [K]."""
    ends = documents.cu_seqlens[1:].long()
    numbers = torch.bucketize(batch.logit_positions, ends, right=True)  # [K]
    weights = batch.loss_weights
    if weights is None:
        weights = torch.ones_like(token_loss)
    sums = torch.zeros(2, len(documents.lengths), device=token_loss.device)
    return sums.index_add_(1, numbers, torch.stack([token_loss * weights, weights]))


class WholeRun:
    """An objective of whole examples of a run: what the loop and the validation call.

    reference: None where the objective has none.
    """

    def __init__(self, settings, reference: ReferenceFn | None):
        self.settings = settings
        self.row = OBJECTIVES[settings.objective]
        self.reference = reference

    def __call__(
        self, model: Transformer, batch: Batch, totals: StepTotals, losses: Losses
    ) -> Tensor:
        """Returns a micro-batch's share of a step's loss, a float32 scalar: the mean over the step's
        examples, and the balance loss of routed experts where there are any.

        losses: to which this batch's part is added.
        """
        # Before the forward that leaves the experts' loads.
        reference = self.reference(batch) if self.reference else None
        routed = experts_with_loads(model)
        answers = self.answers(batch, self.values(model, batch), reference, totals.kl)
        assert self.row.equation is not None and batch.texts is not None
        weights = batch.texts.weights
        losses_of_examples, rewards = self.row.equation(answers, self.settings)
        loss = (losses_of_examples * weights).sum() / totals.num_examples
        losses.loss += loss.detach()
        losses.add_means(self.row.means(answers, rewards, weights))
        return add_balance(loss, model, routed, batch, totals, losses)

    def values(self, model: Transformer, batch: Batch) -> Tensor:
        """Returns the log-probability of each text, float32 [count]; with a score head its scores,
        [count, labels]."""
        assert batch.texts is not None, "the data were read for this objective"
        if not self.row.has_head:
            return text_logps(model, batch)
        assert isinstance(batch.documents, Documents), "check_objective refuses --context-parallel"
        # A dummy's only document is no text of the batch.
        return document_scores(model, batch.tokens, batch.documents)[: batch.texts.count]

    def answers(
        self, batch: Batch, values: Tensor, reference: Tensor | None, kl: Tensor | float
    ) -> ScoredAnswers:
        """Returns the examples of a batch as an equation takes them."""
        texts = batch.texts
        assert texts is not None
        texts_per_example = 2 if self.row.kind in PAIR_KINDS else 1
        shape = (len(texts.weights), texts_per_example)
        if self.row.kind != AS_CLASSES:
            values = values.reshape(shape)
        if reference is not None:
            reference = reference.reshape(shape)
        return ScoredAnswers(values, reference, texts.lengths.reshape(shape), texts.labels, kl)

    def begin_step(
        self, model: Transformer, batches: list[Batch], step: int, stop_signal: int
    ) -> tuple[list[Batch], StepTotals]:
        """Returns the step's micro-batches as they are, and its totals with KTO's KL: the mean of
        log(policy / reference) over the step's prompts, each with the answer to another one, and not below
        0 (section 4.1 of the paper)."""
        totals = StepTotals.of(batches, stop_signal)
        if self.row.kind != AS_JUDGED:
            return batches, totals
        sums = torch.stack([self.divergence(model, batch) for batch in batches]).sum(0)
        return batches, totals._replace(kl=mean_divergence_of(all_reduce_sum(sums)))

    def trial_batch(self, batch: Batch) -> Batch:
        """Returns the batch itself: a step would train it as it is."""
        return batch

    @torch.no_grad()
    def divergence(self, model: Transformer, batch: Batch) -> Tensor:
        """Returns the weighted sum of log(policy / reference) over a batch's mismatched answers, and the
        sum of the weights, float32 [2]."""
        # A rank without any computes all the same, as the others wait for it; that counts nothing.
        other = batch.mismatched or batch
        assert other.texts is not None and self.reference is not None
        reference = self.reference(other)
        with eval_mode(model):
            ratios = text_logps(model, other) - reference
        sums = weighted_mean(ratios, other.texts.weights)
        return sums if batch.mismatched is not None else torch.zeros_like(sums)

    @torch.no_grad()
    def validate(
        self, model: Transformer, batches: Iterable[Batch], take: Callable[[Tensor], None]
    ) -> dict[str, float]:
        """Returns the mean loss and what is reported beside it over all batches, of all ranks:
        {"loss": ..., "accuracy": ..., ...}.

        take: is given the weighted loss of each of this rank's examples and its weight, float32
        [2, examples].
        """
        parts: list[ScoredAnswers] = []
        weights = []
        divergence = torch.zeros(2, device=model.device)
        for batch in batches:
            reference = self.reference(batch) if self.reference else None
            parts.append(self.answers(batch, self.values(model, batch), reference, 0.0))
            assert batch.texts is not None
            weights.append(batch.texts.weights)
            if self.row.kind == AS_JUDGED:
                divergence += self.divergence(model, batch)
        # An equation is computed once for all examples, since KTO's has the KL of all of them.
        kl: Tensor | float = 0.0
        if self.row.kind == AS_JUDGED:
            kl = mean_divergence_of(all_reduce_sum(divergence))
        answers = join_scored(parts, kl)
        weight = torch.cat(weights)
        assert self.row.equation is not None
        losses, rewards = self.row.equation(answers, self.settings)
        take(torch.stack([losses * weight, weight]))
        means = {"loss": weighted_mean(losses, weight)} | self.row.means(answers, rewards, weight)
        sums = all_reduce_sum(torch.stack(list(means.values())).double())
        values = (sums[:, 0] / sums[:, 1]).tolist()
        result = dict(zip(means, values, strict=True))
        if isinstance(kl, Tensor):
            result["kl"] = float(kl)
        return result


def mean_divergence_of(sums: Tensor) -> Tensor:
    """Returns KTO's KL, a scalar that is not below 0, of what `WholeRun.divergence` returns, summed over
    all batches: float32 [2]. It is 0 where there is no mismatched answer."""
    total, count = sums
    return torch.where(count > 0, total / count, 0.0).clamp(min=0)


def join_scored(parts: list[ScoredAnswers], kl: Tensor | float) -> ScoredAnswers:
    """Returns the answers of several batches as those of one."""
    reference = None
    if parts[0].reference is not None:
        reference = torch.cat([part.reference for part in parts if part.reference is not None])
    return ScoredAnswers(
        torch.cat([part.logps for part in parts]),
        reference,
        torch.cat([part.lengths for part in parts]),
        torch.cat([part.labels for part in parts]),
        kl,
    )


def token_logps(model: Transformer, batch: Batch) -> Tensor:
    """Returns the log-probability of each trained token, float32 [K]. With gradients, no tensor of
    [tokens, vocabulary] exists."""
    hidden = model.flat(batch.tokens, batch.documents)  # [N, D]
    to_head = hidden.index_select(0, batch.logit_positions)  # [K, D]
    softcap = model.config.logit_softcap
    losses = linear_token_losses(
        to_head, model.head_weight(), batch.targets, softcap, model.head_rows()
    )
    return -losses


def text_logps(model: Transformer, batch: Batch) -> Tensor:
    """Returns the log-probability of each text's trained tokens, the sum over them, float32 [count]."""
    texts = batch.texts
    assert texts is not None
    logps = token_logps(model, batch)
    return logps.new_zeros(texts.count).index_add(0, texts.text_of_target, logps)


def examples_wanted(flags: Flags, config: Config) -> tuple[str, tuple[str, ...]]:
    """Returns the kind of examples that a run's objective takes, of dataset/encoding.py, and the classes
    that the model tells apart already, () where it has none.

    config: of the base.
    """
    kind = kind_of_examples(flags)
    known = head_labels(config, start_of(flags)) if kind == AS_CLASSES else None
    return kind, known or ()


def labels_of_head(flags: Flags, config: Config, train: Dataset) -> tuple[str, ...] | None:
    """Returns the labels of the score head that a run trains; None if it trains with the output head.

    config: of the base. train: the examples.
    """
    row = OBJECTIVES[flags.objective]
    if not row.has_head:
        return None
    if row.kind == AS_CLASSES:
        return train.label_names
    # Other programs call the one label of a reward model otherwise.
    known = head_labels(config, start_of(flags))
    return known if known is not None and len(known) == 1 else (REWARD,)


class RunObjective(Protocol):
    """What the loop, the validation and the trials before the first step call."""

    def begin_step(
        self, model: Transformer, batches: list[Batch], step: int, stop_signal: int
    ) -> tuple[list[Batch], StepTotals]:
        """Returns what a step trains, and its totals over all ranks.

        batches: what the data give this rank. step: counted from 0. stop_signal: of this rank, 0 if none.
        """
        ...

    def __call__(
        self, model: Transformer, batch: Batch, totals: StepTotals, losses: Losses
    ) -> Tensor:
        """Returns a micro-batch's share of a step's loss, a float32 scalar with gradients, and adds what
        is reported to `losses`."""
        ...

    def validate(
        self, model: Transformer, batches: Iterable[Batch], take: Callable[[Tensor], None]
    ) -> dict[str, float]:
        """Returns {"loss": ...} and what is reported beside it, over all batches of all ranks.

        take: is given the weighted loss of each example of this rank and its weight, float32
        [2, examples].
        """
        ...

    def trial_batch(self, batch: Batch) -> Batch:
        """Returns what a step might train of a batch of the data, for trials of time and kernels."""
        ...


def make_objective(settings, reference: ReferenceFn | None) -> SupervisedRun | WholeRun:
    """Returns the objective of a run that trains what the data hold. reference: None where its row has
    none."""
    if OBJECTIVES[settings.objective].kind == AS_TEXTS:
        return SupervisedRun(settings)
    return WholeRun(settings, reference)
