"""The way out: types, adapters, merged folders, refusals, and that a file is whole or absent. Oracles: the gguf
package's reader and quantiser, peft, and the arithmetic written out."""

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import gguf
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.gguf_files import LLAMA3, TEMPLATE, checkpoint, refusal, tokens
from support.helpers import command, relative

import adapter_files
import checkpoint as ours
import convert
import lora
from interop import gguf_export as gguf_out
from interop.resolve import model_folder
from tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
HEADS = {"q_proj": 4, "k_proj": 2}


def turned(rows, heads):
    """Rows of q or k, [heads * d, ...]: dimension i of a head to place 2i, i + d/2 to 2i + 1."""
    d = len(rows) // heads
    order = [h * d + i + half * d // 2 for h in range(heads) for i in range(d // 2) for half in (0, 1)]
    return rows[order]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    checkpoint(folder, "llama", {"num_hidden_layers": 2})
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """An adapter of peft's on the base, and peft's logits with it. Its folder brings another template."""
    folder = tmp_path_factory.mktemp("adapter")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    torch.manual_seed(1)
    settings = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"])
    model = peft.get_peft_model(model, settings)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.2)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((base / name).read_bytes())
    (folder / "chat_template.jinja").write_text("trained with: {{ messages[0]['content'] }}")
    with torch.no_grad():
        return folder, model.eval()(tokens()).logits[0]


def contents(file):
    """{name: (type, array)} of a file's tensors, by the gguf package."""
    return {tensor.name: (tensor.tensor_type.name, tensor.data) for tensor in gguf.GGUFReader(file).tensors}


def field(file, key):
    return gguf.GGUFReader(file).fields[key].contents()


# ---- types ----


