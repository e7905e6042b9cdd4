"""Tokenizers to GGUF and back. Oracles: the tokenizers library and sentencepiece on the real tokenizers of ../shared,
and what transformers' own GGUF loader makes of our files. test_gguf_real.py asks llama.cpp (slow)."""

import io
import json
import re
import shutil

import gguf
import pytest
import sentencepiece
import tokenizers
import transformers
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from support.gguf_files import (
    FIELDS,
    ROWS,
    SENTENCES,
    SMALLEST,
    byte_level_tokenizer,
    checkpoint,
    llama,
    phi3_model,
    pieces,
    real,
    refusal,
    sentencepiece_model,
    texts,
    write_gguf,
)
from support.helpers import needs_shared
from transformers import AutoTokenizer

import convert
from interop import gguf_tokenizer as gguf_vocab
from tokenizer import load_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


SLOW = ("llama3_1", "qwen2_5", "qwen3", "mistral_nemo", "gemma3")  # 15 s each
PRE = {"gpt2": "gpt-2", "llama3_1": "llama-bpe", "qwen2_5": "qwen2", "qwen3": "qwen2", "mistral_nemo": "tekken"}


@needs_shared
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in ROWS])
def test_real_tokenizers_come_back_with_the_same_ids(name, tmp_path):
    folder, notes = real(name, tmp_path / "hf"), []
    convert.folder_to_gguf(folder, tmp_path / "x.gguf", "bf16", log=notes.append)
    convert.gguf_to_folder(tmp_path / "x.gguf", tmp_path / "back")
    before, after = load_tokenizer(folder), load_tokenizer(tmp_path / "back")
    special = [*before.special_tokens][:4] + [text for text, token in before.added.items() if not token.special][:4]
    if name == "llama2":
        oracle = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).encode
        special = []
    else:
        library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        oracle = lambda text: library.encode(text, add_special_tokens=False).ids
    for text in texts(400, special):
        assert after.encode(text, special=True) == before.encode(text, special=True) == oracle(text), text
        assert after.encode(text) == before.encode(text)
    for what in ("bos_id", "eos_id", "pad_id", "adds_bos", "stop_ids", "templates"):
        assert getattr(after, what) == getattr(before, what), what
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    assert reader.fields["tokenizer.ggml.pre"].contents() == PRE.get(name, "default")
    assert len(notes) == {"qwen2_5": 1, "qwen3": 1, "mistral_nemo": 1, "gemma3": 2}.get(name, 0)
    if name == "gemma3":
        assert "4 of the tokens ('▁YYYY'" in notes[0] and "'<image_soft_token>'" in notes[1]


def small(folder, **settings):
    """A folder with a model of one layer and the 300 tokens of test_convert.py; settings beside its own."""
    checkpoint(folder, "llama", SMALLEST)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


def spoil(folder, change):
    spec = json.loads((folder / "tokenizer.json").read_text())
    change(spec)
    (folder / "tokenizer.json").write_text(json.dumps(spec))


def fields(folder, tmp_path, notes=None, name="x.gguf"):
    convert.folder_to_gguf(folder, tmp_path / name, log=([] if notes is None else notes).append)
    reader = gguf.GGUFReader(tmp_path / name)
    return {key: field.contents() for key, field in reader.fields.items()}


def test_every_token_keeps_its_text_and_kind_and_rows_without_one_are_unused(tmp_path):
    found = fields(small(tmp_path / "hf"), tmp_path)
    library = byte_level_tokenizer()
    assert found["tokenizer.ggml.tokens"][:300] == [library.id_to_token(i) for i in range(300)]
    assert found["tokenizer.ggml.tokens"][300:] == [f"[PAD{i}]" for i in range(300, 304)]
    assert found["tokenizer.ggml.token_type"] == FIELDS["tokenizer.ggml.token_type"] + [UNUSED] * 4
    assert found["tokenizer.ggml.merges"] == FIELDS["tokenizer.ggml.merges"]
    ids = {key[15:]: value for key, value in found.items() if key.endswith("_token_id")}
    assert ids == {"bos_token_id": 0, "eos_token_id": 1, "padding_token_id": 1}
    assert (found["tokenizer.ggml.add_bos_token"], found["tokenizer.ggml.add_eos_token"]) == (False, False)


