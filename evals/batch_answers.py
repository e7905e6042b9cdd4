"""Answers many prompts, in batches of similar length.

`generate_batches` is the loop: evaluate.py's exact match and `generate.py --data` both run it.
`answer_prompts` is what `generate.py --data` does with it: each answer becomes a line of JSON in a
file that a killed run goes on with (evals/answer_file.py).

An answer depends on its own prompt alone, but for rounding: greedy ones have no chance in them, and
each sampled one draws from a generator of its own, whose seed follows from --seed, the number of the
record and that of the sample. The batches follow from the prompts and the batch size. So a run that
was killed and went on has the same file, to the byte, as one that was not (on CPUs, and on GPUs
whose kernels repeat).
"""

import hashlib
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from common import console
from common.console import print_stderr
from common.errors import UserError
from common.progress import progress
from dataset.prompts import Prompt
from dataset.records import Record
from decoding import packed_weights
from evals.answer_file import AnswerFile
from model import Transformer
from tokenization.chat_template import to_exact_json
from tokenizer import TemplateError, Tokenizer

# So many prompts go through the chat template at a time.
PROMPTS_AT_ONCE = 256
# So many of an answer's last tokens are searched for a stop text; those in use have 7 bytes at most.
STOP_TOKENS = 8


class AnswerSettings(NamedTuple):
    """How prompts are answered.

    samples: answers to each prompt. seed: of all random draws; None: that of the answers which are
    there, else a random one.
    The others are those of Transformer.stream.
    """

    samples: int
    seed: int | None
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float

    def drawing(self) -> dict:
        """Returns how a token is chosen, as the arguments of Transformer.stream."""
        settings = self._asdict()
        for name in ("samples", "seed", "max_new_tokens"):
            del settings[name]
        return settings


# ---- the loop ----


