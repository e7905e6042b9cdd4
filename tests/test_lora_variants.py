"""LoRA's variants against peft: DoRA, rsLoRA, PiSSA, LoftQ, LoRA+, VeRA, patterns, layers; files both ways."""

import json
import math
import warnings

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.helpers import llama, move, relative

import adapter_files
import lora
import methods
from checkpoint import load_model
from common.errors import UserError
from kernels.nf4 import dequantized_weight
from lora import Variant
from optimizers import make_optimizers

TOKENS = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(0))
VARIANTS = {
    "rsLoRA": Variant(rslora=True),
    "DoRA": Variant(dora=True),
    "PiSSA": Variant(start="pissa"),
    "all three": Variant(rslora=True, dora=True, start="pissa"),
    "patterns": Variant(rank_pattern={"q_proj": 2, r"layers.1.*": 3}, alpha_pattern={"down_proj": 1.5}),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    llama(folder, std=0.1, num_key_value_heads=2, num_hidden_layers=2, attention_bias=True)
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
    model.save_pretrained(folder)
    return folder


def in_peft(base, folder, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        hugging = transformers.AutoModelForCausalLM.from_pretrained(base)
        return peft.PeftModel.from_pretrained(hugging, folder, **settings)


def assert_read(base, folder, config) -> None:
    """An adapter that peft makes of a configuration is read with the logits that it has in peft."""
    wrapped = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
    move(wrapped)
    wrapped.save_pretrained(folder)
    model = load_model(base)
    methods.load_any_adapter(model, folder)
    with torch.no_grad():
        assert torch.allclose(model(TOKENS), wrapped.eval()(TOKENS).logits, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("family", ["base", "gpt2"])
def test_the_file_computes_the_same_in_peft_and_read_again(request, tmp_path, family, name):
    folder = request.getfixturevalue(family)
    model = load_model(folder)
    before = model(TOKENS).detach()
    lora.add_lora(model, 4, 8.0, variant=VARIANTS[name] if family == "base" else VARIANTS[name]._replace(
        rank_pattern={}, alpha_pattern={}))  # fmt: skip
    assert relative(model(TOKENS), before) < 1e-6  # step 0 is the base
    move(model)
    ours = model(TOKENS).detach()
    assert relative(ours, before) > 1e-2
    lora.save_adapter(model, tmp_path / "adapter")
    again = load_model(folder)
    methods.load_any_adapter(again, tmp_path / "adapter")
    assert torch.allclose(again(TOKENS), ours, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(in_peft(folder, tmp_path / "adapter").eval()(TOKENS).logits, ours, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_are_those_of_peft(base, tmp_path, name):
    model = load_model(base)
    lora.add_lora(model, 4, 8.0, variant=VARIANTS[name])
    move(model)
    lora.save_adapter(model, tmp_path / "adapter")
    wrapped = in_peft(base, tmp_path / "adapter", is_trainable=True)
    loss = model(TOKENS).square().mean()
    theirs = wrapped(TOKENS).logits.square().mean()
    loss.backward()
    theirs.backward()
    gradients = {key: p.grad for key, p in wrapped.named_parameters() if p.grad is not None}
    for layer_name, layer in lora.lora_layers(model).items():
        stem = f"base_model.model.{layer_name}"
        # Of PiSSA, peft has the first factors beside the trained ones, in one matrix.
        A = gradients[f"{stem}.lora_A.default.weight"][: layer.rank]
        B = gradients[f"{stem}.lora_B.default.weight"][:, : layer.rank]
        assert relative(layer.lora_A.grad, A) < 1e-4 and relative(layer.lora_B.grad, B) < 1e-4
        if layer.lora_magnitude is not None:
            lengths = gradients[f"{stem}.lora_magnitude_vector.default.weight"]
            assert relative(layer.lora_magnitude.grad, lengths) < 1e-4


@pytest.mark.parametrize("settings", [
    {"use_dora": True},
    {"use_rslora": True},
    {"target_modules": "all-linear", "rank_pattern": {"k_proj": 3}, "alpha_pattern": {"layers.0.mlp.up_proj": 2}},
    {"layers_to_transform": [1]},
    {"layers_to_transform": 0, "layers_pattern": "layers"},
    {"target_modules": "all-linear", "exclude_modules": ["down_proj", "model.layers.0.self_attn.q_proj"]},
    {"target_modules": "all-linear", "exclude_modules": r".*layers\.1.*"},
], ids=str)  # fmt: skip
def test_what_peft_writes_is_read(base, tmp_path, settings):
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]} | settings
    )
    assert_read(base, tmp_path, config)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("quant", [None, "nf4"])
def test_merged_and_unmerged(base, name, quant):
    model = load_model(base, quant=quant)
    lora.add_lora(model, 4, 8.0, variant=VARIANTS[name])
    move(model)
    with torch.no_grad():
        adapted = model(TOKENS)
        adapter_files.merge(model)
        assert relative(model(TOKENS), adapted) < 1e-5
        adapter_files.unmerge(model)
        assert relative(model(TOKENS), adapted) < 1e-5


def test_dora_with_dropout_reads_what_peft_does(base, tmp_path):
    model = load_model(base)
    lora.add_lora(model, 4, 8.0, dropout=0.5, variant=Variant(dora=True))
    move(model)
    lora.save_adapter(model, tmp_path / "adapter")
    wrapped = in_peft(base, tmp_path / "adapter", is_trainable=True).train()
    layer = lora.lora_layers(model)["model.layers.0.self_attn.q_proj"].train()
    theirs = wrapped.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    ours = layer(x)
    torch.manual_seed(0)
    assert torch.allclose(ours, theirs(x), atol=1e-5)


def test_pissa_begins_with_the_largest_singular_values(base):
    model = load_model(base)
    weight = model.blocks[0].mlp.down.weight.detach().clone()
    lora.add_lora(model, 4, 8.0, variant=Variant(start="pissa"))
    layer = model.blocks[0].mlp.down
    U, S, V = torch.linalg.svd(weight)
    rank_4 = U[:, :4] @ torch.diag(S[:4]) @ V[:4]
    assert torch.allclose(layer.scale * layer.lora_B @ layer.lora_A, rank_4, atol=1e-4)


def test_large_matrices_are_split_approximately_and_always_alike(monkeypatch):
    left, right = (torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(i)))[0] for i in (0, 1))
    weight = (left * 0.8 ** torch.arange(40)) @ right
    exact = (left[:, :4] * 0.8 ** torch.arange(4)) @ right[:4]
    monkeypatch.setattr(lora, "MOST_EXACT", 8)
    torch.manual_seed(5)
    U, S, V = lora.largest_singular(weight, 4)
    assert torch.allclose((U * S) @ V.t(), exact, atol=1e-4)
    torch.manual_seed(6)
    assert torch.equal(lora.largest_singular(weight, 4)[0], U)


