"""From files to micro-batches: the examples of some files, a validation split, their order, and
flat batches of them.

A token is trained where the mask says so. In a conversation these are the answers and the token
that ends each; the tokenizer's template decides where they lie. In plain text it is every token.
Whatever cannot be trained as it stands (an answer beyond --seq-len, a record that the template
refuses) is left out, counted and said, never cut in silence.

    python data.py inspect FILES --model DIR     what stands in them, as the model will see it
    python data.py convert FILES --out OUT.jsonl any format as messages
    python data.py split FILES --out DIR         train.jsonl, val.jsonl and test.jsonl, near-duplicates kept together

A batch is flat: `tokens` [N], one example after another without padding, the documents' lengths,
and the positions whose next token is trained, so that nothing else ever reaches the output head.
Position i predicts token i + 1.
"""

from common.errors import run
from dataset import inspection

if __name__ == "__main__":
    # --help and a mistake in a flag are answered here: what is imported below takes seconds.
    run(inspection.arguments)

import copy
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import distributed
from common.console import number_of, one_line
from common.errors import LONGEST_LINE, UserError, printable
from common.remote_names import shown
from dataset.columns import ignored_facts
from dataset.encoding import (
    AS_CLASSES,
    AS_JUDGED,
    AS_PROMPTS,
    AS_TEXTS,
    PAIR_KINDS,
    check_format,
)
from dataset.examples import (
    DUMMY_EXAMPLE,
    TRAIN_ON,
    TRUNCATE,
    Dataset,
    Example,
    ExampleIndex,
    cut,
    draw_examples,
    too_long_warning,
)
from dataset.faults import WARN_ABOVE
from dataset.folders import TEST, TRAIN, VALIDATION, Fetched
from dataset.formats import Map, Source, open_source
from dataset.inspection import quick_checks, rendered_chats
from dataset.prompts import PROMPT_FORMATS
from dataset.sampler import Sampler, allocate_samples
from dataset.token_cache import Rows, tokenized_rows
from dataset.whole_examples import check_labels, whole_examples, with_partners
from flags import VAL_FRACTION, Flags, parse_replay, parse_weights
from interop.remote_data import fetch_data
from kernels.attention import Documents
from kernels.context_parallel import ContextParallel, ShardedDocuments
from kernels.triton_utils import to_device
from tokenizer import Tokenizer

ASSETS = Path(__file__).resolve().parent / "assets"
BUNDLED_TASK: dict[str, list[str | Path]] = {
    part: [ASSETS / f"booking_{part}.jsonl"] for part in ("train", "val", "test")
}
# A few ordinary questions and answers, so that the model does not forget how to answer them.
BUNDLED_TASK["train"].append(ASSETS / "general_chat.jsonl")
# Steps of a packed epoch from which packing is the default on a GPU. With fewer, small data learns
# too little.
PACK_FROM_STEPS = 100
# Preference data whose good answers are trained on as if they were plain conversations: the name of
# the format, what it calls these answers, and the objectives that learn from the others as well.
GOOD_ANSWERS = {
    "preferences": ("chosen", "dpo (or ipo, simpo, orpo, kto), or reward for a reward model"),
    "KTO": ("good", "kto"),
}
# Knuth's constant of multiplicative hashing, a prime near 2^32 / golden ratio: it tells the seeds of an
# example's tokens apart.
SEED_STRIDE = 0x9E3779B1
# Ends the line of a file whose token rows were in the cache.
FROM_CACHE = ", tokenised before"


# ---- a run's data ----


@dataclass
class TrainingData:
    """What a run trains on, in which order, and what validates it.

    val: examples like the trained ones. replay_val: some of the replayed data; None without.
    general: of --forget-data; None without.
    seq_len, val_fraction, pack: the settings that were chosen while the files were read.
    """

    train: Dataset
    val: Dataset
    replay_val: Dataset | None
    sampler: Sampler
    seq_len: int
    val_fraction: float | None
    pack: bool
    general: Dataset | None = None

    def validating_on(self, limit: int) -> "TrainingData":
        """Returns these data with at most `limit` examples to validate on, of the replay as many;
        0: with all of them."""
        if not limit:
            return self
        replay_val = self.replay_val and sample_by_hash(self.replay_val, limit)
        val = sample_by_hash(self.val, limit)
        return dataclasses.replace(self, val=val, replay_val=replay_val)


