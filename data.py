"""From files to micro-batches: the examples of some files, a validation split, their order, and flat batches of them.

A token is trained where the mask says so: the answers and the token that ends each, of which the tokenizer's template
decides where they lie; in plain text every token. Whatever cannot be trained as it stands (an answer beyond --seq-len,
a record that the template refuses) is left out, counted and said, never cut in silence.

    python data.py inspect FILES --model DIR     what stands in them, as the model will see it
    python data.py convert FILES --out OUT.jsonl any format as messages
    python data.py split FILES --out DIR         train.jsonl, val.jsonl and test.jsonl, near-duplicates kept together

A batch is flat: `tokens` [N], one example after another without padding, the documents' lengths, and the rows whose
next token is trained, so that nothing else ever reaches the output head. Row r predicts token r + 1 of its example.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import distributed
from common.errors import UserError
from dataset.examples import DUMMY_EXAMPLE, TRAIN_ON, Dataset, Example, cut
from dataset.formats import Map, open_source
from dataset.inspection import quick_checks
from dataset.sampler import Sampler, allocate_samples
from dataset.token_cache import tokenized_rows
from flags import VAL_FRACTION, Flags, parse_replay, parse_weights
from kernels.attention import Documents
from kernels.context_parallel import ContextParallel, ShardedDocuments
from kernels.triton_utils import to_device
from tokenizer import Tokenizer

ASSETS = Path(__file__).resolve().parent / "assets"
# The bundled task; among its training files a few ordinary questions and answers, against forgetting.
BUNDLED_TASK = {part: [ASSETS / f"booking_{part}.jsonl"] for part in ("train", "val", "test")}
BUNDLED_TASK["train"].append(ASSETS / "general_chat.jsonl")
PACK_FROM_STEPS = 100  # steps of a packed epoch from which packing is the default on a GPU: with fewer, small data
# learns too little


# ---- a run's data ----


@dataclass
class TrainingData:
    """What is trained on, in which order, and what validates: examples like these, and some of the replayed data.

    seq_len, val_fraction, pack: the settings that were chosen while the files were read.
    """

    train: Dataset
    val: Dataset
    replay_val: Dataset | None
    sampler: Sampler
    seq_len: int
    val_fraction: float | None
    pack: bool


def load_training_data(
    flags: Flags, tokenizer: Tokenizer, max_positions: int, vocab_size: int, device: torch.device
) -> TrainingData:
    """Reads the files of --data, --val and --replay as token rows and decides their order; prints what was found,
    chosen and left out. max_positions, vocab_size: of the model."""
    seq_len = flags.seq_len or min(2048, max_positions)
    if seq_len > max_positions:
        raise UserError(f"--seq-len {seq_len}: the model has {max_positions} positions")

    def read(paths: list, map_fn: Map | None = None) -> Dataset:
        dataset = load(paths, tokenizer, seq_len, flags.train_on, flags.trees, print, map_fn)
        largest = max(rows.largest for rows in dataset.examples.rows)
        if largest >= vocab_size:
            names = ", ".join(map(str, paths))
            raise UserError(
                f"{names}: token {largest} of the tokenizer is beyond the model's {vocab_size}"
            )
        return dataset

    files, weights = parse_weights(flags.data)
    files = files or BUNDLED_TASK["train"]
    map_fn = Map(flags.map) if flags.map else None
    dataset = read(files, map_fn)
    val_files = [flags.val] if flags.val else [] if flags.data else BUNDLED_TASK["val"]
    val_fraction = flags.val_fraction
    if val_files:
        train, val = dataset, read(val_files, map_fn)
    else:
        val_fraction = VAL_FRACTION if val_fraction is None else val_fraction
        train, val = split(dataset, val_fraction)
    if not len(val) and flags.patience:
        raise UserError(
            "--patience counts validations, and there is nothing to validate with; give --val FILE"
        )
    if not len(val) and val_fraction:
        print(
            "          WARNING: no validation, the prompts are too alike to part them; give --val FILE"
        )
    print_counts(train, val, tokenizer)
    formats, replay_val, replay_shares = dataset.formats, None, []
    if flags.replay:
        replay_files, replay_shares = parse_replay(flags.replay)
        general = read(replay_files)
        # Where nothing validates, nothing of the replay is held out either.
        held_out = VAL_FRACTION if val_fraction is None else val_fraction
        replay, replay_val = split(general, held_out if len(val) else 0.0)
        formats += general.formats
        replay_val = replay_val if len(replay_val) else None
        train, files = train.with_replay(replay), [*files, *replay_files]
    if flags.trees == "all" and not any("OASST" in each for each in formats):
        raise UserError("--trees all: no file holds OASST trees")
    sampler = make_sampler(flags.seed, train, files, weights, replay_shares)
    packed = dataclasses.replace(sampler, seq_len=seq_len)
    per_step = flags.batch_size * flags.accumulate * distributed.dp_size()
    pack, reason = flags.pack, ""
    if pack is None:
        pack = device.type == "cuda" and packed.epoch_rows() >= PACK_FROM_STEPS * per_step
        reason = (
            f"; an epoch of {PACK_FROM_STEPS} steps and more, --no-pack for batches of examples"
        )
    if pack:
        rows = packed.epoch_rows()
        fill = sampler.epoch_tokens() / (rows * seq_len)
        examples = sum(sampler.samples_per_epoch)
        print(
            f"packed    {examples:,} examples in {rows:,} rows of {seq_len:,} tokens, {fill:.1%} full{reason}"
        )
    return TrainingData(
        train, val, replay_val, packed if pack else sampler, seq_len, val_fraction, pack
    )


def print_counts(train: Dataset, val: Dataset, tokenizer: Tokenizer) -> None:
    template = f"; chat template: {tokenizer.template_name}" if train.chat else ""
    print(
        f"          {len(train):,} examples to train on, {train.tokens:,} tokens of which"
        f" {train.trained_tokens:,} trained; {len(val):,} to validate{template}"
    )
    for i, line in enumerate(quick_checks(train, val)):
        print(f"{'' if i else 'checked':10}{line}")


def make_sampler(seed: int, train: Dataset, files: list, weights, replay_shares) -> Sampler:
    """The order of the examples, not packed; prints how often each file is drawn from where that is not once."""
    sizes = train.examples.sizes
    if 0 in sizes:
        why = "all of it validates; give --val FILE, or --val-fraction 0"
        raise UserError(f"{files[sizes.index(0)]}: no example of it is left to train on, {why}")
    sampler = Sampler(train.lengths, sizes, allocate_samples(sizes, weights, replay_shares), seed)
    if weights or replay_shares:
        total = sum(sampler.samples_per_epoch)
        for file, size, samples in zip(files, sizes, sampler.samples_per_epoch, strict=True):
            repeats = (
                f"; runs out after {size * total // samples:,} draws, and begins again"
                if samples > size
                else ""
            )
            print(
                f"          of {total:,} draws an epoch {samples:,} of {file}: {samples / size:.2f} times each{repeats}"
            )
    return sampler


def load(
    paths: list[str | Path],
    tokenizer: Tokenizer,
    seq_len: int,
    train_on: str = "answers",
    trees: str = "best",
    print_fn: Callable[[str], None] = lambda line: None,
    map_fn: Map | None = None,
) -> Dataset:
    """The examples of some files, at most seq_len tokens long.

    train_on, trees: as the flags of those names. print_fn: is given lines about what was found and left out. map_fn: a
    user's function that each record goes through. Raises UserError where nothing is left to train on.
    """
    roles, last_only = TRAIN_ON[train_on]
    rows, sources = [], [open_source(path, trees, map_fn) for path in paths]
    for source in sources:
        rows.append(tokenized_rows(source, tokenizer, roles))
        cached = ", tokenised before" if rows[-1].cached else ""
        print_fn(f"data      {source.summary(rows[-1].stats)}{cached}")
        if source.format.name in ("preferences", "KTO"):
            good = "chosen" if source.format.name == "preferences" else "good"
            print_fn(
                f"          trained on the {good} answers alone; an objective for the others there is not yet"
            )
    dataset = cut(rows, seq_len, last_only)
    dataset.formats = tuple(source.format.name for source in sources)
    if train_on != "answers" and not dataset.chat:
        raise UserError(
            f"--train-on {train_on}: plain text is trained whole, and there is no conversation"
        )
    for reason, count in dataset.dropped.items():
        print_fn(
            f"          {'shortened' if reason.startswith('cut') else 'left out'}: {count:,} records {reason}"
        )
    if not len(dataset):
        reasons = "; ".join(f"{count} {reason}" for reason, count in dataset.dropped.items())
        raise UserError(f"{', '.join(map(str, paths))}: no record can be trained on ({reasons})")
    return dataset


def split(dataset: Dataset, fraction: float) -> tuple[Dataset, Dataset]:
    """(training, validation), the latter about `fraction` of the examples and never over twice that, or one.

    An example's side is decided by a hash of its prompt, so that it depends on neither seed nor order, and examples
    with one prompt, letter case and spaces aside, stay together: a prompt that very many share is trained on.
    Validation is empty where no prompt is rare enough; UserError where all prompts would be in it.
    """
    everything = np.ones(len(dataset), bool)
    if fraction == 0:
        return dataset, dataset.take(~everything)
    prompts, group, size = np.unique(
        dataset.prompts, return_inverse=True, return_counts=True
    )  # ascending
    chosen, room = np.zeros(len(prompts), bool), max(1.0, 2 * fraction * len(dataset))
    for i, prompt in enumerate(prompts):
        if int(prompt) / 2**64 > fraction and chosen.any():
            break
        if size[i] <= room:
            chosen[i] = True
            room -= size[i]
    if chosen.all() and len(prompts) > 1:
        raise UserError(
            f"--val-fraction {fraction:g}: leaves none of {len(prompts)} prompts to train on; take less"
        )
    if chosen.all():
        chosen[:] = False  # a single prompt
    train = dataset.take(~chosen[group])
    train.dropped = dataset.dropped
    return train, dataset.take(chosen[group])


# ---- batches ----


@dataclass
class Batch:
    """Whole examples, one after the other, without padding.

    tokens: int64 [N]. rows: int64 [K], the rows whose next token is trained; targets: int64 [K], that token.
    loss_weights: float32 [K], or None if all are 1. replay_weights: float32 [K], the loss weights of replayed examples
    and 0 for others, or None if there are none. loss_weight_sum, replay_weight_sum: their sums over this batch.
    num_tokens: tokens in the batch, excluding the padding that keeps ranks in step.
    """

    tokens: Tensor
    documents: Documents | ShardedDocuments
    rows: Tensor
    targets: Tensor
    loss_weights: Tensor | None = None
    loss_weight_sum: float = 0.0
    replay_weights: Tensor | None = None
    replay_weight_sum: float = 0.0
    num_tokens: int = 0
    examples: Sequence[Example] = ()

    def __post_init__(self):
        if self.loss_weights is None:
            self.loss_weight_sum = float(len(self.targets))


class MicroBatches:
    """Yields, for each step, this rank's micro-batches, which `gradient accumulation` adds up to one step.

    All ranks get equally many, because collectives must match: a rank with fewer rows is given DUMMY_EXAMPLE.
    max_tokens: of a micro-batch; default: `max_tokens_per_micro_batch`. context_parallel: ranks that share a batch.
    dropout: whether each example gets a seed for its dropout.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: Sampler,
        device: torch.device,
        batch_size: int,
        accumulate: int = 1,
        max_tokens: int | None = None,
        seed: int = 0,
        dropout: bool = False,
        context_parallel: int = 1,
    ):
        self.dataset, self.sampler, self.device = dataset, sampler, device
        self.batch_size, self.rows_per_rank = batch_size, batch_size * accumulate
        self.max_tokens = (max_tokens or max_tokens_per_micro_batch(device)) * context_parallel
        self.seed, self.dropout = seed, dropout

    def step(self, step: int) -> list[Batch]:
        """The micro-batches of optimizer step `step`, counted from 0. Steps have to be asked for in order: the sampler
        goes on to its next rows."""
        context = distributed.context_parallel
        return [collate(examples, self.device, context) for examples in self.examples_of_step(step)]

    def examples_of_step(self, step: int) -> list[list[Example]]:
        """As `step`, before the batches are made."""
        rows = self.sampler.step(self.rows_per_rank * distributed.dp_size())
        sizes = [int(self.dataset.lengths[row].sum()) for row in rows]
        row_numbers = distributed.balance_across_ranks(sizes, distributed.dp_size())
        cuts = [
            split_micro_batches([sizes[i] for i in numbers], self.batch_size, self.max_tokens)
            for numbers in row_numbers
        ]
        mine, my_cuts = row_numbers[distributed.dp_rank()], cuts[distributed.dp_rank()]
        micro_batches = [
            [example for k in cut for example in self.row_examples(rows, mine[k], step)]
            for cut in my_cuts
        ]
        most = max(map(len, cuts))
        return micro_batches + [[DUMMY_EXAMPLE]] * (most - len(micro_batches))

    def row_examples(self, rows: list[list[int]], number: int, step: int) -> list[Example]:
        """The examples of a row, each with a dropout seed that follows from the run's seed and its place in the run."""
        examples = [self.dataset.examples[i] for i in rows[number]]
        if not self.dropout:
            return examples
        places = (f"{self.seed} {step} {number} {place}".encode() for place in range(len(examples)))
        seeds = [
            int.from_bytes(hashlib.blake2b(place, digest_size=7).digest(), "little")
            for place in places
        ]
        return [
            dataclasses.replace(example, dropout_seed=seed)
            for example, seed in zip(examples, seeds, strict=True)
        ]


