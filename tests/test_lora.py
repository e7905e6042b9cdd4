"""lora.py against peft: the same logits, gradients and dropout, merged or not, and strict about names."""

import json
import re
import warnings

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from support.helpers import llama, relative
from torch.utils.checkpoint import checkpoint

import adapter_files
import lora
from checkpoint import load_model, save_model
from common.errors import UserError
from kernels import lora_linear
from kernels.attention import Documents
from optimizers import AdamW

TOKENS = torch.randint(0, 96, (2, 30), generator=torch.Generator().manual_seed(0))
DOWN = "model.layers.1.mlp.down_proj"
TARGETS = ["all", "q_proj,v_proj", DOWN]


def randomise(model) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for layer in lora.lora_layers(model).values():
            layer.lora_A.normal_(0, 0.2)
            layer.lora_B.normal_(0, 0.3)


def in_peft(base, folder, **settings):
    """peft's model of an adapter folder; any word of peft's about keys fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return peft.PeftModel.from_pretrained(base, folder, **settings)


def peft_names(wrapped) -> set[str]:
    layers = {name for name, m in wrapped.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    return {name.removeprefix("base_model.model.") for name in layers}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_0_is_the_base_exactly(tmp_path, dtype):
    llama(tmp_path, attention_bias=True)
    model = load_model(tmp_path, dtype)
    before = model(TOKENS)
    lora.add_lora(model, 4, 8.0, dropout=0.5)
    assert torch.equal(model(TOKENS), before) and torch.equal(model.train()(TOKENS), before)
    assert {p.dtype for layer in lora.lora_layers(model).values() for p in (layer.lora_A, layer.lora_B)} == {
        torch.float32
    }


def test_only_the_adapter_is_trained(tmp_path):
    llama(tmp_path)
    model = load_model(tmp_path)
    lora.add_lora(model, 4, 8.0)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 3 and all(name.endswith(("lora_A", "lora_B")) for name in trained)


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("merged", [False, True])
def test_our_adapter_gives_the_same_logits_in_peft(tmp_path, targets, merged):
    theirs, model = llama(tmp_path / "base", attention_bias=True), load_model(tmp_path / "base")
    lora.add_lora(model, 4, 10.0, targets=targets)
    randomise(model)
    lora.save_adapter(model, tmp_path / "adapter")
    wrapped = in_peft(theirs, tmp_path / "adapter")
    held, written = peft.get_peft_model_state_dict(wrapped), load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert held.keys() == written.keys() and all(torch.equal(held[name], written[name]) for name in held)
    assert peft_names(wrapped) == set(lora.lora_layers(model))
    if merged:
        wrapped = wrapped.merge_and_unload()
        lora.merge(model)
    with torch.no_grad():
        assert relative(model(TOKENS), wrapped(TOKENS).logits) < 1e-5
        assert relative(model(TOKENS), load_model(tmp_path / "base")(TOKENS)) > 1e-3


@pytest.mark.parametrize(
    "targets",
    ["all", "q_proj,v_proj", "mlp.down_proj", DOWN, "1.self_attn.q_proj", f"k_proj,{DOWN}",
     "layers.1.mlp.up_proj,up_proj", ["o_proj", "model.layers.11.mlp.gate_proj"]],
)  # fmt: skip
@pytest.mark.parametrize("tied", [False, True])
def test_peft_adapts_exactly_the_same_modules(tmp_path, targets, tied):
    theirs = llama(tmp_path / "base", num_hidden_layers=12, tie_word_embeddings=tied)  # 1 and 11: names that end alike
    model = load_model(tmp_path / "base")
    names = lora.add_lora(model, 2, 4.0, targets=targets)
    lora.save_adapter(model, tmp_path / "adapter")
    assert len(names) == len(set(names)) and set(names) == set(lora.lora_layers(model))
    assert peft_names(in_peft(theirs, tmp_path / "adapter")) == set(names)
    again = load_model(tmp_path / "base")
    lora.load_adapter(again, tmp_path / "adapter")
    assert set(lora.lora_layers(again)) == set(names)


@pytest.mark.parametrize(
    "targets", [["q_proj", "up_proj"], ["mlp.down_proj"], [DOWN], "all-linear", r".*\.1\.self_attn\.(q|o)_proj"]
)
@pytest.mark.parametrize("tied", [False, True])
def test_a_peft_adapter_gives_the_same_logits_here(tmp_path, targets, tied):
    theirs = llama(tmp_path / "base", tie_word_embeddings=tied)
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(theirs, config).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    model = load_model(tmp_path / "base")
    lora.load_adapter(model, tmp_path / "adapter")
    assert set(lora.lora_layers(model)) == peft_names(wrapped)
    with torch.no_grad():
        assert relative(model(TOKENS), wrapped(TOKENS).logits) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerge_takes_out_what_merge_put_in(tmp_path, dtype):
    llama(tmp_path)
    model = load_model(tmp_path, dtype)
    lora.add_lora(model, 4, 8.0)
    randomise(model)
    with torch.no_grad():
        before = {name: layer.base.weight.clone() for name, layer in lora.lora_layers(model).items()}
        unmerged = model(TOKENS)
        lora.merge(model)
        merged = model(TOKENS)
        lora.unmerge(model)
    assert relative(merged.float(), unmerged.float()) < (1e-5 if dtype == torch.float32 else 0.1)
    for name, layer in lora.lora_layers(model).items():
        assert layer.base.weight.dtype == dtype
        assert relative(layer.base.weight.float(), before[name].float()) < torch.finfo(dtype).eps


def test_a_merged_model_saves_as_a_plain_one(tmp_path):
    llama(tmp_path / "base")
    model = load_model(tmp_path / "base")
    plain = {name for name, _ in model.named_parameters()}
    lora.add_lora(model, 4, 8.0)
    randomise(model)
    with torch.no_grad():
        adapted = model(TOKENS)
    lora.merge(model)
    adapter_files.remove_adapter(model)
    assert {name for name, _ in model.named_parameters()} == plain
    save_model(model, tmp_path / "merged")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert relative(theirs(TOKENS).logits, adapted) < 1e-5
        assert relative(load_model(tmp_path / "merged")(TOKENS), adapted) < 1e-5


def loss_of(logits):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_loss_and_gradients_equal_those_of_peft(tmp_path, dropout):
    theirs, model = llama(tmp_path / "base", attention_bias=True, std=0.1), load_model(tmp_path / "base")
    lora.add_lora(model, 4, 10.0, dropout)
    randomise(model)
    lora.save_adapter(model, tmp_path / "adapter")
    wrapped = in_peft(theirs, tmp_path / "adapter", is_trainable=True).train()
    torch.manual_seed(5)  # the same modules in the same order draw the same masks
    expected = loss_of(wrapped(TOKENS).logits)
    torch.manual_seed(5)
    loss = loss_of(model.train()(TOKENS))
    expected.backward()
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    gradients = {name: p.grad for name, p in wrapped.named_parameters() if p.requires_grad}
    assert len(gradients) == 2 * 7 * 3
    for name, layer in lora.lora_layers(model).items():
        for ours, leaf in ((layer.lora_A, "lora_A"), (layer.lora_B, "lora_B")):
            assert relative(ours.grad, gradients[f"base_model.model.{name}.{leaf}.default.weight"]) < 1e-4
        assert layer.base.weight.grad is None


def test_dropout_acts_in_training_only(tmp_path):
    llama(tmp_path)
    model = load_model(tmp_path)
    lora.add_lora(model, 4, 8.0, dropout=0.5)
    randomise(model)
    runs = []
    for mode, seed in ((True, 1), (True, 2), (True, 1), (False, 1), (False, 2)):
        model.train(mode)
        torch.manual_seed(seed)
        runs.append(model(TOKENS))
    assert torch.equal(runs[0], runs[2]) and torch.equal(runs[3], runs[4])
    assert relative(runs[0], runs[1]) > 1e-3 and relative(runs[0], runs[3]) > 1e-3


@pytest.mark.parametrize("targets", ["up_proj,down_proj", "gate_proj,down_proj", "k_proj", "o_proj", "up_proj"])
def test_every_adapted_layer_learns(tmp_path, targets):
    """In the first block too, whose input wants no gradient."""
    llama(tmp_path, std=0.1)
    model = load_model(tmp_path).train()
    lora.add_lora(model, 4, 8.0, targets=targets)
    loss_of(model(TOKENS)).backward()
    assert all(layer.lora_B.grad.any() for layer in lora.lora_layers(model).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_b_learns_in_the_first_step_and_a_in_the_second(tmp_path, dtype, dropout):
    llama(tmp_path, std=0.1)
    model = load_model(tmp_path, dtype).train()
    lora.add_lora(model, 4, 8.0, dropout)
    layers = lora.lora_layers(model).values()
    step = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss_of(model(TOKENS).float()).backward()
    assert all(layer.lora_B.grad.isfinite().all() and layer.lora_B.grad.any() for layer in layers)
    assert not any(layer.lora_A.grad.any() for layer in layers)
    step.step()
    step.zero_grad()
    loss_of(model(TOKENS).float()).backward()
    for parameter in (p for layer in layers for p in (layer.lora_A, layer.lora_B)):
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all() and parameter.grad.any()


def as_on_gpu(monkeypatch, gpu: bool) -> None:
    """Whether adapters compute in the order of GPUs, here with plain PyTorch too."""
    for module in (lora, lora_linear):
        monkeypatch.setattr(module, "use_triton", lambda x: gpu)


@pytest.fixture
def cast_alone(monkeypatch):
    """On a GPU: the layers that cast A and B for themselves, in a list that grows."""
    as_on_gpu(monkeypatch, True)
    found, cast = [], lora_linear.cast
    monkeypatch.setattr(lora_linear, "cast", lambda linears, dtype: found.append(linears) or cast(linears, dtype))
    return found


def put_random_lora(model, targets: str = "all") -> None:
    """Rank 4, the update scaled by 2.5."""
    torch.manual_seed(0)
    lora.add_lora(model, 4, 10.0, targets=targets)
    for layer in lora.lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)


def flat_loss(model, start: int = 0) -> torch.Tensor:
    tokens = (torch.arange(90) + start) % 96
    hidden = model.flat(tokens, Documents([30, 30, 30], "cpu"))
    return F.cross_entropy(model.logits(hidden), tokens.roll(-1), reduction="sum")


def fused_adamw(parameters):
    optimizer = AdamW([{"params": parameters}], 0.01)
    return lambda: (optimizer.step(torch.zeros(())), optimizer.zero_grad())


def sgd_unseen(parameters):
    """In a way that no tensor's version tells."""

    def step():
        for p in parameters:
            p.data.add_(p.grad, alpha=-0.01)
            p.grad = None

    return step


