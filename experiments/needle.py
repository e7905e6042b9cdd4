"""Asks a model for a number that stands somewhere in a long text: the needle in a haystack.

    python experiments/needle.py --text wikitext.txt --lengths 2000 8000 12000
    python experiments/needle.py --text wikitext.txt --lengths 2000 8000 12000 --adapter runs/long/final
    python experiments/needle.py --text wikitext.txt --train 200 --tokens 12000 > needles.jsonl    to train on

At each length the number stands at evenly spread depths, in other pieces of the text each time. Printed are the
shares of answers that hold the number. The text should not be what a model was trained on here.
"""

import argparse
import json
import random
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from checkpoint import load_model
from common.console import print_stderr, table
from common.device import pick_device, pick_dtype
from common.progress import progress
from interop.resolve import base_folder, pick_tokenizer
from methods import put_adapter_on

QUESTION = "What is the secret number of this text? Answer with the number alone."
NEEDLE = "The secret number of this text is {}."


def main() -> None:
    args = parse_words()
    folder = base_folder(args.model, args.adapter, print_stderr)
    tokenizer = pick_tokenizer(folder, args.adapter, None)
    sentences = re.split(
        r"(?<=[.!?]) +", " ".join(Path(args.text).read_text(encoding="utf-8").split())
    )
    if args.train:
        draw = random.Random(args.seed)
        for _ in range(args.train):
            text, number = haystack(tokenizer, sentences, args.tokens, draw.random(), draw)
            print(json.dumps({"prompt": f"{text}\n\n{QUESTION}", "completion": number}))
        return
    device = pick_device("auto")
    dtype, _ = pick_dtype("auto", device)
    model = load_model(folder, dtype=dtype, device=device)
    if args.adapter:
        put_adapter_on(model, args.adapter, print_stderr)
    rows = [["tokens", "numbers found", "of"]]
    draw = random.Random(args.seed)
    for tokens in args.lengths:
        right = 0
        with progress(f"{tokens:,} tokens", args.count, "answer") as bar:
            for i in range(args.count):
                text, number = haystack(tokenizer, sentences, tokens, (i + 0.5) / args.count, draw)
                asked = [{"role": "user", "content": f"{text}\n\n{QUESTION}"}]
                ids, _ = tokenizer.render(asked, add_generation_prompt=True)
                (answer,) = model.generate([ids], 12)
                right += number in tokenizer.decode(answer)
                bar.update(1)
        rows.append([f"{tokens:,}", f"{right}", f"{args.count}"])
        print_stderr(f"{tokens:,} tokens: {right} of {args.count}")
    print(table(rows))


def parse_words() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--text", required=True, help="a long text, of which pieces are taken")
    parser.add_argument("--model", help="as of generate.py")
    parser.add_argument("--adapter", help="as of generate.py")
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=[1000, 4000], help="tokens of the prompts"
    )
    parser.add_argument("--count", type=int, default=10, help="prompts of each length")
    parser.add_argument(
        "--train",
        type=int,
        default=0,
        metavar="N",
        help="print N examples to train on, ask nothing",
    )
    parser.add_argument("--tokens", type=int, default=4000, help="--train: their length")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def haystack(
    tokenizer, sentences: list[str], tokens: int, depth: float, draw: random.Random
) -> tuple[str, str]:
    """Returns a text of about so many tokens with a needle, and its number. depth: where it stands, from 0 to 1."""
    number = str(draw.randint(1000, 9999))
    start = draw.randrange(len(sentences))
    chosen: list[str] = []
    count = 0
    while count < tokens - 40:
        sentence = sentences[(start + len(chosen)) % len(sentences)]
        chosen.append(sentence)
        count += len(tokenizer.encode(sentence + " "))
    chosen.insert(round(depth * len(chosen)), NEEDLE.format(number))
    return " ".join(chosen), number


if __name__ == "__main__":
    main()
