"""Quantisation: a frozen base in 4 bits, NF4 as in QLoRA (Dettmers et al. 2023, arXiv 2305.14314).

The codes are bit for bit those of bitsandbytes, so that an adapter trained here fits a base quantised there. What the
numbers mean, and the products with them, stand in kernels/nf4.py; here they are made, and held by a Linear. The linears
of the blocks are quantised; embeddings, norms and the output head stay as they are.
"""

import json
from functools import cache

import torch
from torch import Tensor, nn

from common.errors import UserError
from kernels.nf4 import BLOCK, NESTED_BLOCK, NF4, dynamic_codebook, nf4_codebook, nf4_dequantize

KINDS = ("nf4", "nf4+head")
TINY = 1e-38  # stands in for the largest value of a block of zeros
CPU_STEPS = 65535  # bitsandbytes looks 8-bit numbers up in a table of so many steps on CPUs, and compares on GPUs: one
# scale in a thousand gets the neighbouring number, and so it does here


def quantize_nf4(weight: Tensor, block_size: int = BLOCK) -> tuple[Tensor, Tensor]:
    """weight: [out, in] of any float dtype, in a multiple of the block size. Returns (packed uint8 [out, in / 2],
    absmax float32 [out, in / block_size])."""
    out, size = weight.shape
    assert size % block_size == 0 == block_size % 2, f"rows of {size} are no whole blocks of {block_size}"
    codes, absmax = nearest(weight.reshape(-1, block_size).float(), nf4_codebook(weight.device))
    codes = codes.view(out, -1, 2)
    return codes[..., 0] << 4 | codes[..., 1], absmax.view(out, -1)


