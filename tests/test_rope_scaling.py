"""--rope-scaling: a base stretched for longer texts computes what transformers computes from the saved configuration,
and whoever loads the result finds it stretched."""

import ast
import json
import re

import pytest
import torch
import transformers
from peft import PeftModel
from support.helpers import chat_base, command, llama, output_of, refusal_of, relative
from support.runs import lines, records
from transformers import AutoModelForCausalLM

import convert
import evaluate
import generate
import train
from checkpoint import load_model, read_config
from interop.resolve import base_folder
from lora import load_adapter, merge

QUICK = ("--steps", 3, "--eval-every", 0, "--dtype", "fp32", "--device", "cpu", "--compile", "off", "--batch-size", 4)
IDS = torch.randint(3, 300, (2, 180), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base of 64 positions in transformers 5's form, and records."""
    folder = tmp_path_factory.mktemp("rope")
    chat_base(folder / "base", max_position_embeddings=64)
    records(folder / "train.jsonl", 24, 0)
    return folder


def words(files, out, *more) -> list:
    return ["--model", files / "base", "--data", files / "train.jsonl", *QUICK, "--out", out, *more]


@pytest.mark.parametrize("kind", ["yarn=4", "linear=3", "dynamic=2.5"])
def test_a_whole_model_is_what_transformers_makes_of_its_folder(files, tmp_path, monkeypatch, capsys, kind):
    out = output_of(
        train, monkeypatch, capsys, *words(files, tmp_path / "run", "--method", "full", "--rope-scaling", kind)
    )
    final = tmp_path / "run" / "final"
    name, factor = kind.split("=")
    longest = int(64 * float(factor))
    assert f"rope      {kind}: texts of up to {longest} tokens, 64 before" in out
    config = read_config(final)
    assert config.max_positions == longest and config.ropes[0].scaling["rope_type"] == name
    ids = IDS[:, : min(180, longest)]
    theirs = AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32).eval()
    with torch.no_grad():
        assert relative(load_model(final)(ids), theirs(ids).logits) < 1e-5
    plain = load_model(files / "base", dtype=torch.float32)
    with torch.no_grad():
        stretched = load_model(final)
        short = ids[:, :60]
        # Of a short text dynamic scaling changes nothing but what was trained.
        difference = relative(stretched(short), plain(short))
    assert difference < 0.2 if name == "dynamic" else difference > 0.2


@pytest.mark.parametrize("older", [False, True])
def test_yarn_says_the_length_before_and_after(tmp_path, older):
    from interop.rope_scaling import stretched_config

    llama(tmp_path, rope_theta=5e5)
    raw = json.loads((tmp_path / "config.json").read_text())
    if older:
        raw["rope_theta"] = raw.pop("rope_parameters")["rope_theta"]
    before = json.dumps(raw)
    changed = stretched_config(raw, 256, "yarn", 4.0)
    assert json.dumps(raw) == before
    scaling = changed["rope_scaling" if older else "rope_parameters"]
    assert (scaling["rope_type"], scaling["factor"], scaling["original_max_position_embeddings"]) == ("yarn", 4, 256)
    assert changed["max_position_embeddings"] == 1024
    (tmp_path / "config.json").write_text(json.dumps(changed))
    mine = read_config(tmp_path)
    assert mine.max_positions == 1024 and mine.ropes[0].theta == 5e5
    # transformers warns where its two ways to know the factor differ.
    assert transformers.AutoConfig.from_pretrained(tmp_path).max_position_embeddings == 1024


