"""adapters.py against peft, against the papers' equations, and against what the adapters library wrote: logits and
gradients, files read in both directions, packing, decoding, a base in 4 bits, and bad input.

peft can't compute the prefix of every family: which, and why, stands at PREFIX_NOT_IN_PEFT.
"""

import copy
import functools
import json
import re
import shutil
import warnings

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from support.helpers import chat_base, llama, record_graphs, relative

import adapter_files
import adapters
import decoding
import lora
import methods
from checkpoint import load_model, save_model
from common.choices import CHECKPOINTING_KINDS
from common.errors import UserError
from kernels.onednn_linear import can_pack
from tokenizer import load_tokenizer

# ---- bases and adapters ----

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 128}
GPT2_SIZES = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {"num_key_value_heads": 2}
CAPS = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 20.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}
BASES = {  # name: family, what differs from the sizes above
    "llama": ("llama", GROUPED),
    "qwen2": ("qwen2", GROUPED | {"tie_word_embeddings": True}),  # biases of q, k and v
    "gpt2": ("gpt2", {}),  # learned positions; one matrix for q, k and v, stored as [in, out]
    "gemma": ("gemma", GROUPED | {"head_dim": 12}),  # embeddings that are scaled, heads wider than hidden / heads
    "gemma2": ("gemma2", GROUPED | CAPS | {"head_dim": 12, "sliding_window": 6, "query_pre_attn_scalar": 10}),
    "mistral": ("mistral", GROUPED | {"sliding_window": 6}),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.5}),  # attention and MLP beside each other
    "falcon": ("falcon", {"multi_query": True, "parallel_attn": True}),  # the same with one norm, one key-value head
    "falcon 40B": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
    "mixtral": ("mixtral", GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    # Angles that depend on the length of the text, which a prompt makes longer: 14 tokens and 5 are beyond 16.
    "dynamic rope": (
        "llama",
        GROUPED | {"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}, "max_position_embeddings": 16},
    ),
    "longrope": ("phi3", GROUPED | {"original_max_position_embeddings": 16, "rope_scaling": LONGROPE}),
}
# Transformers caches the keys of falcon 40B once for each query head, so peft's prefix has one for each as well. Here,
# as in the model's weights, heads share them.
PREFIX_NOT_IN_PEFT = {"falcon 40B"}
# Transformers computes all rows of a batch with the angles of the longest.
BATCH_NOT_IN_TRANSFORMERS = {"dynamic rope", "longrope"}

P = 5  # virtual tokens
KINDS = {
    "prompt-tuning": lambda model: adapters.add_prompt(model, P, "random"),
    "p-tuning, mlp": lambda model: adapters.add_prompt(model, P, "random", "mlp", 24),
    "p-tuning, lstm": lambda model: adapters.add_prompt(model, P, "random", "lstm", 24),
    "prefix": lambda model: adapters.add_prefix(model, P, "none"),
    "prefix, mlp": lambda model: adapters.add_prefix(model, P, "mlp", 24),
    "ia3": adapters.add_ia3,
    "houlsby": lambda model: adapters.add_bottleneck(model, "houlsby", 4),
    "pfeiffer": lambda model: adapters.add_bottleneck(model, "pfeiffer", 4),
    "parallel": lambda model: adapters.add_bottleneck(model, "parallel", 4),
}
PLACEMENTS = ["houlsby", "pfeiffer", "parallel"]
IN_PEFT = [kind for kind in KINDS if kind not in PLACEMENTS]
PROMPTS = [kind for kind in IN_PEFT if kind != "ia3"]
ONE_OF_EACH = ["prompt-tuning", "p-tuning, lstm", "prefix, mlp", "ia3", "houlsby"]

TOKENS = torch.randint(3, 96, (2, 14), generator=torch.Generator().manual_seed(1))


def make(folder, name: str):
    """The random checkpoint of a base, drawn large so that whatever is left out shows; returns transformers' model."""
    family, changes = BASES[name]
    sizes = GPT2_SIZES if family == "gpt2" else SIZES
    config = transformers.CONFIG_MAPPING[family](**(sizes | IDS | changes), attn_implementation="eager")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            is_scale = ("norm" in key or ".ln_" in key) and key.endswith("weight")
            parameter.normal_(1.0 if is_scale and "gemma" not in family else 0.0, 0.3)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A function from a base's name to its folder and transformers' model, which is not to be changed."""
    return functools.cache(lambda name: (folder := tmp_path_factory.mktemp("base"), make(folder, name)))


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory):
    """A base whose matrices can be in NF4."""
    folder = tmp_path_factory.mktemp("wide")
    llama(folder, std=0.1, num_hidden_layers=2, intermediate_size=128, num_key_value_heads=2)
    return folder


@torch.no_grad()
def randomise(model) -> None:
    """Random numbers in the adapter of a model of ours or of peft's."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.normal_(1.0 if "ia3" in name else 0.0, 0.4)


def adapted(folder, kind: str, **settings):
    """Our model of a folder with a random adapter."""
    model = load_model(folder, **settings)
    KINDS[kind](model)
    randomise(model)
    return model


def in_peft(base, folder, **settings):
    """peft's model of an adapter folder; any word of peft's about keys fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, **settings)


def loaded(base, adapter):
    """Our model of a base's folder with the adapter of a folder."""
    model = load_model(base)
    methods.load_any_adapter(model, adapter)
    return model


def own_logits(wrapped, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The logits of transformers' or peft's model at the text's own tokens. peft's of a prompt come before them."""
    with warnings.catch_warnings():
        # peft gives the prefix in transformers' old form.
        warnings.simplefilter("ignore")
        return wrapped(input_ids=tokens, attention_mask=mask).logits[:, -tokens.shape[1] :]


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# ---- peft ----

# Encoders are no part of a file, so that a few bases are enough for them.
ALL_KINDS = ["llama", "gpt2"]
CASES = [
    (base, kind)
    for base in BASES
    for kind in (IN_PEFT if base in ALL_KINDS else ["prompt-tuning", "prefix", "ia3"])
    if not (base in PREFIX_NOT_IN_PEFT and kind == "prefix")
]


@pytest.mark.parametrize("base, kind", CASES)
def test_our_adapter_gives_the_same_logits_in_peft(bases, tmp_path, base, kind):
    """Also in a padded batch of texts of different lengths, against each text alone."""
    folder, theirs = bases(base)
    model = adapted(folder, kind)
    adapters.save_non_lora(model, tmp_path)
    wrapped = in_peft(theirs, tmp_path)
    with torch.no_grad():
        ours = model(TOKENS)
        assert relative(ours, own_logits(wrapped, TOKENS)) < 1e-5
        assert relative(ours, own_logits(theirs, TOKENS)) > 0.1
        assert relative(loaded(folder, tmp_path)(TOKENS), ours) < 1e-5
        if base not in BATCH_NOT_IN_TRANSFORMERS:
            mask = torch.ones_like(TOKENS)
            mask[1, 9:] = 0
            padded = own_logits(wrapped, TOKENS, mask)
            assert relative(model(TOKENS[:1]), padded[:1]) < 1e-5
            assert relative(model(TOKENS[1:, :9]), padded[1:, :9]) < 1e-5


VIRTUAL = {"num_virtual_tokens": P, "task_type": "CAUSAL_LM"}
LSTM = {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 24, "encoder_dropout": 0.0}
PEFT_PROMPTS = {
    "prompt-tuning": functools.partial(peft.PromptTuningConfig, **VIRTUAL),
    "p-tuning, mlp": functools.partial(peft.PromptEncoderConfig, **VIRTUAL, encoder_hidden_size=24),
    "p-tuning, lstm": functools.partial(peft.PromptEncoderConfig, **VIRTUAL, **LSTM),
    "prefix": functools.partial(peft.PrefixTuningConfig, **VIRTUAL),
    "prefix, mlp": functools.partial(
        peft.PrefixTuningConfig, **VIRTUAL, prefix_projection=True, encoder_hidden_size=24
    ),
}


def random_peft(theirs, config, folder):
    """peft's model with a new random adapter, which is saved to the folder."""
    wrapped = peft.get_peft_model(copy.deepcopy(theirs), config).eval()
    randomise(wrapped)
    wrapped.save_pretrained(folder)
    return wrapped


@pytest.mark.parametrize("kind", PEFT_PROMPTS)
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_a_prompt_of_peft_gives_the_same_logits_here(bases, tmp_path, base, kind):
    """That of an encoder, too: the file has what it computes."""
    folder, theirs = bases(base)
    wrapped = random_peft(theirs, PEFT_PROMPTS[kind](), tmp_path)
    model = loaded(folder, tmp_path)
    assert model.virtual_tokens == P and {*trained(model)} == {"prompt.embedding"}
    with torch.no_grad():
        assert relative(model(TOKENS), own_logits(wrapped, TOKENS)) < 1e-5


OTHER_TARGETS = [  # base, target_modules, feedforward_modules
    ("llama", None, None),
    ("llama", ["q_proj", "up_proj"], []),
    ("llama", ["q_proj", "up_proj"], ["up_proj"]),
    ("llama", ["o_proj", "gate_proj", "mlp.down_proj"], ["o_proj", "mlp.down_proj"]),
    ("llama", ["model.layers.1.mlp.down_proj", "k_proj"], ["model.layers.1.mlp.down_proj"]),
    ("llama", r".*\.1\.self_attn\.(q|o)_proj", ["o_proj"]),
    ("llama", r".*\.1\.self_attn\.(q|o)_proj", ["proj"]),  # peft takes the end of a word for a name here
    ("llama", "all-linear", ["gate_proj", "up_proj"]),
    ("gpt2", None, None),
    ("gpt2", ["c_proj", "c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    ("gpt2", ["c_fc", "attn.c_proj"], ["c_fc"]),
    ("qwen2", ["q_proj", "k_proj", "v_proj"], ["k_proj"]),
    ("gpt_neox", ["dense", "dense_h_to_4h", "query_key_value"], ["dense_h_to_4h"]),
    ("mixtral", ["k_proj", "o_proj"], []),
]  # fmt: skip


@pytest.mark.parametrize("base, targets, inputs", OTHER_TARGETS)
def test_factors_of_peft_give_the_same_logits_here(bases, tmp_path, base, targets, inputs):
    folder, theirs = bases(base)
    config = {"target_modules": targets, "feedforward_modules": inputs, "fan_in_fan_out": base == "gpt2"}
    wrapped = random_peft(theirs, peft.IA3Config(**config, task_type="CAUSAL_LM"), tmp_path)
    model = loaded(folder, tmp_path)
    with torch.no_grad():
        assert relative(model(TOKENS), own_logits(wrapped, TOKENS)) < 1e-5
        # And these back to peft, by the names that are written here.
        adapters.save_non_lora(model, tmp_path / "again")
        again = in_peft(theirs, tmp_path / "again")
        assert relative(own_logits(again, TOKENS), own_logits(wrapped, TOKENS)) < 1e-6


def test_factors_of_the_head_are_refused_or_computed(bases, tmp_path):
    folder, theirs = bases("llama")
    config = peft.IA3Config(target_modules=["q_proj", "lm_head"], feedforward_modules=[], task_type="CAUSAL_LM")
    wrapped = random_peft(theirs, config, tmp_path)
    wrapped.save_pretrained(tmp_path, save_embedding_layers=False)  # the factors alone
    try:
        model = loaded(folder, tmp_path)
    except UserError as error:
        assert "lm_head" in str(error)
        return
    with torch.no_grad():
        assert relative(model(TOKENS), own_logits(wrapped, TOKENS)) < 1e-5


# Where heads share keys, peft's network for a prefix is as wide as the keys, and ours as the model: other numbers.
@pytest.mark.parametrize(
    "base, kind",
    [("llama", kind) for kind in IN_PEFT if kind != "prefix, mlp"] + [("gpt2", kind) for kind in IN_PEFT],
)
def test_gradients_equal_those_of_peft(bases, tmp_path, base, kind):
    """Of a sum of squares. Factors go to peft by their file; peft trains no prompt of a file, so that ours gets the
    numbers of a new one of peft's."""
    folder, theirs = bases(base)
    if kind == "ia3":
        model = adapted(folder, kind)
        adapters.save_non_lora(model, tmp_path)
        wrapped = in_peft(theirs, tmp_path, is_trainable=True)
    else:
        wrapped = random_peft(theirs, PEFT_PROMPTS[kind](), tmp_path)
        model = load_model(folder)
        KINDS[kind](model)
        with torch.no_grad():
            for ours, p in zip(trained(model).values(), trained(wrapped).values(), strict=True):
                ours.copy_(p)
    loss, expected = model(TOKENS).square().sum(), own_logits(wrapped, TOKENS).square().sum()
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert len(trained(model)) == len(trained(wrapped)) > 0
    for ours, p in zip(trained(model).values(), trained(wrapped).values(), strict=True):
        assert p.grad.any() and relative(ours.grad, p.grad.view_as(ours)) < 1e-5
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_a_prefix_with_keys_for_every_query_head_is_refused(bases, tmp_path):
    folder, theirs = bases("falcon 40B")
    random_peft(theirs, PEFT_PROMPTS["prefix"](), tmp_path)
    with pytest.raises(UserError, match=r"adapter_model.safetensors: prompt_embeddings has shape \[5, 128\]"):
        loaded(folder, tmp_path)


def test_what_differs_of_the_base_is_said(bases, tmp_path):
    folder, _ = bases("llama")
    adapters.save_non_lora(adapted(folder, "prompt-tuning"), tmp_path)
    lines = []
    methods.put_adapter_on(load_model(folder), tmp_path, lines.append)
    assert lines == []
    rewrite(tmp_path, base_model_name_or_path="some/other-model")
    methods.put_adapter_on(load_model(folder), tmp_path, lines.append)
    assert len(lines) == 1 and "some/other-model" in lines[0]


# ---- bottleneck adapters ----

# The modules of transformers' blocks whose outputs are added to the residual, after attention and after the MLP, and
# those that are given the residual to which each is added.
SUBLAYERS = {
    "llama": ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm"),
    "gpt2": ("attn", "mlp", "ln_1", "ln_2"),
    "gemma2": (
        *("post_attention_layernorm", "post_feedforward_layernorm"),
        *("input_layernorm", "pre_feedforward_layernorm"),
    ),
    "gpt_neox": ("attention", "mlp", "input_layernorm", "post_attention_layernorm"),
}


def houlsby(weights, y, x):
    """Houlsby et al. 2019, section 2.1: an adapter with a residual connection of its own, on a sublayer's output."""
    return y + F.linear(F.silu(F.linear(y, weights.down, weights.down_bias)), weights.up, weights.up_bias)


def pfeiffer(weights, y, x):
    """Pfeiffer et al. 2021, section 3.1.2, where the norm stands before the sublayer: it reads the sum."""
    return y + F.linear(F.relu(F.linear(x + y, weights.down, weights.down_bias)), weights.up, weights.up_bias)


def parallel(weights, y, x):
    """He et al. 2022, table 1 and section 4.6: beside the sublayer, s = 4. As AdapterHub has it, x is not normed."""
    return y + 4 * F.linear(F.relu(F.linear(x, weights.down, weights.down_bias)), weights.up, weights.up_bias)


EQUATIONS = {"houlsby": houlsby, "pfeiffer": pfeiffer, "parallel": parallel}
IS_AFTER_ATTENTION = {"houlsby": True, "pfeiffer": False, "parallel": False}


def with_equation(theirs, base: str, model, equation, after_attention: bool, after_mlp: bool = True):
    """A copy of transformers' model into which hooks put the equation, with the numbers of our model's adapters."""
    theirs = copy.deepcopy(theirs)
    blocks = next(module for module in theirs.modules() if isinstance(module, torch.nn.ModuleList))
    for number, block in enumerate(blocks):
        ours, names = model.blocks[number], SUBLAYERS[base]
        assert (ours.attention_adapter is not None, ours.mlp_adapter is not None) == (after_attention, after_mlp)
        for output, reader, weights in (
            (names[0], names[2], ours.attention_adapter),
            (names[1], names[3], ours.mlp_adapter),
        ):
            if weights is None:
                continue
            # One reader may be called long before the sublayer, and gpt_neox has two.
            residual = []

            def note(module, inputs, residual=residual):
                residual[:] = inputs[:1]

            def add(module, inputs, y, weights=weights, residual=residual):
                rest = y[1:] if isinstance(y, tuple) else None
                y = equation(weights, y if rest is None else y[0], *residual)
                return y if rest is None else (y, *rest)

            getattr(block, reader).register_forward_pre_hook(note)
            getattr(block, output).register_forward_hook(add)
    return theirs


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("base", SUBLAYERS)
def test_bottleneck_adapters_compute_the_equations(bases, base, placement):
    folder, theirs = bases(base)
    model = adapted(folder, placement)
    wanted = with_equation(theirs, base, model, EQUATIONS[placement], IS_AFTER_ATTENTION[placement])(TOKENS).logits
    ours = model(TOKENS)
    assert relative(ours, wanted) < 1e-5 and relative(ours, load_model(folder)(TOKENS)) > 0.1
    parameters = trained(model).values()
    grads = torch.autograd.grad(ours.square().sum(), parameters)
    wanted_grads = torch.autograd.grad(wanted.square().sum(), parameters)
    assert all(relative(grad, wanted) < 1e-5 for grad, wanted in zip(grads, wanted_grads, strict=True))


# Of AdapterHub's library, adapters 1.3.0 with transformers 4.57.6: what it wrote for a Llama of hidden size 32 and two
# layers, for add_adapter("a", config=...) and save_adapter(..., use_safetensors=True).
DOUBLE_SEQ_BN = {
    "adapter_residual_before_ln": False, "cross_adapter": False, "dropout": 0.0, "factorized_phm_W": True,
    "factorized_phm_rule": False, "hypercomplex_nonlinearity": "glorot-uniform", "init_weights": "bert",
    "init_weights_seed": None, "inv_adapter": None, "inv_adapter_reduction_factor": None, "is_parallel": False,
    "learn_phm": True, "leave_out": [], "ln_after": False, "ln_before": False, "mh_adapter": True,
    "non_linearity": "swish", "original_ln_after": True, "original_ln_before": False, "output_adapter": True,
    "phm_bias": True, "phm_c_init": "normal", "phm_dim": 4, "phm_init_range": 0.0001, "phm_layer": False,
    "phm_rank": 1, "reduction_factor": 16, "residual_before_ln": True, "scaling": 1.0, "shared_W_phm": False,
    "shared_phm_rule": True, "stochastic_depth": 0.0, "use_gating": False,
}  # fmt: skip
SEQ_BN = DOUBLE_SEQ_BN | {"mh_adapter": False, "non_linearity": "relu", "original_ln_before": True}
PAR_BN = SEQ_BN | {"init_weights": "mam_adapter", "is_parallel": True, "original_ln_before": False}
PAR_BN |= {"reduction_factor": 2, "scaling": 4.0}
HUB_CONFIGS = {"houlsby": DOUBLE_SEQ_BN, "pfeiffer": SEQ_BN, "parallel": PAR_BN}
HUB_OUTSIDE = {"hidden_size": 32, "model_class": "LlamaForCausalLM", "model_name": "base", "model_type": "llama"}
HUB_OUTSIDE |= {"name": "a", "version": "adapters.1.3.0"}
HUB_SIZES = {"houlsby": 2, "pfeiffer": 2, "parallel": 16}


def hub_shapes(placement: str, name: str = "a") -> dict[str, list[int]]:
    """{name of a tensor: shape} in adapter.safetensors."""
    size, shapes = HUB_SIZES[placement], {}
    places = ["attention_adapters", "output_adapters"] if placement == "houlsby" else ["output_adapters"]
    for stem in (f"model.layers.{layer}.{place}.adapters.{name}" for layer in (0, 1) for place in places):
        shapes |= {f"{stem}.adapter_down.0.bias": [size], f"{stem}.adapter_down.0.weight": [size, 32]}
        shapes |= {f"{stem}.adapter_up.bias": [32], f"{stem}.adapter_up.weight": [32, size]}
    return shapes


def hub_folder(folder, placement: str = "houlsby", **changes):
    """A folder as AdapterHub's library writes it, with random numbers. changes: of the configuration."""
    folder.mkdir()
    config = HUB_OUTSIDE | {"config": HUB_CONFIGS[placement] | changes}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(5)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in hub_shapes(placement).items()}
    save_file(tensors, folder / "adapter.safetensors")
    return folder


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_files_have_the_layout_of_the_adapters_library(bases, tmp_path, placement):
    folder, _ = bases("llama")
    model = load_model(folder)
    adapters.add_bottleneck(model, placement, HUB_CONFIGS[placement]["reduction_factor"], name="a")
    adapters.save_non_lora(model, tmp_path)
    assert {each.name for each in tmp_path.iterdir()} == {"adapter.safetensors", "adapter_config.json"}
    tensors = load_file(tmp_path / "adapter.safetensors")
    assert {name: [*tensor.shape] for name, tensor in tensors.items()} == hub_shapes(placement)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    inner = written.pop("config")
    recorded = HUB_CONFIGS[placement]
    # Of what is left out, the library takes its own values: the same ones.
    assert inner == {key: recorded[key] for key in inner} and {"non_linearity", "reduction_factor"} < {*inner}
    same = {key: value for key, value in HUB_OUTSIDE.items() if key != "model_name"}
    assert {key: written[key] for key in same} == same


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_file_of_the_adapters_library_computes_the_equations(bases, tmp_path, placement):
    base, theirs = bases("llama")
    model = loaded(base, hub_folder(tmp_path / "theirs", placement))
    wanted = with_equation(theirs, "llama", model, EQUATIONS[placement], IS_AFTER_ATTENTION[placement])
    tensors = load_file(tmp_path / "theirs" / "adapter.safetensors")
    stem = "model.layers.1.output_adapters.adapters.a.adapter_"
    adapter = model.blocks[1].mlp_adapter
    assert torch.equal(adapter.down, tensors[stem + "down.0.weight"])
    assert torch.equal(adapter.up_bias, tensors[stem + "up.bias"])
    with torch.no_grad():
        assert relative(model(TOKENS), wanted(TOKENS).logits) < 1e-5
    adapters.save_non_lora(model, tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter.safetensors")
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in again)


@pytest.mark.parametrize("architectures", [None, []])
def test_a_base_need_not_name_its_class(bases, tmp_path, architectures):
    """Such a base is loaded and trained, so that its adapter must be saved."""
    folder, _ = bases("llama")
    shutil.copytree(folder, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"architectures": architectures}))
    model = adapted(tmp_path / "base", "houlsby")
    adapters.save_non_lora(model, tmp_path / "adapter")
    with torch.no_grad():
        assert relative(loaded(folder, tmp_path / "adapter")(TOKENS), model(TOKENS)) < 1e-6


@pytest.mark.parametrize("factor", [3, 7, 0.5, 10.6, 32])
def test_the_written_reduction_factor_gives_the_same_size(bases, tmp_path, factor):
    folder, _ = bases("llama")
    model = load_model(folder)
    adapters.add_bottleneck(model, "parallel", factor)
    adapters.save_non_lora(model, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())["config"]["reduction_factor"]
    size = load_file(tmp_path / "adapter.safetensors").popitem()[1].shape
    assert int(32 // factor) in size and int(32 // written) == int(32 // factor)
    assert trained(loaded(folder, tmp_path)).keys() == trained(model).keys()


@pytest.mark.parametrize(
    "placement",
    [
        adapters.Placement(True, False, "sum", "gelu", 0.5),
        adapters.Placement(True, True, "residual", "silu", 2.0),
        adapters.Placement(False, True, "output", "relu", 1.0),
    ],
)
def test_any_placement_is_saved_as_it_is(bases, tmp_path, placement):
    folder, theirs = bases("llama")
    model = load_model(folder)
    adapters.add_bottleneck(model, placement, 4, name="other")
    randomise(model)
    adapters.save_non_lora(model, tmp_path)
    again = loaded(folder, tmp_path)
    activation = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu}[placement.activation]

    def equation(weights, y, x):
        read = {"sum": x + y, "residual": x, "output": y}[placement.reads]
        middle = activation(F.linear(read, weights.down, weights.down_bias))
        return y + placement.scaling * F.linear(middle, weights.up, weights.up_bias)

    wanted = with_equation(theirs, "llama", model, equation, placement.after_attention, placement.after_mlp)
    with torch.no_grad():
        assert relative(model(TOKENS), wanted(TOKENS).logits) < 1e-5
        assert relative(again(TOKENS), model(TOKENS)) < 1e-6


# ---- several texts in a row ----

SEGMENTS = torch.tensor([[0] * 6 + [1] * 5 + [2] * 3, [0] * 9 + [1] * 2 + [-1] * 3])


@pytest.mark.parametrize("kind", ["prompt-tuning", "prefix, mlp"])
@pytest.mark.parametrize("base", ["llama", "gpt2", "mistral", "dynamic rope", "longrope"])
def test_packed_texts_have_the_logits_of_each_alone(bases, base, kind):
    """Where angles depend on the length, some texts are, with their virtual tokens, beyond the first length."""
    model = adapted(bases(base)[0], kind)
    tokens, segments = TOKENS, SEGMENTS
    if base in BATCH_NOT_IN_TRANSFORMERS:  # a text of 17 tokens with its 5
        tokens, segments = torch.cat([TOKENS, TOKENS], 1), torch.cat([SEGMENTS, SEGMENTS[:1].repeat(2, 1) + 3], 1)
        segments[0, 8:20] = 1
        segments[0, 20:] = 2
    parameter = next(iter(trained(model).values()))
    packed = model(tokens, segments=segments)
    gradient = torch.autograd.grad(packed.square().sum(), parameter)[0]
    wanted = torch.zeros_like(gradient)
    for row in range(2):
        for number in segments[row].unique():
            here = segments[row] == number
            if number < 0:
                assert not packed[row, here].any()
                continue
            alone = model(tokens[row : row + 1, here])
            assert relative(packed[row, here], alone[0]) < 1e-5
            wanted += torch.autograd.grad(alone.square().sum(), parameter)[0]
    assert relative(gradient, wanted) < 1e-5


def test_a_prompt_takes_positions_from_texts(bases):
    """Those that are left are the longest text: with one token more, a prompt can't be answered."""
    folder, _ = bases("gpt2")
    model = adapted(folder, "prefix")
    assert model.max_positions == 128 - P
    text = TOKENS.flatten().repeat(5)[:120].tolist()
    assert len(model.generate([text], 60)[0]) == 3
    assert model.generate([text], 60)[0] == greedy(model, text, 3)
    with pytest.raises(UserError, match="a prompt has 123 tokens; the model takes 1 to 122"):
        model.generate([text + [1, 2, 3]], 1)


# ---- decoding ----

STEM = TOKENS[0, :8].tolist()
PROMPT_IDS = [STEM, STEM[:5], [*STEM, 30, 31, 32, 33], [40], [*STEM[:5], 50, 51]]
SHORT_IDS = [STEM[:3], STEM[:2], [*STEM[:4], 50], [40], [*STEM[:3], 60]]


@torch.no_grad()
def greedy(model, prompt: list[int], steps: int, choose=None) -> list[int]:
    """The answer to a prompt by a whole forward for every token. choose: a function of ids [1, T] and logits [1, V]."""
    text = list(prompt)
    for _ in range(steps):
        ids = torch.tensor([text])
        logits = model(ids)[:, -1]
        text.append(int(logits.argmax(-1) if choose is None else choose(ids, logits)))
    return text[len(prompt) :]


GENERATED = [("llama", kind) for kind in [*ONE_OF_EACH, "pfeiffer", "parallel"]]
GENERATED += [("gpt2", "prompt-tuning"), ("gpt_neox", "prompt-tuning"), ("gemma2", "prefix")]
GENERATED += [(base, kind) for base in ("mistral", "dynamic rope", "longrope") for kind in ("prompt-tuning", "prefix")]


@pytest.mark.parametrize("base, kind", GENERATED)
def test_the_cache_gives_the_answers_of_whole_forwards(bases, base, kind):
    """To prompts of different lengths, some of which begin alike. Those of longrope pass the length from which on its
    angles are others; with the dynamic rope, keys that are kept would be others beyond it, so all stay below."""
    model = adapted(bases(base)[0], kind)
    prompts = SHORT_IDS if base == "dynamic rope" else PROMPT_IDS
    wanted = [greedy(model, prompt, 6) for prompt in prompts]
    assert model.generate(prompts, 6) == wanted
    assert model.generate(prompts[:1], 6) == wanted[:1]


@pytest.mark.parametrize("kind", ["prompt-tuning", "prefix", "ia3", "houlsby"])
def test_steps_that_a_gpu_takes_ahead_give_the_same_answers(bases, monkeypatch, kind):
    model = adapted(bases("mistral")[0], kind)
    wanted = model.generate(PROMPT_IDS, 12)
    graphs = record_graphs(monkeypatch)
    assert model.generate(PROMPT_IDS, 12) == wanted and graphs


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_drafts_of_prompt_lookup_change_no_answer(bases, kind):
    model = adapted(bases("mistral")[0], kind)
    prompt = [7, 8, 9, 7, 8, 9, 7, 8]
    drafts = []
    draft = decoding.lookup_draft
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "lookup_draft", lambda *args: drafts.append(draft(*args)) or drafts[-1])
        answer = model.generate([prompt], 12, lookup=4)[0]
    assert answer == greedy(model, prompt, 12) and any(drafts)


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_the_repetition_penalty_counts_the_text_alone(bases, kind):
    model = adapted(bases("llama")[0], kind)
    penalty = transformers.RepetitionPenaltyLogitsProcessor(1.5)
    wanted = [greedy(model, prompt, 6, lambda *given: penalty(*given).argmax()) for prompt in PROMPT_IDS[1:4]]
    assert model.generate(PROMPT_IDS[1:4], 6, repetition_penalty=1.5) == wanted
    assert model.generate(PROMPT_IDS[1:4], 6) != wanted


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_sampling_with_seeds_draws_as_by_whole_forwards(bases, kind):
    model = adapted(bases("llama")[0], kind)
    prompts, seeds = [*PROMPT_IDS[1:4], PROMPT_IDS[1]], [5, 6, 7, 6]
    wanted = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)
        draw = functools.partial(torch.multinomial, num_samples=1, generator=generator)
        wanted.append(greedy(model, prompt, 6, lambda ids, logits, draw=draw: draw((logits / 0.8).softmax(-1))))
    assert wanted[0] != wanted[3]  # the same prompt with another seed
    assert model.generate(prompts, 6, temperature=0.8, seeds=seeds) == wanted
    assert model.generate(prompts[:1], 6, temperature=0.8, seed=5) == wanted[:1]