def test_loftq_is_nearer_to_the_weights_than_rounding(base, tmp_path):
    plain = load_model(base)
    rounded = load_model(base, quant="nf4")
    model = load_model(base)
    lora.add_lora(model, 8, 16.0, variant=Variant(start="loftq"))
    lora.quantize_with_update(model)
    for name, layer in lora.lora_layers(model).items():
        ours = name.replace("model.layers", "blocks").replace("self_attn.", "attention.")
        ours = ours.replace("q_proj", "q").replace("k_proj", "k").replace("v_proj", "v").replace("o_proj", "o")
        ours = ours.replace("gate_proj", "gate").replace("up_proj", "up").replace("down_proj", "down")
        weight = plain.get_submodule(ours).weight
        if layer.base.nf4 is None:  # 112 columns are no whole blocks
            assert weight.shape[1] % 64
            continue
        with_update = dequantized_weight(layer.base.frozen, torch.float32) + layer.delta()
        alone = dequantized_weight(rounded.get_submodule(ours).frozen, torch.float32)
        assert (with_update - weight).norm() < 0.9 * (alone - weight).norm(), name
    assert relative(model(TOKENS), plain(TOKENS)) < relative(rounded(TOKENS), plain(TOKENS))


def test_lora_plus_gives_b_a_rate_of_its_own(base):
    model = load_model(base)
    lora.add_lora(model, 4, 8.0, variant=Variant(dora=True))
    for kind in ("adamw", "muon", "adamw8bit"):
        groups = [
            g
            for each in make_optimizers(model, kind, 1e-3, 0.1, lr_factors={".lora_B": 16.0})
            for g in each.param_groups
        ]
        factors = {id(p): group["lr_factor"] for group in groups for p in group["params"]}
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert len(factors) == len(trained)
        assert all(factors[id(p)] == (16.0 if name.endswith("lora_B") else 1.0) for name, p in trained.items())


# ---- VeRA ----


