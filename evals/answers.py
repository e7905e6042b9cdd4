"""Answers of a model to the questions of records, beside their references.

The last assistant message of a record is the reference, and the messages before it are the
question; some records accept several answers. By default the model answers greedily: it always takes
the most probable token, so the same model gives the same answers. The result depends on the model
and the file (and, where answers are drawn at random, on the seed) alone: another batch size changes it
by rounding only.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from common.errors import UserError
from common.progress import progress
from dataset.prompts import Prompt
from dataset.records import Record
from evals.arguments import EXTRA_TOKENS
from evals.batch_answers import (
    AnswerSettings,
    generate_batches,
    note_hidden_tools,
    prompt_batches,
    prompt_ids,
    seed_of,
)
from model import Transformer
from tokenizer import Tokenizer


@dataclass
class Answers:
    """The answers to some records, in the order of the records. A record with several answers (--samples)
    stands there as often.

    references: for each record its accepted answers, at least one.
    prompt_tokens: mean length of a prompt, in tokens.
    num_cut: answers that were cut off at the most tokens that an answer may have.
    options: what the command line says of the evaluations: {"bleu_tokenizer", "code_language"}.
    """

    records: list[Record]
    references: list[list[str]]
    texts: list[str]
    prompt_tokens: float
    num_cut: int = 0
    options: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.records)


def note_of_cut_answers(num_cut: int, total: int, target: str = "", file: str = "") -> str:
    """Returns a line that says how many of all answers were cut off. target: whose they are, file: to
    what, where that is not plain."""
    whose = f"{target}: " if target else ""
    to_file = f" to {file}" if file else ""
    return (
        f"NOTE: {whose}{num_cut:,} of {total:,} answers{to_file} were cut off at the longest that an answer"
        " may be (--max-new-tokens)"
    )


def answer_records(
    model: Transformer,
    tokenizer: Tokenizer,
    records: Sequence[Record],
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    shots: Sequence[Record] = (),
    settings: AnswerSettings | None = None,
) -> Answers:
    """Generates an answer to each record's messages before its last assistant message, which is the
    reference.

    max_new_tokens: longest answer, in tokens; default: the longest reference and EXTRA_TOKENS more.
    batch_size: prompts that are answered at a time.
    shots: records whose messages stand before each question (few-shot prompting, Brown et al.
    2020).
    settings: how tokens are drawn, and how many answers there are to each record; None: one greedy
        answer. Its max_new_tokens is not used.

    Raises UserError naming the record that has no reference, that the template refuses, or that is
    too long.
    """
    questions, references = [], []
    for record in records:
        messages, accepted = question_of(record, shots)
        questions.append(messages)
        references.append(accepted)
    asked = []
    for record, messages in zip(records, questions, strict=True):
        asked.append(Prompt(record, record.where, messages, None, None))
    note_hidden_tools(tokenizer, asked)
    prompts = []
    for record, messages in zip(records, questions, strict=True):
        prompts.append(prompt_ids(model, tokenizer, record, messages))
    if max_new_tokens is None:
        max_new_tokens = longest_answer(tokenizer, references)
    decoding = {}
    if settings is not None:
        samples = settings.samples
        if settings.seed is not None:
            keys = [(i + 1, k + 1) for i in range(len(prompts)) for k in range(samples)]
            decoding["seeds"] = [seed_of(settings.seed, *key) for key in keys]
        decoding |= settings.drawing()
        records = [record for record in records for _ in range(samples)]
        references = [accepted for accepted in references for _ in range(samples)]
        prompts = [prompt for prompt in prompts for _ in range(samples)]

    texts = [""] * len(prompts)
    num_cut = 0
    batches = prompt_batches([len(prompt) for prompt in prompts], batch_size)
    bar = progress("answering", len(prompts), "prompt")
    with bar:
        for batch, generated in generate_batches(
            model, prompts, batches, max_new_tokens, stop=tokenizer.stop_ids, **decoding
        ):
            for i, ids in zip(batch, generated, strict=True):
                texts[i], is_cut = decode_answer(tokenizer, ids)
                num_cut += is_cut
            bar.update(len(batch))
    prompt_tokens = sum(len(prompt) for prompt in prompts) / len(prompts)
    return Answers(list(records), references, texts, prompt_tokens, num_cut)


def decode_answer(tokenizer: Tokenizer, ids: list[int]) -> tuple[str, bool]:
    """Returns the text of an answer, and whether it was cut off before its end. ids: what was
    generated, with the stop id that ended it."""
    # An answer that was cut at max_new_tokens has no end token.
    is_cut = ids[-1] not in tokenizer.stop_ids
    if not is_cut:
        ids = ids[:-1]
    return tokenizer.decode(ids, skip_special=True), is_cut


def longest_answer(tokenizer: Tokenizer, references: list[list[str]]) -> int:
    """Returns the tokens that an answer may have by default: those of the longest reference, and
    EXTRA_TOKENS more."""
    lengths = []
    for accepted in references:
        for reference in accepted:
            lengths.append(len(tokenizer.encode(reference, bos=False, eos=False)))
    return EXTRA_TOKENS + max(lengths)


def question_of(record: Record, shots: Sequence[Record] = ()) -> tuple[list[dict], list[str]]:
    """Returns the messages that ask, with the shots between, and all accepted answers of a record.

    Raises UserError as split_reference does.
    """
    if record.references is None:
        messages, reference = split_reference(record, shots)
        return messages, [reference]
    if record.messages and record.messages[-1]["role"] != "assistant":
        # A file of questions, whose references are in another one.
        return record.messages, record.references
    messages, _ = split_reference(record, shots, with_calls=True)
    return messages, record.references


def split_reference(
    record: Record, shots: Sequence[Record] = (), with_calls: bool = False
) -> tuple[list[dict], str]:
    """Splits a record into the messages that ask and the reference answer, and puts the shots
    between.

    Returns (messages, reference). messages: the record's system message, the messages of the shots
    without theirs, and the record's other messages before its last assistant message. reference:
    the text of that last assistant message.
    with_calls: the answer may be a tool call.
    Raises UserError where a record is plain text, where nothing is asked, or where the answer is a
    tool call and must not be.
    """
    for each in (record, *shots):
        if each.messages is None:
            problem = "plain text has no reference answer to compare with"
            advice = "its loss can be measured: `evaluate.py loss`, or compare's --metric none"
            raise UserError(f"{each.where}: {problem}; {advice}")
    last = max(i for i, message in enumerate(record.messages) if message["role"] == "assistant")
    before = record.messages[:last]
    if not any(message["role"] == "user" for message in before):
        problem = "no user message before its last assistant message, so there is no question"
        raise UserError(f"{record.where}: {problem}")
    answer = record.messages[last]
    if answer.get("tool_calls") and not with_calls:
        problem = "its last answer is a tool call; exact match compares words only"
        raise UserError(f"{record.where}: {problem}")

    # The shots come after the system message, as if they were the conversation so far.
    num_system = 0
    while num_system < len(before) and before[num_system]["role"] == "system":
        num_system += 1
    messages = before[:num_system]
    for shot in shots:
        messages += [message for message in shot.messages if message["role"] != "system"]
    messages += before[num_system:]
    return messages, answer.get("content") or ""