@pytest.mark.parametrize("kind", ["prompt-tuning", "prefix", "ia3", "parallel"])
def test_packed_weights_change_nothing_but_rounding(bases, kind):
    """They are in bf16 and laid out for decoding, those under the factors of (IA)^3 one by one."""
    model = adapted(bases("llama")[0], kind, dtype=torch.bfloat16)
    with torch.no_grad():
        wanted = model(TOKENS).float()
        with decoding.packed_weights(model, 100):
            assert decoding.is_packed(model) == can_pack(model.embed.weight, 0)
            assert relative(model(TOKENS).float(), wanted) < 0.05


# ---- a base in 4 bits ----


@pytest.mark.parametrize("kind", ["prompt-tuning", "p-tuning, lstm", "prefix, mlp", "ia3", *PLACEMENTS])
def test_a_base_in_nf4_is_trained_and_answers(wide_base, tmp_path, kind):
    model = adapted(wide_base, kind, quant="nf4")
    assert adapter_files.quant_kind(model) == "nf4"
    logits = model(TOKENS)
    logits.square().mean().backward()
    assert logits.isfinite().all()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in trained(model).values())
    assert model.generate(PROMPT_IDS[:2], 3) == [greedy(model, prompt, 3) for prompt in PROMPT_IDS[:2]]
    adapters.save_non_lora(model, tmp_path)
    again = load_model(wide_base, quant="nf4")
    methods.load_any_adapter(again, tmp_path)
    assert relative(again(TOKENS), logits) < 1e-6


