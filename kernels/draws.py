"""Tokens that are drawn from their probabilities by given random numbers, one number a token.

`draw` takes the token at which the cumulated probabilities pass the number (inverse transform
sampling). So the token follows from logits and number alone: who has both can draw it once more, and
finds another one only where the logits differ. That is how reinforcement learning proves that an
answer was sampled by the very model that is trained on it (training/on_policy.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cross_entropy import LOGITS_BYTES, SOFTMAX_ROWS


def draw(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draws one token for each row of logits.

    logits: [rows, V], any float dtype. uniforms: float32 [rows], at least 0 and below 1.
    Returns the tokens, int64 [rows], and the log-probability of each, float32 [rows]. Of logits that are not
    finite it is the last token, and a log-probability that is not finite.
    """
    logprobs = logits.log_softmax(-1, dtype=torch.float32)
    cumulated = logprobs.exp().cumsum(-1)
    total = cumulated[:, -1:]
    # Probabilities add up to 1 but for rounding. Below the total, so that a token is found in any case.
    below_total = torch.nextafter(total, torch.zeros_like(total))
    number = torch.minimum(uniforms[:, None] * total, below_total)
    # The first token whose cumulated probability is above the number: its own is then above 0.
    tokens = torch.searchsorted(cumulated, number, right=True)
    tokens = tokens.clamp_(max=logits.shape[-1] - 1)
    return tokens[:, 0], logprobs.gather(1, tokens)[:, 0]


def linear_draws(
    hidden: Tensor, weight: Tensor, uniforms: Tensor, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Draws as `draw` does from the logits of an output head, of which never all exist at a time.

    hidden: [tokens, D]. weight: [V, D], cast to hidden's dtype. softcap: as in `linear_cross_entropy`.
    Logits and log-probabilities are computed in the chunks of `linear_token_losses`, so that on CPUs the
    log-probability of a drawn token is, to the bit, minus the loss that it finds for that token.
    """
    tokens = torch.empty(len(hidden), dtype=torch.int64, device=hidden.device)
    logps = hidden.new_empty(len(hidden), dtype=torch.float32)
    head = weight.to(hidden.dtype)
    on_cpu = hidden.device.type == "cpu"
    budget = LOGITS_BYTES["cpu" if on_cpu else "cuda"]
    rows = max(1, budget // (head.shape[0] * head.element_size()))
    for start in range(0, len(hidden), rows):
        logits = F.linear(hidden[start : start + rows], head)  # [rows, V]
        if softcap:
            logits = softcap * logits.float().div_(softcap).tanh_()
        rows_at_a_time = SOFTMAX_ROWS if on_cpu else len(logits)
        for first in range(0, len(logits), rows_at_a_time):
            part = logits[first : first + rows_at_a_time]
            place = slice(start + first, start + first + len(part))
            tokens[place], logps[place] = draw(part, uniforms[place])
    return tokens, logps
