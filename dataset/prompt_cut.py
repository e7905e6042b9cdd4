"""Cutting a prompt from the left, so that a long example keeps its whole answer (--truncate prompt).

What is cut is what the user said first: whole turns, the oldest first, and, where the last turn
alone is too long, the beginning of its words. What stands before the first user's words stays: the
token that begins a text, the system message, the list of tools, and the header of a user's message.
So the example still looks like a conversation of its chat template.

    before  <s> SYSTEM <user> first question <assistant> answer <user> long question <assistant> ANSWER
    after   <s> SYSTEM <user> question <assistant> ANSWER

Where these parts end depends on the template, which is tried with other words: what two prompts
with different words have in common is the head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from common.errors import UserError
from dataset.records import Record
from tokenizer import Tokenizer

# Words of which no tokenizer makes tokens that begin alike.
ONE, OTHER, ANSWER = "alpha", "7", "beta"
# A user's first words may take the last token of the header along: so many tokens less are
# accepted.
MERGED = 2


@dataclass(frozen=True)
class TurnShape:
    """What a chat template writes around the messages of a user.

    header: the ids between an answer and the next words of the user.
    ending: the number of tokens between the words of the user and the answer.
    """

    header: tuple[int, ...] = ()
    ending: int = 0


class PromptHeads:
    """Finds where the words of the first user begin in the ids of a conversation."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.known: dict[
            str, tuple[int, ...]
        ] = {}  # ids of the heads, by system messages and tools

    def length(self, record: Record, ids: Sequence[int]) -> int:
        """Returns how many of a conversation's ids stand before the words of its first user; where
        that can't be told, 1 for the token that begins a text, or 0 without one."""
        before = []
        for message in record.messages or ():
            if message["role"] != "system":
                break
            before.append(message)
        key = f"{before} {record.tools}"
        if key not in self.known:
            self.known[key] = self.find(before, record.tools)
        head = self.known[key]
        length = common_length(head, ids)
        if head and length >= len(head) - MERGED:
            return length
        begins_text = len(ids) > 0 and ids[0] == self.tokenizer.bos_id
        return 1 if begins_text else 0

    def find(self, before: list[dict], tools: list | None) -> tuple[int, ...]:
        """Returns the ids before the words of a user who speaks after these messages; none where
        the template refuses them."""
        conversations: list[tuple[list[dict], list | None]] = []
        for words in (ONE, OTHER):
            messages = [*before, {"role": "user", "content": words}]
            conversations.append((messages, tools))
        one, other = self.tokenizer.render_each(conversations, add_generation_prompt=True)
        if isinstance(one, UserError) or isinstance(other, UserError):
            return ()
        return tuple(one.ids[: common_length(one.ids, other.ids)])


def turn_shape(tokenizer: Tokenizer) -> TurnShape:
    """Returns what a tokenizer's chat template writes around the messages of a user, found by a
    trial."""
    conversations: list[tuple[list[dict], list | None]] = []
    for words in (ONE, OTHER):
        messages = [
            {"role": "user", "content": ANSWER},
            {"role": "assistant", "content": ANSWER},
            {"role": "user", "content": words},
            {"role": "assistant", "content": ANSWER},
        ]
        conversations.append((messages, None))
    one, other = tokenizer.render_each(conversations)
    if isinstance(one, UserError) or isinstance(other, UserError) or len(one.spans) < 2:
        return TurnShape()
    (_, answer_end, _), (next_answer, _, _) = one.spans[:2]
    words_start = common_length(one.ids, other.ids)
    # Counted from the end of both, what stands between the words and the answer.
    before_one = one.ids[words_start:next_answer]
    before_other = other.ids[words_start : other.spans[1][0]]
    ending = common_length(before_one[::-1], before_other[::-1])
    return TurnShape(tuple(one.ids[answer_end:words_start]), ending)


def common_length(some: Sequence[int], others: Sequence[int]) -> int:
    """Returns how many ids two sequences begin with that are the same."""
    pairs = zip(some, others, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def cut_prompt(
    ids: Sequence[int],
    spans: Sequence[tuple[int, int]],
    last: tuple[int, int],
    head: int,
    shape: TurnShape,
    seq_len: int,
) -> int | None:
    """Returns from which id on a conversation is kept, behind its head, so that its last trained
    answer fits whole into seq_len tokens; None if it can't.

    ids: of the conversation.
    spans: [start, end) of all of its answers, in order.
    last: that of the last one that is trained.
    head: the number of ids that stay in front.
    """
    answer_start, answer_end = last
    first_kept = max(head, answer_end - (seq_len - head))
    # Where the words of a user begin: whole turns are left out before these.
    starts = [head]
    for _, end in spans:
        words = end + len(shape.header)
        is_turn = shape.header and tuple(ids[end:words]) == shape.header
        if is_turn and words < answer_start:
            starts.append(words)
    for start in starts:
        if start >= first_kept:
            return start
    # The last turn alone is too long. At least one token of the user's words stays.
    if first_kept > answer_start - shape.ending - 1:
        return None
    return first_kept
