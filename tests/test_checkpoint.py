"""checkpoint.py: exact round trips with transformers on the other side, memory, crashes, and clear refusals."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.helpers import child_life, llama

import checkpoint
import convert
import lora
from checkpoint import load_model, save_model
from common import files
from common.errors import UserError
from common.files import atomic_folder

TOKENS = torch.arange(40).view(2, 20)
EMBED, NORM = "model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"


def logits(folder):
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")(TOKENS).logits


def stored(folder):
    """All tensors of a folder, read without checkpoint.py."""
    return {name: tensor for file in Path(folder).glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_is_exact(tmp_path, tied, dtype):
    llama(tmp_path / "a", dtype=dtype, tie_word_embeddings=tied, attention_bias=True)
    save_model(load_model(tmp_path / "a", dtype), tmp_path / "b")
    assert same(stored(tmp_path / "a"), stored(tmp_path / "b")) and ("lm_head.weight" in stored(tmp_path / "b")) != tied
    assert logits(tmp_path / "b").dtype == dtype and torch.equal(logits(tmp_path / "b"), logits(tmp_path / "a"))
    assert load_model(tmp_path / "b").config.tied == tied
    if tied:
        assert load_model(tmp_path / "b").head is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_survive_a_stay_in_fp32(tmp_path, dtype):
    llama(tmp_path / "a", dtype=dtype)
    model = load_model(tmp_path / "a", torch.float32)
    assert checkpoint.stored_dtype(tmp_path / "a") == dtype
    save_model(model, tmp_path / "b", dtype)
    assert same(stored(tmp_path / "a"), stored(tmp_path / "b"))
    assert checkpoint.stored_dtype(tmp_path / "b") == dtype


def test_shards_of_either_side_load_on_the_other(tmp_path, monkeypatch):
    theirs = llama(tmp_path / "a")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(checkpoint.weight_files(tmp_path / "shards")) > 3
    model = load_model(tmp_path / "shards")
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 50_000)
    save_model(model, tmp_path / "ours")
    files = checkpoint.weight_files(tmp_path / "ours")
    assert len(files) > 3 and all(sum(t.nbytes for t in load_file(file).values()) <= 50_000 for file in files)
    assert same(stored(tmp_path / "ours"), stored(tmp_path / "a"))
    assert torch.equal(logits(tmp_path / "ours"), logits(tmp_path / "a"))


def test_where_one_file_and_an_index_stand_side_by_side_the_file_counts_as_in_transformers(tmp_path):
    llama(tmp_path / "a", seed=1).save_pretrained(tmp_path, max_shard_size="50KB")
    llama(tmp_path, seed=2)
    assert (tmp_path / "model.safetensors").exists() and (tmp_path / "model.safetensors.index.json").exists()
    save_model(load_model(tmp_path), tmp_path / "b")
    assert torch.equal(logits(tmp_path / "b"), logits(tmp_path))


def test_which_of_one_file_and_shards_is_read_is_said(tmp_path, capsys):
    llama(tmp_path, seed=1).save_pretrained(tmp_path, max_shard_size="50KB")
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    load_model(tmp_path)
    assert "WARNING" not in capsys.readouterr().err
    theirs = llama(tmp_path / "one", seed=2)
    shutil.copyfile(tmp_path / "one" / "model.safetensors", tmp_path / "model.safetensors")
    model = load_model(tmp_path)
    said = capsys.readouterr().err
    assert f"WARNING: {tmp_path}: read is model.safetensors alone, as transformers does; not " in said
    assert next(name for name in shards if name != "model.safetensors") in said
    assert torch.equal(model.norm.weight, theirs.model.norm.weight)


def test_names_of_another_model_are_said_beside_the_wanted_ones(tmp_path):
    llama(tmp_path)
    foreign = {name.replace("model.", "language_model.model.", 1): t for name, t in stored(tmp_path).items()}
    save_file(foreign, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as error:
        load_model(tmp_path)
    first, _, rest = str(error.value).partition("; not part of the model: ")
    assert "tensors missing: model.embed_tokens.weight" in first and rest.startswith("language_model.model.embed_")


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_dtype_that_is_missing_or_wrong_is_that_of_the_weights(tmp_path, dtype, key):
    llama(tmp_path / "a", dtype=dtype)
    actual = str(dtype).removeprefix("torch.")
    edit_config(tmp_path / "a", dtype="gone", torch_dtype="gone")
    assert checkpoint.stored_dtype(tmp_path / "a") == dtype
    assert checkpoint.dtype_note(checkpoint.read_config(tmp_path / "a"), dtype) is None
    for claimed, is_denied in ((actual, False), (f"torch.{actual}", False), ("float8_e4m3fn", True)):
        edit_config(tmp_path / "a", **{key: claimed})
        note = checkpoint.dtype_note(checkpoint.read_config(tmp_path / "a"), dtype)
        assert (note is not None) == is_denied
        assert not is_denied or note == f"config.json says {claimed}, the weights are {actual}, which counts"
    said = []
    model = load_model(tmp_path / "a")
    lora.add_lora(model, 2, 4.0)
    lora.save_adapter(model, tmp_path / "adapter")
    convert.merge_folder(tmp_path / "a", tmp_path / "adapter", tmp_path / "merged", print_fn=said.append, check="none")
    assert f"NOTE: {tmp_path / 'a'}: config.json says float8_e4m3fn, the weights are {actual}, which counts" in said
    assert {tensor.dtype for tensor in stored(tmp_path / "merged").values()} == {dtype}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())[key] == actual


def test_most_of_the_weights_decide_what_the_folder_is_stored_in(tmp_path):
    """As of a converted GGUF file, whose norms are float32 and whose matrices are not."""
    llama(tmp_path, dtype=torch.bfloat16)
    weights(lambda w: w.update({name: w[name].float() for name in w if "norm" in name}))(tmp_path)
    assert checkpoint.stored_dtype(tmp_path) == torch.bfloat16


def test_tokenizer_files_are_carried_over_byte_for_byte(tmp_path):
    llama(tmp_path / "a")
    files = {name: f" {name}\r\n\xff".encode("latin-1") for name in checkpoint.TOKENIZER_FILES}
    files["generation_config.json"] = b'{"eos_token_id": [1,\t2]}'
    for name, content in (files | {"pytorch_model.bin": b"", "training_args.bin": b""}).items():
        (tmp_path / "a" / name).write_bytes(content)
    (tmp_path / "a" / "additional_chat_templates").mkdir()
    files["additional_chat_templates/rag.jinja"] = b"{{ messages }}"
    (tmp_path / "a" / "additional_chat_templates" / "rag.jinja").write_bytes(b"{{ messages }}")
    save_model(load_model(tmp_path / "a"), tmp_path / "b")
    assert {"tokenizer.json", "tokenizer.model", "chat_template.jinja", "tokenizer_config.json"} <= files.keys()
    found = [file for file in (tmp_path / "b").rglob("*") if file.is_file()]
    written = {file.relative_to(tmp_path / "b").as_posix(): file.read_bytes() for file in found}
    assert {name: written[name] for name in files} == files
    assert written.keys() - files.keys() == {"config.json", "model.safetensors"}


def test_a_model_can_be_saved_over_the_folder_that_it_came_from(tmp_path):
    llama(tmp_path / "a")
    before = logits(tmp_path / "a")
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    save_model(load_model(tmp_path / "a"), tmp_path / "a")
    assert torch.equal(logits(tmp_path / "a"), before) and (tmp_path / "a" / "tokenizer.json").read_text() == "{}"


def write_in_order(weights, file):
    """A safetensors file with its fp32 tensors in the order given (save_file has an order of its own)."""
    header, end = {}, 0
    for name, t in weights.items():
        header[name] = {"dtype": "F32", "shape": list(t.shape), "data_offsets": [end, end + t.nbytes]}
        end += t.nbytes
    text = json.dumps(header).encode()
    data = b"".join(t.contiguous().numpy().tobytes() for t in weights.values())
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize("head_first", [True, False])
def test_a_stored_copy_of_a_tied_head_must_be_equal(tmp_path, head_first):
    llama(tmp_path, tie_word_embeddings=True)
    weights = stored(tmp_path)
    for head, fine in ((weights[EMBED].clone(), True), (weights[EMBED] + 1, False), (weights[EMBED][:5], False)):
        rest = {name: tensor for name, tensor in weights.items() if name != EMBED}
        ends = {"lm_head.weight": head}, {EMBED: weights[EMBED]}
        first, last = ends if head_first else reversed(ends)
        write_in_order(first | rest | last, tmp_path / "model.safetensors")
        if fine:
            assert load_model(tmp_path).head is None
        else:
            with pytest.raises(UserError, match=r"lm_head\.weight (differs|has shape \[5, 64\])"):
                load_model(tmp_path)


def test_a_stored_rotary_table_is_ignored(tmp_path):
    llama(tmp_path / "a")
    table = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(3)}
    save_file(stored(tmp_path / "a") | table, tmp_path / "a" / "model.safetensors")
    save_model(load_model(tmp_path / "a"), tmp_path / "b")
    assert not table.keys() & stored(tmp_path / "b").keys()


MEASURE = """
import sys, torch, checkpoint
peak = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
dtype = getattr(torch, sys.argv[3])
checkpoint.load_model(sys.argv[1], dtype)  # a small one: what torch itself takes on first use
before = peak()
model = checkpoint.load_model(sys.argv[2], dtype, sys.argv[4])
if sys.argv[4] == "cpu":
    sum(float(p.detach().flatten()[::512].sum()) for p in model.parameters())  # every page is read
