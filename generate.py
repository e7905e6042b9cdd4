"""Chats with a model at the terminal, answers one prompt or a file of them, or continues texts.

    python generate.py --adapter runs/1/final                     chat; /reset forgets, /quit or Ctrl-D ends
    python generate.py --adapter red=runs/1/final blue=runs/2/final       two on one base; /adapter blue switches
    python generate.py --prompt "Name three rivers." --seed 1 --temperature 0.7
    cat draft.txt | python generate.py --complete                 all of stdin is one prompt
    python generate.py --data prompts.jsonl --out answers.jsonl   many, in batches; evals/batch_answers.py

An answer is printed while it is generated, a character as soon as all its bytes are there. Only the
answer goes to stdout; the lines that say what was loaded go to stderr. Control characters in an
answer, other than newline and tab, are not printed: a text that a model writes must not control the
terminal.
"""

from common.errors import run
from common.script_flags import ANSWERS_AT_ONCE, generation_arguments
from common.threads import choose_wait_policy

if __name__ == "__main__":
    # This is read when torch is loaded.
    choose_wait_policy()
    # --help and a mistake in a flag are answered here: what is imported below takes seconds.
    run(generation_arguments)

import argparse
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

import adapter_files
import methods
from adapting.score_head import require_lm_head
from checkpoint import fingerprint, load_model, read_config
from common.console import print_stderr
from common.device import pick_device, pick_dtype
from common.errors import UserError
from common.files import file_sha256
from common.remote_names import is_remote
from dataset.folders import TEST
from dataset.formats import Map
from dataset.prompts import open_prompts, read_prompts
from evals.answer_file import AnswerFile
from evals.batch_answers import AnswerSettings, answer_into_file
from interop import resolve
from interop.remote_data import fetch_data
from interop.resolve import base_folder
from model import Transformer
from tokenizer import Tokenizer


def main() -> None:
    args = generation_arguments()
    device = pick_device(args.device)
    dtype, reason = pick_dtype(args.dtype, device)
    if args.data is not None:
        answer_data(args, device, dtype, reason)
        return
    prompt = args.prompt
    if prompt is None and not sys.stdin.isatty():
        # Bytes that are not UTF-8 become surrogates, which check_prompt refuses in one line.
        piped = sys.stdin.buffer.read().decode(errors="surrogateescape")
        prompt = piped.removesuffix("\n")
    # Before the model is loaded, which takes longer.
    if prompt is not None:
        check_prompt(prompt)
        if len(args.adapter or []) > 1:
            raise UserError(
                "--adapter: one prompt takes one; run it once for each, or start a chat, where"
                " /adapter NAME switches"
            )

    is_chat = prompt is None
    model, adapters, name = load_model_and_adapters(args, device, dtype, can_switch=is_chat)
    print_stderr(f"{name}, {describe_computation(args, device, dtype, reason, adapters)}")
    if is_chat:
        chat(model, adapters, args)
    else:
        messages = first_messages(args, prompt, adapters.tokenizer.system)
        print_answer(answer(model, adapters.tokenizer, messages, args))


def describe_computation(
    args: argparse.Namespace,
    device: torch.device,
    dtype: torch.dtype,
    reason: str,
    adapters: "AdapterSet",
) -> str:
    """Returns dtype, device and chat template in words. reason: of the dtype."""
    template = f"chat template {adapters.tokenizer.template_name}"
    template += resolve.date_note(adapters.tokenizer, adapters.folder)
    template += resolve.system_note(adapters.tokenizer, adapters.folder)
    if args.complete:
        template = "no chat template, raw text"
    dtype_name = str(dtype).removeprefix("torch.")
    return f"{dtype_name} on {device.type} ({reason}), {template}"


# ---- the model and its adapters ----


class LoadedAdapter(NamedTuple):
    """An adapter in memory, off the model.

    layers: its layers by name, as adapter_files.remove_adapter returns them.
    tokenizer: the one that it was trained with.
    """

    layers: dict
    tokenizer: Tokenizer


