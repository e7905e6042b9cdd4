"""The options of generate.py and convert.py, and those of a model, which evaluate.py has too. (The rest
of its options are in evals/arguments.py, those of train.py in flags.py, those of data.py in
dataset/inspection.py.)

They stand apart from what they mean, so that --help and a mistake in a flag are answered before
torch is imported, which takes seconds.
"""

import argparse
import math
from pathlib import Path

from common import cli
from common.choices import (
    DTYPE_NAMES,
    GGUF_TYPES,
    QUANT_KINDS,
    STORAGE_DTYPE_NAMES,
    TEMPLATE_NAMES,
)
from common.errors import UserError
from common.known_names import GENERATE_NAMES

# generate.py
MAX_NEW_TOKENS = 256  # the default of --max-new-tokens
LOOKUP_LIMIT = 1000  # --lookup must be below it
ANSWERS_AT_ONCE = 32  # the default of --batch-size
# convert.py
CHECKED_RECORDS = 16  # the records of --check that are measured


def add_model_flags(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Adds the flags that say what runs and on which device. several: --adapter takes more than one
    folder."""
    add = parser.add_argument
    add(
        "--model",
        metavar="M",
        help="a Hugging Face folder, a GGUF file, or a name on the Hub, as org/model or"
        " org/model@revision; default: the base that --adapter was made on, else"
        " SmolLM2-135M-Instruct. Give it to use another model, or if the adapter's base was moved",
    )
    if several:
        add(
            "--adapter",
            nargs="+",
            action="extend",
            metavar="[NAME=]DIR",
            help="PEFT LoRA folders, as train.py and peft save them: the first is applied, a chat"
            " switches to the others by /adapter NAME (where NAME= is left out, the name of the"
            " run's folder); default: none. Give it to use what a LoRA"
            " run has trained",
        )
    else:
        add(
            "--adapter",
            metavar="DIR",
            help="PEFT LoRA folder, as train.py and peft save it, that is applied to the model;"
            " default: none. Give it to use what a LoRA run has trained",
        )
    add_loading_flags(parser)


def add_loading_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say how a model is loaded, whichever it is."""
    add = parser.add_argument
    add(
        "--quant",
        choices=QUANT_KINDS,
        help="round the base's linear layers to 4 bits a weight (nf4: NormalFloat, as in the QLoRA"
        " paper); nf4+head: the output head as well; default: as they are stored. Give it if the model"
        " takes too much memory, or to compute as in QLoRA training; the answers differ a little",
    )
    add(
        "--template",
        choices=TEMPLATE_NAMES,
        help="chat template to use in place of the adapter's or the model's own; default: their own."
        " Give it if the model has none, and then the one that it was trained with",
    )
    add(
        "--date",
        metavar="DATE",
        help="the date that the chat template writes, if it asks for one, as 2026-11-29; default: the"
        " one that the model or adapter was trained with here, else today. Give it to ask as on"
        " another day",
    )
    add(
        "--dtype",
        choices=["auto", *DTYPE_NAMES],
        default="auto",
        help="dtype of the weights and of what is computed; auto: bf16 where the hardware has it,"
        " else fp32; default: auto. fp32 rounds less and takes twice the memory; choose it for"
        " results that agree more closely between machines",
    )
    add(
        "--device",
        choices=["auto", "cpu", "cuda", "mps"],
        default="auto",
        help="where to compute; auto: on an NVIDIA GPU (cuda), else on Apple's (mps), else on the"
        " CPU; default: auto. Choose cpu if a GPU is in use, or has too little memory",
    )


# ---- generate.py ----


def generation_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line. Raises UserError naming the flag that is wrong."""
    parser = argparse.ArgumentParser(
        prog="generate.py",
        description="Chats with a model at the terminal, answers one prompt (--prompt) or a file of"
        " prompts (--data), or continues texts (--complete).",
        allow_abbrev=False,
    )
    add_base_flags(parser)
    add_prompt_flags(parser)
    add_prompt_file_flags(parser)
    add_sampling_flags(parser)
    add_speed_flags(parser)
    args = cli.parse_args(parser, argv, GENERATE_NAMES)
    check_generation_arguments(args)
    return args


def add_base_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the help group of the model and its adapters."""
    group = parser.add_argument_group("the model")
    # It only adds arguments, which a group can do as well as a parser.
    add_model_flags(group, several=True)  # type: ignore[arg-type]
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
        help="system message: instructions before the conversation, such as the ones that the"
        " model was trained with; with --data for the prompts that have none of their own; '': none;"
        " default: the one that the model or adapter was trained with here (train.py --system),"
        " else that of the chat template, if it has one",
    )
    group.add_argument(
        "--complete",
        action="store_true",
        help="continue the text as it stands, without a chat template, for models that were"
        " trained on plain text; in a chat, each line is then continued by itself; default: the"
        " text is the message of a user",
    )


