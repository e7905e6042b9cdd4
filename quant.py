"""Quantisation: a frozen base in 4 bits, NF4 as in QLoRA (Dettmers et al. 2023, arXiv 2305.14314).

The codes are bit for bit those of bitsandbytes, so that an adapter trained here fits a base that
was quantised there. This file makes the codes, holds them in a Linear, and reads and writes
bitsandbytes' file layout. kernels/nf4.py says what the numbers mean, and multiplies with them. The
linears of the blocks are quantised; embeddings, norms and the output head stay as they are
(`nf4+head`: the head is quantised too).
"""

import json
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError
from kernels.nf4 import NESTED_BLOCK, NF4, NF4_BLOCK, dynamic_codebook, nf4_codebook

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
    pairs = codes.view(out_features, -1, 2)
    # Shifts come before `|`: the earlier code of a pair goes to the high four bits.
    packed = pairs[..., 0] << 4 | pairs[..., 1]  # (out, in / 2)
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
    absmax = blocks.abs().amax(-1)  # (n,)
    if lookup is None:
        scale = 1 / absmax.clamp(min=TINY)
        # 1 / absmax is rounded, so that absmax times it may be a little over 1.
        scaled = (blocks * scale[:, None]).clamp_(-1, 1)
        return nearest_index(scaled, codebook), absmax

    scale = 1 / absmax
    scaled = blocks * scale[:, None]
    # A block of zeros is 0 * inf here, which is no number; -1 makes it step 0.
    scaled.nan_to_num_(-1.0).clamp_(-1, 1)
    # From -1 to 1, to 0 to CPU_STEPS. int() cuts off, so adding a half makes it round.
    scaled.add_(1).mul_(0.5).mul_(CPU_STEPS).add_(0.5)
    steps = scaled.int()
    codes = lookup.index_select(0, steps.flatten())
    return codes.view(blocks.shape), absmax


def nearest_index(values: Tensor, codebook: Tensor) -> Tensor:
    """Returns, for each value, the index of the nearest entry of a sorted codebook, as uint8."""
    middles = (codebook[:-1] + codebook[1:]) / 2
    return torch.bucketize(values, middles, out_int32=True).to(torch.uint8)


@cache
def cpu_lookup(signed: bool) -> Tensor:
    """Returns uint8 [CPU_STEPS + 1]: the index of the nearest entry of `dynamic_codebook` for each
    step from -1 to 1."""
    steps = torch.arange(CPU_STEPS + 1).float()
    values = steps / CPU_STEPS * 2 - 1  # from 0 ... CPU_STEPS to -1 ... 1
    codebook = dynamic_codebook(torch.device("cpu"), signed)
    return nearest_index(values, codebook)


def quantize_8bit(values: Tensor, signed: bool = True) -> tuple[Tensor, Tensor]:
    """Quantises float32 [n] to codes of `dynamic_codebook`, in blocks of 256; the last may be
    shorter.

    Returns codes uint8 [n] and scales float32 [ceil(n / 256)]. The inverse is
    kernels.nf4.dequantize_8bit.
    """
    # A rank may have no rows of a tensor.
    if len(values) == 0:
        return values.to(torch.uint8), values
    codebook = dynamic_codebook(values.device, signed)
    lookup = None
    if values.device.type == "cpu":
        lookup = cpu_lookup(signed)

    num_full_blocks = len(values) // NESTED_BLOCK
    split = num_full_blocks * NESTED_BLOCK
    full_blocks = values[:split].view(-1, NESTED_BLOCK)  # (num_full_blocks, 256)
    short_block = values[split:].view(1, -1)
    all_codes = []
    all_scales = []
    # Either of the two may be empty, and nothing is the largest of no values.
    for blocks in (full_blocks, short_block):
        if blocks.numel() == 0:
            continue
        codes, scales = nearest(blocks, codebook, lookup)
        all_codes.append(codes.flatten())
        all_scales.append(scales)
    return torch.cat(all_codes), torch.cat(all_scales)


def quantize(weight: Tensor, double: bool = True) -> NF4:
    """Quantises a weight [out, in] to NF4.

    double: the scales of its blocks are stored in 8 bits as well, which takes 4.127 bits a weight
        instead of 4.5.
    """
    packed, absmax = quantize_nf4(weight)
    if not double:
        return NF4(packed, absmax)
    absmax_codes, nested, offset = quantize_scales(absmax)
    return NF4(packed, absmax_codes, nested, offset)