def sample_by_hash(dataset: Dataset, count: int) -> Dataset:
    """Returns at most `count` examples: those with the smallest hash of their prompt.

    So the choice depends on neither seed nor order, and more of them hold the fewer.
    """
    if len(dataset) <= count:
        return dataset
    chosen = np.zeros(len(dataset), bool)
    chosen[np.argsort(dataset.prompts, kind="stable")[:count]] = True
    return dataset.take(chosen)


def load_training_data(
    flags: Flags,
    tokenizer: Tokenizer,
    max_positions: int,
    vocab_size: int,
    device: torch.device,
    kind: str = AS_TEXTS,
    label_names: Sequence[str] = (),
) -> TrainingData:
    """Reads the files of --data, --val and --replay as token rows and decides their order.

    Prints what was found, chosen and left out.
    max_positions, vocab_size: of the model.
    kind: what the examples of --data and --val are, of dataset/encoding.py.
    label_names: the classes that the model tells apart already, if it does.
    """
    seq_len = flags.seq_len or min(2048, max_positions)
    if seq_len > max_positions:
        raise UserError(
            f"--seq-len {seq_len}: the model has {max_positions} positions; --rope-scaling yarn=2 would stretch them"
        )

    flag = f"--objective {flags.objective}"
    answer_tokens = 0
    if kind == AS_PROMPTS:
        assert flags.max_new_tokens is not None, "see with_defaults_of_objective"
        answer_tokens = flags.max_new_tokens
        if answer_tokens >= seq_len:
            raise UserError(
                f"--max-new-tokens {answer_tokens}: leaves no room for a prompt in --seq-len {seq_len}"
            )

    def read(
        paths: Sequence[str | Path],
        map_fn: Map | None = None,
        part: str = TRAIN,
        kind: str = AS_TEXTS,
        label_names: Sequence[str] = (),
    ) -> Dataset:
        dataset = load(
            paths, tokenizer, seq_len, flags.train_on, flags.trees, print, map_fn, part, fetch,
            flags.truncate, flags.skip_bad, kind, flag, label_names, answer_tokens,
        )  # fmt: skip
        check_tokens(dataset, vocab_size, ", ".join(map(shown, paths)))
        return dataset

    # A run that is resumed goes on with the data that it has begun with.
    fetch = functools.partial(fetch_data, keeps=bool(flags.resume))
    named_files, weights = parse_weights(flags.data)
    files: list[str | Path] = list(named_files or BUNDLED_TASK["train"])
    if not named_files and kind == AS_PROMPTS:
        # No reward is made for the general questions behind the task.
        files = files[:1]
    map_fn = Map(flags.map) if flags.map else None
    check_system(tokenizer)
    dataset = read(files, map_fn, kind=kind, label_names=label_names)
    if tokenizer.system and not dataset.chat and "system" in flags.given:
        raise UserError("--system: plain text has no system message")

    val_files: list[str | Path] = []
    if flags.val:
        val_files = [flags.val]
    elif not flags.data:
        val_files = BUNDLED_TASK["val"]
    elif flags.val_fraction is None:
        # Folders and files that have a part of their own to validate with.
        val_files = list(dataset.with_validation)
    val_fraction = flags.val_fraction
    if val_files:
        train = dataset
        val = read(val_files, map_fn, VALIDATION, kind, dataset.label_names)
    else:
        if val_fraction is None:
            val_fraction = VAL_FRACTION
        train, val = split(dataset, val_fraction)
    if not len(val) and flags.patience:
        raise UserError(
            "--patience counts validations, and there is nothing to validate with; give --val FILE"
        )
    if not len(val) and val_fraction:
        warning = "no validation, the prompts are too alike to part them; give --val FILE"
        print(f"          WARNING: {warning}")
    check_labels(train, ", ".join(map(shown, files)), flag)
    if flags.limit is not None:
        train = limit_examples(train, files, flags.limit, flags.seed)
    if kind == AS_JUDGED:
        train, val = with_partners(train), with_partners(val)
    print_counts(train, val, tokenizer)

    formats = dataset.formats
    replay_val = None
    replay_shares: list[float] = []
    if flags.replay:
        replay_files, replay_shares = parse_replay(flags.replay)
        replayed = read(replay_files)
        formats += replayed.formats
        held_out = VAL_FRACTION if val_fraction is None else val_fraction
        # Where nothing validates, nothing of the replay is held out either.
        if not len(val):
            held_out = 0.0
        replay, replay_held_out = split(replayed, held_out)
        if len(replay_held_out):
            replay_val = replay_held_out
        train = train.with_replay(replay)
        files = [*files, *replay_files]
    if flags.trees == "all" and not any("OASST" in each for each in formats):
        raise UserError("--trees all: no file holds OASST trees")

    names = [shown(file) for file in files]
    sampler = make_sampler(flags.seed, train, names, weights, replay_shares)
    # Both texts of a pair lie in one row.
    row_length = 2 * seq_len if kind in PAIR_KINDS else seq_len
    sampler = choose_packing(sampler, flags, row_length, device)
    pack = sampler.seq_len is not None
    general = None
    if flags.forget_data:
        # The part that others look at as well: nothing is trained on it.
        general = read([flags.forget_data], part=VALIDATION)
    return TrainingData(train, val, replay_val, sampler, seq_len, val_fraction, pack, general)