def add_prompt_file_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the help group of a file of prompts."""
    group = parser.add_argument_group("a file of prompts")
    group.add_argument(
        "--data",
        metavar="FILE",
        help="answer every prompt of a file or folder. Either of prompts alone: a column or key such as"
        " prompt or question, a .txt with a prompt a line, conversations that end with a question. Or"
        " in any format that train.py reads: the last answer is then written beside the model's, as"
        " the reference, and the messages before it are the prompt. Of a folder with parts, the part"
        " for tests is read. With --complete, texts to continue; default: --prompt, or a chat",
    )
    group.add_argument(
        "--out",
        metavar="FILE.jsonl",
        help="where the answers to --data are written, a JSON object a line in the order of the"
        " file (docs/answers.md has the keys); required with --data. While answers are missing,"
        " the others are in FILE.jsonl.partial, and the same command goes on from there",
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an --out that exists, and answers of an unfinished run with other settings;"
        " default: refuse",
    )
    group.add_argument(
        "--map",
        metavar="FILE.py:NAME",
        help="a Python function of yours that changes every record of --data before it is read, to"
        " a record of a known format, a list of them, or None to leave it out; default: none",
    )
    group.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="answer only the first N prompts of --data, in the file's order, so not drawn at random;"
        " default: all",
    )
    group.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out records of --data that can't be read, counted by what is wrong with them;"
        " default: the first 20 of them are named, and nothing is answered",
    )
    group.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help="answers to each prompt of --data, a line each, with random draws of their own; needs"
        " --temperature above 0 if more than 1; default: 1",
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
    add_drawing_flags(group)
    group.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="seed of the random draws: with the same one, an answer can be repeated; needs"
        " --temperature above 0; default: other draws each time (with --data the seed that was drawn"
        " is printed)",
    )


def add_drawing_flags(group: argparse._ArgumentGroup) -> None:
    """Adds the flags of how each token of an answer is chosen."""
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
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="draw only from tokens that are at least P times as probable as the most probable one;"
        " from 0, which is all, to 1; needs --temperature above 0; default: 0. 0.05 to 0.1 keeps a"
        " high temperature sensible",
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


def add_speed_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the help group of what changes the speed alone."""
    group = parser.add_argument_group("speed")
    group.add_argument(
        "--lookup",
        type=int,
        default=0,
        metavar="N",
        help="speculative decoding by prompt look-up: guess up to N tokens (at most"
        f" {LOOKUP_LIMIT - 1}) from what followed the same words earlier in the text, and check them"
        " all at once; 0: no guesses; default: 0. The answer is the same, and comes faster where it"
        " repeats the prompt (a corrected text, code); for --temperature 0 only, and not for --data",
    )
    group.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help=f"answers to --data that are generated at a time; default: {ANSWERS_AT_ONCE}. The answers are"
        " the same up to rounding. Lower it if memory runs out; a higher one may be faster on a GPU",
    )


