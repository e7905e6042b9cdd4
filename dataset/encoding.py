"""From a record to ids and trained spans, as the objective wants its examples (objectives.py):

texts    a text of which some tokens are trained: a conversation's answers, or all of a plain text
pairs    a prompt and two answers, of which the first is better: two texts, which end with the answer
scored   the same, but of texts that end as the chat template ends them
judged   a prompt and an answer that is good or bad
classes  a text and the class that it belongs to
prompts  what is asked, up to where an answer begins: the model answers while it is trained
"""

from collections import Counter
from typing import NamedTuple

import numpy as np

from common.errors import UserError
from dataset.prompts import split_prompt
from dataset.records import Record
from tokenizer import EncodedChat, TemplateError, Tokenizer

AS_TEXTS = "texts"
AS_PAIRS = "pairs"
AS_SCORED_PAIRS = "scored"
PAIR_KINDS = (AS_PAIRS, AS_SCORED_PAIRS)
AS_JUDGED = "judged"
AS_CLASSES = "classes"
AS_PROMPTS = "prompts"
# The labels of judged answers.
BAD, GOOD = JUDGMENTS = ("bad", "good")
# The formats whose records have what a kind wants; a kind that is not here takes all of them.
FORMATS_OF_KIND = {
    AS_PAIRS: ("preferences",),
    AS_SCORED_PAIRS: ("preferences",),
    AS_JUDGED: ("KTO", "preferences"),
}
# The formats whose records say something else than a kind would learn of them: a judgment of an answer is
# no class of a text.
FORMATS_REFUSED = {
    AS_CLASSES: ("KTO", "preferences", "plain text"),
    AS_PROMPTS: ("plain text",),
}
# What these records are, for messages.
RECORDS_WANTED = {
    AS_PAIRS: 'preferences, as "prompt", "chosen" and "rejected"',
    AS_SCORED_PAIRS: 'preferences, as "prompt", "chosen" and "rejected"',
    AS_JUDGED: 'judged answers, as "prompt", "completion" and "label" (true or false), or preferences',
    AS_CLASSES: 'texts with a class, as "text" and "label"',
    AS_PROMPTS: 'questions, with or without an answer, as "messages" or "question" and "answer"',
}


class EncodedRecord(NamedTuple):
    """A record as ids.

    spans: what is trained of them, (start, end, loss weight) each. Of a pair, a class and a prompt
        they also tell the weight of the whole.
    split: where the second text of a pair begins; 0 where there is one text.
    label: of a judged answer or a class; "" for others.
    """

    ids: list[int]
    spans: list[tuple[int, int, float]]
    split: int = 0
    label: str = ""


# What became of a conversation: its ids, of a text with a class without more.
Talk = EncodedChat | list[int] | UserError


def check_format(kind: str, format_name: str, path: str, flag: str) -> None:
    """Raises UserError if the records of a format are not of a kind. path, flag: for the message."""
    wanted = FORMATS_OF_KIND.get(kind)
    is_another = bool(wanted) and format_name not in wanted
    if is_another or format_name in FORMATS_REFUSED.get(kind, ()):
        raise UserError(
            f"{path}: its records are {format_name}; {flag} wants {RECORDS_WANTED[kind]}"
        )


def records_of_kind(records: list[Record], kind: str) -> list[Record]:
    """Returns records as a kind takes them: a preference becomes two judged answers."""
    if kind != AS_JUDGED:
        return records
    judged = []
    for record in records:
        if record.rejected is None:
            judged.append(record)
            continue
        assert record.messages is not None, "a preference is a conversation"
        prompt = record.messages[: record.asked]
        weight = answer_weight(record)
        for messages, label in ((record.messages, True), (prompt + record.rejected, False)):
            mask = trained_messages(record, label)
            weights = [weight * is_trained for is_trained in mask]
            judged.append(
                Record(
                    messages, None, record.where, tools=record.tools, weights=weights, label=label
                )
            )
    return judged


def trained_messages(record: Record, chosen: bool) -> list[bool]:
    """Returns for each message of a preference's talk whether it is trained: an answer behind the prompt
    that has not the weight 0. chosen: the talk with the chosen answer, else with the rejected one."""
    assert record.messages is not None and record.rejected is not None
    messages = record.messages[record.asked :] if chosen else record.rejected
    weights = record.rejected_weights
    if chosen:
        weights = None if record.weights is None else record.weights[record.asked :]
    if weights is None:
        weights = [1.0] * len(messages)
    own = [
        message["role"] == "assistant" and weight != 0
        for message, weight in zip(messages, weights, strict=True)
    ]
    return [False] * record.asked + own


def talks_of_record(record: Record, kind: str) -> list[list[dict]]:
    """Returns the conversations that a record is rendered as: none of a text; both of a pair; what
    stands before a class, none where there is no class; of a prompt what stands before the last answer,
    none where that asks nothing; else its own."""
    if record.messages is None:
        return []
    if kind == AS_PROMPTS:
        try:
            return [split_prompt(record, record.where, False, Counter()).messages or []]
        except UserError:
            return []
    if kind == AS_CLASSES:
        return [record.messages[:-1]] if class_of(record) and len(record.messages) > 1 else []
    if kind in PAIR_KINDS:
        assert record.rejected is not None, "see check_format"
        return [record.messages, record.messages[: record.asked] + record.rejected]
    return [record.messages]


