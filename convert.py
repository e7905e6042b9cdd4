"""Models from one format into another. Whatever a model comes as, the other files read a Hugging
Face folder.

A GGUF file becomes a Hugging Face folder (interop/gguf_import.py). The way out is here as well: a
folder or an adapter as the file that llama.cpp serves (interop/gguf_export.py), a folder in 4 bits,
an adapter merged into its base, and a result put on the Hub (interop/push.py).

    python convert.py to-folder FILE.gguf FOLDER
    python convert.py to-gguf FOLDER OUT.gguf [--adapter DIR [--quant KIND]] [--type TYPE]
    python convert.py adapter-to-gguf ADAPTER OUT.gguf [--model FOLDER]
    python convert.py to-nf4 FOLDER OUT [--quant nf4|nf4+head]
    python convert.py merge [FOLDER] ADAPTER OUT [--quant KIND] [--check FILE] [--dtype DTYPE]
    python convert.py push FOLDER ORG/NAME
    python convert.py recipe FILE.yaml     the command line of train.py for another program's settings

An adapter is right on the numbers of its base that it was trained on. QLoRA trains on the numbers
that 4 bits stand for (NF4), and its adapter has learnt to make up for their errors; added to the
weights from before, it corrects errors that are not there. So `merge` and `to-gguf` add it to the
numbers of NF4, and write the sum in 16 bits. `merge` measures the loss before and after.
"""

from common.errors import run
from common.script_flags import CHECKED_RECORDS, conversion_arguments

if __name__ == "__main__":
    # --help and a mistake in a flag are answered here: what is imported below takes seconds.
    run(conversion_arguments)

import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import adapter_files
import checkpoint
import data
from adapting.score_head import document_scores, head_labels
from adapting.tables import vocabulary_size
from common.choices import QUANT_KINDS
from common.device import STORAGE_DTYPES
from common.errors import UserError
from common.files import write_json
from common.origin import BASE_FACTS, base_facts
from dataset.examples import Dataset
from evals.loss import loss
from interop.gguf_export import adapter_to_gguf, folder_to_gguf
from interop.gguf_import import gguf_to_folder
from interop.push import push_folder
from interop.recipe import print_recipe
from interop.resolve import (
    base_folder,
    check_adapter,
    model_folder,
    packaged_file,
    pick_base_numbers,
    pick_tokenizer,
    trained_day,
    trained_system,
)
from interop.written import describe_folder, describe_gguf
from kernels.attention import Documents
from kernels.nf4 import dequantized_weight
from methods import load_any_adapter
from model import Transformer, quantized_linears

# Files of assets/, the first of which a tokenizer can read: what --check is where it is not given.
BUNDLED_CHECKS = ("general_chat.jsonl", "general.txt")
# The longest part of a record of --check, in tokens: it is computed twice, perhaps on a CPU.
CHECKED_TOKENS = 256
# What a merged folder's plaintune.json takes over from that of its adapter.
KEPT_FACTS = (*BASE_FACTS, "base_sha256", "date", "system")
# A merged model whose loss is higher by more than this, in nats, is warned of. Rounding to 16 bits
# takes less.
LARGEST_GAP = 0.02


def main() -> None:
    args = conversion_arguments()
    match args.command:
        case "recipe":
            print_recipe(args.file)
        case "to-folder":
            gguf_to_folder(packaged_file(args.file), args.folder)
            print_written(args.folder, describe_folder(args.folder), try_model(args.folder))
        case "to-gguf":
            folder = model_folder(args.folder)
            if args.quant and not args.adapter:
                raise UserError("--quant: says what --adapter is added to, and there is none")
            folder_to_gguf(folder, args.file, args.type, args.adapter, quant=args.quant)
            serve = f"llama-server -m {shlex.quote(str(args.file))}"
            print_written(
                args.file, describe_gguf(args.file), f"{serve}, or {try_model(args.file)}"
            )
        case "adapter-to-gguf":
            base = base_folder(args.model, args.adapter)
            adapter_to_gguf(args.adapter, args.file, base)
            serve = f"llama-server -m BASE.gguf --lora {shlex.quote(str(args.file))}"
            print_written(args.file, describe_gguf(args.file), f"{serve}; {gguf_of_base(base)}")
        case "to-nf4":
            to_nf4(model_folder(args.folder), args.out, args.quant)
            print_written(args.out, describe_folder(args.out), try_model(args.out))
        case "merge":
            dtype = STORAGE_DTYPES[args.dtype] if args.dtype else None
            if args.folder and args.model:
                raise UserError(f"--model {args.model}: the base is given already, {args.folder}")
            merge_folder(
                base_folder(args.folder or args.model, args.adapter),
                args.adapter,
                args.out,
                dtype,
                quant=args.quant,
                check=args.check,
            )
            print_written(args.out, describe_folder(args.out), try_model(args.out))
        case "push":
            push_folder(args.folder, args.name)


def print_written(path: Path, what: str, command: str) -> None:
    """Prints what a conversion has written, and the command that a user tries next."""
    print(f"wrote     {path}: {what}")
    print(f"next      {command}")