def check_generation_arguments(args: argparse.Namespace) -> None:
    """Raises UserError for a number out of its range, and for flags that exclude each other."""
    lookup_is_valid = 0 <= args.lookup < LOOKUP_LIMIT
    lookup_rule = f"must be 0 (no guesses) or more, and below {LOOKUP_LIMIT}"
    # The comparisons are also false for NaN, which argparse takes for a float.
    rules = [
        ("--max-new-tokens", args.max_new_tokens, args.max_new_tokens >= 1, "must be 1 or more"),
        ("--lookup", args.lookup, lookup_is_valid, lookup_rule),
    ]
    check_rules(rules)
    check_drawing_arguments(args)
    if args.seed is not None and args.temperature == 0:
        raise UserError("--seed: is for sampling; add --temperature 1")
    if args.lookup and args.temperature:
        raise UserError("--lookup: is for greedy answers, at --temperature 0")
    if args.merge and not args.adapter:
        raise UserError("--merge: there is no --adapter to merge")
    only_for_conversations = {"--template": args.template, "--system": args.system}
    for flag, value in only_for_conversations.items():
        if args.complete and value:
            raise UserError(f"{flag}: is for conversations; --complete continues plain text")
    check_data_arguments(args)


def check_rules(rules: list[tuple[str, float, bool, str]]) -> None:
    """Raises UserError for the first of some flags whose value is not valid. rules: of each the flag,
    its value, whether it is valid, and what it must be."""
    for flag, value, is_valid, rule in rules:
        if not is_valid:
            raise UserError(f"{flag} {value}: {rule}")


def check_drawing_arguments(args: argparse.Namespace) -> None:
    """Raises UserError for a flag of `add_drawing_flags` that is out of its range, or means nothing
    to greedy answers."""
    penalty = args.repetition_penalty
    check_rules(
        [
            (
                "--temperature",
                args.temperature,
                0 <= args.temperature < math.inf,
                "must be 0 or more",
            ),
            ("--top-k", args.top_k, args.top_k >= 0, "must be 0 (all) or more"),
            ("--top-p", args.top_p, 0 < args.top_p <= 1, "must be above 0 and at most 1"),
            ("--min-p", args.min_p, 0 <= args.min_p <= 1, "must be 0 (all) to 1"),
            ("--repetition-penalty", penalty, 0 < penalty < math.inf, "must be above 0"),
        ]
    )
    only_for_sampling = {
        "--top-k": args.top_k != 0,
        "--top-p": args.top_p != 1,
        "--min-p": args.min_p != 0,
    }
    for flag, is_given in only_for_sampling.items():
        if is_given and args.temperature == 0:
            raise UserError(f"{flag}: is for sampling; add --temperature 1")


def check_data_arguments(args: argparse.Namespace) -> None:
    """Raises UserError for flags of --data without it, and for flags that it excludes."""
    if args.data is None:
        for option in ("out", "overwrite", "map", "limit", "samples", "batch_size"):
            if getattr(args, option) not in (None, False):
                flag = "--" + option.replace("_", "-")
                raise UserError(f"{flag}: is for a file of prompts; add --data FILE")
        return
    for option in ("limit", "samples", "batch_size"):
        value = getattr(args, option)
        if value is not None and value < 1:
            flag = "--" + option.replace("_", "-")
            raise UserError(f"{flag} {value}: must be 1 or more")
    if args.prompt is not None:
        raise UserError("--prompt: the prompts are those of --data; leave one out")
    if args.out is None:
        raise UserError("--data: needs --out FILE.jsonl, where the answers are written")
    if args.lookup:
        raise UserError("--lookup: is for one prompt at a time, not for --data")
    if len(args.adapter or []) > 1:
        raise UserError("--adapter: --data takes one; run it once for each")
    if (args.samples or 1) > 1 and args.temperature == 0:
        raise UserError(
            f"--samples {args.samples}: at --temperature 0 all samples are the same; add"
            " --temperature 1"
        )


# ---- convert.py ----


