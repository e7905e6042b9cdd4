"""Answers that a model has sampled: runs of --objective grpo without the command line, and trl's trainer, which
computes its loss of the same prompts, answers and rewards."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from support.helpers import sentence
from support.preferences import hf_model
from support.training_runs import CPU
from support.training_runs import settings as run_settings

import data
from data import TrainingData, collate
from dataset.encoding import AS_PROMPTS
from dataset.examples import Example, SampledAnswer
from dataset.sampler import Sampler
from flags import NEW_ADAPTER
from methods import METHODS, load_trainable
from model import Transformer
from objectives import OBJECTIVES, Losses, StepTotals, group_advantages, token_logps
from tokenizer import load_tokenizer
from training.defaults import Settings
from training.on_policy import OnPolicyRun
from training.own_answers import AnswerWriter, Draft


def options(**changes) -> Settings:
    """A run's settings with GRPO's own defaults, in fp32 on the CPU."""
    wanted = {"objective": "grpo", "dtype": "fp32", "device": "cpu", "shard": "none", "max_tokens": 2048}
    wanted |= dict(OBJECTIVES["grpo"].defaults) | {"method": "full", "max_new_tokens": 24, "group_size": 4}
    row = METHODS[changes.get("method", "full")]
    wanted |= {key: value for key, value in (NEW_ADAPTER | dict(row.defaults)).items() if key in row.options}
    if row.quant:
        wanted["quant"] = row.quant
    return run_settings(**(wanted | changes))


def questions(path: Path, count: int, seed: int = 0) -> Path:
    """Questions of 1 to 12 words, each with an answer."""
    rows = [
        {"question": sentence(seed + i, i % 12 + 1), "answer": sentence(seed + 500 + i, 3), "number": i}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prompts_of(file: Path, base: Path, seq_len: int = 512, max_new_tokens: int = 24, **more):
    """What a run reads of a file of prompts."""
    more = {"print_fn": lambda line: None, "flag": "--objective grpo"} | more
    tokenizer = load_tokenizer(base)
    return data.load([file], tokenizer, seq_len, kind=AS_PROMPTS, answer_tokens=max_new_tokens, **more)


class OnPolicy(NamedTuple):
    """A run's objective and its model in training."""

    run: "RunToLookInto"
    model: Transformer

    def prompts(self, count: int, seed: int = 0) -> list:
        """The batches of a step that asks the first prompts, two in a batch. seed: of their answers."""
        found = [self.run.dataset.examples[i] for i in range(count)]
        examples = [replace(each, dropout_seed=100 * seed + i) for i, each in enumerate(found)]
        return [collate(examples[i : i + 2], whole=True) for i in range(0, count, 2)]


class RunToLookInto(OnPolicyRun):
    """It keeps its examples."""

    def __init__(self, settings, tokenizer, training_data, rewards, reference):
        super().__init__(settings, tokenizer, training_data, rewards, reference)
        self.dataset = training_data.train
        self.writer: WriterToLookInto = WriterToLookInto(settings, tokenizer)


class WriterToLookInto(AnswerWriter):
    """It keeps the answers of the last step."""

    def __init__(self, settings, tokenizer):
        super().__init__(settings, tokenizer)
        self.drafts: list[Draft] = []

    def begin_drafts(self, prompts, step):
        self.drafts = super().begin_drafts(prompts, step)
        return self.drafts


def on_policy(base: Path, file: Path, rewards: Callable[[Sequence], list[float]], reference=None, **changes):
    """A run of GRPO on the questions of a file. rewards: of answers (training.rewards.GivenAnswer)."""
    settings = options(**changes)
    dataset = prompts_of(file, base, max_new_tokens=settings.max_new_tokens)
    sampler = Sampler(dataset.lengths, [len(dataset)], [len(dataset)], 0)
    training_data = TrainingData(dataset, dataset, None, sampler, 512, None, False)
    model = load_trainable(settings, base, CPU).train()
    run = RunToLookInto(settings, load_tokenizer(base), training_data, rewards, reference)
    return OnPolicy(run, model)


