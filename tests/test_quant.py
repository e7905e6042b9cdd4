"""quant.py and kernels/nf4.py against bitsandbytes: codes and numbers bit for bit, folders both ways, QLoRA."""

import json
import re
import shutil
from itertools import pairwise

import bitsandbytes.functional as bnb
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.helpers import chat_base, command, llama, relative, sentence
from support.training_runs import oracle_losses, rows, run_loop, settings

import adapter_files
import convert
import evaluate
import generate
import lora
import quant
import train
from checkpoint import load_model, save_model
from common.errors import UserError
from kernels.lora_linear import LoRAWeights, lora_linears
from kernels.nf4 import CODE, dequantized_weight, nf4_dequantize, nf4_dequantize_reference, nf4_linear
from model import Linear, quantized_linears

WIDE = {"hidden_size": 128, "intermediate_size": 192, "std": 0.05}
BOUNDS = torch.tensor([*((a + b) / 2 for a, b in pairwise(CODE)), 1.0])  # between neighbours, and the largest value


def matrices() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator)
    outlier = normal(64, 128)
    outlier[3, 5] = 1e4
    return {
        "normal": normal(96, 192),
        "many": normal(1536, 576),
        "tiny": normal(64, 128) * 1e-30,
        "denormal": normal(64, 128) * 1e-40,
        "outlier": outlier,
        "blocks of zeros": torch.cat([torch.zeros(4, 64), normal(4, 64)]),
        "one block": normal(1, 64),
        "boundaries": BOUNDS.repeat(32).view(-1, 64),
        "boundaries, scaled": BOUNDS.repeat(32).view(-1, 64) * 3.7,
        "bf16": normal(128, 256).bfloat16(),
        "fp16": normal(128, 256).half(),
        "the last nested block short": normal(3, 64 * 100),
    }


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", matrices())
def test_codes_scales_and_numbers_are_those_of_bitsandbytes(kind, double):
    weight = matrices()[kind]
    packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type="nf4")
    ours = quant.quantize(weight, double)
    assert ours.packed.shape == (weight.shape[0], weight.shape[1] // 2)
    assert torch.equal(ours.packed.flatten(), packed.flatten())
    assert torch.equal(ours.absmax.flatten(), state.absmax.flatten())
    if double:
        assert torch.equal(ours.nested, state.state2.absmax) and float(ours.offset) == float(state.offset)
        assert ours.absmax.dtype == torch.uint8
    else:
        assert torch.equal(quant.quantize_nf4(weight)[0], ours.packed)
        assert torch.equal(nf4_dequantize(quant.NF4(*ours[:2]), torch.float32), nf4_dequantize(ours, torch.float32))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        state.dtype = dtype
        wanted = bnb.dequantize_4bit(packed, state)
        assert torch.equal(nf4_dequantize(ours, dtype), wanted)
        assert torch.equal(nf4_dequantize_reference(ours, dtype), wanted)


@pytest.mark.parametrize("size", [32, 128, 256])
def test_blocks_of_other_sizes(size):
    weight = matrices()["bf16"]
    packed, state = bnb.quantize_4bit(weight, blocksize=size, quant_type="nf4")
    ours = quant.quantize_nf4(weight, size)
    assert torch.equal(ours[0].flatten(), packed.flatten()) and torch.equal(ours[1].flatten(), state.absmax)
    assert torch.equal(nf4_dequantize(quant.NF4(*ours), torch.bfloat16), bnb.dequantize_4bit(packed, state))


def test_the_numbers_of_double_quantisation():
    assert torch.equal(quant.dynamic_codebook(torch.device("cpu")), bnb.create_dynamic_map())


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_linear_is_right_and_keeps_only_the_codes(dtype, adapted):
    """Against float64 on the dequantised matrix; and of what is kept for the backward nothing is the whole matrix."""
    generator = torch.Generator().manual_seed(1)
    normal = lambda *shape: torch.randn(shape, generator=generator)
    frozen = quant.quantize(normal(40, 192))
    x, bias, A, B = normal(9, 192).to(dtype).requires_grad_(), normal(40).to(dtype), normal(4, 192), normal(40, 4)
    A.requires_grad_(), B.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        if adapted:
            (out,) = lora_linears(x, [LoRAWeights(frozen, bias, A, B, 0.5)])
        else:
            out = nf4_linear(x, frozen, bias)
    assert sum(t.nbytes for t in kept if t.dtype == torch.uint8) >= 40 * 192 // 2
    assert all(t.numel() < 40 * 192 or t.dtype == torch.uint8 for t in kept)
    weights = normal(9, 40)
    (out.float() * weights).sum().backward()
    x64 = x.detach().double().requires_grad_()
    A64, B64 = (t.detach().double().requires_grad_() for t in (A, B))
    whole = nf4_dequantize_reference(frozen, torch.float32).double()
    wanted = x64 @ whole.t() + bias.double() + (0.5 * (x64 @ A64.t()) @ B64.t() if adapted else 0)
    (wanted * weights.double()).sum().backward()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    assert out.dtype == dtype and relative(out.double(), wanted) < tolerance
    assert relative(x.grad.double(), x64.grad) < tolerance
    if adapted:
        assert relative(A.grad.double(), A64.grad) < tolerance and relative(B.grad.double(), B64.grad) < tolerance


def bits_and_bytes(folder, double: bool = True, **more):
    """transformers' model with bitsandbytes' linears; training, for its CPU kernel for inference rounds to bf16."""
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32, **more,
    )  # fmt: skip
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(folder, quantization_config=config, dtype=torch.float32, attn_implementation="eager").train()