def check_system(tokenizer: Tokenizer) -> None:
    """Raises UserError if the chat template has no place for the tokenizer's system message."""
    reason = tokenizer.why_no_system(tokenizer.system) if tokenizer.system else ""
    if reason:
        raise UserError(f"--system: can't be shown to the model ({reason}); --system '' for none")


def limit_examples(dataset: Dataset, files: Sequence[str | Path], count: int, seed: int) -> Dataset:
    """Returns `count` examples of the files, each of which gives its share, and prints how many of
    how many these are. Raises UserError if there are fewer examples than files."""
    if count < len(files):
        raise UserError(f"--limit {count}: there are {len(files)} files, of which each gives some")
    assert isinstance(dataset.examples, ExampleIndex)
    index = dataset.examples
    if count >= len(index):
        print(f"          --limit {count:,}: there are {len(index):,} examples, all are taken")
        return dataset
    contents = np.concatenate([rows.contents for rows in index.rows])
    first_records = np.cumsum([0, *[len(rows) for rows in index.rows]])
    contents = contents[first_records[index.source] + index.row]
    chosen = draw_examples(dataset.prompts, index.start, contents, index.source, count, seed)
    unit = "examples" if dataset.chat else "pieces of text"
    print(f"          --limit: {count:,} of {len(index):,} {unit}, drawn by --seed {seed}")
    sample = dataset.take(chosen)
    sample.dropped = dataset.dropped
    return sample


def print_counts(train: Dataset, val: Dataset, tokenizer: Tokenizer) -> None:
    """Prints how much there is to train on and to validate with, and what looks wrong about it."""
    template = f"; chat template: {tokenizer.template_name}" if train.chat else ""
    trained = f" of which {train.trained_tokens:,} trained"
    if train.kind == AS_CLASSES:
        trained = f", in {len(train.label_names):,} classes"
        template = ""
    what = "examples to train on"
    if train.kind == AS_PROMPTS:
        what = "prompts to answer"
        trained = ""
    print(
        f"          {len(train):,} {what}, {train.tokens:,} tokens{trained};"
        f" {len(val):,} to validate{template}"
    )
    if train.label_names:
        print(f"          {counts_of_labels(train)}")
    if train.chat and tokenizer.writes_date:
        print(f"          {tokenizer.date_note}, in the whole run; --date sets another")
    if train.chat and tokenizer.system:
        print(
            f'          system message "{one_line(tokenizer.system, 60)}" before conversations that'
            " have none; --system sets another"
        )
    label = "checked"  # before the first line only
    for line in quick_checks(train, val):
        print(f"{label:10}{line}")
        label = ""


def counts_of_labels(dataset: Dataset) -> str:
    """Returns how many examples there are of each class or judgment, in a line."""
    assert isinstance(dataset.examples, ExampleIndex) and dataset.examples.label is not None
    counts = np.bincount(dataset.examples.label, minlength=len(dataset.label_names)).tolist()
    names = [one_line(name, 30) for name in dataset.label_names]
    return one_line(", ".join(f"{name} {n:,}" for name, n in zip(names, counts, strict=True)), 300)