@dataclass
class AdapterSet:
    """Several adapters of one base model, of which at most one is on the model."""

    model: Transformer
    by_name: dict[str, LoadedAdapter]  # "" stands for no adapter
    merge: bool  # the adapter on the model is added to its weights
    folder: str | Path  # that of the first adapter, or of the model without one
    can_switch: bool  # another adapter may follow, so that a merge must be undone exactly
    active: str = ""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the adapter that is on the model."""
        return self.by_name[self.active].tokenizer

    @property
    def names(self) -> list[str]:
        """The names of the adapters."""
        return [name for name in self.by_name if name]

    def switch(self, name: str) -> None:
        """Takes the active adapter off the model and puts the one called `name` on; "" means none.

        Raises UserError where there is no such adapter.
        """
        if name not in self.by_name:
            choices = ", ".join([*self.names, "none"])
            raise UserError(
                f"/adapter {name}: there is no adapter with this name; choose one of {choices}"
            )
        # The base gets its own weights back before another adapter is added to them.
        if self.merge and self.active:
            adapter_files.unmerge(self.model)
        adapter_files.remove_adapter(self.model)
        self.active = name
        adapter_files.put_back(self.model, self.by_name[name].layers)
        if self.merge and name:
            adapter_files.merge(self.model, keep=self.can_switch)


def load_model_and_adapters(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype, can_switch: bool
) -> tuple[Transformer, AdapterSet, str]:
    """Loads the base model and the adapters of --adapter. can_switch: /adapter may ask for another
    one later.

    Returns the model with the first adapter on it, all adapters, and a text that names what was
    loaded.
    Raises UserError where two adapters have the same name.
    """
    words = args.adapter or []
    named_folders = [split_adapter_name(word) for word in words]
    first_name = ""
    first_folder = None
    if named_folders:
        first_name, first_folder = named_folders[0]
    # Without --model, the first adapter brings the base.
    base = base_folder(args.model, first_folder, print_stderr)
    config = read_config(base)
    require_lm_head(base, config, first_folder)
    for _, folder in named_folders:
        require_lm_head(base, config, folder)
    model = load_model(base, dtype, device, args.quant)
    adapters = AdapterSet(model, {}, args.merge, first_folder or base, can_switch)
    for name, folder in named_folders:
        if name in adapters.by_name:
            raise UserError(f"--adapter: two are called {name}; give them names, as red={folder}")
        methods.put_adapter_on(model, folder, print_stderr)
        layers = adapter_files.remove_adapter(model)
        tokenizer = resolve.pick_tokenizer(
            base, folder, args.template, args.date, system=args.system
        )
        adapters.by_name[name] = LoadedAdapter(layers, tokenizer)
    # A tokenizer takes seconds to load, and a single answer needs only one.
    if can_switch or not named_folders:
        # As of the adapters, so that /adapter changes nothing else.
        day = args.date or resolve.trained_day(adapters.folder)
        system = args.system
        if system is None:
            system = resolve.trained_system(adapters.folder)
        tokenizer = resolve.pick_tokenizer(base, None, args.template, day, system=system)
        adapters.by_name[""] = LoadedAdapter({}, tokenizer)
    adapters.switch(first_name)

    description = str(base)
    if first_folder is not None:
        description += f" + {first_folder}"
        if args.merge:
            description += " (merged)"
    return model, adapters, description


def split_adapter_name(word: str) -> tuple[str, str]:
    """Returns (name, folder) of NAME=DIR, or of DIR alone.

    DIR alone is called like its folder; final/ and best/ of a run are called like the run's folder.
    Raises UserError where either side of the equals sign is empty.
    """
    name, equals, folder = word.partition("=")
    # A folder may have an equals sign in its own name.
    if equals and not Path(word).exists():
        if not name or not folder:
            raise UserError(f"--adapter {word}: NAME=DIR or DIR is wanted")
        return name, folder
    path = Path(word).resolve()
    if path.name in ("final", "best"):
        path = path.parent
    return path.name, word


# ---- a file of prompts ----


def answer_data(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype, reason: str
) -> None:
    """Answers every prompt of --data and writes --out; goes on where an earlier run was stopped.

    reason: of the dtype, in words.
    Raises UserError naming the record that can't be answered, before any is.
    """
    # Before the model is loaded, which takes longer.
    file = open_answer_file(args)
    data = fetch_data(args.data, TEST)
    source = open_prompts(data, Map(args.map) if args.map else None, args.skip_bad)
    system = args.system
    if system is None:
        trained: str | Path = base_folder(args.model, None)
        if args.adapter:
            _, trained = split_adapter_name(args.adapter[0])
        system = resolve.trained_system(trained)
    prompts = read_prompts(source, args.complete, system, args.limit, print_stderr)
    model, adapters, name = load_model_and_adapters(args, device, dtype, can_switch=False)
    computation = describe_computation(args, device, dtype, reason, adapters)
    print_stderr(f"model     {name}, {computation}")
    origin = {
        "model": fingerprint(model.source),
        "adapter": adapter_sha256(args.adapter[0]) if args.adapter else None,
        "quant": args.quant,
        "merge": args.merge,
        "dtype": str(dtype).removeprefix("torch."),
    }
    settings = AnswerSettings(
        args.samples or 1,
        args.seed,
        args.max_new_tokens,
        args.temperature,
        args.top_k,
        args.top_p,
        args.min_p,
        args.repetition_penalty,
    )
    batch_size = args.batch_size or ANSWERS_AT_ONCE
    tokenizer = adapters.tokenizer
    with file:
        answer_into_file(model, tokenizer, prompts, settings, file, batch_size, origin)


def open_answer_file(args: argparse.Namespace) -> AnswerFile:
    """Returns the file of --out. Raises UserError where it can't be written, or would be read as
    part of --data."""
    out = Path(args.out)
    if out.suffix not in (".jsonl", ".ndjson"):
        raise UserError(f"--out {out}: is written as JSON lines; give a name that ends in .jsonl")
    if is_remote(args.data):
        return AnswerFile(out, args.overwrite)
    data = Path(args.data).resolve()
    if out.resolve() == data:
        raise UserError(f"--out {out}: is the file of --data, which it would replace")
    if data.is_dir() and out.resolve().is_relative_to(data):
        raise UserError(f"--out {out}: would be in the folder of --data, and be read with it later")
    return AnswerFile(out, args.overwrite)


def adapter_sha256(folder: str) -> str:
    """Returns the hash of an adapter's weights. folder: a word of --adapter."""
    _, folder = split_adapter_name(folder)
    return file_sha256(adapter_files.weights_file(folder))