def conversion_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line. Raises UserError naming the flag that is wrong."""
    parser = argparse.ArgumentParser(
        prog="convert.py",
        description="Turns models from one format into another, and configurations of other programs"
        " into a command line.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    model_help = "the model: a folder, a GGUF file or a name on the Hub"
    quant_help = (
        "the base's weights that the adapter is added to: nf4, nf4+head: rounded to 4 bits and back, as"
        " in QLoRA training; none: as they are stored (default: as in the adapter's training)"
    )

    command = commands.add_parser("to-folder", help="write a GGUF file as a Hugging Face folder")
    command.add_argument("file", type=Path, help="the GGUF file")
    command.add_argument("folder", type=Path, help="the new folder")

    command = commands.add_parser("to-gguf", help="write a model as a GGUF file, for llama.cpp")
    command.add_argument("folder", help=model_help)
    command.add_argument("file", type=Path, help="the new file")
    command.add_argument(
        "--adapter", type=Path, metavar="DIR", help="PEFT LoRA folder to merge into it first"
    )
    command.add_argument("--quant", choices=[*QUANT_KINDS, "none"], help=quant_help)
    command.add_argument(
        "--type",
        choices=GGUF_TYPES,
        default="f32",
        help="type of the matrices; q8_0 takes 8.5 bits a weight, q5_1 6, q5_0 5.5, q4_1 5, q4_0 4.5;"
        " fewer bits, more error (docs/files.md has figures) (default: f32)",
    )

    command = commands.add_parser(
        "adapter-to-gguf", help="write a LoRA adapter alone as a GGUF file, for llama.cpp's --lora"
    )
    command.add_argument("adapter", type=Path, help="PEFT LoRA folder")
    command.add_argument("file", type=Path, help="the new file")
    command.add_argument(
        "--model", metavar="M", help="its base (default: the one that it was made on)"
    )

    command = commands.add_parser(
        "to-nf4", help="write a model as a folder with its linears in 4 bits a weight"
    )
    command.add_argument("folder", help=model_help)
    command.add_argument("out", type=Path, help="the new folder")
    command.add_argument(
        "--quant",
        choices=QUANT_KINDS,
        default="nf4",
        help="which linears: nf4+head takes the output head too (default: nf4)",
    )

    command = commands.add_parser(
        "merge", help="write a model with a LoRA adapter merged into it as one folder"
    )
    command.add_argument(
        "folder",
        nargs="?",
        help="the base: a folder, a GGUF file or a name on the Hub (default: the one that the adapter"
        " was made on)",
    )
    command.add_argument("adapter", type=Path, help="PEFT LoRA folder")
    command.add_argument("out", type=Path, help="the new folder")
    command.add_argument(
        "--dtype",
        choices=STORAGE_DTYPE_NAMES,
        help="dtype to store the new weights in (default: that of the model's files)",
    )
    command.add_argument("--model", metavar="M", help="the same as the argument folder")
    command.add_argument("--quant", choices=[*QUANT_KINDS, "none"], help=quant_help)
    command.add_argument(
        "--check",
        metavar="FILE",
        help="examples on which the loss is compared before and after the merge, best of what the"
        f" adapter was trained for; the first {CHECKED_RECORDS} are read (default: a few general"
        " questions); none: no comparison",
    )

    command = commands.add_parser(
        "recipe",
        help="print the command line of train.py for a configuration file of torchtune, Axolotl,"
        " LLaMA-Factory or trl",
    )
    command.add_argument("file", type=Path, help="the YAML or JSON file")

    command = commands.add_parser(
        "push",
        help="put a model or adapter folder on the Hub, in a new private repository; log in by `hf auth"
        " login`, or give the token in HF_TOKEN",
    )
    command.add_argument("folder", type=Path, help="the folder, as final/ of a run")
    command.add_argument("name", metavar="org/name", help="the name on the Hub")

    args, rest = cli.parse_known_args(parser, argv)
    if args.command == "merge" and args.folder is None and len(rest) == 1:
        # An option stands between the three, where argparse takes the optional one for left out.
        args.folder, args.adapter, args.out = str(args.adapter), args.out, Path(rest.pop())
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args