def tokens() -> torch.Tensor:
    return torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(1))


def errors(ours, theirs) -> float:
    with torch.no_grad():
        return relative(ours(tokens()), theirs(tokens()).logits)


@pytest.mark.parametrize("double", [False, True])
def test_folders_of_transformers_with_bitsandbytes_load(tmp_path, double):
    whole = llama(tmp_path / "base", **WIDE)
    theirs = bits_and_bytes(tmp_path / "base", double)
    theirs.save_pretrained(tmp_path / "4bit", max_shard_size="60KB")
    assert (tmp_path / "4bit" / "model.safetensors.index.json").is_file()
    ours = load_model(tmp_path / "4bit")
    assert errors(ours, theirs) < 2e-6 and errors(ours, whole) > 0.05
    assert len(quantized_linears(ours)) == 21 and ours.size == sum(p.numel() for p in whole.parameters())


def test_quantising_while_loading_equals_bitsandbytes_and_both_read_what_is_saved(tmp_path):
    llama(tmp_path / "base", **WIDE)
    theirs, ours = bits_and_bytes(tmp_path / "base"), load_model(tmp_path / "base", quant="nf4")
    assert errors(ours, theirs) < 2e-6
    assert all(p.dtype == torch.float32 for p in ours.parameters() if p.is_floating_point())
    save_model(ours, tmp_path / "saved")
    back = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", dtype=torch.float32, attn_implementation="eager"
    ).train()
    assert type(back.model.layers[0].mlp.up_proj).__name__ == "Linear4bit" and errors(ours, back) < 2e-6
    again = load_model(tmp_path / "saved")
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), again.parameters(), strict=True))


def test_the_output_head_is_quantised_where_that_is_asked_for(tmp_path):
    llama(tmp_path / "base", **WIDE)
    theirs = bits_and_bytes(tmp_path / "base", llm_int8_skip_modules=[])
    ours = load_model(tmp_path / "base", quant="nf4+head")
    assert type(theirs.lm_head).__name__ == "Linear4bit" and ours.head.nf4 is not None and errors(ours, theirs) < 2e-6
    convert.to_nf4(tmp_path / "base", tmp_path / "saved", "nf4+head")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).train()
    assert type(back.lm_head).__name__ == "Linear4bit" and errors(load_model(tmp_path / "saved"), back) < 2e-6
    lora.add_lora(ours, 4, 8.0)
    data = rows(8)
    assert run_loop(ours, data, settings(steps=2), tmp_path)[1] > 0  # the loss's gradient goes through it
    assert ours.eval().generate([[1, 2, 3]], 20) == ours.generate([[1, 2, 3]], 20)
    llama(tmp_path / "tied", **WIDE, tie_word_embeddings=True)
    with pytest.raises(UserError, match="output head is its embedding table"):
        load_model(tmp_path / "tied", quant="nf4+head")


