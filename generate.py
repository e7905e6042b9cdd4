"""Chat with a model at the terminal, or let it answer or go on once.

    python generate.py --adapter runs/1/final                     chat; /reset forgets, /quit or Ctrl-D ends
    python generate.py --adapter red=runs/1/final blue=runs/2/final       two on one base; /adapter blue switches
    python generate.py --prompt "Name three rivers." --seed 1 --temperature 0.7
    cat draft.txt | python generate.py --complete                 all of stdin is one prompt

What the model says streams as it comes, a character as soon as all its bytes are there. The answer alone goes to
stdout; what was loaded, to stderr. Control characters in an answer (but newline and tab) are dropped: text from a model
must not drive the terminal.
"""

import argparse
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import lora
from checkpoint import load_model
from common import cli
from common.device import pick_device, pick_dtype
from common.errors import UserError, run
from interop import resolve
from interop.resolve import base_folder
from model import Transformer
from tokenizer import Tokenizer


def main() -> None:
    args = arguments()
    device = pick_device(args.device)
    dtype, why = pick_dtype(args.dtype, device)
    prompt = args.prompt
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.buffer.read().decode(errors="surrogateescape").removesuffix("\n")
    if prompt is not None:
        check_prompt(prompt)
    model, adapters, name = load(args, device, dtype, prompt is None)
    tokenizer = adapters.tokenizer
    template = "no template, raw text" if args.complete else f"template {tokenizer.template_name}"
    log(f"{name}, {str(dtype).removeprefix('torch.')} on {device.type} ({why}), {template}")
    if prompt is None:
        chat(model, adapters, args)
    else:
        print_answer(answer(model, tokenizer, opening(args, prompt), args))


@dataclass
class Adapters:
    """Several adapters on one base, of which one, or none (""), is on it."""

    model: Transformer
    held: dict[str, tuple[dict, Tokenizer]]  # by name: the layers, and the tokenizer that goes with them
    merge: bool  # while it is on, an adapter is a part of the weights
    switches: bool  # another one may be asked for
    on: str = ""

    @property
    def tokenizer(self) -> Tokenizer:
        return self.held[self.on][1]

    def switch(self, name: str) -> None:
        if name not in self.held:
            raise UserError(
                f"/adapter {name}: no such adapter; there are {', '.join(filter(None, self.held))} and none"
            )
        if self.merge and self.on:
            lora.unmerge(self.model)
        lora.remove_lora(self.model)
        self.on = name
        lora.restore_lora(self.model, self.held[name][0])
        if self.merge and name:
            lora.merge(self.model, keep=self.switches)


def load(args, device: torch.device, dtype: torch.dtype, switches: bool) -> tuple[Transformer, Adapters, str]:
    """The base, its adapters with the first one on, and a name for what was loaded."""
    named = [name_adapter(typed) for typed in args.adapter or []]
    folder = base_folder(args.model, named[0][1] if named else None, log)
    adapters = Adapters(load_model(folder, dtype, device, args.quant), {}, args.merge, switches)
    for name, path in named:
        if name in adapters.held:
            raise UserError(f"--adapter: two are called {name}; give them names, as red={path}")
        lora.put_adapter_on(adapters.model, path, log)
        layers = lora.remove_lora(adapters.model)
        adapters.held[name] = layers, resolve.pick_tokenizer(folder, path, args.template)
    if switches or not named:  # a tokenizer takes seconds, and a single answer needs one
        adapters.held[""] = {}, resolve.pick_tokenizer(folder, None, args.template)
    adapters.switch(named[0][0] if named else "")
    kind = " (merged)" if args.merge else ""
    return adapters.model, adapters, " + ".join([str(folder), *(f"{path}{kind}" for _, path in named[:1])])


def name_adapter(typed: str) -> tuple[str, str]:
    """(name, folder) of NAME=DIR, or of DIR: then its folder's name, of a run's final/ or best/ the run's."""
    name, equals, path = typed.partition("=")
    if equals and not Path(typed).exists():
        return name, path
    path = Path(typed).resolve()
    return (path.parent if path.name in ("final", "best") else path).name, typed


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def chat(model: Transformer, adapters: Adapters, args: argparse.Namespace) -> None:
    """Turn after turn with what was said before; with --complete, each line alone."""
    log("/reset forgets, /quit or Ctrl-D ends, Ctrl-C stops an answer")
    if args.adapter:
        log(f"/adapter NAME switches: {', '.join(filter(None, adapters.held))} or none")
    history: list[dict[str, str]] = []
    while True:
        try:
            typed = input("> ").strip()
        except EOFError:
            return print()
        except KeyboardInterrupt:  # meant for an answer that had just ended
            print()
            continue
        command, _, name = typed.partition(" ")
        if typed == "/quit":
            return
        if typed == "/reset" or not typed:
            history = [] if typed else history
            continue
        turns = opening(args, typed) if args.complete or not history else [*history, {"role": "user", "content": typed}]
        try:
            if command == "/adapter":
                if name:
                    adapters.switch("" if name.strip() == "none" else name.strip())
                log(f"adapter: {adapters.on or 'none'}; what was said before stays")
                continue
            check_prompt(typed)
            said = print_answer(answer(model, adapters.tokenizer, turns, args), stoppable=True)
        except UserError as error:  # too long by now, perhaps: the conversation stays as it was
            log(f"error: {error}")
            continue
        history = [] if args.complete else [*turns, {"role": "assistant", "content": said}]


