"""Chats with a model at the terminal, answers one prompt, or continues a text.

    python generate.py --adapter runs/1/final                     chat; /reset forgets, /quit or Ctrl-D ends
    python generate.py --adapter red=runs/1/final blue=runs/2/final       two on one base; /adapter blue switches
    python generate.py --prompt "Name three rivers." --seed 1 --temperature 0.7
    cat draft.txt | python generate.py --complete                 all of stdin is one prompt

An answer is printed while it is generated, a character as soon as all its bytes are there. Only the
answer goes to stdout; the lines that say what was loaded go to stderr. Control characters in an
answer, other than newline and tab, are not printed: a text that a model writes must not control the
terminal.
"""

import argparse
import math
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

import lora
from checkpoint import load_model
from common import cli
from common.console import print_stderr
from common.device import pick_device, pick_dtype
from common.errors import UserError, run
from interop import resolve
from interop.resolve import base_folder
from model import Transformer
from tokenizer import Tokenizer

MAX_NEW_TOKENS = 256  # the default of --max-new-tokens
LOOKUP_LIMIT = 1000  # --lookup must be below it


def main() -> None:
    args = generation_arguments()
    device = pick_device(args.device)
    dtype, reason = pick_dtype(args.dtype, device)
    prompt = args.prompt
    if prompt is None and not sys.stdin.isatty():
        # Bytes that are not UTF-8 become surrogates, which check_prompt refuses in one line.
        piped = sys.stdin.buffer.read().decode(errors="surrogateescape")
        prompt = piped.removesuffix("\n")
    # Before the model is loaded, which takes longer.
    if prompt is not None:
        check_prompt(prompt)

    is_chat = prompt is None
    model, adapters, name = load_model_and_adapters(args, device, dtype, can_switch=is_chat)
    tokenizer = adapters.tokenizer
    template = f"chat template {tokenizer.template_name}"
    template += resolve.date_note(tokenizer, adapters.folder)
    template += resolve.system_note(tokenizer, adapters.folder)
    if args.complete:
        template = "no chat template, raw text"
    dtype_name = str(dtype).removeprefix("torch.")
    print_stderr(f"{name}, {dtype_name} on {device.type} ({reason}), {template}")
    if is_chat:
        chat(model, adapters, args)
    else:
        messages = first_messages(args, prompt, tokenizer.system)
        print_answer(answer(model, tokenizer, messages, args))


# ---- the model and its adapters ----


class LoadedAdapter(NamedTuple):
    """An adapter in memory, off the model.

    layers: its layers by name, as lora.remove_lora returns them.
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
            lora.unmerge(self.model)
        lora.remove_lora(self.model)
        self.active = name
        lora.restore_lora(self.model, self.by_name[name].layers)
        if self.merge and name:
            lora.merge(self.model, keep=self.can_switch)


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
    model = load_model(base, dtype, device, args.quant)
    adapters = AdapterSet(model, {}, args.merge, first_folder or base, can_switch)
    for name, folder in named_folders:
        if name in adapters.by_name:
            raise UserError(f"--adapter: two are called {name}; give them names, as red={folder}")
        lora.put_adapter_on(model, folder, print_stderr)
        layers = lora.remove_lora(model)
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


# ---- the command line ----


def generation_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line. Raises UserError naming the flag that is wrong."""
    parser = argparse.ArgumentParser(
        prog="generate.py",
        description="Chats with a model at the terminal, answers one prompt (--prompt), or continues a text"
        " (--complete).",
        allow_abbrev=False,
    )
    add_base_flags(parser)
    add_prompt_flags(parser)
    add_sampling_flags(parser)
    add_speed_flags(parser)
    args = cli.parse_args(parser, argv)
    check_generation_arguments(args)
    return args