@pytest.mark.parametrize("optimizer", [fused_adamw, sgd_unseen])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("targets", ["all", "q_proj,v_proj,up_proj,down_proj"])
def test_no_step_computes_with_old_casts(tmp_path, monkeypatch, cast_alone, optimizer, checkpointing, targets):
    """Three steps of two micro-batches, and losses between them: as by the plain form, which casts each time."""
    llama(tmp_path, std=0.1, num_hidden_layers=2, intermediate_size=128)

    def run(on_gpu):
        as_on_gpu(monkeypatch, on_gpu)
        model = load_model(tmp_path)
        put_random_lora(model, targets)
        model.activation_checkpointing = checkpointing
        with torch.inference_mode():
            losses = [flat_loss(model)]  # the first forward of all, whose casts the training uses as well
        parameters = [p for p in model.parameters() if p.requires_grad]
        step = optimizer(parameters)
        model.train()
        for _ in range(3):
            for start in (0, 45):
                losses.append(flat_loss(model, start))
                losses[-1].backward()
            grads = [p.grad for p in parameters]
            step()
            with torch.no_grad():
                losses.append(flat_loss(model))
        return torch.stack([loss.detach() for loss in losses]), grads

    losses, grads = run(True)
    plain, wanted = run(False)
    assert plain.std() > 0.1 and not cast_alone
    torch.testing.assert_close(losses, plain, rtol=1e-4, atol=0)
    assert all(relative(got, want) < 1e-3 for got, want in zip(grads, wanted, strict=True))


