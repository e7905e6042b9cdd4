"""checkpoint.py: exact round trips with transformers on the other side, and clear refusals."""

import json

import pytest
import torch
import transformers
from helpers import llama
from safetensors.torch import load_file, save_file

import checkpoint
from checkpoint import load_model, new_folder, save_model
from errors import UserError

TOKENS = torch.arange(40).view(2, 20)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_is_exact(tmp_path, tied, dtype):
    llama(tmp_path / "a", dtype=dtype, tie_word_embeddings=tied)
    save_model(load_model(tmp_path / "a", dtype), tmp_path / "b")
    before, after = load_file(tmp_path / "a" / "model.safetensors"), load_file(tmp_path / "b" / "model.safetensors")
    assert before.keys() == after.keys() and ("lm_head.weight" in after) != tied
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    theirs, back = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / side) for side in "ab")
    with torch.no_grad():
        assert back.dtype == dtype and torch.equal(back(TOKENS).logits, theirs(TOKENS).logits)


def test_shards_of_either_side_load_on_the_other(tmp_path, monkeypatch):
    theirs = llama(tmp_path / "a")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(checkpoint.weight_files(tmp_path / "shards")) > 1
    model = load_model(tmp_path / "shards")
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 50_000)
    save_model(model, tmp_path / "ours")
    assert len(checkpoint.weight_files(tmp_path / "ours")) > 1
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    with torch.no_grad():
        assert torch.equal(back(TOKENS).logits, theirs(TOKENS).logits)


def test_tokenizer_files_are_carried_over_byte_for_byte(tmp_path):
    llama(tmp_path / "a")
    files = {
        "tokenizer.json": b"{ }",
        "chat_template.jinja": b"{{ x }}\r\n",
        "generation_config.json": b'{"eos_token_id": [1, 2]}',
    }
    for name, content in files.items():
        (tmp_path / "a" / name).write_bytes(content)
    save_model(load_model(tmp_path / "a"), tmp_path / "b")
    assert all((tmp_path / "b" / name).read_bytes() == content for name, content in files.items())


@pytest.mark.parametrize("first", [True, False])  # of the file: lm_head stands before or after the embedding
def test_a_stored_copy_of_a_tied_head_must_be_equal(tmp_path, first):
    llama(tmp_path, tie_word_embeddings=True)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    name = "model.embed_tokens.weight"
    if not first:
        weights["model.embed_tokens.weight"] = weights.pop(name)
    save_file(weights | {"lm_head.weight": weights[name].clone()}, file)
    load_model(tmp_path)
    save_file(weights | {"lm_head.weight": weights[name] + 1}, file)
    with pytest.raises(UserError, match=r"lm_head\.weight differs"):
        load_model(tmp_path)


def test_a_folder_is_whole_or_absent(tmp_path):
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "a") as aside:
        (aside / "x").write_text("half")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    for content in ("old", "new"):
        with new_folder(tmp_path / "a", replace=True) as aside:
            (aside / "x").write_text(content)
    assert [(tmp_path / "a" / "x").read_text()] == ["new"] and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(FileExistsError), new_folder(tmp_path / "a") as aside:
        (aside / "x").write_text("third")
    assert (tmp_path / "a" / "x").read_text() == "new" and len(list(tmp_path.iterdir())) == 1


def edit_config(folder, **changes):
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value != "gone"}))


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


NORM = "model.layers.1.input_layernorm.weight"
BROKEN = {
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "list"),
    "config is cut": (lambda f: (f / "config.json").write_text('{"model_type": "lla'), "not JSON"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "unknown family": (lambda f: edit_config(f, model_type="zebra"), "'zebra'"),
    "no hidden size": (lambda f: edit_config(f, hidden_size="gone"), "hidden_size is missing"),
    "hidden size a string": (lambda f: edit_config(f, hidden_size="64"), "hidden_size is '64'"),
    "hidden size negative": (lambda f: edit_config(f, hidden_size=-64), "hidden_size is -64"),
    "no heads": (lambda f: edit_config(f, num_attention_heads=0), "num_attention_heads is 0"),
    "heads and groups": (lambda f: edit_config(f, num_key_value_heads=3), "do not divide"),
    "unknown rope": (lambda f: edit_config(f, rope_parameters={"rope_type": "zigzag", "rope_theta": 1.0}), "zigzag"),
    "a million layers": (lambda f: edit_config(f, num_hidden_layers=10**8), "num_hidden_layers"),
    "cut weights": (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]), "damaged"),
    "alien weights": (lambda f: (f / "model.safetensors").write_bytes(b"hello" * 9), "damaged"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "pickled weights": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickles"),
    "missing tensor": (lambda f: edit_weights(f, lambda w: w.pop(NORM)), f"missing: {NORM}"),
    "extra tensor": (lambda f: edit_weights(f, lambda w: w.update(zebra=w[NORM].clone())), "zebra"),
    "wrong shape": (lambda f: edit_weights(f, lambda w: w.update({NORM: w[NORM][:9].clone()})), "[9]"),
    "integers": (lambda f: edit_weights(f, lambda w: w.update({NORM: w[NORM].int()})), "int32"),
    "path trick": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}'), "beside it"),
    "missing shard": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x.safetensors"}}'), "x.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_refused_in_one_line(tmp_path, case):
    llama(tmp_path)
    damage, said = BROKEN[case]
    damage(tmp_path)
    with pytest.raises(UserError) as error:
        load_model(tmp_path)
    assert said in str(error.value) and "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match="no such model folder"):
        load_model(tmp_path / "nowhere")