def dequantize_nf4(packed: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """The way back: [out, in] in dtype. Computed in fp32, rounded once."""
    return nf4_dequantize(NF4(packed, absmax), dtype)


def nearest(blocks: Tensor, numbers: Tensor, table: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Which of the sorted numbers, times the block's largest absolute value, each value is closest to (of two equally
    close ones the lower). table: of `by_steps`; values are rounded to its steps first, and a block of zeros gets the
    first number. blocks: float32 [n, size] -> (uint8 [n, size], float32 [n])."""
    absmax = blocks.abs().amax(-1)
    if table is None:
        return midpoints((blocks * (1 / absmax.clamp(min=TINY))[:, None]).clamp_(-1, 1), numbers), absmax
    steps = (blocks * (1 / absmax)[:, None]).nan_to_num_(-1.0).clamp_(-1, 1)
    steps = steps.add_(1).mul_(0.5).mul_(CPU_STEPS).add_(0.5).int()
    return table.index_select(0, steps.flatten()).view(blocks.shape), absmax


def midpoints(scaled: Tensor, numbers: Tensor) -> Tensor:
    return torch.bucketize(scaled, (numbers[:-1] + numbers[1:]) / 2, out_int32=True).to(torch.uint8)


@cache
def cpu_lookup(signed: bool) -> Tensor:  # uint8 [CPU_STEPS + 1]: the nearest of the dynamic numbers at each step
    return midpoints(
        torch.arange(CPU_STEPS + 1).float() / CPU_STEPS * 2 - 1, dynamic_codebook(torch.device("cpu"), signed)
    )


def quantize_8bit(flat: Tensor, signed: bool = True) -> tuple[Tensor, Tensor]:
    """Blocks of 256 of float32 [n], the last one shorter, in numbers of `dynamic_code`: (codes uint8 [n], scales
    float32 [ceil(n / 256)]). The way back is kernels.nf4.dequantize_8bit."""
    numbers, table = dynamic_codebook(flat.device, signed), cpu_lookup(signed) if flat.device.type == "cpu" else None
    if not len(flat):  # of a process without rows
        return flat.to(torch.uint8), flat
    whole = len(flat) // NESTED_BLOCK * NESTED_BLOCK
    parts = [flat[:whole].view(-1, NESTED_BLOCK), flat[whole:].view(1, -1)]
    found = [nearest(part, numbers, table) for part in parts if part.numel()]
    return torch.cat([codes.flatten() for codes, _ in found]), torch.cat([scales for _, scales in found])


def quantize(weight: Tensor, double: bool = True) -> NF4:
    """A matrix in NF4. double: the scales of blocks in 8 bits as well, 4.127 bits a weight instead of 4.5."""
    packed, absmax = quantize_nf4(weight)
    return NF4(packed, *quantize_scales(absmax)) if double else NF4(packed, absmax)


def quantize_scales(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A whole matrix' scales in 8 bits: (codes in their shape, nested scales, offset), as NF4 holds them."""
    flat = absmax.flatten()
    offset = flat.mean()
    codes, nested = quantize_8bit(flat - offset)
    return codes.view(absmax.shape), nested, offset.view(1)


def empty_nf4(out: int, size: int, double: bool = True) -> NF4:
    """A matrix [out, size] in NF4 without memory, on the meta device."""
    empty = lambda kind, *shape: torch.empty(*shape, dtype=kind, device="meta")
    packed, scales = empty(torch.uint8, out, size // 2), (out, size // BLOCK)
    if not double:
        return NF4(packed, empty(torch.float32, *scales))
    nested = empty(torch.float32, -(-out * size // BLOCK // NESTED_BLOCK))
    return NF4(packed, empty(torch.uint8, *scales), nested, empty(torch.float32, 1))


class QuantizedWeight(nn.Module):
    """What a Linear holds in place of its weight: the tensors of an NF4, as parameters that are never trained."""

    def __init__(self, nf4: NF4):
        super().__init__()
        for name, tensor in zip(nf4._fields, nf4):
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))

    @property
    def tensors(self) -> NF4:
        return NF4(self.packed, self.absmax, self.nested, self.offset)


def can_quantize(weight: Tensor) -> bool:
    return weight.shape[1] % BLOCK == 0


# ---- bitsandbytes' layout in files: beside `X.weight`, the codes, tensors named `X.weight.absmax` and so on ----

STATE = "quant_state.bitsandbytes__nf4"  # JSON, as bytes
SIDE = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE)


def settings(double: bool, dtype: str, head: bool) -> dict:
    """config.json's quantization_config for a base of ours, as transformers reads it. head: is the head in 4 bits."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": [] if head else None,  # None: transformers leaves the head out
    }


def check_settings(found: object, where: str) -> None:
    """UserError where a config.json's quantization_config is another than NF4 of bitsandbytes."""
    kind = found.get("quant_method") if isinstance(found, dict) else found
    if kind != "bitsandbytes" or not found.get("load_in_4bit") or found.get("bnb_4bit_quant_type") != "nf4":
        what = kind if kind != "bitsandbytes" else f"bitsandbytes {found.get('bnb_4bit_quant_type')!r}"
        raise UserError(f"{where}: quantised by {str(what)[:60]}; of quantised bases, bitsandbytes' NF4 can be read")


def to_files(nf4: NF4, shape: tuple[int, int], dtype: str) -> dict[str, Tensor]:
    """The tensors that stand for a weight in bitsandbytes' layout, by the end of their names ("" is the weight's)."""
    state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": dtype, "shape": list(shape)}
    found = {"": nf4.packed.reshape(-1, 1), "absmax": nf4.absmax.flatten()}
    found["quant_map"] = nf4_codebook(nf4.packed.device).clone()  # safetensors wants each to have memory of its own
    if nf4.nested is not None:
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": nf4.offset.item()}
        found |= {"nested_absmax": nf4.nested, "nested_quant_map": dynamic_codebook(nf4.packed.device).clone()}
    found[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return found


def from_files(parts: dict[str, Tensor], shape: tuple[int, int], where: str) -> NF4:
    """The way back, on the CPU. UserError where the parts are not a whole NF4 matrix of this shape."""

    def check(fine: bool, what: str) -> None:
        if not fine:
            raise UserError(f"{where}: {what}, so it can't be read as bitsandbytes' NF4")

    check(STATE in parts and "absmax" in parts and "quant_map" in parts, f"no {STATE}, absmax or quant_map beside it")
    try:
        state = json.loads(bytes(parts[STATE].tolist()))
        offset = float(state.get("nested_offset", 0))
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{where}: its {STATE} is no JSON of bitsandbytes") from None
    out, size = shape
    codes, absmax, nested = parts[""], parts["absmax"], parts.get("nested_absmax")
    count, blocks = out * size, out * size // BLOCK
    check(state.get("quant_type") == "nf4" and state.get("blocksize") == BLOCK, f"its blocks are not NF4 of {BLOCK}")
    check(state.get("shape") == [out, size], f"its shape is {state.get('shape')}, config.json implies {[out, size]}")
    check(size % BLOCK == 0, f"rows of {size} are no whole blocks of {BLOCK}")
    codes = codes.contiguous().view(torch.uint8) if codes.dtype.itemsize * codes.numel() == count // 2 else codes
    check(codes.numel() == count // 2 and codes.dtype == torch.uint8, f"{codes.numel():,} bytes of codes")
    check(absmax.numel() == blocks, f"{absmax.numel():,} scales for {blocks:,} blocks")
    check(
        torch.equal(parts["quant_map"].float().flatten(), nf4_codebook(torch.device("cpu"))),
        "its quant_map is not NF4's",
    )
    packed, absmax = codes.view(out, -1), absmax.view(out, -1)
    if nested is None:
        check(absmax.is_floating_point(), f"its absmax holds {absmax.dtype}")
        return NF4(packed, absmax.float())
    check(absmax.dtype == torch.uint8 and state.get("nested_blocksize") == NESTED_BLOCK, "its nested blocks are others")
    numbers, known = parts.get("nested_quant_map"), dynamic_codebook(torch.device("cpu"))
    check(numbers is not None and torch.equal(numbers.float().flatten(), known), "its nested_quant_map is another")
    check(nested.numel() == -(-blocks // NESTED_BLOCK) and nested.is_floating_point(), "its nested scales do not fit")
    return NF4(packed, absmax, nested.float().flatten(), torch.tensor([offset]))