@torch.no_grad()
def test_factors_are_merged_into_a_base_in_nf4_and_taken_out_again(wide_base):
    model = adapted(wide_base, "ia3", quant="nf4")
    logits = model(TOKENS)
    adapter_files.merge(model)
    merged = model(TOKENS)
    scaled = adapter_files.adapter_modules(model).values()
    assert relative(merged, logits) < 1e-5 and all(each.merged and each.base.nf4 is None for each in scaled)
    adapter_files.unmerge(model)
    assert torch.equal(model(TOKENS), logits) and adapter_files.quant_kind(model) == "nf4"


# ---- merging ----


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("base", ["llama", "qwen2", "gpt2", "gpt_neox"])
@torch.no_grad()
def test_factors_are_merged_and_taken_out_again(bases, base, keep):
    """Into the weights, and into the biases of scaled outputs."""
    model = adapted(bases(base)[0], "ia3")
    weights = {name: p.clone() for name, p in model.named_parameters()}
    logits = model(TOKENS)
    lost = adapter_files.merge(model, keep)
    assert 0 <= lost < 1e-6
    assert relative(model(TOKENS), logits) < 1e-5
    adapter_files.unmerge(model)
    after = dict(model.named_parameters())
    assert after.keys() == weights.keys()
    for name, p in after.items():
        assert torch.equal(p, weights[name]) if keep else relative(p, weights[name]) < 1e-6
    assert relative(model(TOKENS), logits) < 1e-5


