"""model.py against transformers: logits and greedy text, flat batches, the cache, sampling."""

import json

import pytest
import torch
import transformers
from support.helpers import SHAPES, llama, relative

import decoding
import lora
from checkpoint import load_model
from common.errors import UserError
from decoding import packed_weights, sample, sampling_probs
from interop.resolve import model_folder
from kernels.attention import Documents
from kernels.onednn_linear import can_pack
from model import Config, Linear
from tokenizer import load_tokenizer


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers(tmp_path, shape):
    theirs = llama(tmp_path, **SHAPES[shape])
    ours = load_model(tmp_path)
    tokens = torch.randint(0, 96, (2, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert relative(ours(tokens), theirs(tokens).logits) < 1e-5


def test_rope_scaling_moves_the_logits(tmp_path):
    """So that the parity above would notice it missing."""
    llama(tmp_path, **SHAPES["llama3_rope"])
    tokens = torch.randint(0, 96, (1, 200), generator=torch.Generator().manual_seed(1))
    scaled = load_model(tmp_path)(tokens)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw.pop("rope_parameters", None), raw.pop("rope_scaling", None)
    (tmp_path / "config.json").write_text(json.dumps(raw | {"rope_theta": 500_000.0}))
    assert relative(load_model(tmp_path)(tokens), scaled) > 1e-3


@pytest.mark.parametrize("shape", ["plain", "llama3_rope"])
def test_both_config_dialects_mean_the_same(tmp_path, shape):
    llama(tmp_path, **SHAPES[shape])
    raw = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in raw  # what transformers 5 writes
    old = {key: value for key, value in raw.items() if key not in ("rope_parameters", "dtype")}
    parameters = dict(raw["rope_parameters"])
    old["rope_theta"] = parameters.pop("rope_theta")
    old["rope_scaling"] = None if parameters["rope_type"] == "default" else parameters
    new, old = Config.from_hf(raw), Config.from_hf(old)
    assert new.ropes == old.ropes


@pytest.mark.parametrize("shape", ["plain", "llama3_rope"])
def test_logits_at_far_positions_equal_transformers(tmp_path, shape):
    """Where the last bit of a frequency is multiplied by the position."""
    far = SHAPES[shape] | {"max_position_embeddings": 131_072}
    theirs, ours = llama(tmp_path, **far), load_model(tmp_path)
    tokens = torch.randint(0, 96, (1, 40), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(40)[None] * 3_300
    with torch.no_grad():
        assert relative(ours(tokens, positions), theirs(tokens, position_ids=positions).logits) < 1e-5


ROPE = {"rope_type": "linear", "factor": 2.0}
MIXED = {  # what people's and converters' config.json hold besides the two dialects
    "theta beside rope_parameters": {"rope_parameters": ROPE, "rope_theta": 500_000.0},
    "theta inside rope_scaling": {"rope_scaling": ROPE | {"rope_theta": 500_000.0}},
    "both": {"rope_parameters": ROPE | {"rope_theta": 500_000.0}, "rope_scaling": ROPE | {"factor": 4.0}},
}


@pytest.mark.parametrize("case", MIXED)
def test_mixed_dialects_mean_what_transformers_takes_them_for(tmp_path, case):
    llama(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw = {key: value for key, value in raw.items() if key not in ("rope_parameters", "rope_theta")} | MIXED[case]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    tokens = torch.randint(0, 96, (1, 99), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert relative(load_model(tmp_path)(tokens), theirs(tokens).logits) < 1e-5


@pytest.mark.parametrize("key", [{"architectures": ["LlamaBiModel"]}, {"is_causal": False}])
def test_switches_that_would_be_ignored_are_refused(tmp_path, key):
    llama(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text()) | key
    with pytest.raises(UserError, match=next(iter(key))):
        Config.from_hf(raw)


def test_generation_leaves_the_mode_as_it_was(tmp_path):
    llama(tmp_path)
    model = load_model(tmp_path).train()
    model.generate([[1, 2, 3]], 2)
    assert model.training and all(module.training for module in model.modules())
    next(model.stream([[1, 2, 3]], 5))  # left in the middle
    assert model.training


@pytest.mark.parametrize("shape", ["tied", "grouped"])
def test_greedy_text_equals_transformers_token_by_token(tmp_path, shape):
    theirs, ours = llama(tmp_path, **SHAPES[shape]), load_model(tmp_path)
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(0, 96, (n,), generator=generator).tolist() for n in (1, 7, 30, 8)]
    batched = ours.generate(prompts, 40)
    for prompt, got in zip(prompts, batched, strict=True):
        wanted = theirs.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=40, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert got == wanted[0, len(prompt) :].tolist()
        assert ours.generate([prompt], 40) == [got]


def test_stop_ids_end_a_prompt_alone(tmp_path):
    llama(tmp_path)
    model = load_model(tmp_path)
    prompts = [[5, 6, 7], [8], [9, 10]]
    free = model.generate(prompts, 30)
    stop = free[1][3]
    for got, whole in zip(model.generate(prompts, 30, stop={stop}), free, strict=True):
        end = whole.index(stop) + 1 if stop in whole else len(whole)
        assert got == whole[:end]


def test_generation_ends_at_the_last_position(tmp_path):
    llama(tmp_path, max_position_embeddings=16)
    model = load_model(tmp_path)
    assert [len(row) for row in model.generate([[1] * 10, [1] * 15, [1]], 50)] == [6, 1, 15]
    with pytest.raises(UserError):
        model.generate([[1] * 16], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_example_sees_only_itself_and_padding_is_nothing(tmp_path, dtype):
    llama(tmp_path, **SHAPES["grouped"])
    model = load_model(tmp_path, dtype)
    generator = torch.Generator().manual_seed(3)
    a, b, c = (torch.randint(0, 96, (n,), generator=generator) for n in (5, 11, 40))
    tokens, segments = torch.zeros(2, 50, dtype=torch.int64), torch.full((2, 50), -1)
    tokens[0, :16], segments[0, :5], segments[0, 5:16] = torch.cat([a, b]), 0, 1
    tokens[1, 3:43], segments[1, 3:43] = c, 0  # padded on the left as well
    with torch.no_grad():
        packed = model(tokens, segments=segments)
        for row, start, example in ((0, 0, a), (0, 5, b), (1, 3, c)):
            alone = model(example[None])[0]
            tolerance = 1e-5 if dtype == torch.float32 else 2e-2
            assert relative(packed[row, start : start + len(example)].float(), alone.float()) < tolerance
        assert not packed[0, 16:].any()
        tokens[0, 2] += 1
        moved = model(tokens, segments=segments)
        assert torch.equal(moved[0, 5:16], packed[0, 5:16]) and not torch.equal(moved[0, 2:5], packed[0, 2:5])


def test_kept_rows_are_the_same_rows(tmp_path):
    llama(tmp_path)
    model = load_model(tmp_path)
    tokens = torch.arange(24).view(2, 12)
    segments = torch.zeros_like(tokens)
    segments[1, 6:] = -1
    keep = torch.tensor([13, 0, 17, 5])
    with torch.no_grad():
        everything = model(tokens, segments=segments).flatten(0, 1)
        assert torch.equal(model(tokens, segments=segments, keep=keep), everything[keep])


def test_flat_batches_ignore_how_documents_are_grouped(tmp_path):
    """Long and short neighbours form several padded groups; the numbers must not know."""
    llama(tmp_path, **SHAPES["grouped"])
    model = load_model(tmp_path)
    lengths = [3, 60, 61, 2, 9, 9]
    tokens = torch.randint(0, 96, (sum(lengths),), generator=torch.Generator().manual_seed(4))
    assert len(Documents(lengths).groups) > 1
    flat = model.logits(model.flat(tokens, Documents(lengths)))
    alone = torch.cat([model(part[None])[0] for part in tokens.split(lengths)])
    assert relative(flat, alone) < 1e-5


def test_sampling_follows_its_settings():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(20_000, 1)

    def share(**settings):
        ids = sample(logits, **({"temperature": 1.0, "top_k": 0, "top_p": 1.0, "generator": generator} | settings))
        return torch.bincount(ids, minlength=4) / len(ids)

    expected = logits[0].softmax(-1)
    assert torch.allclose(share(), expected, atol=0.015)
    assert torch.allclose(share(temperature=2.0), (logits[0] / 2).softmax(-1), atol=0.015)
    assert torch.allclose(share(top_k=2), torch.tensor([*(expected[:2] / expected[:2].sum()), 0, 0]), atol=0.015)
    assert torch.allclose(share(top_p=0.7), torch.tensor([*(expected[:2] / expected[:2].sum()), 0, 0]), atol=0.015)
    assert share(top_p=0.0)[0] == 1 and share(temperature=0.0)[0] == 1


@pytest.mark.parametrize(
    "settings", [{}, {"min_p": 0.1}, {"top_k": 9}, {"top_p": 0.6}, {"top_k": 20, "top_p": 0.9, "min_p": 0.05}]
)
def test_what_is_drawn_from_equals_transformers(settings):
    logits = 3 * torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    settings = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | settings
    wanted = transformers.TemperatureLogitsWarper(0.8)(None, logits)
    if settings["top_k"]:
        wanted = transformers.TopKLogitsWarper(settings["top_k"])(None, wanted)
    if settings["top_p"] < 1:
        wanted = transformers.TopPLogitsWarper(settings["top_p"])(None, wanted)
    if settings["min_p"]:
        wanted = transformers.MinPLogitsWarper(settings["min_p"])(None, wanted)
    got = sampling_probs(logits, 0.8, **settings)
    assert torch.allclose(got, wanted.softmax(-1), atol=1e-6)
    leaves_out = settings != {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    assert ((got == 0).sum(-1) > 0).all() == leaves_out


def test_repetition_penalty_equals_transformers(tmp_path):
    theirs, ours = llama(tmp_path), load_model(tmp_path)
    wanted = theirs.generate(
        torch.tensor([[3, 4, 5]]), attention_mask=torch.ones(1, 3), max_new_tokens=20, do_sample=False,
        repetition_penalty=1.3, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    got = ours.generate([[3, 4, 5]], 20, repetition_penalty=1.3)[0]
    assert got == wanted[0, 3:].tolist() and got != ours.generate([[3, 4, 5]], 20)[0]


def test_the_default_base_on_real_text():
    folder = model_folder(None)
    ours, tokenizer = load_model(folder), load_tokenizer(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = (
        "The tides are caused by the Moon:\n1. Water on the near side is pulled more strongly.\n2. It happened in 1969."
    )
    prompts = [tokenizer.encode(text), tokenizer.render([{"role": "user", "content": "Name a colour."}], None, True)[0]]
    with torch.no_grad():
        for prompt in prompts:
            assert relative(ours(torch.tensor([prompt])), theirs(torch.tensor([prompt])).logits) < 1e-5
    for prompt, got in zip(prompts, ours.generate(prompts, 20), strict=True):
        ids = torch.tensor([prompt])
        settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        wanted = theirs.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        assert got == wanted[0, len(prompt) :].tolist()


def test_look_up_takes_fewer_passes(monkeypatch):
    """What is guessed right costs one pass for all; the text is the same, with a penalty and with ends too."""
    folder, passes = model_folder(None), []
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    run = decoding.KVCache.run
    monkeypatch.setattr(decoding.KVCache, "run", lambda self, tokens: passes.append(tokens.shape) or run(self, tokens))
    prompt = tokenizer.encode("red, green, blue, white, black; " * 4 + "red,")
    free = model.generate([prompt], 24)[0]
    assert tokenizer.decode(free).startswith(" green, blue, white, black; red,") and len(passes) == 23
    for settings in ({}, {"repetition_penalty": 1.01}, {"stop": {free[9]}}):
        wanted = model.generate([prompt], 24, **settings)
        passes.clear()
        assert model.generate([prompt], 24, lookup=5, **settings) == wanted
        assert len(passes) < 10 and (1, 6) in passes


@pytest.mark.parametrize("targets", [None, "all", "q_proj", "down_proj"])
def test_packed_weights_write_the_same_text_and_go_again(targets, tmp_path):
    """In bf16 on CPUs products are made with re-ordered copies while a text is written, adapters' bases included."""
    llama(tmp_path, hidden_size=128, std=0.05, attention_bias=True)
    model = load_model(tmp_path, torch.bfloat16)
    if targets:
        lora.add_lora(model, 4, 8.0, targets=targets)
        for layer in lora.lora_layers(model).values():
            torch.nn.init.normal_(layer.lora_B, std=0.05)
    prompts = [[1, 2, 3], [4, 5]]
    stream = model.stream(prompts, 30)
    first = next(stream)
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    attention, can = model.blocks[1].attention, can_pack(model.embed.weight, 0)
    fused = targets not in ("all", "q_proj")
    assert any("forward" in vars(module) for module in linears) == can
    assert ("project" in vars(attention)) == (can and fused) and ("uncapped_logits" in vars(model)) == can
    if targets == "all":
        assert all("forward" in vars(layer) for layer in lora.lora_layers(model).values()) == can
    got = [step for step in (first, *stream)]
    replaced = {"forward", "forward_shared", "project", "uncapped_logits"}
    assert not any(replaced & set(vars(module)) for module in model.modules())
    texts = [[token for step in got for row, token in step if row == i] for i in (0, 1)]
    with packed_weights(model, 30):  # several calls share one copy
        packed_head = vars(model).get("uncapped_logits")
        assert (packed_head is not None) == can
        assert model.generate(prompts, 30) == texts and vars(model).get("uncapped_logits") is packed_head
    assert not any(replaced & set(vars(module)) for module in model.modules())
    assert not any(table.is_inference() for table in model.inv_freqs.values())
    for prompt, text in zip(prompts, texts, strict=True):  # each token is the likeliest, or within bf16 of it
        logits = model(torch.tensor([prompt + text]))[0, len(prompt) - 1 : -1].float()
        chosen = logits.gather(1, torch.tensor(text)[:, None])[:, 0]
        assert float((logits.max(-1).values - chosen).max()) <= 0.02 * float(logits.abs().max())
