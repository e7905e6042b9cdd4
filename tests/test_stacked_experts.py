"""LoRA on routed experts in PEFT's stacked form (target_parameters) and by each linear, against peft."""

import json
import re
import shutil
import warnings
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from support.helpers import chat_base, output_of, refusal_of, relative
from support.runs import assert_same, records

import adapter_files
import convert
import lora
import methods
import train
from adapting.stacked_experts import match_parameters, stacked_parameters, why_peft_can_t
from checkpoint import load_model, save_model
from common.errors import UserError
from kernels import experts
from model import Experts

SIZES = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "num_experts_per_tok": 2, "initializer_range": 0.2}
FAMILIES = {
    "mixtral": {"num_local_experts": 5, "intermediate_size": 48},
    "qwen3_moe": {"num_experts": 6, "moe_intermediate_size": 40, "head_dim": 16, "norm_topk_prob": False},
}
DENSE_BETWEEN = FAMILIES["qwen3_moe"] | {"mlp_only_layers": [0], "intermediate_size": 72}
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
KINDS = {  # target_parameters, target_modules, what else of the configuration
    "both": (BOTH, ["q_proj", "o_proj"], {}),
    "experts alone": (BOTH, [], {}),
    "gate and up": (["experts.gate_up_proj"], ["v_proj"], {}),
    "down": (["down_proj"], [], {}),
    "one layer": (["model.layers.1.mlp.experts.gate_up_proj"], ["q_proj"], {}),
    "patterns": (BOTH, ["q_proj"], {"rank_pattern": {"experts.gate_up_proj": 2}, "alpha_pattern": {"down_proj": 3.0}}),
    "rslora": (BOTH, ["q_proj"], {"use_rslora": True}),
}
TOKENS = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    for name, sizes in (FAMILIES | {"dense between": DENSE_BETWEEN}).items():
        torch.manual_seed(0)
        config = transformers.CONFIG_MAPPING[name if name in FAMILIES else "qwen3_moe"](**SIZES, **sizes)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    return folder


def hugging(folder: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def in_peft(folder: Path, kind: str):
    parameters, modules, more = KINDS[kind]
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=modules, target_parameters=parameters, task_type="CAUSAL_LM", **more
    )
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(hugging(folder), config).eval()
    move(wrapped)
    return wrapped


