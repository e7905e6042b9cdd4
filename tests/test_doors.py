"""Every door through which an adapter meets a base: merge, to-gguf, adapter-to-gguf, generate, evaluate, train. Each
refuses what can't be right before anything is written, and says what differs from what the adapter was trained on.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.helpers import chat_base, command, llama, sentence

import adapter_files
import checkpoint
import convert
import data
import evaluate
import generate
import lora
import train
from checkpoint import load_model, save_model
from common.errors import UserError
from common.files import write_json
from evals.loss import loss
from interop.resolve import trained_day
from kernels.nf4 import dequantized_weight
from tokenizer import load_tokenizer

DOORS = ("merge", "to-gguf", "adapter-to-gguf", "generate", "evaluate", "train")
UP = "model.layers.1.mlp.up_proj.weight"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 988097824\n"


def save_trained(model, folder, base, quant):
    """The adapter of a model as train.py leaves it."""

    def write_extra(tmp):
        checkpoint.copy_tokenizer(base, tmp)
        facts = {"base": str(base), "base_sha256": checkpoint.fingerprint(base), "method": "lora", "quant": quant}
        write_json(facts, tmp / "plaintune.json")

    lora.save_adapter(model, folder, write_extra)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """base/ with weights that 4 bits round coarsely; stored/ and nf4/, adapters of its two kinds of numbers; data."""
    folder = tmp_path_factory.mktemp("doors")
    chat_base(folder / "base", std=0.6, intermediate_size=128, num_hidden_layers=2)
    for kind in (None, "nf4"):
        model = load_model(folder / "base", quant=kind)
        lora.add_lora(model, 4, 8.0)
        torch.manual_seed(1)
        with torch.no_grad():
            for layer in lora.lora_layers(model).values():
                layer.lora_B.normal_(std=0.02)
        save_trained(model, folder / (kind or "stored"), folder / "base", kind)
    records = [{"instruction": sentence(i, 4), "output": sentence(i + 1, 3)} for i in range(20)]
    (folder / "data.json").write_text(json.dumps(records))
    return folder


@pytest.fixture
def go(home, tmp_path, monkeypatch, capsys):
    """go(door, adapter, base): the output of a script that puts an adapter on a base, stderr, and the exit code."""

    def run(door, adapter, base=home / "base", *more):
        out = tmp_path / "out"
        words = {
            "merge": (convert, "merge", base, adapter, out),
            "to-gguf": (convert, "to-gguf", base, out, "--adapter", adapter),
            "adapter-to-gguf": (convert, "adapter-to-gguf", adapter, out, "--model", base),
            "generate": (generate, "--prompt", "hi", "--max-new-tokens", 2),
            "evaluate": (evaluate, "loss", "--data", home / "data.json"),
            "train": (train, "--data", home / "data.json", "--steps", 1, "--out", out),
        }
        script, *rest = words[door]
        if script is not convert:
            rest += ["--model", base, "--adapter", adapter, "--dtype", "fp32"]
        return command(script, monkeypatch, capsys, *rest, *more)

    return run


def changed(folder, source, change, file="adapter_model.safetensors"):
    """A copy of a folder whose tensors were changed."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})
    return folder


def set_last(name, value):
    """A change of tensors: the last number of one becomes this value."""

    def change(found):
        found[name].view(-1)[-1] = value

    return change


def refused(answer, tmp_path) -> str:
    """The one line of a refusal, which left nothing behind."""
    _, err, code = answer
    assert code == 2 and not (tmp_path / "out").exists(), err
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    *_, line = err.splitlines()
    assert line.startswith("error: ") and "Traceback" not in err
    return line


# ---- numbers that are none ----


