"""How far a tuned model's distribution is from its base's: the arithmetic of the gauge of every run.

The measure is KL(base || tuned), the sum over the vocabulary of p_base * (log p_base - log p_tuned),
in nats, averaged over the positions of some fixed tokens. It is 0 where nothing has changed, and
large where the tuned model finds improbable what its base would have said. Fine-tuned models forget
earlier tasks in proportion to it (Shenfeld et al. 2025, arXiv 2509.04259, where it is measured on the
new task's own inputs, as here).
"""

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data import Batch
from dataset.examples import Dataset, Example
from model import Transformer

# No example takes more of the fixed tokens than this share of them, so that several are measured; or
# than so many, which leave room for a question and its answer.
LARGEST_SHARE = 1 / 4
LARGEST_EXAMPLE = 256
# Numbers in a chunk of logits, in fp32. Four such tensors exist at a time.
CHUNK_NUMBERS = {"cpu": 1 << 22, "cuda": 1 << 26}


def fixed_examples(dataset: Dataset, count: int) -> Dataset:
    """Returns examples of a dataset with `count` tokens in all, fewer only if it has fewer.

    They are those with the smallest hash of their prompt, so that neither seed nor order decides.
    Whole ones come first, of at most LARGEST_SHARE of the tokens or LARGEST_EXAMPLE; where these do
    not suffice, the beginnings of longer ones follow. The last one is cut to what is left.
    """
    room = max(LARGEST_EXAMPLE, int(LARGEST_SHARE * count))
    by_hash = np.argsort(dataset.prompts, kind="stable")
    is_short = dataset.lengths[by_hash] <= room
    examples = []
    left = count
    for i in [*by_hash[is_short], *by_hash[~is_short]]:
        if left < 2:
            break
        # Of a pair, the prompt and the chosen answer.
        example = dataset.examples[i].texts()[0]
        ids = example.ids[: min(room, left)]
        left -= len(ids)
        # Nothing of it is trained; all of its positions are measured.
        examples.append(Example(ids, [False] * len(ids), example.source, example.prompt))
    return Dataset(examples)


@torch.no_grad()
def hidden_states(model: Transformer, batches: Iterable[Batch]) -> Tensor:
    """Returns the hidden states of all tokens of some batches, [N, D], ready for the head, in the
    dtype of the model's activations."""
    return torch.cat([model.flat(batch.tokens, batch.documents) for batch in batches])


@torch.no_grad()
def mean_divergence(
    base_hidden: Tensor,
    hidden: Tensor,
    base_head: Tensor,
    head: Tensor,
    softcap: float | None = None,
) -> float:
    """Returns KL(base || tuned) over the whole vocabulary, in nats, as the mean over N tokens.

    base_hidden, hidden: [N, D], what the head of the base, and of the tuned model, is given.
    base_head, head: [V, D], cast to the dtype of the hidden states, as in training.
    softcap: logits become softcap * tanh(logits / softcap) first (Gemma 2).

    Logits exist for a chunk of tokens at a time; softmax and sums are in fp32, and the mean is in
    float64.
    """
    same_head = base_head is head
    head = head.to(hidden.dtype)
    base_head = head if same_head else base_head.to(hidden)
    numbers = CHUNK_NUMBERS.get(hidden.device.type, CHUNK_NUMBERS["cuda"])
    rows = max(1, numbers // len(head))
    total = torch.zeros((), dtype=torch.float64)
    for part, base_part in zip(hidden.split(rows), base_hidden.split(rows), strict=True):
        base = log_probabilities(base_part, base_head, softcap)
        tuned = log_probabilities(part, head, softcap)
        difference = tuned.sub_(base).neg_()
        # One product a token, in place of a tensor of products.
        divergences = torch.linalg.vecdot(base.exp_(), difference)  # [rows]
        total += divergences.sum(dtype=torch.float64).cpu()
    return float(total) / len(hidden)


def log_probabilities(hidden: Tensor, head: Tensor, softcap: float | None) -> Tensor:
    """Returns the log-probabilities of the next token, float32 [rows, V]."""
    logits = F.linear(hidden, head).float()
    if softcap:
        logits = softcap * (logits / softcap).tanh()
    return logits.log_softmax(-1)
