"""GRPO: losses and gradients against trl, tokens that are drawn by given random numbers, and answers that are drawn
from the policy that is trained, to the bit.

trl 1.16.0 divides the loss of a micro-batch by its own number of answers and by the number of micro-batches; ours is
divided by the number of answers of the step. Both are one where all answers stand in one batch, or in micro-batches of
one size; so trl is asked in these two ways, and our step is cut in others as well."""

import math
from pathlib import Path

import pytest
import torch
import transformers
from support.helpers import chat_base, llama, move, record_graphs, relative
from support.preferences import gradients_of
from support.sampled import (
    Sampled,
    examples_of,
    logps_of,
    on_policy,
    prompts_of,
    questions,
    random_groups,
    surrogate,
    trl_inputs,
    trl_trainer_of_groups,
)
from support.training_runs import CPU

import data
import decoding
from checkpoint import hf_name, load_model
from common.errors import UserError
from data import MicroBatches, collate
from dataset.examples import DUMMY_EXAMPLE
from dataset.sampler import Sampler
from decoding import Draws
from kernels import cross_entropy
from kernels.cross_entropy import linear_token_losses
from kernels.draws import draw, linear_draws
from model import Transformer
from objectives import Losses, group_advantages, grpo_losses, token_logps
from training.validation import validate

JUST_BELOW_1 = 1 - 2**-24  # the largest number that torch.rand gives


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return chat_base(tmp_path_factory.mktemp("base") / "base", num_key_value_heads=2)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return questions(tmp_path_factory.mktemp("data") / "questions.jsonl", 12)


def no_rewards(answers) -> list[float]:
    return [0.0] * len(answers)


# ---- losses and gradients against trl ----


@pytest.fixture(scope="module")
def reference(base):
    """The log-probabilities of a batch's tokens by a model whose weights lie near those of the base."""
    other = load_model(base)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))

    @torch.no_grad()
    def reference(batch):
        return token_logps(other, batch)

    return other, reference


def padded_logps(model: Transformer, groups: list[list[Sampled]], shape) -> torch.Tensor:
    logps = torch.zeros(shape)
    answers = [answer for group in groups for answer in group]
    for row, answer in zip(logps, answers, strict=True):
        row[: len(answer.answer)] = logps_of(model, answer)
    return logps


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo"])
def test_loss_and_gradients_equal_trl(base, file, reference, tmp_path, loss_type, beta, noise):
    is_dr = loss_type == "dr_grpo"
    other, of_reference = reference
    run, model = on_policy(base, file, no_rewards, of_reference if beta else None, dr_grpo=is_dr, beta=beta)
    groups = random_groups(load_model(base), 3, 4, noise)
    scale = "none" if is_dr else "group"
    trainer = trl_trainer_of_groups(base, tmp_path, groups, loss_type=loss_type, scale_rewards=scale, beta=0.0)
    inputs = trl_inputs(trainer, groups)
    examples = examples_of(groups, is_dr)
    assert [each.sampled.advantage for each in examples] == pytest.approx(inputs["advantages"].tolist(), abs=1e-6)
    trainer.beta = beta
    if beta:
        inputs["ref_per_token_logps"] = padded_logps(other, groups, inputs["completion_ids"].shape)
    wanted = trainer._compute_loss(trainer.model, inputs)
    theirs = gradients_of(trainer.model, wanted)
    clipped = trainer._metrics["train"]["clip_ratio/region_mean"][-1]
    assert (clipped > 0.05) if noise else (clipped == 0)

    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()
    mixed = [examples[i] for i in order]
    cuts = [[examples], [mixed[:5], mixed[5:6], mixed[6:]], [examples[:7], [DUMMY_EXAMPLE], examples[7:]]]
    for cut in cuts:
        loss, gradients, reported = surrogate(run, model, cut)
        assert loss == pytest.approx(float(wanted.detach()), rel=1e-5, abs=1e-6)
        gradients = {hf_name(model, name): gradient for name, gradient in gradients.items()}
        assert gradients.keys() == theirs.keys()
        for name, gradient in gradients.items():
            assert theirs[name].norm() > 0 and relative(gradient, theirs[name]) < 1e-5, name
        rewards = [answer.reward for group in groups for answer in group]
        assert reported["reward"] == pytest.approx(sum(rewards) / len(rewards), abs=1e-6)
        if beta:
            kl = trainer._metrics["train"]["kl"][-1]
            assert reported["kl_reference"] == pytest.approx(kl, rel=1e-4) and kl > 0.01
        else:
            assert "kl_reference" not in reported and reported["loss"] == pytest.approx(-reported["reward"], abs=1e-6)