print((peak() - before) / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's count of peak memory")
@pytest.mark.parametrize(
    ("stored", "shards", "tied", "loaded", "device", "limits"),
    [  # beyond the model: MAPPED_BYTES and a tensor of what is read, but nothing where nothing is converted
        ("bfloat16", 10, False, "bfloat16", "cpu", (0.9, 1.1)),
        ("bfloat16", 10, False, "float32", "cpu", (0.9, 1.5)),
        ("bfloat16", 1, False, "float32", "cpu", (0.9, 1.5)),
        (
            "float32",
            1,
            True,
            "float32",
            "cpu",
            (0.9, 1.2),
        ),  # the head, stored once more, is looked through and not kept
        ("float32", 1, False, "bfloat16", "cpu", (0.9, 1.75)),  # 64 MB are more of 105 than of 210
        ("float32", 1, False, "float32", "meta", (0, 0.5)),  # another device: nothing stays on this one
    ],
)
def test_loading_takes_the_memory_of_the_model_once(tmp_path, stored, shards, tied, loaded, device, limits):
    llama(tmp_path / "small")
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 7, "vocab_size": 10_000}
    theirs = llama(tmp_path / "large", dtype=getattr(torch, stored), std=0.02, tie_word_embeddings=tied, **sizes)
    if shards > 1:
        (tmp_path / "large" / "model.safetensors").unlink()
        theirs.save_pretrained(tmp_path / "large", max_shard_size="10MB")
        assert len(list((tmp_path / "large").glob("*.safetensors"))) >= shards
    if tied:
        weights = load_file(tmp_path / "large" / "model.safetensors")
        save_file(weights | {"lm_head.weight": weights[EMBED].clone()}, tmp_path / "large" / "model.safetensors")
    del theirs
    command = [sys.executable, "-c", MEASURE, tmp_path / "small", tmp_path / "large", loaded, device]
    done = subprocess.run(command, cwd=Path(checkpoint.__file__).parent, capture_output=True, text=True, check=True)
    assert limits[0] <= float(done.stdout) < limits[1]


