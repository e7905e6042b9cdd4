"""Training runs without the command line: a loop over random rows, and the textbook's loop over transformers' model to
compare it with."""

import json
from pathlib import Path

import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import train
from data import MicroBatches
from dataset.examples import Dataset, Example
from dataset.sampler import Sampler
from objectives import make_objective
from optimizers import make_optimizers
from train import lr_at
from training.defaults import Settings
from training.metrics import MetricsLogger
from training.signals import GracefulStop
from training.state import TrainState

CPU = torch.device("cpu")


def rows(count: int = 40, longest: int = 60, seed: int = 0) -> Dataset:
    """Random token rows whose answers have very different lengths."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for number in range(count):
        answer = int(torch.randint(1, longest, (), generator=generator)) if number % 3 else 1
        prompt = int(torch.randint(1, 9, (), generator=generator))
        ids = torch.randint(0, 96, (prompt + answer,), generator=generator).tolist()
        examples.append(Example(ids, [False] * prompt + [True] * answer, f"row {number}"))
    return Dataset(examples)


def settings(**changes) -> Settings:
    wanted = {"steps": 20, "lr": 1e-2, "warmup": 2, "weight_decay": 0.0, "eval_every": 0, "batch_size": 4} | changes
    return Settings(**wanted)


def sampler(data: Dataset, seed: int = 0) -> Sampler:
    return Sampler(data.lengths, [len(data)], [len(data)], seed)


def run_loop(
    model, data: Dataset, settings: Settings, folder: Path, device=CPU, optimizers: list | None = None
) -> list:
    """Trains by train.py's loop and returns the loss of each step."""
    if optimizers is None:
        optimizers = make_optimizers(
            model, settings.optimizer, settings.lr, settings.weight_decay, settings.optimizer_offload
        )
    loader = MicroBatches(data, sampler(data, settings.seed), device, settings.batch_size, settings.accumulate)
    state = TrainState()
    metrics = MetricsLogger(settings, folder, 1.0, device, state)
    objective = make_objective(settings, None)
    train.train_loop(settings, model, objective, optimizers, loader, state, metrics, GracefulStop())
    metrics.close()
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def oracle_losses(model, data: Dataset, flags: Settings, decay: float = 0.0, balance: float = 0.0) -> list[float]:
    """The textbook's loop over transformers' model: one example at a time, no padding, one sum. balance: weight of its
    own load-balancing loss, over the step's tokens."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=flags.lr, foreach=False)
    found = []
    order = sampler(data)
    for number in range(flags.steps):
        step = [i for (i,) in order.step(flags.batch_size * flags.accumulate)]
        count, total, routers = 0, 0.0, []
        for i in step:
            example = data.examples[i]
            ids = torch.tensor([example.ids])
            out = model(ids, **({"output_router_logits": True} if balance else {}))
            routers.append(out.router_logits if balance else ())
            logprobs = out.logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            mask = torch.tensor(example.loss_weights[1:])
            total, count = total - logprobs[mask].sum(), count + int(mask.sum())
        loss = total / count
        if balance:
            by_layer = tuple(torch.cat(parts) for parts in zip(*routers, strict=True))
            config = model.config
            extra = load_balancing_loss_func(by_layer, config.num_local_experts, config.num_experts_per_tok)
            (loss + balance * extra).backward()
        else:
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, flags.clip)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(number, flags)
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found
