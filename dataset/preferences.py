"""Reads preferences and KTO: answers with a judgment.

preferences   {"chosen", "rejected"}, two answers of which the first is better; with "prompt",
              "conversations" or "messages" before them, or without, when the part that both begin
              with is the prompt. Each may be a string, a message or a list of messages, or a
              transcript of HH-RLHF (Bai et al. 2022). Where several of these columns carry the same
              talk, as in UltraFeedback, it stands there once; where they don't agree, the record is
              refused
KTO           {"messages" or "conversations" or "prompt" and "completion", "label"}: one answer, and
              whether it is good (Ethayarajh et al. 2024)
"""

import re

from common.errors import UserError
from dataset.messages import require_field, without_surrogate
from dataset.records import (
    Reading,
    Record,
    WeightedMessages,
    joined_talk,
    prompt_weights,
    same_messages,
    split_system,
)

# Columns that hold a prompt, or a whole talk with one of the answers.
TALKS = ("conversations", "messages", "prompt")
# Columns that hold a question, as of Alpaca's and Orca's preferences.
QUESTIONS = ("question", "query", "instruction")


def preference(reading: Reading) -> list[Record]:
    """Reads a prompt and two answers.

    Returns one record, whose `messages` are the prompt and the chosen answer; none if the two
    answers are equal. Raises UserError if there is no prompt, or a side without an answer of its
    own.
    """
    chosen, chosen_weights = _side(reading, "chosen")
    rejected, rejected_weights = _side(reading, "rejected")
    # Each side becomes the whole talk, in which what is asked stands once.
    answers = (chosen, rejected)
    for key in _asking_columns(reading.record, answers):
        asked, asked_weights = _asked(reading, key)
        num_asked = _num_before_answers(asked, (chosen, rejected), answers)
        prompt = (asked[:num_asked], asked_weights[:num_asked])
        chosen, chosen_weights, _ = joined_talk(
            prompt, (chosen, chosen_weights), f"{key} and chosen", reading.where
        )
        rejected, rejected_weights, _ = joined_talk(
            prompt, (rejected, rejected_weights), f"{key} and rejected", reading.where
        )
    if chosen and rejected:
        chosen, chosen_weights = reading.with_system(chosen, chosen_weights)
        rejected, rejected_weights = reading.with_system(rejected, rejected_weights)

    # What both begin with is the prompt.
    num_same = _num_same(chosen, rejected)
    talk = chosen
    prompt_part = prompt_weights(chosen[:num_same], chosen_weights[:num_same])
    weights = prompt_part + chosen_weights[num_same:]
    chosen = chosen[num_same:]
    rejected = rejected[num_same:]
    rejected_weights = rejected_weights[num_same:]

    if not chosen and not rejected:
        reading.stats.dropped["chosen and rejected do not differ"] += 1
        return []
    if not num_same:
        problem = "nothing is asked before chosen and rejected; a prompt is wanted"
        if _is_whole_talk(chosen) and _is_whole_talk(rejected):
            problem = "chosen and rejected begin with different messages, and share no prompt"
        raise UserError(f"{reading.where}: {problem}")
    for key, messages in (("chosen", chosen), ("rejected", rejected)):
        if not any(message["role"] == "assistant" for message in messages):
            raise UserError(f"{reading.where}: {key} has no assistant message of its own")
    return reading.answered_conversation(
        talk, weights, rejected=rejected, rejected_weights=rejected_weights, asked=num_same
    )


def _side(reading: Reading, key: str) -> WeightedMessages:
    """Reads an answer, with what may stand before it. key: "chosen" or "rejected"."""
    value = reading.record[key]
    if isinstance(value, str) and value.startswith("\n\nHuman:"):
        messages = _transcript(value, f"{reading.where}: {key}")
        return messages, [1.0] * len(messages)
    return reading.messages_at(key, "assistant")


def _asking_columns(record: dict, answers: tuple[list[dict], ...]) -> list[str]:
    """Returns the columns of a record that hold what is asked before both answers."""
    columns = [key for key in TALKS if record.get(key) is not None]
    # A question's column counts where nothing else says what is asked.
    if not columns and not any(_is_whole_talk(each) for each in answers):
        columns = [key for key in QUESTIONS if record.get(key) is not None][:1]
    return columns


def _asked(reading: Reading, key: str) -> WeightedMessages:
    """Reads a column that holds what is asked before both answers."""
    value = reading.record[key]
    if isinstance(value, str) and value.startswith("\n\nHuman:"):
        messages = _transcript(value, f"{reading.where}: {key}")
        # It ends with "Assistant:", after which the answers follow.
        if messages[-1]["role"] == "assistant" and not messages[-1]["content"]:
            messages.pop()
        return messages, [1.0] * len(messages)
    # Alpaca's question has a second part.
    if key == "instruction" and reading.optional_text("input").strip():
        question = f"{reading.text(key)}\n\n{reading.text('input')}"
        return [{"role": "user", "content": question}], [1.0]
    return reading.messages_at(key, "user")


def _num_before_answers(
    asked: list[dict], talks: tuple[list[dict], ...], answers: tuple[list[dict], ...]
) -> int:
    """Returns how many messages of a column that asks stand before an answer of one of the sides.

    The column may hold the whole talk with one of the answers, as UltraFeedback's "messages".
    talks: what is known of both sides so far. answers: the columns chosen and rejected alone.
    """
    system, rest = split_system(asked)
    whole_talks = [each for each in talks if _is_whole_talk(each)]
    for each in whole_talks:
        system_of_talk, talk = split_system(each)
        if not rest or not same_messages(rest, talk[: len(rest)]):
            continue
        if len(whole_talks) == len(talks):
            num_asked = _num_same(*talks) - len(system_of_talk)
        else:
            # The other side is an answer alone, and so is what this one ends with.
            num_asked = 1 + max(i for i, one in enumerate(talk) if one["role"] != "assistant")
        return len(system) + min(len(rest), num_asked)
    for answer in answers:
        if answer and len(asked) > len(answer) and same_messages(asked[-len(answer) :], answer):
            return len(asked) - len(answer)
    return len(asked)


def _is_whole_talk(messages: list[dict]) -> bool:
    """True if messages hold what is asked, and not an answer alone."""
    _, talk = split_system(messages)
    return bool(talk) and talk[0]["role"] != "assistant"


def _num_same(some: list[dict], others: list[dict]) -> int:
    """Returns how many messages both begin with."""
    count = 0
    for one, other in zip(some, others):
        if one != other:
            break
        count += 1
    return count


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
        prompt = reading.messages_at("prompt", "user")
        completion = reading.messages_at("completion", "assistant")
        names = "prompt and completion"
        messages, weights, _ = joined_talk(prompt, completion, names, reading.where)
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