def test_layers_with_windows_are_left_as_they_are(tmp_path):
    from interop.rope_scaling import stretched_config, stretched_folder

    config = transformers.Gemma3TextConfig(
        vocab_size=96, hidden_size=64, intermediate_size=112, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128, sliding_window=32,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Gemma3ForCausalLM(config).eval().save_pretrained(tmp_path / "base")
    raw = json.loads((tmp_path / "base" / "config.json").read_text())
    changed = stretched_config(raw, 128, "linear", 2.0)
    assert changed["rope_parameters"]["sliding_attention"] == raw["rope_parameters"]["sliding_attention"]
    folder = stretched_folder(tmp_path / "base", "linear=2")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(0, 96, (1, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert relative(load_model(folder)(ids), theirs(ids).logits) < 1e-5


@pytest.fixture(scope="module")
def adapter_run(files, tmp_path_factory):
    """A run of LoRA on the stretched base, with texts beyond the base's own length."""
    long = files / "long.jsonl"
    text = "the red fox jumps over the lazy dog " * 7
    long.write_text("".join(json.dumps({"prompt": f"{i} {text}", "completion": "dog"}) + "\n" for i in range(24)))
    out = tmp_path_factory.mktemp("adapter") / "run"
    with pytest.MonkeyPatch.context() as patch:
        more = ("--rope-scaling", "yarn=4", "--rank", 4, "--data", long, "--save-every", 1)
        patch.setattr("sys.argv", ["train.py", *map(str, words(files, out, *more))])
        train.main()
    return out


def test_an_adapter_is_what_peft_makes_of_it_by_its_card(files, adapter_run):
    final = adapter_run / "final"
    card = (final / "README.md").read_text()
    assert "stretched for longer texts (yarn=4)" in card
    settings = re.search(r'from_pretrained\("BASE", (rope_parameters=\{.*?\}), (max_position_embeddings=\d+)\)', card)
    name, _, value = settings[1].partition("=")
    arguments = {name: ast.literal_eval(value), "max_position_embeddings": int(settings[2].partition("=")[2])}
    base = AutoModelForCausalLM.from_pretrained(files / "base", dtype=torch.float32, **arguments)
    theirs = PeftModel.from_pretrained(base, final).eval()
    # Without --model, and with it.
    for named in (None, str(files / "base")):
        mine = load_model(base_folder(named, final))
        load_adapter(mine, final)
        with torch.no_grad():
            assert relative(mine(IDS), theirs(IDS).logits) < 1e-5
    assert "--hf-overrides" in card


def test_texts_beyond_the_old_length_train_and_are_merged_answered_and_scored(
    files, adapter_run, tmp_path, monkeypatch, capsys
):
    assert max(line["tokens"] for line in lines(adapter_run) if "tokens" in line) > 4 * 64
    output_of(convert, monkeypatch, capsys, "merge", adapter_run / "final", tmp_path / "merged")
    assert read_config(tmp_path / "merged").max_positions == 256
    mine = load_model(base_folder(None, adapter_run / "final"))
    load_adapter(mine, adapter_run / "final")
    merge(mine)
    with torch.no_grad():
        assert relative(load_model(tmp_path / "merged", dtype=torch.float32)(IDS), mine(IDS)) < 1e-4
    data = ("--data", files / "long.jsonl", "--dtype", "fp32", "--limit", 4)
    out = output_of(
        evaluate, monkeypatch, capsys, "loss", "--adapter", adapter_run / "final", "--versus", "base", *data
    )
    assert "longer than" not in out
    prompt = ("--prompt", "the red fox jumps over the lazy dog " * 7, "--max-new-tokens", 2)
    output_of(generate, monkeypatch, capsys, "--adapter", adapter_run / "final", *prompt)


def test_a_resumed_run_and_one_from_its_adapter_go_on_stretched(files, adapter_run, tmp_path, monkeypatch, capsys):
    out = output_of(train, monkeypatch, capsys, "--out", adapter_run, "--resume", "--steps", 5)
    assert "rope      yarn=4" in out and lines(adapter_run)[-1]["step"] == 5
    more = ["--adapter", adapter_run / "final", "--data", files / "long.jsonl", *QUICK, "--out", tmp_path / "more"]
    out = output_of(train, monkeypatch, capsys, *more)
    assert "rope      yarn=4" in out
    assert json.loads((tmp_path / "more" / "final" / "plaintune.json").read_text())["rope_scaling"] == "yarn=4"
    refused = refusal_of(train, monkeypatch, capsys, *more, "--overwrite", "--rope-scaling", "yarn=2")
    assert "is scaled already (yarn by 4, up to 256 tokens)" in refused


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("yarn", "--rope-scaling yarn: yarn=FACTOR or linear=FACTOR or dynamic=FACTOR is wanted, as yarn=4"),
        ("llama3=8", "--rope-scaling llama3=8: yarn=FACTOR or"),
        ("yarn=x", "--rope-scaling yarn=x: the factor must be above 1 and at most 1024"),
        ("yarn=1", "the factor must be above 1"),
        ("linear=nan", "the factor must be above 1"),
        ("linear=1e9", "the factor must be above 1"),
        ("yarn=2 --seq-len 129", "--seq-len 129: the model has 128 positions"),
    ],
)
def test_what_is_no_scaling_ends_with_one_line(files, tmp_path, monkeypatch, capsys, typed, said):
    refused = refusal_of(train, monkeypatch, capsys, *words(files, tmp_path / "run", "--rope-scaling", *typed.split()))
    assert said in refused and not (tmp_path / "run").exists()


def test_bases_that_can_not_be_stretched_are_refused(files, tmp_path, monkeypatch, capsys):
    scaled = chat_base(tmp_path / "scaled", rope_scaling={"rope_type": "linear", "factor": 2.0})
    wanted = ["--rope-scaling", "yarn=2", "--model", scaled]
    refused = refusal_of(train, monkeypatch, capsys, *words(files, tmp_path / "run"), *wanted)
    assert f"{scaled} is scaled already (linear by 2, up to 1,024 tokens)" in refused
    learned = chat_base(tmp_path / "learned")
    config = transformers.GPT2Config(vocab_size=306, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(learned)
    refused = refusal_of(train, monkeypatch, capsys, *words(files, tmp_path / "run"), *wanted[:2], "--model", learned)
    assert f"{learned} has no rotary positions (gpt2)" in refused


def test_a_base_that_is_replaced_is_stretched_anew_and_is_never_changed(tmp_path, monkeypatch):
    from interop.rope_scaling import stretched_folder

    monkeypatch.setenv("PLAINTUNE_CACHE", str(tmp_path / "cache"))
    base = tmp_path / "base"
    llama(base)
    modes = {file.name: (file.read_bytes(), file.stat().st_mode) for file in base.iterdir()}
    first = stretched_folder(base, "yarn=2")
    assert stretched_folder(base, "yarn=2") == first and stretched_folder(base, "yarn=3") != first
    assert {file.name: (file.read_bytes(), file.stat().st_mode) for file in base.iterdir()} == modes
    llama(base, seed=1)
    other = stretched_folder(base, "yarn=2")
    assert other != first
    assert torch.equal(load_model(other).embed.weight, load_model(base).embed.weight)


def test_a_plan_is_of_the_stretched_model(files, tmp_path, monkeypatch, capsys):
    plan = words(files, tmp_path / "run", "--rope-scaling", "yarn=4", "--seq-len", 200, "--plan")
    out, err, code = command(train, monkeypatch, capsys, *plan)
    assert code == 0, err
    assert "rope      yarn=4" in out
