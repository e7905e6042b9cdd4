"""Models from one format into another. Whatever a model comes as, the other files read a Hugging
Face folder.

A GGUF file becomes a Hugging Face folder (interop/gguf_import.py). The way out is here as well: a
folder or an adapter as the file that llama.cpp serves (interop/gguf_export.py), a folder in 4 bits,
and an adapter merged into its base.

    python convert.py to-folder FILE.gguf FOLDER
    python convert.py to-gguf FOLDER OUT.gguf [--adapter DIR] [--type f32|f16|bf16|q8_0]
    python convert.py adapter-to-gguf ADAPTER OUT.gguf [--model FOLDER]
    python convert.py to-nf4 FOLDER OUT [--quant nf4|nf4+head]
    python convert.py merge FOLDER ADAPTER OUT [--dtype fp32|fp16|bf16]
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

import checkpoint
import lora
from common import errors
from common.device import STORAGE_DTYPES
from common.errors import UserError
from interop.gguf_export import TYPES, adapter_to_gguf, folder_to_gguf
from interop.gguf_import import gguf_to_folder
from interop.resolve import base_folder, model_folder
from kernels.nf4 import dequantized_weight
from model import quantized_linears
from quant import QUANT_KINDS


def main() -> None:
    args = parse_arguments()
    match args.command:
        case "to-folder":
            gguf_to_folder(args.file, args.folder)
        case "to-gguf":
            folder = model_folder(args.folder)
            folder_to_gguf(folder, args.file, args.type, args.adapter)
        case "adapter-to-gguf":
            base = base_folder(args.model, args.adapter)
            adapter_to_gguf(args.adapter, args.file, base)
        case "to-nf4":
            to_nf4(model_folder(args.folder), args.out, args.quant)
        case "merge":
            dtype = STORAGE_DTYPES[args.dtype] if args.dtype else None
            merge_folder(model_folder(args.folder), args.adapter, args.out, dtype)


def parse_arguments() -> argparse.Namespace:
    """Returns the command and its arguments."""
    parser = argparse.ArgumentParser(
        description="Turns models from one format into another.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    model_help = "the model: a folder, a GGUF file or a name on the Hub"

    command = commands.add_parser("to-folder", help="write a GGUF file as a Hugging Face folder")
    command.add_argument("file", type=Path, help="the GGUF file")
    command.add_argument("folder", type=Path, help="the new folder")

    command = commands.add_parser("to-gguf", help="write a model as a GGUF file, for llama.cpp")
    command.add_argument("folder", help=model_help)
    command.add_argument("file", type=Path, help="the new file")
    command.add_argument(
        "--adapter", type=Path, metavar="DIR", help="PEFT LoRA folder to merge into it first"
    )
    command.add_argument(
        "--type", choices=TYPES, default="f32", help="type of the matrices (default: f32)"
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
    command.add_argument("folder", help=model_help)
    command.add_argument("adapter", type=Path, help="PEFT LoRA folder")
    command.add_argument("out", type=Path, help="the new folder")
    command.add_argument(
        "--dtype",
        choices=STORAGE_DTYPES,
        help="dtype to store the new weights in (default: that of the model's files)",
    )
    return parser.parse_args()


def merge_folder(
    folder: Path,
    adapter: Path,
    out: Path,
    dtype: torch.dtype | None = None,
    print_fn: Callable = print,
) -> None:
    """Writes a Hugging Face folder of the model with the adapter's updates added to its weights.

    dtype: the dtype of the new folder's weights; None: that of the model's files. Sums are computed
        in float32 and rounded once, and a line says how much of the update that loses.
    print_fn: is called with each line for the user.

    An adapter of QLoRA is best merged into the weights that its base was quantised from. If the
    folder itself is in NF4, all weights are written in `dtype`, as the numbers that the 4 bits
    stand for. The adapter's own tokenizer, chat template and generation_config.json take precedence
    over the model's.
    Raises UserError where `out` exists, or the adapter does not fit the model.
    """
    if Path(out).exists():
        raise UserError(f"{out}: exists already; name a new folder")
    stored_dtype = checkpoint.stored_dtype(checkpoint.read_config(folder))
    dtype = dtype or stored_dtype
    # Weights that get another dtype are rounded once, after the sum.
    compute_dtype = torch.float32
    if dtype == stored_dtype:
        compute_dtype = dtype
    model = checkpoint.load_model(folder, compute_dtype)
    lora.load_adapter(model, adapter)
    if quantized_linears(model):
        print_fn(
            f"NOTE: {folder} is in NF4, and the merged weights keep the error of its 4 bits;"
            " if you have the weights that it was quantised from, merge into those"
        )
    lost = lora.merge(model, stored=dtype)
    lora.remove_lora(model)
    # Those that the adapter is not on are still in 4 bits.
    for layer in quantized_linears(model).values():
        weight = dequantized_weight(layer.frozen, model.dtype)
        layer.dequantize(weight)

    def copy_adapters_tokenizer(new_folder: Path) -> None:
        checkpoint.copy_tokenizer(Path(adapter), new_folder)

    checkpoint.save_model(model, out, dtype, copy_adapters_tokenizer)
    name = str(dtype).removeprefix("torch.")
    percent = f"{100 * lost:.2g} %"
    print_fn(f"merged    {adapter} into {out}, {name}: rounding lost {percent} of the update")


def to_nf4(folder: Path, out: Path, quant: str = "nf4") -> None:
    """Writes a Hugging Face folder of the model with its linears in NF4, which transformers reads
    with bitsandbytes.

    quant: as in checkpoint.load_model.
    Raises UserError where `out` exists, or the model is quantised already.
    """
    if Path(out).exists():
        raise UserError(f"{out}: exists already; name a new folder")
    config = checkpoint.read_config(folder)
    if config.raw.get("quantization_config") is not None:
        raise UserError(f"{folder}: is quantised already")
    # In the dtype of the files, so that what stays in it (embeddings, norms) is not rounded.
    dtype = checkpoint.stored_dtype(config)
    model = checkpoint.load_model(folder, dtype, quant=quant)
    checkpoint.save_model(model, out)


if __name__ == "__main__":
    errors.run(main)