def test_the_command_writes_a_base_in_four_bits(tmp_path, monkeypatch, capsys):
    whole = llama(tmp_path / "base", **WIDE)
    capsys.readouterr()  # transformers' own
    out, err, code = command(convert, monkeypatch, capsys, "to-nf4", tmp_path / "base", tmp_path / "4bit")
    size = sum(file.stat().st_size for file in (tmp_path / "4bit").iterdir()) / 1e6
    what = f"{size:.1f} MB in 4 files, 135 tensors (72 F32, 63 U8), without a tokenizer"
    assert (err, code) == ("", 0) and out.startswith(f"wrote     {tmp_path / '4bit'}: {what}\nnext      ")
    assert errors(load_model(tmp_path / "4bit"), bits_and_bytes(tmp_path / "base")) < 2e-6
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("base", "4bit")]
    assert sizes[1] < sizes[0] / 3 and errors(load_model(tmp_path / "4bit"), whole) > 0.05
    _, err, code = command(convert, monkeypatch, capsys, "to-nf4", tmp_path / "4bit", tmp_path / "again")
    assert code == 2 and err.endswith(f"error: {tmp_path / '4bit'}: is quantised already\n")


def test_what_is_held_is_four_bits_a_weight(tmp_path):
    llama(tmp_path, hidden_size=256, intermediate_size=512, num_hidden_layers=2)
    model = load_model(tmp_path, torch.bfloat16, quant="nf4")
    for layer in quantized_linears(model).values():
        size = layer.in_features * layer.out_features
        assert layer.weight is None
        assert sum(p.nbytes for p in layer.nf4.parameters()) <= size * 0.5 + size / 64 + 4 * (size / 64 / 256 + 1) + 4
    others = [name for name, p in model.named_parameters() if ".nf4." not in name and p.dim() == 2]
    assert others == ["embed.weight", "head.weight"]


@pytest.mark.parametrize("family", ["gpt2", "phi3", "mixtral"])
def test_every_kind_of_linear_is_quantised_whole_and_alone(tmp_path, family):
    """GPT-2's are stored the other way round, Phi-3's hold several, Mixtral's are many: each is what its own published
    matrix becomes, and the model computes with that."""
    sizes = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    made = {
        "gpt2": lambda: transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64),
        "phi3": lambda: transformers.Phi3Config(**sizes, intermediate_size=128, num_key_value_heads=2, pad_token_id=0),
        "mixtral": lambda: transformers.MixtralConfig(
            **sizes, intermediate_size=128, num_key_value_heads=2, num_local_experts=4
        ),
    }[family]()
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(made).save_pretrained(tmp_path)
    plain, ours = load_model(tmp_path), load_model(tmp_path, quant="nf4")
    held = {name: layer for name, layer in ours.named_modules() if isinstance(layer, Linear) and layer is not ours.head}
    assert held and all(layer.nf4 is not None for layer in held.values())
    for name, layer in held.items():
        weight = plain.get_submodule(name).weight
        assert all(torch.equal(mine, its) for mine, its in zip(layer.nf4.tensors, quant.quantize(weight), strict=True))
        plain.get_submodule(name).weight.data = dequantized_weight(layer.frozen, torch.float32)
    with torch.no_grad():
        assert relative(ours(tokens()), plain(tokens())) < 1e-6


def test_rows_that_are_no_whole_blocks_stay_as_they_are_and_are_named(tmp_path):
    llama(tmp_path, hidden_size=64, intermediate_size=112)
    model = load_model(tmp_path, quant="nf4")
    assert sorted(model.unquantized) == [f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)]
    assert all(block.mlp.down.nf4 is None and block.mlp.up.nf4 is not None for block in model.blocks)