@pytest.mark.parametrize("door", DOORS)
def test_an_adapter_that_holds_no_numbers_is_refused_by_tensor(home, go, tmp_path, door):
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    for i, value in enumerate((float("nan"), float("inf"), -float("inf"))):
        folder = changed(tmp_path / f"bad{i}", home / "stored", set_last(name, value))
        line = refused(go(door, folder), tmp_path)
        assert f"{folder}/adapter_model.safetensors: {name} holds NaN or infinite weights" in line
    # Numbers in float64 that float32 can't hold.
    large = changed(
        tmp_path / "large", home / "stored", lambda found: found.update({name: found[name].double() + 1e300})
    )
    assert f"{name} holds NaN or infinite weights" in refused(go(door, large), tmp_path)


@pytest.mark.parametrize("door", [door for door in DOORS if door != "adapter-to-gguf"])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", UP])
def test_a_base_that_holds_no_numbers_is_refused_by_tensor(home, go, tmp_path, door, name):
    bad = changed(tmp_path / "bad", home / "base", lambda found: found[name].view(-1)[-1].fill_(float("nan")),
                  "model.safetensors")  # fmt: skip
    for adapter in ("stored", "nf4"):
        line = refused(go(door, home / adapter, bad), tmp_path)
        assert f"error: {bad}: {name} holds NaN or infinite weights" in line


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_to_nf4_and_folders_in_nf4_are_refused_too(home, tmp_path, value):
    bad = changed(
        tmp_path / "bad", home / "base", lambda found: found[UP].view(-1)[0].fill_(value), "model.safetensors"
    )
    with pytest.raises(UserError, match=f"{UP} holds NaN"):
        convert.to_nf4(bad, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_too_large_for_a_dtype_is_said_before_anything_is_written(tmp_path):
    llama(tmp_path / "base")
    large = changed(tmp_path / "large", tmp_path / "base", lambda found: found[UP].view(-1)[0].fill_(1e6),
                    "model.safetensors")  # fmt: skip
    with pytest.raises(UserError, match=f"{UP} holds weights too large for float16; compute in another --dtype"):
        load_model(large, torch.float16)
    with pytest.raises(UserError, match=f"{UP} is NaN, or too large for float16; not saved"):
        save_model(load_model(large), tmp_path / "out", torch.float16)
    model = load_model(tmp_path / "base")
    lora.add_lora(model, 4, 8.0, targets="up_proj")
    torch.nn.init.constant_(lora.lora_layers(model)[UP.removesuffix(".weight")].lora_B, 1e6)
    lora.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj: with the adapter's update .* too large for float16"):
        convert.merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", torch.float16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "large"]


# ---- tokens that the base has no embedding for ----


def add_token(folder, id):
    spec = json.loads((folder / "tokenizer.json").read_text())
    flags = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    spec["added_tokens"].append({"id": id, "content": f"<|new{id}|>"} | flags)
    (folder / "tokenizer.json").write_text(json.dumps(spec))


@pytest.mark.parametrize("door", DOORS)
def test_an_adapter_with_more_tokens_than_the_base_is_refused(home, go, tmp_path, door):
    folder = shutil.copytree(home / "stored", tmp_path / "more")
    rows = checkpoint.read_config(home / "base").vocab_size
    add_token(folder, rows)
    line = refused(go(door, folder), tmp_path)
    assert f"error: {folder}: token {rows} of the tokenizer is beyond the model's {rows}" in line
    # A base whose own tokenizer has a token that no text contains is no reason to refuse its adapters.
    base = shutil.copytree(home / "base", tmp_path / "base")
    add_token(base, rows)
    _, err, code = go(door, folder, base)
    assert code == 0, err


def test_a_token_of_the_base_alone_is_refused_where_a_text_has_it(home, tmp_path, monkeypatch, capsys):
    base = shutil.copytree(home / "base", tmp_path / "base")
    rows = checkpoint.read_config(base).vocab_size
    add_token(base, rows)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings["chat_template"] = settings["chat_template"].replace("{% for", f"<|new{rows}|>{{% for", 1)
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    words = ["--model", base, "--dtype", "fp32"]
    _, err, code = command(generate, monkeypatch, capsys, *words, "--prompt", "hi")
    assert code == 2 and err.splitlines()[-1].startswith(f"error: a prompt has token {rows}, which is beyond")
    for what in ("loss", "exact"):
        _, err, code = command(evaluate, monkeypatch, capsys, what, "--data", home / "data.json", *words)
        assert code == 2 and f"token {rows}" in err and err.count("\n") == 1


# ---- another base, other numbers ----


@pytest.mark.parametrize("door", DOORS)
def test_another_base_is_said_at_every_door(home, go, tmp_path, door):
    other = changed(tmp_path / "other", home / "base", lambda found: found[UP].mul_(1.5), "model.safetensors")
    out, err, code = go(door, home / "stored", other)
    warning = f"WARNING: {home / 'stored'} was trained on other weights than those of {other}"
    assert code == 0 and warning in out + err
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    if (tmp_path / "out").is_file():
        (tmp_path / "out").unlink()
    out, err, code = go(door, home / "stored")
    assert code == 0 and "WARNING" not in out + err and "NOTE" not in out + err


def test_an_adapter_of_peft_whose_name_for_its_base_is_another_is_noted(home, go, tmp_path):
    folder = shutil.copytree(home / "stored", tmp_path / "peft")
    (folder / "plaintune.json").unlink()
    file = folder / "adapter_config.json"
    for named, is_noted in (("org/zebra", True), ("org/base", False), (str(home / "base"), False)):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": named}))
        _, err, code = go("generate", folder)
        note = f"NOTE: {folder} names {named} as its base; whether {home / 'base'} holds the same weights is not known"
        assert code == 0 and (note in err) == is_noted


@pytest.mark.parametrize("door", DOORS)
def test_numbers_that_an_adapter_was_not_trained_on_are_said(home, go, door):
    said = {
        "merge": f"base      {home / 'base'} in nf4: {home / 'nf4'} was trained on the numbers of its 4 bits",
        "to-gguf": f"base      {home / 'base'} in nf4: {home / 'nf4'} was trained on the numbers of its 4 bits",
        "adapter-to-gguf": "was trained on its base in nf4, and llama.cpp adds it to the file that it is given",
    }
    out, err, code = go(door, home / "nf4")
    assert code == 0, err
    assert said.get(door, "was trained on its base in nf4; --quant nf4 gives it that one") in out + err


@pytest.mark.parametrize("door", ["generate", "evaluate", "train"])
def test_four_bits_under_an_adapter_of_the_stored_weights_are_said(home, go, door):
    out, err, code = go(door, home / "stored", home / "base", "--quant", "nf4")
    note = f"NOTE: {home / 'stored'} was trained on its base as it is stored, and here it is in nf4"
    assert code == 0 and note in out + err


def test_a_folder_in_nf4_and_what_it_was_made_from_are_one_base(home, go, tmp_path):
    said = []
    convert.to_nf4(home / "base", tmp_path / "4bit", print_fn=said.append)
    assert said == [] and trained_day(tmp_path / "4bit") == ""
    # The date that a model was trained to see in its prompts goes along.
    dated = shutil.copytree(home / "base", tmp_path / "dated")
    (dated / "plaintune.json").write_text('{"date": "2025-01-02"}')
    convert.to_nf4(dated, tmp_path / "dated 4bit")
    assert trained_day(tmp_path / "dated 4bit") == "2025-01-02"
    out, _, code = go("merge", home / "nf4", tmp_path / "4bit")
    assert code == 0 and f"base      {tmp_path / '4bit'} is in NF4, as the base of {home / 'nf4'} was" in out
    assert "WARNING" not in out and "NOTE" not in out
    # And the other way: trained on the folder in NF4, put on what that was made from.
    model = load_model(tmp_path / "4bit")
    lora.add_lora(model, 4, 8.0)
    facts = adapter_files.base_numbers(model)
    assert facts == {"quant": "nf4", "quantized_from_sha256": checkpoint.fingerprint(home / "base")}
    save_trained(model, tmp_path / "of_4bit", tmp_path / "4bit", "nf4")
    file = tmp_path / "of_4bit" / "plaintune.json"
    write_json(json.loads(file.read_text()) | facts, file)
    assert adapter_files.base_note(tmp_path / "of_4bit", home / "base") is None
    shutil.rmtree(tmp_path / "out")
    answer = go("merge", home / "nf4", tmp_path / "4bit", "--quant", "nf4")
    assert f"--quant nf4: {tmp_path / '4bit'} is in NF4 already" in refused(answer, tmp_path)


# ---- merged ----


def losses_said(out: str) -> tuple[float, float]:
    (line,) = [line for line in out.splitlines() if line.startswith("check ")]
    words = line.split()
    return float(words[2]), float(words[10])


@pytest.mark.parametrize("adapter", ["stored", "nf4"])
def test_a_merged_model_is_what_was_trained_and_the_gap_is_measured(home, go, tmp_path, adapter):
    file = home / "data.json"
    out, err, code = go("merge", home / adapter, home / "base", "--check", file)
    assert code == 0 and "WARNING" not in out + err
    model = load_model(home / "base", quant=None if adapter == "stored" else "nf4")
    lora.load_adapter(model, home / adapter)
    dataset = data.load([file], load_tokenizer(home / "base"), 256)
    expected = loss(model, dataset.take(torch.arange(16).numpy()))["loss"]
    assert losses_said(out) == pytest.approx((expected, expected), abs=2e-4)
    merged = load_model(tmp_path / "out")
    for name, layer in lora.lora_layers(model).items():
        weight = dequantized_weight(layer.base.frozen, torch.float32) + layer.delta()
        assert torch.equal(weight, load_file(tmp_path / "out" / "model.safetensors")[f"{name}.weight"])
    facts = json.loads((tmp_path / "out" / "plaintune.json").read_text())
    assert facts == {"base": str(home / "base"), "base_sha256": checkpoint.fingerprint(home / "base")}
    assert not checkpoint.quantized_linears(merged)


def test_merging_into_other_numbers_is_measured_and_warned_of(home, go, tmp_path):
    words = ("--check", home / "data.json", "--quant", "none")
    out, _, code = go("merge", home / "nf4", home / "base", *words)
    before, after = losses_said(out)
    assert code == 0 and abs(after - before) > 0.02
    assert f"NOTE: {home / 'nf4'} was trained on its base in nf4, whose errors it makes up for" in out
    assert ("WARNING: the merged model is worse than the adapter" in out) == (after > before)
    wanted = load_file(home / "base" / "model.safetensors")[UP]
    model = load_model(home / "base")
    lora.load_adapter(model, home / "nf4")
    wanted = wanted + lora.lora_layers(model)[UP.removesuffix(".weight")].delta()
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[UP], wanted)


