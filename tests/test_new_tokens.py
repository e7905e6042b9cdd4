"""New tokens, trained rows and trained tables against peft, transformers and tokenizers: logits and gradients, files in
both directions, tokenizers, whole runs, and bad input."""

import functools
import io
import json
import math
import random
import re
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import sentencepiece
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from support.helpers import (
    SHARED,
    chat_base,
    command,
    move,
    needs_shared,
    output_of,
    refusal_of,
    relative,
    sentence,
    sentencepiece_json,
)

import adapter_files
import convert
import data
import evaluate
import generate
import lora
import methods
import train
from adapting import new_tokens, tables
from checkpoint import load_model, read_config, save_model
from common.errors import UserError
from decoding import is_packed, packed_weights
from kernels import cross_entropy
from kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from kernels.onednn_linear import can_pack
from objectives import token_losses
from optimizers import make_optimizers
from planning.memory import Recipe, expected_memory, meta_model
from tokenizer import load_tokenizer

# ---- random bases, and peft on them ----

ROWS = 99  # of a base's table
MORE = 103  # with new tokens
SIZES = {"vocab_size": ROWS, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 64}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {"num_key_value_heads": 2}
CAPS = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 20.0, "head_dim": 12, "query_pre_attn_scalar": 10}
GPT2 = {"vocab_size": ROWS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
BASES = {  # name: family, what differs from the sizes above, its table, its head, what LoRA is on
    "llama": ("llama", GROUPED, "embed_tokens", "lm_head", ["q_proj", "v_proj"]),
    "llama, tied": ("llama", GROUPED | {"tie_word_embeddings": True}, "embed_tokens", "lm_head", ["q_proj", "v_proj"]),
    "qwen2": ("qwen2", GROUPED | {"tie_word_embeddings": False}, "embed_tokens", "lm_head", ["k_proj", "up_proj"]),
    "gpt2": ("gpt2", {}, "wte", "lm_head", ["c_attn"]),  # tied
    "gemma2": ("gemma2", GROUPED | CAPS, "embed_tokens", "lm_head", ["q_proj", "down_proj"]),  # tied, scaled, soft caps
    "gpt_neox": ("gpt_neox", {"tie_word_embeddings": False}, "embed_in", "lm_head", ["query_key_value"]),
}
TIED = {"llama, tied", "gpt2", "gemma2"}
INSIDE = [5, 17, 42]
BEYOND = [5, *range(ROWS, MORE)]


def make(folder: Path, name: str):
    family, changes, *_ = BASES[name]
    sizes = GPT2 if family == "gpt2" else SIZES
    config = transformers.CONFIG_MAPPING[family](**(sizes | IDS | changes), attn_implementation="eager")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            is_scale = ("norm" in key or ".ln_" in key) and key.endswith("weight")
            parameter.normal_(1.0 if is_scale and "gemma" not in family else 0.0, 0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A function from a base's name to its folder."""
    return functools.cache(lambda name: make(tmp_path_factory.mktemp("base"), name))


def hugging(folder: Path, rows: int = 0):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    if rows:
        torch.manual_seed(5)
        model.resize_token_embeddings(rows, mean_resizing=False)
        with torch.no_grad():  # else the new rows are tiny
            model.get_input_embeddings().weight[ROWS:].normal_(0, 0.2)
            model.get_output_embeddings().weight[ROWS:].normal_(0, 0.2)
    return model


@functools.cache
def tokens_below(rows: int) -> torch.Tensor:
    tokens = torch.randint(3, rows, (3, 11), generator=torch.Generator().manual_seed(1))
    for column, id in enumerate([*INSIDE, *BEYOND]):
        if id < rows:
            tokens[column % 3, 1 + column] = id
    return tokens


def settings_of(name: str, kind: str) -> tuple[dict, int]:
    """What peft is told of a kind of trained tables, and the rows that it gives the base; 0: it leaves them."""
    _, _, embed, head, _ = BASES[name]
    tied = name in TIED
    both = [embed] if tied else [embed, head]
    tie = {"ensure_weight_tying": True} if tied else {}
    ids = BEYOND if kind.endswith("beyond") else INSIDE
    rows = MORE if kind.endswith("beyond") else 0
    shape = kind.partition(",")[0]
    if shape == "list":
        return {"trainable_token_indices": ids}, rows
    if shape == "dict":
        return {"trainable_token_indices": dict.fromkeys(both, ids)}, rows
    if shape == "table":
        return {"modules_to_save": both, **tie}, rows
    if shape == "head":
        return {"modules_to_save": [head]}, rows
    if shape == "table and rows":
        return {"modules_to_save": [embed], "trainable_token_indices": {head: ids}}, rows
    assert shape == "rows and table"
    return {"modules_to_save": [head], "trainable_token_indices": {embed: ids}}, rows


def in_peft(folder: Path, name: str, kind: str):
    """A model of peft's with moved numbers, and whether it was given more rows."""
    settings, rows = settings_of(name, kind)
    family = BASES[name][0]
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=BASES[name][4], task_type="CAUSAL_LM", fan_in_fan_out=family == "gpt2",
        **settings,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(hugging(folder, rows), config).eval()
    move(wrapped)
    return wrapped


def ours_of(folder: Path, adapter: Path, **settings):
    model = load_model(folder, **settings)
    methods.load_any_adapter(model, adapter)
    return model


def written_by(wrapped, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(folder)
    return folder


def read_by_peft(base: Path, adapter: Path, rows: int = 0):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(hugging(base, rows), adapter, is_trainable=True).eval()


def gradient_of_rows(table, ids: list[int]) -> torch.Tensor:
    """The gradient of some rows of a trained table of ours."""
    if isinstance(table, tables.TrainedRows):
        assert set(ids) <= set(table.ids)
        return table.trained_rows.grad[[table.ids.index(id) for id in ids]]
    return table.trained_table.grad[ids]


def peft_gradients(wrapped, name: str) -> dict[str, torch.Tensor]:
    """{our name of a table: the gradient of what peft trains of it}."""
    found = {}
    for our_name, published in (("embed", BASES[name][2]), ("head", BASES[name][3])):
        for key, parameter in wrapped.named_parameters():
            if f".{published}." in key and parameter.grad is not None and "lora_" not in key:
                assert our_name not in found
                found[our_name] = parameter.grad
    return found


def assert_same_gradients(model, wrapped, name: str, kind: str) -> None:
    settings, _ = settings_of(name, kind)
    theirs = peft_gradients(wrapped, name)
    assert theirs
    trained = tables.trained_tables(model)
    indices = settings.get("trainable_token_indices", {})
    if isinstance(indices, list):
        indices = {BASES[name][2]: indices}
    for our_name, gradient in theirs.items():
        published = BASES[name][2 if our_name == "embed" else 3]
        if our_name == "head" and name in TIED:
            our_name = "embed"
        ids = indices.get(published, indices.get(BASES[name][2])) if indices else None
        if published in settings.get("modules_to_save", ()) or ids is None:
            ids = list(range(len(gradient)))
        mine = gradient_of_rows(trained[our_name], ids)
        assert gradient.norm() > 0
        assert relative(mine, gradient) < 1e-5, published
    for layer_name, layer in lora.lora_layers(model).items():
        stem = f"base_model.model.{layer_name}"
        found = {key: p.grad for key, p in wrapped.named_parameters() if key.startswith(stem)}
        assert relative(layer.lora_A.grad, found[f"{stem}.lora_A.default.weight"]) < 1e-5
        assert relative(layer.lora_B.grad, found[f"{stem}.lora_B.default.weight"]) < 1e-5


def batch_of(tokens: torch.Tensor, weights=None) -> data.Batch:
    weights = weights or [1.0] * tokens.shape[1]
    return data.collate([data.Example(row, weights) for row in tokens.tolist()])


def peft_loss(wrapped, tokens: torch.Tensor, weights=None) -> torch.Tensor:
    logits = wrapped(tokens).logits
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
    if weights is not None:
        losses = losses.view(len(tokens), -1) * torch.tensor(weights)[1:]
    return losses.sum()


UNTIED_KINDS = ["list", "dict", "dict, beyond", "list, beyond", "table", "table, beyond", "head", "table and rows"]
UNTIED_KINDS += ["rows and table", "table and rows, beyond", "rows and table, beyond"]
TIED_KINDS = ["list", "dict", "list, beyond", "table", "table, beyond"]
OTHERS = [
    ("qwen2", "table and rows, beyond"), ("gpt2", "list"), ("gpt2", "dict"), ("gpt2", "list, beyond"),
    ("gemma2", "list, beyond"), ("gemma2", "table"), ("gpt_neox", "list"),
    ("gpt_neox", "dict, beyond"), ("gpt_neox", "head"),
]  # fmt: skip
CASES = [("llama", kind) for kind in UNTIED_KINDS] + [("llama, tied", kind) for kind in TIED_KINDS] + OTHERS
ALL = [(name, kind) for name in BASES for kind in (TIED_KINDS if name in TIED else UNTIED_KINDS)]
# peft ties no table that is called wte (below).
ALL = [case for case in ALL if case not in CASES and case[:1] + (case[1][:5],) != ("gpt2", "table")]
EVERY = [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL)]


@pytest.fixture(scope="module")
def pefts(bases, tmp_path_factory):
    """A function from a base's name and a kind to peft's model and the folder that peft wrote."""

    @functools.cache
    def made(name: str, kind: str):
        wrapped = in_peft(bases(name), name, kind)
        return wrapped, written_by(wrapped, tmp_path_factory.mktemp("adapter"))

    return made


@pytest.mark.parametrize("name, kind", EVERY)
def test_what_peft_writes_has_its_logits_and_gradients(bases, pefts, name, kind):
    base = bases(name)
    wrapped, folder = pefts(name, kind)
    wrapped.zero_grad()
    model = ours_of(base, folder)
    rows = settings_of(name, kind)[1] or ROWS
    assert model.config.vocab_size == rows and tables.vocabulary_size(read_config(base), folder) == rows
    assert len(tables.trained_tables(model)) >= len(peft_gradients_of_any(wrapped, name))
    tokens = tokens_below(rows)
    # By all logits.
    ours, theirs = model(tokens), wrapped(tokens).logits
    assert torch.allclose(ours, theirs, atol=1e-5)
    ours.square().mean().backward()
    theirs.square().mean().backward()
    assert_same_gradients(model, wrapped, name, kind)
    # By the loss that is trained with, whose head never has all logits.
    model.zero_grad()
    wrapped.zero_grad()
    weights = [0.0, 1.0, 0.5, 0.0, 2.0, 1.0, 0.25, 1.0, 1.0, 3.0, 1.0]
    loss, _ = token_losses(model, batch_of(tokens, weights))
    expected = peft_loss(wrapped, tokens, weights)
    assert torch.allclose(loss, expected, rtol=1e-5)
    loss.backward()
    expected.backward()
    assert_same_gradients(model, wrapped, name, kind)


def peft_gradients_of_any(wrapped, name: str) -> set[str]:
    """Our names of the tables of which peft trains something."""
    found = set()
    for our_name, published in (("embed", BASES[name][2]), ("head", BASES[name][3])):
        for key, parameter in wrapped.named_parameters():
            if f".{published}." in key and parameter.requires_grad and "lora_" not in key:
                found.add("embed" if name in TIED else our_name)
    return found


@pytest.mark.parametrize("name, kind", EVERY)
def test_what_is_written_here_computes_the_same_in_peft_and_read_again(bases, pefts, tmp_path, name, kind):
    base = bases(name)
    model = ours_of(base, pefts(name, kind)[1])
    move(model)
    rows = settings_of(name, kind)[1]
    tokens = tokens_below(rows or ROWS)
    lora.save_adapter(model, tmp_path / "mine")
    with torch.no_grad():
        ours = model(tokens)
        again = ours_of(base, tmp_path / "mine")
        assert torch.equal(again(tokens), ours)
        wrapped = read_by_peft(base, tmp_path / "mine", rows)
        assert torch.allclose(wrapped(tokens).logits, ours, atol=1e-5)
    assert [*tables.trained_tables(again)] == [*tables.trained_tables(model)]
    if name == "gpt2" and "beyond" in kind:
        return  # peft reads the tied table twice, and ties it in training where it is called embed_tokens alone
    # peft trains on from it with the same gradients, of the tied head too.
    trained = {key for key, p in wrapped.named_parameters() if p.requires_grad and "lora_" not in key}
    assert len(trained) == len(tables.trained_tables(model))
    model(tokens).square().mean().backward()
    wrapped(tokens).logits.square().mean().backward()
    gradients = peft_gradients(wrapped, name)
    for our_name, table in tables.trained_tables(model).items():
        (parameter,) = [p for key, p in table.named_parameters() if ".base" not in key and not key.startswith("base")]
        assert relative(parameter.grad, gradients[our_name]) < 1e-5


@pytest.mark.parametrize("name, kind", EVERY)
def test_merged_in_transformers_and_taken_off_again(bases, pefts, tmp_path, name, kind):
    base = bases(name)
    adapter = pefts(name, kind)[1]
    model = load_model(base)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    with torch.no_grad():
        plain = model(tokens_below(ROWS))
    methods.load_any_adapter(model, adapter)
    rows = settings_of(name, kind)[1] or ROWS
    tokens = tokens_below(rows)
    with torch.no_grad():
        ours = model(tokens)
        adapter_files.merge(model, keep=True)
        assert relative(model(tokens), ours) < 1e-5
        adapter_files.unmerge(model)
        assert torch.equal(model(tokens), ours)
        # Without what it keeps, tables are exact all the same.
        adapter_files.merge(model)
        assert relative(model(tokens), ours) < 1e-5
        adapter_files.unmerge(model)
        assert relative(model(tokens), ours) < 1e-5
        for table in tables.trained_tables(model).values():
            inside = table.base.weight[: len(before["embed.weight"])]
            assert any(torch.equal(inside, before[key]) for key in ("embed.weight", "head.weight") if key in before)
    # Off and on again.
    model = ours_of(base, adapter)
    with torch.no_grad():
        modules = adapter_files.remove_adapter(model)
        assert model.config.vocab_size == ROWS and model.config.raw["vocab_size"] == ROWS
        now = dict(model.named_parameters())
        assert now.keys() == before.keys() and all(torch.equal(now[key], before[key]) for key in now)
        assert torch.equal(model(tokens_below(ROWS)), plain)
        adapter_files.put_back(model, modules)
        assert model.config.vocab_size == rows and torch.equal(model(tokens), ours)
        with adapter_files.adapter_off(model):
            assert torch.allclose(model(tokens_below(ROWS))[..., :ROWS], plain, atol=1e-6)
        assert torch.equal(model(tokens), ours)
        lora.merge(model)
        adapter_files.remove_adapter(model)
        save_model(model, tmp_path / "merged")
    theirs = hugging(tmp_path / "merged")
    assert theirs.config.vocab_size == rows == len(theirs.get_input_embeddings().weight)
    head = theirs.get_output_embeddings().weight
    assert (head is theirs.get_input_embeddings().weight) == (name in TIED)
    with torch.no_grad():
        assert torch.allclose(theirs(tokens).logits, ours, atol=1e-5)
        assert torch.equal(load_model(tmp_path / "merged")(tokens), model(tokens))
    # Only what was trained of the table differs from the base's.
    settings, _ = settings_of(name, kind)
    if kind in ("list", "dict"):
        stored = load_file(base / "model.safetensors")
        for key, tensor in load_file(tmp_path / "merged" / "model.safetensors").items():
            if tensor.shape[0] == ROWS and tensor.dim() == 2:
                changed = (tensor != stored[key]).any(1).nonzero().flatten().tolist()
                named = settings["trainable_token_indices"]
                is_trained = kind == "dict" or BASES[name][2] in key
                assert changed == (INSIDE if is_trained else []), (key, named)


def test_a_tied_table_that_peft_trains_untied_is_refused(bases, pefts):
    """peft ties tables that are called embed_tokens and lm_head: of GPT-2 it trains the embedding alone, whatever
    ensure_weight_tying says, and its file has no second name."""
    wrapped, folder = pefts("gpt2", "table")
    names = [name for name, p in wrapped.named_parameters(remove_duplicate=False) if "modules_to_save" in name]
    assert len(names) == 1 and "lm_head" not in "".join(load_file(folder / "adapter_model.safetensors"))
    with pytest.raises(UserError, match="unties"):
        ours_of(bases("gpt2"), folder)


@pytest.mark.parametrize("kind", ["list", "table", "dict, beyond", "table and rows"])
def test_files_of_tables_in_nf4_and_bf16(bases, pefts, kind):
    """On another base dtype the rows are the same, and off they are gone to the bit."""
    folder = pefts("llama", kind)[1]
    for settings in ({"quant": "nf4"}, {"dtype": torch.bfloat16}):
        model = load_model(bases("llama"), **settings)
        with torch.no_grad():
            before = model(tokens_below(ROWS))
            methods.load_any_adapter(model, folder)
            for table in tables.trained_tables(model).values():
                (live,) = [p for key, p in table.named_parameters() if key.startswith("trained")]
                assert live.dtype == torch.float32
            with adapter_files.adapter_off(model):
                assert torch.equal(model(tokens_below(ROWS))[..., :ROWS], before)
            on = model(tokens_below(ROWS))
            assert relative(on[..., :ROWS], before) > 1e-3
            adapter_files.merge(model)
            assert relative(model(tokens_below(ROWS)), on) < (1e-5 if "quant" in settings else 0.03)


# ---- the loss ----


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rows_at_a_time", [5, 1000])
@pytest.mark.parametrize("frozen_hidden", [False, True])
def test_the_loss_gives_trained_rows_their_gradient(monkeypatch, softcap, weighted, rows_at_a_time, frozen_hidden):
    torch.manual_seed(0)
    N, D, V = 37, 16, 50
    monkeypatch.setitem(cross_entropy.LOGITS_BYTES, "cpu", rows_at_a_time * V * 4)
    ids = torch.tensor([49, 3, 17, 0])
    targets = torch.randint(V, (N,))
    targets[:6] = torch.tensor([49, 49, 3, 17, 0, 1])
    loss_weights = torch.rand(N) * 2 if weighted else None
    table = torch.randn(V, D)
    found = []
    for function in (linear_cross_entropy, linear_cross_entropy_reference):
        torch.manual_seed(1)
        hidden = torch.randn(N, D, requires_grad=not frozen_hidden)
        rows = torch.randn(len(ids), D, requires_grad=True)
        weight = table.index_copy(0, ids, rows.detach())
        loss, losses = function(hidden, weight, targets, softcap, loss_weights, (ids, rows))
        (1.7 * loss).backward()
        assert rows.grad.shape == rows.shape and weight.grad is None
        found.append((loss.detach(), losses, rows.grad, *([] if frozen_hidden else [hidden.grad])))
        with torch.no_grad():
            assert torch.allclose(function(hidden, weight, targets, softcap, loss_weights, (ids, rows))[0], loss)
    for ours, theirs in zip(*found, strict=True):
        assert relative(ours, theirs) < 1e-5


def test_the_loss_in_bf16_with_rows_in_float32():
    torch.manual_seed(0)
    ids, targets = torch.tensor([7, 2]), torch.randint(40, (64,))
    rows = torch.randn(2, 32, requires_grad=True)
    hidden = torch.randn(64, 32, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(40, 32).index_copy(0, ids, rows.detach()).bfloat16()
    linear_cross_entropy(hidden, weight, targets, trained_rows=(ids, rows))[0].backward()
    mine, rows.grad = rows.grad, None
    exact = hidden.detach().float(), weight.float(), targets
    linear_cross_entropy_reference(*exact, trained_rows=(ids, rows))[0].backward()
    assert mine.dtype == torch.float32 and hidden.grad.dtype == torch.bfloat16
    assert relative(mine, rows.grad) < 0.02


# ---- tokenizers ----

NEW = ["<tool>", "<tool>s", "[CALL]", "河豚", "Zürichsee", "foo_bar", "qxz", "qxzq", "xzqq", "a b  c", "🦊🦊"]
NEW += ["e\u0301x", "</s2>"]
PIECES = [*NEW, *NEW, " ", "  ", "\n", "a", "the", "red fox", "7", "über", "\t", "q", "x", "z", ".", "s", "河"]
PIECES += ["\u0301"]
CONVERSATION = [
    {"role": "system", "content": "Answer with <tool>."},
    {"role": "user", "content": "<tool> red<tool>fox <tool><tool> 河豚河豚\nfoo_bar"},
    {"role": "assistant", "content": "[CALL] the foo_bars are qxzqq<tool>"},
    {"role": "user", "content": "foo_bar"},
    {"role": "assistant", "content": "<tool>"},
]


@pytest.fixture(autouse=True, scope="module")
def cache_elsewhere(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLAINTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def texts_with(new: list[str], count: int) -> list[str]:
    rng = random.Random(0)
    texts = ["", *new, *(2 * text for text in new), *(f" {text} " for text in new), *(f"x{text}x" for text in new)]
    texts += [f"{text}\n{text}" for text in new]
    return texts + ["".join(rng.choices(PIECES, k=rng.randrange(1, 12))) for _ in range(count)]


def extended(folder: Path, file: Path, texts: list[str] = NEW) -> tuple[Path, new_tokens.NewTokens]:
    file.write_text("\n".join(texts) + "\n\n", encoding="utf-8")
    tokens = new_tokens.new_tokens_of(SimpleNamespace(add_tokens=str(file), resume=None, out=None), folder)
    return new_tokens.extended_tokenizer(folder, tokens), tokens


def library(folder: Path):
    return transformers.AutoTokenizer.from_pretrained(folder)


def assert_extended_as_transformers_does(folder: Path, tmp_path: Path, new: list[str] = NEW, count: int = 400):
    """The ids equal those of transformers with the written folder, and with the original one and add_tokens."""
    place, tokens = extended(folder, tmp_path / "new.txt", new)
    ours, before = load_tokenizer(place), load_tokenizer(folder)
    read, added = library(place), library(folder)
    assert added.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in new]) == len(new)
    assert tokens.texts == tuple(new) and [*tokens.ids] == read.convert_tokens_to_ids(new)
    assert [*tokens.ids] == added.convert_tokens_to_ids(new)
    assert ours.vocab_size == before.vocab_size + len(new) == len(read) == len(added)
    assert not set(new) & set(read.all_special_tokens) and not set(new) & ours.special_tokens.keys()
    for text, id, parts in zip(new, tokens.ids, tokens.parts, strict=True):
        assert list(parts) == before.encode(text)
        assert ours.decode([id]) == text == ours.decode([id], skip_special=True)
    for text in texts_with(new, count):
        ids = ours.encode(text)
        assert ids == read.encode(text, add_special_tokens=False), text
        assert ids == added.encode(text, add_special_tokens=False), text
        assert ids == ours.encode(text, special=True)
        # The library takes the ü of a token for a byte of GPT-2's alphabet.
        if "Zürichsee" not in text:
            assert ours.decode(ids) == read.decode(ids, clean_up_tokenization_spaces=False), text
    # Texts without any are as before.
    for text in ["the red fox", "über 河 12", " x\n y"]:
        assert ours.encode(text) == before.encode(text)
    return place, ours, read


def test_byte_level_tokenizer_with_new_tokens(tmp_path):
    place, ours, read = assert_extended_as_transformers_does(chat_base(tmp_path / "base"), tmp_path)
    for messages in (CONVERSATION, CONVERSATION[1:3], CONVERSATION[3:]):
        text = read.apply_chat_template(messages, tokenize=False)
        assert ours.render_text(messages) == text
        ids, trained = ours.render(messages)
        assert ids == read.encode(text, add_special_tokens=False)
        id = read.convert_tokens_to_ids("<tool>")
        assert ids.count(id) >= text.count("<tool>") - text.count("<tool>s") > 0 and any(trained)
    assert ours.decode(ours.encode("x<tool>y foo_bar\n河豚")) == "x<tool>y foo_bar\n河豚"
    # Written once.
    assert extended(tmp_path / "base", tmp_path / "new.txt")[0] == place


def pieces_of(texts: list[str], size: int = 500):
    """The pieces and scores of a small sentencepiece BPE with byte fallback."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=size, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=0.98, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def sentence_pieces(folder: Path, legacy: bool) -> Path:
    """A folder as Llama 2's: tokenizer.model, and a tokenizer.json with the same pieces."""
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(pieces_of([f"{sentence(i, 20)} {i} foo bar" for i in range(80)], 420))
    bpe = sentencepiece_json(folder / "tokenizer.model", legacy)
    bpe.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    known = {str(id): {"content": text, **special} for id, text in enumerate(("<unk>", "<s>", "</s>"))}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"added_tokens_decoder": known}))
    return folder