@pytest.mark.parametrize("is_dr", [False, True])
def test_micro_batches_of_one_size_are_those_of_trl(base, file, tmp_path, is_dr):
    run, model = on_policy(base, file, no_rewards, dr_grpo=is_dr)
    groups = random_groups(load_model(base), 4, 3, 0.3, seed=1)
    loss_type = "dr_grpo" if is_dr else "grpo"
    scale = "none" if is_dr else "group"
    trainer = trl_trainer_of_groups(base, tmp_path, groups, loss_type=loss_type, scale_rewards=scale, beta=0.0)
    inputs = trl_inputs(trainer, groups)
    trainer.current_gradient_accumulation_steps = 2
    halves = [{name: value[rows] for name, value in inputs.items() if value.dim()} for rows in
              (slice(0, 6), slice(6, 12))]  # fmt: skip
    wanted = sum(trainer._compute_loss(trainer.model, half) for half in halves)
    theirs = gradients_of(trainer.model, wanted)
    examples = examples_of(groups, is_dr)
    loss, gradients, _ = surrogate(run, model, [examples[:6], examples[6:]])
    assert loss == pytest.approx(float(wanted.detach()), rel=1e-5)
    for name, gradient in gradients.items():
        assert relative(gradient, theirs[hf_name(model, name)]) < 1e-5, name


@pytest.mark.parametrize("advantage", [1.5, -1.5])
def test_a_token_beyond_the_clip_teaches_nothing_where_it_went_the_right_way(advantage):
    ratios = torch.tensor([0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 3.0])
    logps = torch.full((7,), -2.0, requires_grad=True)
    sampled = logps.detach() - ratios.log()
    losses, kl = grpo_losses(logps, sampled, torch.full((7,), advantage), None, 0.0)
    losses.sum().backward()
    wanted = torch.where(ratios > 1.2 if advantage > 0 else ratios < 0.8, 0.0, -advantage * ratios)
    torch.testing.assert_close(logps.grad, wanted)
    assert kl.eq(0).all()


def test_advantages_of_a_group():
    rewards = [1.0, 0.0, 0.0, 3.0]
    assert group_advantages(rewards, True) == [0.0, -1.0, -1.0, 2.0]
    assert group_advantages(rewards, False) == pytest.approx([each / (math.sqrt(2) + 1e-4) for each in (0, -1, -1, 2)])
    # What rounding leaves of a mean must not count as a difference.
    assert max(map(abs, group_advantages([0.1] * 7, False))) < 1e-9
    assert group_advantages([5.0], False) == [0.0]


# ---- tokens by given random numbers ----


def test_draws_follow_the_distribution():
    logits = 1.5 * torch.randn(12, generator=torch.Generator().manual_seed(0))
    probs = logits.double().softmax(0)
    count = 200_000
    rows = logits.expand(count, -1)
    tokens, logps = draw(rows, torch.rand(count, generator=torch.Generator().manual_seed(1)))
    found = tokens.bincount(minlength=12)
    chi_square = ((found - count * probs).square() / (count * probs)).sum()
    assert chi_square < 31.3  # of 11 degrees of freedom, once in a thousand
    torch.testing.assert_close(logps, logits.log_softmax(0)[tokens])
    # Numbers that lie evenly find each token as often as it is probable.
    tokens, _ = draw(rows, torch.arange(count) / count)
    assert (tokens.bincount(minlength=12) - count * probs).abs().max() < 3
    assert tokens.diff().ge(0).all()


def test_a_token_of_probability_0_is_never_drawn():
    none = float("-inf")
    logits = torch.tensor([none, 0.3, none, -200.0, 1.0, none, -300.0])
    numbers = torch.cat([torch.tensor([0.0, JUST_BELOW_1]), torch.rand(1000)])
    tokens, _ = draw(logits.expand(len(numbers), -1), numbers)
    assert set(tokens.tolist()) == {1, 4} and tokens[:2].tolist() == [1, 4]
    # One that is the only one, at either end.
    for place in (0, 3, 6):
        alone = torch.full((2, 7), none)
        alone[:, place] = 5.0
        tokens, logps = draw(alone, numbers[:2])
        assert tokens.tolist() == [place] * 2 and logps.tolist() == [0.0] * 2