@pytest.mark.parametrize("removed", [False, True])
@pytest.mark.parametrize("base", ["qwen2", "gpt2"])
@pytest.mark.parametrize("kind", ["ia3", "lora"])
def test_a_merged_model_is_saved_as_an_ordinary_one(bases, tmp_path, kind, base, removed):
    """Whether the adapter's modules were taken off or not; also where linears have biases."""
    model = load_model(bases(base)[0])
    KINDS[kind](model) if kind in KINDS else lora.add_lora(model, 4, 8.0)
    randomise(model)
    with torch.no_grad():
        logits = model(TOKENS)
        adapter_files.merge(model)
        if removed:
            adapter_files.remove_adapter(model)
        save_model(model, tmp_path)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert relative(own_logits(theirs, TOKENS), logits) < 1e-5
        assert relative(load_model(tmp_path)(TOKENS), logits) < 1e-5


@pytest.mark.parametrize("kind", [*PROMPTS, *PLACEMENTS])
def test_what_is_no_update_of_weights_is_not_merged(bases, kind):
    model = adapted(bases("llama")[0], kind)
    with torch.no_grad():
        logits = model(TOKENS)
        for change in (adapter_files.merge, adapter_files.unmerge):
            with pytest.raises(UserError, match="no update of weights"):
                change(model)
        assert torch.equal(model(TOKENS), logits)


