"""Quantisation: a frozen base in 4 bits, NF4 as in QLoRA (Dettmers et al. 2023, arXiv 2305.14314).

The codes are bit for bit those of bitsandbytes, so that an adapter trained here fits a base that
was quantised there. This file makes the codes, holds them in a Linear, and reads and writes
bitsandbytes' file layout. kernels/nf4.py says what the numbers mean, and multiplies with them. The
linears of the blocks are quantised; embeddings, norms and the output head stay as they are
(`nf4+head`: the head is quantised too).
"""

import json
from functools import cache

import torch
from torch import Tensor, nn

from common.errors import UserError
from kernels.nf4 import NESTED_BLOCK, NF4, NF4_BLOCK, dynamic_codebook, nf4_codebook

QUANT_KINDS = ("nf4", "nf4+head")
# Stands in for the absmax of a block of zeros, so that nothing is divided by 0.
TINY = 1e-38
# On CPUs bitsandbytes rounds to so many steps and looks the 8-bit code up in a table; on GPUs it
# compares. So one scale in a thousand gets a neighbouring code, and it does so here too.
CPU_STEPS = 65535


def quantize_nf4(weight: Tensor, block_size: int = NF4_BLOCK) -> tuple[Tensor, Tensor]:
    """Returns the NF4 codes of a weight and the largest magnitude of each block.

    weight: [out, in] of any float dtype; `in` is a multiple of block_size.
    Returns packed uint8 [out, in / 2], with the earlier value in the high half of a byte, and
    absmax float32 [out, in / block_size].
    """
    out_features, in_features = weight.shape
    fits = in_features % block_size == 0 and block_size % 2 == 0
    assert fits, f"rows of {in_features} are no whole blocks of {block_size}"
    blocks = weight.reshape(-1, block_size).float()
    codes, absmax = nearest(blocks, nf4_codebook(weight.device))
    codes = codes.view(out_features, -1, 2)
    packed = codes[..., 0] << 4 | codes[..., 1]
    return packed, absmax.view(out_features, -1)