def read_by_peft(folder: Path, adapter: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(hugging(folder), adapter).eval()


def move(model) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def gradients_as_stored(model, folder: Path) -> dict[str, torch.Tensor]:
    """The gradients of an adapter under the names of its file: written in place of the numbers."""
    with torch.no_grad():
        for parameter in {id(p): p for p in model.parameters() if p.requires_grad}.values():
            parameter.copy_(parameter.grad)
    lora.save_adapter(model, folder)
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_gradients_and_files_are_those_of_peft(bases, tmp_path, name, kind):
    wrapped = in_peft(bases / name, kind)
    wrapped.save_pretrained(tmp_path / "theirs")
    model = load_model(bases / name).train()
    methods.load_any_adapter(model, tmp_path / "theirs")
    ours, theirs = model(TOKENS), wrapped(TOKENS).logits
    assert relative(ours, theirs) < 1e-5
    lora.save_adapter(model, tmp_path / "mine")
    mine = load_file(tmp_path / "mine/adapter_model.safetensors")
    stored = load_file(tmp_path / "theirs/adapter_model.safetensors")
    assert mine.keys() == stored.keys() and all(torch.equal(mine[key], stored[key]) for key in mine)
    assert relative(read_by_peft(bases / name, tmp_path / "mine")(TOKENS).logits, theirs) < 1e-5
    assert relative(again(bases / name, tmp_path / "mine")(TOKENS), theirs) < 1e-5
    for logits in (ours, theirs):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    lora.merge(model, keep=True)
    assert relative(model(TOKENS), theirs) < 1e-5
    lora.unmerge(model)
    wanted = {}
    for key, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            wanted[key.replace(".default", "")] = parameter.grad
    found = gradients_as_stored(model, tmp_path / "gradients")
    assert found.keys() == wanted.keys()
    for key, gradient in wanted.items():
        assert relative(found[key], gradient) < 1e-4, key


def again(folder: Path, adapter: Path):
    model = load_model(folder)
    methods.load_any_adapter(model, adapter)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_each_linear_by_itself_is_read_by_peft_too(bases, tmp_path, name):
    model = load_model(bases / name)
    lora.add_lora(model, 4, 8.0)
    move(model)
    lora.save_adapter(model, tmp_path / "adapter")
    assert "target_parameters" not in json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert relative(read_by_peft(bases / name, tmp_path / "adapter")(TOKENS).logits, model(TOKENS)) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_merged_in_transformers_and_taken_off(bases, tmp_path, name):
    model = load_model(bases / name)
    plain = model(TOKENS)
    lora.add_lora(model, 4, 8.0, targets=[], parameters=match_parameters(model, BOTH))
    assert torch.equal(model(TOKENS), plain)  # B begins as zeros
    # gate and up of an expert share their A, and all else is its own
    layer = next(module for module in model.modules() if isinstance(module, Experts))
    first = layer.experts[0]
    assert first.gate.lora_A is first.up.lora_A and first.gate.lora_A is not layer.experts[1].gate.lora_A
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    experts_of_layer, hidden, inner = layer.rules.count, 64, layer.rules.intermediate_size
    assert size == 2 * experts_of_layer * 4 * (hidden + 2 * inner + inner + hidden)
    assert adapter_files.base_size(model) == load_model(bases / name).size
    move(model)
    tuned = model(TOKENS)
    modules = adapter_files.remove_adapter(model)
    assert torch.equal(model(TOKENS), plain)
    adapter_files.put_back(model, modules)
    assert torch.equal(model(TOKENS), tuned)
    lora.merge(model)
    adapter_files.remove_adapter(model)
    shutil.copy(bases / name / "config.json", tmp_path)
    save_model(model, tmp_path / "merged")
    assert relative(hugging(tmp_path / "merged")(TOKENS).logits, tuned) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_grouped_products_compute_the_same(bases, name, monkeypatch):
    model = load_model(bases / name).train()
    lora.add_lora(model, 8, 8.0, targets=[], parameters=match_parameters(model, BOTH))
    move(model)

    def outcome() -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        logits = model(TOKENS)
        F.cross_entropy(logits.flatten(0, 1), TOKENS.flatten()).backward()
        return logits.detach(), [p.grad for p in model.parameters() if p.requires_grad]

    logits, gradients = outcome()
    calls, product = [], torch._grouped_mm
    monkeypatch.setattr(torch, "_grouped_mm", lambda *a, **b: calls.append(1) or product(*a, **b))
    monkeypatch.setattr(experts, "multiplies_groups", lambda x: True)
    for module in model.modules():
        if isinstance(module, Experts):
            module.make_weights_contiguous()  # as on a GPU
    grouped_logits, grouped_gradients = outcome()
    assert len(calls) > 8 and relative(grouped_logits, logits) < 1e-5
    for a, b in zip(grouped_gradients, gradients, strict=True):
        assert relative(a, b) < 1e-4


# ---- whole runs ----


@pytest.fixture(scope="module")
def moe(tmp_path_factory) -> Path:
    """A Mixtral with a tokenizer, and examples."""
    folder = tmp_path_factory.mktemp("moe")
    chat = chat_base(folder / "chat")
    size = json.loads((chat / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        **SIZES | {"vocab_size": size}, num_local_experts=3, intermediate_size=48, max_position_embeddings=512,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(folder / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(chat / name, folder / "base" / name)
    records(folder / "data.jsonl", 24, 0)
    records(folder / "val.jsonl", 6, 100)
    return folder


def words_of(moe: Path, *words) -> list:
    given = ["--model", moe / "base", "--data", moe / "data.jsonl", "--val", moe / "val.jsonl", "--dtype", "fp32"]
    return [*given, "--batch-size", 4, *words]


def test_a_run_says_what_it_adapts_and_is_resumed_and_goes_on(moe, tmp_path, monkeypatch, capsys):
    words = words_of(moe, "--target-parameters", ",".join(BOTH), "--rank", 4, "--steps", 6, "--save-every", 2,
        "--rank-pattern", "experts.down_proj=2")  # fmt: skip
    said = output_of(train, monkeypatch, capsys, *words, "--out", tmp_path / "whole")
    assert "gate 6 of 6, up 6 of 6, down 6 of 6 (stacked, as target_parameters)" in said
    output_of(train, monkeypatch, capsys, *words, "--out", tmp_path / "cut")
    for name in ("final", "best", "checkpoints/step-6"):
        shutil.rmtree(tmp_path / "cut" / name, ignore_errors=True)
    output_of(train, monkeypatch, capsys, "--out", tmp_path / "cut", "--resume")
    assert_same(tmp_path / "whole", tmp_path / "cut")
    described = json.loads((tmp_path / "whole/final/adapter_config.json").read_text())
    assert described["target_parameters"] == sorted(BOTH) and len(described["rank_pattern"]) == 2
    said = output_of(train, monkeypatch, capsys, *words_of(moe, "--adapter", tmp_path / "whole/final", "--steps", 2),
        "--out", tmp_path / "more")  # fmt: skip
    assert "(stacked, as target_parameters)" in said
    output_of(convert, monkeypatch, capsys, "merge", tmp_path / "whole/final", tmp_path / "merged")
    ours = again(moe / "base", tmp_path / "whole/final")(TOKENS)
    assert relative(hugging(tmp_path / "merged")(TOKENS).logits, ours) < 1e-5
    output_of(convert, monkeypatch, capsys, "to-gguf", moe / "base", tmp_path / "a.gguf", "--adapter",
        tmp_path / "whole/final", "--type", "f32")  # fmt: skip
    output_of(convert, monkeypatch, capsys, "to-gguf", tmp_path / "merged", tmp_path / "b.gguf", "--type", "f32")
    assert (tmp_path / "a.gguf").stat().st_size == pytest.approx((tmp_path / "b.gguf").stat().st_size, rel=0.01)


EACH = {  # by each linear: what add_lora is given
    "all": {},
    "attention alone": {"targets": "q_proj,k_proj"},
    "experts alone": {"targets": "w1,w2,w3,gate_proj,up_proj,down_proj"},
    "gate without up": {"targets": "q_proj,w1,gate_proj"},
    "down": {"targets": "q_proj,w2,down_proj"},
    "one expert": {"targets": "experts.1.w1,experts.1.w3,experts.1.gate_proj,experts.1.up_proj"},
    "rsLoRA": {"variant": lora.Variant(rslora=True)},
    "another rank": {"variant": lora.Variant(rank_pattern={"w2": 2})},
    "another alpha": {"variant": lora.Variant(alpha_pattern={"q_proj": 2.0})},
    "one layer": {"layers": {1}},
    "stacked beside all": {"parameters": BOTH},
}


@pytest.mark.parametrize("kind", EACH)
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "dense between"])
def test_what_peft_can_t_load_is_known(bases, tmp_path, name, kind):
    """Compared with peft: it loads what has no note with equal logits, and nothing that has one."""
    model = load_model(bases / name)
    given = dict(EACH[kind])
    if "targets" in given:
        # Mixtral's files say w1, those of Qwen gate_proj.
        absent = re.compile(r"(gate|up|down)_proj$" if name == "mixtral" else r"w\d$")
        wanted = [each for each in given["targets"].split(",") if not absent.search(each)]
        given["targets"] = ",".join(wanted)
    if kind == "another rank" and name != "mixtral":
        given["variant"] = lora.Variant(rank_pattern={r"experts\.\d+\.down_proj": 2})
    if "parameters" in given:
        given["parameters"] = match_parameters(model, given["parameters"])
    lora.add_lora(model, 4, 8.0, **given)
    move(model)
    problem = why_peft_can_t(model)
    lora.save_adapter(model, tmp_path / "adapter")
    try:
        is_same = relative(read_by_peft(bases / name, tmp_path / "adapter")(TOKENS).logits, model(TOKENS)) < 1e-5
    except (RuntimeError, ValueError):
        is_same = False
    assert is_same == (not problem), problem


def test_layers_hold_for_stacked_experts_too(bases):
    model = load_model(bases / "mixtral")
    lora.add_lora(model, 4, 8.0, targets=[], layers={1}, parameters=match_parameters(model, BOTH))
    assert {int(name.split(".")[2]) for name in lora.lora_layers(model)} == {1}
    # No expert is adapted by itself where the layers leave none of those that are named.
    model = load_model(bases / "mixtral")
    one = match_parameters(model, ["model.layers.1.mlp.experts.down_proj"])
    lora.add_lora(model, 4, 8.0, layers={0}, parameters=one)
    assert not any(".experts." in name for name in lora.lora_layers(model))
    for layers, said in (({0}, "none of them"), ({7}, "layers 0 to 1")):
        with pytest.raises(UserError, match=said):
            lora.add_lora(load_model(bases / "mixtral"), 4, 8.0, targets=[], layers=layers, parameters=one)


def test_experts_that_peft_can_t_load_are_named(moe, tmp_path, monkeypatch, capsys):
    said = output_of(train, monkeypatch, capsys, *words_of(moe, "--targets", "w1,q_proj", "--steps", 1),
        "--out", tmp_path / "run")  # fmt: skip
    assert "gate 6 of 6, up 0 of 6, down 0 of 6 (each by itself)" in said and "NOTE: peft can't load" in said
    assert "peft can't load it as it is" in (tmp_path / "run/final/README.md").read_text()
    said = output_of(train, monkeypatch, capsys, *words_of(moe, "--steps", 1), "--out", tmp_path / "all")
    assert "NOTE: peft" not in said


@pytest.mark.parametrize("words, said", [
    (["--target-parameters", "w1"], "mlp.experts.gate_up_proj and mlp.experts.down_proj"),
    (["--target-parameters", ""], "is empty"),
    (["--target-parameters", BOTH[0], "--dropout", "0.1"], "--dropout"),
    (["--target-parameters", BOTH[0], "--dora"], "--dora"),
    (["--target-parameters", BOTH[0], "--init", "pissa"], "--init"),
    (["--target-parameters", BOTH[0], "--targets", "w2"], "one of the experts"),
    (["--target-parameters", f"{BOTH[0]},"], "is empty"),
    (["--target-parameters", "mlp.gate.weight"], "is the router"),
    (["--target-parameters", BOTH[0], "--method", "vera"], "is for --method lora"),
    (["--targets", "none"], "--target-parameters"),
])  # fmt: skip
def test_bad_words_end_in_one_line(moe, tmp_path, monkeypatch, capsys, words, said):
    line = refusal_of(train, monkeypatch, capsys, *words_of(moe, *words, "--steps", 1), "--out", tmp_path / "run")
    assert said in line and not (tmp_path / "run").exists()


def test_a_model_without_experts_says_so(moe, tmp_path, monkeypatch, capsys):
    words = ["--model", moe / "chat", "--data", moe / "data.jsonl", "--target-parameters", BOTH[0], "--steps", 1]
    assert "no routed experts" in refusal_of(train, monkeypatch, capsys, *words, "--out", tmp_path / "run")


BY_ITSELF = f"{adapter_files.PREFIX}model.layers.0.block_sparse_moe.experts.0.w1.lora_A.weight"


def each_of(stored: dict, change) -> None:
    stored.update({key: change(value) for key, value in stored.items()})


@pytest.mark.parametrize("change, said", [
    (lambda config, stored: config.update(target_parameters=["mlp.experts.w"]), "target_parameters mlp.experts.w"),
    (lambda config, stored: config.update(target_parameters="x"), "must be a list"),
    (lambda config, stored: config.update(lora_dropout=0.1), "--dropout"),
    (lambda config, stored: config.update(use_dora=True), "--dora"),
    (lambda config, stored: config.update(target_parameters=BOTH[:1]), "experts.*shape"),
    (lambda config, stored: each_of(stored, lambda value: value[:-1].clone()), "experts.*shape"),
    (lambda config, stored: each_of(stored, lambda value: value[:0].clone()), "experts.*shape"),
    (lambda config, stored: each_of(stored, lambda value: value[0].clone()), "experts.*shape"),
    (lambda config, stored: each_of(stored, lambda value: value * torch.nan), "experts.*NaN"),
    (lambda config, stored: stored.update({BY_ITSELF: torch.zeros(1)}), "beside"),
])  # fmt: skip
def test_adapters_that_do_not_fit_are_refused(bases, tmp_path, change, said):
    in_peft(bases / "mixtral", "experts alone").save_pretrained(tmp_path / "adapter")
    file, weights = tmp_path / "adapter/adapter_config.json", tmp_path / "adapter/adapter_model.safetensors"
    config, stored = json.loads(file.read_text()), load_file(weights)
    change(config, stored)
    file.write_text(json.dumps(config))
    save_file(stored, weights)
    model = load_model(bases / "mixtral")
    with pytest.raises(UserError, match=said):
        methods.load_any_adapter(model, tmp_path / "adapter")
    assert not adapter_files.has_adapter(model) and all(p.requires_grad for p in model.parameters())


def test_names_of_the_parameters_are_those_of_transformers(bases):
    for name in FAMILIES:
        theirs = {key for key, p in hugging(bases / name).named_parameters() if p.dim() == 3}
        assert {*stacked_parameters(load_model(bases / name))} == theirs and len(theirs) == 4