def quantize_scales(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantises the scales of a weight's blocks to 8 bits: the second level of double quantisation.

    absmax: float32 [out, in / 64], of all rows: nested blocks run across rows.
    Returns absmax uint8 in the same shape, nested and offset, as NF4 holds them.
    """
    flat = absmax.flatten()
    # Half of the 256 numbers are negative, and magnitudes never are. Less their mean, they use both
    # halves.
    offset = flat.mean()
    codes, nested = quantize_8bit(flat - offset)
    return codes.view(absmax.shape), nested, offset.view(1)


def empty_nf4(out_features: int, in_features: int, double: bool = True) -> NF4:
    """Returns the tensors of a weight [out, in] in NF4 on the meta device, without memory."""
    blocks_per_row = in_features // NF4_BLOCK
    with torch.device("meta"):
        packed = torch.empty(out_features, in_features // 2, dtype=torch.uint8)
        if not double:
            absmax = torch.empty(out_features, blocks_per_row, dtype=torch.float32)
            return NF4(packed, absmax)
        absmax_codes = torch.empty(out_features, blocks_per_row, dtype=torch.uint8)
        nested = torch.empty(num_nested_blocks(out_features, in_features), dtype=torch.float32)
        offset = torch.empty(1, dtype=torch.float32)
        return NF4(packed, absmax_codes, nested, offset)


def num_nested_blocks(out_features: int, in_features: int) -> int:
    """Returns the number of second-level scales of a weight [out, in]: one for each 256 blocks of
    64, and one for the rest."""
    num_blocks = out_features * in_features // NF4_BLOCK
    return -(-num_blocks // NESTED_BLOCK)  # rounded up


class QuantizedWeight(nn.Module):
    """The NF4 tensors that replace a Linear's weight, as parameters that are never trained.

    They are parameters and not buffers, so that FSDP shards them as it shards weights.
    """

    packed: Tensor
    absmax: Tensor
    nested: Tensor | None
    offset: Tensor | None

    def __init__(self, nf4: NF4):
        super().__init__()
        for name, tensor in zip(nf4._fields, nf4):
            parameter = None
            if tensor is not None:
                parameter = nn.Parameter(tensor, requires_grad=False)
            self.register_parameter(name, parameter)

    @property
    def tensors(self) -> NF4:
        """The tensors as the kernels take them."""
        return NF4(self.packed, self.absmax, self.nested, self.offset)


def can_quantize(weight: Tensor) -> bool:
    """True if the rows of a weight [out, in] are whole blocks."""
    return weight.shape[1] % NF4_BLOCK == 0


# ---- bitsandbytes' file layout: `X.weight` holds the codes; `X.weight.absmax` and so on, the rest ----

QUANT_STATE = "quant_state.bitsandbytes__nf4"  # JSON, as bytes
# Bytes of that JSON. bitsandbytes' own has under 300.
STATE_BYTES = 1 << 16
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
    if not isinstance(config, dict):
        what = str(config)
    elif config.get("quant_method") != "bitsandbytes":
        what = str(config.get("quant_method"))
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
    state = {
        "quant_type": "nf4",
        "blocksize": NF4_BLOCK,
        "dtype": dtype,
        "shape": list(shape),
    }
    # safetensors wants memory of its own for each tensor, so codebooks are cloned.
    tensors = {
        "": nf4.packed.reshape(-1, 1),
        "absmax": nf4.absmax.flatten(),
        "quant_map": nf4_codebook(device).clone(),
    }
    if nf4.nested is not None:
        assert nf4.offset is not None, "nested scales come with an offset"
        state["nested_blocksize"] = NESTED_BLOCK
        state["nested_dtype"] = "float32"
        state["nested_offset"] = nf4.offset.item()
        tensors["nested_absmax"] = nf4.nested
        tensors["nested_quant_map"] = dynamic_codebook(device).clone()
    # A safetensors file holds tensors only, so the JSON text is one, of bytes.
    state_bytes = json.dumps(state).encode()
    tensors[QUANT_STATE] = torch.tensor(list(state_bytes), dtype=torch.uint8)
    return tensors


def from_files(parts: dict[str, Tensor], shape: tuple[int, int], where: str) -> NF4:
    """Returns the NF4 of tensors that `to_files` or bitsandbytes wrote, on the CPU.

    parts: as `to_files` returns them.
    shape: (out, in), which config.json implies.
    where: file and tensor, for the message.
    Raises UserError if the tensors are not a whole NF4 weight of this shape.
    """
    is_complete = QUANT_STATE in parts and "absmax" in parts and "quant_map" in parts
    check_part(is_complete, where, f"{QUANT_STATE}, absmax or quant_map is missing")
    state = read_quant_state(parts[QUANT_STATE], where)
    check_layout(state, shape, where)
    packed = packed_from_file(parts[""], shape, where)

    out_features, in_features = shape
    num_blocks = out_features * in_features // NF4_BLOCK
    absmax = parts["absmax"]
    what = f"it has {absmax.numel():,} scales for {num_blocks:,} blocks"
    check_part(absmax.numel() == num_blocks, where, what)
    absmax = absmax.view(out_features, -1)
    quant_map = parts["quant_map"].float().flatten()
    is_nf4_map = torch.equal(quant_map, nf4_codebook(torch.device("cpu")))
    check_part(is_nf4_map, where, "its quant_map is not NF4's")
    nested = parts.get("nested_absmax")
    if nested is None:
        check_part(absmax.is_floating_point(), where, f"its absmax holds {absmax.dtype}")
        check_finite(absmax.float(), where, "absmax")
        return NF4(packed, absmax.float())

    is_nested = absmax.dtype == torch.uint8 and state.get("nested_blocksize") == NESTED_BLOCK
    what = f"its nested scales are not 8-bit in blocks of {NESTED_BLOCK}"
    check_part(is_nested, where, what)
    is_known = False
    if "nested_quant_map" in parts:
        nested_map = parts["nested_quant_map"].float().flatten()
        is_known = torch.equal(nested_map, dynamic_codebook(torch.device("cpu")))
    check_part(is_known, where, "its nested_quant_map is not bitsandbytes' own")
    has_all_scales = nested.numel() == num_nested_blocks(out_features, in_features)
    what = (
        f"its {nested.numel():,} nested scales of {nested.dtype} do not fit {num_blocks:,} blocks"
    )
    check_part(has_all_scales and nested.is_floating_point(), where, what)
    nested = nested.float().flatten()
    check_finite(nested, where, "nested_absmax")
    offset = torch.tensor([nested_offset(state, where)])
    return NF4(packed, absmax, nested, offset)


def check_part(fine: bool, where: str, what: str) -> None:
    """Raises UserError if a part of a weight is not fine. what: a clause that says what is wrong."""
    if not fine:
        raise UserError(f"{where}: {what}, so it can't be read as bitsandbytes' NF4")


def check_finite(scales: Tensor, where: str, name: str) -> None:
    """Raises UserError if scales are NaN or infinite. name: of their tensor."""
    check_part(bool(scales.isfinite().all()), where, f"its {name} holds NaN or infinite numbers")


def read_quant_state(stored: Tensor, where: str) -> dict:
    """Returns the JSON object of a QUANT_STATE tensor.

    stored: uint8 [bytes of the text].
    where: as in `from_files`.
    Raises UserError if it is no such object.
    """
    # Of one number, bytes() would make as many zeros.
    is_text = stored.dtype == torch.uint8 and stored.dim() == 1 and len(stored) <= STATE_BYTES
    state = None
    if is_text:
        try:
            state = json.loads(bytes(stored.tolist()))
        except (ValueError, RecursionError):
            pass
    if not isinstance(state, dict):
        raise UserError(f"{where}: its {QUANT_STATE} is no JSON of bitsandbytes")
    return state


def nested_offset(state: dict, where: str) -> float:
    """Returns the offset of the nested scales. Raises UserError if the quant state has none, or one
    that is no float32: read as 0 it would change every weight."""
    offset: Any = state.get("nested_offset")
    check_part(offset is not None, where, f"its {QUANT_STATE} lacks nested_offset")
    # Not isinstance: a bool is an int for Python. NaN and infinity, which Python reads from JSON,
    # are not below the largest number.
    is_offset = False
    if type(offset) in (int, float):
        is_offset = abs(offset) <= torch.finfo(torch.float32).max
    check_part(is_offset, where, f"its nested_offset is {str(offset)[:40]}, no float32")
    return float(offset)


def check_layout(state: dict, shape: tuple[int, int], where: str) -> None:
    """Raises UserError if the quant state is of other blocks or of another shape than wanted."""
    is_nf4 = state.get("quant_type") == "nf4" and state.get("blocksize") == NF4_BLOCK
    check_part(is_nf4, where, f"its blocks are not NF4 of {NF4_BLOCK}")
    implied = list(shape)
    what = f"its shape is {state.get('shape')}, config.json implies {implied}"
    check_part(state.get("shape") == implied, where, what)
    in_features = shape[1]
    what = f"rows of {in_features} are no whole blocks of {NF4_BLOCK}"
    check_part(in_features % NF4_BLOCK == 0, where, what)


def packed_from_file(codes: Tensor, shape: tuple[int, int], where: str) -> Tensor:
    """Returns the codes of a weight as uint8 [out, in / 2]. Raises UserError if some are missing.

    codes: the stored tensor, whose shape is bitsandbytes' own, [out * in / 2, 1].
    """
    out_features, in_features = shape
    num_bytes = out_features * in_features // 2
    # bitsandbytes may store the bytes as numbers of another dtype (bnb_4bit_quant_storage).
    if codes.nbytes == num_bytes:
        codes = codes.contiguous().view(torch.uint8)
    has_all_codes = codes.numel() == num_bytes and codes.dtype == torch.uint8
    what = f"it has {codes.numel():,} codes of {codes.dtype}, not {num_bytes:,} bytes"
    check_part(has_all_codes, where, what)
    return codes.view(out_features, -1)