# ---- conversations ----


def chat(model: Transformer, adapters: AdapterSet, args: argparse.Namespace) -> None:
    """Answers what is typed, with all messages before it as context; with --complete, each line
    without context."""
    print_stderr("/reset forgets, /quit or Ctrl-D ends, Ctrl-C stops an answer")
    if args.adapter:
        choices = ", ".join(adapters.names)
        print_stderr(f"/adapter NAME switches to another adapter: {choices} or none")
    history: list[dict[str, str]] = []
    while True:
        try:
            typed = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            # The Ctrl-C was meant for an answer that had just ended.
            print()
            continue
        command, _, argument = typed.partition(" ")
        if typed == "":
            continue
        if typed == "/quit":
            return
        if typed == "/reset":
            history = []
            continue
        try:
            if command == "/adapter":
                switch_adapter(adapters, argument.strip())
                continue
            check_prompt(typed)
            if args.complete or not history:
                messages = first_messages(args, typed, adapters.tokenizer.system)
            else:
                messages = [*history, {"role": "user", "content": typed}]
            parts = answer(model, adapters.tokenizer, messages, args)
            text = print_answer(parts, stoppable=True)
        except UserError as error:
            # The conversation may have become too long. It stays as it was, and /reset helps.
            print_stderr(f"error: {error}")
            continue
        # With --complete, each line is a text by itself.
        if isinstance(messages, list):
            history = [*messages, {"role": "assistant", "content": text}]


def switch_adapter(adapters: AdapterSet, name: str) -> None:
    """Carries out /adapter NAME: switches, where a name is given, and says which adapter is on the
    model."""
    if name == "none":
        adapters.switch("")
    elif name:
        adapters.switch(name)
    active = adapters.active or "none"
    print_stderr(f"adapter: {active}; the conversation continues")


def first_messages(
    args: argparse.Namespace, prompt: str, system: str
) -> list[dict[str, str]] | str:
    """Returns the messages that begin a conversation: the system message, if there is one, and the
    prompt. With --complete, the prompt as it is."""
    if args.complete:
        return prompt
    messages = [{"role": "user", "content": prompt}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return messages


def answer(
    model: Transformer,
    tokenizer: Tokenizer,
    messages: list[dict[str, str]] | str,
    args: argparse.Namespace,
) -> Iterator[str]:
    """Yields the answer in parts while it is generated; no part ends inside a character.

    messages: a conversation whose last message is the user's, or a text to continue.
    """
    if isinstance(messages, str):
        prompt = tokenizer.encode(messages, bos=tokenizer.adds_bos)
        # A space at the beginning of a continuation belongs to the text.
        begins_text = False
    else:
        prompt, _ = tokenizer.render(messages, add_generation_prompt=True)
        begins_text = True
    steps = model.stream(
        [prompt],
        args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=args.seed,
        repetition_penalty=args.repetition_penalty,
        stop=tokenizer.stop_ids,
        lookup=args.lookup,
    )

    def answer_ids() -> Iterator[int]:
        for step in steps:
            # A step holds (number of the prompt, id) of each prompt that is not finished; here
            # there is one prompt.
            _, id = step[0]
            if id not in tokenizer.stop_ids:
                yield id

    return tokenizer.stream(answer_ids(), skip_special=True, first=begins_text)


def print_answer(parts: Iterator[str], stoppable: bool = False) -> str:
    """Prints the parts as they come, and a line end.

    stoppable: Ctrl-C ends the answer and not the program.
    Returns the text, up to Ctrl-C, with the control characters that are not printed.
    """
    text = ""
    try:
        for part in parts:
            text += part
            printed = "".join(c for c in part if is_printed(c))
            print(printed, end="", flush=True)
    except KeyboardInterrupt:
        if not stoppable:
            raise
    print()
    return text


def is_printed(character: str) -> bool:
    """False for a control character that could move the cursor or send codes to the terminal."""
    return character in "\n\t" or unicodedata.category(character) != "Cc"


def check_prompt(prompt: str) -> None:
    """Raises UserError for a prompt that is empty or not UTF-8."""
    if not prompt.strip():
        raise UserError("the prompt is empty: give --prompt TEXT, or type one")
    # Python stands a lone surrogate in the place of a byte that is not UTF-8.
    if any("\ud800" <= c <= "\udfff" for c in prompt):
        raise UserError("the prompt is not UTF-8 text; save or type it as UTF-8")


if __name__ == "__main__":
    run(main)