def test_a_model_outlives_the_file_that_it_came_from_and_never_writes_to_it(tmp_path):
    """Parameters that are pages of the file: private, and good while the file is replaced or gone."""
    theirs = llama(tmp_path)
    model, before = load_model(tmp_path), (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        model.blocks[0].mlp.up.weight.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before
    llama(tmp_path, seed=1)
    (tmp_path / "model.safetensors").unlink()
    assert not model.blocks[0].mlp.up.weight.any()
    assert torch.equal(model.blocks[1].mlp.up.weight, theirs.model.layers[1].mlp.up_proj.weight)


def test_a_folder_is_whole_or_absent(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "a") as tmp:
        (tmp / "x").write_text("half")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    for content in ("old", "new"):
        with atomic_folder(tmp_path / "a", replace=True) as tmp:
            (tmp / "x").write_text(content)
    assert [(tmp_path / "a" / "x").read_text()] == ["new"] and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(FileExistsError), atomic_folder(tmp_path / "a") as tmp:
        (tmp / "x").write_text("third")
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "a", replace=True) as tmp:
        raise ZeroDivisionError
    assert (tmp_path / "a" / "x").read_text() == "new" and len(list(tmp_path.iterdir())) == 1


def test_a_file_is_never_replaced_by_a_folder(tmp_path):
    (tmp_path / "a").write_text("thesis")
    with pytest.raises(NotADirectoryError) as error, atomic_folder(tmp_path / "a", replace=True):
        pass
    assert error.value.filename == str(tmp_path / "a") and (tmp_path / "a").read_text() == "thesis"


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with atomic_folder(tmp_path / "link", replace=True) as tmp:
        (tmp / "x").write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "x").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_failing_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    rename = Path.rename

    def fail_once(self, target):
        if ".partial-" in self.name:
            raise OSError(errno.EIO, "broken disk")
        return rename(self, target)

    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("old")
    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(OSError, match="broken disk"), atomic_folder(tmp_path / "a", replace=True):
        pass
    assert (tmp_path / "a" / "x").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def kill(*_args, **_kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def half_then_kill(weights, file):
    save_file(weights, file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    kill()


@pytest.mark.parametrize("moment", ["save_tensors", "copy_tokenizer", "fsync_path"])
def test_killed_while_saving_the_old_folder_is_whole(tmp_path, monkeypatch, moment):
    llama(tmp_path / "a", seed=1)
    llama(tmp_path / "b", seed=2)
    before, model = stored(tmp_path / "b"), load_model(tmp_path / "a")
    child = os.fork()
    if child == 0:

        def save_and_die():
            place = files if moment == "fsync_path" else checkpoint
            monkeypatch.setattr(place, moment, half_then_kill if moment == "save_tensors" else kill)
            save_model(model, tmp_path / "b")

        child_life(save_and_die)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert same(stored(tmp_path / "b"), before)
    load_model(tmp_path / "b")
    save_model(model, tmp_path / "b")  # what the dead process left is in nobody's way
    assert same(stored(tmp_path / "b"), stored(tmp_path / "a"))


def test_killed_between_the_renames_the_old_folder_stands_beside(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("old")
    child = os.fork()
    if child == 0:
        rename = Path.rename
        monkeypatch.setattr(Path, "rename", lambda path, to: kill() if ".partial-" in path.name else rename(path, to))
        with atomic_folder(tmp_path / "a", replace=True) as tmp:
            (tmp / "x").write_text("new")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert (tmp_path / f".a.replaced-{child}" / "x").read_text() == "old"
    assert (tmp_path / f".a.partial-{child}" / "x").read_text() == "new"


def test_a_stale_folder_of_a_dead_process_with_the_same_number_is_no_hindrance(tmp_path):
    for stale in (f".a.partial-{os.getpid()}", f".a.replaced-{os.getpid()}", "a"):
        (tmp_path / stale).mkdir()
        (tmp_path / stale / "x").write_text("stale")
    with atomic_folder(tmp_path / "a", replace=True) as tmp:
        (tmp / "y").write_text("new")
    assert [file.name for file in tmp_path.rglob("*")] == ["a", "y"]


def edit_config(folder, **changes):
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value != "gone"}))