def try_model(path: Path) -> str:
    """Returns the command that talks to a model, or measures one with a score head."""
    quoted = shlex.quote(str(path))
    labels = checkpoint.read_config(path).labels if path.is_dir() else None
    if labels is None:
        return f"python generate.py --model {quoted}"
    if len(labels) == 1:
        return f"transformers.AutoModelForSequenceClassification.from_pretrained({str(path)!r})"
    return f"python evaluate.py classify --model {quoted} --data FILE"


def gguf_of_base(base: Path) -> str:
    """Returns what the file is that llama.cpp adds an adapter of this base to."""
    gguf = base_facts(base).get("base_gguf")
    if gguf:
        return f"BASE.gguf is {gguf['file']}"
    make = f"python convert.py to-gguf {shlex.quote(str(base))} BASE.gguf"
    return f"{make} makes its base"


def merge_folder(
    folder: Path,
    adapter: Path,
    out: Path,
    dtype: torch.dtype | None = None,
    print_fn: Callable = print,
    quant: str | None = None,
    check: str | None = None,
) -> None:
    """Writes a Hugging Face folder of the model with the adapter's updates added to its weights.

    dtype: the dtype of the new folder's weights; None: that of the model's files. Sums are computed
        in float32 and rounded once, and a line says how much of the update that loses.
    print_fn: is called with each line for the user.
    quant: the numbers that the updates are added to: a kind of QUANT_KINDS, which the weights are
        written as in `dtype`; "none": as they are stored; None: those that the adapter was trained
        on, if that is known, else as they are stored.
    check: a file of examples. The loss on them is measured with the adapter on what it was trained
        on, and of the new folder; of a model with a score head its scores of them are compared. None:
        of bundled examples; "none": it is not measured.

    If the folder itself is in NF4, all weights are written in `dtype`, as the numbers that the 4
    bits stand for. The adapter's own tokenizer, chat template and generation_config.json take
    precedence over the model's.
    Raises UserError where `out` exists, or the adapter does not fit the model.
    """
    adapter = Path(adapter)
    if Path(out).exists():
        raise UserError(f"{out}: exists already; name a new folder")
    config = checkpoint.read_config(folder)
    check_adapter(folder, adapter)
    dtype = dtype or choose_dtype(folder, config, print_fn)
    kind = pick_base_numbers(folder, adapter, quant, print_fn)
    dataset = None
    if check != "none":
        dataset = read_checked_records(folder, adapter, check, print_fn)
    measure = loss_of_examples if head_labels(config, adapter) is None else scores_of_examples

    # Weights that get another dtype are rounded once, after the sum.
    compute_dtype = torch.float32
    if dtype == checkpoint.stored_dtype(folder):
        compute_dtype = dtype
    # The model as it was trained, which is measured first where it is another than is merged. Of an
    # adapter that does not say what it was trained on, --quant does.
    trained_on = kind
    trained = adapter_files.trained_kind(adapter)
    if trained is not None and not adapter_files.is_quantized(folder):
        trained_on = trained if trained in QUANT_KINDS else None
    before = None
    if dataset is not None and trained_on != kind:
        model = checkpoint.load_model(folder, compute_dtype, quant=trained_on)
        load_any_adapter(model, adapter)
        before = measure(model, dataset)
        # Its memory is free before the next one is loaded.
        del model
    model = checkpoint.load_model(folder, compute_dtype, quant=kind)
    load_any_adapter(model, adapter)
    if dataset is not None and before is None:
        before = measure(model, dataset)

    lost = adapter_files.merge(model, stored=dtype)
    adapter_files.remove_adapter(model)
    # Those that the adapter is not on are still in 4 bits.
    for layer in quantized_linears(model).values():
        weight = dequantized_weight(layer.frozen, model.dtype)
        layer.dequantize(weight)

    def copy_from_adapter(new_folder: Path) -> None:
        checkpoint.copy_tokenizer(adapter, new_folder)
        # What it was trained on, and the date that its template wrote then.
        metadata = adapter_files.adapter_metadata(adapter)
        facts = {key: metadata[key] for key in KEPT_FACTS if key in metadata}
        if facts:
            write_json(facts, new_folder / "plaintune.json")

    padding = checkpoint.save_model(model, out, dtype, copy_from_adapter)
    if padding:
        print_fn(f"NOTE: {padding}")
    del model
    if dataset is not None and before is not None:
        after = measure(checkpoint.load_model(out, compute_dtype), dataset)
        print_gap(before, after, len(dataset), print_fn)
    name = str(dtype).removeprefix("torch.")
    percent = f"{100 * lost:.2g} %"
    print_fn(f"merged    {adapter} into {out}, {name}: rounding lost {percent} of the update")