def make_sampler(
    seed: int,
    train: Dataset,
    files: Sequence[str],
    weights: Sequence[float] | None,
    replay_shares: Sequence[float],
) -> Sampler:
    """Returns the order of the examples, not packed.

    Prints how often each file is drawn from where that is not once.
    """
    assert isinstance(train.examples, ExampleIndex)
    sizes = train.examples.sizes
    if 0 in sizes:
        why = "all of it validates; give --val FILE, or --val-fraction 0"
        raise UserError(f"{files[sizes.index(0)]}: no example of it is left to train on, {why}")
    samples_per_epoch = allocate_samples(sizes, weights, replay_shares)
    if weights or replay_shares:
        total = sum(samples_per_epoch)
        for file, size, samples in zip(files, sizes, samples_per_epoch, strict=True):
            repeats = ""
            if samples > size:
                first_repeat = size * total // samples
                repeats = f"; runs out after {first_repeat:,} draws, and begins again"
            print(
                f"          of {total:,} draws an epoch {samples:,} of {file}:"
                f" {samples / size:.2f} times each{repeats}"
            )
    return Sampler(train.lengths, sizes, samples_per_epoch, seed)


def choose_packing(sampler: Sampler, flags: Flags, seq_len: int, device: torch.device) -> Sampler:
    """Returns the sampler as it is, or one that packs examples into rows of seq_len tokens.

    --pack and --no-pack decide. With neither, a run on a GPU packs if its epoch has
    PACK_FROM_STEPS steps even so. Prints how full the rows are.
    """
    packed = dataclasses.replace(sampler, seq_len=seq_len)
    pack = flags.pack
    reason = ""
    if pack is None:
        rows_per_step = flags.batch_size * flags.accumulate * distributed.dp_size()
        # On a CPU the rows are not even counted: that would pack an epoch for nothing.
        pack = device.type == "cuda" and packed.epoch_rows() >= PACK_FROM_STEPS * rows_per_step
        reason = (
            f"; an epoch of {PACK_FROM_STEPS} steps and more, --no-pack for batches of examples"
        )
    if not pack:
        return sampler
    rows = packed.epoch_rows()
    fill = sampler.epoch_tokens() / (rows * seq_len)
    examples = sum(sampler.samples_per_epoch)
    print(
        f"packed    {examples:,} examples in {rows:,} rows of {seq_len:,} tokens,"
        f" {fill:.1%} full{reason}"
    )
    return packed


def check_tokens(dataset: Dataset, vocab_size: int, files: str) -> None:
    """Raises UserError if a dataset holds a token that the model's embedding lacks. files: that it
    was read from, for the message."""
    assert isinstance(dataset.examples, ExampleIndex)
    largest = max(rows.largest for rows in dataset.examples.rows)
    # On a GPU the embedding would end the run at this token, without naming it.
    if largest >= vocab_size:
        raise UserError(
            f"{files}: token {largest} of the tokenizer is beyond the model's {vocab_size}"
        )