def nearest(
    blocks: Tensor, codebook: Tensor, lookup: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Blockwise quantisation: each value becomes the index of the nearest codebook entry, after its
    block is divided by its absmax. Of two equally near entries the lower one is taken.

    blocks: float32 [n, block size].
    codebook: float32 [entries], sorted, from -1 or 0 to 1.
    lookup: the table of `cpu_lookup`, which bitsandbytes uses on CPUs. With it values are rounded
        to CPU_STEPS steps first, and a block of zeros gets entry 0.
    Returns codes uint8 [n, block size] and absmax float32 [n].
    """
    absmax = blocks.abs().amax(-1)
    if lookup is None:
        scale = 1 / absmax.clamp(min=TINY)
        scaled = (blocks * scale[:, None]).clamp_(-1, 1)
        return nearest_index(scaled, codebook), absmax
    # A block of zeros is 0 * inf here, which is no number.
    scaled = (blocks * (1 / absmax)[:, None]).nan_to_num_(-1.0).clamp_(-1, 1)
    steps = scaled.add_(1).mul_(0.5).mul_(CPU_STEPS).add_(0.5).int()
    return lookup.index_select(0, steps.flatten()).view(blocks.shape), absmax


def nearest_index(values: Tensor, codebook: Tensor) -> Tensor:
    """Returns, for each value, the index of the nearest entry of a sorted codebook, as uint8."""
    middles = (codebook[:-1] + codebook[1:]) / 2
    return torch.bucketize(values, middles, out_int32=True).to(torch.uint8)


@cache
def cpu_lookup(signed: bool) -> Tensor:
    """Returns uint8 [CPU_STEPS + 1]: the index of the nearest entry of `dynamic_codebook` for each
    step from -1 to 1."""
    steps = torch.arange(CPU_STEPS + 1).float() / CPU_STEPS * 2 - 1
    return nearest_index(steps, dynamic_codebook(torch.device("cpu"), signed))


def quantize_8bit(values: Tensor, signed: bool = True) -> tuple[Tensor, Tensor]:
    """Quantises float32 [n] to codes of `dynamic_codebook`, in blocks of 256; the last may be
    shorter.

    Returns codes uint8 [n] and scales float32 [ceil(n / 256)]. The inverse is
    kernels.nf4.dequantize_8bit.
    """
    codebook = dynamic_codebook(values.device, signed)
    lookup = cpu_lookup(signed) if values.device.type == "cpu" else None
    # A rank may have no rows of a tensor.
    if not len(values):
        return values.to(torch.uint8), values
    whole = len(values) // NESTED_BLOCK * NESTED_BLOCK
    all_codes, all_scales = [], []
    for blocks in (values[:whole].view(-1, NESTED_BLOCK), values[whole:].view(1, -1)):
        if blocks.numel():
            codes, scales = nearest(blocks, codebook, lookup)
            all_codes.append(codes.flatten())
            all_scales.append(scales)
    return torch.cat(all_codes), torch.cat(all_scales)


def quantize(weight: Tensor, double: bool = True) -> NF4:
    """Quantises a weight [out, in] to NF4. double: the scales of its blocks are stored in 8 bits as
    well, which takes 4.127 bits a weight instead of 4.5."""
    packed, absmax = quantize_nf4(weight)
    return NF4(packed, *quantize_scales(absmax)) if double else NF4(packed, absmax)


def quantize_scales(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantises the scales of a weight's blocks to 8 bits: the second level of double quantisation.

    absmax: float32 [out, in / 64], of all rows: nested blocks run across rows.
    Returns absmax uint8 in the same shape, nested and offset, as NF4 holds them.
    """
    flat = absmax.flatten()
    offset = flat.mean()
    codes, nested = quantize_8bit(flat - offset)
    return codes.view(absmax.shape), nested, offset.view(1)


def empty_nf4(out_features: int, in_features: int, double: bool = True) -> NF4:
    """Returns the tensors of a weight [out, in] in NF4 on the meta device, without memory."""
    num_blocks = out_features * in_features // NF4_BLOCK
    with torch.device("meta"):
        packed = torch.empty(out_features, in_features // 2, dtype=torch.uint8)
        absmax_dtype = torch.uint8 if double else torch.float32
        absmax = torch.empty(out_features, in_features // NF4_BLOCK, dtype=absmax_dtype)
        if not double:
            return NF4(packed, absmax)
        nested = torch.empty(-(-num_blocks // NESTED_BLOCK), dtype=torch.float32)
        return NF4(packed, absmax, nested, torch.empty(1, dtype=torch.float32))


class QuantizedWeight(nn.Module):
    """The NF4 tensors that replace a Linear's weight, as parameters that are never trained."""

    def __init__(self, nf4: NF4):
        super().__init__()
        for name, tensor in zip(nf4._fields, nf4):
            parameter = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
            self.register_parameter(name, parameter)

    @property
    def tensors(self) -> NF4:
        return NF4(self.packed, self.absmax, self.nested, self.offset)


def can_quantize(weight: Tensor) -> bool:
    """True if the rows of a weight [out, in] are whole blocks."""
    return weight.shape[1] % NF4_BLOCK == 0


# ---- bitsandbytes' file layout: `X.weight` holds the codes; `X.weight.absmax` and so on, the rest ----

QUANT_STATE = "quant_state.bitsandbytes__nf4"  # JSON, as bytes
SIDE = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", QUANT_STATE)


def settings(double: bool, dtype: str, head: bool) -> dict:
    """Returns config.json's quantization_config of a base in NF4, as transformers reads it.

    double: the scales are in 8 bits.
    dtype: the name of the dtype to compute in, such as "bfloat16".
    head: the output head is in 4 bits too.
    """
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        # None makes transformers leave the head out.
        "llm_int8_skip_modules": [] if head else None,
    }


def check_settings(config: object, where: str) -> None:
    """Raises UserError if a quantization_config is not bitsandbytes' NF4. where: names the file."""
    method = config.get("quant_method") if isinstance(config, dict) else config
    if method != "bitsandbytes":
        what = str(method)
    elif not config.get("load_in_4bit") or config.get("bnb_4bit_quant_type") != "nf4":
        what = f"bitsandbytes {config.get('bnb_4bit_quant_type')!r}"
    else:
        return
    raise UserError(
        f"{where}: quantised by {what[:60]}; of quantised bases, bitsandbytes' NF4 can be read"
    )


def to_files(nf4: NF4, shape: tuple[int, int], dtype: str) -> dict[str, Tensor]:
    """Returns the tensors of a weight in bitsandbytes' file layout, by the last part of their names
    ("" for the weight itself).

    shape: (out, in). dtype: the name of the dtype that the weight is dequantised to.
    """
    device = nf4.packed.device
    state = {"quant_type": "nf4", "blocksize": NF4_BLOCK, "dtype": dtype, "shape": list(shape)}
    # safetensors wants memory of its own for each tensor, so codebooks are cloned.
    tensors = {
        "": nf4.packed.reshape(-1, 1),
        "absmax": nf4.absmax.flatten(),
        "quant_map": nf4_codebook(device).clone(),
    }
    if nf4.nested is not None:
        state["nested_blocksize"] = NESTED_BLOCK
        state["nested_dtype"] = "float32"
        state["nested_offset"] = nf4.offset.item()
        tensors["nested_absmax"] = nf4.nested
        tensors["nested_quant_map"] = dynamic_codebook(device).clone()
    tensors[QUANT_STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors


def from_files(parts: dict[str, Tensor], shape: tuple[int, int], where: str) -> NF4:
    """Returns the NF4 of tensors that `to_files` or bitsandbytes wrote, on the CPU.

    parts: as `to_files` returns them.
    shape: (out, in), which config.json implies.
    where: file and tensor, for the message.
    Raises UserError if the tensors are not a whole NF4 weight of this shape.
    """

    def check(fine: bool, what: str) -> None:
        if not fine:
            raise UserError(f"{where}: {what}, so it can't be read as bitsandbytes' NF4")

    is_complete = QUANT_STATE in parts and "absmax" in parts and "quant_map" in parts
    check(is_complete, f"{QUANT_STATE}, absmax or quant_map is missing")
    try:
        state = json.loads(bytes(parts[QUANT_STATE].tolist()))
        offset = float(state.get("nested_offset", 0))
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{where}: its {QUANT_STATE} is no JSON of bitsandbytes") from None
    out_features, in_features = shape
    num_blocks = out_features * in_features // NF4_BLOCK
    num_bytes = out_features * in_features // 2
    codes, absmax, nested = parts[""], parts["absmax"], parts.get("nested_absmax")

    is_nf4 = state.get("quant_type") == "nf4" and state.get("blocksize") == NF4_BLOCK
    check(is_nf4, f"its blocks are not NF4 of {NF4_BLOCK}")
    implied = [out_features, in_features]
    check(
        state.get("shape") == implied,
        f"its shape is {state.get('shape')}, config.json implies {implied}",
    )
    check(in_features % NF4_BLOCK == 0, f"rows of {in_features} are no whole blocks of {NF4_BLOCK}")
    # bitsandbytes may store the bytes as numbers of another dtype (bnb_4bit_quant_storage).
    if codes.dtype.itemsize * codes.numel() == num_bytes:
        codes = codes.contiguous().view(torch.uint8)
    has_all_codes = codes.numel() == num_bytes and codes.dtype == torch.uint8
    check(
        has_all_codes, f"it has {codes.numel():,} codes of {codes.dtype}, not {num_bytes:,} bytes"
    )
    check(
        absmax.numel() == num_blocks, f"it has {absmax.numel():,} scales for {num_blocks:,} blocks"
    )
    quant_map = parts["quant_map"].float().flatten()
    check(torch.equal(quant_map, nf4_codebook(torch.device("cpu"))), "its quant_map is not NF4's")
    packed = codes.view(out_features, -1)
    absmax = absmax.view(out_features, -1)
    if nested is None:
        check(absmax.is_floating_point(), f"its absmax holds {absmax.dtype}")
        return NF4(packed, absmax.float())

    is_nested = absmax.dtype == torch.uint8 and state.get("nested_blocksize") == NESTED_BLOCK
    check(is_nested, f"its nested scales are not 8-bit in blocks of {NESTED_BLOCK}")
    codebook = parts.get("nested_quant_map")
    known_codebook = dynamic_codebook(torch.device("cpu"))
    is_known = codebook is not None and torch.equal(codebook.float().flatten(), known_codebook)
    check(is_known, "its nested_quant_map is not bitsandbytes' own")
    has_all_scales = nested.numel() == -(-num_blocks // NESTED_BLOCK) and nested.is_floating_point()
    check(
        has_all_scales,
        f"its {nested.numel():,} nested scales of {nested.dtype} do not fit {num_blocks:,} blocks",
    )
    return NF4(packed, absmax, nested.float().flatten(), torch.tensor([offset]))