def test_qlora_trains_as_peft_on_bitsandbytes_and_its_adapter_fits_there(tmp_path):
    """The same batches for 20 steps; then the trained adapter on a base that bitsandbytes quantised."""
    llama(tmp_path / "base", hidden_size=128, intermediate_size=192, std=0.1)
    model = load_model(tmp_path / "base", quant="nf4")
    torch.manual_seed(1)
    lora.add_lora(model, 4, 8.0, targets="all")
    lora.save_adapter(model, tmp_path / "start")
    wrapped = peft.PeftModel.from_pretrained(bits_and_bytes(tmp_path / "base"), tmp_path / "start", is_trainable=True)
    flags, data = settings(), rows()
    ours = run_loop(model, data, flags, tmp_path)
    assert ours == pytest.approx(oracle_losses(wrapped.train(), data, flags), rel=0, abs=1e-3)
    assert ours[-1] < ours[0] - 0.05
    lora.save_adapter(model, tmp_path / "trained")
    wrapped = peft.PeftModel.from_pretrained(bits_and_bytes(tmp_path / "base"), tmp_path / "trained")
    assert errors(model.eval(), wrapped.train()) < 1e-5


def test_merging_into_four_bits_leaves_them_and_comes_back_exactly(tmp_path):
    llama(tmp_path / "base", **WIDE)
    model = load_model(tmp_path / "base", quant="nf4")
    lora.add_lora(model, 4, 8.0, targets="q_proj,down_proj")
    for layer in lora.lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.05)
    with torch.no_grad():
        before = model(tokens())
        assert lora.merge(model) < 1e-5 and relative(model(tokens()), before) < 1e-5
        assert len(quantized_linears(model)) == 15
        lora.unmerge(model)
        assert len(quantized_linears(model)) == 21 and torch.equal(model(tokens()), before)
    lora.save_adapter(model, tmp_path / "adapter")
    adapter_files.remove_adapter(model)
    save_model(model, tmp_path / "4bit")
    said = []
    convert.merge_folder(tmp_path / "4bit", tmp_path / "adapter", tmp_path / "merged", torch.float32, said.append)
    assert said[0].startswith(f"NOTE: {tmp_path / '4bit'} is in NF4") and "rounding lost" in said[-1]
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    with torch.no_grad():
        assert relative(merged(tokens()).logits, before) < 1e-5
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    with pytest.raises(UserError, match="quantised already"):
        convert.folder_to_gguf(tmp_path / "4bit", tmp_path / "x.gguf")


def test_text_from_four_bits_is_that_of_the_numbers_they_stand_for(tmp_path):
    llama(tmp_path, **WIDE)
    for dtype in (torch.float32, torch.bfloat16):
        ours, plain = load_model(tmp_path, dtype, quant="nf4"), load_model(tmp_path, dtype)
        for name, layer in ours.named_modules():
            if isinstance(layer, Linear) and layer.nf4 is not None:
                plain.get_submodule(name).weight.data = dequantized_weight(layer.frozen, dtype)
        prompts = [[1, 2, 3], [4, 5]]
        assert ours.generate(prompts, 30) == plain.generate(prompts, 30)


# ---- whole runs, and folders that are damaged ----


