"""lora.py against peft: the same logits both ways, merged or not, and strict about names."""

import json

import peft
import pytest
import torch
import transformers
from helpers import llama, relative
from safetensors.torch import load_file, save_file

import lora
from checkpoint import load_model, save_model
from errors import UserError

TOKENS = torch.randint(0, 96, (2, 30), generator=torch.Generator().manual_seed(0))
TARGETS = ["all", "q_proj,v_proj", "model.layers.1.mlp.down_proj"]


def randomise(model) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for layer in lora.adapted(model).values():
            layer.lora_B.normal_(0, 0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_0_is_the_base_exactly(tmp_path, dtype):
    llama(tmp_path)
    model = load_model(tmp_path, dtype)
    before = model(TOKENS)
    lora.add_lora(model, 4, 8.0)
    assert torch.equal(model(TOKENS), before)


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("merged", [False, True])
def test_our_adapter_gives_the_same_logits_in_peft(tmp_path, targets, merged):
    theirs, model = llama(tmp_path / "base", attention_bias=True), load_model(tmp_path / "base")
    lora.add_lora(model, 4, 10.0, targets=targets)
    randomise(model)
    lora.save_adapter(model, tmp_path / "adapter")
    wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    names = {
        n.removeprefix("base_model.model.")
        for n, m in wrapped.named_modules()
        if isinstance(m, peft.tuners.lora.LoraLayer)
    }
    assert names == set(lora.adapted(model))
    if merged:
        wrapped = wrapped.merge_and_unload()
        lora.merge(model)
    with torch.no_grad():
        assert relative(model(TOKENS), wrapped(TOKENS).logits) < 1e-5
        assert relative(model(TOKENS), load_model(tmp_path / "base")(TOKENS)) > 1e-3


@pytest.mark.parametrize("targets", [["q_proj", "up_proj"], "all-linear", r".*\.1\.self_attn\.(q|o)_proj"])
def test_a_peft_adapter_gives_the_same_logits_here(tmp_path, targets):
    theirs = llama(tmp_path / "base")
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(theirs, config).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    model = load_model(tmp_path / "base")
    lora.load_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        assert relative(model(TOKENS), wrapped(TOKENS).logits) < 1e-5


def test_merged_model_saves_as_a_plain_one(tmp_path):
    llama(tmp_path / "base")
    model = load_model(tmp_path / "base")
    lora.add_lora(model, 4, 8.0)
    randomise(model)
    with torch.no_grad():
        adapted = model(TOKENS)
        lora.merge(model)
        merged = model(TOKENS)
        lora.unmerge(model)
        assert relative(merged, adapted) < 1e-5 and relative(model(TOKENS), adapted) < 1e-5
        lora.merge(model)
    lora.drop_lora(model)
    save_model(model, tmp_path / "merged")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert relative(theirs(TOKENS).logits, adapted) < 1e-5


def adapter(tmp_path, **config):
    llama(tmp_path / "base")
    model = load_model(tmp_path / "base")
    lora.add_lora(model, 4, 8.0, targets="q_proj")
    lora.save_adapter(model, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return load_model(tmp_path / "base"), tmp_path / "adapter"


def refused(model, folder) -> str:
    with pytest.raises(UserError) as error:
        lora.load_adapter(model, folder)
    assert "\n" not in str(error.value) and "adapter" in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "config",
    [{"peft_type": "IA3"}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}, {"r": "4"}, {"r": 0},
     {"target_modules": ["nothing"]}, {"target_modules": "("}, {"rank_pattern": {"q_proj": 2}}, {"r": 5}],
)  # fmt: skip
def test_what_would_be_ignored_is_refused(tmp_path, config):
    refused(*adapter(tmp_path, **config))


@pytest.mark.parametrize("change", ["missing", "extra", "renamed", "shape"])
def test_tensors_must_be_exactly_those_promised(tmp_path, change):
    model, folder = adapter(tmp_path)
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(iter(weights))
    tensor = weights.pop(name)
    if change == "extra":
        weights |= {name: tensor, name.replace("q_proj", "z_proj"): tensor.clone()}
    if change == "renamed":
        weights[name.removeprefix("base_model.")] = tensor
    if change == "shape":
        weights[name] = tensor[:-1].clone()
    save_file(weights, file)
    assert "adapter_model.safetensors" in refused(model, folder)


def test_a_cut_or_pickled_or_absent_adapter_is_refused(tmp_path):
    model, folder = adapter(tmp_path)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    assert "damaged" in refused(model, folder)
    file.rename(folder / "adapter_model.bin")
    assert "pickle" in refused(load_model(tmp_path / "base"), folder)
    (folder / "adapter_config.json").unlink()
    assert "no adapter_config.json" in refused(model, folder)


@pytest.mark.parametrize(
    "settings", [(0, 8.0, 0.0, "all"), (4, -1.0, 0.0, "all"), (4, 8.0, 1.0, "all"), (4, 8.0, 0.0, "zap")]
)
def test_impossible_settings_are_refused(tmp_path, settings):
    llama(tmp_path)
    with pytest.raises(UserError):
        lora.add_lora(load_model(tmp_path), *settings)
