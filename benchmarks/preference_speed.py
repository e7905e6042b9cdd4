"""DPO by plaintune and by trl's DPOTrainer, in turn, each in a process of its own, in one run on the CPU.

    python benchmarks/preference_speed.py                         3 rounds of 6 timed steps
    python benchmarks/preference_speed.py --rounds 1 --steps 2    to try it

The default base, LoRA on all linears of its blocks, four pairs a step, each text whole and of at most --seq-len tokens.
Both sides get the same token ids and masks in the same order, made once, and begin with the same adapter; the reference
is the model with the adapter off; no activation is computed again in the backward; AdamW at a constant rate; bf16 where
the CPU has the instructions, else fp32. plaintune lays the texts behind each other and cuts them into micro-batches as
train.py does; trl pads them to the longest of the step. What else trl decides is left as it is: under bf16 that is fp32
weights which are cast at every product, so it is measured with bf16 weights, too.

Printed of each side: seconds of the steps after the warm-up, pairs/s, tokens/s (real ones, without padding), peak
resident memory of the whole process with nothing taken off, first and last loss; medians over rounds, ratios of the two
sides of one round. That both do one job is tried first, by a few steps of one pair in fp32, whose losses must agree: in
bf16 the sums of an answer's log-probabilities are rounded by more than a few steps change them, so there the first loss
must be log 2 and the others are only printed. Where losses do not agree the script says so and ends with 1. Everything
is also written to a file of JSON (--out; default: one in benchmarks/results/cpu/). trl takes 17 GB of memory for the
default job in bf16.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import random
import shlex
import statistics
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from gpu_run import commit
from peers import RATE, ROOT, WARM_UP, Clock, machine_has_bf16, resident, run_side

RESULTS = Path(__file__).resolve().parent / "results" / "cpu"
DATA = ROOT.parent / "shared" / "data" / "preference_en_300.json"
RANK = 8
BETA = 0.1  # of both programs by default
SEED = 0
FIRST_LOSS = 1e-4  # how far it may be from log 2, in any dtype: policy and reference are one model then
# The trial: steps of one pair in fp32, at a rate that moves the loss, and how far two losses of a step may be apart.
TRIAL_STEPS, TRIAL_RATE, LOSSES_APART = 4, 1e-3, 1e-3
WORDS = "the of and a river stone house morning slowly walks under over sees finds light rain two because when".split()
GENERATED = 300  # pairs
TOKENS, SPREAD = 200, 0.6  # of a generated answer: median, spread of its logarithm


# ------------------------------------------------------------------------------ one side, in a process of its own


class GivenOrder:
    """In place of a sampler: the examples as they come."""

    def __init__(self):
        self.next = 0

    def step(self, rows: int) -> list[list[int]]:
        first = self.next
        self.next += rows
        return [[i] for i in range(first, self.next)]


def read_pairs(spec: dict) -> list[dict]:
    """The pairs of all steps, {"prompt_ids", "chosen_ids", "rejected_ids"} each: all but the prompt is trained."""
    return json.loads(Path(spec["pairs"]).read_text())[: spec["steps"] * spec["batch"]]


def tokens_of_steps(pairs: list[dict], batch: int) -> list[int]:
    """The tokens of each step, without padding."""
    sizes = [2 * len(each["prompt_ids"]) + len(each["chosen_ids"]) + len(each["rejected_ids"]) for each in pairs]
    return [sum(sizes[i : i + batch]) for i in range(0, len(sizes), batch)]


def outcome_of_pairs(spec: dict, seconds: float, losses: list[float]) -> dict:
    """seconds: of the steps after the warm-up; losses: of all steps."""
    tokens = tokens_of_steps(read_pairs(spec), spec["batch"])
    assert len(losses) == len(tokens) == spec["steps"]
    timed = spec["steps"] - WARM_UP
    return {
        "seconds": seconds,
        "pairs_per_s": timed * spec["batch"] / seconds,
        "tokens_per_s": sum(tokens[WARM_UP:]) / seconds,
        "peak_bytes": resident(),
        "losses": losses,
    }


def settings_of(spec: dict):
    """What train.py would resolve of its flags for this job."""
    from flags import NEW_ADAPTER
    from training.defaults import Settings

    dtype = {"float32": "fp32", "bfloat16": "bf16"}[spec["dtype"]]
    adapter = NEW_ADAPTER | {"rank": RANK, "alpha": 2.0 * RANK}
    return Settings(
        method="lora", objective="dpo", beta=BETA, steps=spec["steps"], lr=spec["rate"], warmup=0, schedule="constant",
        weight_decay=0.0, batch_size=spec["batch"], clip=1.0, seed=SEED, dtype=dtype, shard="none",
        **adapter,
    )  # fmt: skip


def example_of_pair(pair: dict):
    """A pair as plaintune has it: both texts behind each other."""
    from dataset.examples import Example

    ids, weights, split = [], [], 0
    for answer in (pair["chosen_ids"], pair["rejected_ids"]):
        split = len(ids)
        ids += pair["prompt_ids"] + answer
        weights += [0.0] * len(pair["prompt_ids"]) + [1.0] * len(answer)
    return Example(ids, weights, split=split)


def adapter_by_plaintune(torch, spec: dict) -> dict:
    """Writes the adapter with which both sides begin: that of train.py, before step 1."""
    sys.path.insert(0, str(ROOT))
    import lora
    from methods import load_trainable

    model = load_trainable(settings_of(spec), Path(spec["folder"]), torch.device("cpu"))
    lora.save_adapter(model, spec["adapter"])
    return {}


def pairs_by_plaintune(torch, spec: dict) -> dict:
    """train.py's own loop over the pairs."""
    sys.path.insert(0, str(ROOT))
    import train
    from data import MicroBatches
    from dataset.encoding import AS_PAIRS
    from dataset.examples import Dataset
    from methods import load_trainable
    from objectives import make_objective
    from optimizers import make_optimizers
    from training.metrics import MetricsLogger
    from training.reference import reference_of_run
    from training.signals import GracefulStop
    from training.state import TrainState

    device, settings = torch.device("cpu"), settings_of(spec)
    # By the same seed as in `adapter_by_plaintune`, so the adapter is the same.
    model = load_trainable(settings, Path(spec["folder"]), device)
    objective = make_objective(settings, reference_of_run(settings, model))
    examples = [example_of_pair(pair) for pair in read_pairs(spec)]
    loader = MicroBatches(Dataset(examples, kind=AS_PAIRS), GivenOrder(), device, spec["batch"])
    clock = Clock(torch, device, spec["steps"])

    class EveryStep:
        """In place of the evaluator."""

        was_interrupted = False

        def due(self, state) -> bool:
            return state.step > 0

        def run(self, state, stop) -> bool:
            clock.after_step(state.step)
            return False

    optimizers = make_optimizers(model, "adamw", settings.lr, settings.weight_decay)
    with tempfile.TemporaryDirectory() as folder:
        state = TrainState()
        metrics = MetricsLogger(settings, Path(folder), 1.0, device, state)
        train.train_loop(settings, model, objective, optimizers, loader, state, metrics, GracefulStop(), EveryStep())
        metrics.close()
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return outcome_of_pairs(spec, clock.seconds, [line["loss"] for line in lines])


