"""Tokens/s of tokenizer.py and of the `tokenizers` library on one core, on the same texts in turn.

    python benchmarks/tokenizer_speed.py FOLDER... [--data FILE]      FOLDER holds a tokenizer.json

Each round encodes every text with one, then with the other, without special tokens; what is printed is the median
ratio of the rounds and its range. The ids must be equal.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tokenizers

from common.errors import run
from dataset.formats import open_source
from tokenizer import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--data", default="assets/general.txt", help="texts, of any known format")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    records = open_source(args.data).read_all()
    texts = [record.text or "\n".join(turn["content"] for turn in record.messages) for record in records]
    print(
        f"{args.data}: {len(texts):,} texts, {sum(map(len, texts)):,} characters; tokenizers {tokenizers.__version__}"
    )
    for folder in args.folders:
        ours, theirs = load_tokenizer(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        theirs.encode_special_tokens = True
        times = []
        for _ in range(args.rounds):
            start = time.perf_counter()
            wanted = [theirs.encode(text, add_special_tokens=False).ids for text in texts]
            middle = time.perf_counter()
            got = [ours.encode(text) for text in texts]
            times.append((middle - start, time.perf_counter() - middle))
            assert got == wanted
        count = sum(map(len, got))
        ratios = sorted(peer / mine for peer, mine in times)
        speed = count / statistics.median(mine for _, mine in times)
        against = f"{statistics.median(ratios):.2f} times the library's ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"{folder.name:16} {count:>9,} tokens  {speed:>11,.0f} tokens/s  {against}")


if __name__ == "__main__":
    run(main)