def opening(args: argparse.Namespace, prompt: str) -> list[dict[str, str]] | str:
    """The first turns of a conversation, or the raw text."""
    if args.complete:
        return prompt
    system = [{"role": "system", "content": args.system}] if args.system else []
    return [*system, {"role": "user", "content": prompt}]


def answer(
    model: Transformer, tokenizer: Tokenizer, turns: list[dict[str, str]] | str, args: argparse.Namespace
) -> Iterator[str]:
    """Pieces of text as they are generated, none of which ends inside a character."""
    if isinstance(turns, str):
        prompt = tokenizer.encode(turns, bos=tokenizer.adds_bos)
    else:
        prompt, _ = tokenizer.render(turns, add_generation_prompt=True)
    settings = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "seed": args.seed}
    settings |= {"repetition_penalty": args.repetition_penalty, "stop": tokenizer.stop_ids, "lookup": args.lookup}
    new = (step[0][1] for step in model.stream([prompt], args.max_new_tokens, **settings))
    ids = (id for id in new if id not in tokenizer.stop_ids)
    return tokenizer.stream(ids, skip_special=True, first=not isinstance(turns, str))


def print_answer(pieces: Iterator[str], stoppable: bool = False) -> str:
    """Prints the pieces as they come and a line end; returns what was said, up to Ctrl-C if it may be stopped."""
    said = ""
    try:
        for piece in pieces:
            said += piece
            print("".join(c for c in piece if c in "\n\t" or unicodedata.category(c) != "Cc"), end="", flush=True)
    except KeyboardInterrupt:
        if not stoppable:
            raise
    print()
    return said


def check_prompt(prompt: str) -> None:
    if not prompt.strip():
        raise UserError("the prompt is empty: give --prompt TEXT, or type one")
    if any("\ud800" <= c <= "\udfff" for c in prompt):  # what bytes that are no UTF-8 become on a command line
        raise UserError("the prompt is no UTF-8 text; save or type it as UTF-8")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="generate.py", description="Chat, answer or go on.", allow_abbrev=False)
    resolve.add_model_flags(parser, several=True)
    add = parser.add_argument
    add("--merge", action="store_true", help="add the adapter to the weights: faster, rounded to their dtype")
    add("--prompt", metavar="TEXT", help="answer this and end (default: what is piped in, else a chat)")
    add("--system", metavar="TEXT", help="the system turn (default: the template's own)")
    add("--complete", action="store_true", help="go on with raw text, without the chat template")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="default: 256")
    add("--temperature", type=float, default=0.0, metavar="T", help="0, the default: always the likeliest token")
    add("--top-k", type=int, default=0, metavar="K", help="sample from the K likeliest (default: all)")
    add("--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest of mass P (default: 1)")
    add("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1 repeats less (default: 1)")
    add("--seed", type=int, metavar="N", help="makes sampling repeatable")
    add(
        "--lookup", type=int, default=0, metavar="N", help="guess N tokens ahead from the text: faster where it repeats"
    )
    args = cli.parse_args(parser, argv)
    rules = {
        "--max-new-tokens": (args.max_new_tokens >= 1, "must be 1 or more"),
        "--temperature": (0 <= args.temperature < float("inf"), "must be 0 or more"),
        "--top-k": (args.top_k >= 0, "must be 0 (all) or more"),
        "--top-p": (0 < args.top_p <= 1, "must be above 0 and at most 1"),
        "--lookup": (0 <= args.lookup < 1000, "must be 0 (no guesses) or more, and below 1000"),
        "--repetition-penalty": (0 < args.repetition_penalty < float("inf"), "must be above 0"),
    }
    for flag, (fine, rule) in rules.items():
        if not fine:
            raise UserError(f"{flag} {getattr(args, flag[2:].replace('-', '_'))}: {rule}")
    sampling = {"--top-k": args.top_k != 0, "--top-p": args.top_p != 1, "--seed": args.seed is not None}
    if args.temperature == 0 and any(sampling.values()):
        raise UserError(f"{next(flag for flag, on in sampling.items() if on)}: is for sampling; add --temperature 1")
    if args.lookup and args.temperature:
        raise UserError("--lookup: is for greedy answers, at --temperature 0")
    if args.merge and not args.adapter:
        raise UserError("--merge: there is no --adapter to merge")
    if args.complete and args.template:
        raise UserError("--template: means nothing to --complete, which takes raw text")
    if args.complete and args.system:
        raise UserError("--system: means nothing to --complete, which takes raw text")
    return args


if __name__ == "__main__":
    run(main)
