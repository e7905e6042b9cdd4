"""Every family against transformers (eager attention, fp32), on random checkpoints drawn large: weights, norms and
biases with a standard deviation of about 0.3, so that a feature which is left out shows. Which features that are stands
in CASES; `test_families_every_feature_shows` switches each off and looks.

    pytest -k families -s       prints the table of worst errors
"""

import dataclasses
import functools
import json
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from support.family_cases import CASES, IDS, SIZES
from support.helpers import record_graphs, relative
from support.training_runs import oracle_losses, rows, run_loop, settings
from torch import nn

import adapter_files
import decoding
import lora
from checkpoint import hf_name, load_model, save_model, transposed
from families import FAMILIES, Config

LENGTH = 60  # tokens, beyond the windows below


# ---- what switching a feature off means: functions of a loaded model ----


WORST: dict[str, dict[str, float]] = {}


def make(folder, case: str, std: float = 0.3):
    """The random checkpoint of a case, written by transformers; returns its model."""
    family, changes, _ = CASES[case]
    sizes = (
        {"vocab_size": 96, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 256} if family == "gpt2" else SIZES
    )
    settings = transformers.CONFIG_MAPPING[family](**(sizes | IDS | changes), attn_implementation="eager")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "norm" in name or ".ln_" in name
            parameter.normal_(1.0 if norm and name.endswith("weight") and "gemma" not in family else 0.0, std)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    columns = (
        "logits",
        "old dialect",
        "saved and back",
        "gradients",
        "adapter to peft",
        "adapter of peft",
        "least feature",
    )
    print("\n\n" + "worst relative error".ljust(26) + "".join(column.rjust(16) for column in columns))
    for case, errors in WORST.items():
        cells = (f"{errors[column]:.1e}" if column in errors else "" for column in columns)
        print(case.ljust(26) + "".join(cell.rjust(16) for cell in cells))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return functools.cache(lambda case: (folder := tmp_path_factory.mktemp("base"), make(folder, case)))


def tokens(rows: int = 2) -> torch.Tensor:
    return torch.randint(3, 96, (rows, LENGTH), generator=torch.Generator().manual_seed(1))


def note(case: str, column: str, error: float) -> float:
    WORST.setdefault(case, {})[column] = error
    return error


def errors(ours, theirs) -> float:
    with torch.no_grad():
        return relative(ours(tokens()), theirs(tokens()).logits)


def test_families_are_all_here():
    assert {family for family, _, _ in CASES.values()} == {*FAMILIES}


@pytest.mark.parametrize("case", CASES)
def test_families_logits_equal_transformers(folders, case):
    folder, theirs = folders(case)
    assert note(case, "logits", errors(load_model(folder), theirs)) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_families_every_feature_shows(folders, case):
    folder, _ = folders(case)
    with torch.no_grad():
        whole = load_model(folder)(tokens())
        for feature, switch_off in CASES[case][2].items():
            model = load_model(folder)
            switch_off(model)
            moved = relative(model(tokens()), whole)
            assert moved > 1e-3, feature
            note(case, "least feature", min(moved, WORST.get(case, {}).get("least feature", 1e9)))


def old_dialect(raw: dict) -> dict:
    """config.json as transformers 4 wrote it."""
    new = ("rope_parameters", "dtype", "layer_types", "transformers_version", "_sliding_window_pattern")
    old = {key: value for key, value in raw.items() if key not in new}
    old["torch_dtype"] = raw["dtype"]
    rope = dict(raw.get("rope_parameters") or {})
    gemma = raw["model_type"] == "gemma3_text"
    if gemma:
        old |= {"rope_local_base_freq": rope["sliding_attention"]["rope_theta"], "sliding_window_pattern": 6}
        rope = dict(rope["full_attention"])
    part, theta = rope.pop("partial_rotary_factor", None), rope.pop("rope_theta", None)
    if raw["model_type"] == "gpt_neox":
        old |= {"rotary_pct": part, "rotary_emb_base": theta}
    elif raw["model_type"] != "gpt2":
        old |= {"rope_theta": theta} | ({"partial_rotary_factor": part} if raw["model_type"] == "phi3" else {})
        kind = rope.pop("rope_type")
        rope["rope_type" if gemma else "type"] = kind  # the earliest name; of Gemma 3 there never was one
        rope.pop("original_max_position_embeddings", None) if raw["model_type"] == "phi3" else None
        old["rope_scaling"] = None if kind == "default" else rope
    if raw["model_type"] == "qwen3_moe":
        old["num_experts"] = old.pop("num_local_experts")
    return old