def batches_by_length(
    dataset: Dataset,
    batch_size: int,
    device: torch.device | str = "cpu",
    dp_size: int = 1,
    dp_rank: int = 0,
    context: ContextParallel | None = None,
    max_tokens: int | None = None,
) -> Iterator[Batch]:
    """Yields all examples of a dataset in flat batches, each made when it is asked for.

    Of several ranks each gets every dp_size-th batch, and as many as the others. max_tokens: of a batch; default:
    `max_tokens_per_micro_batch`.
    """
    cuts = split_micro_batches(
        dataset.lengths.tolist(), batch_size, max_tokens or max_tokens_per_micro_batch(device)
    )
    for start in range(0, len(cuts), dp_size):
        mine = cuts[start + dp_rank] if start + dp_rank < len(cuts) else None
        examples = [DUMMY_EXAMPLE] if mine is None else [dataset.examples[i] for i in mine]
        yield collate(examples, device, context)


def batches_of_rows(
    rows: Sequence[list[Example]],
    batch_size: int,
    device: torch.device | str = "cpu",
    max_tokens: int | None = None,
) -> list[Batch]:
    """Rows of examples, sorted by length, in flat batches of at most batch_size rows and, where these are long, of
    about max_tokens tokens (default: `max_tokens_per_micro_batch`): what a step computes is the same, and its memory is
    bounded."""
    sizes = [sum(len(example.ids) for example in row) for row in rows]
    cuts = split_micro_batches(sizes, batch_size, max_tokens or max_tokens_per_micro_batch(device))
    return [collate([example for i in cut for example in rows[i]], device) for cut in cuts]


