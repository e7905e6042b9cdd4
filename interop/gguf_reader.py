"""The GGUF container: typed fields, a table of tensors, then their bytes.

The format is the "GGUF specification", docs/gguf.md of https://github.com/ggml-org/ggml. Versions 2
and 3, little-endian, one file:

    "GGUF", version u32, number of tensors u64, number of fields u64
    a field each:   key, type u32, value
                    string: length u64, UTF-8; array: type u32, length u64, values
    a tensor each:  name, number of dimensions u32, dimensions u64 (fastest first), type u32,
                    offset u64
    padding up to a multiple of general.alignment, from which the offsets count
    the tensors, mostly in blocks of 32 or 256 weights that share a scale

A header may come from anybody, so no number in it is believed. Counts and lengths are compared with
the bytes that are there before anything is allocated for them, and also with what any model needs,
since a sparse file is small on the disk and has bytes for everything. The gguf package's own reader
reads past the end of the file until the memory is full where an array claims 2^60 entries, and is
eight times slower on the default base (1.6 s).
"""

import math
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.errors import UserError
from common.files import refuse_pointer

TENSOR_TYPES = "F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K".split()
# {GGUF's number of a type: its code for Python's struct}; 8 and 9 are no scalars.
SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
# The largest headers so far have 3 lists of 262,144 items (Gemma 3), 280,147 merges (Llama 3),
# 1,000 tensors, 100 fields. A header beyond these limits is refused.
MAX_ITEMS = 5_000_000  # of all lists together
MAX_TENSORS = 100_000
MAX_FIELDS = 10_000
MAX_TEXT_BYTES = 128 << 20  # of all strings together
MAX_DIMENSIONS_READ = 9  # a tensor with more than 3 is refused later, by its name


class Tensor(NamedTuple):
    """A tensor of a GGUF file: its bytes are mapped, and read when they are used.

    shape: in PyTorch's order: [in], [out, in] or [experts, out, in].
    kind: one of TENSOR_TYPES.
    rows: uint8 [out, bytes of a row]. A vector is one row; the rows of all experts follow each
    other.
    """

    shape: tuple[int, ...]
    kind: str
    rows: np.ndarray


class TensorInfo(NamedTuple):
    """A tensor as the header describes it. kind: GGUF's number of its type. offset: in bytes, from
    the first tensor."""

    shape: tuple[int, ...]
    kind: int
    offset: int


class Gguf(NamedTuple):
    """A GGUF file: its fields by key and its tensors by name."""

    file: Path
    fields: dict
    tensors: dict[str, Tensor]

    def field(self, key: str, kind: type, default=...):
        """Returns the value of a key: of type `kind` and, if it is a number, positive and below
        2^31.

        Raises UserError where the value is another one, or where the key is missing and there is no
        default.
        """
        value = self.fields.get(key, default)
        if value is ...:
            raise UserError(f"{self.file}: has no {key}")
        # Not isinstance: a bool is an int for Python, and another type for GGUF.
        if type(value) is not kind:
            actual = type(value).__name__
            raise UserError(f"{self.file}: {key} is of type {actual}, {kind.__name__} is needed")
        if kind in (int, float) and not 0 < value < 2**31:
            raise UserError(f"{self.file}: {key} can't be {value}")
        return value