def test_a_large_vocabulary_whose_sum_is_rounded():
    logits = 3 * torch.randn(4, 150_000, generator=torch.Generator().manual_seed(0))
    logits[:, 100_000:] = -1000.0
    for number in (0.0, JUST_BELOW_1):
        tokens, logps = draw(logits, torch.full((4,), number))
        assert (tokens < 100_000).all() and logps.isfinite().all()


def test_logits_in_bf16_are_drawn_from_in_fp32():
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    numbers = torch.rand(50, generator=torch.Generator().manual_seed(1))
    tokens, logps = draw(logits, numbers)
    wanted, wanted_logps = draw(logits.float(), numbers)
    assert torch.equal(tokens, wanted) and torch.equal(logps, wanted_logps) and logps.dtype == torch.float32


@pytest.mark.parametrize("rows", [1, 50, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 7.0])
def test_log_probabilities_of_draws_are_the_losses_to_the_bit(monkeypatch, softcap, dtype, rows):
    """rows: of a chunk of logits; 137 tokens are drawn."""
    vocabulary, size = 500, 48
    monkeypatch.setitem(cross_entropy.LOGITS_BYTES, "cpu", rows * vocabulary * dtype.itemsize)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(137, size, generator=generator).to(dtype)
    head = 0.4 * torch.randn(vocabulary, size, generator=generator)
    numbers = torch.rand(137, generator=generator)
    tokens, logps = linear_draws(hidden, head, numbers, softcap)
    assert torch.equal(logps, -linear_token_losses(hidden, head, tokens, softcap))
    logits = torch.nn.functional.linear(hidden, head.to(dtype)).float()
    if softcap:
        logits = softcap * (logits / softcap).tanh()
    wanted, _ = draw(logits, numbers)
    assert (tokens == wanted).sum() >= 136 and len(set(tokens.tolist())) > 50
    empty, none = linear_draws(hidden[:0], head, numbers[:0], softcap)
    assert len(empty) == len(none) == 0


# ---- decoding by given random numbers ----

LENGTHS = (1, 7, 30, 8, 3, 12)


def random_prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, 96, (n,), generator=generator).tolist() for n in lengths]