def load(
    paths: Sequence[str | Path | Fetched],
    tokenizer: Tokenizer,
    seq_len: int,
    train_on: str = "answers",
    trees: str = "best",
    print_fn: Callable[[str], None] = lambda line: None,
    map_fn: Map | None = None,
    part: str = TRAIN,
    fetch: Callable = fetch_data,
    truncate: str = TRUNCATE[0],
    skip_bad: bool | None = None,
    kind: str = AS_TEXTS,
    flag: str = "",
    label_names: Sequence[str] = (),
    answer_tokens: int = 0,
) -> Dataset:
    """Returns the examples of some files, at most seq_len tokens long.

    paths: files and folders of this disk, or names of data elsewhere, which are fetched.
    train_on, trees: as the flags of those names.
    print_fn: is given lines about what was found and left out.
    map_fn: a user's function that each record goes through.
    part: which part is read of folders and files that have parts to train, validate and test.
    fetch: gets copies of data that lie elsewhere.
    truncate: as the flag of that name.
    skip_bad: leave out records that can't be read; None: no, and there is no flag that would.
    kind: what an example is, of dataset/encoding.py. flag: what asks for that kind, for messages.
    label_names: the classes, where they are known from other data.
    answer_tokens: so many must fit behind a prompt.

    Raises UserError where nothing is left to train on, and for records that can't be read.
    """
    roles, last_only = TRAIN_ON[train_on]
    # All files are opened before the first is tokenised: a wrong name ends the run at once.
    formats = PROMPT_FORMATS if kind == AS_PROMPTS else None
    sources = [
        open_source(fetch(path, part), trees, map_fn, part, skip_bad, formats) for path in paths
    ]
    rows = []
    with_validation = []
    for path, source in zip(paths, sources, strict=True):
        source.system = tokenizer.system
        check_format(kind, source.format.name, shown(path), flag)
        source_rows = tokenized_rows(
            source, tokenizer, roles, with_heads=truncate == "prompt", kind=kind
        )
        rows.append(source_rows)
        cached = FROM_CACHE if source_rows.cached else ""
        print_fn(f"data      {source.summary(source_rows.stats)}{cached}")
        for line in source_warnings(source, source_rows):
            print_fn(f"          {line}")
        if source.has_validation(source_rows.stats):
            with_validation.append(path)
        good, objectives = GOOD_ANSWERS.get(source.format.name, ("", ""))
        if good and kind == AS_TEXTS:
            print_fn(
                f"          trained on the {good} answers alone; to learn from the others as well:"
                f" --objective {objectives}"
            )
    if kind == AS_TEXTS:
        dataset = cut(rows, seq_len, last_only, truncate)
    else:
        dataset = whole_examples(rows, seq_len, label_names, answer_tokens)
    dataset.formats = tuple(source.format.name for source in sources)
    dataset.sources = tuple(sources)
    dataset.with_validation = tuple(with_validation)
    if train_on != "answers" and not dataset.chat:
        raise UserError(
            f"--train-on {train_on}: plain text is trained whole, and there is no conversation"
        )
    for reason, count in dataset.dropped.items():
        what = "shortened" if reason.startswith("cut") else "left out"
        print_fn(f"          {what}: {number_of(count, 'record')} {reason}")
    # Whole answers are not cut, so there is no --truncate prompt for them.
    advice = None if part == TEST else truncate if kind == AS_TEXTS else ""
    too_long = too_long_warning(rows, dataset.dropped, advice)
    if too_long:
        print_fn(f"          WARNING: {too_long}")
    if not len(dataset):
        names = ", ".join(map(shown, paths))
        reasons = "; ".join(f"{count} {reason}" for reason, count in dataset.dropped.items())
        raise UserError(f"{names}: no record can be trained on ({reasons})")
    return dataset


def source_warnings(source: Source, rows: Rows) -> Iterator[str]:
    """Yields what a user must know about the records of a source, beside their number."""
    stats = rows.stats
    if stats.num_faults:
        first = printable(source.fault_lines(stats)[0][:LONGEST_LINE])
        number = number_of(stats.num_faults, "faulty record")
        yield f"left out by --skip-bad: {number}, the first: {first}"
    num_read = stats.num_faults + stats.records
    if stats.num_faults > WARN_ABOVE * num_read:
        yield f"WARNING: {100 * stats.num_faults / num_read:.1f} % of the records are faulty"
    for warning in (rendered_chats(rows), ignored_facts(stats)):
        if warning:
            yield f"WARNING: {warning}"
    for note in rows.notes:
        yield f"NOTE: {note}"


def split(dataset: Dataset, fraction: float) -> tuple[Dataset, Dataset]:
    """Returns (training, validation), the latter about `fraction` of the examples.

    Validation has never over twice that, unless it is one example. An example's side is decided by
    a hash of its prompt, so that it depends on neither seed nor order, and examples with one
    prompt, letter case and spaces aside, stay together. A prompt that very many share is trained
    on. Validation is empty where no prompt is rare enough.

    Raises UserError where all prompts would be in validation.
    """
    if fraction == 0:
        nothing = np.zeros(len(dataset), bool)
        return dataset, dataset.take(nothing)
    # prompts: the different hashes, ascending. group: of each example, the number of its prompt.
    prompts, group, sizes = np.unique(dataset.prompts, return_inverse=True, return_counts=True)
    chosen = np.zeros(len(prompts), bool)
    room = max(1.0, 2 * fraction * len(dataset))  # examples that validation still takes
    for i, prompt in enumerate(prompts):
        # Hashes are uniform in [0, 2^64), so that a share `fraction` of the prompts is chosen.
        is_below = int(prompt) / 2**64 <= fraction
        if not is_below and chosen.any():
            break
        if sizes[i] <= room:
            chosen[i] = True
            room -= sizes[i]
    if chosen.all() and len(prompts) > 1:
        raise UserError(
            f"--val-fraction {fraction:g}: leaves none of {len(prompts)} prompts to train on;"
            " take less"
        )
    # A single prompt is trained on.
    if chosen.all():
        chosen[:] = False
    is_validation = chosen[group]  # of each example
    train = dataset.take(~is_validation)
    train.dropped = dataset.dropped
    return train, dataset.take(is_validation)