def test_merging_and_loading_between_forwards(tmp_path, cast_alone):
    """What is merged is not added again; what was loaded or begun anew since the last forward counts."""
    llama(tmp_path, std=0.1, num_hidden_layers=2, intermediate_size=128)
    model = load_model(tmp_path)
    base = flat_loss(model).detach()
    put_random_lora(model)
    adapted = flat_loss(model)
    lora.merge(model, keep=True)
    merged = flat_loss(model)
    assert {group.casts for group in model.lora_casts.groups.values()} == {None}  # nor does it take memory
    lora.unmerge(model)
    assert relative(adapted, base) > 1e-3
    torch.testing.assert_close(merged, adapted)
    torch.testing.assert_close(flat_loss(model), adapted)
    layers = adapter_files.remove_adapter(model)
    torch.testing.assert_close(flat_loss(model), base)
    for layer in layers.values():
        layer.start()
    adapter_files.put_back(model, layers)
    torch.testing.assert_close(flat_loss(model), base)
    assert not cast_alone


def test_a_layer_called_outside_of_a_forward_casts_for_itself(tmp_path, cast_alone):
    """Forward and, where it is computed again in the backward, there: whatever happened since the model's last one."""
    llama(tmp_path, std=0.1, num_hidden_layers=2, intermediate_size=128)
    model = load_model(tmp_path)
    put_random_lora(model)
    flat_loss(model).backward()
    assert not cast_alone
    x, attention = torch.randn(5, 64), model.blocks[0].attention
    qkv = [attention.q, attention.k, attention.v]
    for layer, call in ((attention.o, attention.o), (attention.q, lambda x: attention.q.forward_shared(x, qkv)[0])):
        layer.lora_A.data.normal_(), layer.lora_B.data.normal_()
        wanted = x @ (layer.base.weight + 2.5 * layer.lora_B @ layer.lora_A).t()
        gradients = torch.autograd.grad(wanted.sum(), (layer.lora_A, layer.lora_B))
        out = checkpoint(call, x, use_reentrant=False)
        got = torch.autograd.grad(out.sum(), (layer.lora_A, layer.lora_B))
        for ours, plain in zip((out, *got), (wanted, *gradients), strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-3)


