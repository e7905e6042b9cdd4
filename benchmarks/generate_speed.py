"""Greedy decoding in a batch: tokens/s of plaintune and of transformers' generate, on the same prompts in turn.

    python benchmarks/generate_speed.py [--model M] [--prompts 16] [--new 64] [--rounds 5]

Both hold the same weights in the dtype that plaintune picks here, without end tokens, so that every prompt gets all its
new tokens. transformers gets a left-padded batch, its default attention and its default cache. plaintune's weights are
packed before the first round, as evaluate.py does, and the time is printed. Prints the median ratio of the rounds and
its range, and how many of the tokens agree (in bf16 near-ties fall differently).

In each round the same prompts are also answered and scored by what evaluate.py calls (exact match, token F1, ROUGE and
chrF; rendering, tokenizing and decoding included), and the share of the bare decoding's speed that this keeps is
printed.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers

from checkpoint import load_model
from common.device import pick_device, pick_dtype
from common.errors import run
from data import BUNDLED_TASK
from dataset.formats import open_source
from decoding import packed_weights
from evals.answers import answer_records
from evals.table import EVALUATIONS
from interop.resolve import model_folder
from tokenizer import load_tokenizer

SCORED = ("exact", "f1", "rouge", "chrf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    device = pick_device()
    dtype, why = pick_dtype("auto", device)
    folder = model_folder(args.model)
    tokenizer = load_tokenizer(folder)
    endless = load_tokenizer(folder)
    endless.stop_ids = set()
    ours = load_model(folder, dtype, device)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    records = open_source(BUNDLED_TASK["test"][0]).read_all()[: args.prompts]
    prompts = [tokenizer.render(record.messages[:-1], add_generation_prompt=True)[0] for record in records]
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    settings = {"max_new_tokens": args.new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    times, start = [], time.perf_counter()
    with packed_weights(ours, args.new):
        packing = time.perf_counter() - start
        for _ in range(args.rounds + 1):  # the first warms up
            start = time.perf_counter()
            wanted = theirs.generate(padded, attention_mask=mask, **settings)[:, longest:].tolist()
            middle = time.perf_counter()
            got = ours.generate(prompts, args.new)
            end = time.perf_counter()
            answers = answer_records(ours, endless, records, args.new)
            for name in SCORED:
                EVALUATIONS[name].load()(answers)
            times.append((middle - start, end - middle, time.perf_counter() - end))
    assert answers.texts == [tokenizer.decode(ids, skip_special=True) for ids in got]
    count = args.prompts * args.new
    peer, mine, scored = (count / statistics.median(column) for column in zip(*times[1:]))
    ratios = sorted(theirs / ours for theirs, ours, _ in times[1:])
    kept = sorted(ours / scored for _, ours, scored in times[1:])
    same = sum(x == y for a, b in zip(got, wanted) for x, y in zip(a, b))
    machine = f"{device}, {dtype} ({why}), {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {machine};", end=" ")
    lengths, alike = f"{min(map(len, prompts))} to {longest}", len(os.path.commonprefix(prompts))
    print(f"{args.prompts} prompts of {lengths} tokens, the first {alike} the same;", end=" ")
    print(f"{args.new} new ones each; packing took {1e3 * packing:.0f} ms")
    against = f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    print(f"plaintune {mine:,.0f} tokens/s, transformers {peer:,.0f}; {against}; {100 * same / count:.1f} % the same")
    share = f"{statistics.median(kept):.3f} ({kept[0]:.3f} to {kept[-1]:.3f})"
    print(f"answered and scored ({', '.join(SCORED)}): {scored:,.0f} tokens/s, {share} of the bare decoding's speed")


if __name__ == "__main__":
    run(main)