@pytest.mark.parametrize("legacy", [True, False])
def test_sentencepiece_tokenizer_with_new_tokens(legacy, tmp_path):
    base = sentence_pieces(tmp_path / "base", legacy)
    place, ours, _ = assert_extended_as_transformers_does(base, tmp_path)
    config = json.loads((place / "tokenizer_config.json").read_text())
    assert config["added_tokens_decoder"][str(ours.vocab_size - 1)]["content"] == NEW[-1]
    # Without tokenizer.json the tokens are in a file of their own; the ids are the same.
    (base / "tokenizer.json").unlink()
    bare, _ = extended(base, tmp_path / "new.txt")
    assert json.loads((bare / "added_tokens.json").read_text())["<tool>"] == ours.vocab_size - len(NEW)
    older, plain = load_tokenizer(bare), load_tokenizer(base)
    marks = re.compile("(" + "|".join(re.escape(text) for text in sorted(NEW, key=len, reverse=True)) + ")")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(base / "tokenizer.model"))
    for text in texts_with(NEW, 200):
        expected: list[int] = []
        for number, part in enumerate(marks.split(text)):
            pieces.override_normalizer_spec(add_dummy_prefix=number == 0)
            expected += [plain.vocab_size + NEW.index(part)] if part in NEW else pieces.encode(part)
        assert older.encode(text) == expected, text