def pairs_by_trl(torch, spec: dict) -> dict:
    """trl's DPOTrainer over the pairs."""
    import datasets
    import peft
    import transformers
    import trl
    from safetensors.torch import load_file

    losses, clock = [], Clock(torch, torch.device("cpu"), spec["steps"])

    class Trainer(trl.DPOTrainer):
        """Takes rows of token ids as they are, and keeps the loss of every step."""

        def _prepare_dataset(self, dataset, *settings):
            return dataset

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            losses.append(float(loss))
            return loss

    class EveryStep(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            clock.after_step(state.global_step)

    more = {"model_init_kwargs": {"dtype": "bfloat16"}} if spec.get("bf16_weights") else {}
    with tempfile.TemporaryDirectory() as out:
        settings = trl.DPOConfig(
            output_dir=out, max_steps=spec["steps"], per_device_train_batch_size=spec["batch"], beta=BETA,
            learning_rate=spec["rate"], lr_scheduler_type="constant", bf16=spec["dtype"] == "bfloat16",
            max_length=spec["seq_len"], train_sampling_strategy="sequential", gradient_checkpointing=False,
            seed=SEED, use_cpu=True, dataloader_pin_memory=False, report_to=[], save_strategy="no",
            disable_tqdm=True, **more,
        )  # fmt: skip
        trainer = Trainer(
            model=spec["folder"], args=settings, train_dataset=datasets.Dataset.from_list(read_pairs(spec)),
            peft_config=peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"),
            processing_class=transformers.AutoTokenizer.from_pretrained(spec["folder"]), callbacks=[EveryStep()],
        )  # fmt: skip
        start = load_file(Path(spec["adapter"]) / "adapter_model.safetensors")
        wanted = {name for name in peft.get_peft_model_state_dict(trainer.model)}
        assert start.keys() == wanted, "both adapters are of the same layers"
        peft.set_peft_model_state_dict(trainer.model, start)
        trainer.train()
    return outcome_of_pairs(spec, clock.seconds, losses)


SIDES = {f.__name__: f for f in (adapter_by_plaintune, pairs_by_plaintune, pairs_by_trl)}


# -------------------------------------------------------------------------------------------------------- the job


def generated_records(count: int) -> list[dict]:
    """Preferences of random words, about as long as real ones."""
    chance = random.Random(SEED)

    def text(median: float) -> str:
        return " ".join(chance.choices(WORDS, k=round(median * chance.lognormvariate(0, SPREAD))))

    return [{"prompt": text(TOKENS / 3), "chosen": text(TOKENS), "rejected": text(TOKENS)} for _ in range(count)]


def pair_of_example(example) -> dict | None:
    """A pair as trl has it, without the tokens behind an answer, which no loss is of; None where an answer has tokens
    in it that are not trained, for which trl has no mask."""
    found = {}
    stops = [example.split, len(example.ids)]
    for name, start, stop in zip(("chosen", "rejected"), (0, example.split), stops, strict=True):
        ids = [int(number) for number in example.ids[start:stop]]
        trained = [i for i, weight in enumerate(example.loss_weights[start:stop]) if weight]
        first, end = trained[0], trained[-1] + 1
        if len(trained) < end - first or found.setdefault("prompt_ids", ids[:first]) != ids[:first]:
            return None
        found[f"{name}_ids"] = ids[first:end]
    return found


def write_pairs(data: Path, folder: Path, seq_len: int, steps: int, batch: int, file: Path) -> str:
    """Writes the pairs of all steps in train.py's order, and returns what they are."""
    from data import load
    from dataset.encoding import AS_PAIRS
    from dataset.sampler import Sampler
    from tokenizer import load_tokenizer

    dataset = load([data], load_tokenizer(folder), seq_len, kind=AS_PAIRS, flag="this benchmark")
    stream = Sampler(dataset.lengths, [len(dataset)], [len(dataset)], SEED)
    pairs = []
    for _ in range(len(dataset)):
        (number,) = stream.step(1)[0]
        pair = pair_of_example(dataset.examples[number])
        if pair is not None:
            pairs.append(pair)
    count = steps * batch
    if count > len(pairs):
        room = len(pairs) // batch - WARM_UP
        raise SystemExit(f"--steps {steps - WARM_UP}: the pairs suffice for {room} of {batch} after {WARM_UP}")
    file.write_text(json.dumps(pairs[:count]))
    tokens = tokens_of_steps(pairs[:count], batch)
    trained = sum(len(each["chosen_ids"]) + len(each["rejected_ids"]) for each in pairs[:count])
    return f"{count} pairs of {len(pairs)}, {sum(tokens) / count:,.0f} tokens each, {trained / sum(tokens):.0%} trained"


def compare_losses(found: dict[str, list[dict]]) -> tuple[list[float], list[str]]:
    """The largest difference of two sides' losses, of each step; and which first losses are not log 2."""
    wrong = []
    for name, results in found.items():
        off = max((each["losses"][0] - math.log(2) for each in results), key=abs)
        if abs(off) > FIRST_LOSS:
            wrong.append(f"{name}: the first loss is {math.log(2) + off:.4f}, not log 2")
    losses = [[each["losses"] for each in of_round] for of_round in zip(*found.values(), strict=True)]
    apart = []
    for step in range(len(losses[0][0])):
        apart.append(max(max(own[step] for own in sides) - min(own[step] for own in sides) for sides in losses))
    return apart, wrong


def try_in_fp32(spec: dict) -> dict:
    """Runs a few steps of both sides in fp32 and returns how far their losses are apart, and what is wrong about it."""
    trial = spec | {"dtype": "float32", "batch": 1, "steps": TRIAL_STEPS, "rate": TRIAL_RATE}
    sides = {"plaintune": "pairs_by_plaintune", "trl": "pairs_by_trl"}
    found = {name: [run_side(function, trial, __file__)] for name, function in sides.items()}
    apart, wrong = compare_losses(found)
    if max(apart) > LOSSES_APART:
        wrong.append(f"in fp32 the losses are up to {max(apart):.4f} apart")
    losses = {name: results[0]["losses"] for name, results in found.items()}
    return {"losses": losses, "apart": apart, "wrong": wrong}


def summary(found: dict[str, list[dict]]) -> dict:
    """Medians of each side over the rounds; of the peers also ours against theirs, of the same rounds."""
    table = {}
    for name, results in found.items():
        row = {
            key: statistics.median(each[key] for each in results)
            for key in ("seconds", "pairs_per_s", "tokens_per_s", "peak_bytes")
        }
        if name != "plaintune":
            for key, ratio in (("pairs_per_s", "times_as_fast"), ("peak_bytes", "of_the_memory")):
                ratios = [a[key] / b[key] for a, b in zip(found["plaintune"], results, strict=True)]
                row[ratio] = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
        table[name] = row
    return table


def show(found: dict[str, list[dict]], table: dict) -> None:
    print(f"\n{'':20}{'seconds':>9}{'pairs/s':>9}{'tokens/s':>10}{'peak MiB':>10}   losses")
    for name, row in table.items():
        losses = found[name][0]["losses"]
        line = f"{name:20}{row['seconds']:9.1f}{row['pairs_per_s']:9.3f}{row['tokens_per_s']:10,.0f}"
        line += f"{row['peak_bytes'] / 2**20:10,.0f}   {losses[0]:.4f} to {losses[-1]:.4f}"
        if name != "plaintune":
            speed, memory = row["times_as_fast"], row["of_the_memory"]
            line += f"   ours: {speed['median']:.2f} times as fast ({speed['least']:.2f} to {speed['most']:.2f}),"
            line += f" {memory['median']:.2f} of the memory ({memory['least']:.2f} to {memory['most']:.2f})"
        print(line)


def row_of_readme(args, table: dict) -> str:
    """The row of benchmarks/README.md."""
    mine = table["plaintune"]
    cells = [f"`{args.command}`", f"{mine['pairs_per_s']:.2f} pairs/s, {mine['tokens_per_s']:,.0f} tokens/s"]
    cells[1] += f", {mine['peak_bytes'] / 2**20:,.0f} MiB"
    peers, ratios = [], []
    for name, row in table.items():
        if name == "plaintune":
            continue
        peers.append(f"{name}: {row['pairs_per_s']:.2f}, {row['tokens_per_s']:,.0f}, {row['peak_bytes'] / 2**20:,.0f}")
        speed, memory = row["times_as_fast"], row["of_the_memory"]
        of_memory = f"{memory['median']:.2f} of the memory"
        ratios.append(f"{speed['median']:.2f} ({speed['least']:.2f} to {speed['most']:.2f}), {of_memory}")
    cells += ["; ".join(peers), "; ".join(ratios), f"{datetime.now(UTC):%Y-%m-%d}"]
    what = f"DPO of the default base, LoRA rank {RANK}, {args.batch} pairs a step, {args.dtype}"
    return f"| {what} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="that are timed, after two that warm up")
    parser.add_argument("--batch", type=int, default=4, help="pairs a step")
    parser.add_argument("--seq-len", type=int, default=1024, help="of each text; pairs with a longer one are left out")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: what this CPU is fastest in")
    parser.add_argument("--data", type=Path, help=f"preferences (default: {DATA.name} if it is there, else made up)")
    parser.add_argument("--out", type=Path, help="file of results (default: one in benchmarks/results/cpu/)")
    for hidden in ("--side", "--spec", "--into"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        import torch

        Path(args.into).write_text(json.dumps(SIDES[args.side](torch, json.loads(args.spec))))
        return
    if not importlib.util.find_spec("trl"):
        raise SystemExit("trl is not installed; it is what this benchmark compares with")
    args.command = shlex.join(["python", "benchmarks/preference_speed.py", *sys.argv[1:]])
    args.dtype = args.dtype or ("bfloat16" if machine_has_bf16() else "float32")
    head = {"command": args.command, "date": f"{datetime.now(UTC):%Y-%m-%d}", "commit": commit(), "dtype": args.dtype}
    head["versions"] = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "trl")}
    head["cores"], head["threads"] = os.cpu_count(), os.environ.get("OMP_NUM_THREADS")
    print(", ".join(f"{name} {version}" for name, version in head["versions"].items()), end="; ")
    print(f"{args.dtype}; {head['cores']} cores, OMP_NUM_THREADS {head['threads'] or 'not set'}")
    sys.path.insert(0, str(ROOT))
    from interop.resolve import model_folder

    folder = model_folder(None)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        data = args.data or DATA
        if args.data is None and not DATA.is_file():
            data = work / "generated.json"
            data.write_text(json.dumps(generated_records(GENERATED)))
        steps = args.steps + WARM_UP
        pairs = write_pairs(data, folder, args.seq_len, steps, args.batch, work / "pairs.json")
        head["data"] = f"{data.name}: {pairs}"
        print(head["data"], flush=True)
        spec = {"folder": str(folder), "dtype": args.dtype, "steps": steps, "batch": args.batch, "rate": RATE}
        spec |= {"seq_len": args.seq_len, "pairs": str(work / "pairs.json"), "adapter": str(work / "adapter")}
        sides = {"plaintune": ("pairs_by_plaintune", spec), "trl": ("pairs_by_trl", spec)}
        if args.dtype == "bfloat16":
            sides["trl, bf16 weights"] = ("pairs_by_trl", spec | {"bf16_weights": True})
        run_side("adapter_by_plaintune", spec, __file__)
        trial = try_in_fp32(spec)
        print(f"in fp32, {TRIAL_STEPS} steps of one pair: losses up to {max(trial['apart']):.1e} apart", flush=True)
        found = {name: [] for name in sides}
        for _ in range(args.rounds):
            for name, (function, spec_of_side) in sides.items():
                found[name].append(run_side(function, spec_of_side, __file__))
                print(f"  ({name}: {found[name][-1]['pairs_per_s']:.3f} pairs/s)", flush=True)
    table = summary(found)
    show(found, table)
    apart, wrong = compare_losses(found)
    wrong += trial["wrong"]
    print("losses apart, step by step: " + " ".join(f"{each:.4f}" for each in apart))
    print(row_of_readme(args, table))
    out = args.out or RESULTS / f"preference-{datetime.now(UTC):%Y-%m-%d-%H%M}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    content = head | {"fp32": trial, "apart": apart, "wrong": wrong, "table": table, "rounds": found}
    out.write_text(json.dumps(content, indent=1) + "\n")
    print(f"results   {out}")
    if wrong:
        raise SystemExit("not the same job: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