@pytest.mark.parametrize("case", CASES)
def test_families_old_dialect_means_the_same(folders, case, tmp_path):
    folder, _ = folders(case)
    raw = json.loads((folder / "config.json").read_text())
    new, old = Config.from_hf(raw), Config.from_hf(old_dialect(raw))
    assert dataclasses.replace(old, raw=raw) == new
    (tmp_path / "config.json").write_text(json.dumps(old_dialect(raw)))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert note(case, "old dialect", errors(load_model(tmp_path), theirs)) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_families_saved_folder_loads_in_transformers(folders, case, tmp_path):
    folder, _ = folders(case)
    ours = load_model(folder)
    save_model(ours, tmp_path / "saved")
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs, info = load(tmp_path / "saved", attn_implementation="eager", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert note(case, "saved and back", errors(ours, theirs.eval())) < 1e-5
    again = load_model(tmp_path / "saved")
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_families_gradients_equal_transformers(folders, case):
    folder, theirs = folders(case)
    ours, theirs = load_model(folder), theirs.eval()
    weights = torch.randn(2, LENGTH, 96, generator=torch.Generator().manual_seed(2))
    (ours(tokens()) * weights).sum().backward()
    theirs.zero_grad()
    (theirs(tokens()).logits * weights).sum().backward()
    wanted = {name.replace("gpt_neox.embed_out", "embed_out"): p for name, p in theirs.named_parameters()}
    compared, worst = 0, 0.0
    for name, parameter in ours.named_parameters():
        other = wanted.get(hf_name(ours, name))
        if other is not None:
            compared += 1
            grad = other.grad.t() if transposed(ours, name) else other.grad
            worst = max(worst, relative(parameter.grad, grad))
    assert compared > 20 and note(case, "gradients", worst) < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_families_greedy_text_equals_transformers(folders, case):
    """Prompts of different lengths together, one by one, padded on either side, and with look-up: beyond windows and
    where the turns of long texts begin."""
    folder, theirs = folders(case)
    ours, generator = load_model(folder), torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 96, (n,), generator=generator).tolist() for n in (5, 30, 17)]
    prompts[1][15:] = prompts[1][:15]  # something for look-up to find
    together = ours.generate(prompts, 25)
    for prompt, got in zip(prompts, together, strict=True):
        settings = {"max_new_tokens": 25, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        ids = torch.tensor([prompt])
        wanted = theirs.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        assert got == wanted[0, len(prompt) :].tolist()
        assert ours.generate([prompt], 25) == [got]
    assert ours.generate(prompts, 25, lookup=4) == together
    pads = [[0] * (30 - len(prompt)) for prompt in prompts]
    left = torch.tensor([pad + prompt for pad, prompt in zip(pads, prompts)])
    right = torch.tensor([prompt + pad for pad, prompt in zip(pads, prompts)])
    for padded, mask in ((left, [[0] * len(p) + [1] * (30 - len(p)) for p in pads]),
                         (right, [[1] * (30 - len(p)) + [0] * len(p) for p in pads])):  # fmt: skip
        assert ours.generate(padded, 25, mask=torch.tensor(mask)) == together


@pytest.mark.parametrize("case", CASES)
def test_families_replayed_steps_write_the_same_text(folders, case, monkeypatch):
    """As on a GPU, with the operations of one recorded step for all, rings and a cache that grows included; where the
    angles depend on the length, or experts on numbers that the host reads, steps are not captured."""
    ours, generator = load_model(folders(case)[0]), torch.Generator().manual_seed(5)
    there = SimpleNamespace(device=torch.device("cuda"), config=ours.config)
    can = not stretched(ours) and ours.config.experts is None
    assert decoding.can_run_ahead(there) == can and not decoding.can_run_ahead(ours)
    if not can:
        return
    prompts = [torch.randint(3, 96, (n,), generator=generator).tolist() for n in (5, 30, 17)]
    wanted = [*ours.stream(prompts, 40)]
    graphs = record_graphs(monkeypatch)
    assert [*ours.stream(prompts, 40)] == wanted
    grows = any(layer.window is None for layer in ours.config.layers)  # rings of so few slots are full from the start
    assert len(graphs) > grows and sum(graph.replays for graph in graphs) == 39 - len(graphs)


@pytest.mark.parametrize("case", CASES)
def test_families_compute_shared_beginnings_once(folders, case, monkeypatch):
    """Prompts that begin alike, are the same, or are another's beginning; and a cache that grows at each step."""
    ours, generator = load_model(folders(case)[0]), torch.Generator().manual_seed(4)
    first, *ends = (torch.randint(3, 96, (n,), generator=generator).tolist() for n in (14, 9, 3, 17))
    prompts = [first + ends[0], first + ends[1] + ends[2], first, first + ends[1], ends[2], first]
    alone = [ours.generate([prompt], 20)[0] for prompt in prompts]
    monkeypatch.setattr(decoding, "CACHE_ROUND", 2)
    hidden, passes = ours.hidden, []
    monkeypatch.setattr(ours, "hidden", lambda ids, *more: passes.append(ids.tolist()) or hidden(ids, *more))
    assert ours.generate(prompts, 20) == alone
    if stretched(ours):  # only prompts of the same length can have the same angles
        assert len(passes[0]) == 105
    else:
        assert passes[0] == first + ends[0] + ends[1] + ends[2] + ends[2]
    assert len(passes[1]) == len(prompts)


def stretched(model) -> bool:
    """Whether the angles of the first tokens depend on how many follow."""
    return any((rope.scaling or {}).get("rope_type") in ("dynamic", "longrope") for rope in model.config.ropes)


# ---- adapters ----


def targets_of(case: str) -> str | list[str]:
    """What peft can adapt as well: in transformers 5 experts are no modules, so that only attention is."""
    return ["q_proj", "k_proj", "v_proj", "o_proj"] if CASES[case][0] in ("mixtral", "qwen3_moe") else "all"


@pytest.mark.parametrize("case", CASES)
def test_families_adapters_load_in_peft(folders, case, tmp_path):
    folder, _ = folders(case)
    ours = load_model(folder)
    lora.add_lora(ours, 4, 6.0, targets=targets_of(case))
    torch.manual_seed(5)
    for layer in lora.lora_layers(ours).values():
        nn.init.normal_(layer.lora_B, std=0.05)
    lora.save_adapter(ours, tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert note(case, "adapter to peft", errors(ours, theirs)) < 2e-5
    assert relative(ours(tokens()), load_model(folder)(tokens())) > 1e-3
    unmerged = ours(tokens())
    lora.merge(ours)
    assert relative(ours(tokens()), unmerged) < 2e-5


@pytest.mark.parametrize("case", CASES)
def test_families_adapters_of_peft_load_here(folders, case, tmp_path):
    folder, _ = folders(case)
    ours = load_model(folder)
    names = lora.add_lora(ours, 4, 6.0, targets=targets_of(case))
    adapter_files.remove_adapter(ours)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    torch.manual_seed(6)
    settings = peft.LoraConfig(r=3, lora_alpha=5, target_modules=names, fan_in_fan_out=ours.config.conv1d)
    theirs = peft.get_peft_model(base, settings).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    theirs.save_pretrained(tmp_path)
    lora.load_adapter(ours, tmp_path)
    assert note(case, "adapter of peft", errors(ours, theirs)) < 2e-5
    assert relative(ours(tokens()), load_model(folder)(tokens())) > 1e-3


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe"])
def test_families_experts_take_lora(folders, case, tmp_path):
    folder, _ = folders(case)
    model = load_model(folder)
    names = lora.add_lora(model, 4, 6.0)
    assert sum("experts.3." in name for name in names) == 3 * (4 if case == "mixtral" else 3)
    assert not any(name.endswith("gate") for name in names)  # the router
    before = model(tokens(40))
    (before * torch.randn(before.shape, generator=torch.Generator().manual_seed(7))).sum().backward()
    assert all(layer.lora_B.grad.any() for layer in lora.lora_layers(model).values())
    for layer in lora.lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.05)
    lora.save_adapter(model, tmp_path / "adapter")
    again = load_model(folder)
    lora.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again(tokens()), model(tokens()))
    lora.merge(model)
    assert relative(model(tokens()), again(tokens())) < 2e-5


