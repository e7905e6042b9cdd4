"""Folders by somebody who means harm: whatever config.json, weights, index or tokenizer say, the end is a model or one
line, in little time and memory, and nothing of theirs runs. GGUF files and templates have tests of their own.
"""

import base64
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.helpers import chat_base, child_life, llama

from checkpoint import load_model
from common import errors
from common.errors import UserError, read_json
from families import FAMILIES, MAX_EXPERTS, MAX_LAYERS, MAX_SIZE, Config
from kernels.rope import LENGTH_DEPENDENT
from model import Transformer
from tokenizer import Tokenizer, load_tokenizer

SECONDS, BYTES = 20, 1_000_000_000  # of any of it, beyond what the process had; a slow processor takes 10 for the most


# ---- config.json: any value at any key ----

VALUES = [None, True, -1, 0, 1, 1.5, 1e308, math.nan, math.inf, "x", "", [], {}, [[]], [None], {"a": {}}]
VALUES += [10**18, 10**400, MAX_SIZE, MAX_SIZE + 1, "\x1b[2J\ud800" * 999, [0] * 999]
SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
SIZES |= {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SCALED = [
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0, "partial_rotary_factor": 1.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 32},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1,
     "mscale": 1.0, "mscale_all_dim": 0.5, "attention_factor": 1.0, "truncate": True},
    {"type": "longrope", "factor": 4.0, "original_max_position_embeddings": 64, "short_factor": [1.0] * 8,
     "long_factor": [2.0] * 8},
]  # fmt: skip


class Watched(dict):
    """A dict that notes which keys it is asked for."""

    def __init__(self, values: dict):
        super().__init__(values)
        self.asked = set()

    def get(self, key, otherwise=None):
        self.asked.add(key)
        return super().get(key, otherwise)

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)


def good_configs(name: str) -> list[dict]:
    """A family's config.json in both dialects."""
    raw = transformers.CONFIG_MAPPING[name](**SIZES).to_dict()
    raw |= {} if name == "falcon" else {"head_dim": 16}
    new = raw | {"model_type": name, "architectures": [FAMILIES[name].architecture]}
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "layer_types")}
    return [new, old | {"rope_theta": 10_000.0, "rope_scaling": None}]


def model_or_refusal(raw: dict) -> bool:
    """Whether a configuration is taken, and then the model can be built and its positions turned; else it is refused in
    one line."""
    try:
        config = Config.from_hf(raw)
    except UserError as error:
        assert len(str(error)) < 1000
        return False
    with torch.device("meta"):
        model = Transformer(config)
    for number, rope in enumerate(config.ropes):
        if rope.dim < 1000:  # wider tables want weights as wide
            lengths = torch.tensor([3, 300]) if (rope.scaling or {}).get("rope_type") in LENGTH_DEPENDENT else None
            model.cos_sin(number, torch.tensor([0, 2]), lengths)
    return True


@pytest.mark.parametrize("name", FAMILIES)
def test_any_value_at_any_key_of_a_config_is_a_model_or_one_line(name):
    rng = random.Random(name)
    for good in good_configs(name):
        watched = Watched(good)
        Config.from_hf(watched)
        keys = sorted(watched.asked)
        assert len(keys) > 15 and model_or_refusal(good)
        taken = sum(model_or_refusal(good | {key: value}) for key, value in itertools.product(keys, VALUES))
        assert 0 < taken < 0.6 * len(keys) * len(VALUES)
        for _ in range(200):
            model_or_refusal(good | {key: rng.choice(VALUES) for key in rng.sample(keys, 3)})
        for key in keys:
            model_or_refusal({k: value for k, value in good.items() if k != key})


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma3_text"])
def test_any_value_in_a_rope_scaling_is_a_model_or_one_line(name):
    new, old = good_configs(name)
    for scaling in SCALED:
        for key, value in itertools.product([*scaling, "rope_theta", "type"], VALUES):
            wrong = {"rope_theta": 10_000.0} | scaling | {key: value}
            model_or_refusal(old | {"rope_scaling": wrong})
            nested = {"full_attention": wrong, "sliding_attention": wrong} if name == "gemma3_text" else wrong
            model_or_refusal(new | {"rope_parameters": nested})


# ---- within limits: a process of its own for what could take time or memory ----


