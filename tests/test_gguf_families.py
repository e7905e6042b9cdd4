"""Every architecture to GGUF and back, on random checkpoints drawn large (standard deviation 0.3): the same model comes
back, the names are those of the gguf package, and transformers' own GGUF loader reads our file with equal logits where
it can. test_gguf_real.py has llama.cpp read the same files (slow).

    pytest -k gguf_families -s       prints the table of worst errors
"""

import dataclasses
import json
import re

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.helpers import relative
from test_convert import byte_level_tokenizer

import convert
from checkpoint import load_model, read_config
from interop.gguf_export import first_difference
from interop.gguf_names import ARCHITECTURE_OF, ARCHITECTURES, places
from tokenizer import load_tokenizer

SIZES = {"vocab_size": 304, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
GPT2 = {"vocab_size": 304, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 1024}
IDS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5]}
LONGROPE |= {"long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]}
GEMMA = {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 12}  # transformers' loader knows these only
SMALL_GEMMA = {"head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 12}
CASES = {  # test id: family, its configuration's changes, whether transformers' GGUF loader can say that
    "llama": ("llama", {"head_dim": 24}, True),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, False),
    "llama, linear rope": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}, False),
    "llama, llama3 rope": ("llama", {"rope_scaling": LLAMA3, "head_dim": 32, "rope_theta": 500_000.0}, False),
    "llama, yarn": ("llama", {"rope_scaling": YARN}, False),
    "llama, sharper yarn": ("llama", {"rope_scaling": YARN | {"attention_factor": 1.3}}, False),
    "mistral": ("mistral", {"sliding_window": 200}, True),
    "mistral, no window": ("mistral", {"sliding_window": None}, True),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, False),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}, True),
    "qwen2, yarn": ("qwen2", {"rope_scaling": YARN}, False),
    "qwen3": ("qwen3", {"head_dim": 128}, True),
    "qwen3_moe": (
        "qwen3_moe",
        {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 768, "head_dim": 24}
        | {"norm_topk_prob": True},
        True,
    ),
    "gemma": ("gemma", {"head_dim": 24}, False),
    "gemma2": ("gemma2", GEMMA, True),
    "gemma2, other caps": (
        "gemma2",
        SMALL_GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 20.0},
        False,
    ),
    "gemma3": ("gemma3_text", GEMMA | {"num_hidden_layers": 7}, True),
    "gemma3, linear rope": (
        "gemma3_text",
        SMALL_GEMMA | {"num_hidden_layers": 7, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        False,
    ),
    "gemma3, other windows": (
        "gemma3_text",
        SMALL_GEMMA | {"layer_types": ["full_attention", "sliding_attention"] * 2, "final_logit_softcapping": 15.0}
        | {"rope_local_base_freq": 5000.0},
        False,
    ),
    "phi3": ("phi3", {"sliding_window": 200}, True),
    "phi3, longrope": (
        "phi3",
        {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 256, "rope_scaling": LONGROPE},
        False,
    ),
    "olmo2": ("olmo2", {}, False),
    "smollm3": ("smollm3", {}, False),
    "gpt2": ("gpt2", {}, True),
}  # fmt: skip
NOTES = {"mistral": "no sliding window", "phi3": "no sliding window", "phi3, longrope": "LongRoPE"}
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
TEXT = "On 12.03.2023<|im_end|> she'll <think> naïve 東京"
WORST: dict[str, dict[str, float]] = {}


def checkpoint(folder, family, changes, std=0.3, dtype=torch.float32):
    """A random checkpoint with the 300 tokens of test_convert.py, written by transformers; returns its model."""
    settings = (GPT2 if family == "gpt2" else SIZES) | IDS | changes
    settings = transformers.CONFIG_MAPPING[family](**settings, attn_implementation="eager")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = ("norm" in name or ".ln_" in name) and name.endswith("weight") and "gemma" not in family
            parameter.normal_(1.0 if norm else 0.0, std)
    model = model.to(dtype)
    model.save_pretrained(folder)
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE, "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | names))
    return model


