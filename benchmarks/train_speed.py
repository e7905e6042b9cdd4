"""LoRA training steps by plaintune and by transformers + peft: same base, same token rows, same steps, in one run.

    python benchmarks/train_speed.py [--steps 12] [--rank 8] [--data FILE ...] [--batch-size 8]

The two take turns, step by step, so that a machine whose speed drifts is unfair to neither. Both compute in bf16 where
the machine has it; the peer pads a batch to its longest row, with an attention mask, and gives labels -100 to what is
not trained, as its trainers do. Tokens are real ones, without padding. Prints medians, the ratio, and both losses.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lora
from checkpoint import load_model
from convert import model_folder
from data import encode, epoch_order, load_sources, micro_batches
from demo import TASK
from loading import pick_device, pick_dtype
from objectives import token_loss_sum
from tokenizer import load_tokenizer


def plaintune(folder, dtype, device, rank):
    torch.manual_seed(0)
    model = load_model(folder, dtype, device)
    lora.add_lora(model, rank, 2 * rank)
    model.train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0, fused=True
    )

    def step(examples):
        (batch,) = micro_batches(examples, len(examples), device)
        loss = token_loss_sum(model, batch) / len(batch.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def peer(folder, dtype, device, rank):
    import peft
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    model.train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0, fused=True
    )

    def step(examples):
        longest = max(len(example.ids) for example in examples)
        ids, mask = torch.zeros(2, len(examples), longest, dtype=torch.int64)
        labels = torch.full_like(ids, -100)
        for row, example in enumerate(examples):
            n = len(example.ids)
            ids[row, :n], mask[row, :n] = torch.tensor(example.ids), 1
            labels[row, :n] = torch.where(torch.tensor(example.trained), ids[row, :n], -100)
        loss = model(ids.to(device), attention_mask=mask.to(device), labels=labels.to(device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--data", nargs="+", default=TASK["train"])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    args = parser.parse_args()
    device = pick_device("auto")
    dtype, why = pick_dtype("auto", device)
    folder = model_folder(None)
    data = encode(load_sources(args.data), load_tokenizer(folder), args.seq_len).examples
    order = epoch_order([len(example.ids) for example in data], args.batch_size, 0, 0)
    steps = {"plaintune": plaintune(folder, dtype, device, args.rank), "peer": peer(folder, dtype, device, args.rank)}
    speeds, losses = {name: [] for name in steps}, {name: [] for name in steps}
    for number in range(args.steps + 2):
        examples = [data[i] for i in order[number % len(order)]]
        for name, step in steps.items():
            start = time.perf_counter()
            losses[name].append(step(examples))
            if number >= 2:  # the first two are warm-up
                speeds[name].append(sum(len(example.ids) for example in examples) / (time.perf_counter() - start))
    mean = statistics.mean(len(example.ids) for example in data)
    job = f"rank {args.rank}, {args.steps} steps of {args.batch_size}, mean row {mean:.0f} tokens"
    print(f"torch {torch.__version__}, {device}, {dtype} ({why}), {torch.get_num_threads()} threads; {job}")
    for name, values in speeds.items():
        spread = f"{min(values):,.0f} to {max(values):,.0f}"
        print(f"{name:10} {statistics.median(values):8,.0f} tokens/s ({spread}), last loss {losses[name][-1]:.4f}")
    ratios = [a / b for a, b in zip(speeds["plaintune"], speeds["peer"])]
    print(f"ratio      {statistics.median(ratios):8.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