def test_layers_in_shards_cast_for_themselves(tmp_path, monkeypatch, cast_alone):
    """FSDP2 gathers them for their block's time alone."""
    llama(tmp_path, std=0.1, num_hidden_layers=2, intermediate_size=128)
    model = load_model(tmp_path)
    put_random_lora(model)
    wanted = flat_loss(model)
    assert not cast_alone
    monkeypatch.setattr(lora, "is_sharded", lambda x: True)
    torch.testing.assert_close(flat_loss(model), wanted)
    assert len(cast_alone) == 2 * 4  # q, k, v together; o; gate and up; down


def test_dropout_goes_its_own_way(tmp_path, cast_alone):
    llama(tmp_path, std=0.1, num_hidden_layers=1, intermediate_size=128)
    model = load_model(tmp_path)
    torch.manual_seed(0)
    lora.add_lora(model, 4, 10.0, dropout=0.5)
    for layer in lora.lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    losses = [flat_loss(model.train()).detach() for _ in range(2)]
    held = [group.casts for group in model.lora_casts.groups.values()]
    evaluated = [flat_loss(model.eval()) for _ in range(2)]
    assert held == [None] * 4 and not cast_alone and not torch.equal(*losses) and torch.equal(*evaluated)


def adapter(tmp_path, **config):
    """A base, and the folder of an adapter of it whose configuration is changed."""
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
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "config",
    [{"peft_type": "IA3"}, {"peft_type": None}, {"peft_type": ["LORA"]},
     {"fan_in_fan_out": True}, {"bias": "all"},
     {"lora_bias": True}, {"target_parameters": ["x"]},
     {"alora_invocation_tokens": [1, 2]},
     {"use_qalora": True}, {"layer_replication": [[0, 2]]}, {"init_lora_weights": "pissa_niter_4"},
     {"init_lora_weights": "olora"}, {"r": "4"}, {"r": 0}, {"r": True}, {"r": 10**12}, {"lora_alpha": -8},
     {"lora_alpha": float("nan")}, {"lora_alpha": None}, {"lora_dropout": 1.0}, {"target_modules": None}],
    ids=lambda config: next(iter(config)),
)  # fmt: skip
def test_what_would_be_ignored_is_refused(tmp_path, config):
    message = refused(*adapter(tmp_path, **config))
    key = next(iter(config))
    said = {"r": "(--rank|r, lora_alpha)", "lora_alpha": "alpha", "lora_dropout": "dropout"}.get(key, key)
    assert "adapter_config.json" in message and re.search(said, message)