@pytest.mark.parametrize("pre", gguf_vocab.WORD_SPLITTERS)
def test_each_name_of_a_split_goes_in_and_comes_out_under_one_that_means_the_same(pre, tmp_path):
    file = write_gguf(tmp_path / "x.gguf", llama(), fields={"tokenizer.ggml.pre": pre})
    convert.gguf_to_folder(file, tmp_path / "in")
    ours = load_tokenizer(tmp_path / "in")
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "in" / "tokenizer.json"))
    for text in [*SENTENCES, *texts(100, ["<think>"])]:
        assert ours.encode(text, special=True) == library.encode(text, add_special_tokens=False).ids
    found = fields(tmp_path / "in", tmp_path, name="y.gguf")["tokenizer.ggml.pre"]
    assert found == {"llama3": "llama-bpe", "llama-v3": "llama-bpe"}.get(pre, pre)
    assert gguf_vocab.WORD_SPLITTERS[found] == gguf_vocab.WORD_SPLITTERS[pre]


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "tekken", "dbrx", "gpt-4o"])
def test_the_splits_are_those_of_transformers_loader(pre, tmp_path):
    write_gguf(tmp_path / "x.gguf", llama(), fields={"tokenizer.ggml.pre": pre})
    convert.gguf_to_folder(tmp_path / "x.gguf", tmp_path / "in")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf").backend_tokenizer.pre_tokenizer
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "in" / "tokenizer.json")).pre_tokenizer
    for text in [*SENTENCES, *texts(100, [])]:
        assert library.pre_tokenize_str(text) == theirs.pre_tokenize_str(text)


def test_a_second_and_a_third_end_have_keys_and_a_fourth_is_said(tmp_path):
    folder, notes = small(tmp_path / "hf"), []
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 299, 10]}')
    found = fields(folder, tmp_path, notes)
    assert found["tokenizer.ggml.eos_token_id"] == 1 and found["tokenizer.ggml.eot_token_id"] == 10
    assert len(notes) == 1 and "'<think>' may end none" in notes[0]
    spoil(folder, lambda spec: spec["added_tokens"][2].update(content="<|eom_id|>", special=True))
    found = fields(folder, tmp_path, notes, "y.gguf")
    assert len(notes) == 1
    assert (found["tokenizer.ggml.eot_token_id"], found["tokenizer.ggml.eom_token_id"]) == (10, 299)
    convert.gguf_to_folder(tmp_path / "y.gguf", tmp_path / "back")
    assert load_tokenizer(tmp_path / "back").stop_ids == {1, 10, 299}


def test_several_templates_travel_by_name(tmp_path):
    named = [{"name": "default", "template": "a{{ messages }}"}, {"name": "tool_use", "template": "b{{ tools }}"}]
    found = fields(small(tmp_path / "hf", chat_template=named), tmp_path)
    assert found["tokenizer.chat_template"] == "a{{ messages }}" and found["tokenizer.chat_templates"] == ["tool_use"]
    convert.gguf_to_folder(tmp_path / "x.gguf", tmp_path / "back")
    assert load_tokenizer(tmp_path / "back").templates == {"default": "a{{ messages }}", "tool_use": "b{{ tools }}"}
    (tmp_path / "hf" / "chat_template.jinja").write_text("c{{ messages }}")  # the newer file counts
    (tmp_path / "hf" / "additional_chat_templates").mkdir()
    (tmp_path / "hf" / "additional_chat_templates" / "rag.jinja").write_text("d")
    found = fields(tmp_path / "hf", tmp_path, name="y.gguf")
    assert found["tokenizer.chat_template"] == "c{{ messages }}" and found["tokenizer.chat_template.rag"] == "d"
    (tmp_path / "hf" / "chat_template.jinja").unlink()
    shutil.rmtree(tmp_path / "hf" / "additional_chat_templates")
    bare = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    del bare["chat_template"]
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(bare))
    assert not [key for key in fields(tmp_path / "hf", tmp_path, name="z.gguf") if "template" in key]


def test_bos_and_eos_around_a_text_are_carried_over(tmp_path):
    folder = small(tmp_path / "hf", add_bos_token=True, add_eos_token=True)
    found = fields(folder, tmp_path)
    assert (found["tokenizer.ggml.add_bos_token"], found["tokenizer.ggml.add_eos_token"]) == (True, True)
    convert.gguf_to_folder(tmp_path / "x.gguf", tmp_path / "back")
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "back" / "tokenizer.json"))
    ids = library.encode("the other day").ids
    assert ids == [0, *load_tokenizer(folder).encode("the other day"), 1]