# ---- memory for time ----


@pytest.mark.parametrize(
    "base, kind",
    [("llama", kind) for kind in KINDS]
    + [("gpt_neox", kind) for kind in ("prompt-tuning", "prefix", "ia3", "houlsby")],
)
def test_gradients_are_the_same_with_every_activation_checkpointing(bases, base, kind):
    model = adapted(bases(base)[0], kind).train()
    results = []
    for checkpointing in CHECKPOINTING_KINDS:
        model.activation_checkpointing = checkpointing
        loss = model(TOKENS, segments=SEGMENTS).square().mean()
        results.append([loss, *torch.autograd.grad(loss, trained(model).values())])
    assert len(results) > 2 and all(grad.any() for grad in results[0])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


# ---- on a model and off it ----


@pytest.mark.parametrize(
    "base, kind",
    [("llama", kind) for kind in KINDS]
    + [(base, kind) for base in ("gpt2", "gpt_neox") for kind in ("prefix", "ia3", "houlsby")],
)
def test_without_its_adapter_a_model_is_its_base(bases, base, kind):
    """Switched off or taken off, to the bit; and switched on or put back, it is the adapted one."""
    folder, _ = bases(base)
    plain = load_model(folder)
    model = adapted(folder, kind)
    with torch.no_grad():
        wanted, logits = plain(TOKENS), model(TOKENS)
        answers = plain.generate(PROMPT_IDS[:2], 2)
        assert relative(logits, wanted) > 0.1
        with adapter_files.adapter_off(model):
            assert torch.equal(model(TOKENS), wanted) and model.generate(PROMPT_IDS[:2], 2) == answers
        assert torch.equal(model(TOKENS), logits)
        modules = adapter_files.remove_adapter(model)
        assert modules and not adapter_files.has_adapter(model) and model.virtual_tokens == 0
        assert torch.equal(model(TOKENS), wanted)
        assert {name for name, _ in model.named_parameters()} == {name for name, _ in plain.named_parameters()}
        adapter_files.put_back(model, modules)
        assert torch.equal(model(TOKENS), logits)