def encode_record(
    record: Record, talks: list[Talk], tokenizer: Tokenizer, kind: str
) -> EncodedRecord | str:
    """Returns a record as ids; the reason, a string, if it cannot be trained on.

    talks: what was made of its conversations.
    """
    refused = next((talk for talk in talks if isinstance(talk, UserError)), None)
    if refused is not None:
        return f"refused by the {refused}" if isinstance(refused, TemplateError) else str(refused)
    if kind == AS_CLASSES:
        return encode_class(record, talks)
    if kind == AS_PROMPTS:
        if not talks:
            return "in which no user asks anything"
        assert isinstance(talks[0], EncodedChat)
        weight = 1.0
        if record.weights and record.messages and record.messages[-1]["role"] == "assistant":
            # That of the answer that the record has; one that has none weighs as all.
            weight = float(np.float32(answer_weight(record)))
        if not weight:
            return "of the weight 0"
        return encode_whole(talks[0].ids, weight)
    chats = [talk for talk in talks if isinstance(talk, EncodedChat)]
    if kind in PAIR_KINDS:
        return encode_preference(record, chats[0], chats[1], kind == AS_PAIRS)
    if not chats:
        return encode_text(record, tokenizer)
    if record.label is False and kind != AS_JUDGED:
        return "labelled as a bad answer"
    assert record.messages is not None, "it was rendered"
    weights = record.weights or [1.0] * len(record.messages)
    spans = []
    has_weight = False
    for start, end, message in chats[0].spans:
        # Rounded to float32 first: a weight that rounds to 0 trains nothing.
        weight = float(np.float32(weights[message]))
        spans.append((start, end, weight))
        has_weight = has_weight or weight != 0
    if not has_weight:
        return "without a trained token"
    label = ""
    if kind == AS_JUDGED:
        label = GOOD if record.label else BAD
        # The judgment is of the last answer, and those before it belong to the prompt.
        spans = [span for span in spans if span[2]]
    return EncodedRecord(chats[0].ids, spans, label=label)


def encode_text(record: Record, tokenizer: Tokenizer) -> EncodedRecord | str:
    """Returns what `encode_record` does, for a text, all of whose tokens are trained."""
    # Long files come in parts: the tokens of begin and end only stand around the whole.
    bos = record.first and tokenizer.bos_id is not None and tokenizer.adds_bos
    try:
        ids = tokenizer.encode(record.text, bos=bos, eos=record.last)
    except UserError as error:
        return str(error)
    if len(ids) < 2:
        return "of a single token, which nothing predicts"
    return EncodedRecord(ids, [(0, len(ids), 1.0)])


def encode_preference(
    record: Record, chosen: EncodedChat, rejected: EncodedChat, ends_with_answer: bool
) -> EncodedRecord | str:
    """Returns what `encode_record` does, for a pair: both texts, one after the other, of which what
    stands behind the prompt is trained.

    ends_with_answer: leave out what the template writes behind the last trained token.
    """
    weight = float(np.float32(answer_weight(record)))
    if not weight:
        return "without a trained token"
    ids: list[int] = []
    spans = []
    split = 0
    for name, chat in (("chosen", chosen), ("rejected", rejected)):
        split = len(ids)
        mask = trained_messages(record, name == "chosen")
        own = [(start, end) for start, end, message in chat.spans if mask[message] and start < end]
        if not own:
            return f"whose {name} answer has no trained token"
        spans += [(start + split, end + split, weight) for start, end in own]
        ids += chat.ids[: own[-1][1]] if ends_with_answer else chat.ids
    if ids[:split] == ids[split:]:
        return "whose chosen and rejected answers are one as the template writes them"
    return EncodedRecord(ids, spans, split)


def encode_class(record: Record, talks: list[Talk]) -> EncodedRecord | str:
    """Returns what `encode_record` does, for a text and its class, the last answer."""
    if not talks:
        return "without a class"
    assert isinstance(talks[0], list)
    weight = float(np.float32(answer_weight(record)))
    if not weight:
        return "without a trained token"
    return encode_whole(talks[0], weight, class_of(record))


def encode_whole(ids: list[int], weight: float, label: str = "") -> EncodedRecord:
    """Returns a text of which no token is trained. weight: of the whole, which its span tells."""
    return EncodedRecord(ids, [(len(ids) - 1, len(ids), weight)], label=label)


def class_of(record: Record) -> str:
    """Returns the class of a record: its last message, if that is an answer; else ""."""
    last = record.messages[-1] if record.messages else {}
    is_answer = last.get("role") == "assistant" and not last.get("tool_calls")
    return (last.get("content") or "").strip() if is_answer else ""


def answer_weight(record: Record) -> float:
    """Returns the weight of a record as one example: that of its first answer behind the prompt that is
    trained."""
    if record.weights is None:
        return 1.0
    assert record.messages is not None
    for message, weight in list(zip(record.messages, record.weights, strict=True))[record.asked :]:
        if message["role"] == "assistant" and weight:
            return weight
    return 0.0