@pytest.mark.parametrize("targets", [["nothing"], [], [3], "(", "a{99999999999999999999}", "lm_head", ["lm_head"]])
def test_targets_that_fit_no_layer_are_refused(tmp_path, targets):
    assert "adapter_config.json" in refused(*adapter(tmp_path, target_modules=targets))


def test_a_pissa_adapter_as_peft_saves_it_is_refused(tmp_path):
    theirs = llama(tmp_path / "base")  # peft takes the adapter's start out of the base: other logits without that
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM")
    peft.get_peft_model(theirs, config).save_pretrained(tmp_path / "adapter")
    assert "pissa" in refused(load_model(tmp_path / "base"), tmp_path / "adapter")


@pytest.mark.parametrize("change", ["missing", "extra", "renamed", "shape", "transposed", "integers"])
def test_tensors_must_be_exactly_those_promised(tmp_path, change):
    model, folder = adapter(tmp_path)
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    name = min(weights)
    tensor = weights.pop(name)
    changed = {
        "missing": ({}, [name, "missing"]),
        "extra": ({name: tensor, name.replace("q_proj", "z_proj"): tensor.clone()}, ["z_proj"]),
        "renamed": ({name.removeprefix("base_model."): tensor}, [name, "missing"]),
        "shape": ({name: tensor[:-1].clone()}, [name, "[3, 64]", "[4, 64]"]),
        "transposed": ({name: tensor.t().contiguous()}, [name, "[64, 4]", "[4, 64]"]),
        "integers": ({name: tensor.int()}, [name, "int32"]),
    }
    save_file(weights | changed[change][0], file)
    message = refused(model, folder)
    assert all(words in message for words in ["adapter_model.safetensors", *changed[change][1]])


@pytest.mark.parametrize(
    "rename, said",
    [
        (lambda name: name.removeprefix("base_model.model."), ", which begins with '' in place of 'base_model.model.'"),
        (lambda name: name.replace("model.layers", "language_model.model.layers"),
         ", which begins with 'base_model.model.language_' in place of 'base_model.model.'"),
        (lambda name: name.replace("base_model.model.model.", "base_model.model.model.decoder."),
         ", which begins with 'base_model.model.model.decoder.' in place of 'base_model.model.model.'"),
        (lambda name: name.replace(".weight", ".default.weight"), "; the file has others, the first: base_model"),
        (lambda name: name.replace("q_proj", "query"), "; the file has others, the first: base_model"),
    ],
)  # fmt: skip
def test_names_that_begin_or_end_differently_are_named_with_the_wanted_ones(tmp_path, rename, said):
    model, folder = adapter(tmp_path)
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({rename(name): tensor for name, tensor in weights.items()}, file)
    message = refused(model, folder)
    assert f"6 of its tensors missing, the first: {min(weights)}; the file has " in message
    assert said.replace("language_'", "language_model.'") in message and rename(min(weights)) in message


def test_the_rank_of_the_tensors_must_be_that_of_the_configuration(tmp_path):
    assert "[4, 64]" in refused(*adapter(tmp_path, r=5))


@pytest.mark.parametrize("other", [{"num_hidden_layers": 2}, {"num_hidden_layers": 4}, {"hidden_size": 32}])
def test_an_adapter_of_another_model_is_refused(tmp_path, other):
    _, folder = adapter(tmp_path)
    llama(tmp_path / "other", **other)
    assert "model.layers." in refused(load_model(tmp_path / "other"), folder)


def test_a_second_adapter_is_refused(tmp_path):
    model, folder = adapter(tmp_path)
    lora.load_adapter(model, folder)
    assert "already" in refused(model, folder)