def test_a_gap_is_warned_of_by_its_size():
    for after, warned in ((1.01, False), (1.03, True), (float("nan"), True)):
        said = []
        convert.print_gap(1.0, after, 3, said.append)
        assert f"loss 1.0000 with the adapter as it was trained, {after:.4f} merged" in said[0]
        assert (len(said) == 2 and said[1].startswith("WARNING: the merged model is worse")) == warned


def test_what_is_measured_is_said_where_it_can_not_be(tmp_path):
    llama(tmp_path / "base")
    model = load_model(tmp_path / "base")
    lora.add_lora(model, 4, 8.0)
    lora.save_adapter(model, tmp_path / "adapter")
    said = []
    convert.merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "a", print_fn=said.append)
    assert said[0].startswith(f"NOTE: {tmp_path / 'adapter'} does not say which numbers of its base it was trained on")
    assert said[1].startswith("check     the loss was not measured (") and len(said) == 3
    with pytest.raises(UserError, match="tokenizer"):
        convert.merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "b", check="none.json")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("quant", [None, "none"])
def test_a_gguf_file_holds_the_numbers_that_the_adapter_was_trained_on(home, tmp_path, quant):
    said = []
    convert.folder_to_gguf(home / "base", tmp_path / "x.gguf", "f32", home / "nf4", said.append, quant)
    convert.gguf_to_folder(tmp_path / "x.gguf", tmp_path / "back")
    convert.merge_folder(home / "base", home / "nf4", tmp_path / "merged", None, said.append, quant, "none")
    written = load_file(tmp_path / "back" / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert written.keys() == merged.keys()
    for name, weight in written.items():
        torch.testing.assert_close(weight, merged[name], rtol=0, atol=1e-6)
    stored = load_file(home / "base" / "model.safetensors")[UP]
    rounded = dequantized_weight(load_model(home / "base", quant="nf4").blocks[1].mlp.up.frozen, torch.float32)
    assert torch.dist(stored, rounded) > 1


def test_an_adapter_that_does_not_say_what_it_was_trained_on_takes_the_users_word(home, go, tmp_path):
    folder = shutil.copytree(home / "nf4", tmp_path / "silent")
    (folder / "plaintune.json").unlink()
    words = ("--check", home / "data.json", "--quant", "nf4")
    out, _, code = go("merge", folder, home / "base", *words)
    before, after = losses_said(out)
    assert code == 0 and before == pytest.approx(after, abs=2e-4) and "NOTE" not in out
    convert.merge_folder(home / "base", home / "nf4", tmp_path / "known", print_fn=print, check="none")
    silent, known = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "known"))
    assert all(torch.equal(silent[name], known[name]) for name in known)