def a_family(name: str, folder: Path):
    """A tiny random model, whose attention is limited where it is not a Llama; as transformers has it."""
    if name == "llama":
        return llama(folder, std=0.1, num_key_value_heads=2)
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "sliding_window": 8}
    if name == "mistral":
        config = transformers.MistralConfig(**sizes, attn_implementation="eager")
    else:
        caps = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0, "query_pre_attn_scalar": 16}
        config = transformers.Gemma2Config(**sizes, **caps, attn_implementation="eager")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.15)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_the_same_numbers_draw_the_same_answers_alone_and_in_a_batch(tmp_path, monkeypatch, name):
    theirs = a_family(name, tmp_path)
    model, prompts = load_model(tmp_path), random_prompts(*LENGTHS)
    numbers = torch.rand(len(prompts), 30, generator=torch.Generator().manual_seed(3))
    together = Draws(numbers)
    answers = model.generate(prompts, 30, draws=together)
    assert len({token for answer in answers for token in answer}) > 30
    for prompt, row, answer, logps in zip(prompts, numbers, answers, together.logps, strict=True):
        alone = Draws(row[None])
        assert model.generate([prompt], 30, draws=alone) == [answer] and len(answer) == 30
        torch.testing.assert_close(alone.logps[0], logps, rtol=0, atol=1e-4)
        with torch.no_grad():
            logits = theirs(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        tokens, wanted = draw(logits, row)
        assert tokens.tolist() == answer
        torch.testing.assert_close(logps, wanted, rtol=0, atol=1e-4)

    stop = {answers[0][5], answers[1][8], answers[2][4], answers[3][20]}
    lengths = [1 + next((i for i, token in enumerate(answer) if token in stop), 29) for answer in answers]
    assert len(set(lengths)) > 2
    wanted = [answer[:length] for answer, length in zip(answers, lengths, strict=True)]
    stopped = Draws(numbers)
    assert model.generate(prompts, 30, stop=stop, draws=stopped) == wanted
    for row, length, before in zip(stopped.logps, lengths, together.logps, strict=True):
        torch.testing.assert_close(row[:length], before[:length], rtol=0, atol=1e-4)
        assert row[length:].eq(0).all()
    # As on a GPU, whose steps run ahead of what the host has read.
    graphs = record_graphs(monkeypatch)
    ahead = Draws(numbers)
    assert model.generate(prompts, 30, stop=stop, draws=ahead) == wanted and graphs
    for row, length, before in zip(ahead.logps, lengths, together.logps, strict=True):
        torch.testing.assert_close(row[:length], before[:length], rtol=0, atol=1e-4)
    ahead = Draws(numbers)
    assert model.generate(prompts, 30, draws=ahead) == answers
    torch.testing.assert_close(ahead.logps, together.logps, rtol=0, atol=1e-4)


# ---- answers of the policy that is trained, to the bit ----


class Noisy:
    """A drafter that draws from other logits than the model's: its answers are those of another model."""

    def __init__(self, noise: float):
        self.noise = noise
        self.generator = torch.Generator().manual_seed(0)
        self.others = 0

    def __call__(self, logits: torch.Tensor, numbers: torch.Tensor):
        wanted, _ = draw(logits, numbers)
        noise = torch.randn(logits.shape, generator=self.generator)
        tokens, logps = draw(logits + self.noise * noise, numbers)
        self.others += int((tokens != wanted).sum())
        return tokens, logps


def by_words(answers) -> list[float]:
    """Rewards that differ within a group."""
    return [len(answer.text) % 7 + answer.text.count("e") for answer in answers]


def ids_by_key(batches) -> dict:
    """The answers of each prompt, in any order."""
    found = {}
    for batch in batches:
        for example in batch.examples:
            found.setdefault(example.key, []).append([int(id) for id in example.ids])
    return {key: sorted(answers) for key, answers in found.items()}


CHANGES = {
    "one micro-batch": {"batch_size": 99},
    "several micro-batches": {"batch_size": 1},
    "few tokens at a time": {"max_tokens": 150},
    "lora": {"method": "lora"},
    "qlora": {"method": "qlora"},
    "prompt-tuning": {"method": "prompt-tuning", "virtual_tokens": 5},
    "blocks twice": {"activation_checkpointing": "full"},
}


@pytest.mark.parametrize("case", CHANGES)
def test_tokens_are_drawn_from_the_logits_that_train_them_to_the_bit(base, file, case):
    policy = on_policy(base, file, by_words, **CHANGES[case])
    run, model = policy
    move(model)
    batches, totals = run.begin_step(model, policy.prompts(5), 3, 0)
    wanted = {"one micro-batch": 1, "several micro-batches": 5}
    assert len(batches) == wanted.get(case, len(batches)) and (len(batches) > 1 or case == "one micro-batch")
    assert totals.num_examples == 5 * run.settings.group_size
    losses = Losses(CPU)
    for batch in batches:
        logps = token_logps(model, batch)
        sampled = torch.tensor([logp for each in batch.examples for logp in each.sampled.logps])
        assert torch.equal(logps.detach(), sampled) and logps.requires_grad
        # And each token is what its own number draws of these logits.
        hidden = model.flat(batch.tokens, batch.documents).detach().index_select(0, batch.logit_positions)
        numbers = torch.cat([uniforms_of(run, example) for example in batch.examples])
        tokens, again = linear_draws(hidden, model.head_weight(), numbers, model.config.logit_softcap)
        assert torch.equal(tokens, batch.targets) and torch.equal(again, sampled)
        run(model, batch, totals, losses).backward()
    reported = losses.extra(totals)
    assert reported["sampling_gap"] == 0 and reported["alike"] < 1
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())
    lengths = [len(draft.ids) for draft in run.writer.drafts]
    stops = run.writer.tokenizer.stop_ids
    assert all(draft.ids[-1] in stops or len(draft.ids) == run.writer.max_new_tokens for draft in run.writer.drafts)
    assert all(id not in stops for draft in run.writer.drafts for id in draft.ids[:-1])
    assert float(reported["answer_tokens"]) == pytest.approx(sum(lengths) / len(lengths))


def uniforms_of(run, example) -> torch.Tensor:
    """The numbers that the answer of an example was drawn by."""
    start = len(example.ids) - len(example.sampled.logps)
    answer = [int(id) for id in example.ids[start:]]
    (draft, *_) = [each for each in run.writer.drafts if each.example.key == example.key and each.ids == answer]
    return draft.uniforms[: len(answer)]


