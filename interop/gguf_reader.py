"""The GGUF container: typed fields, a table of tensors, then their bytes (the "GGUF specification", docs/gguf.md of
https://github.com/ggml-org/ggml). Versions 2 and 3, little-endian, one file:

    "GGUF", version u32, number of tensors u64, number of fields u64
    a field each:   key, type u32, value        string: length u64, UTF-8;  array: type u32, length u64, values
    a tensor each:  name, number of dimensions u32, dimensions u64 (fastest first), type u32, offset u64
    padding up to a multiple of general.alignment, from which the offsets count; the tensors, mostly in blocks of 32 or
    256 weights that share a scale

A header may come from anybody, so no number in it is believed: counts and lengths are held against the bytes that are
there before anything is allocated for them, and against what any model needs: a file full of holes is small on the disk
and has bytes for everything. The gguf package's own reader goes on past the end of the file until the memory is full
where an array claims 2^60 entries, and is eight times slower on the default base (1.6 s).
"""

import math
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.errors import UserError

TENSOR_TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
# The largest headers so far: Gemma 3's three lists of 262,144, Llama 3's 280,147 merges; 1,000 tensors; 100 fields
MOST_ITEMS, MOST_TENSORS, MOST_FIELDS = 5_000_000, 100_000, 10_000  # items: of all lists
MOST_TEXT = 128 << 20  # bytes of all strings


class Tensor(NamedTuple):
    shape: tuple[int, ...]  # as PyTorch counts: [in], [out, in] or [experts, out, in]
    kind: str  # one of TENSOR_TYPES
    rows: (
        np.ndarray
    )  # its bytes in the file, mapped: uint8 [out, bytes of a row]; a vector is one row, experts follow on


class Gguf(NamedTuple):
    file: Path
    fields: dict
    tensors: dict[str, Tensor]

    def field(self, key: str, kind: type, default=...):
        """The value of a key: of type `kind` and, if a number, positive and below 2^31. UserError where it is not, or
        where the key is missing and there is no default."""
        value = self.fields.get(key, default)
        if value is ...:
            raise UserError(f"{self.file}: has no {key}")
        if type(value) is not kind:
            raise UserError(f"{self.file}: {key} is of type {type(value).__name__}, {kind.__name__} is wanted")
        if kind in (int, float) and not 0 < value < 2**31:
            raise UserError(f"{self.file}: {key} can't be {value}")
        return value


def read_gguf(file: Path) -> Gguf:
    """The fields and the mapped tensors of a GGUF file; UserError where it is cut, damaged, alien or not supported."""
    try:
        data = np.memmap(file, np.uint8, "r")
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except ValueError:
        raise UserError(f"{file}: is empty, a GGUF file is wanted") from None
    fields, table, end = parse(file, data)
    gguf = Gguf(file, fields, {})
    alignment = gguf.field("general.alignment", int, 32)
    start = -(-end // alignment) * alignment
    for name, (shape, kind, offset) in table.items():
        gguf.tensors[name] = place(file, data, name, shape, kind, start + offset)
    taken = start
    for name in sorted(table, key=lambda name: table[name][2]):  # by offset
        if start + table[name][2] < taken:  # a small file could stand for a model of any size
            raise UserError(f"{file}: its tensors overlap: {name!r} begins inside another")
        taken = start + table[name][2] + gguf.tensors[name].rows.nbytes
    return gguf


def parse(file: Path, data: np.ndarray) -> tuple[dict, dict[str, tuple[tuple[int, ...], int, int]], int]:
    """The fields; {tensor: (shape, type, offset)}; and the byte at which they end."""
    if data[:4].tobytes() != b"GGUF":
        raise UserError(f"{file}: is not a GGUF file: it does not begin with the letters GGUF")
    position, items, texts = 4, 0, 0

    def take(code: str, count: int = 1) -> tuple:
        nonlocal position
        layout = f"<{count}{code}"
        values = struct.unpack_from(layout, data, position)  # struct.error, before it allocates, where there is less
        position += struct.calcsize(layout)
        return values

    def string() -> str:
        nonlocal texts
        (length,) = take("Q")
        texts += length
        bound(texts, MOST_TEXT, "texts of ", "bytes")
        return take("s", length)[0].decode()

    def bound(found: int, most: int, before: str, what: str) -> None:
        if found > most:
            raise UserError(f"{file}: claims {before}{found:,} {what}; no model needs over {most:,}")

    def value(kind: int):
        nonlocal items
        if kind == STRING:
            return string()
        if kind != ARRAY:
            (number,) = take(SCALARS[kind])
            return float(str(np.float32(number))) if SCALARS[kind] == "f" else number  # 1e-05, not 9.99999975e-06
        (kind,), (count,) = take("I"), take("Q")
        items += count
        bound(items, MOST_ITEMS, "lists of ", "items")
        return [string() for _ in range(count)] if kind == STRING else list(take(SCALARS[kind], count))

    fields, table = {}, {}
    try:
        (version,) = take("I")
        if version not in (2, 3):
            raise UserError(f"{file}: GGUF version {version} is not supported; little-endian 2 and 3 are")
        tensor_count, field_count = take("Q", 2)
        bound(tensor_count, MOST_TENSORS, "", "tensors")
        bound(field_count, MOST_FIELDS, "", "fields")
        for _ in range(field_count):
            key = string()
            fields[key] = value(*take("I"))
        for _ in range(tensor_count):
            name = string()
            (dimensions,) = take("I")
            shape = take("Q", min(dimensions, 9))[::-1]  # more than 3 are refused below
            table[name] = (shape, *take("IQ"))
    except (struct.error, ValueError, KeyError, OverflowError):
        raise UserError(f"{file}: its header is cut or damaged at byte {position} of {len(data)}") from None
    if len(fields) < field_count or len(table) < tensor_count:
        raise UserError(f"{file}: its header names a field or a tensor twice")
    return fields, table, position


def place(file: Path, data: np.ndarray, name: str, shape: tuple[int, ...], kind: int, start: int) -> Tensor:
    """The tensor that begins at byte `start`, if the file is long enough for it."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    label = next((member.name for member in GGMLQuantizationType if member == kind), f"type {kind}")
    if label not in TENSOR_TYPES:
        raise UserError(f"{file}: {name!r} is stored as {label}; supported are {' '.join(TENSOR_TYPES)}")
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[label]]  # weights in a block, its bytes
    if not 1 <= len(shape) <= 3 or 0 in shape or shape[-1] % block:
        raise UserError(f"{file}: {name!r} has shape {list(shape)}; {label} can't hold that")
    end = start + math.prod(shape) // block * block_bytes  # Python's integers don't overflow
    if end > len(data):
        raise UserError(f"{file}: is cut: {name!r} should end at byte {end} of {len(data)}")
    return Tensor(shape, label, data[start:end].reshape(math.prod(shape[:-1]), -1))
