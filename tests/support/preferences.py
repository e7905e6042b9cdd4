"""Random pairs and judged answers as token ids, and trl's trainers, which compute their losses of the same ids."""

from pathlib import Path
from typing import NamedTuple

import torch
import transformers

from data import collate
from dataset.encoding import JUDGMENTS
from dataset.examples import Example
from model import Transformer
from objectives import Losses, WholeRun, text_logps

VOCABULARY = 300  # of the random ids; chat_base has a few more


class Pair(NamedTuple):
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def rows(self) -> tuple[list[int], list[int]]:
        """Both texts."""
        return self.prompt + self.chosen, self.prompt + self.rejected


class Judged(NamedTuple):
    """other: an answer to something else."""

    prompt: list[int]
    answer: list[int]
    other: list[int]
    is_good: bool


def random_pairs(count: int, seed: int = 0) -> list[Pair]:
    """Pairs whose answers have 1 to 24 tokens."""
    generator = torch.Generator().manual_seed(seed)

    def ids(most: int) -> list[int]:
        length = int(torch.randint(1, most + 1, (), generator=generator))
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    return [Pair(ids(12), ids(24), ids(24)) for _ in range(count)]


def random_judged(count: int, seed: int = 0) -> list[Judged]:
    """Every third answer is a bad one."""
    pairs = random_pairs(count, seed)
    return [Judged(*pair, is_good=bool(number % 3)) for number, pair in enumerate(pairs)]


def answered(prompt: list[int], answer: list[int], **fields) -> Example:
    weight = fields.get("weight", 1.0)
    return Example(prompt + answer, [0.0] * len(prompt) + [weight] * len(answer), **fields)


def example_of_pair(pair: Pair, **fields) -> Example:
    weight = fields.get("weight", 1.0)
    loss_weights = []
    for answer in (pair.chosen, pair.rejected):
        loss_weights += [0.0] * len(pair.prompt) + [weight] * len(answer)
    first, second = pair.rows
    return Example(first + second, loss_weights, split=len(first), **fields)


def example_of_judged(judged: Judged, **fields) -> Example:
    fields["label"] = JUDGMENTS.index("good" if judged.is_good else "bad")
    fields["mismatched"] = answered(judged.prompt, judged.other)
    return answered(judged.prompt, judged.answer, **fields)


def reference_model(model: Transformer):
    """What a run's objective gets reference log-probabilities by, of another model."""

    @torch.no_grad()
    def reference(batch):
        return text_logps(model, batch)

    return reference


def step(run: WholeRun, model: Transformer, micro_batches: list[list[Example]], by_name=lambda name: name):
    """The loss of a step that has these micro-batches, the gradients of what is trained, what is reported, and the
    totals. by_name: another name of a parameter."""
    model.zero_grad(set_to_none=True)
    batches = [collate(examples, whole=True) for examples in micro_batches]
    batches, totals = run.begin_step(model, batches, 0, 0)
    losses = Losses(torch.device("cpu"))
    for batch in batches:
        run(model, batch, totals, losses).backward()
    gradients = {by_name(name): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return losses.loss, gradients, losses.extra(totals), totals


# ---- trl ----


def trl_trainer(objective: str, base: Path, reference: Path, folder: Path, **config):
    """A trainer of trl on a model of `base`, which was made by its constructor as its users call it. Nothing of the
    two records is used but to make it."""
    # Their import takes 10 s.
    import datasets
    import trl
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    trainers = {
        "dpo": (trl.DPOTrainer, trl.DPOConfig),
        "kto": (trl.KTOTrainer, trl.KTOConfig),
        "orpo": (ORPOTrainer, ORPOConfig),
        "cpo": (CPOTrainer, CPOConfig),
    }
    trainer_class, config_class = trainers[objective]
    records = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2
    if objective == "kto":
        records = [{"prompt": "a", "completion": "b", "label": label} for label in (True, False)]
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    common = {"output_dir": str(folder), "use_cpu": True, "report_to": [], "bf16": False}
    more = {}
    if objective in ("dpo", "kto"):
        more["ref_model"] = hf_model(reference)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.eos_token
    return trainer_class(
        hf_model(base),
        args=config_class(**common | config),
        train_dataset=datasets.Dataset.from_list(records),
        processing_class=tokenizer,
        **more,
    )


def hf_model(folder: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


def gradients_of(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def trl_pairs(trainer, pairs: list[Pair]) -> dict[str, torch.Tensor]:
    """What the trainer's own collator makes of pairs."""
    if "DPOTrainer" in type(trainer).__name__:
        keys = ("prompt_ids", "chosen_ids", "rejected_ids")
        return trainer.data_collator([dict(zip(keys, pair, strict=True)) for pair in pairs])
    features = []
    for pair in pairs:
        feature = {"prompt_input_ids": pair.prompt, "prompt_attention_mask": [1] * len(pair.prompt)}
        for side, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            ids = pair.prompt + answer
            feature[f"{side}_input_ids"] = ids
            feature[f"{side}_attention_mask"] = [1] * len(ids)
            feature[f"{side}_labels"] = [-100] * len(pair.prompt) + answer
        features.append(feature)
    return trainer.data_collator(features)


def trl_judged(trainer, judged: list[Judged]) -> dict[str, torch.Tensor]:
    keys = ("prompt_ids", "completion_ids", "KL_completion_ids", "label")
    return trainer.data_collator([dict(zip(keys, each, strict=True)) for each in judged])