def split_micro_batches(sizes: Sequence[int], batch_size: int, max_tokens: int) -> list[list[int]]:
    """The numbers of rows of these sizes in tokens, sorted by size, in groups of at most batch_size rows and max_tokens
    tokens; a longer row is a group of its own."""
    order, groups = sorted(range(len(sizes)), key=lambda i: sizes[i]), []
    for start in range(0, len(order), batch_size):
        tokens = max_tokens
        for i in order[start : start + batch_size]:
            if i == order[start] or tokens + sizes[i] > max_tokens:
                groups.append([])
                tokens = 0
            groups[-1].append(i)
            tokens += sizes[i]
    return groups


def max_tokens_per_micro_batch(device: torch.device | str) -> int:
    """The number of tokens of a flat batch from which on no product gets faster. On a GPU planning/memory.py chooses
    fewer where these do not fit."""
    return 2048 if torch.device(device).type == "cpu" else 16384


def collate(
    examples: Sequence[Example],
    device: torch.device | str = "cpu",
    context: ContextParallel | None = None,
) -> Batch:
    """The flat batch of some examples. context: of ranks that share each batch; of it, this rank's tokens are made."""
    lengths = [len(example.ids) for example in examples]
    tokens = np.concatenate([np.asarray(example.ids, np.int64) for example in examples])
    weights = np.concatenate([np.asarray(example.loss_weights, np.float32) for example in examples])
    weights[np.cumsum([0, *lengths[:-1]])] = (
        0  # an example's first token has no row before it: never trained
    )
    predicted = np.flatnonzero(weights)
    weights = weights[predicted]
    rows, targets, replay_weights = predicted - 1, tokens[predicted], None
    all_ones = bool((weights == 1).all())
    if any(example.is_replay for example in examples):
        is_replay = np.array([example.is_replay for example in examples], np.float32)
        replay_weights = weights * np.repeat(is_replay, lengths)[predicted]
    seeds = None
    if examples[0].dropout_seed is not None:
        seeds = [example.dropout_seed or 0 for example in examples]
    num_tokens = 0 if examples[0] is DUMMY_EXAMPLE else len(tokens)
    if context and (padding := context.padding(len(tokens))):
        lengths, tokens = [*lengths, padding], np.pad(tokens, (0, padding))
        seeds = seeds and [*seeds, 0]
    documents = Documents(lengths, device)
    if seeds is not None:
        documents.dropout_seeds = (
            to_device(np.repeat(seeds, lengths), device) + documents.positions * 0x9E3779B1
        )
    if context:
        num_tokens = sum(
            max(0, min(part.stop, num_tokens) - part.start) for part in context.mine(len(tokens))
        )
        rows = context.local(rows, len(tokens))
        here = rows >= 0
        rows, targets, weights = rows[here], targets[here], weights[here]
        replay_weights = None if replay_weights is None else replay_weights[here]
        tokens, documents = context.take(tokens), ShardedDocuments(documents, context)
    batch = Batch(
        tokens=to_device(tokens, device),
        documents=documents,
        rows=to_device(rows, device),
        targets=to_device(targets, device),
        loss_weights=None if all_ones else to_device(weights, device),
        loss_weight_sum=float(weights.sum(dtype=np.float64)),
        num_tokens=num_tokens,
        examples=examples,
    )
    if replay_weights is not None:
        batch.replay_weights = to_device(replay_weights, device)
        batch.replay_weight_sum = float(replay_weights.sum(dtype=np.float64))
    return batch


def main() -> None:
    """Runs `data.py inspect`, `convert` or `split`."""
    from dataset import inspection
    from interop.resolve import tokenizer_of_model

    inspection.main(tokenizer_of_model)


if __name__ == "__main__":
    from common.errors import run

    run(main)