def test_a_cut_or_pickled_or_absent_adapter_is_refused(tmp_path):
    model, folder = adapter(tmp_path)
    file = folder / "adapter_model.safetensors"
    for keep in (-1, 200, 5, 0):
        file.write_bytes(file.read_bytes()[:keep])
        assert "damaged" in refused(model, folder)
    file.rename(folder / "adapter_model.bin")
    assert "adapter_model.bin is a pickle" in refused(model, folder)
    (folder / "adapter_model.bin").unlink()
    assert "no such file" in refused(model, folder)
    (folder / "adapter_config.json").write_text("[1]")
    assert "list" in refused(model, folder)
    (folder / "adapter_config.json").unlink()
    assert "no adapter_config.json" in refused(model, folder)
    assert "no such folder" in refused(model, folder / "nowhere")


@pytest.mark.parametrize(
    "settings, said",
    [((0, 8.0, 0.0, "all"), "--rank 0"), ((-3, 8.0, 0.0, "all"), "--rank -3"),
     ((10**12, 8.0, 0.0, "all"), "--rank 1000"), ((4, -1.0, 0.0, "all"), "--alpha -1"),
     ((4, float("nan"), 0.0, "all"), "--alpha nan"),
     ((4, 8.0, 1.0, "all"), "--dropout 1"), ((4, 8.0, -0.1, "all"), "--dropout -0.1"),
     ((4, 8.0, float("nan"), "all"), "--dropout nan"), ((4, 8.0, 0.0, "zap"), "--targets zap"),
     ((4, 8.0, 0.0, "q_proj,zap"), "--targets zap"), ((4, 8.0, 0.0, "proj"), "--targets proj"),
     ((4, 8.0, 0.0, "lm_head"), "--targets lm_head"), ((4, 8.0, 0.0, ""), "--targets")],
)  # fmt: skip
def test_impossible_settings_are_refused_and_leave_the_model_alone(tmp_path, settings, said):
    llama(tmp_path)
    model = load_model(tmp_path)
    with pytest.raises(UserError) as error:
        lora.add_lora(model, *settings)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not adapter_files.has_adapter(model) and all(p.requires_grad for p in model.parameters())


def test_no_targets_at_all_are_refused(tmp_path):
    llama(tmp_path)
    with pytest.raises(UserError, match="--targets"):
        lora.add_lora(load_model(tmp_path), 4, 8.0, targets=[])


def test_an_adapter_with_dropout_evaluates_without_it(tmp_path):
    """load_model returns a model in evaluation mode; what load_adapter puts on it must be in that mode too."""
    theirs = llama(tmp_path / "base")
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.5, target_modules=["q_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(theirs, config).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    model = load_model(tmp_path / "base")
    lora.load_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        assert relative(model(TOKENS), wrapped(TOKENS).logits) < 1e-5


def test_a_refused_adapter_leaves_the_model_as_it_was(tmp_path):
    llama(tmp_path / "base")
    model = load_model(tmp_path / "base")
    lora.add_lora(model, 4, 8.0, targets="q_proj")
    lora.save_adapter(model, tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    weights.pop(next(iter(weights)))
    save_file(weights, tmp_path / "adapter" / "adapter_model.safetensors")
    fresh = load_model(tmp_path / "base")
    trainable = {name: p.requires_grad for name, p in fresh.named_parameters()}
    with pytest.raises(UserError, match="1 of its tensors missing"):
        lora.load_adapter(fresh, tmp_path / "adapter")
    assert (
        not adapter_files.has_adapter(fresh) and {n: p.requires_grad for n, p in fresh.named_parameters()} == trainable
    )


def test_an_adapter_never_replaces_a_model(tmp_path):
    llama(tmp_path / "base")
    model = load_model(tmp_path / "base")
    lora.add_lora(model, 4, 8.0)
    with pytest.raises(UserError, match="holds a model"):
        lora.save_adapter(model, tmp_path / "base")
    assert (tmp_path / "base" / "model.safetensors").is_file()


def test_a_merged_model_is_saved_as_it_is_and_an_unmerged_one_refused(tmp_path):
    llama(tmp_path / "base")
    model = load_model(tmp_path / "base")
    lora.add_lora(model, 4, 8.0)
    for layer in lora.lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    with pytest.raises(UserError, match="not merged"):
        save_model(model, tmp_path / "out")
    lora.merge(model)
    save_model(model, tmp_path / "out")
    with torch.no_grad():
        assert relative(load_model(tmp_path / "out")(TOKENS), model(TOKENS)) < 1e-6