@pytest.mark.parametrize("kind", ["ia3", *PLACEMENTS])
@pytest.mark.parametrize("base", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_new_adapter_leaves_the_base_exactly(bases, base, kind, dtype):
    model = load_model(bases(base)[0], dtype)
    before = model(TOKENS)
    KINDS[kind](model)
    assert torch.equal(model(TOKENS), before)


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_new_is_trained_and_in_float32(bases, kind):
    model = load_model(bases("llama")[0], torch.bfloat16)
    before = {name for name, _ in model.named_parameters()}
    KINDS[kind](model)
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    frozen = {name.replace(".base.", ".") for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == before
    model(TOKENS).float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trained(model).values())


@torch.no_grad()
def test_one_base_can_have_several_adapters_in_turn(bases):
    folder, _ = bases("llama")
    model = load_model(folder)
    kept = {}
    for kind, add in KINDS.items():
        add(model)
        randomise(model)
        logits = model(TOKENS)
        kept[kind] = (logits, adapter_files.remove_adapter(model))
    for logits, modules in kept.values():
        adapter_files.put_back(model, modules)
        assert torch.equal(model(TOKENS), logits)
        adapter_files.remove_adapter(model)


# ---- how adapters begin ----


def test_a_prompt_begins_as_tokens_do(bases):
    """Also where a model multiplies its embeddings, which it does not do to a prompt's vectors."""
    folder, theirs = bases("gemma")
    model = load_model(folder)
    torch.manual_seed(0)
    adapters.add_prompt(model, P, "vocabulary")
    with torch.no_grad():
        table = theirs.get_input_embeddings()(torch.arange(96))
        ids = (model.prompt.embedding[:, None] - table).abs().amax(-1).argmin(1)
        assert len(ids.unique()) > 1
        whole = model(TOKENS)
        text = torch.cat([ids.expand(2, -1), TOKENS], 1)
        assert relative(whole, load_model(folder)(text)[:, P:]) < 1e-5


def test_a_prompt_begins_as_a_text_over_and_over(tmp_path):
    folder = chat_base(tmp_path, hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    model = load_model(folder)
    ids = load_tokenizer(folder).encode("the red fox")
    count = 2 * len(ids) + 1
    adapters.add_prompt(model, count, "text:the red fox")
    assert len(ids) > 1 and torch.equal(model.prompt.embedding, model.embed.weight[[*ids, *ids, ids[0]]])


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_depends_on_the_seed_alone(bases, kind):
    runs = []
    for seed in (1, 1, 2):
        model = load_model(bases("llama")[0])
        torch.manual_seed(seed)
        KINDS[kind](model)
        runs.append([p.detach().clone() for p in trained(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs[:2], strict=True))
    assert all(p.isfinite().all() for p in runs[0])
    if kind != "ia3":  # begins with ones
        assert not all(torch.equal(a, b) for a, b in zip(*runs[1:], strict=True))


# ---- bad input ----


def rewrite(folder, **changes) -> None:
    """Changes the configuration of an adapter's folder."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(base, folder) -> str:
    """What an adapter is refused with. The model is afterwards as it was."""
    model = load_model(base)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(UserError) as error:
        methods.load_any_adapter(model, folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    assert not adapter_files.has_adapter(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    return str(error.value)


def saved(bases, folder, kind: str):
    """The folder of a llama, and that of an adapter of it."""
    base, _ = bases("llama")
    adapters.save_non_lora(adapted(base, kind), folder)
    return base, folder


@pytest.mark.parametrize(
    "kind, changes, said",
    [
        ("prompt-tuning", {"num_virtual_tokens": 4}, r"safetensors: prompt_embeddings has shape \[5, 32\].*\[4, 32\]"),
        ("prefix", {"num_virtual_tokens": 6}, r"safetensors: prompt_embeddings has shape \[5, 64\].*\[6, 64\]"),
        ("p-tuning, mlp", {"num_virtual_tokens": "5"}, "adapter_config.json: num_virtual_tokens"),
        ("prompt-tuning", {"num_virtual_tokens": True}, "adapter_config.json: num_virtual_tokens"),
        ("prompt-tuning", {"num_virtual_tokens": None}, "adapter_config.json: num_virtual_tokens"),
        ("prefix", {"modules_to_save": ["lm_head"]}, "adapter_config.json: modules_to_save"),
        ("prompt-tuning", {"num_virtual_tokens": 127}, "adapter_config.json: .*--virtual-tokens 127.* 128 positions"),
        ("prefix", {"num_virtual_tokens": 1000}, "adapter_config.json: .*--virtual-tokens 1000.* 128 positions"),
        ("prompt-tuning", {"num_virtual_tokens": 0}, "adapter_config.json: .*--virtual-tokens 0"),
        ("prompt-tuning", {"num_virtual_tokens": -3}, "adapter_config.json: .*--virtual-tokens -3"),
        ("prefix", {"num_virtual_tokens": 10**15}, "adapter_config.json: .*--virtual-tokens 1000000000000000"),
        ("prompt-tuning", {"num_transformer_submodules": 2}, "adapter_config.json: num_transformer_submodules"),
        ("prompt-tuning", {"peft_type": "PREFIX_TUNING"}, r"safetensors: prompt_embeddings has shape \[5, 32\]"),
        ("prefix", {"peft_type": "PROMPT_TUNING"}, r"safetensors: prompt_embeddings has shape \[5, 64\]"),
        ("prompt-tuning", {"peft_type": "ADAPTION_PROMPT"}, "adapter_config.json: peft_type 'ADAPTION_PROMPT' is not"),
        ("prompt-tuning", {"peft_type": None}, "adapter_config.json: peft_type 'None' is not supported"),
        ("prompt-tuning", {"peft_type": ["IA3"]}, "adapter_config.json: peft_type .* is not supported"),
        ("prompt-tuning", {"peft_type": "LORA"}, "adapter_config.json"),
        ("prompt-tuning", {"peft_type": "IA3", "feedforward_modules": []}, "adapter_config.json"),
        ("ia3", {"fan_in_fan_out": True}, "adapter_config.json: fan_in_fan_out"),
        ("ia3", {"modules_to_save": ["lm_head"]}, "adapter_config.json: modules_to_save"),
        ("ia3", {"feedforward_modules": ".*proj"}, "adapter_config.json: feedforward_modules"),
        ("ia3", {"feedforward_modules": [3]}, "adapter_config.json: feedforward_modules"),
        ("ia3", {"feedforward_modules": 3}, "adapter_config.json: feedforward_modules"),
        ("ia3", {"feedforward_modules": []}, r"safetensors: .*down_proj.ia3_l has shape \[.*48\]"),
        ("ia3", {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 5}, "safetensors: 1 of its tensors missing"),
    ],
)  # fmt: skip
def test_a_configuration_that_does_not_fit_is_refused(bases, tmp_path, kind, changes, said):
    base, folder = saved(bases, tmp_path / "adapter", kind)
    rewrite(folder, **changes)
    assert re.search(said, refused(base, folder))


@pytest.mark.parametrize("kind", ["prompt-tuning", "prefix", "ia3", "houlsby"])
def test_numbers_that_are_none_are_refused(bases, tmp_path, kind):
    base, folder = saved(bases, tmp_path / "adapter", kind)
    file = adapter_files.weights_file(folder)
    tensors = load_file(file)
    name = max(tensors)
    for value in (float("nan"), float("inf")):
        tensors[name].view(-1)[1] = value
        save_file(tensors, file)
        assert re.search(f"{file.name}: {re.escape(name)} holds NaN or infinite", refused(base, folder))


@pytest.mark.parametrize("kind", ["prompt-tuning", "prefix", "ia3", "houlsby"])
def test_an_adapter_of_another_width_or_depth_is_refused(bases, tmp_path, wide_base, kind):
    _, folder = saved(bases, tmp_path / "adapter", kind)
    llama(tmp_path / "deep", hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_key_value_heads=2)
    assert re.search(r"safetensors: .* has shape", refused(wide_base, folder))
    if kind == "prompt-tuning":
        return  # it has nothing of the depth
    assert re.search(r"safetensors: .* has shape|safetensors: .* missing", refused(tmp_path / "deep", folder))


@pytest.mark.parametrize("change", ["missing", "extra", "integers", "turned"])
@pytest.mark.parametrize("kind", ["ia3", "houlsby"])
def test_tensors_must_be_exactly_those_described(bases, tmp_path, kind, change):
    base, folder = saved(bases, tmp_path / "adapter", kind)
    file = adapter_files.weights_file(folder)
    tensors = load_file(file)
    name = min(name for name in tensors if "k_proj" in name or "attention_adapters" in name and "weight" in name)
    tensor = tensors[name]
    if change == "missing":
        del tensors[name]
    elif change == "extra":
        tensors[name.replace("layers.0", "layers.7")] = tensor.clone()
    elif change == "integers":
        tensors[name] = tensor.int()
    else:
        tensors[name] = tensor.t().contiguous()
    save_file(tensors, file)
    assert file.name in refused(base, folder)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"use_gating": True}, "use_gating is True"),
        ({"phm_layer": True}, "phm_layer is True"),
        ({"inv_adapter": "nice"}, "inv_adapter is 'nice'"),
        ({"ln_after": True}, "ln_after is True"),
        ({"ln_before": True}, "ln_before is True"),
        ({"cross_adapter": True}, "cross_adapter is True"),
        ({"residual_before_ln": False}, "residual_before_ln is False"),
        ({"original_ln_after": False}, "original_ln_after is False"),
        ({"leave_out": [1]}, r"leave_out is \[1\]"),
        ({"dropout": 0.1}, "dropout is 0.1"),
        ({"stochastic_depth": 0.2}, "stochastic_depth is 0.2"),
        ({"non_linearity": "mish"}, "non_linearity 'mish' is not supported"),
        ({"non_linearity": None}, "non_linearity"),
        ({"scaling": "learned"}, "scaling"),
        ({"reduction_factor": {"default": 16}}, "reduction_factor"),
        ({"reduction_factor": 64}, "reduction-factor 64"),
        ({"reduction_factor": 0}, "reduction-factor 0"),
        ({"reduction_factor": -2}, "reduction-factor -2"),
        ({"mh_adapter": False, "output_adapter": False}, "neither mh_adapter nor output_adapter"),
        ({"architecture": "lora"}, "describes no bottleneck adapter"),
    ],
)  # fmt: skip
def test_settings_of_the_adapters_library_that_are_not_computed_are_refused(bases, tmp_path, changes, said):
    message = refused(bases("llama")[0], hub_folder(tmp_path / "adapter", **changes))
    assert re.search(f"adapter_config.json: .*{said}|adapter_config.json: {said}", message)


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_adapter.bin"])
@pytest.mark.parametrize("kind", ["prompt-tuning", "houlsby"])
def test_pickles_are_not_read(bases, tmp_path, kind, name):
    base, folder = saved(bases, tmp_path / "adapter", kind)
    adapter_files.weights_file(folder).rename(folder / name)
    assert f"{name} is a pickle" in refused(base, folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_adapter_is_refused_and_the_first_stays(bases, tmp_path, kind):
    base, folder = saved(bases, tmp_path / "adapter", kind)
    model = adapted(base, "ia3")
    before = model(TOKENS)
    with pytest.raises(UserError, match=f"{folder}/adapter_config.json: .*has an adapter already"):
        methods.load_any_adapter(model, folder)
    with pytest.raises(UserError, match="has an adapter already"):
        KINDS[kind](model)
    with pytest.raises(UserError, match="has an adapter already"):
        lora.add_lora(model, 4, 8.0)
    assert torch.equal(model(TOKENS), before)


@pytest.mark.parametrize("factor", [33, 0, -1, float("nan"), float("inf")])
def test_a_reduction_that_leaves_nothing_is_refused(bases, factor):
    model = load_model(bases("llama")[0])
    with pytest.raises(UserError, match=f"--reduction-factor {factor:g}: .*32"):
        adapters.add_bottleneck(model, "houlsby", factor)
    assert not adapter_files.has_adapter(model) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("count", [0, -1, 127, 10**15])
@pytest.mark.parametrize("add", [adapters.add_prompt, adapters.add_prefix])
def test_virtual_tokens_must_leave_room_for_a_text(bases, add, count):
    model = load_model(bases("llama")[0])
    with pytest.raises(UserError, match=f"--virtual-tokens {count}: .* 128 positions"):
        add(model, count)
    assert not adapter_files.has_adapter(model) and all(p.requires_grad for p in model.parameters())


def test_an_adapter_never_replaces_a_model(bases):
    folder, _ = bases("llama")
    with pytest.raises(UserError, match=f"{folder}: holds a model"):
        adapters.save_non_lora(adapted(folder, "prompt-tuning"), folder)
    assert (folder / "model.safetensors").is_file()
