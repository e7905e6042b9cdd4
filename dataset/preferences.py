"""Preference and KTO records: two answers to one prompt, or one answer and whether it is good."""

import re
from itertools import takewhile

from common.errors import UserError
from dataset.messages import require_field, without_surrogate
from dataset.records import Reading, Record, answered, asked_before, turn_list, with_system


def preference(reading: Reading) -> list[Record]:
    """A prompt and two answers, each a string, a message or turns; or without a prompt two whole conversations, of
    which the turns that both begin with are the prompt; or two transcripts of HH-RLHF (Bai et al. 2022)."""
    sides = []
    for key in ("chosen", "rejected"):
        value = reading.record[key]
        if isinstance(value, str) and value.startswith("\n\nHuman:"):
            turns = _transcript(value, f"{reading.where}: {key}")
            sides.append((turns, [1.0] * len(turns)))
        else:
            sides.append(turn_list(reading, key, "assistant"))
    earlier = next((k for k in ("conversations", "messages", "prompt") if reading.record.get(k) is not None), None)
    prompt, before = with_system(reading, *(turn_list(reading, earlier, "user") if earlier else ([], [])))
    (one, weights), (other, _) = sides
    if prompt and one[: len(prompt)] == prompt == other[: len(prompt)]:
        prompt, before = [], []  # the answers repeat it
    same = len([*takewhile(lambda pair: pair[0] == pair[1], zip(one, other))])
    prompt, before = asked_before([*prompt, *one[:same]], [*before, *weights[:same]])
    chosen, weights, rejected = one[same:], weights[same:], other[same:]
    if not chosen and not rejected:
        reading.stats.dropped["chosen and rejected do not differ"] += 1
        return []
    if not prompt:
        raise UserError(f"{reading.where}: nothing is asked before chosen and rejected; a prompt is wanted")
    for key, side in (("chosen", chosen), ("rejected", rejected)):
        if not any(turn["role"] == "assistant" for turn in side):
            raise UserError(f"{reading.where}: {key} has no assistant message of its own")
    more = {"rejected": rejected, "asked": len(prompt), "tools": reading.tools()}
    return reading.conversation([*prompt, *chosen], [*before, *weights], **more)


def _transcript(text: str, where: str) -> list[dict]:
    parts = re.split(r"\n\n(Human|Assistant):", without_surrogate(text, where))
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[role], "content": said.strip()} for role, said in zip(parts[1::2], parts[2::2])]


def kto(reading: Reading) -> list[Record]:
    """KTO (Ethayarajh et al. 2024): a conversation, or prompt and completion, and whether its last answer is good."""
    label = require_field(reading.record, "label", bool, reading.where)
    if "completion" in reading.record:
        parts = turn_list(reading, "prompt", "user"), turn_list(reading, "completion", "assistant")
        turns, weights = ([*a, *b] for a, b in zip(*parts, strict=True))
    else:
        key = "messages" if "messages" in reading.record else "conversations"
        turns, weights = reading.turns(require_field(reading.record, key, list, reading.where), key)
    turns, weights = with_system(reading, turns, weights)
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
    before = asked_before(turns[:last], weights[:last])[1]
    return answered(reading, (turns, [*before, *weights[last:]]), label=label)