SILENT = {  # what a config.json must say; the rest is left to the family's defaults
    "gpt2": {"vocab_size": 96, "n_embd": 64, "n_layer": 8, "n_head": 8},
    "mixtral": {"num_key_value_heads": 8},
    "gemma": {"num_attention_heads": 16},
    "qwen2": {"num_attention_heads": 32},
    "qwen3": {"num_attention_heads": 32},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_unsaid_values_are_those_of_transformers(family):
    """A config.json that is silent about all that it may be silent about means what transformers takes it for."""
    said = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 8, "num_attention_heads": 8}
    said = SILENT["gpt2"] if family == "gpt2" else said | SILENT.get(family, {})
    said |= {} if family in ("gpt2", "falcon") else {"intermediate_size": 112}
    theirs = transformers.CONFIG_MAPPING[family](**said).to_dict()
    silent = Config.from_hf(said | {"model_type": family})
    assert dataclasses.replace(silent, raw=theirs) == Config.from_hf(theirs)


# ---- training ----


@pytest.mark.parametrize("case", ["gemma2", "mixtral", "qwen3_moe", "gpt2"])
def test_families_training_equals_transformers(tmp_path, case):
    """Ten steps of full fine-tuning, with the balance loss where experts are routed, at a weight that shows."""
    theirs = make(tmp_path / "base", case, std=0.1).train()
    for module in theirs.modules():
        if isinstance(module, nn.Dropout):  # GPT-2's configuration has some, which plays no part here
            module.p = 0.0
    ours = load_model(tmp_path / "base")
    balance = 0.3 if ours.config.experts else 0.0
    if balance:
        ours.config = dataclasses.replace(
            ours.config, experts=dataclasses.replace(ours.config.experts, balance=balance)
        )
    flags, data = settings(method="full", lr=3e-3, steps=10), rows()
    for example in data.examples:  # transformers gives the padding token's row of the embedding no gradient
        example.ids = [3 if token == 0 else token for token in example.ids]
    wanted = oracle_losses(theirs, data, flags, balance=balance)
    assert run_loop(ours, data, flags, tmp_path) == pytest.approx(wanted, rel=0, abs=1e-4)
    if balance:
        written = [json.loads(line)["balance_loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert all(ours.config.experts.active * 0.9 < value < ours.config.experts.count for value in written)
        assert wanted != pytest.approx(
            oracle_losses(make(tmp_path / "again", case, std=0.1).train(), data, flags), rel=0, abs=1e-4
        )