@pytest.mark.parametrize("noise", [0.05, 1.0])
@pytest.mark.parametrize("case", ["one micro-batch", "several micro-batches", "lora"])
def test_what_another_model_would_have_drawn_is_drawn_again(base, file, monkeypatch, case, noise):
    policy = on_policy(base, file, by_words, **CHANGES[case])
    run, model = policy
    move(model)
    wanted, _ = run.begin_step(model, policy.prompts(6), 0, 0)
    drafter = Noisy(noise)
    monkeypatch.setattr(decoding, "draw", drafter)
    found, totals = run.begin_step(model, policy.prompts(6), 0, 0)
    assert drafter.others > 5
    assert ids_by_key(found) == ids_by_key(wanted)
    losses = Losses(CPU)
    for batch in found:
        run(model, batch, totals, losses)
    assert losses.extra(totals)["sampling_gap"] == 0


def test_answers_that_are_never_drawn_alike_end_the_run(base, file, monkeypatch):
    policy = on_policy(base, file, by_words)

    def draw_others(model, drafts):
        drafts[0].ids[0] = 5 if drafts[0].ids[0] == 4 else 4
        return True

    monkeypatch.setattr(policy.run.writer, "draw_again", draw_others)
    with pytest.raises(UserError, match="can't be drawn alike twice"):
        policy.run.begin_step(policy.model, policy.prompts(2), 0, 0)


def test_a_step_that_trains_another_model_than_answered_is_refused(base, file):
    policy = on_policy(base, file, by_words)
    run, model = policy
    batches, totals = run.begin_step(model, policy.prompts(2), 0, 0)
    run(model, batches[0], totals, Losses(CPU))
    with torch.no_grad():
        next(model.parameters()).mul_(1 + 1e-6)
    with pytest.raises(UserError, match="these answers are of another model"):
        run(model, batches[0], totals, Losses(CPU))


def test_in_bf16_the_difference_is_measured_and_limited(base, file):
    policy = on_policy(base, file, by_words, dtype="bf16")
    run, model = policy
    assert model.dtype == torch.bfloat16 and not run.writer.is_exact
    batches, totals = run.begin_step(model, policy.prompts(4), 0, 0)

    def gap() -> float:
        losses = Losses(CPU)
        for batch in batches:
            run(model, batch, totals, losses)
        return float(losses.extra(totals)["sampling_gap"])

    # A model as small as this may round alike in both ways on some machines.
    assert gap() < 0.01
    with torch.no_grad():
        model.norm.weight.mul_(1.01)
    sums = [(token_logps(model, batch).detach(), batch) for batch in batches]
    differences = [
        logps - torch.tensor([logp for each in batch.examples for logp in each.sampled.logps]) for logps, batch in sums
    ]
    assert gap() == pytest.approx(float(torch.cat(differences).abs().mean()), rel=1e-5) and gap() > 1e-3
    move(model)
    with pytest.raises(UserError, match=r"differ from those that sampled them, by .* nats in the mean"):
        gap()


def test_answers_follow_from_seed_step_and_prompt_alone(base, file):
    policy = on_policy(base, file, by_words)
    run, model = policy

    def answers(prompts, step: int = 0) -> dict:
        return ids_by_key(run.begin_step(model, prompts, step, 0)[0])

    six = policy.prompts(6)
    wanted = answers(six)
    assert len(wanted) == 6 and all(len(group) == run.settings.group_size for group in wanted.values())
    assert answers(six) == wanted
    assert answers(six[::-1]) == wanted
    assert answers(six[1:2]).items() <= wanted.items()
    assert all(group != wanted[key] for key, group in answers(six, step=1).items())
    others = policy.prompts(6, seed=1)
    assert all(group != wanted[key] for key, group in answers(others).items())
    another = on_policy(base, file, by_words, seed=1)
    found = ids_by_key(another.run.begin_step(another.model, another.prompts(6), 0, 0)[0])
    assert all(group != wanted[key] for key, group in found.items())
    # A prompt that comes twice in a step has twice as many answers.
    twice = answers([six[0], others[0]])
    for key, group in twice.items():
        different = set(map(tuple, group))
        assert len(group) == 2 * run.settings.group_size and len(different) > 5
        assert set(map(tuple, wanted[key])) < different