def outcome(work, output: Path) -> str:
    """What becomes of work() in a process with BYTES more than this one and SECONDS: "fine", or its one line of error;
    anything else fails the test."""
    start, child = time.monotonic(), os.fork()

    def limited():
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        status = Path("/proc/self/status")
        if status.is_file():
            now = next(line for line in status.read_text().splitlines() if line.startswith("VmSize"))
            most = int(now.split()[1]) * 1024 + BYTES
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
        signal.alarm(10 * SECONDS)  # a hang; the limit itself is of processor time, which others don't use up
        errors.run(work)

    if child == 0:
        child_life(limited)
    _, status, usage = os.wait4(child, 0)
    said, code = output.read_text(), os.waitstatus_to_exitcode(status)
    assert code in (0, 2), f"exit code {code} after {time.monotonic() - start:.0f} s: {said[-2000:]}"
    assert usage.ru_utime + usage.ru_stime < SECONDS
    if code == 0:
        return "fine"
    if "panicked at" in said:  # Rust says by itself that its regex engine gave up, before Python is told
        said = said[said.rindex("\nerror: ") + 1 :]
    assert said.startswith("error: ") and said.count("\n") == 1 and said.rstrip("\n").isprintable() and len(said) < 2100
    return said


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A small Llama with a tokenizer."""
    return chat_base(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def folder(plain, tmp_path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "folder"))


def config(**changes):
    def edit(folder: Path):
        raw = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(raw))

    return edit


def written(name: str, make):
    """A file of the text that make() returns."""
    return lambda folder: (folder / name).write_text(make())


def sparse(name: str, size: int):
    """A file of zeros that takes no room."""

    def edit(folder: Path):
        with open(folder / name, "wb") as file:
            file.truncate(size)

    return edit


def header(change):
    """The header of model.safetensors after change(header): a dict, or bytes to be written as they are."""

    def edit(folder: Path):
        content = (folder / "model.safetensors").read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        parsed = json.loads(content[8:end])
        changed = change(parsed)
        text = changed if isinstance(changed, bytes) else json.dumps(parsed).encode()
        (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content[end:])

    return edit


def norm(**changes):
    return header(lambda parsed: parsed[NORM].update(changes))


def link(target: str):
    def edit(folder: Path):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors").symlink_to(target)

    return edit


def pipe(folder: Path):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


def index(*names: str, make=None):
    """The weights in model-1.safetensors, and an index of these files, or of the text that make() returns."""

    def edit(folder: Path):
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        weight_map = dict(zip(map(str, itertools.count()), names, strict=False))
        text = json.dumps({"weight_map": weight_map}) if make is None else make()
        (folder / "model.safetensors.index.json").write_text(text)

    return edit


def entries(count: int, entry: str, start: str = "{", end: str = "}") -> str:
    """JSON of so many entries; `#` is the number."""
    return start + ",".join(entry.replace("#", str(i)) for i in range(count)) + end


NORM, MOE = "model.norm.weight", {"model_type": "qwen3_moe", "architectures": None, "moe_intermediate_size": 8}
EMPTY = '"a#":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
BESIDE = "names of .safetensors files beside it"
FOLDERS = {  # what is wrong: (the damage, words of the line)
    "config of 1 GB": (sparse("config.json", 1 << 30), "config.json: has 1,074 MB"),
    "config nested deep": (written("config.json", lambda: '{"a":' * 10**6 + "1" + "}" * 10**6), "nested too deep"),
    "config of brackets": (written("config.json", lambda: "[" * 10**7), "config.json: holds more than"),
    "config of empty lists": (written("config.json", lambda: "[" + "[]," * 12_000_000 + "0]"), "holds more than"),
    "config with a lone surrogate": (written("config.json", lambda: '{"model_type": "\\ud800"}'), "'\\ud800'"),
    "config with a megabyte of escapes": (config(hidden_act="\x1b[2J\n" * 200_000), "hidden_act"),
    "layer types without end": (
        config(model_type="gemma2", architectures=None, layer_types=["full_attention"] * 3_000_000), "layer_types"),
    "MLP layers without end": (config(**MOE, num_hidden_layers=99, mlp_only_layers=[0] * 5_000_000), "mlp_only_layers"),
    "millions of layers": (config(num_hidden_layers=10**7), f"at most {MAX_LAYERS}"),
    "layers as many as can be": (config(num_hidden_layers=MAX_LAYERS), "tensors missing"),
    "millions of experts": (
        config(**MOE, num_experts=10**7), f"experts in 3 layers is not possible here (at most {MAX_EXPERTS}"),
    "experts as many as can be": (
        config(**MOE, num_experts=1000, num_hidden_layers=MAX_EXPERTS // 1000, num_experts_per_tok=1), "missing"),
    "a vocabulary of a billion": (config(vocab_size=10**9), "vocab_size is 1000000000"),
    "sizes as large as can be": (config(vocab_size=MAX_SIZE, intermediate_size=MAX_SIZE), "config.json implies"),
    "overlapping tensors": (norm(data_offsets=[0, 256]), "damaged"),
    "offsets beyond the file": (norm(data_offsets=[10**12, 10**12 + 256]), "damaged"),
    "offsets below zero": (norm(data_offsets=[-256, 0]), "damaged"),
    "offsets beyond 64 bits": (norm(data_offsets=[2**70, 2**70 + 256]), "damaged"),
    "a product beyond 64 bits": (norm(shape=[2**33, 2**33]), "damaged"),
    "a product of zero": (norm(shape=[2**62, 0], data_offsets=[0, 0]), "damaged"),
    "a hundred thousand dimensions": (norm(shape=[1] * 100_000 + [64]), NORM),
    "an unknown type": (norm(dtype="F99"), "damaged"),
    "a type of another width": (norm(dtype="F64"), "damaged"),
    "no type": (header(lambda parsed: parsed[NORM].pop("dtype")), "damaged"),
    "two entries of a name": (header(lambda parsed: json.dumps(parsed)[:-1].encode() + b',"' + NORM.encode() +
        b'":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'), "damaged"),
    "a header of lists": (header(lambda parsed: b'{"a":' + b"[" * 10**6), "damaged"),
    "a header that claims 10 GB": (
        lambda folder: (folder / "model.safetensors").write_bytes((10**10).to_bytes(8, "little") + b"{}"), "damaged"),
    "a header of a million tensors": (header(lambda parsed: entries(10**6, EMPTY).encode()), "a header of"),
    "as many tensors as a header takes": (
        header(lambda parsed: json.dumps(parsed)[:-1].encode() + entries(500_000, EMPTY, ",").encode()),
        "not part of the model: a0, a1, a10 and 499997 more"),
    "a name of a megabyte": (header(lambda parsed: parsed.update({"x" * 10**6: parsed.pop(NORM)})), NORM),
    "a name that moves the cursor": (
        header(lambda parsed: parsed.update({"\x1b[2J\n": parsed[NORM] | {"shape": [0], "data_offsets": [0, 0]}})),
        "\\x1b[2J\\n"),
    "weights that are a pipe": (pipe, "model.safetensors is missing"),
    "weights that are a device": (link("/dev/zero"), "model.safetensors is missing"),
    "weights that are a link to itself": (link("model.safetensors"), "model.safetensors is missing"),
    "weights that are somebody's file": (link("/etc/passwd"), "damaged"),
    "index to the parent": (index("../../../../etc/passwd"), BESIDE),
    "index to a weights file of the parent": (index("../model.safetensors"), BESIDE),
    "index to the root": (index("/etc/passwd.safetensors"), BESIDE),
    "index to a drive": (index("C:model.safetensors"), BESIDE),
    "index with backslashes": (index("..\\model.safetensors"), BESIDE),
    "index with a null": (index("a\0.safetensors"), BESIDE),
    "index with a lone surrogate": (index(make=lambda: '{"weight_map":{"a":"\\ud800.safetensors"}}'), BESIDE),
    "index that moves the cursor": (index("\x1b[2J\n.safetensors"), BESIDE),
    "index with a name of a megabyte": (index("x" * 10**6 + ".safetensors"), BESIDE),
    "index to itself": (index("model.safetensors.index.json"), BESIDE),
    "index to a folder": (
        lambda folder: (index("sub.safetensors")(folder), (folder / "sub.safetensors").mkdir()), "sub.safetensors is"),
    "index of a million files": (
        index(make=lambda: entries(10**6, '"a#":"b#.safetensors"', '{"weight_map":{', "}}")), "999997 more is missing"),
    "index of ten million tensors": (
        index(make=lambda: '{"weight_map":{' + '"a":"a.safetensors",' * 10**7 + '"b":"a"}}'), "MB, at most"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_a_hostile_folder_is_one_line(case, folder, tmp_path):
    damage, words = FOLDERS[case]
    damage(folder)
    line = outcome(lambda: load_model(folder), tmp_path / "said")
    assert words in line and "root:" not in line


def test_a_link_within_the_folder_is_followed_as_the_hubs_cache_needs(tmp_path):
    llama(tmp_path / "snapshot")
    (tmp_path / "blobs").mkdir()
    for file in [*(tmp_path / "snapshot").iterdir()]:
        file.rename(tmp_path / "blobs" / file.name)
        file.symlink_to(f"../blobs/{file.name}")
    assert load_model(tmp_path / "snapshot").config.num_layers == 3


def test_weights_at_odd_addresses_are_read_right(tmp_path):
    """Headers are padded to 8 bytes by custom only."""
    llama(tmp_path)
    wanted = load_file(tmp_path / "model.safetensors")[NORM].clone()
    header(lambda parsed: (json.dumps(parsed) + " " * (len(json.dumps(parsed)) % 2 == 0)).encode())(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    assert int.from_bytes(content[:8], "little") % 2
    assert torch.equal(load_model(tmp_path).norm.weight, wanted)


# ---- tokenizers ----


def spec(change):
    """tokenizer.json after change(parsed)."""

    def edit(folder: Path):
        parsed = json.loads((folder / "tokenizer.json").read_text())
        change(parsed)
        (folder / "tokenizer.json").write_text(json.dumps(parsed))

    return edit


def added(*texts: str, start: int = 1000):
    tokens = [{"id": start + i, "content": text, "special": True} for i, text in enumerate(texts)]
    return spec(lambda parsed: parsed["added_tokens"].extend(tokens))


def vocabulary(**ids: int):
    return spec(lambda parsed: parsed["model"]["vocab"].update(ids))


def words(regex: str):
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    steps = {"type": "Sequence", "pretokenizers": [split, level]}
    return spec(lambda parsed: parsed.update(pre_tokenizer=steps))


def long_tokens(length: int, count: int = 1):
    """Tokens of one letter, which merges of pairs, of pairs of pairs, ... could spell."""

    def change(parsed):
        model = parsed["model"]
        runs = ["a" * 2**n for n in range(1, 11)]
        texts = [*runs, *("a" * (length - i) for i in range(count))]
        model["vocab"] |= {text: 2000 + n for n, text in enumerate(texts)}
        model["merges"] = [[run[: len(run) // 2]] * 2 for run in runs] + model["merges"]

    return spec(change)


def sentencepiece(make, *arguments):
    """A tokenizer.model of the bytes that make(*arguments) returns, and no tokenizer.json."""

    def edit(folder: Path):
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer.model").write_bytes(make(*arguments))

    return edit


def pieces(count: int) -> bytes:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    special = [ModelProto.SentencePiece(piece="<unk>", type=2), ModelProto.SentencePiece(piece="<s>", type=3)]
    ordinary = [ModelProto.SentencePiece(piece=f"q{i:x}", score=-i) for i in range(count)]
    trainer = {"model_type": "BPE", "vocab_size": count + 2}
    return ModelProto(pieces=special + ordinary, trainer_spec=trainer).SerializeToString()


def lines(count: int) -> bytes:
    return b"".join(base64.b64encode(b"%d" % i) + b" %d\n" % i for i in range(count))


TOKENIZERS = {  # what is wrong: (the damage, words of the line, or "fine", or "" for either)
    "a vocabulary beyond the bounds": (
        written("tokenizer.json", lambda: '{"a":0' + ',"a":0' * 9_000_000 + "}"), "tokenizer.json: holds more than"),
    "a vocabulary of many short entries": (
        spec(lambda parsed: parsed["model"]["vocab"].update({f"{i:x}": 1000 + i for i in range(300_000)})), ""),
    "a merge half a million times": (
        spec(lambda parsed: parsed["model"].update(merges=parsed["model"]["merges"][:1] * 500_000)), "fine"),
    "an id of a billion": (vocabulary(zz=10**9), ""),
    "an id beyond 64 bits": (vocabulary(zz=2**70), ""),
    "an id below zero": (vocabulary(zz=-1), "tokenizer.json"),
    "an added id of a billion": (added("<x>", start=10**9), ""),
    "an added id below zero": (added("<x>", start=-1), "tokenizer.json"),
    "an added token of a megabyte": (added("x" * 10**6), "fine"),
    "an added token with half a pair": (added("<\ud800>"), ""),
    "many added tokens": (added(*(f"<{i * 7919:x}>" for i in range(30_000))), "fine"),
    "added tokens each the next one's beginning": (added(*("x" * (i + 1) for i in range(3000))), ""),
    "a token of 2,000 letters": (long_tokens(2000), ""),
    "a token of 20,000 letters": (long_tokens(20_000), ""),
    "a hundred tokens of 2,000 letters": (long_tokens(2000, 100), ""),
    "words by backtracking": (words(r"(?:(?:a|a)*(?!c)b)|\p{L}+"), ""),
    "words by nested repetition": (words(r"(?:a+)+b|\s+"), "fine"),
    "words by a regex of gigabytes": (words("(?:(?:a{1000}){1000}){1000}"), "tokenizer.json"),
    "words by nested groups": (words("(" * 5000 + "a" + ")" * 5000), ""),
    "words by many choices": (words("a|" * 100_000 + "b"), ""),
    "words by an open class": (words("[" + "a" * 10**6), "tokenizer.json"),
    "tokenizer.model of garbage": (sentencepiece(random.Random(0).randbytes, 10**6), "not a sentencepiece model"),
    "tokenizer.model of 200 MB": (sentencepiece(bytes, 200_000_000), "tokenizer.model"),
    "tokenizer.model of two million pieces": (sentencepiece(pieces, 2 * 10**6), "tokenizer.model"),
    "tokenizer.model of a million lines": (sentencepiece(lines, 10**6), "tokenizer.model"),
    "a template of 1 GB": (sparse("chat_template.jinja", 1 << 30), "chat_template.jinja"),
}  # fmt: skip


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_hostile_tokenizer_is_one_line_or_works(case, folder, tmp_path):
    damage, words = TOKENIZERS[case]
    damage(folder)

    def work():
        tokenizer = load_tokenizer(folder)
        assert tokenizer.decode(tokenizer.encode("the red fox " + "a" * 300)) == "the red fox " + "a" * 300

    assert words in outcome(work, tmp_path / "said")


def places(value, path=()):
    """Each place in a JSON value, of long lists and objects the first and the last two."""
    yield path
    if isinstance(value, (dict, list)) and len(path) < 6:
        keys = [*value] if isinstance(value, dict) else [*range(len(value))]
        for key in keys if len(keys) < 30 else keys[:2] + keys[-2:]:
            yield from places(value[key], (*path, key))


def put(value, path, new):
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = put(copy[path[0]], path[1:], new)
    return copy


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_any_value_at_any_place_of_a_tokenizers_files_is_a_tokenizer_or_one_line(name, folder, monkeypatch):
    # A template runs in a process of its own for each tokenizer, and has its own tests.
    monkeypatch.setattr(Tokenizer, "_answer_end", lambda self: set())
    good, taken = read_json(folder / name), 0
    for path, value in itertools.product(places(good), [None, -1, math.nan, "x", [], {"a": {}}, 10**9, [1]]):
        (folder / name).write_text(json.dumps(put(good, path, value)))
        try:
            load_tokenizer(folder).encode("the red fox <|im_end|> 12")
            taken += 1
        except UserError as error:
            assert "\n" not in str(error) and str(folder) in str(error)
    assert taken > 5


def test_nothing_of_theirs_runs(folder, tmp_path):
    """Code where other programs look for it: modules by name, pickles, files that Python imports."""
    trap = f"open({str(tmp_path / 'trap')!r}, 'w')\n"
    names = (
        "modeling_custom",
        "configuration_custom",
        "tokenization_custom",
        "sitecustomize",
        "conftest",
        "safetensors",
    )
    for name in names:
        (folder / f"{name}.py").write_text(trap)
    torch.save({"a": torch.ones(1)}, folder / "pytorch_model.bin")
    auto = {"AutoConfig": "configuration_custom.C", "AutoModelForCausalLM": "modeling_custom.M"}
    config(auto_map=auto)(folder)
    settings = read_json(folder / "tokenizer_config.json")
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_custom.T", None]}
    settings["chat_template"] = "{{ cycler.__init__.__globals__.os.system('touch " + str(tmp_path / "trap") + "') }}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    load_model(folder)
    tokenizer = load_tokenizer(folder)
    with pytest.raises(UserError):
        tokenizer.render([{"role": "user", "content": "a"}])
    assert not (tmp_path / "trap").exists()


def test_a_shards_own_tensors_count_and_no_other_files(folder):
    """A file that the index does not name is not opened."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model-1.safetensors")
    (folder / "model-2.safetensors").write_bytes(b"nonsense")
    weight_map = dict.fromkeys(weights, "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert load_model(folder).config.num_layers == 3