# ---- batches ----


@dataclass
class Batch:
    """Whole examples, one after the other, without padding.

    tokens: int64 [N].
    logit_positions: int64 [K], the places in `tokens` whose next token is trained.
    targets: int64 [K], that token.
    loss_weights: float32 [K], or None if all are 1.
    replay_weights: float32 [K], the loss weights of replayed examples and 0 for others, or None if
        there are none.
    loss_weight_sum, replay_weight_sum: their sums over this batch.
    num_tokens: tokens in the batch, excluding the padding that keeps ranks in step.
    texts: what is known of each text, where an objective takes examples as wholes.
    mismatched: of judged answers, their prompts with others' answers; None for others.
    """

    tokens: Tensor
    documents: Documents | ShardedDocuments
    logit_positions: Tensor
    targets: Tensor
    loss_weights: Tensor | None = None
    loss_weight_sum: float = 0.0
    replay_weights: Tensor | None = None
    replay_weight_sum: float = 0.0
    num_tokens: int = 0
    examples: Sequence[Example] = ()
    texts: "Texts | None" = None
    mismatched: "Batch | None" = None

    def __post_init__(self) -> None:
        if self.loss_weights is None:
            self.loss_weight_sum = float(len(self.targets))


@dataclass
class Texts:
    """The texts of a batch, of which each example has one, or two where it is a pair: they come example
    by example, the chosen one first.

    count: texts of examples; a rank without any has a text that counts nothing.
    text_of_target: int64 [K], the number of the text that each trained token is in.
    lengths: float32 [count], trained tokens of each.
    weights: float32 [examples]. weight_sum: their sum.
    labels: int64 [examples], of classes or judgments; -1 where there are none.
    reference: float32 [count], the log-probability of each by the model before step 1, where it was
        computed beforehand.
    """

    count: int
    text_of_target: Tensor
    lengths: Tensor
    weights: Tensor
    weight_sum: float
    labels: Tensor
    reference: Tensor | None = None


def needs_seeds(settings) -> bool:
    """True if a run draws random numbers for each example."""
    return bool(settings.dropout or settings.neftune)


