"""GGUF files of strangers, for every architecture: whatever a key, a tensor or a byte says, the end is a model or a
UserError of one line, soon, in little memory, with nothing left behind. tests/test_convert.py has headers by hand."""

import math
import os
import shutil
import struct
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from support.gguf_files import CASES, blob, checkpoint, llama, sentencepiece_fields, sentencepiece_model, write_gguf

import convert
from common.errors import UserError
from families import Config
from interop.gguf_import import config_json, plan_tensors
from interop.gguf_reader import Tensor, read_gguf
from interop.gguf_tokenizer import tokenizer_files

ROOT = Path(__file__).parent.parent
FUZZED = ["llama, llama3 rope", "qwen2, yarn", "qwen3_moe", "gemma2", "gemma3, other windows", "phi3, longrope", "gpt2"]
FUZZED += ["mixtral", "smollm3", "sentencepiece"]
VALUES = [True, False, 0, 1, -1, 3, 2**16, 2**31 - 1, 2**32 - 1, 2**63, 0.0, 0.5, -1.0, 1e38, math.nan, math.inf]
VALUES += [
    "",
    "x",
    "llama",
    "yarn",
    "longrope",
    "linear",
    [],
    [0],
    [-1],
    [2**40],
    [math.nan],
    ["a"],
    [True],
    [""] * 304,
]
VALUES += [["a"] * 304, [1] * 304, [99] * 304, [-1] * 304, [True] * 4, [math.nan] * 304, ["a b"], ["a  b"]]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for case in FUZZED[:-1]:
        family, changes, _ = CASES[case]
        depth = {} if family == "gpt2" or "layer_types" in changes else {"num_hidden_layers": 2}
        checkpoint(folder / case, family, changes | depth)
        convert.folder_to_gguf(folder / case, folder / f"{case}.gguf", log=lambda line: None)
        shutil.rmtree(folder / case)
    fields = sentencepiece_fields(sentencepiece_model(True))
    write_gguf(folder / "sentencepiece.gguf", llama(vocab_size=330, num_hidden_layers=1), fields=fields)
    return lambda case: folder / f"{case}.gguf"


def judged(gguf):
    """What gguf_to_folder does before it writes: None, or the complaint."""
    try:
        plan_tensors(gguf, Config.from_hf(config_json(gguf), str(gguf.file)))
        tokenizer_files(gguf)
    except UserError as error:
        assert "\n" not in str(error) and str(error).startswith(str(gguf.file)), error
        return str(error)


@pytest.mark.parametrize("case", FUZZED)
def test_any_value_of_any_key_ends_in_a_model_or_in_one_line(case, files):
    gguf = read_gguf(files(case))
    assert judged(gguf) is None
    started, endings = time.monotonic(), {True: 0, False: 0}
    for key in gguf.fields:
        without = {name: value for name, value in gguf.fields.items() if name != key}
        for fields in [without, *(without | {key: value} for value in VALUES)]:
            endings[judged(gguf._replace(fields=fields)) is None] += 1
    assert min(endings.values()) > 20
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("case", ["gemma3, other windows", "phi3, longrope", "qwen3_moe", "llama, llama3 rope"])
def test_any_tensor_that_is_missing_or_of_another_shape_is_named(case, files):
    gguf = read_gguf(files(case))
    for name, tensor in gguf.tensors.items():
        rest = {other: value for other, value in gguf.tensors.items() if other != name}
        complaint = judged(gguf._replace(tensors=rest))
        assert complaint is None if name in ("output.weight", "rope_freqs.weight") else complaint
        for shape in ((1,), (2, 3), (1, 1, 1), (*tensor.shape, 1), tensor.shape[:-1] + (tensor.shape[-1] + 1,)):
            odd = Tensor(shape, "F32", np.zeros((1, 4 * math.prod(shape)), np.uint8))
            assert judged(gguf._replace(tensors=gguf.tensors | {name: odd}))
        for value in (np.nan, np.inf, -1.0, 0.0):
            if name.startswith("rope"):
                rows = np.full(tensor.shape, value, "<f4").view(np.uint8)[None]
                assert judged(gguf._replace(tensors=gguf.tensors | {name: tensor._replace(rows=rows)}))


@pytest.mark.parametrize("case", ["gemma3, other windows", "phi3, longrope", "qwen3_moe", "sentencepiece"])
def test_damaged_bytes_end_in_a_model_or_in_one_line(case, files, tmp_path):
    content = files(case).read_bytes()
    header = content.index(b"token_embd.weight") + 40
    random = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(content)
        for place in random.integers(4, header, 3):
            damaged[place] = random.integers(256)
        (tmp_path / "x.gguf").write_bytes(damaged)
        try:
            convert.gguf_to_folder(tmp_path / "x.gguf", tmp_path / "folder")
            shutil.rmtree(tmp_path / "folder")
        except UserError as error:
            assert "\n" not in str(error)
        assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


def array(kind, count):
    return struct.pack("<IQ", kind, count)


HOLES = {  # what 12 GB of nothing can stand for, and what is said
    "a billion tokens": (blob(("tokenizer.ggml.tokens", 9, array(8, 10**9))), "claims lists of 1,000,000,000 items"),
    "a text of 10 GB": (blob(("a", 8, struct.pack("<Q", 10**10))), "claims texts of 10,000,000,001 bytes"),
    "five million tokens": (blob(("tokenizer.ggml.tokens", 9, array(8, 5 * 10**6))), "has no general.architecture"),
    "ten times a million numbers": (
        blob(*[(f"a{i}", 9, array(6, 10**6) + b"\0" * 4 * 10**6) for i in range(10)]),
        "claims lists of 6,000,000 items",
    ),
    "a tensor of 10 GB": (blob(tensors=[("x", (2500, 2**20), 0, 0)]), "has no general.architecture"),
}


@pytest.mark.parametrize(("content", "message"), HOLES.values(), ids=HOLES)
def test_a_file_full_of_holes_is_refused_soon_and_in_little_memory(content, message, tmp_path):
    with open(tmp_path / "x.gguf", "wb") as out:
        out.write(content)
        out.truncate(12 << 30)  # bytes that are no blocks on the disk
    script = f"""
        import resource, sys
        sys.path.insert(0, {str(ROOT)!r})
        import convert, gguf
        from common.errors import UserError
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            convert.gguf_to_folder({str(tmp_path / "x.gguf")!r}, {str(tmp_path / "folder")!r})
        except UserError as error:
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak, error)
    """
    started = time.monotonic()
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    kilobytes, _, answer = run.stdout.partition(" ")
    assert message in answer and answer.count("\n") == 1
    assert int(kilobytes) < 1e6 and time.monotonic() - started < 30  # most of it the start of Python
    assert sorted(os.listdir(tmp_path)) == ["x.gguf"]