@pytest.fixture
def job(tmp_path):
    chat_base(tmp_path / "base", hidden_size=64, intermediate_size=128)
    records = [{"instruction": sentence(i, 4), "output": sentence(i + 1, 3)} for i in range(24)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    return tmp_path


def test_a_run_in_four_bits_from_end_to_end(job, monkeypatch, capsys):
    words = [
        "--model",
        job / "base",
        "--data",
        job / "data.json",
        "--steps",
        3,
        "--out",
        job / "run",
        "--dtype",
        "fp32",
    ]
    out, err, code = command(train, monkeypatch, capsys, "--method", "qlora", *words)
    assert code == 0, err
    assert re.search(r"base +21 linears, [\d.]+ % of the model, in NF4: [\d.]+ MB; embeddings, norms and head in", out)
    assert "next      python generate.py" in out and "--quant nf4 --adapter" in out
    assert json.loads((job / "run" / "final" / "plaintune.json").read_text())["quant"] == "nf4"
    words = ["--model", job / "base", "--adapter", job / "run" / "final", "--quant", "nf4", "--dtype", "fp32"]
    out, err, code = command(evaluate, monkeypatch, capsys, "loss", "--data", job / "data.json", *words)
    assert code == 0 and "linears in NF4" in out and "NOTE" not in out, err
    out, err, code = command(evaluate, monkeypatch, capsys, "loss", "--data", job / "data.json", *words[:4], *words[6:])
    assert code == 0 and "final was trained on its base in nf4; --quant nf4 gives it that one" in out, err
    out, err, code = command(generate, monkeypatch, capsys, *words, "--prompt", "hello", "--max-new-tokens", 4)
    assert code == 0, err


def test_four_bits_are_not_trained_themselves(job, monkeypatch, capsys):
    words = ["--model", job / "base", "--data", job / "data.json", "--method", "full"]
    _, err, code = command(train, monkeypatch, capsys, *words, "--quant", "nf4")
    assert code == 2 and err.startswith("error: --quant: is for --method lora or qlora or ")
    save_model(load_model(job / "base", quant="nf4"), job / "4bit")
    _, err, code = command(train, monkeypatch, capsys, "--model", job / "4bit", *words[2:])
    assert code == 2 and "its weights are in 4 bits" in err and err.count("\n") == 1


NAME = "model.layers.0.mlp.up_proj.weight"
STATE = f"{NAME}.{quant.QUANT_STATE}"


def change_state(found: dict, **changes) -> None:
    state = json.loads(bytes(found[STATE].tolist())) | changes
    found[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


DAMAGE = {
    "no scales": lambda found: found.pop(f"{NAME}.absmax"),
    "no state": lambda found: found.pop(STATE),
    "a state that is no JSON": lambda found: found.update({STATE: torch.tensor([1, 2, 3], dtype=torch.uint8)}),
    "a state that is a list": lambda found: found.update({STATE: torch.tensor([91, 93], dtype=torch.uint8)}),
    "another type": lambda found: change_state(found, quant_type="fp4"),
    "other blocks": lambda found: change_state(found, blocksize=128),
    "another shape": lambda found: change_state(found, shape=[64, 192]),
    "an offset that is no number": lambda found: change_state(found, nested_offset=[1]),
    "codes cut off": lambda found: found.update({NAME: found[NAME][:-64]}),
    "codes that are numbers": lambda found: found.update({NAME: found[NAME].double()}),
    "scales cut off": lambda found: found.update({f"{NAME}.absmax": found[f"{NAME}.absmax"][:-1]}),
    "nested scales cut off": lambda found: found.update({f"{NAME}.nested_absmax": torch.zeros(0)}),
    "other numbers": lambda found: found.update({f"{NAME}.quant_map": torch.linspace(-1, 1, 16)}),
    "other nested numbers": lambda found: found.pop(f"{NAME}.nested_quant_map"),
    "an offset that is missing": lambda found: change_state(found, nested_offset=None),
    "an offset that is NaN": lambda found: change_state(found, nested_offset=float("nan")),
    "an offset that is infinite": lambda found: change_state(found, nested_offset=float("-inf")),
    "an offset beyond floats": lambda found: change_state(found, nested_offset=10**400),
    "an offset beyond float32": lambda found: change_state(found, nested_offset=1e39),
    "an offset that is a truth": lambda found: change_state(found, nested_offset=True),
    "an offset that is a text": lambda found: change_state(found, nested_offset="0.5"),
    "nested scales with NaN": lambda found: found[f"{NAME}.nested_absmax"].view(-1)[-1:].fill_(float("nan")),
    "nested scales with infinity": lambda found: found[f"{NAME}.nested_absmax"].view(-1)[:1].fill_(float("inf")),
    "a state that is one number": lambda found: found.update({STATE: torch.tensor(10**12)}),
    "a state of other numbers": lambda found: found.update({STATE: found[STATE].long()}),
    "a state in two dimensions": lambda found: found.update({STATE: found[STATE][None]}),
    "a state without end": lambda found: found.update({STATE: torch.full((1 << 17,), 32, dtype=torch.uint8)}),
}
# What the message says of some.
SAYS = {
    "an offset that is missing": "its quant_state.bitsandbytes__nf4 lacks nested_offset",
    "an offset that is NaN": "its nested_offset is nan, no float32",
    "an offset beyond floats": "its nested_offset is 1000",
    "nested scales with NaN": "its nested_absmax holds NaN or infinite numbers",
    "a state that is one number": "is no JSON of bitsandbytes",
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_folder_is_refused_by_name(tmp_path, kind):
    llama(tmp_path / "base", **WIDE)
    save_model(load_model(tmp_path / "base", quant="nf4"), tmp_path / "4bit")
    file = tmp_path / "4bit" / "model.safetensors"
    found = load_file(file)
    DAMAGE[kind](found)
    save_file(found, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=re.escape(NAME)) as error:
        load_model(tmp_path / "4bit")
    assert "\n" not in str(error.value) and SAYS.get(kind, NAME) in str(error.value)


def test_scales_in_float32_must_be_numbers_too(tmp_path):
    """Without double quantisation, as bitsandbytes writes it where it is not asked for."""
    llama(tmp_path / "base", **WIDE)
    save_model(load_model(tmp_path / "base", quant="nf4"), tmp_path / "4bit")
    file = tmp_path / "4bit" / "model.safetensors"
    found = load_file(file)
    for name in [name for name in found if ".nested_" in name]:
        found.pop(name)
    for name in [name for name in found if name.endswith(".absmax")]:
        found[name] = torch.full(found[name].shape, 0.1)
    save_file(found, file, metadata={"format": "pt"})
    load_model(tmp_path / "4bit")
    found[f"{NAME}.absmax"][3] = float("inf")
    save_file(found, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{NAME}: its absmax holds NaN or infinite numbers"):
        load_model(tmp_path / "4bit")


def test_parts_of_a_quantised_weight_that_belong_to_no_linear_are_refused(tmp_path):
    llama(tmp_path / "base", **WIDE)
    save_model(load_model(tmp_path / "base", quant="nf4"), tmp_path / "4bit")
    file = tmp_path / "4bit" / "model.safetensors"
    found = load_file(file)
    for name, said in (
        ("model.embed_tokens.weight.absmax", "of a quantised weight, and model.embed_tokens.weight is no linear's"),
        (f"model.norm.weight.{quant.QUANT_STATE}", "of a quantised weight, and model.norm.weight is no linear's"),
        ("model.zebra.weight.absmax", "tensors not part of the model: model.zebra.weight.absmax"),
    ):
        save_file(found | {name: torch.ones(3)}, file, metadata={"format": "pt"})
        with pytest.raises(UserError, match=re.escape(name)) as error:
            load_model(tmp_path / "4bit")
        assert said in str(error.value)


@pytest.mark.parametrize("method", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "bitsandbytes"}, "awq", [1]])
def test_other_quantisations_are_refused_by_name(tmp_path, method):
    llama(tmp_path, **WIDE)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"quantization_config": method}))
    with pytest.raises(UserError, match="of quantised bases, bitsandbytes' NF4 can be read"):
        load_model(tmp_path)


def test_a_quantised_weight_without_its_configuration_is_no_weight(tmp_path):
    llama(tmp_path / "base", **WIDE)
    save_model(load_model(tmp_path / "base", quant="nf4"), tmp_path / "4bit")
    raw = json.loads((tmp_path / "4bit" / "config.json").read_text())
    raw.pop("quantization_config")
    (tmp_path / "4bit" / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="has shape|not part of the model|holds U8"):
        load_model(tmp_path / "4bit")
    shutil.rmtree(tmp_path / "4bit")