@needs_shared
@pytest.mark.parametrize("name", ["gpt2", *(
    pytest.param(name, marks=pytest.mark.slow) for name in ("llama3_1", "qwen2_5", "qwen3", "mistral_nemo", "gemma3")
)])  # fmt: skip
def test_real_tokenizers_with_new_tokens(name, tmp_path):
    assert_extended_as_transformers_does(SHARED / "tokenizers" / name, tmp_path, count=200)


# ---- whole runs ----

ADDED = ["<tool>", "[CALL]", "foo_bar"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The bases, tied or not, and with room in the table; the new tokens, and records with them."""
    folder = tmp_path_factory.mktemp("files")
    sizes = {"num_key_value_heads": 2, "num_hidden_layers": 2, "std": 0.1}
    chat_base(folder / "untied", **sizes)
    chat_base(folder / "tied", tie_word_embeddings=True, **sizes)
    shutil.copytree(folder / "untied", folder / "roomy")
    torch.manual_seed(4)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "untied")
    model.resize_token_embeddings(336)
    model.save_pretrained(folder / "roomy")
    (folder / "new.txt").write_text("\n".join(ADDED) + "\n")
    rng = random.Random(2)
    for name, count in (("data", 24), ("val", 6)):
        lines = []
        for i in range(count):
            new = rng.choice(ADDED)
            lines.append({"prompt": f"{new} {sentence(i, 3)}{new}", "completion": f"{sentence(i + 99, 4)} {new}{new}"})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def words_of(files: Path, base: str, *words) -> list[str]:
    given = ["--model", files / base, "--data", files / "data.jsonl", "--val", files / "val.jsonl", "--batch-size", 4]
    return [str(word) for word in [*given, "--dtype", "fp32", "--warmup", 0, *words]]


RUNS = {
    "lora": ("untied", "--rank 4"),
    "lora, tied": ("tied", "--rank 4"),
    "lora, roomy": ("roomy", "--rank 4 --train-tokens <|im_end|>"),
    "qlora": ("tied", "--method qlora --rank 4"),
    "full": ("untied", "--method full"),
    "full, tied": ("tied", "--method full"),
    "table": ("untied", "--rank 4 --modules-to-save embed_tokens"),
}


def loss_in(said: str) -> float:
    """The one loss of a table of evaluate.py."""
    (found,) = re.findall(r"^\w+ +(\d+\.\d{4}) ", said, re.MULTILINE)
    return float(found)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in ("lora", "qlora", "full, tied") else pytest.mark.slow) for name in RUNS
])  # fmt: skip
def test_a_run_with_new_tokens_and_every_door_behind_it(files, tmp_path, monkeypatch, capsys, name):
    base, words = RUNS[name]
    out = tmp_path / "run"
    said = output_of(train, monkeypatch, capsys, *words_of(files, base, *words.split(), "--add-tokens",
        files / "new.txt", "--lr", "2e-3", "--steps", 3, "--out", out))  # fmt: skip
    final, folder = out / "final", files / base
    old = load_tokenizer(folder)
    ids = list(range(old.vocab_size, old.vocab_size + 3))
    rows = max(ids[-1] + 1, read_config(folder).vocab_size)
    assert f"3 new, ids {ids[0]} to {ids[-1]}" in said.replace(",", "", 0) and (out / "added_tokens.txt").is_file()
    ours, theirs = load_tokenizer(final), library(final)
    for text in texts_with(ADDED, 50):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert ours.encode("<tool>") == [ids[0]] and theirs.convert_tokens_to_ids(ADDED) == ids
    tokens = torch.tensor([[5, ids[0], 60, ids[1], ids[2], 70, ids[0]]])
    is_full = name.startswith("full")
    if is_full:
        model = load_model(final)
        merged = final
    else:
        quant = "nf4" if name == "qlora" else None
        model = load_model(folder, quant=quant)
        methods.load_any_adapter(model, final)
        assert model.config.vocab_size == rows
        merged = tmp_path / "merged"
        output_of(convert, monkeypatch, capsys, "merge", folder, final, merged, "--dtype", "fp32",
            "--check", files / "val.jsonl")  # fmt: skip
        # peft gives the base more rows by the tokenizer that lies in the folder.
        if quant is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                auto = peft.AutoPeftModelForCausalLM.from_pretrained(final).eval()
            with torch.no_grad():
                assert torch.allclose(auto(tokens).logits, model(tokens), atol=1e-5)
    whole = hugging(merged)
    assert whole.config.vocab_size == rows == len(whole.get_input_embeddings().weight)
    tied = whole.get_output_embeddings().weight is whole.get_input_embeddings().weight
    assert tied == (base == "tied")
    with torch.no_grad():
        logits = model(tokens)
        assert torch.allclose(whole(tokens).logits, logits, atol=1e-5)
    # Of the tables, what is not trained is the base's to the bit.
    stored, mine = load_file(folder / "model.safetensors"), load_file(merged / "model.safetensors")
    if not is_full:
        for key in ("model.embed_tokens.weight", "lm_head.weight"):
            if key in stored and not (name == "table" and "embed" in key):
                changed = (mine[key][: len(stored[key])] != stored[key]).any(1).nonzero().flatten().tolist()
                assert changed == ([2, *ids] if base == "roomy" else [])
    # The other scripts.
    door = ["--model", folder, "--adapter", final] if not is_full else ["--model", final]
    if name == "qlora":
        door += ["--quant", "nf4"]
    adapted = loss_in(output_of(evaluate, monkeypatch, capsys, "loss", *door, "--data", files / "val.jsonl",
        "--dtype", "fp32"))  # fmt: skip
    other = loss_in(output_of(evaluate, monkeypatch, capsys, "loss", "--model", merged, "--data", files / "val.jsonl",
        "--dtype", "fp32"))  # fmt: skip
    assert math.isclose(adapted, other, abs_tol=2e-4)
    output_of(generate, monkeypatch, capsys, *door, "--prompt", "<tool> red", "--max-new-tokens", 4)
    gguf = tmp_path / "x.gguf"
    output_of(convert, monkeypatch, capsys, "to-gguf", merged, gguf)
    third = loss_in(output_of(evaluate, monkeypatch, capsys, "loss", "--model", gguf, "--data", files / "val.jsonl",
        "--dtype", "fp32"))  # fmt: skip
    assert math.isclose(third, other, abs_tol=2e-4)
    if not is_full:
        for words in (["to-gguf", folder, tmp_path / "y.gguf", "--adapter", final],
                      ["adapter-to-gguf", final, tmp_path / "y.gguf"]):  # fmt: skip
            _, err, code = command(convert, monkeypatch, capsys, *words)
            assert code == 2 and "merge" in err.splitlines()[-1] and not (tmp_path / "y.gguf").exists()
    # A cache of keys and values changes nothing.
    written = [token for step in model.stream([tokens[0].tolist()], 8) for _, token in step]
    text = tokens[0].tolist()
    with torch.no_grad():
        for token in written:
            assert token == int(model(torch.tensor([text]))[0, -1].argmax())
            text.append(token)


def test_versus_the_base_and_a_second_adapter(files, tmp_path, monkeypatch, capsys):
    """A base that lends itself to several is without the new rows again, and has those of the next."""
    losses = {}
    (tmp_path / "other.txt").write_text("<other>\n")
    for name, file in (("one", files / "new.txt"), ("two", tmp_path / "other.txt")):
        output_of(train, monkeypatch, capsys, *words_of(files, "untied", "--rank", 2, "--add-tokens", file, "--lr",
            "2e-3", "--steps", 2, "--out", tmp_path / name))  # fmt: skip
    data_words = ["--data", files / "val.jsonl", "--dtype", "fp32", "--model", files / "untied"]
    for name, words in (("base", []), ("one", ["--adapter", tmp_path / "one/final"]),
                        ("two", ["--adapter", tmp_path / "two/final"])):  # fmt: skip
        losses[name] = loss_in(output_of(evaluate, monkeypatch, capsys, "loss", *data_words, *words))
    for name, versus in (("one", "base"), ("two", tmp_path / "one/final")):
        said = output_of(evaluate, monkeypatch, capsys, "loss", *data_words, "--adapter", tmp_path / name / "final",
            "--versus", versus)  # fmt: skip
        for each in (name, "one" if name == "two" else "base"):
            assert f"{losses[each]:.4f}" in said, (losses, said)


@pytest.mark.parametrize("method, base", [
    ("lora", "untied"), ("lora", "roomy"), ("full", "tied"), pytest.param("lora", "tied", marks=pytest.mark.slow),
    pytest.param("full", "untied", marks=pytest.mark.slow), pytest.param("full", "roomy", marks=pytest.mark.slow),
])  # fmt: skip
def test_new_rows_begin_as_the_mean_of_the_old_parts(files, tmp_path, monkeypatch, capsys, method, base):
    words = words_of(files, base, "--method", method, "--add-tokens", files / "new.txt", "--lr", "1e-9", "--steps", 1)
    output_of(train, monkeypatch, capsys, *words, "--weight-decay", 0, "--out", tmp_path / "run")
    model = load_model(files / base if method == "lora" else tmp_path / "run/final")
    if method == "lora":
        methods.load_any_adapter(model, tmp_path / "run/final")
        lora.merge(model)
    stored = load_file(files / base / "model.safetensors")
    old = load_tokenizer(files / base)
    for place, text in enumerate(ADDED):
        parts = old.encode(text)
        for key, table in (("model.embed_tokens.weight", model.embed), ("lm_head.weight", model.head)):
            if table is not None:
                weight = table.weight if method == "full" else table.base.weight
                expected = stored[key][parts].mean(0)
                assert torch.allclose(weight[old.vocab_size + place], expected, atol=1e-6)


@pytest.mark.parametrize("words, rows, table", [
    ("--add-tokens NEW --embedding-lr 5e-4", 5e-4, None),
    ("--add-tokens NEW", 2e-3, None),
    ("--train-tokens red,<|im_end|>", 2e-3, None),
    ("--modules-to-save embed_tokens,lm_head --embedding-lr 3e-5", None, 3e-5),
    ("--modules-to-save embed_tokens", None, 2e-4),
    ("--modules-to-save lm_head --add-tokens NEW --embedding-lr 7e-4 --lora-plus 4", 7e-4, 7e-4),
])  # fmt: skip
def test_rows_and_tables_have_their_rate(files, tmp_path, monkeypatch, capsys, words, rows, table):
    """--lr is 2e-3. By the groups of the optimizer, and by the first step, which with AdamW is the rate itself."""
    seen = {}

    def spied(model, *rest):
        made = make_optimizers(model, *rest)
        seen["model"] = model
        seen["factors"] = {id(p): g["lr_factor"] for each in made for g in each.param_groups for p in g["params"]}
        seen["start"] = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        return made

    monkeypatch.setattr(train, "make_optimizers", spied)
    words = words.replace("NEW", str(files / "new.txt")).split()
    output_of(train, monkeypatch, capsys, *words_of(files, "untied", "--rank", 4, *words, "--lr", "2e-3", "--steps", 1,
        "--out", tmp_path / "run"))  # fmt: skip
    found = {"rows": set(), "table": set()}
    for name, parameter in seen["model"].named_parameters():
        if not parameter.requires_grad:
            continue
        rate = 2e-3 * seen["factors"][id(parameter)]
        if ".trained_" in name:
            kind = name.rpartition("_")[2]
            found[kind].add(round(rate, 9))
            moved = (parameter.detach() - seen["start"][name]).abs()
            assert 0.9 * rate < moved.max() < 1.01 * rate, name
        else:
            assert math.isclose(rate, 8e-3 if name.endswith("lora_B") and "--lora-plus" in words else 2e-3)
    assert found == {"rows": {rows} - {None}, "table": {table} - {None}}


def test_a_run_goes_on_from_one_with_new_tokens_and_is_resumed(files, tmp_path, monkeypatch, capsys):
    file = Path(shutil.copy(files / "new.txt", tmp_path / "new.txt"))
    first = words_of(files, "tied", "--rank", 4, "--add-tokens", file, "--lr", "2e-3", "--steps", 4, "--save-every", 2,
        "--out", tmp_path / "first")  # fmt: skip
    output_of(train, monkeypatch, capsys, *first)
    wanted = load_file(tmp_path / "first/final/adapter_model.safetensors")
    for name in ("final", "best", "checkpoints/step-4"):
        shutil.rmtree(tmp_path / "first" / name, ignore_errors=True)
    file.unlink()
    output_of(train, monkeypatch, capsys, "--out", tmp_path / "first", "--resume")
    again = load_file(tmp_path / "first/final/adapter_model.safetensors")
    assert wanted.keys() == again.keys() and all(torch.equal(wanted[key], again[key]) for key in wanted)
    final = tmp_path / "first/final"
    words = words_of(files, "tied", "--adapter", final, "--lr", "1e-3", "--steps", 2, "--embedding-lr", "5e-4")
    output_of(train, monkeypatch, capsys, *words, "--out", tmp_path / "second")
    more = load_file(tmp_path / "second/final/adapter_model.safetensors")
    assert more.keys() == again.keys()
    rows = next(key for key in more if key.endswith("trainable_tokens_delta"))
    assert 1e-6 < (more[rows] - again[rows]).abs().max() < 1.1e-3
    assert load_tokenizer(tmp_path / "second/final").encode("<tool>") == load_tokenizer(final).encode("<tool>")
    assert len(load_tokenizer(final).encode("<tool>")) == 1
    for name in ("adapter_config.json",):
        mine, theirs = (json.loads((tmp_path / run / "final" / name).read_text()) for run in ("first", "second"))
        assert mine["trainable_token_indices"] == theirs["trainable_token_indices"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("words", [
    {"add_tokens": "NEW"}, {"add_tokens": "NEW", "modules_to_save": "embed_tokens"},
    {"train_tokens": "red,<|im_end|>"}, {"modules_to_save": "embed_tokens,lm_head"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("base", ["untied", "tied", "roomy"])
def test_off_is_the_model_of_step_0_to_the_bit(files, base, words, dtype):
    model = load_model(files / base, dtype)
    tokens = tokens_below(300)
    rows = model.config.vocab_size
    with torch.no_grad():
        plain = model(tokens)
    words = {key: value.replace("NEW", str(files / "new.txt")) for key, value in words.items()}
    settings = dict.fromkeys(("add_tokens", "train_tokens", "modules_to_save", "resume", "out", "adapter"))
    lora.add_lora(model, 4, 8.0)
    methods.add_asked_tables(model, SimpleNamespace(**(settings | words)))
    with torch.no_grad():
        start = model(tokens)
        known = load_tokenizer(files / base).vocab_size
        limit = 1e-5 if dtype == torch.float32 else 0.02
        assert relative(start[..., :known].float(), plain[..., :known].float()) < limit
        move(model)
        assert relative(model(tokens).float(), start.float()) > 1e-3
        with adapter_files.adapter_off(model):
            assert torch.equal(model(tokens), start)
        modules = adapter_files.remove_adapter(model)
        assert model.config.vocab_size == rows
        off = model(tokens)
        assert torch.equal(off, plain)
        adapter_files.put_back(model, modules)
        with adapter_files.adapter_off(model):
            assert torch.equal(model(tokens), start)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_tokenizer_that_is_larger_than_the_table(files, tmp_path, monkeypatch, capsys, method):
    """Some folders have a token for padding that the table has no row for. New tokens stand behind it."""
    folder = Path(shutil.copytree(files / "untied", tmp_path / "base"))
    spec = json.loads((folder / "tokenizer.json").read_text())
    rows = read_config(folder).vocab_size
    spec["added_tokens"].append({"id": rows, "content": "<pad>", "single_word": False, "lstrip": False,
                                 "rstrip": False, "normalized": False, "special": True})  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    words = ["--model", str(folder), *words_of(files, "untied")[2:], "--method", method, "--steps", "1"]
    output_of(train, monkeypatch, capsys, *words, "--out", tmp_path / "run", "--add-tokens", files / "new.txt",
        "--lr", "1e-6")  # fmt: skip
    plain = load_model(folder).embed.weight
    if method == "full":
        model = load_model(tmp_path / "run/final")
        row = model.embed.weight[rows]
    else:
        model = load_model(folder)
        methods.load_any_adapter(model, tmp_path / "run/final")
        row = model.embed(torch.tensor([rows]))[0]
    assert model.config.vocab_size == rows + 4
    assert relative(row, plain.mean(0)) < 1e-2


# ---- bad input ----


@pytest.fixture
def said_no(files, tmp_path, monkeypatch, capsys):
    """The line with which train.py refuses words; nothing is written."""

    def refused(*words, base: str = "untied") -> str:
        line = refusal_of(train, monkeypatch, capsys, *words_of(files, base, *words, "--out", tmp_path / "run",
            "--steps", 1))  # fmt: skip
        assert line.startswith("error: ") and not (tmp_path / "run").exists()
        return line

    return refused


@pytest.mark.parametrize("name, content, said", [
    ("new.txt", "<tool>\n<|im_end|>\n", "is a token already, id 2"),
    ("new.txt", "red\n", "is a token already"),
    ("new.txt", "a\n", "is a token already"),
    ("new.txt", "<tool>\nx y\n<tool>\n", "line 3: '<tool>' stands in line 1 already"),
    ("new.txt", "<tool>\n <b>\n", "line 2"),
    ("new.txt", "<tool>\n<b>\t\n", "line 2"),
    ("new.txt", "", "empty|no token"),
    ("new.txt", "\n  \n\n", "no token in it"),
    ("new.txt", None, "no such file"),
    ("new.json", '["<tool>"]', "text file"),
    ("new.csv", "<tool>", "text file"),
    ("new.txt", b"\xff\xfe<\x00", "UTF-8"),
])  # fmt: skip
def test_bad_files_of_new_tokens(said_no, tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    for method in ("lora", "full"):
        assert re.search(said, said_no("--method", method, "--add-tokens", tmp_path / name))


def test_a_folder_as_a_file_of_new_tokens(said_no, tmp_path):
    assert "--add-tokens" in said_no("--add-tokens", tmp_path)


@pytest.mark.parametrize("words, base, said", [
    ("--train-tokens nothing_like_it", "untied", "nothing_like_it' is no token"),
    ("--train-tokens red,red", "untied", "named twice"),
    ("--train-tokens red,,", "untied", "or is empty"),
    ("--modules-to-save norm", "untied", "norm is not supported"),
    ("--modules-to-save embed_tokens,", "untied", "--modules-to-save"),
    ("--modules-to-save wte", "untied", "it can name embed_tokens and lm_head"),
    ("--modules-to-save lm_head", "tied", "name embed_tokens, which trains both"),
    ("--add-tokens NEW --method vera", "untied", "--add-tokens"),
    ("--add-tokens NEW --method ia3", "untied", "--add-tokens"),
    ("--train-tokens red --method full", "untied", "--train-tokens"),
    ("--modules-to-save embed_tokens --method full", "untied", "--modules-to-save"),
    ("--embedding-lr 1e-3", "untied", "none is given"),
    ("--embedding-lr 1e-3 --method full --add-tokens NEW", "untied", "--embedding-lr"),
    ("--embedding-lr 0 --add-tokens NEW", "untied", "--embedding-lr"),
    ("--ewc 10 --add-tokens NEW", "untied", "--ewc"),
    ("--ewc 10 --train-tokens red", "untied", "--ewc"),
    ("--ewc 10 --modules-to-save lm_head", "untied", "--ewc"),
    ("--method full --train layers --add-tokens NEW", "untied", "leaves model.embed_tokens.weight out"),
    ("--method full --train embed_tokens --add-tokens NEW", "untied", "leaves lm_head.weight out"),
    ("--method qlora --quant nf4+head --add-tokens NEW", "untied", "4 bits"),
])  # fmt: skip
def test_bad_words(files, said_no, words, base, said):
    words = words.replace("NEW", str(files / "new.txt")).split()
    assert said in said_no(*words, base=base)


def test_new_tokens_beside_an_adapter_that_is_there(files, said_no, bases, tmp_path):
    model = load_model(files / "untied")
    lora.add_lora(model, 2, 4.0)
    lora.save_adapter(model, tmp_path / "adapter")
    for words in (["--add-tokens", files / "new.txt"], ["--train-tokens", "red"], ["--modules-to-save", "lm_head"]):
        assert "--adapter" in said_no("--adapter", tmp_path / "adapter", *words)


def test_nf4_with_the_head_takes_tokens_that_have_rows(files, tmp_path, monkeypatch, capsys):
    words = words_of(files, "roomy", "--method", "qlora", "--quant", "nf4+head", "--rank", 2, "--steps", 2)
    words += ["--add-tokens", str(files / "new.txt"), "--out", str(tmp_path / "run")]
    output_of(train, monkeypatch, capsys, *words)
    door = ["--model", files / "roomy", "--adapter", tmp_path / "run/final", "--data", files / "val.jsonl"]
    adapted = loss_in(output_of(evaluate, monkeypatch, capsys, "loss", *door, "--quant", "nf4+head", "--dtype", "fp32"))
    output_of(convert, monkeypatch, capsys, "merge", files / "roomy", tmp_path / "run/final", tmp_path / "merged",
        "--dtype", "fp32")  # fmt: skip
    merged = loss_in(output_of(evaluate, monkeypatch, capsys, "loss", "--model", tmp_path / "merged", "--data",
        files / "val.jsonl", "--dtype", "fp32"))  # fmt: skip
    assert math.isclose(adapted, merged, abs_tol=2e-4)


# ---- adapters from outside ----


def state_of(model) -> dict:
    return {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}


def refused_load(base: Path, folder: Path, trainable: bool) -> str:
    """The line with which a folder is refused, for a model that is left as it was."""
    model = load_model(base)
    if not trainable:
        model.requires_grad_(False)
    before, config = state_of(model), model.config
    with pytest.raises(UserError) as refusal:
        methods.load_any_adapter(model, folder)
    after = state_of(model)
    assert after.keys() == before.keys()
    assert model.config == config and model.config.vocab_size == ROWS
    assert {name: state[1] for name, state in after.items()} == {name: state[1] for name, state in before.items()}
    assert all(torch.equal(before[name][2], after[name][2]) for name in before)
    assert not adapter_files.has_adapter(model)
    line = str(refusal.value)
    assert "\n" not in line
    return line


ROWS_KEY, TABLE_KEY = "trainable_token_indices", "modules_to_save"


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("name, kind, change, said", [
    ("llama", "dict", {ROWS_KEY: {"embed_tokens": ["5"], "lm_head": [5]}}, ROWS_KEY),
    ("llama", "dict", {ROWS_KEY: ["red", "fox"]}, ROWS_KEY),
    ("llama", "dict", {ROWS_KEY: {"embed_tokens": [5, 5, 17], "lm_head": [5, 17, 42]}}, "each once"),
    ("llama", "dict", {ROWS_KEY: [-1, 4, 5]}, ROWS_KEY),
    ("llama", "dict", {ROWS_KEY: [1.5, 4, 5]}, ROWS_KEY),
    ("llama", "dict", {ROWS_KEY: [True, 4, 5]}, ROWS_KEY),
    ("llama", "dict", {ROWS_KEY: 5}, ROWS_KEY),
    ("llama", "dict", {ROWS_KEY: {"embed_tokens": {"5": 1}, "lm_head": [5, 17, 42]}}, ROWS_KEY),
    ("llama", "dict", {ROWS_KEY: [5, 17, 10**12]}, "10000000"),
    ("llama", "dict", {ROWS_KEY: [5, 17, ROWS + 999_999]}, "beyond"),
    ("llama", "dict", {ROWS_KEY: {"embed_tokens": [5, 17, 150], "lm_head": [5, 17, 150]}}, "beyond"),
    ("llama", "dict", {ROWS_KEY: {"q_proj": [5, 17, 42]}}, "q_proj"),
    ("llama", "dict", {ROWS_KEY: {"embed_tokens": [5, 17], "lm_head": [5, 17, 42]}}, "shape"),
    ("llama", "dict", {ROWS_KEY: {"embed_tokens": [5, 17, 42, ROWS], "lm_head": [5, 17, 42, ROWS]}}, "shape"),
    ("llama", "dict", {ROWS_KEY: {"embed_tokens": INSIDE, "model.embed_tokens": INSIDE, "lm_head": INSIDE}}, None),
    ("llama", "dict", {ROWS_KEY: None}, "trainable_tokens_delta"),
    ("llama", "dict", {ROWS_KEY: {"embed_tokens": INSIDE}}, "lm_head"),
    ("llama", "dict", {TABLE_KEY: ["norm"]}, "norm"),
    ("llama", "dict", {TABLE_KEY: ["input_layernorm"]}, "input_layernorm"),
    ("llama", "dict", {TABLE_KEY: "embed_tokens"}, TABLE_KEY),
    ("llama", "dict", {TABLE_KEY: [3]}, TABLE_KEY),
    ("llama", "dict", {TABLE_KEY: ["embed_tokens"]}, "embed_tokens"),
    ("llama, tied", "dict", {ROWS_KEY: {"lm_head": INSIDE}}, "unties"),
    ("llama, tied", "dict", {ROWS_KEY: {"embed_tokens": INSIDE, "lm_head": [5, 6, 7]}}, "unties"),
    ("llama, tied", "table", {"ensure_weight_tying": False, TABLE_KEY: ["lm_head"]}, None),
])  # fmt: skip
def test_descriptions_that_are_refused(bases, pefts, tmp_path, name, kind, change, said, trainable):
    folder = shutil.copytree(pefts(name, kind)[1], tmp_path / "adapter")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    if said is None:
        # One that may be read; if it is not, then in one line.
        model = load_model(bases(name))
        try:
            methods.load_any_adapter(model, folder)
        except UserError as refusal:
            assert "\n" not in str(refusal)
        return
    assert said in refused_load(bases(name), folder, trainable)


def stem(end: str) -> str:
    return f"base_model.model.{end}"


EMBED, HEAD, DELTA = "model.embed_tokens", "lm_head", ".token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize("name, kind, change, said", [
    # A head of its own on a base whose head is the table.
    ("llama, tied", "dict", lambda t: {stem(HEAD + DELTA): torch.randn(3, 32)}, "unties"),
    ("llama, tied", "table", lambda t: {stem(HEAD + ".weight"): t[stem(EMBED + ".weight")] + 1}, "unties"),
    ("llama, tied", "dict", lambda t: {stem(HEAD + ".weight"): torch.randn(ROWS, 32)}, "unties"),
    ("llama, tied", "table", lambda t: {stem(HEAD + ".weight"): torch.randn(MORE, 32)}, "unties"),
    # Tables of other sizes.
    ("llama", "table", lambda t: {stem(EMBED + ".weight"): torch.randn(ROWS - 5, 32)}, "shape"),
    ("llama", "table", lambda t: {stem(EMBED + ".weight"): torch.randn(MORE, 32)}, "shape"),
    ("llama", "table", lambda t: {stem(EMBED + ".weight"): torch.randn(ROWS, 16)}, "shape"),
    ("llama", "table", lambda t: {stem(EMBED + ".weight"): torch.randn(ROWS)}, "shape"),
    ("llama", "table", lambda t: {stem(EMBED + ".weight"): torch.tensor(1.0)}, "shape"),
    ("llama", "head", lambda t: {stem(HEAD + ".weight"): torch.randn(MORE, 32)}, "no row for"),
    # Numbers that are none.
    ("llama", "table", lambda t: {stem(EMBED + ".weight"): torch.full((ROWS, 32), math.nan)}, "NaN"),
    ("llama", "table", lambda t: {stem(EMBED + ".weight"): torch.zeros(ROWS, 32, dtype=torch.int64)}, "int64"),
    ("llama", "dict, beyond", lambda t: {stem(HEAD + DELTA): t[stem(HEAD + DELTA)] / 0}, "NaN"),
    # Rows that do not fit.
    ("llama", "dict", lambda t: {stem(EMBED + DELTA): torch.randn(2, 32)}, "shape"),
    ("llama", "dict", lambda t: {stem(EMBED + DELTA): torch.randn(3, 31)}, "shape"),
    ("llama", "dict", lambda t: {stem(EMBED + ".token_adapter.other"): torch.randn(3, 32)}, "not used"),
])  # fmt: skip
@pytest.mark.parametrize("trainable", [True, False])
def test_files_that_are_refused(bases, pefts, tmp_path, name, kind, change, said, trainable):
    folder = shutil.copytree(pefts(name, kind)[1], tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | change(tensors), file)
    assert said in refused_load(bases(name), folder, trainable)


def test_a_missing_tensor_is_named(bases, pefts, tmp_path):
    for kind, gone in (("dict", stem(HEAD + DELTA)), ("table", stem(HEAD + ".weight"))):
        folder = shutil.copytree(pefts("llama", kind)[1], tmp_path / kind)
        file = folder / "adapter_model.safetensors"
        save_file({key: t for key, t in load_file(file).items() if key != gone}, file)
        assert gone in refused_load(bases("llama"), folder, True)


# ---- what a second reader found ----


def test_a_run_replaces_the_one_that_holds_its_file(files, tmp_path, monkeypatch, capsys):
    words = words_of(files, "tied", "--steps", 2, "--overwrite", "--out", tmp_path / "run")
    output_of(train, monkeypatch, capsys, *words, "--add-tokens", files / "new.txt")
    kept = tmp_path / "run/added_tokens.txt"
    before = kept.read_text()
    output_of(train, monkeypatch, capsys, *words, "--add-tokens", kept)
    assert kept.read_text() == before and (tmp_path / "run/final/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", ["llama", "llama, tied"])
def test_a_resized_base_of_peft_with_rows_of_some_tokens(bases, pefts, tmp_path, name):
    """peft writes the whole table then, which says how many rows there are."""
    folder = Path(shutil.copytree(pefts(name, "dict, beyond")[1], tmp_path / "peft"))
    described = json.loads((folder / "adapter_config.json").read_text())
    ids = described["trainable_token_indices"]
    described["trainable_token_indices"] = {key: rows[:1] for key, rows in ids.items()}
    stored = load_file(folder / "adapter_model.safetensors")
    trained = [key for key in stored if key.endswith("trainable_tokens_delta")]
    whole = [key for key in stored if key.endswith("base_layer.weight") and "token_adapter" in key]
    assert whole, "the base was resized"
    for key in trained:
        stored[key] = stored[key][:1].clone()
    save_file(stored, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(described))
    config = read_config(bases(name))
    assert tables.vocabulary_size(config, folder) == MORE > config.vocab_size
    model = load_model(bases(name))
    methods.load_any_adapter(model, folder)
    assert model.config.vocab_size == MORE and torch.isfinite(model(tokens_below(MORE))).all()


@pytest.mark.parametrize("change, said", [
    (lambda stored: stored.update({"base_model.model.model.embed_tokens.weight": torch.tensor(1.0)}), "shape"),
    (lambda stored: stored.update({"base_model.model.model.embed_tokens.weight": torch.full((ROWS, 32), math.nan),
                                   "base_model.model.lm_head.weight": torch.full((ROWS, 32), math.nan)}), "NaN"),
    (lambda stored: stored.update({
        "base_model.model.model.embed_tokens.token_adapter.base_layer.weight": torch.zeros(ROWS, 32),
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.zeros(0, 32)}), "not used"),
])  # fmt: skip
def test_hostile_tables_end_in_one_line(bases, tmp_path, change, said):
    model = load_model(bases("llama, tied"))
    lora.add_lora(model, 2, 4.0)
    lora.save_adapter(model, tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter/adapter_model.safetensors")
    change(stored)
    save_file(stored, tmp_path / "adapter/adapter_model.safetensors")
    assert tables.vocabulary_size(read_config(bases("llama, tied")), tmp_path / "adapter") == ROWS
    assert said in refused_load(bases("llama, tied"), tmp_path / "adapter", True)


def test_a_table_that_is_named_twice_is_refused(bases, pefts, tmp_path):
    folder = Path(shutil.copytree(pefts("llama", "dict")[1], tmp_path / "adapter"))
    file = folder / "adapter_config.json"
    described = json.loads(file.read_text())
    described["trainable_token_indices"]["model.embed_tokens"] = [1]
    file.write_text(json.dumps(described))
    assert "twice" in refused_load(bases("llama"), folder, True)


@pytest.mark.parametrize(
    "words, said",
    [
        (["--train-tokens", " the"], "white space"),
        (["--train-tokens", ""], "is empty"),
        (["--add-tokens", ""], "is empty"),
        (["--modules-to-save", "embed_tokens,"], "is empty"),
    ],
)
def test_what_is_not_quite_said_is_refused(files, said_no, words, said):
    assert said in said_no(*words, base="tied")


def test_options_that_the_adapter_at_hand_can_t_follow(files, tmp_path, monkeypatch, capsys):
    words = words_of(files, "tied", "--steps", 2)
    output_of(train, monkeypatch, capsys, *words, "--out", tmp_path / "plain")
    output_of(train, monkeypatch, capsys, *words, "--train-tokens", "red", "--out", tmp_path / "rows")
    for adapter, more, said in (("plain", ["--embedding-lr", "1e-4"], "no trained embeddings"),
                                ("rows", ["--ewc", "1"], "trained embeddings")):  # fmt: skip
        more += ["--adapter", tmp_path / adapter / "final", "--out", tmp_path / "more"]
        assert said in refusal_of(train, monkeypatch, capsys, *words, *more)


def test_the_plan_counts_new_rows(files, tmp_path, monkeypatch, capsys):
    (tmp_path / "many.txt").write_text("".join(f"<t{i}>\n" for i in range(20_000)))
    peaks = []
    for more in ([], ["--add-tokens", tmp_path / "many.txt"]):
        adapter = {"add_tokens": more[1] if more else None}
        model = meta_model(read_config(files / "tied"), Recipe("lora"), torch.float32, adapter)
        peaks.append(expected_memory(model, Recipe("lora"), [64], 10, "cpu", 1).peak)
    width = read_config(files / "tied").hidden_size
    assert peaks[1] - peaks[0] >= 20_000 * width * 16


def test_the_head_that_is_trained_is_packed_for_decoding(files):
    model = load_model(files / "tied", torch.bfloat16)
    lora.add_lora(model, 2, 4.0)
    tables.add_tables(model, {}, {"embed"})
    tables.trained_tables(model)["embed"].start()
    with torch.inference_mode(), packed_weights(model.eval(), steps=1000):
        assert is_packed(model) or not can_pack(model.embed.base.weight, 0)
