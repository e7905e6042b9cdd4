"""Reads preferences and KTO: answers with a judgment.

preferences   {"chosen", "rejected"}, two answers of which the first is better; with "prompt",
              "conversations" or "messages" before them, or without, when the part that both begin
              with is the prompt. Each may be a string, a message or a list of messages, or a
              transcript of HH-RLHF (Bai et al. 2022)
KTO           {"messages" or "conversations" or "prompt" and "completion", "label"}: one answer, and
              whether it is good (Ethayarajh et al. 2024)
"""

import re

from common.errors import UserError
from dataset.messages import require_field, without_surrogate
from dataset.records import Reading, Record, WeightedMessages, prompt_weights


def preference(reading: Reading) -> list[Record]:
    """Reads a prompt and two answers.

    Returns one record, whose `messages` are the prompt and the chosen answer; none if the two
    answers are equal. Raises UserError if there is no prompt, or a side without an answer of its
    own.
    """
    chosen, chosen_weights = _side(reading, "chosen")
    rejected, _ = _side(reading, "rejected")
    prompt: list[dict] = []
    weights: list[float] = []
    for key in ("conversations", "messages", "prompt"):
        if reading.record.get(key) is not None:
            prompt, weights = reading.messages_at(key, "user")
            break
    prompt, weights = reading.with_system(prompt, weights)

    # Both answers may repeat the prompt. Then it is found as what both begin with.
    length = len(prompt)
    if prompt and chosen[:length] == prompt and rejected[:length] == prompt:
        prompt = []
        weights = []
    # Any messages that both begin with belong to the prompt.
    num_same = 0
    for one, other in zip(chosen, rejected):
        if one != other:
            break
        num_same += 1
    prompt = prompt + chosen[:num_same]
    weights = prompt_weights(prompt, weights + chosen_weights[:num_same])
    chosen = chosen[num_same:]
    chosen_weights = chosen_weights[num_same:]
    rejected = rejected[num_same:]

    if not chosen and not rejected:
        reading.stats.dropped["chosen and rejected do not differ"] += 1
        return []
    if not prompt:
        problem = "nothing is asked before chosen and rejected; a prompt is wanted"
        raise UserError(f"{reading.where}: {problem}")
    for key, messages in (("chosen", chosen), ("rejected", rejected)):
        if not any(message["role"] == "assistant" for message in messages):
            raise UserError(f"{reading.where}: {key} has no assistant message of its own")
    return reading.conversation(
        prompt + chosen,
        weights + chosen_weights,
        rejected=rejected,
        asked=len(prompt),
        tools=reading.tools(),
    )


def _side(reading: Reading, key: str) -> WeightedMessages:
    """Reads an answer, with what may stand before it. key: "chosen" or "rejected"."""
    value = reading.record[key]
    if isinstance(value, str) and value.startswith("\n\nHuman:"):
        messages = _transcript(value, f"{reading.where}: {key}")
        return messages, [1.0] * len(messages)
    return reading.messages_at(key, "assistant")


def _transcript(text: str, where: str) -> list[dict]:
    """Returns the messages of a transcript of HH-RLHF: "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    # With a group in the pattern, re.split returns the speakers too, at the odd places.
    parts = re.split(r"\n\n(Human|Assistant):", without_surrogate(text, where))
    roles = {"Human": "user", "Assistant": "assistant"}
    speakers = parts[1::2]
    contents = parts[2::2]
    messages = []
    for speaker, content in zip(speakers, contents):
        messages.append({"role": roles[speaker], "content": content.strip()})
    return messages


def kto(reading: Reading) -> list[Record]:
    """Reads a conversation, or prompt and completion, and the label of its last answer, which alone
    is trained."""
    label = require_field(reading.record, "label", bool, reading.where)
    if "completion" in reading.record:
        prompt, prompt_part = reading.messages_at("prompt", "user")
        completion, completion_part = reading.messages_at("completion", "assistant")
        messages = [*prompt, *completion]
        weights = [*prompt_part, *completion_part]
    else:
        key = "messages" if "messages" in reading.record else "conversations"
        listed = require_field(reading.record, key, list, reading.where)
        messages, weights = reading.read_messages(listed, key)
    messages, weights = reading.with_system(messages, weights)
    last_answer = 0
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            last_answer = i
    # The label judges the last answer alone, so all before it is a prompt.
    weights_before = prompt_weights(messages[:last_answer], weights[:last_answer])
    weights = weights_before + weights[last_answer:]
    return reading.answered_conversation(messages, weights, label=label)