def tokens(vocab=304):
    return torch.arange(60).mul(7).remainder(vocab)[None]  # beyond the windows of 12


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """{case: (folder with hf/ and x.gguf, transformers' logits, what was said)}, made as they are asked for."""
    made = {}

    def get(case):
        if case not in made:
            folder, notes = tmp_path_factory.mktemp("case"), []
            model = checkpoint(folder / "hf", *CASES[case][:2])
            with torch.no_grad():
                expected = model(tokens()).logits[0]
            convert.folder_to_gguf(folder / "hf", folder / "x.gguf", "f32", log=notes.append)
            made[case] = folder, expected, notes
        return made[case]

    return get


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    columns = ("round trip", "transformers")
    print("\n\n" + "worst relative error".ljust(26) + "".join(column.rjust(16) for column in columns))
    for case, errors in WORST.items():
        cells = (f"{errors[column]:.1e}" if column in errors else "" for column in columns)
        print(case.ljust(26) + "".join(cell.rjust(16) for cell in cells))


@pytest.mark.parametrize("case", CASES)
def test_gguf_families_come_back_as_the_same_model(case, exported, tmp_path):
    folder, expected, notes = exported(case)
    convert.gguf_to_folder(folder / "x.gguf", tmp_path / "back")
    before, after = (load_file(path / "model.safetensors") for path in (folder / "hf", tmp_path / "back"))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        if "gemma" in CASES[case][0] and "norm" in name:  # a file holds 1 + weight, in float32
            assert torch.equal(1 + after[name], 1 + weight), name
        else:
            assert torch.equal(after[name], weight), name
    ours, theirs = read_config(folder / "hf"), read_config(tmp_path / "back")
    for entry in dataclasses.fields(ours):
        if entry.name not in ("family", "raw", "ignored_settings"):
            assert not first_difference(getattr(ours, entry.name), getattr(theirs, entry.name), entry.name)
    assert theirs.family == {"mistral, no window": "llama"}.get(case, ours.family)
    ours, theirs = load_tokenizer(folder / "hf"), load_tokenizer(tmp_path / "back")
    for special in (False, True):
        assert ours.encode(TEXT, special=special) == theirs.encode(TEXT, special=special)
    assert ours.templates == theirs.templates == {"default": TEMPLATE}
    with torch.no_grad():
        found = load_model(tmp_path / "back")(tokens())[0]
    WORST.setdefault(case, {})["round trip"] = error = relative(found, expected)
    assert error < 1e-5
    assert len(notes) == (case in NOTES) and all(NOTES[case] in note for note in notes)


@pytest.mark.parametrize("case", [case for case, row in CASES.items() if row[2]])
def test_gguf_families_are_read_by_transformers_with_equal_logits(case, exported):
    folder, expected, _ = exported(case)
    settings = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file="x.gguf", **settings).eval()
    with torch.no_grad():
        found = model(tokens()).logits[0]
    WORST.setdefault(case, {})["transformers"] = error = relative(found, expected)
    assert error < 1e-5


@pytest.mark.parametrize("family", ARCHITECTURE_OF)
def test_gguf_families_have_the_names_of_the_gguf_package(family, exported):
    case = next(case for case, row in CASES.items() if row[0] == family)
    config = read_config(exported(case)[0] / "hf")
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURE_OF[family])
    known = gguf.get_tensor_name_map(kind, config.num_layers)
    for name, place in places(config, ARCHITECTURES[ARCHITECTURE_OF[family]]).items():
        published, _, leaf = re.sub(r"experts\.\d+\.", "experts.", place.names[0]).rpartition(".")
        if family == "mixtral" and "experts" in published:  # llama.cpp's converter renames these first
            published = published.replace("block_sparse_moe", "feed_forward")
            published = published.replace("model.layers", "layers")
        assert f"{known.get_name(published)}.{leaf}" == name


def test_gguf_families_every_key_is_one_of_the_gguf_package(exported):
    """No key is made up: each stands in the package's list, for some architecture."""
    lists = [gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope, gguf.Keys.General, gguf.Keys.Tokenizer]
    known = {value for keys in lists for value in vars(keys).values() if isinstance(value, str)}
    for case in CASES:
        reader = gguf.GGUFReader(exported(case)[0] / "x.gguf")
        architecture = reader.fields["general.architecture"].contents()
        for key in reader.fields:
            generic = re.sub(rf"^{architecture}\.", "{arch}.", key)
            assert generic in known or key.startswith("GGUF."), key