def test_a_token_that_takes_spaces_along_is_said(tmp_path):
    folder, notes = small(tmp_path / "hf"), []
    spoil(folder, lambda spec: spec["added_tokens"][2].update(lstrip=True))
    fields(folder, tmp_path, notes)
    assert len(notes) == 1 and notes[0].startswith("NOTE: '<think>' strips the spaces beside it")


def test_tokens_beyond_the_embedding_are_left_out_and_said(tmp_path):
    checkpoint(tmp_path / "hf", "llama", SMALLEST | {"vocab_size": 299})
    notes = []
    assert len(fields(tmp_path / "hf", tmp_path, notes)["tokenizer.ggml.tokens"]) == 299
    assert notes == ["NOTE: 1 tokens beyond the 299 rows of the embedding are left out, as '<think>'"]


UNKNOWN_TO_LLAMA_CPP = {
    "another split": (
        lambda spec: spec["pre_tokenizer"].update(
            pretokenizers=[
                {"type": "Split", "pattern": {"Regex": r"\s+|\S+"}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ]
        ),
        "llama.cpp knows ways to cut a text into words by name only",
    ),
    "whole words first, but of another split": (
        lambda spec: spec["model"].update(ignore_merges=True),
        "llama.cpp knows ways to cut a text into words by name only",
    ),
    "a text in two tokens": (
        lambda spec: spec["added_tokens"][2].update(content="[PAD303]"),
        "tokens 299 and 303 are both '[PAD303]'",
    ),
}


@pytest.mark.parametrize(("change", "message"), UNKNOWN_TO_LLAMA_CPP.values(), ids=UNKNOWN_TO_LLAMA_CPP)
def test_a_tokenizer_without_an_equal_in_a_file_is_refused(change, message, tmp_path):
    folder = small(tmp_path / "hf")
    spoil(folder, change)
    assert message in refusal(convert.folder_to_gguf, folder, tmp_path / "x.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    folder = small(tmp_path / "hf", eos_token=None)
    assert "names no eos_token" in refusal(convert.folder_to_gguf, folder, tmp_path / "x.gguf")


# ---- sentencepiece ----


@pytest.mark.parametrize("prefix", [True, False])
def test_pieces_come_back_with_their_scores_and_kinds(prefix, tmp_path):
    content = sentencepiece_model(prefix)
    folder, notes = pieces(tmp_path / "hf", content), []
    found = fields(folder, tmp_path, notes)
    assert len(notes) == prefix  # llama.cpp has a space behind <think>, of which sentencepiece knows nothing
    proto = ModelProto.FromString(content)
    assert found["tokenizer.ggml.token_type"] == [piece.type for piece in proto.pieces]
    assert found["tokenizer.ggml.tokens"] == [
        piece.piece.replace("▁", " ") if piece.type == USER_DEFINED else piece.piece for piece in proto.pieces
    ]
    assert found["tokenizer.ggml.scores"] == pytest.approx([piece.score for piece in proto.pieces])
    assert found["tokenizer.ggml.add_space_prefix"] is prefix
    assert found["tokenizer.ggml.unknown_token_id"] == 0
    convert.gguf_to_folder(tmp_path / "x.gguf", tmp_path / "back")
    before, after = load_tokenizer(folder), load_tokenizer(tmp_path / "back")
    library = AutoTokenizer.from_pretrained(tmp_path / "back")
    for text in [*SENTENCES, *texts(100, ["</s>", "<s>"])]:
        if not (prefix and "<think>" in text):
            assert after.encode(text, special=True) == before.encode(text, special=True)
        # transformers never looks for a user-defined piece of spaces, nor does it put a space before a space
        if "   " not in text and not (prefix and re.search("(^|>) ", text)):
            assert library(text, add_special_tokens=False).input_ids == after.encode(text, special=True)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_space_that_llama_cpp_puts_and_the_tokenizer_does_not_is_said(legacy, tmp_path):
    content = sentencepiece_model(True)
    proto = ModelProto.FromString(content)
    user_defined = {str(i): p.piece for i, p in enumerate(proto.pieces) if p.type == USER_DEFINED}
    listed = {i: {"content": piece, "special": False, "normalized": False} for i, piece in user_defined.items()}
    folder, notes = pieces(tmp_path / "hf", content, legacy=legacy, added_tokens_decoder=listed), []
    fields(folder, tmp_path, notes)
    assert len(notes) == (not legacy)
    assert legacy or "puts a space before the text behind each added token" in notes[0]


def unigram(**settings):
    out = io.BytesIO()
    rules = {"model_type": "unigram", "vocab_size": 330, "hard_vocab_limit": False, "byte_fallback": True}
    sentences = iter(SENTENCES * 4)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_writer=out, minloglevel=2, **rules | settings
    )
    return out.getvalue()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"normalization_rule_name": "identity"}, "are not merged by scores"),
        ({"model_type": "bpe"}, "normalizes texts (nmt_nfkc)"),
        (
            {"model_type": "bpe", "byte_fallback": False, "remove_extra_whitespaces": False}
            | {"normalization_rule_name": "identity", "vocab_size": 90},
            "no tokens for single bytes",
        ),
    ],
)
def test_sentencepiece_models_that_llama_cpp_would_cut_otherwise_are_refused(settings, message, tmp_path):
    folder = pieces(tmp_path / "hf", unigram(**settings))
    assert message in refusal(convert.folder_to_gguf, folder, tmp_path / "x.gguf")