def test_prompts_have_seeds_of_their_places_in_the_run_on_any_number_of_ranks(base, file, monkeypatch):
    dataset = prompts_of(file, base)

    def seeds(ranks: int, rank: int, seed: int = 0) -> list[tuple]:
        monkeypatch.setattr(data.distributed, "dp_size", lambda: ranks)
        monkeypatch.setattr(data.distributed, "dp_rank", lambda: rank)
        # An epoch takes each prompt five times.
        sampler = Sampler(dataset.lengths, [12], [60], seed)
        loader = MicroBatches(dataset, sampler, CPU, 24 // ranks, seed=seed)
        steps = [[each for batch in loader.step(step) for each in batch.examples] for step in range(3)]
        return [(step, each.key, each.dropout_seed) for step, examples in enumerate(steps) for each in examples]

    alone = seeds(1, 0)
    assert sorted(alone) == sorted(seeds(2, 0) + seeds(2, 1))
    assert len({seed for _, _, seed in alone}) == len(alone) == 60
    keys = [key for step, key, _ in alone if step == 0]
    assert len(set(keys)) < len(keys) == 24
    assert not {seed for _, _, seed in seeds(1, 0, seed=1)} & {seed for _, _, seed in alone}


def test_a_group_of_equal_rewards_teaches_nothing_and_is_counted(base, file):
    def rewards(answers) -> list[float]:
        """The first prompt's answers are all alike."""
        first = answers[0].question.record.where
        return [0.1 if each.question.record.where == first else float(i) for i, each in enumerate(answers)]

    policy = on_policy(base, file, rewards)
    run, model = policy
    batches, totals = run.begin_step(model, policy.prompts(2), 0, 0)
    losses = Losses(CPU)
    for batch in batches:
        run(model, batch, totals, losses).backward()
    assert losses.extra(totals)["alike"] == 0.5
    advantages = {example.key: [] for batch in batches for example in batch.examples}
    for batch in batches:
        for example in batch.examples:
            advantages[example.key].append(example.sampled.advantage)
    first, second = (advantages[key] for key in sorted(advantages))
    assert first == [0.0] * 4 and sorted(second) == pytest.approx([-1.162, -0.387, 0.387, 1.162], abs=1e-3)


def test_a_step_s_gradients_do_not_depend_on_how_it_is_cut(base, file):
    wanted = None
    for changes in ({"batch_size": 99}, {"batch_size": 1}, {"max_tokens": 100}):
        policy = on_policy(base, file, by_words, **changes)
        batches, totals = policy.run.begin_step(policy.model, policy.prompts(5), 0, 0)
        losses = Losses(CPU)
        for batch in batches:
            policy.run(policy.model, batch, totals, losses).backward()
        gradients = {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None}
        wanted = wanted or (gradients, float(losses.loss))
        assert float(losses.loss) == pytest.approx(wanted[1], rel=1e-6)
        assert all(relative(gradient, wanted[0][name]) < 1e-5 for name, gradient in gradients.items())


def test_a_rank_without_a_prompt_counts_nothing(base, file):
    policy = on_policy(base, file, by_words)
    batches, totals = policy.run.begin_step(policy.model, [collate([DUMMY_EXAMPLE], whole=True)], 0, 0)
    losses = Losses(CPU)
    loss = policy.run(policy.model, batches[0], totals._replace(num_examples=4.0), losses)
    loss.backward()
    assert totals.num_examples == 0 and float(loss.detach()) == 0 and float(losses.loss) == 0
    assert all(mean.tolist() == [0, 0] for mean in losses.means.values())


def test_a_validation_takes_the_likeliest_answers(base, file):
    policy = on_policy(base, file, by_words)
    run, model = policy
    sums = []
    found = validate(run, model, run.dataset, CPU, sums=sums)
    stops = run.writer.tokenizer.stop_ids
    theirs = transformers.AutoTokenizer.from_pretrained(base)
    texts, lengths, cut = [], [], 0
    for example in run.dataset.examples:
        prompt = [int(id) for id in example.ids]
        (answer,) = model.generate([prompt], run.writer.max_new_tokens, stop=stops)
        lengths.append(len(answer))
        cut += answer[-1] not in stops
        texts.append(theirs.decode(answer, skip_special_tokens=True))
    rewards = [len(text) % 7 + text.count("e") for text in texts]
    wanted = {"reward": sum(rewards) / 12, "loss": -sum(rewards) / 12, "answer_tokens": sum(lengths) / 12}
    assert found == pytest.approx(wanted | {"cut": cut / 12}, rel=1e-6)
    sums = torch.cat(sums, 1)
    assert sums.shape == (2, 12) and sorted((-sums[0]).tolist()) == pytest.approx(sorted(map(float, rewards)))
    assert model.training