def prompt_batches(
    lengths: Sequence[int], batch_size: int, longest_first: bool = False
) -> list[list[int]]:
    """Returns the numbers of prompts in batches of similar length, so that the cache holds less
    padding.

    lengths: of the prompts, in tokens. Prompts of one length come in their own order.
    """
    sign = -1 if longest_first else 1
    order = sorted(range(len(lengths)), key=lambda i: sign * lengths[i])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def generate_batches(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    batches: list[list[int]],
    max_new_tokens: int,
    seeds: Sequence[int] | None = None,
    has_ended: Callable[[list[int]], bool] | None = None,
    **settings,
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Yields, for each batch, the numbers of its prompts and the ids that were generated for them.

    seeds: of each prompt. settings: the other arguments of Transformer.stream.
    has_ended: True for new ids that need not go on. A batch ends when all of its prompts have.
    """
    with packed_weights(model, max_new_tokens):
        for batch in batches:
            if seeds is not None:
                settings["seeds"] = [seeds[i] for i in batch]
            rows = [prompts[i] for i in batch]
            if has_ended is None:
                yield batch, model.generate(rows, max_new_tokens, **settings)
            else:
                yield batch, generate_until(model, rows, max_new_tokens, has_ended, **settings)


def generate_until(
    model: Transformer,
    rows: Sequence[Sequence[int]],
    max_new_tokens: int,
    has_ended: Callable[[list[int]], bool],
    **settings,
) -> list[list[int]]:
    """Returns what model.generate returns, but ends when every answer has ended. An answer may have
    ids behind its end, where others had not ended yet."""
    answers: list[list[int]] = [[] for _ in rows]
    ended: set[int] = set()
    for step in model.stream(rows, max_new_tokens, **settings):
        for i, token in step:
            answers[i].append(token)
            if i not in ended and has_ended(answers[i]):
                ended.add(i)
        if all(i in ended for i, _ in step):
            break
    return answers


# ---- prompts as tokens ----


def prompt_ids(
    model: Transformer, tokenizer: Tokenizer, record: Record, messages: list[dict]
) -> list[int]:
    """Returns the ids of `messages` with the beginning of an answer. record: names the place in an
    error message."""
    try:
        ids, _ = tokenizer.render(messages, record.tools, add_generation_prompt=True)
    except TemplateError as error:
        raise refused(record, error) from None
    check_length(model, record, ids)
    return ids


def check_length(model: Transformer, record: Record, ids: list[int]) -> None:
    """Raises UserError if a prompt has too many tokens for the model."""
    limit = model.max_positions
    # The answer needs a position of its own.
    if len(ids) >= limit:
        raise UserError(
            f"{record.where}: {len(ids):,} tokens before the answer; the model takes {limit:,};"
            " shorten it, or leave it out"
        )


def encode_prompts(
    model: Transformer, tokenizer: Tokenizer, prompts: list[Prompt]
) -> list[np.ndarray]:
    """Returns the ids of each prompt, int32. Raises UserError naming the record that the template
    refuses, or that is too long."""
    encoded = []
    bar = progress("tokenizing", len(prompts), "prompt")
    with bar:
        for start in range(0, len(prompts), PROMPTS_AT_ONCE):
            some = prompts[start : start + PROMPTS_AT_ONCE]
            for prompt, ids in zip(some, encode_some(tokenizer, some), strict=True):
                check_length(model, prompt.record, ids)
                encoded.append(np.array(ids, np.int32))
            bar.update(len(some))
    return encoded


def encode_some(tokenizer: Tokenizer, prompts: list[Prompt]) -> Iterator[list[int]]:
    """Yields the ids of each prompt. Of all or of none a text is to be continued."""
    if prompts[0].messages is None:
        for prompt in prompts:
            yield tokenizer.encode(prompt.text, bos=tokenizer.adds_bos)
        return
    conversations = [(prompt.messages, prompt.record.tools) for prompt in prompts]
    # Many at a time, since each time waits for the template's process.
    chats = tokenizer.render_each(conversations, add_generation_prompt=True)
    for prompt, chat in zip(prompts, chats, strict=True):
        if isinstance(chat, UserError):
            raise refused(prompt.record, chat)
        yield chat.ids


def refused(record: Record, error: UserError) -> UserError:
    """Returns the error of a template, with the record that it refuses."""
    return UserError(f"{record.where}: {console.one_line(str(error), 200)}")


def note_hidden_tools(tokenizer: Tokenizer, prompts: list[Prompt]) -> None:
    """Says on stderr how many prompts have tools that the model does not see, if there are such."""
    num_hidden = hidden_tools(tokenizer, prompts)
    if num_hidden:
        print_stderr(
            f"NOTE: {num_hidden:,} of {len(prompts):,} prompts have tools, and chat template {tokenizer.template_name}"
            " does not show them to the model"
        )


def hidden_tools(tokenizer: Tokenizer, prompts: list[Prompt]) -> int:
    """Returns how many prompts have tools, if the chat template does not show those of the first one;
    0 if it does."""
    with_tools = [each for each in prompts if each.messages is not None and each.record.tools]
    for prompt in with_tools[:1]:
        shown, _ = tokenizer.render(prompt.messages, prompt.record.tools, True)
        try:
            without, _ = tokenizer.render(prompt.messages, None, True)
        except TemplateError:
            # A template that insists on tools shows them.
            return 0
        if shown == without:
            return len(with_tools)
    return 0


# ---- a file of answers ----


def answer_into_file(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: list[Prompt],
    settings: AnswerSettings,
    file: AnswerFile,
    batch_size: int,
    origin: dict,
    stop_texts: tuple[str, ...] = (),
) -> None:
    """Answers every prompt, and says on stderr what was done; goes on where an earlier run was
    stopped.

    origin: what the answers depend on besides, as JSON has it: model, adapter, dtype.
    stop_texts: an answer ends before the first of them.
    Raises UserError naming the record that can't be answered, before any is; or where memory runs
    out. Ctrl-C ends the program with exit code 130.
    """
    encoded = encode_prompts(model, tokenizer, prompts)
    note_hidden_tools(tokenizer, prompts)
    is_random = settings.temperature > 0
    new_seed = secrets.randbelow(1 << 31) if is_random else None
    digest = prompts_digest(prompts, encoded, tokenizer)
    known = {"prompts": digest, **origin, **settings._asdict()}
    file.begin(known | {"batch_size": batch_size}, new_seed)
    total = len(prompts) * settings.samples
    if file.places:
        print_stderr(f"resume    {so_far(file, total)}")
    if is_random and settings.seed is None:
        settings = settings._replace(seed=file.settings["seed"])
        print_stderr(f"seed      {settings.seed}, a random one; --seed {settings.seed} repeats it")

    start = time.perf_counter()
    try:
        num_tokens = answer_prompts(
            model, tokenizer, prompts, encoded, settings, file, batch_size, stop_texts
        )
    except KeyboardInterrupt:
        print_stderr(f"\nstopped: {so_far(file, total)}; the same command goes on from there")
        raise SystemExit(130) from None
    except torch.OutOfMemoryError:
        raise UserError(
            f"out of memory at --batch-size {batch_size}: {so_far(file, total)}; the same command"
            " with a smaller one goes on from there"
        ) from None
    seconds = time.perf_counter() - start
    file.finish()
    num_cut = sum(place.finish == "length" for place in file.places.values())
    print_stderr(
        f"{file.out}: {total:,} answers; {num_tokens:,} tokens in {seconds:,.1f} s"
        f" ({num_tokens / seconds:,.0f} tokens/s)"
    )
    if num_cut:
        print_stderr(
            f"NOTE: {num_cut:,} of {total:,} answers were cut off at --max-new-tokens"
            f" {settings.max_new_tokens}, or at the model's last position; they have"
            ' "finish": "length"'
        )


def so_far(file: AnswerFile, total: int) -> str:
    """Returns how many answers are where."""
    return f"{len(file.places):,} of {total:,} answers are in {file.partial}"


def answer_prompts(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: list[Prompt],
    encoded: list[np.ndarray],
    settings: AnswerSettings,
    file: AnswerFile,
    batch_size: int,
    stop_texts: tuple[str, ...] = (),
) -> int:
    """Answers the prompts that have no answer in `file` yet, and writes each batch into it.

    encoded: as encode_prompts returns them. file: after `begin`.
    stop_texts: an answer ends before the first of them.
    Returns the number of tokens that were generated.
    """
    # Answer i is sample i % samples of prompt i // samples. Those of one prompt come together, and
    # its tokens go through the layers once for all of them in a batch.
    samples = settings.samples
    rows = [ids for ids in encoded for _ in range(samples)]
    keys = [(i // samples + 1, i % samples + 1) for i in range(len(rows))]
    seeds = None
    if settings.seed is not None:
        seeds = [seed_of(settings.seed, *key) for key in keys]
    # The longest first: what does not fit into memory shows at once, and time is not underrated.
    batches = prompt_batches([len(row) for row in rows], batch_size, longest_first=True)
    answered = [i for i, key in enumerate(keys) if key in file.places]
    batches = unanswered(batches, set(answered), file.settings["batch_size"] == batch_size)

    decoding = settings.drawing()
    has_ended = None
    if stop_texts:

        def has_ended(ids: list[int]) -> bool:
            # A stop text has at most so many tokens as bytes, and begins inside one.
            text = tokenizer.decode(ids[-STOP_TOKENS:], skip_special=True)
            return any(stop in text for stop in stop_texts)

    num_tokens = 0
    start = time.perf_counter()
    num_waiting = sum(len(batch) for batch in batches)
    bar = progress("answering", len(rows), "answer", done=len(rows) - num_waiting)
    with bar:
        for batch, generated in generate_batches(
            model,
            rows,
            batches,
            settings.max_new_tokens,
            seeds,
            has_ended,
            stop=tokenizer.stop_ids,
            **decoding,
        ):
            answers = []
            for i, ids in zip(batch, generated, strict=True):
                finish = "stop" if ids[-1] in tokenizer.stop_ids else "length"
                prompt = prompts[i // samples]
                line, finish = answer_line(
                    prompt, keys[i], samples, tokenizer, len(rows[i]), ids, finish, stop_texts
                )
                answers.append((keys[i], line, finish))
                num_tokens += len(ids)
            file.write(answers)
            speed = num_tokens / (time.perf_counter() - start)
            bar.set_postfix_str(f"{speed:,.0f} tokens/s", refresh=False)
            bar.update(len(batch))
    return num_tokens


def unanswered(batches: list[list[int]], answered: set[int], same_batches: bool) -> list[list[int]]:
    """Returns the batches without those that are answered.

    same_batches: the answers there were generated in the same batches. Then a batch of which some
    are missing, since a power cut tore it apart, is generated as a whole: in a smaller batch, the
    others would be rounded otherwise.
    """
    waiting = []
    for batch in batches:
        missing = [i for i in batch if i not in answered]
        if missing:
            waiting.append(batch if same_batches else missing)
    return waiting


def seed_of(seed: int, record: int, sample: int) -> int:
    """Returns the seed of one answer, 63 bits that follow from the three numbers."""
    digest = hashlib.sha256(f"{seed} {record} {sample}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def answer_line(
    prompt: Prompt,
    key: tuple[int, int],
    samples: int,
    tokenizer: Tokenizer,
    prompt_tokens: int,
    ids: list[int],
    finish: str,
    stop_texts: tuple[str, ...] = (),
) -> tuple[str, str]:
    """Returns the line of an answer: a record that train.py, evaluate.py and generate.py read, with
    what else is known of it; and how it ended.

    key: (record, sample). ids: what was generated, with the stop id that ended it.
    """
    text_ids = ids[:-1] if finish == "stop" else ids
    # A space at the beginning of a continuation belongs to the text.
    begins_text = prompt.messages is not None
    text = "".join(tokenizer.stream(text_ids, skip_special=True, first=begins_text))
    ends = [text.find(stop) for stop in stop_texts if stop in text]
    if ends:
        text = text[: min(ends)]
        finish = "stop"
    record, sample = key
    fields: dict = {"record": record, "source": prompt.place}
    if prompt.record.id is not None:
        fields["id"] = prompt.record.id
    if samples > 1:
        fields["sample"] = sample
    fields |= question_fields(prompt)
    if prompt.messages is None:
        fields["completion"] = text
    else:
        fields["messages"] = [*prompt.messages, {"role": "assistant", "content": text}]
    if prompt.reference is not None:
        fields["reference"] = prompt.reference.get("content") or ""
        if prompt.reference.get("tool_calls"):
            fields["reference_tool_calls"] = prompt.reference["tool_calls"]
    if prompt.record.references is not None:
        fields["references"] = prompt.record.references
    fields |= {"finish": finish, "prompt_tokens": prompt_tokens, "answer_tokens": len(ids)}
    return to_exact_json(fields, ensure_ascii=False) + "\n", finish


def question_fields(prompt: Prompt) -> dict:
    """Returns what a line says of its prompt: the text, or the messages without an answer and the
    tools."""
    if prompt.messages is None:
        return {"prompt": prompt.text}
    fields: dict = {"messages": prompt.messages}
    if prompt.record.tools:
        fields["tools"] = prompt.record.tools
    return fields


def prompts_digest(prompts: list[Prompt], encoded: list[np.ndarray], tokenizer: Tokenizer) -> str:
    """Returns a hash of all that the lines say of the prompts, of their tokens, and of the ids that
    end an answer."""
    digest = hashlib.sha256(repr(sorted(tokenizer.stop_ids)).encode())
    for prompt, ids in zip(prompts, encoded, strict=True):
        known = [question_fields(prompt), prompt.place, prompt.record.id, prompt.reference]
        if prompt.record.references is not None:
            known.append(prompt.record.references)
        digest.update(to_exact_json(known).encode())
        digest.update(np.int64(len(ids)).tobytes())
        digest.update(ids.tobytes())
    return digest.hexdigest()