def surrogate(run: OnPolicyRun, model: Transformer, micro_batches: list[list[Example]]):
    """The loss of a step that trains these answers, its gradients, and what is reported of it."""
    model.zero_grad(set_to_none=True)
    batches = [collate(examples, whole=True) for examples in micro_batches]
    totals = StepTotals.of(batches)
    losses = Losses(CPU)
    loss = torch.zeros(())
    for batch in batches:
        part = run(model, batch, totals, losses)
        part.backward()
        loss += part.detach()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    reported = {name: float(value) for name, value in losses.extra(totals).items()}
    return float(loss), gradients, reported | {"loss": float(losses.loss)}


# ---- sampled answers, and what trl makes of them ----


class Sampled(NamedTuple):
    """An answer to a prompt. logps: of its tokens, when they were drawn."""

    prompt: list[int]
    answer: list[int]
    reward: float
    logps: list[float]

    def example(self, advantage: float) -> Example:
        loss_weights = [0.0] * len(self.prompt) + [1.0] * len(self.answer)
        sampled = SampledAnswer(self.logps, self.reward, advantage)
        return Example(self.prompt + self.answer, loss_weights, sampled=sampled)


def random_groups(model: Transformer, count: int, size: int, noise: float, seed: int = 0) -> list[list[Sampled]]:
    """Groups of answers of 1 to 20 tokens. noise: the standard deviation of what the log-probabilities that drew them
    differ by from the model's own."""
    generator = torch.Generator().manual_seed(seed)

    def ids(most: int) -> list[int]:
        length = int(torch.randint(1, most + 1, (), generator=generator))
        return torch.randint(3, 300, (length,), generator=generator).tolist()

    groups = []
    for _ in range(count):
        prompt = ids(12)
        group = []
        for _ in range(size):
            answer = Sampled(prompt, ids(20), float(torch.randn((), generator=generator)), [])
            logps = logps_of(model, answer)
            logps += noise * torch.randn(len(logps), generator=generator)
            group.append(answer._replace(logps=logps.tolist()))
        groups.append(group)
    return groups


@torch.no_grad()
def logps_of(model: Transformer, answer: Sampled) -> torch.Tensor:
    """The model's log-probability of each token of an answer."""
    return token_logps(model, collate([answer.example(0.0)], whole=True))


def examples_of(groups: list[list[Sampled]], dr_grpo: bool) -> list[Example]:
    examples = []
    for group in groups:
        advantages = group_advantages([answer.reward for answer in group], dr_grpo)
        examples += [answer.example(advantage) for answer, advantage in zip(group, advantages, strict=True)]
    return examples


def trl_trainer_of_groups(base: Path, folder: Path, groups: list[list[Sampled]], **config):
    """A trainer of trl whose model is said to have answered with these groups."""
    # Their import takes 10 s.
    import datasets
    import trl

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    answers = [answer for group in groups for answer in group]
    common = {"output_dir": str(folder), "use_cpu": True, "report_to": [], "bf16": False, "epsilon": 0.2}
    common |= {"num_generations": len(groups[0]), "per_device_train_batch_size": len(answers)}
    # Without it the KL is the one of the paper, which is not multiplied by the importance ratio.
    common |= {"use_bias_correction_kl": False, "activation_checkpointing": False, "max_completion_length": 24}
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.eos_token

    def reward(completions, **columns):
        return [answer.reward for answer in answers]

    trainer = trl.GRPOTrainer(
        hf_model(base),
        reward_funcs=reward,
        args=trl.GRPOConfig(**common | config),
        train_dataset=datasets.Dataset.from_list([{"prompt": "a"}] * 2),
        processing_class=tokenizer,
    )
    prompts = [answer.prompt for answer in answers]
    said = [answer.answer for answer in answers]
    texts = ["x"] * len(answers)
    trainer._generate = lambda _: (prompts, said, None, texts, None, {}, None, [])
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def trl_inputs(trainer, groups: list[list[Sampled]]) -> dict[str, torch.Tensor]:
    """What the trainer computes its loss of, with the log-probabilities that drew the tokens."""
    answers = [answer for group in groups for answer in group]
    inputs = trainer._generate_and_score_completions([{"prompt": "a"} for _ in answers])
    logps = torch.zeros(inputs["completion_ids"].shape)
    for row, answer in zip(logps, answers, strict=True):
        row[: len(answer.logps)] = torch.tensor(answer.logps)
    return inputs | {"old_per_token_logps": logps}