def test_quant_without_an_adapter_is_refused(home, tmp_path, monkeypatch, capsys):
    words = ("to-gguf", home / "base", tmp_path / "out", "--quant", "nf4")
    answer = command(convert, monkeypatch, capsys, *words)
    assert "--quant: says what --adapter is added to" in refused(answer, tmp_path)


# ---- nothing to quantise ----


def test_a_base_of_which_nothing_can_be_in_four_bits_is_refused(tmp_path, monkeypatch, capsys):
    chat_base(tmp_path / "base", hidden_size=48, intermediate_size=80)
    (tmp_path / "data.json").write_text(json.dumps([{"instruction": "a", "output": "b"}] * 8))
    said = f"error: {tmp_path / 'base'}: none of its linears can be in 4 bits (nf4)"
    base, out = ("--model", tmp_path / "base"), tmp_path / "out"
    for script, words in (
        (convert, ("to-nf4", tmp_path / "base", out)),
        (train, (*base, "--data", tmp_path / "data.json", "--method", "qlora", "--out", out)),
        (train, (*base, "--data", tmp_path / "data.json", "--quant", "nf4", "--out", out)),
        (generate, (*base, "--quant", "nf4", "--prompt", "hi")),
        (evaluate, ("loss", *base, "--quant", "nf4", "--data", tmp_path / "data.json")),
    ):
        assert said in refused(command(script, monkeypatch, capsys, *words), tmp_path)