def add_base_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the help group of the model and its adapters."""
    group = parser.add_argument_group("the model")
    # It only adds arguments, which a group can do as well as a parser.
    resolve.add_model_flags(group, several=True)  # type: ignore[arg-type]
    group.add_argument(
        "--merge",
        action="store_true",
        help="add the adapter to the base's weights, rounded to --dtype: answers come faster and"
        " may differ a little. The merged weights of a base in 4 bits (--quant) are in --dtype,"
        " and take its memory; default: the adapter is computed beside the weights",
    )


def add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the help group of what is answered."""
    group = parser.add_argument_group("what is answered")
    group.add_argument(
        "--prompt",
        metavar="TEXT",
        help="answer this text, and end; default: the text that is piped in, all of it as one"
        " prompt; without one, a chat, where each answer sees what was said before",
    )
    group.add_argument(
        "--system",
        metavar="TEXT",
        help="system message: instructions before the conversation; '': none; default: the one that"
        " the model or adapter was trained with here (train.py --system), else that of the chat"
        " template, if it has one",
    )
    group.add_argument(
        "--complete",
        action="store_true",
        help="continue the text as it stands, without a chat template, for models that were"
        " trained on plain text; in a chat, each line is then continued by itself; default: the"
        " text is the message of a user",
    )


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the help group of how an answer's tokens are chosen, and how many."""
    group = parser.add_argument_group("how it is answered")
    group.add_argument(
        "--max-new-tokens",
        type=int,
        default=MAX_NEW_TOKENS,
        metavar="N",
        help="longest answer, in tokens; default: %(default)s. Raise it if answers break off",
    )
    group.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0: always take the most probable token, so that a prompt has one answer; above 0:"
        " draw each token at random; 1: by the model's own probabilities; lower values give more"
        " predictable texts, higher values more varied ones; default: 0. Raise it (0.7 is common)"
        " where several answers are good",
    )
    group.add_argument(
        "--top-k",
        type=int,
        default=0,
        metavar="K",
        help="draw from the K most probable tokens only, which avoids odd words; 0: from all;"
        " needs --temperature above 0; default: 0",
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the most probable tokens only, as many as have the probability P together"
        " (nucleus sampling); above 0 and at most 1, which is all tokens; needs --temperature"
        " above 0; default: 1",
    )
    group.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="make tokens that the text already holds less probable: their positive logits are"
        " divided by R, negative ones multiplied; 1: no change; default: 1. Raise it a little if"
        " the model repeats itself",
    )
    group.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="seed of the random draws: with the same one, an answer can be repeated; needs"
        " --temperature above 0; default: none, other draws each time",
    )


def add_speed_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the help group of what changes the speed alone."""
    group = parser.add_argument_group("speed")
    group.add_argument(
        "--lookup",
        type=int,
        default=0,
        metavar="N",
        help="speculative decoding by prompt look-up: guess up to N tokens from what followed the"
        " same words earlier in the text, and check them all at once; 0: no guesses, at most"
        f" {LOOKUP_LIMIT - 1}; default: 0. The answer is the same, and comes faster where it"
        " repeats the prompt (a corrected text, code); for --temperature 0 only",
    )


def check_generation_arguments(args: argparse.Namespace) -> None:
    """Raises UserError for a number out of its range, and for flags that exclude each other."""
    penalty = args.repetition_penalty
    lookup_is_valid = 0 <= args.lookup < LOOKUP_LIMIT
    lookup_rule = f"must be 0 (no guesses) or more, and below {LOOKUP_LIMIT}"
    # The comparisons are also false for NaN, which argparse takes for a float.
    rules = [
        ("--max-new-tokens", args.max_new_tokens, args.max_new_tokens >= 1, "must be 1 or more"),
        ("--temperature", args.temperature, 0 <= args.temperature < math.inf, "must be 0 or more"),
        ("--top-k", args.top_k, args.top_k >= 0, "must be 0 (all) or more"),
        ("--top-p", args.top_p, 0 < args.top_p <= 1, "must be above 0 and at most 1"),
        ("--lookup", args.lookup, lookup_is_valid, lookup_rule),
        ("--repetition-penalty", penalty, 0 < penalty < math.inf, "must be above 0"),
    ]
    for flag, value, is_valid, rule in rules:
        if not is_valid:
            raise UserError(f"{flag} {value}: {rule}")

    only_for_sampling = {
        "--top-k": args.top_k != 0,
        "--top-p": args.top_p != 1,
        "--seed": args.seed is not None,
    }
    for flag, is_given in only_for_sampling.items():
        if is_given and args.temperature == 0:
            raise UserError(f"{flag}: is for sampling; add --temperature 1")
    if args.lookup and args.temperature:
        raise UserError("--lookup: is for greedy answers, at --temperature 0")
    if args.merge and not args.adapter:
        raise UserError("--merge: there is no --adapter to merge")
    only_for_conversations = {"--template": args.template, "--system": args.system}
    for flag, value in only_for_conversations.items():
        if args.complete and value:
            raise UserError(f"{flag}: is for conversations; --complete continues plain text")


if __name__ == "__main__":
    run(main)