@pytest.mark.parametrize("family", ["base", "gpt2"])
def test_vera_in_peft_and_back(request, tmp_path, family):
    folder = request.getfixturevalue(family)
    model = load_model(folder)
    before = model(TOKENS).detach()
    lora.add_vera(model, 16)
    assert torch.equal(model(TOKENS), before)
    move(model)
    ours = model(TOKENS).detach()
    lora.save_vera(model, tmp_path / "adapter")
    wrapped = in_peft(folder, tmp_path / "adapter", is_trainable=True).eval()
    assert torch.allclose(wrapped(TOKENS).logits, ours, atol=1e-5)
    model(TOKENS).square().mean().backward()
    wrapped(TOKENS).logits.square().mean().backward()
    gradients = {key: p.grad for key, p in wrapped.named_parameters() if p.grad is not None}
    layers = adapter_files.adapter_modules(model)
    assert len(gradients) == 2 * len(layers)
    for name, tensor in adapter_files.adapter_tensors(model).items():
        if "lambda" in name:
            theirs = gradients[f"{name}.default"]
            assert relative(tensor.grad, theirs) < 1e-4, name
    again = load_model(folder)
    methods.load_any_adapter(again, tmp_path / "adapter")
    assert torch.equal(again(TOKENS), ours)
    with torch.no_grad():
        adapter_files.merge(again)
        assert relative(again(TOKENS), ours) < 1e-5


def test_peft_s_vera_is_read_and_one_without_projections_is_refused(base, tmp_path):
    assert_read(base, tmp_path, peft.VeraConfig(r=8, target_modules=["q_proj", "down_proj"], projection_prng_key=7))
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if "vera_A" not in name}, file)
    with pytest.raises(UserError, match="projections are not in the file"):
        methods.load_any_adapter(load_model(base), tmp_path)


# ---- where, and what is refused ----


def test_layers_are_chosen(base):
    model = load_model(base)
    names = lora.add_lora(model, 4, 8.0, targets="all-linear", layers=lora.parse_layers("1"))
    assert names and all(".layers.1." in name for name in names)
    assert lora.parse_layers("0-2, 5") == {0, 1, 2, 5} and lora.parse_layers(None) is None


@pytest.mark.parametrize("call, said", [
    (lambda m: lora.parse_layers("2-1"), "--layers 2-1: numbers and ranges"),
    (lambda m: lora.add_lora(m, 4, 8.0, layers={9}), "--layers: the model has layers 0 to 1"),
    (lambda m: lora.parse_pattern("q_proj", "--rank-pattern"), "NAME=NUMBER"),
    (lambda m: lora.parse_pattern("q_proj=x", "--rank-pattern"), "NAME=NUMBER"),
    (lambda m: lora.add_lora(m, 4, 8.0, variant=Variant(rank_pattern={"nothing": 4})), "matches no adapted layer"),
    (lambda m: lora.add_lora(m, 4, 8.0, variant=Variant(rank_pattern={"q_proj": 1.5})), "a rank whole"),
    (lambda m: lora.add_lora(m, 4, 8.0, variant=Variant(rank_pattern={"(": 4})), "no regular expression"),
    (lambda m: lora.add_lora(m, 80, 8.0, variant=Variant(start="pissa")), "singular values for --init pissa"),
    (lambda m: lora.add_vera(m, 0), "--rank 0"),
])  # fmt: skip
def test_bad_words_end_in_one_line(base, call, said):
    with pytest.raises(UserError, match=said):
        call(load_model(base))


@pytest.mark.parametrize("key, value", [
    ("lora_bias", True), ("use_qalora", True), ("use_what_comes_next", True), ("layer_replication", [[0, 1]]),
    ("init_lora_weights", "olora"), ("init_lora_weights", "pissa"), ("bias", "all"), ("alora_invocation_tokens", [1]),
    ("rank_pattern", {"q_proj": "x"}), ("layers_to_transform", ["1"]), ("layers_to_transform", [7]),
    ("alpha_pattern", {"(": 2}),
])  # fmt: skip
def test_keys_that_would_be_ignored_are_refused_by_name(base, tmp_path, key, value):
    model = load_model(base)
    lora.add_lora(model, 4, 8.0)
    lora.save_adapter(model, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(UserError, match=key):
        methods.load_any_adapter(load_model(base), tmp_path)


def test_rslora_scales_by_the_root_of_the_rank(base):
    model = load_model(base)
    lora.add_lora(model, 16, 8.0, variant=Variant(rslora=True))
    assert model.blocks[0].attention.q.scale == 8.0 / math.sqrt(16)