# ---- files that stand for others ----


@pytest.mark.parametrize(
    "file", ["adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "plaintune.json"]
)
@pytest.mark.parametrize("door", DOORS)
def test_a_pointer_in_an_adapter_is_named_at_every_door(home, go, tmp_path, door, file):
    folder = shutil.copytree(home / "stored", tmp_path / "adapter")
    (folder / file).write_text(LFS)
    line = refused(go(door, folder), tmp_path)
    assert f"error: {folder / file}: is a Git LFS pointer" in line and "`git lfs pull`" in line


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_pointer_in_a_base_is_named(home, go, tmp_path, file):
    base = shutil.copytree(home / "base", tmp_path / "base")
    (base / file).write_text(LFS)
    (tmp_path / "x.gguf").write_text(LFS)
    for door in ("generate", "train"):
        adapter = shutil.copytree(home / "stored", tmp_path / door)
        # Then the base's own is read.
        for own in ("tokenizer.json", "tokenizer_config.json"):
            (adapter / own).unlink()
        line = refused(go(door, adapter, base), tmp_path)
        assert f"error: {base / file}: is a Git LFS pointer" in line
    line = refused(go("generate", adapter, tmp_path / "x.gguf"), tmp_path)
    assert f"error: {tmp_path / 'x.gguf'}: is a Git LFS pointer" in line