def choose_dtype(folder: Path, config: checkpoint.Config, print_fn: Callable) -> torch.dtype:
    """Returns the dtype that most of a folder's weights are stored in. Says so where its config.json
    claims another one, and where the folder has several, for the new one has this one alone."""
    dtype = checkpoint.stored_dtype(folder)
    note = checkpoint.dtype_note(config, dtype)
    if note:
        print_fn(f"NOTE: {folder}: {note}")
    counts = checkpoint.stored_dtype_counts(folder)
    if len(counts) > 1:
        shares = []
        for each, count in counts.items():
            share = 100 * count / counts.total()
            shares.append(f"{share:.3g} % in {checkpoint.config_dtype(each)}")
        print_fn(
            f"NOTE: {folder}: its weights are stored {', '.join(shares)}; those of the new folder are"
            f" all in {checkpoint.config_dtype(dtype)}, by which some may be rounded"
        )
    return dtype


def read_checked_records(
    folder: Path, adapter: Path, check: str | None, print_fn: Callable
) -> Dataset | None:
    """Returns the examples on which a merged model is compared; None, and says why, where there is
    no tokenizer to read them by.

    check: a file; None: the bundled questions, or plain text where the chat template is none that
        they can be trained with.
    """
    config = checkpoint.read_config(folder)
    files = [check] if check else [str(data.ASSETS / name) for name in BUNDLED_CHECKS]
    for file in files:
        try:
            tokenizer = pick_tokenizer(folder, adapter, None)
            dataset = data.load([file], tokenizer, min(CHECKED_TOKENS, config.max_positions))
            data.check_tokens(dataset, vocabulary_size(config, adapter), file)
        except UserError as error:
            # What was asked for must be possible; what was not is no reason to merge nothing.
            if check is not None:
                raise
            reason = error
            continue
        return dataset.take(np.arange(min(CHECKED_RECORDS, len(dataset))))
    print_fn(f"check     the loss was not measured ({reason})")
    return None


def loss_of_examples(model: Transformer, dataset: Dataset) -> float:
    return loss(model, dataset)["loss"]


def scores_of_examples(model: Transformer, dataset: Dataset) -> torch.Tensor:
    """Returns the scores of each example by a model's score head, float32 [examples, labels]."""
    scores = []
    with torch.inference_mode():
        for example in dataset.examples:
            ids = torch.tensor(np.asarray(example.ids, np.int64))
            scores.append(document_scores(model, ids, Documents([len(ids)])))
    return torch.cat(scores)


def print_gap(
    before: float | torch.Tensor, after: float | torch.Tensor, count: int, print_fn: Callable
) -> None:
    """Prints what `loss_of_examples` or `scores_of_examples` gives of a model with its adapter, and merged.
    count: the examples of both."""
    if isinstance(before, torch.Tensor):
        furthest = float((after - before).abs().max())
        print_fn(
            f"check     merged, the scores of {count} examples differ by at most {furthest:.2g}; they"
            f" are {float(before.min()):.3g} to {float(before.max()):.3g} with the adapter as it was"
            " trained"
        )
        return
    change = float(after) - before
    # Adding 0 makes 0 of what is rounded to -0.
    shown = round(change, 4) + 0.0
    print_fn(
        f"check     loss {before:.4f} with the adapter as it was trained, {after:.4f} merged"
        f" ({shown:+.4f}), on {count} examples"
    )
    if not change <= LARGEST_GAP:
        print_fn(
            "WARNING: the merged model is worse than the adapter: merge into the numbers that it was"
            " trained on (the default of --quant), in a dtype that rounds less (--dtype fp32)"
        )


def to_nf4(folder: Path, out: Path, quant: str = "nf4", print_fn: Callable = print) -> None:
    """Writes a Hugging Face folder of the model with its linears in NF4, which transformers reads
    with bitsandbytes.

    quant: as in checkpoint.load_model.
    print_fn: is called with each line for the user.
    In the new folder, plaintune.json names the model and the hash of its weights, by which an
    adapter that was trained on one of the two is known to fit the other.
    Raises UserError where `out` exists, where the model is quantised already, or where none of its
    linears can be.
    """
    if Path(out).exists():
        raise UserError(f"{out}: exists already; name a new folder")
    config = checkpoint.read_config(folder)
    if config.raw.get("quantization_config") is not None:
        raise UserError(f"{folder}: is quantised already")
    # In the dtype of the files, so that what stays in it (embeddings, norms) is not rounded.
    dtype = choose_dtype(folder, config, print_fn)
    model = checkpoint.load_model(folder, dtype, quant=quant)
    for name in model.unquantized:
        print_fn(f"NOTE: {name} stays in 16 bits or more, its rows are no whole blocks of 64")

    def write_origin(new_folder: Path) -> None:
        origin = base_facts(folder) | {"base_sha256": checkpoint.fingerprint(folder)}
        origin["quant"] = quant
        # The date that the model was trained to see in its prompts.
        day = trained_day(folder)
        if day:
            origin["date"] = day
        system = trained_system(folder)
        if system:
            origin["system"] = system
        write_json(origin, new_folder / "plaintune.json")

    padding = checkpoint.save_model(model, out, write_extra=write_origin)
    if padding:
        print_fn(f"NOTE: {padding}")


if __name__ == "__main__":
    run(main)