def read_gguf(file: Path) -> Gguf:
    """Reads the fields of a GGUF file and maps its tensors.

    Raises UserError where the file is cut, damaged, no GGUF file, or of a kind that is not
    supported.
    """
    refuse_pointer(file)
    try:
        data = np.memmap(file, np.uint8, "r")
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except ValueError:
        raise UserError(f"{file}: is empty; a GGUF file is needed") from None
    fields, table, end = parse_header(file, data)
    gguf = Gguf(file, fields, {})
    alignment = gguf.field("general.alignment", int, 32)
    start = -(-end // alignment) * alignment  # rounded up
    for name, info in table.items():
        gguf.tensors[name] = map_tensor(file, data, name, info, start + info.offset)

    # No two tensors may share bytes, else a small file could stand for a model of any size.
    previous_end = start
    for name in sorted(table, key=lambda name: table[name].offset):
        begin = start + table[name].offset
        if begin < previous_end:
            raise UserError(f"{file}: its tensors overlap: {name!r} begins inside another")
        previous_end = begin + gguf.tensors[name].rows.nbytes
    return gguf


class HeaderReader:
    """Reads the values of a header one after the other.

    position: the byte that is read next. num_items, text_bytes: what all lists and all strings have
    so far.
    """

    def __init__(self, file: Path, data: np.ndarray):
        self.file = file
        self.data = data
        self.position = 0
        self.num_items = 0
        self.text_bytes = 0

    def take(self, code: str, count: int = 1) -> tuple:
        """Reads `count` values of a struct code. Raises struct.error, before it allocates, where
        fewer are left."""
        layout = f"<{count}{code}"
        values = struct.unpack_from(layout, self.data, self.position)
        self.position += struct.calcsize(layout)
        return values

    def string(self) -> str:
        """Reads a string. Raises UnicodeDecodeError where it is not UTF-8."""
        (length,) = self.take("Q")
        self.text_bytes += length
        self.check_limit("texts of ", self.text_bytes, "bytes", MAX_TEXT_BYTES)
        return self.take("s", length)[0].decode()

    def scalar(self, kind: int):
        """Reads a number of GGUF type `kind`. Raises KeyError where that is none."""
        code = SCALARS[kind]
        (number,) = self.take(code)
        if code == "f":
            # As short as float32 allows: 1e-05, not 9.99999975e-06.
            return float(str(np.float32(number)))
        return number

    def value(self, kind: int):
        """Reads a value of GGUF type `kind`: a string, a number, or a list of either."""
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.scalar(kind)
        (item_kind,) = self.take("I")
        (count,) = self.take("Q")
        self.num_items += count
        self.check_limit("lists of ", self.num_items, "items", MAX_ITEMS)
        if item_kind == STRING:
            return [self.string() for _ in range(count)]
        return list(self.take(SCALARS[item_kind], count))

    def check_limit(self, before: str, count: int, unit: str, limit: int) -> None:
        """Raises UserError if the header claims more of something than any model needs."""
        if count > limit:
            claim = f"claims {before}{count:,} {unit}"
            raise UserError(f"{self.file}: {claim}; no model needs over {limit:,}")


def parse_header(file: Path, data: np.ndarray) -> tuple[dict, dict[str, TensorInfo], int]:
    """Returns the fields by key, the table of tensors by name, and the byte at which the header
    ends."""
    if data[:4].tobytes() != b"GGUF":
        raise UserError(f"{file}: is not a GGUF file: it does not begin with the letters GGUF")
    header = HeaderReader(file, data)
    header.position = 4
    fields = {}
    table = {}
    try:
        (version,) = header.take("I")
        if version not in (2, 3):
            supported = "little-endian 2 and 3 are"
            raise UserError(f"{file}: GGUF version {version} is not supported; {supported}")
        num_tensors, num_fields = header.take("Q", 2)
        header.check_limit("", num_tensors, "tensors", MAX_TENSORS)
        header.check_limit("", num_fields, "fields", MAX_FIELDS)
        for _ in range(num_fields):
            key = header.string()
            (kind,) = header.take("I")
            fields[key] = header.value(kind)
        for _ in range(num_tensors):
            name = header.string()
            (dimensions,) = header.take("I")
            # PyTorch names the slowest dimension first, GGUF the fastest.
            shape = header.take("Q", min(dimensions, MAX_DIMENSIONS_READ))[::-1]
            kind, offset = header.take("IQ")
            table[name] = TensorInfo(shape, kind, offset)
    except (struct.error, ValueError, KeyError, OverflowError):
        where = f"byte {header.position} of {len(data)}"
        raise UserError(f"{file}: its header is cut or damaged at {where}") from None
    if len(fields) < num_fields or len(table) < num_tensors:
        raise UserError(f"{file}: its header names a field or a tensor twice")
    return fields, table, header.position


def map_tensor(file: Path, data: np.ndarray, name: str, info: TensorInfo, start: int) -> Tensor:
    """Returns the tensor that begins at byte `start`. Raises UserError where the file is too short
    for it."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    shape = info.shape
    label = f"type {info.kind}"
    for member in GGMLQuantizationType:
        if member == info.kind:
            label = member.name
    if label not in TENSOR_TYPES:
        supported = " ".join(TENSOR_TYPES)
        raise UserError(f"{file}: {name!r} is stored as {label}; supported are {supported}")
    block_weights, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[label]]
    # A vector, a matrix, or the matrices of all experts; a block may not extend over two rows.
    is_usual = 1 <= len(shape) <= 3 and 0 not in shape
    if not is_usual or shape[-1] % block_weights:
        raise UserError(f"{file}: {name!r} has shape {list(shape)}; {label} can't hold that")
    # Python's integers don't overflow, whatever the header claims.
    end = start + math.prod(shape) // block_weights * block_bytes
    if end > len(data):
        raise UserError(f"{file}: is cut: {name!r} should end at byte {end} of {len(data)}")
    num_rows = math.prod(shape[:-1])  # 1 for a vector
    rows = data[start:end].reshape(num_rows, -1)  # [rows, bytes of a row]
    return Tensor(shape, label, rows)