@pytest.mark.parametrize("kind", [*gguf_out.TYPES])
def test_matrices_are_what_the_gguf_package_makes_of_them_and_vectors_stay_float32(kind, base, tmp_path):
    convert.folder_to_gguf(base, tmp_path / "x.gguf", kind)
    convert.gguf_to_folder(tmp_path / "x.gguf", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    found, seen = contents(tmp_path / "x.gguf"), set()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    logits = "lm_head" if "lm_head.weight" in back else "model.embed_tokens"
    for name, weight in load_file(base / "model.safetensors").items():
        weight, module = weight.numpy(), name.removesuffix(".weight")
        heads = HEADS.get(module.rpartition(".")[2])
        if heads:
            weight = turned(weight, heads)
        is_small = kind[0] == "q" and kind != "q8_0"
        matrix_type = "Q8_0" if is_small and module == logits else kind.upper()
        expected_type = gguf.GGMLQuantizationType[matrix_type if weight.ndim > 1 else "F32"]
        found_type, data = found[f"{names.get_name(module)}.weight"]
        assert found_type == expected_type.name
        expected = gguf.quantize(weight, expected_type)
        assert data.tobytes() == expected.tobytes()
        # The way back gives what the package dequantises, to the bit.
        restored = back[name].float().numpy()
        assert np.array_equal(turned(restored, heads) if heads else restored, gguf.dequantize(expected, expected_type))
        seen.add(f"{names.get_name(module)}.weight")
    assert seen == found.keys()
    assert (
        field(tmp_path / "x.gguf", "general.file_type")
        == gguf.LlamaFileType[{"f32": "ALL_F32"}.get(kind, f"MOSTLY_{kind.upper()}")]
    )


def test_more_bits_give_weights_that_are_nearer(base, tmp_path):
    """Errors of normally distributed weights, as shares of their length: a bit more halves them, about."""
    reference = load_file(base / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    errors = {}
    for kind in gguf_out.TYPES:
        convert.folder_to_gguf(base, tmp_path / f"{kind}.gguf", kind, log=lambda line: None)
        convert.gguf_to_folder(tmp_path / f"{kind}.gguf", tmp_path / kind)
        found = load_file(tmp_path / kind / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
        errors[kind] = relative(found.float(), reference)
    expected = {"q4_0": 0.092, "q4_1": 0.077, "q5_0": 0.046, "q5_1": 0.037, "q8_0": 0.0058, "bf16": 0.0017, "f16": 2e-4}
    assert errors.pop("f32") == 0
    assert errors == pytest.approx(expected, rel=0.25)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "most"),
    [("q8_0", 0.01), ("q5_1", 0.2), ("q5_0", 0.2), ("q4_1", 1e-6), ("q4_0", 0.6)],
)
def test_the_default_base_loses_no_more_than_docs_say(kind, most, tmp_path):
    """Kullback-Leibler divergence from the predictions before, in nats a token. The default base is a Q4_1 copy
    itself, which comes back as it was; the other types' figures stand in docs/files.md."""
    folder = model_folder(None)
    ids = load_tokenizer(folder).encode((ROOT / "assets/general.txt").read_text(encoding="utf-8"))
    ids = torch.tensor([ids[:256]])
    convert.folder_to_gguf(folder, tmp_path / "x.gguf", kind, log=lambda line: None)
    convert.gguf_to_folder(tmp_path / "x.gguf", tmp_path / "back")
    with torch.no_grad():
        before, after = (ours.load_model(each)(ids)[0].log_softmax(-1) for each in (folder, tmp_path / "back"))
    divergence = float((before.exp() * (before - after)).sum(-1).mean())
    assert most / 50 < divergence < most or kind == "q4_1" and abs(divergence) < most


def test_bf16_comes_back_bit_for_bit_and_so_do_gemmas_norms(tmp_path):
    checkpoint(tmp_path / "hf", "gemma2", {"head_dim": 24, "query_pre_attn_scalar": 24}, dtype=torch.bfloat16)
    convert.folder_to_gguf(tmp_path / "hf", tmp_path / "x.gguf", "bf16")
    convert.gguf_to_folder(tmp_path / "x.gguf", tmp_path / "back")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    for name, weight in before.items():
        assert torch.equal(after[name].bfloat16(), weight)
        small = weight.float().abs() < 2**-16  # beside 1, float32 has no more bits for these
        assert torch.equal(torch.where(small, 0, after[name].float()), torch.where(small, 0, weight.float()))


def test_rows_that_are_no_whole_blocks_are_f16_and_that_is_said(tmp_path):
    checkpoint(tmp_path / "hf", "llama", {"intermediate_size": 72, "num_hidden_layers": 1})
    notes = []
    convert.folder_to_gguf(tmp_path / "hf", tmp_path / "x.gguf", "q8_0", log=notes.append)
    found = contents(tmp_path / "x.gguf")
    assert [name for name, (kind, _) in found.items() if kind == "F16"] == ["blk.0.ffn_down.weight"]
    assert found["blk.0.ffn_up.weight"][0] == "Q8_0"
    (note,) = notes
    assert "blk.0.ffn_down.weight is stored in f16" in note and "72" in note


def test_shards_and_bare_names_are_read_as_load_model_reads_them(tmp_path, monkeypatch):
    checkpoint(tmp_path / "hf", "gpt2", {"n_layer": 2})
    convert.folder_to_gguf(tmp_path / "hf", tmp_path / "one.gguf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    bare = {name.removeprefix("transformer."): weight.clone() for name, weight in weights.items()}
    save_file(bare | {"h.0.attn.bias": torch.ones(1, 1, 4, 4)}, tmp_path / "hf" / "model.safetensors")
    convert.folder_to_gguf(tmp_path / "hf", tmp_path / "bare.gguf")
    model = ours.load_model(tmp_path / "hf")
    monkeypatch.setattr(ours, "SHARD_BYTES", 100_000)
    ours.save_model(model, tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    convert.folder_to_gguf(tmp_path / "many", tmp_path / "many.gguf")
    one, bare, many = (contents(tmp_path / f"{name}.gguf") for name in ("one", "bare", "many"))
    for name, (kind, data) in one.items():
        assert kind == bare[name][0] == many[name][0]
        assert data.tobytes() == bare[name][1].tobytes() == many[name][1].tobytes()


# ---- adapters ----


def test_an_adapter_is_merged_as_lora_merge_does_it(base, adapter, tmp_path):
    convert.folder_to_gguf(base, tmp_path / "x.gguf", "f32", adapter=adapter[0])
    model = ours.load_model(base)
    lora.load_adapter(model, adapter[0])
    lora.merge(model)
    adapter_files.remove_adapter(model)
    ours.save_model(model, tmp_path / "merged")
    convert.folder_to_gguf(tmp_path / "merged", tmp_path / "y.gguf", "f32")
    direct, by_folder = contents(tmp_path / "x.gguf"), contents(tmp_path / "y.gguf")
    assert direct.keys() == by_folder.keys()
    assert all(direct[name][1].tobytes() == by_folder[name][1].tobytes() for name in direct)
    assert direct["blk.0.attn_q.weight"][1].tobytes() != contents_of(base, tmp_path)["blk.0.attn_q.weight"][1].tobytes()
    assert field(tmp_path / "x.gguf", "tokenizer.chat_template").startswith("trained with: ")
    assert field(tmp_path / "y.gguf", "tokenizer.chat_template") == TEMPLATE


def contents_of(folder, tmp_path):
    convert.folder_to_gguf(folder, tmp_path / "plain.gguf")
    return contents(tmp_path / "plain.gguf")


def test_a_lora_file_adds_to_the_bases_file_what_merging_adds(base, adapter, tmp_path):
    convert.adapter_to_gguf(adapter[0], tmp_path / "lora.gguf", base)
    convert.folder_to_gguf(base, tmp_path / "merged.gguf", adapter=adapter[0])
    plain, merged, factors = contents_of(base, tmp_path), contents(tmp_path / "merged.gguf"), tmp_path / "lora.gguf"
    keys = {key: field(factors, key) for key in ("general.type", "adapter.type", "general.architecture")}
    assert keys == {"general.type": "adapter", "adapter.type": "lora", "general.architecture": "llama"}
    scale, factors = field(factors, "adapter.lora.alpha") / 4, contents(factors)
    assert scale == 3 and len(factors) == 2 * 2 * 4  # two factors of four matrices in two layers
    for name, (_, weight) in plain.items():
        if f"{name}.lora_a" in factors:
            (a_kind, a), (b_kind, b) = factors[f"{name}.lora_a"], factors[f"{name}.lora_b"]
            assert a_kind == b_kind == "F32" and len(a) == 4 == b.shape[1]
            np.testing.assert_allclose(merged[name][1], weight + scale * b @ a, rtol=1e-5, atol=1e-6)
        else:
            assert merged[name][1].tobytes() == weight.tobytes()


@pytest.mark.parametrize("family", ["gpt2", "phi3", "gemma2"])
def test_fused_and_transposed_matrices_take_their_adapter(family, tmp_path):
    changes = {"gemma2": {"head_dim": 24, "query_pre_attn_scalar": 24}}.get(family, {})
    checkpoint(tmp_path / "hf", family, changes)
    model = ours.load_model(tmp_path / "hf")
    torch.manual_seed(0)
    lora.add_lora(model, 2, 6)
    for layer in lora.lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.2)
    lora.save_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        expected = model(tokens())[0]
    convert.folder_to_gguf(tmp_path / "hf", tmp_path / "x.gguf", adapter=tmp_path / "adapter")
    convert.gguf_to_folder(tmp_path / "x.gguf", tmp_path / "back")
    with torch.no_grad():
        assert relative(ours.load_model(tmp_path / "back")(tokens())[0], expected) < 1e-5
    convert.adapter_to_gguf(tmp_path / "adapter", tmp_path / "lora.gguf", tmp_path / "hf")
    convert.folder_to_gguf(tmp_path / "hf", tmp_path / "plain.gguf")
    plain, merged, factors = (contents(tmp_path / f"{name}.gguf") for name in ("plain", "x", "lora"))
    adapted = {name.rpartition(".")[0] for name in factors}
    assert len(adapted) == len(lora.lora_layers(model))
    for name in adapted:
        update = 3 * factors[f"{name}.lora_b"][1] @ factors[f"{name}.lora_a"][1]
        np.testing.assert_allclose(merged[name][1], plain[name][1] + update, rtol=1e-5, atol=1e-6)


def test_an_adapter_on_experts_is_refused_by_name(tmp_path):
    checkpoint(tmp_path / "hf", "mixtral", {"num_local_experts": 2, "num_hidden_layers": 1})
    model = ours.load_model(tmp_path / "hf")
    lora.add_lora(model, 2, 6)
    lora.save_adapter(model, tmp_path / "adapter")
    answer = refusal(convert.adapter_to_gguf, tmp_path / "adapter", tmp_path / "x.gguf", tmp_path / "hf")
    assert "model.layers.0.block_sparse_moe.experts.0.w1, one of many experts" in answer
    convert.folder_to_gguf(tmp_path / "hf", tmp_path / "x.gguf", adapter=tmp_path / "adapter")  # merged it may be


def test_an_adapter_that_does_not_fit_is_refused(base, adapter, tmp_path):
    checkpoint(tmp_path / "hf", "llama", {"num_hidden_layers": 1})
    for call in (
        lambda: convert.folder_to_gguf(tmp_path / "hf", tmp_path / "x.gguf", adapter=adapter[0]),
        lambda: convert.adapter_to_gguf(adapter[0], tmp_path / "x.gguf", tmp_path / "hf"),
        lambda: convert.merge_folder(tmp_path / "hf", adapter[0], tmp_path / "merged"),
    ):
        assert "not used by its configuration" in refusal(call)
    assert "no such folder" in refusal(convert.adapter_to_gguf, tmp_path / "no", tmp_path / "x.gguf", base)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


# ---- merged folders ----

UNKNOWN_NUMBERS = (
    "does not say which numbers of its base it was trained on; if those of 4 bits (QLoRA), add it to them with"
    " --quant nf4"
)


def test_a_merged_folder_has_pefts_logits_in_transformers(base, adapter, tmp_path, monkeypatch, capsys):
    (base / "generation_config.json").write_text('{"eos_token_id": [1, 299]}')
    out, err, code = command(convert, monkeypatch, capsys, "merge", base, adapter[0], tmp_path / "merged")
    said = f"merged    {adapter[0]} into {tmp_path / 'merged'}, float32: rounding lost "
    note, check, merged, wrote, following = out.splitlines()
    assert wrote.startswith(f"wrote     {tmp_path / 'merged'}: ") and following.startswith(
        "next      python generate.py "
    )
    assert (err, code) == ("", 0) and merged.startswith(said) and float(merged.split()[-5]) < 1e-3
    assert note == f"NOTE: {adapter[0]} {UNKNOWN_NUMBERS}" and check.endswith("(+0.0000), on 16 examples")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    with torch.no_grad():
        assert relative(model(tokens()).logits[0], adapter[1]) < 1e-5
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes()
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template.startswith("trained with")
    assert "exists already" in refusal(convert.merge_folder, base, adapter[0], tmp_path / "merged")


def test_merging_rounds_once_to_the_dtype_that_is_asked_for(base, adapter, tmp_path, monkeypatch, capsys):
    convert.merge_folder(base, adapter[0], tmp_path / "exact")
    words = ("merge", base, adapter[0], tmp_path / "half", "--dtype", "bf16")
    out, _, _ = command(convert, monkeypatch, capsys, *words)
    merged = out.splitlines()[-3]  # before what was written, and what is tried next
    assert 0.1 < float(merged.split()[-5]) < 50  # per cent of the update that bf16 has no room for
    exact, half = (load_file(tmp_path / name / "model.safetensors") for name in ("exact", "half"))
    assert all(torch.equal(weight.bfloat16(), half[name]) for name, weight in exact.items())
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


# ---- what has no place in a file ----

REFUSED = {
    "a family of another activation": ("gpt_neox", {}, "gpt_neox can't be exported: llama.cpp computes GELU"),
    "dynamic rope": ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "no rope scaling 'dynamic'"),
    "Llama 3's rope of another length": (
        "llama",
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64}},
        "rope_freqs.weight is not Llama 3's scaling of 8192 positions",
    ),
    "YaRN by another ramp": (
        "llama",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0}},
        "llama.cpp computes YaRN with beta_fast 32",
    ),
    "Qwen's windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
        "as qwen2, a GGUF file can't say layers[2].window 9; it would be read as None",
    ),
    "Qwen 3 with biases": ("qwen3", {"attention_bias": True, "head_dim": 16}, "can't say qkv_bias True"),
    "experts whose weights do not sum to one": (
        "qwen3_moe",
        {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32, "norm_topk_prob": False},
        "can't say experts.normalised False",
    ),
    "layers without experts": (
        "qwen3_moe",
        {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32, "norm_topk_prob": True}
        | {"mlp_only_layers": [0]},
        "can't say layers[0].routed False",
    ),
    "a divisor of Gemma's scores": (
        "gemma2",
        {"head_dim": 24, "query_pre_attn_scalar": 40},
        "can't say layers[0].scale",
    ),
    "a Gemma without soft-cap": (
        "gemma2",
        {"head_dim": 24, "query_pre_attn_scalar": 24, "attn_logit_softcapping": None},
        "can't say attention_softcap None; it would be read as 50.0",
    ),
    "other layers without rope": ("smollm3", {"no_rope_layer_interval": 2}, "can't say layers[1].rope None"),
    "another activation": ("llama", {"hidden_act": "gelu"}, "can't say activation 'gelu'"),
    "GPT-2's scores by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "can't say layers[1].scale"),
}


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_a_file_can_not_say_is_refused_by_name(family, changes, message, tmp_path):
    checkpoint(tmp_path / "hf", family, changes)
    assert message in refusal(convert.folder_to_gguf, tmp_path / "hf", tmp_path / "x.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def put(name, value):
    def change(weights):
        weights[name][3] = value

    return change


NORM, UP = "model.layers.1.post_attention_layernorm.weight", "model.layers.1.mlp.up_proj.weight"
DAMAGED = {
    "no number": (put(NORM, torch.nan), "f32", f"{NORM} holds NaN"),
    "too large for f16": (put(UP, 70_000.0), "f16", f"{UP} holds weights too large for F16; take --type bf16"),
    "too large for q8_0": (put(UP, 1e7), "q8_0", f"{UP} holds weights too large for Q8_0"),
    "too large for q5_1": (put(UP, 70_000.0), "q5_1", f"{UP} holds weights too large for Q5_1; take --type bf16"),
    "too large for q5_0": (put(UP, 1.1e6), "q5_0", f"{UP} holds weights too large for Q5_0"),
    "too large for q4_1": (put(UP, -70_000.0), "q4_1", f"{UP} holds weights too large for Q4_1"),
    "too large for q4_0": (put(UP, -6e5), "q4_0", f"{UP} holds weights too large for Q4_0"),
    "missing": (lambda weights: weights.pop(UP), "f32", f"tensors missing: {UP}"),
    "one too many": (lambda weights: weights.update(x=torch.ones(2)), "f32", "tensors not part of the model"),
    "another shape": (lambda weights: weights.update({UP: torch.ones(2, 2)}), "f32", f"{UP} has shape [2, 2]"),
    "integers": (lambda weights: weights.update({UP: weights[UP].int()}), "f32", f"{UP} holds I32"),
}


@pytest.mark.parametrize(("change", "kind", "message"), DAMAGED.values(), ids=DAMAGED)
def test_weights_that_can_not_be_written_are_refused_by_name_and_leave_nothing(change, kind, message, base, tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert message in refusal(convert.folder_to_gguf, folder, tmp_path / "x.gguf", kind)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_stored_copy_of_a_tied_head_must_be_equal_as_load_model_demands(tmp_path):
    folder, file = tmp_path / "hf", tmp_path / "x.gguf"
    checkpoint(folder, "llama", {"tie_word_embeddings": True})
    weights = load_file(folder / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    differs = "config.json ties the output head to the embedding, but lm_head.weight differs"
    for head, fine in ((embedding + 1, False), (embedding.clone(), True)):
        save_file(weights | {"lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
        if fine:
            convert.folder_to_gguf(folder, file)
            found = contents(file)
            assert "output.weight" not in found and (found["token_embd.weight"][1] == embedding.numpy()).all()
        else:
            with pytest.raises(convert.UserError, match=differs):
                ours.load_model(folder)
            assert differs in refusal(convert.folder_to_gguf, folder, file)
            assert not file.exists()


def test_paths_that_can_not_be_written_to_are_told(base, adapter, tmp_path):
    (tmp_path / "mine").write_text("mine")
    assert "exists already" in refusal(convert.folder_to_gguf, base, tmp_path / "mine")
    assert "exists already" in refusal(convert.adapter_to_gguf, adapter[0], tmp_path / "mine", base)
    assert (tmp_path / "mine").read_text() == "mine"
    with pytest.raises(FileNotFoundError) as caught:
        convert.folder_to_gguf(base, tmp_path / "no" / "x.gguf")
    assert caught.value.filename == str(tmp_path / "no")
    assert "--type q4_k" in refusal(convert.folder_to_gguf, base, tmp_path / "x.gguf", "q4_k")
    assert "no such model folder" in refusal(convert.folder_to_gguf, tmp_path / "no", tmp_path / "x.gguf")


# ---- whole or absent, and small in memory ----


def test_killed_or_full_in_the_middle_nothing_is_left(base, tmp_path, monkeypatch):
    calls = []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) > 5:
            raise OSError(28, "No space left on device")
        return encode_tensor(*arguments)

    encode_tensor = gguf_out.encode_tensor
    monkeypatch.setattr(gguf_out, "encode_tensor", full)
    with pytest.raises(OSError):
        convert.folder_to_gguf(base, tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(gguf_out, "encode_tensor", lambda *arguments: os._exit(9))
    process = multiprocessing.get_context("fork").Process(
        target=convert.folder_to_gguf, args=(base, tmp_path / "x.gguf")
    )
    process.start()
    process.join(30)
    assert process.exitcode == 9 and not (tmp_path / "x.gguf").exists()
    monkeypatch.setattr(gguf_out, "encode_tensor", encode_tensor)
    convert.folder_to_gguf(base, tmp_path / "x.gguf")
    assert contents(tmp_path / "x.gguf")


def test_of_two_that_write_one_file_the_first_is_kept_and_the_second_told(base, tmp_path, monkeypatch):
    file = tmp_path / "x.gguf"
    encode_tensor = gguf_out.encode_tensor

    def slow(*arguments):
        # Another export into the same file begins and ends while this one is under way.
        monkeypatch.setattr(gguf_out, "encode_tensor", encode_tensor)
        convert.folder_to_gguf(base, file, "q8_0")
        return encode_tensor(*arguments)

    monkeypatch.setattr(gguf_out, "encode_tensor", slow)
    message = refusal(convert.folder_to_gguf, base, file, "f16")
    assert message == f"{file}: was written by another process meanwhile; this one's file is not kept"
    assert field(file, "general.file_type") == gguf.LlamaFileType.MOSTLY_Q8_0
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


def test_a_sum_that_is_too_large_is_named_as_the_adapters(base, adapter, tmp_path):
    """Base and adapter hold numbers, and their sum is none: it is not the base's fault."""
    folder = tmp_path / "adapter"
    shutil.copytree(adapter[0], folder)
    weights = load_file(folder / "adapter_model.safetensors")
    weights = {name: torch.full_like(weight, 1e19) for name, weight in weights.items()}
    save_file(weights, folder / "adapter_model.safetensors")
    message = refusal(convert.folder_to_gguf, base, tmp_path / "x.gguf", "f32", folder)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert message == f"{folder}: {name}, with the adapter's update, holds weights too large for float32"
    assert not (tmp_path / "x.gguf").exists()
    weights = {name: torch.full_like(weight, 1e3) for name, weight in weights.items()}
    save_file(weights, folder / "adapter_model.safetensors")
    message = refusal(convert.folder_to_gguf, base, tmp_path / "x.gguf", "f16", folder)
    assert message.startswith(f"{folder}: {name}, with the adapter's update, holds weights too large for F16; take")


def test_the_date_of_the_training_goes_into_the_file_and_comes_back(base, adapter, tmp_path):
    folder = shutil.copytree(adapter[0], tmp_path / "adapter")
    (folder / "plaintune.json").write_text(json.dumps({"date": "2026-03-01", "quant": None}))
    notes = []
    convert.folder_to_gguf(base, tmp_path / "x.gguf", "f16", folder, log=notes.append)
    convert.gguf_to_folder(tmp_path / "x.gguf", tmp_path / "back")
    gguf_out.adapter_to_gguf(folder, tmp_path / "lora.gguf", base, log=notes.append)
    assert json.loads((tmp_path / "back/plaintune.json").read_text()) == {"date": "2026-03-01"}
    assert {field(tmp_path / name, "plaintune.date") for name in ("x.gguf", "lora.gguf")} == {"2026-03-01"}
    assert [note.partition(",")[0] for note in notes] == ["NOTE: the chat template writes a date"] * 2
    convert.folder_to_gguf(base, tmp_path / "y.gguf", "f16", log=notes.append)
    assert "plaintune.date" not in gguf.GGUFReader(tmp_path / "y.gguf").fields and len(notes) == 2


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux")
@pytest.mark.parametrize("kind", ["q8_0", "q5_1"])
def test_exporting_takes_the_memory_of_a_tensor_not_of_the_model(kind, tmp_path):
    checkpoint(tmp_path / "hf", "llama", {"intermediate_size": 20_000, "num_hidden_layers": 16})
    size = (tmp_path / "hf" / "model.safetensors").stat().st_size
    assert size > 240e6  # 48 matrices of 5 MB
    script = f"""
        import re, sys
        sys.path.insert(0, {str(ROOT)!r})
        import convert, gguf
        def anonymous():  # what is not a page of a file
            return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
        peak = 0
        def watched(function):
            def call(*arguments):
                global peak
                result = function(*arguments)
                peak = max(peak, anonymous())
                return result
            return call
        from interop import gguf_export as gguf_out
        gguf_out.encode_tensor = watched(gguf_out.encode_tensor)
        before = anonymous()
        convert.folder_to_gguf({str(tmp_path / "hf")!r}, {str(tmp_path / "x.gguf")!r}, {kind!r})
        print(peak - before)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert 0 < int(run.stdout) < 80e6


# ---- the command line ----


def test_the_command_exports_and_says_what_differs(base, adapter, tmp_path, monkeypatch, capsys):
    words = ("to-gguf", base, tmp_path / "x.gguf", "--adapter", adapter[0], "--type", "q8_0")
    out, err, code = command(convert, monkeypatch, capsys, *words)
    assert (err, code) == (f"NOTE: {adapter[0]} {UNKNOWN_NUMBERS}\n", 0)
    file = tmp_path / "x.gguf"
    digits = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    what = f"{file.stat().st_size / 1e6:.1f} MB, 21 tensors (16 Q8_0, 5 F32), with tokenizer and chat template"
    assert out == (
        f"wrote     {file}: {what}, SHA-256 {digits}...\n"
        f"next      llama-server -m {file}, or python generate.py --model {file}\n"
    )
    convert.folder_to_gguf(base, tmp_path / "y.gguf", "q8_0", adapter[0])
    assert (tmp_path / "x.gguf").read_bytes() == (tmp_path / "y.gguf").read_bytes()
    capsys.readouterr()  # the note of the second
    _, err, code = command(convert, monkeypatch, capsys, *words)
    assert code == 2 and err == f"error: {tmp_path / 'x.gguf'}: exists already; name a new file\n"
    checkpoint(tmp_path / "hf", "mistral", {"sliding_window": 20, "num_hidden_layers": 1})
    capsys.readouterr()  # transformers' progress bar
    _, err, code = command(convert, monkeypatch, capsys, "to-gguf", tmp_path / "hf", tmp_path / "z.gguf")
    assert code == 0 and re.fullmatch(r"NOTE: llama\.cpp has no sliding window for llama: .* 20 tokens .*\n", err)


def test_the_command_finds_an_adapters_base(base, adapter, tmp_path, monkeypatch, capsys):
    found = f"base      {base.resolve()}: {adapter[0]} was made on it\n"
    out, err, code = command(convert, monkeypatch, capsys, "adapter-to-gguf", adapter[0], tmp_path / "x.gguf")
    make = f"python convert.py to-gguf {base.resolve()} BASE.gguf"
    served = f"next      llama-server -m BASE.gguf --lora {tmp_path / 'x.gguf'}; {make} makes its base\n"
    assert (
        (err, code) == ("", 0) and out.startswith(f"{found}wrote     {tmp_path / 'x.gguf'}: ") and out.endswith(served)
    )
    assert "kB, 16 tensors (16 F32), SHA-256 " in out and out.count("\n") == 3
    words = ("adapter-to-gguf", adapter[0], tmp_path / "y.gguf", "--model", base)
    out, err, code = command(convert, monkeypatch, capsys, *words)
    assert (err, code) == ("", 0) and out.startswith("wrote     ") and out.count("\n") == 2
    assert (tmp_path / "x.gguf").read_bytes() == (tmp_path / "y.gguf").read_bytes()
    moved = tmp_path / "moved"
    moved.mkdir()
    settings = json.loads((adapter[0] / "adapter_config.json").read_text()) | {"base_model_name_or_path": "/org/gone"}
    (moved / "adapter_config.json").write_text(json.dumps(settings))
    _, err, code = command(convert, monkeypatch, capsys, "adapter-to-gguf", moved, tmp_path / "z.gguf")
    assert code == 2 and err == f"error: {moved}: its base, /org/gone, is not here; give --model\n"
    _, err, code = command(convert, monkeypatch, capsys, "adapter-to-gguf", base, tmp_path / "z.gguf")
    assert code == 2 and "is a whole model, not an adapter" in err