@pytest.mark.parametrize("name", ["phi-3-tiny", "mine"])
def test_phi3s_control_tokens_take_spaces_along_by_the_models_name(name, tmp_path):
    content, rows, decoder = phi3_model()
    notes, ends = [], {"eos_token": "<|endoftext|>"}
    folder = pieces(tmp_path / name, content, rows, added_tokens_decoder=decoder, **ends)
    text = "<s><|user|>\n the other day<|end|>  \n they<|endoftext|> feather"
    expected = load_tokenizer(folder).encode(text, special=True)
    with_spaces = load_tokenizer(folder).encode(
        text.replace("<|user|>\n ", "<|user|>").replace("  \n ", ""), special=True
    )
    assert expected == with_spaces
    found = fields(folder, tmp_path, notes)
    assert not any("strips" in note for note in notes)
    assert found["general.name"] == {"mine": "Phi-3 mine"}.get(name, name)
    convert.gguf_to_folder(tmp_path / "x.gguf", tmp_path / "back")
    assert load_tokenizer(tmp_path / "back").encode(text, special=True) == expected


def test_a_name_that_sounds_like_phi3_is_spelled_otherwise_where_no_token_takes_spaces(tmp_path):
    found = fields(small(tmp_path / "my-phi3-llama"), tmp_path)
    assert found["general.name"] == "my-phi 3-llama"


def gemma_file(path):
    """A file as llama.cpp's converter makes it of a Gemma: no piece is unknown, and the unknown one is control."""
    proto = ModelProto.FromString(sentencepiece_model(False))
    tokens = [p.piece.replace("▁", " ") if p.type == USER_DEFINED else p.piece for p in proto.pieces]
    types = [CONTROL if p.type == UNKNOWN else p.type for p in proto.pieces]
    tokens[329], types[329] = "<start_of_turn>", CONTROL
    changes = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.merges": None}
    changes |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    changes |= {"tokenizer.ggml.scores": [p.score for p in proto.pieces], "tokenizer.ggml.add_space_prefix": False}
    changes |= {"tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.bos_token_id": 1}
    changes |= {"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.padding_token_id": None}
    return write_gguf(path, llama(vocab_size=330), fields=changes | {"tokenizer.ggml.add_bos_token": True})


def test_a_gemma_tokenizer_has_an_unknown_piece_and_its_control_tokens(tmp_path):
    convert.gguf_to_folder(gemma_file(tmp_path / "x.gguf"), tmp_path / "folder")
    ours = load_tokenizer(tmp_path / "folder")
    assert ours.encode("<start_of_turn>the", special=True)[0] == 329
    assert 329 not in ours.encode("<start_of_turn>the")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    for text in ("<start_of_turn>the other", "a<start_of_turn> the <think>"):
        assert theirs(text, add_special_tokens=False).input_ids == ours.encode(text, special=True)
    assert ours.adds_bos and ours.model.prefix == "never"
