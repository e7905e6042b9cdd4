"""From what people type to a model in memory: flags, device, dtype, base, adapter, tokenizer.

Shared by the three scripts, so that `--model`, `--adapter`, `--dtype` and `--device` mean the same in each. A choice
that the user did not make is said with its reason. `one_line` stands here too: text out of a stranger's file, or out of
a model, reaches the terminal as characters that it prints, never as ones that move its cursor.
"""

import argparse
import ctypes
import difflib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from checkpoint import fingerprint
from distributed import by_first
from errors import UserError, printable
from lora import load_adapter, note
from model import Transformer, quantized
from quant import KINDS
from templates import NAMED
from tokenizer import Tokenizer, load_tokenizer

# oneDNN (torch's products on CPU) keeps what it prepared for the last 1,024 shapes, and every batch brings new ones: a
# gigabyte after 200 steps. A step has fewer than 128. Read when the first product runs.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")

# glibc hands freed memory back to the system, which zeroes it anew, page by page, for the next tensor of the same size:
# two fifths of the time of answering 32 prompts of 600 tokens on CPU. Two numbers make it keep a gigabyte: mallopt(3).
if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
    libc.mallopt(-1, 1 << 30), libc.mallopt(-3, 1 << 30)  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pick_tokenizer(base: Path, adapter: str | Path | None, template: str | None) -> Tokenizer:
    """Tokenizer and chat template: the adapter's, which was trained with them, if it brings any; else the base's."""
    brings = adapter is not None and any((Path(adapter) / f"tokenizer.{kind}").is_file() for kind in ("json", "model"))
    return load_tokenizer(Path(adapter) if brings else base, template, base)


def put_adapter(model: Transformer, adapter: str | Path, say: Callable = print) -> None:
    """lora.load_adapter, with a warning where the adapter notes that its base had other weights than this one's."""
    load_adapter(model, adapter)
    made_on, quant = (note(adapter).get(key) for key in ("base_sha256", "quant"))
    if quant in KINDS and not in_bits(model):
        say(f"NOTE: {adapter} was trained on its base in {quant}; --quant {quant} gives it that one")
    if made_on is not None and made_on != by_first(lambda: fingerprint(model.source)):
        say(f"WARNING: {adapter} was trained on other weights than those of {model.source}; its answers will suffer")


def in_bits(model: Transformer) -> str:
    return ", linears in NF4" if quantized(model) else ""


def pick_device(name: str = "auto") -> torch.device:
    """auto: the first of CUDA, MPS and CPU that there is."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, yes in there.items() if yes)
    if not there.get(name, False):
        raise UserError(
            f"--device {name}: not on this machine (there is {', '.join(k for k, yes in there.items() if yes)})"
        )
    if name == "cuda":
        let_segments_grow()
    return torch.device(name)


def let_segments_grow() -> None:
    """Has torch's allocator extend the memory that it holds of a GPU in place of asking for new segments: batches are
    of all sizes, and what is left between tensors of other sizes would add up. What the user has set stays."""
    if sys.platform == "linux" and not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & os.environ.keys():
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def pick_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype to compute in, and why. auto: bf16 where the hardware has it, elsewhere it is slower than fp32."""
    if name != "auto":
        return DTYPES[name], f"asked for with --dtype {name}"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "GPU with bf16"
        return torch.float32, "GPU without bf16"
    if device.type == "cpu" and {"avx512_bf16", "amx_bf16"} & cpu_features():
        return torch.bfloat16, "CPU with bf16 instructions"
    return torch.float32, f"{device.type.upper()} without bf16 instructions"


def cpu_features() -> set[str]:
    if hasattr(torch.cpu, "get_capabilities"):  # not in every torch from 2.11 on
        return {feature for feature, yes in torch.cpu.get_capabilities().items() if yes is True}
    cpuinfo = Path("/proc/cpuinfo")  # Linux; elsewhere nothing is known, so nothing is promised
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return {feature for line in lines if line.startswith("flags") for feature in line.split()}


def add_flags(parser: argparse.ArgumentParser, several: bool = False) -> None:
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


def parse(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """parser.parse_args (argv: default the process's own), with every complaint a UserError of one line.

    An unknown flag is looked for first and answered with the nearest right one: argparse itself would rather complain
    that the flag which was meant is missing. The parser wants allow_abbrev=False.
    """
    argv = sys.argv[1:] if argv is None else argv
    known = [option for action in parser._actions for option in action.option_strings]
    for typed in (word.partition("=")[0] for word in argv if word.startswith("--")):
        if typed not in known:
            near = [option for option in known if option.startswith(typed)] or difflib.get_close_matches(typed, known)
            raise UserError(f"{typed}: no such flag" + (f"; did you mean {near[0]}?" if near else "; see --help"))

    def complain(message: str):
        raise UserError(message.removeprefix("argument ") + "; see --help")

    parser.error = complain
    return parser.parse_args(argv)


def one_line(text: str, width: int = 100) -> str:
    """The text on one line of at most `width` characters, whatever it holds: what does not print is escaped."""
    shown = printable(text[:width])
    return shown if len(shown) <= width and len(text) <= width else shown[: width - 3] + "..."