def config(**changes):
    return lambda folder: edit_config(folder, **changes)


def rope(**changes):
    return config(rope_parameters={"rope_theta": 10_000.0} | changes)


def weights(change):
    def edit(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


def index(text):
    def edit(folder):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(text)

    return edit


def cut(keep):
    def edit(folder):
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[: keep(len(content))])

    return edit


def shards(change=lambda files: None):
    """The folder in shards, whose files, sorted, are given to `change`."""

    def edit(folder):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
        (folder / "model.safetensors").unlink()
        theirs.save_pretrained(folder, max_shard_size="50KB")
        change(sorted(folder.glob("*.safetensors")))

    return edit


def repeat(files):
    """The last tensor of the second shard, with other values, in the third as well."""
    name, tensor = load_file(files[1]).popitem()
    save_file(load_file(files[2]) | {name: tensor + 1}, files[2])


def move(files):
    """The same, but in the third only: no file is missing, yet the index is wrong."""
    weights = load_file(files[1])
    name, tensor = weights.popitem()
    save_file(weights, files[1])
    save_file(load_file(files[2]) | {name: tensor}, files[2])


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
BROKEN = {  # case: (the damage, what the message must say)
    "no config": (lambda f: (f / "config.json").unlink(), ["no config.json"]),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), ["config.json", "list"]),
    "config is cut": (
        lambda f: (f / "config.json").write_text('{"model_type": "lla'), ["config.json", "not JSON", "line 1"]),
    "config is a folder": (lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()), ["config.json"]),
    "unknown family": (config(model_type="zebra"), ["config.json", "'zebra'"]),
    "family a list": (config(model_type=["llama"]), ["config.json", "['llama']"]),
    "no hidden size": (config(hidden_size="gone"), ["hidden_size is missing"]),
    "hidden size a string": (config(hidden_size="64"), ["hidden_size is '64'"]),
    "hidden size a truth": (config(hidden_size=True), ["hidden_size is True"]),
    "hidden size negative": (config(hidden_size=-64), ["hidden_size is -64"]),
    "epsilon not a number": (config(rms_norm_eps=float("nan")), ["rms_norm_eps is nan"]),
    "epsilon beyond floats": (config(rms_norm_eps=10**400), ["rms_norm_eps"]),
    "no heads": (config(num_attention_heads=0), ["num_attention_heads is 0"]),
    "heads and width": (config(num_attention_heads=5, num_key_value_heads=5, head_dim="gone"), ["hidden_size 64", "5"]),
    "heads and groups": (config(num_key_value_heads=3), ["do not divide"]),
    "odd head": (config(head_dim=21), ["head_dim 21"]),
    "another activation": (config(hidden_act="mish"), ["hidden_act", "mish"]),
    "unknown rope": (rope(rope_type="zigzag"), ["zigzag"]),
    "rope type a list": (rope(rope_type=["linear"]), ["['linear']"]),
    "rope a list": (config(rope_parameters=[1]), ["rope_parameters"]),
    "old rope a string": (config(rope_parameters="gone", rope_scaling="linear"), ["rope_scaling"]),
    "rope base infinite": (rope(rope_theta=float("inf")), ["rope_theta is inf"]),
    "rope base not a number": (rope(rope_theta=float("nan")), ["rope_theta is nan"]),
    "rope factor missing": (rope(rope_type="linear"), ["factor"]),
    "rope bounds swapped": (
        rope(**LLAMA3 | {"high_freq_factor": 1.0}, original_max_position_embeddings=64), ["low_freq_factor"]),
    "layers without end": (config(num_hidden_layers=10**8), ["num_hidden_layers"]),
    "heads without end": (
        config(num_attention_heads=10**8, head_dim=10**8, num_key_value_heads=1), ["num_attention_heads"]),
    "words without end": (config(vocab_size=999_999_999), ["vocab_size is 999999999"]),
    "weights a folder": (
        lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()), ["missing"]),
    "weights empty": (cut(lambda size: 0), ["model.safetensors", "damaged"]),
    "weights cut in the length": (cut(lambda size: 5), ["model.safetensors", "damaged"]),
    "weights cut in the header": (cut(lambda size: 300), ["model.safetensors", "damaged"]),
    "weights cut in the middle": (cut(lambda size: size // 2), ["model.safetensors", "damaged"]),
    "weights cut at the end": (cut(lambda size: size - 1), ["model.safetensors", "damaged"]),
    "weights are text": (
        lambda f: (f / "model.safetensors").write_bytes(b"hello" * 9), ["model.safetensors", "damaged"]),
    "header without end": (
        lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), ["model.safetensors", "damaged"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["model.safetensors is missing"]),
    "pickled weights": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), ["pytorch_model.bin", "safetensors"]),
    "missing tensor": (weights(lambda w: w.pop(NORM)), [f"missing: {NORM}"]),
    "untied without head": (weights(lambda w: w.pop("lm_head.weight")), ["missing: lm_head.weight"]),
    "extra tensor": (weights(lambda w: w.update(zebra=w[NORM].clone())), ["zebra"]),
    "a layer too many": (config(num_hidden_layers=2), ["not part of the model: model.layers.2."]),
    "wrong shape": (weights(lambda w: w.update({NORM: w[NORM][:9].clone()})), [NORM, "[9]", "[64]"]),
    "transposed": (weights(lambda w: w.update({EMBED: w[EMBED].t().contiguous()})), [EMBED, "[64, 96]", "[96, 64]"]),
    "integers": (weights(lambda w: w.update({NORM: w[NORM].int()})), [NORM, "I32"]),
    "8-bit floats": (weights(lambda w: w.update({NORM: w[NORM].to(torch.float8_e4m3fn)})), [NORM, "F8_E4M3"]),
    "path trick": (index('{"weight_map": {"a": "../x.safetensors"}}'), ["index.json", "beside it"]),
    "absolute path": (index('{"weight_map": {"a": "/etc/x.safetensors"}}'), ["index.json", "beside it"]),
    "index names the parent": (index('{"weight_map": {"a": ".."}}'), ["index.json", "beside it"]),
    "index names nothing": (index('{"weight_map": {"a": ""}}'), ["index.json", "beside it"]),
    "index names a pickle": (index('{"weight_map": {"a": "pytorch_model.bin"}}'), ["index.json", "beside it"]),
    "index maps to numbers": (index('{"weight_map": {"a": 3}}'), ["index.json"]),
    "index without a map": (index("{}"), ["index.json", "weight_map"]),
    "index with an empty map": (index('{"weight_map": {}}'), ["tensors missing"]),
    "index is no JSON": (index("{oops"), ["index.json", "not JSON"]),
    "index is a list": (index("[]"), ["index.json", "list"]),
    "missing shard": (shards(lambda files: files[2].unlink()), ["model-00003-of-", "is missing"]),
    "a shard without what the index promises": (
        shards(lambda files: save_file({}, files[0])), ["tensors missing: "]),
    "a tensor in two shards": (shards(repeat), ["is there twice", "model-00002-of-", "model-00003-of-"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_refused_in_one_line(tmp_path, case):
    llama(tmp_path)
    damage, said = BROKEN[case]
    damage(tmp_path)
    with pytest.raises(UserError) as error:
        load_model(tmp_path)
    message = str(error.value)
    assert all(words in message for words in said) and "\n" not in message and str(tmp_path) in message


def test_where_a_tensor_is_the_shards_say_and_not_the_index(tmp_path):
    theirs = llama(tmp_path)
    shards(move)(tmp_path)
    save_model(load_model(tmp_path), tmp_path / "b")
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in stored(tmp_path / "b").items())


def test_no_weight_is_read_before_all_headers_are_checked(tmp_path, monkeypatch):
    llama(tmp_path)
    weights(lambda w: w.update(zebra=torch.ones(3)))(tmp_path)
    monkeypatch.setattr(checkpoint, "iterate_tensors", lambda *_: pytest.fail("read"))
    with pytest.raises(UserError, match="zebra"):
        load_model(tmp_path)


def test_no_folder_and_a_file_as_folder(tmp_path):
    (tmp_path / "file").write_text("{}")
    for path in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(UserError, match=f"{path.name}: no such model folder"):
            load_model(path)


def test_what_is_written_can_be_read_by_others(tmp_path):
    """The safetensors package makes files for their owner alone; a server runs as another user."""
    llama(tmp_path / "base")
    save_model(load_model(tmp_path / "base"), tmp_path / "out")
    (tmp_path / "ordinary").write_text("")
    wanted = (tmp_path / "ordinary").stat().st_mode
    assert {file.stat().st_mode for file in (tmp_path / "out").iterdir()} == {wanted}