class MicroBatches:
    """Yields, for each step, this rank's micro-batches, which `gradient accumulation` adds up to
    one step.

    All ranks get equally many, because collectives must match: a rank with fewer rows is given
    DUMMY_EXAMPLE.

    max_tokens: of a micro-batch; default: `max_tokens_per_micro_batch`.
    seeded: whether each example gets a seed, for what is drawn for it (dropout, noise on embeddings).
        Prompts do in any case, for their answers.
    context_parallel: how many ranks share a batch.
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
        seeded: bool = False,
        context_parallel: int = 1,
    ):
        self.dataset = dataset
        self.sampler = sampler
        self.device = device
        self.batch_size = batch_size
        self.rows_per_rank = batch_size * accumulate
        self.max_tokens = (max_tokens or max_tokens_per_micro_batch(device)) * context_parallel
        self.seed = seed
        self.seeded = seeded or dataset.kind == AS_PROMPTS

    def from_here(self) -> "MicroBatches":
        """Returns micro-batches that go on from where these are, and leave them there."""
        copied = copy.copy(self)
        copied.sampler = dataclasses.replace(self.sampler)
        return copied

    def step(self, step: int) -> list[Batch]:
        """Returns the micro-batches of optimizer step `step`, counted from 0.

        Steps have to be asked for in order: the sampler goes on to its next rows.
        """
        return [self.collate(examples) for examples in self.examples_of_step(step)]

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Returns the micro-batch of some examples."""
        whole = self.dataset.kind != AS_TEXTS
        return collate(examples, self.device, distributed.context_parallel, whole)

    def examples_of_step(self, step: int) -> list[list[Example]]:
        """Returns the examples of each micro-batch that `step` makes."""
        rank = distributed.dp_rank()
        rows = self.sampler.step(self.rows_per_rank * distributed.dp_size())
        sizes = [int(self.dataset.lengths[row].sum()) for row in rows]
        # Each rank computes what all of them get, in place of a message, so that it knows how many
        # micro-batches the rank with most of them has.
        rows_of_ranks = distributed.balance_across_ranks(sizes, distributed.dp_size())
        groups_of_ranks = []
        for row_numbers in rows_of_ranks:
            own_sizes = [sizes[i] for i in row_numbers]
            groups_of_ranks.append(split_micro_batches(own_sizes, self.batch_size, self.max_tokens))
        micro_batches = []
        for group in groups_of_ranks[rank]:
            examples: list[Example] = []
            for k in group:
                examples += self.row_examples(rows, rows_of_ranks[rank][k], step)
            micro_batches.append(examples)
        most = max(len(groups) for groups in groups_of_ranks)
        missing = most - len(micro_batches)
        return micro_batches + [[DUMMY_EXAMPLE]] * missing

    def row_examples(self, rows: list[list[int]], number: int, step: int) -> list[Example]:
        """Returns the examples of row `number` of the step's rows.

        Where `seeded`, each has a seed that follows from the run's seed and the example's place in the
        run, so that neither the number of ranks nor gradient accumulation changes what is dropped.
        """
        examples = [self.dataset.examples[i] for i in rows[number]]
        if not self.seeded:
            return examples
        seeded = []
        for place, example in enumerate(examples):
            key = f"{self.seed} {step} {number} {place}".encode()
            # 7 bytes leave room in int64 for what `collate` adds to tell the tokens apart.
            digest = hashlib.blake2b(key, digest_size=7).digest()
            seed = int.from_bytes(digest, "little")
            seeded.append(dataclasses.replace(example, dropout_seed=seed))
        return seeded


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

    Of several ranks each gets every dp_size-th batch, and as many as the others.
    max_tokens: of a batch; default: `max_tokens_per_micro_batch`.
    """
    if not max_tokens:
        max_tokens = max_tokens_per_micro_batch(device)
    groups = split_micro_batches(dataset.lengths.tolist(), batch_size, max_tokens)
    for start in range(0, len(groups), dp_size):
        number = start + dp_rank
        # At the end some ranks have no batch left; collectives must match all the same.
        examples = [DUMMY_EXAMPLE]
        if number < len(groups):
            examples = [dataset.examples[i] for i in groups[number]]
        yield collate(examples, device, context, dataset.kind != AS_TEXTS)


def split_micro_batches(sizes: Sequence[int], batch_size: int, max_tokens: int) -> list[list[int]]:
    """Returns the numbers of rows, sorted by size, in groups of at most batch_size rows.

    sizes: tokens of each row.
    max_tokens: of a group. A longer row is a group of its own.
    """
    # Rows of similar length stand together: attention computes adjacent documents in one call.
    by_size = sorted(range(len(sizes)), key=lambda i: sizes[i])
    groups: list[list[int]] = []
    for start in range(0, len(by_size), batch_size):
        group: list[int] = []
        tokens = 0
        for i in by_size[start : start + batch_size]:
            if group and tokens + sizes[i] > max_tokens:
                groups.append(group)
                group = []
                tokens = 0
            group.append(i)
            tokens += sizes[i]
        groups.append(group)
    return groups


def max_tokens_per_micro_batch(device: torch.device | str) -> int:
    """Returns the number of tokens of a flat batch from which on no product gets faster.

    On a GPU planning/memory.py chooses fewer where these do not fit.
    """
    if torch.device(device).type == "cpu":
        return 2048
    return 16384


def collate(
    examples: Sequence[Example],
    device: torch.device | str = "cpu",
    context: ContextParallel | None = None,
    whole: bool = False,
) -> Batch:
    """Returns the flat batch of some examples.

    context: of ranks that share each batch; of it, this rank's tokens are made.
    whole: for an objective that takes examples as wholes: with `texts`, and `mismatched` where the
        answers are judged.
    """
    lengths = [length for example in examples for length in example.text_lengths]
    tokens = np.concatenate([np.asarray(example.ids, np.int64) for example in examples])  # [N]
    weights = np.concatenate([np.asarray(example.loss_weights, np.float32) for example in examples])
    # A text's first token has none before it that predicts it: it is never trained.
    starts = np.cumsum([0, *lengths[:-1]])
    weights[starts] = 0
    predicted = np.flatnonzero(weights)  # [K]
    logit_positions = predicted - 1
    targets = tokens[predicted]
    weights = weights[predicted]
    # Over the whole batch, before a rank takes its part of it.
    all_ones = bool((weights == 1).all())
    replay_weights = None
    if any(example.is_replay for example in examples):
        is_replay = np.array([example.is_replay for example in examples], np.float32)
        replay_weights = weights * np.repeat(is_replay, lengths)[predicted]
    seeds = None
    if examples[0].dropout_seed is not None:
        seeds = []
        for example in examples:
            # Those of a pair's second text go on behind the first one's, and so are others.
            first = example.dropout_seed or 0
            seeds += [first, first + SEED_STRIDE * example.split][: len(example.text_lengths)]
    num_tokens = 0 if examples[0] is DUMMY_EXAMPLE else len(tokens)

    padding = context.padding(len(tokens)) if context else 0
    if padding:
        lengths.append(padding)
        tokens = np.pad(tokens, (0, padding))
        if seeds is not None:
            seeds.append(0)
    every = Documents(lengths, device)
    if seeds is not None:
        token_seeds = to_device(np.repeat(seeds, lengths), device)
        every.dropout_seeds = token_seeds + every.positions * SEED_STRIDE
    documents: Documents | ShardedDocuments = every
    if context:
        parts = context.mine(len(tokens))
        num_tokens = sum(max(0, min(part.stop, num_tokens) - part.start) for part in parts)
        logit_positions = context.local(logit_positions, len(tokens))
        is_here = logit_positions >= 0
        logit_positions = logit_positions[is_here]
        targets = targets[is_here]
        weights = weights[is_here]
        if replay_weights is not None:
            replay_weights = replay_weights[is_here]
        tokens = context.take(tokens)
        documents = ShardedDocuments(every, context)

    batch = Batch(
        tokens=to_device(tokens, device),
        documents=documents,
        logit_positions=to_device(logit_positions, device),
        targets=to_device(targets, device),
        loss_weights=None if all_ones else to_device(weights, device),
        loss_weight_sum=float(weights.sum(dtype=np.float64)),
        num_tokens=num_tokens,
        examples=examples,
    )
    if replay_weights is not None:
        batch.replay_weights = to_device(replay_weights, device)
        batch.replay_weight_sum = float(replay_weights.sum(dtype=np.float64))
    if whole:
        batch.texts = texts_of_batch(examples, predicted, device)
        if any(example.mismatched is not None for example in examples):
            batch.mismatched = mismatched_batch(examples, device)
    return batch


def texts_of_batch(
    examples: Sequence[Example], predicted: np.ndarray, device: torch.device | str
) -> Texts:
    """Returns the texts of a batch of examples. predicted: int64 [K], the places of its trained tokens."""
    is_dummy = examples[0] is DUMMY_EXAMPLE
    real = [] if is_dummy else examples
    lengths = np.array([length for each in real for length in each.text_lengths], np.int64)
    text_of_target = np.repeat(np.arange(len(lengths)), lengths)[predicted]
    trained = np.bincount(text_of_target, minlength=len(lengths))
    weights = np.array([example.weight for example in real], np.float32)
    labels = np.array([example.label for example in real], np.int64)
    reference = None
    if is_dummy or examples[0].reference:
        # That of a mismatched answer, which comes last, is for the batch of those.
        known = [list(each.reference)[: len(each.text_lengths)] for each in real]
        reference = to_device(np.array(known, np.float32).flatten(), device)
    return Texts(
        count=len(lengths),
        text_of_target=to_device(text_of_target, device),
        lengths=to_device(trained.astype(np.float32), device),
        weights=to_device(weights, device),
        weight_sum=float(weights.sum(dtype=np.float64)),
        labels=to_device(labels, device),
        reference=reference,
    )


def mismatched_batch(examples: Sequence[Example], device: torch.device | str) -> Batch:
    """Returns the batch of the mismatched ones of judged answers. It has no gradient, and so no dropout."""
    others = []
    for example in examples:
        if example.mismatched is not None:
            reference = list(example.reference)[-1:]
            others.append(dataclasses.replace(example.mismatched, reference=reference))
    return collate(others or [DUMMY_EXAMPLE], device, whole=True)


def main() -> None:
    """Runs `data.py inspect`, `convert` or `split`."""
    from interop.resolve import tokenizer_of_model

    inspection.main(tokenizer_of_model, fetch_data)


if __name__ == "__main__":
    run(main)
