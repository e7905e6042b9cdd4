"""Score heads against transformers and peft: scores, folders and adapters in both directions, padding tokens, what a
classifier reads, evaluate.py classify, two processes, and bad input."""

import dataclasses
import functools
import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import head_in_shards
from support.family_cases import CASES, IDS, SIZES
from support.helpers import CHATML, chat_base, move, output_of, refusal_of, relative, sentence
from support.runs import ROOT, torchrun

import adapter_files
import checkpoint
import convert
import distributed
import evaluate
import generate
import lora
import methods
from adapting import tables
from adapting.score_head import (
    LABELS_FILE,
    REWARD,
    add_score_head,
    classification_texts,
    document_scores,
    start_score_head,
)
from checkpoint import load_model, read_config, save_model
from common.errors import UserError
from evals.classification import classification_scores, head_probs
from families import FAMILIES, Config
from kernels.attention import Documents
from tokenizer import load_tokenizer
from training.defaults import Settings

LABELS = ("no", "maybe", "河")
LENGTHS = [5, 9, 1, 12, 7]

# ---- random models of transformers, and their scores ----


def classification_ids(tokenizer, messages: list[dict], tools: list | None = None) -> list[int]:
    (ids,) = classification_texts(tokenizer, [(messages, tools)])
    if isinstance(ids, UserError):
        raise ids
    return ids


def make(folder: Path, family: str, changes: dict, labels: tuple[str, ...] | None = LABELS) -> Path:
    """A random folder: with these labels, or with an LM head."""
    settings = SIZES | IDS | changes
    kind = transformers.AutoModelForCausalLM
    if labels:
        kind = transformers.AutoModelForSequenceClassification
        settings |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    config = transformers.CONFIG_MAPPING[family](**settings, attn_implementation="eager")
    torch.manual_seed(0)
    model = kind.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            is_scale = ("norm" in key or ".ln_" in key) and key.endswith("weight")
            parameter.normal_(1.0 if is_scale and "gemma" not in family else 0.0, 0.2)
    model.save_pretrained(folder)
    return folder


def hugging(folder: Path, **settings):
    model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True, **settings
    )
    assert not any(report.values()) or settings
    return model.eval()


@functools.cache
def texts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 96, (length,), generator=generator) for length in LENGTHS]


def our_scores(model) -> torch.Tensor:
    return document_scores(model, torch.cat(texts()), Documents(LENGTHS))


def their_scores(model, side: str, **settings) -> torch.Tensor:
    """Scores of all texts in one batch, which is padded on this side."""
    ids = torch.full((len(LENGTHS), max(LENGTHS)), model.config.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts()):
        columns = slice(0, len(text)) if side == "right" else slice(max(LENGTHS) - len(text), None)
        ids[row, columns] = text
        mask[row, columns] = 1
    if "position_ids" in settings:
        settings["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return model(ids, attention_mask=mask, **settings).logits


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A function from a family and labels to a folder."""

    @functools.cache
    def made(family: str, labels: tuple[str, ...] | None) -> Path:
        case = {"gemma3_text": "gemma3", "falcon": "falcon 40B"}.get(family, family)
        return make(tmp_path_factory.mktemp("base"), family, CASES[case][1], labels)

    return made


# ---- folders ----


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_files_equal_transformers(family, bases, tmp_path):
    folder = bases(family, LABELS)
    with torch.no_grad():
        theirs = hugging(folder)
        wanted = their_scores(theirs, "right")
        # GPT-2's positions are learned, and transformers counts padding on the left if nothing else is said.
        more = {"position_ids": None} if family == "gpt2" else {}
        assert relative(their_scores(theirs, "left", **more), wanted) < 1e-5
        model = load_model(folder)
        assert relative(our_scores(model), wanted) < 1e-5 and model.head is None
        assert model.score.labels == LABELS

        note = save_model(model, tmp_path / "saved")
        again = hugging(tmp_path / "saved")
        assert note == "" and type(again) is type(theirs)
        assert again.config.id2label == dict(enumerate(LABELS)) == theirs.config.id2label
        assert again.config.label2id == theirs.config.label2id and again.config.pad_token_id == 0
        for side in ("left", "right"):
            assert torch.equal(their_scores(again, side, **more), their_scores(theirs, side, **more))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma2"])
def test_a_head_that_was_added_is_read_by_transformers(family, bases, tmp_path):
    folder = bases(family, None)
    model = load_model(folder)
    model.requires_grad_(False)
    before = model.size
    table = 0 if model.config.tied else 96 * 64
    add_score_head(model, LABELS)
    assert model.head is None and model.size == before - table + 3 * 64
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["score.weight"]
    assert model.score.weight.dtype == torch.float32 and not model.score.training
    move(model)
    save_model(model, tmp_path / "saved")
    with torch.no_grad():
        theirs = hugging(tmp_path / "saved")
        assert relative(their_scores(theirs, "right"), our_scores(model)) < 1e-5
        assert torch.equal(our_scores(load_model(tmp_path / "saved")), our_scores(model))
    stored = load_file(tmp_path / "saved/model.safetensors")
    assert "lm_head.weight" not in stored and torch.equal(stored["score.weight"], model.score.weight)


def test_the_table_of_classes_is_that_of_transformers():
    names = transformers.models.auto.modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    assert {name: family.classifier for name, family in FAMILIES.items()} == {name: names[name] for name in FAMILIES}


def test_a_head_stays_in_float32_whatever_the_dtype_of_the_model(bases, tmp_path):
    model = load_model(bases("llama", LABELS), torch.bfloat16)
    wanted = load_file(bases("llama", LABELS) / "model.safetensors")["score.weight"]
    assert model.dtype == torch.bfloat16 and torch.equal(model.score.weight, wanted)
    hidden = model.flat(torch.cat(texts()), Documents(LENGTHS))
    last = torch.tensor(LENGTHS).cumsum(0) - 1
    assert torch.equal(our_scores(model), hidden[last].float() @ wanted.t())
    save_model(model, tmp_path / "saved", torch.bfloat16)
    stored = load_file(tmp_path / "saved/model.safetensors")
    assert torch.equal(stored["score.weight"], wanted) and stored["model.norm.weight"].dtype == torch.bfloat16
    settings = json.loads((tmp_path / "saved/config.json").read_text())
    assert (settings.get("dtype") or settings.get("torch_dtype")) == "bfloat16"
    # A head that is stored in 16 bits is read exactly, too.
    save_file(stored | {"score.weight": wanted.bfloat16()}, tmp_path / "saved/model.safetensors")
    model = load_model(tmp_path / "saved", torch.bfloat16)
    assert torch.equal(model.score.weight, wanted.bfloat16().float())


def test_labels_without_names_are_numbered_as_in_transformers(tmp_path):
    for count in (1, 2, 4):
        config = transformers.LlamaConfig(**(SIZES | IDS), num_labels=count)
        transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path / str(count))
        theirs = transformers.AutoConfig.from_pretrained(tmp_path / str(count)).id2label
        assert read_config(tmp_path / str(count)).labels == tuple(theirs.values()) and len(theirs) == count
    older = json.loads((tmp_path / "1/config.json").read_text())
    del older["id2label"], older["label2id"]
    assert Config.from_hf(older | {"num_labels": 3}).labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert Config.from_hf(older).labels == ("LABEL_0", "LABEL_1")
    assert Config.from_hf(older | {"architectures": ["LlamaForCausalLM"]}).labels is None


# ---- first numbers ----


def test_first_numbers_follow_the_seed_alone(bases):
    def first(base=None, lora_first=False):
        torch.manual_seed(7)
        model = load_model(base or bases("llama", None))
        if lora_first:
            lora.add_lora(model, 4, 8)
        add_score_head(model, [f"label {i}" for i in range(40)])
        return model.score.weight.detach()

    drawn = first()
    assert torch.equal(drawn, first(lora_first=True)) and not torch.equal(drawn[0], drawn[1])
    assert abs(float(drawn.mean())) < 2e-3 and float(drawn.std()) == pytest.approx(0.02, rel=0.1)
    torch.manual_seed(7)
    on_meta = {}

    def attach(model):
        add_score_head(model, [f"label {i}" for i in range(40)])
        on_meta["is_meta"] = model.score.weight.is_meta

    model = load_model(bases("llama", None), on_meta=attach)
    start_score_head(model)
    assert on_meta["is_meta"] and torch.equal(model.score.weight, drawn) and model.head is None
    model.config.raw["initializer_range"] = 1.5
    start_score_head(model)
    assert torch.allclose(model.score.weight, drawn * 75)


def test_gradients_equal_transformers_with_and_without_checkpointing(bases):
    folder = bases("llama", LABELS)
    theirs = hugging(folder)
    weights = torch.randn(len(LENGTHS), 3, generator=torch.Generator().manual_seed(2))
    (their_scores(theirs, "right") * weights).sum().backward()
    wanted = dict(theirs.named_parameters())
    for kind in ("none", "full", "selective"):
        model = load_model(folder)
        model.activation_checkpointing = kind
        model.train()
        (our_scores(model) * weights).sum().backward()
        for name, parameter in model.named_parameters():
            assert relative(parameter.grad, wanted[checkpoint.hf_name(model, name)].grad) < 1e-5


# ---- adapters: PEFT's files of SEQ_CLS ----

TARGETS = {"llama": ["q_proj", "down_proj"], "qwen2": ["v_proj"], "gpt2": ["c_attn"], "gemma2": ["q_proj", "up_proj"]}
TARGETS |= {"gpt_neox": ["query_key_value"], "mistral": ["k_proj", "gate_proj"]}
VARIANTS = {
    "plain": ({}, {}),
    "dora": ({"use_dora": True}, {"dora": True}),
    "rslora": ({"use_rslora": True}, {"rslora": True}),
    "pissa": ({"init_lora_weights": "gaussian"}, {"start": "pissa"}),  # what peft starts with is for its own files
}


def in_peft(base: Path, family: str, **settings):
    """A LoRA of peft's with a score head, and moved numbers."""
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=TARGETS[family], fan_in_fan_out=family == "gpt2",
        **settings,
    )  # fmt: skip
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=3, attn_implementation="eager"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(theirs, config).eval()
    move(wrapped)
    return wrapped


def read_by_peft(base: Path, adapter: Path, count: int = 3):
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=count, attn_implementation="eager"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", ".*missing adapter keys.*")
        return peft.PeftModel.from_pretrained(theirs, adapter).eval()


def with_adapter(base: Path, adapter: Path):
    model = load_model(base)
    methods.load_any_adapter(model, adapter)
    return model


def ours_with_head(base: Path, family: str, labels=LABELS, **variant):
    model = load_model(base)
    lora.add_lora(model, 4, 8, targets=TARGETS[family], variant=lora.Variant(**variant))
    add_score_head(model, labels)
    move(model)
    return model


PAIRS = [(family, "plain") for family in TARGETS]
PAIRS += [("llama", "dora"), ("llama", "rslora"), ("llama", "pissa"), ("gpt2", "dora")]


@pytest.mark.parametrize(("family", "variant"), PAIRS)
def test_adapters_go_to_peft_and_back(family, variant, bases, tmp_path):
    base = bases(family, None)
    theirs_has, ours_has = VARIANTS[variant]
    wrapped = in_peft(base, family, **theirs_has)
    wrapped.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        model = with_adapter(base, tmp_path / "theirs")
        assert relative(our_scores(model), their_scores(wrapped, "right")) < 1e-5
        assert model.score.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
        trained = {
            checkpoint.hf_name(model, n).partition(".lora")[0] for n, p in model.named_parameters() if p.requires_grad
        }
        assert "score.weight" in trained and "lm_head.weight" not in trained and len(trained) > 2

        model = ours_with_head(base, family, **ours_has)
        assert lora.save_adapter(model, tmp_path / "ours") == ""
        again = read_by_peft(base, tmp_path / "ours")
        assert relative(their_scores(again, "right"), our_scores(model)) < 1e-5
        back = with_adapter(base, tmp_path / "ours")
        assert relative(our_scores(back), our_scores(model)) < 1e-6 and back.score.labels == LABELS
    written = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    assert written["task_type"] == "SEQ_CLS" and written["modules_to_save"] == ["score"]
    assert "base_model.model.score.weight" in load_file(tmp_path / "ours/adapter_model.safetensors")
    facts = json.loads((tmp_path / "ours" / LABELS_FILE).read_text())
    assert facts["id2label"] == {str(i): label for i, label in enumerate(LABELS)} and facts["pad_token_id"] == 0


def test_gradients_of_adapter_and_head_equal_peft(bases, tmp_path):
    base = bases("llama", None)
    wrapped = in_peft(base, "llama")
    wrapped.save_pretrained(tmp_path / "theirs")
    weights = torch.randn(len(LENGTHS), 3, generator=torch.Generator().manual_seed(2))
    (their_scores(wrapped, "left") * weights).sum().backward()
    model = with_adapter(base, tmp_path / "theirs").train()
    (our_scores(model) * weights).sum().backward()
    theirs = {
        name.removeprefix("base_model.model.").replace(".default", "").replace(".modules_to_save", ""): p.grad
        for name, p in wrapped.named_parameters() if p.grad is not None
    }  # fmt: skip
    ours = {name: tensor.grad for name, tensor in adapter_files.adapter_tensors(model).items()}
    assert {name.removeprefix("base_model.model.") for name in ours} == theirs.keys()
    for name, gradient in ours.items():
        assert relative(gradient, theirs[name.removeprefix("base_model.model.")]) < 1e-5


def test_an_adapter_on_a_classifier_starts_with_its_head_and_leaves_it(bases, tmp_path):
    base = bases("llama", LABELS)
    model = load_model(base)
    plain = our_scores(model)
    head = model.score
    lora.add_lora(model, 4, 8, targets=TARGETS["llama"])
    add_score_head(model, LABELS)
    assert model.score.base is head and not head.weight.requires_grad and model.score.weight.requires_grad
    assert torch.equal(our_scores(model), plain)
    move(model)
    moved = our_scores(model)
    assert relative(moved, plain) > 0.1
    with adapter_files.adapter_off(model):
        assert torch.equal(our_scores(model), plain)
    assert torch.equal(our_scores(model), moved)
    lora.save_adapter(model, tmp_path / "saved")
    assert relative(their_scores(read_by_peft(base, tmp_path / "saved"), "right"), moved) < 1e-5
    modules = adapter_files.remove_adapter(model)
    assert model.score is head and torch.equal(our_scores(model), plain)
    adapter_files.put_back(model, modules)
    assert torch.equal(our_scores(model), moved)
    # An adapter without a head of its own computes with the base's, and stays so.
    adapter_files.remove_adapter(model)
    lora.add_lora(model, 4, 8, targets=TARGETS["llama"])
    move(model)
    moved = our_scores(model)
    lora.save_adapter(model, tmp_path / "headless")
    assert not (tmp_path / "headless" / LABELS_FILE).exists() and model.score is head
    assert relative(our_scores(with_adapter(base, tmp_path / "headless")), moved) < 1e-6
    assert relative(their_scores(read_by_peft(base, tmp_path / "headless"), "right"), moved) < 1e-5


def test_an_adapter_with_a_head_is_taken_off_a_language_model_and_put_back(bases, tmp_path):
    base = bases("llama", None)
    model = load_model(base)
    tokens = torch.cat(texts())[None]
    logits = model(tokens)
    lora.save_adapter(ours_with_head(base, "llama"), tmp_path / "a")
    lora.save_adapter(ours_with_head(base, "llama", ("LABEL",)), tmp_path / "b")
    methods.load_any_adapter(model, tmp_path / "a")
    scores = our_scores(model)
    with pytest.raises(UserError, match="no LM head"):
        model(tokens)
    with pytest.raises(UserError, match="no LM head"):
        model.generate([[5, 6]], 2)
    with adapter_files.adapter_off(model), pytest.raises(UserError, match="without its adapter"):
        our_scores(model)
    first = adapter_files.remove_adapter(model)
    assert model.score is None and torch.equal(model(tokens), logits)
    methods.load_any_adapter(model, tmp_path / "b")
    assert our_scores(model).shape == (len(LENGTHS), 1) and model.score.labels == ("LABEL",)
    adapter_files.remove_adapter(model)
    adapter_files.put_back(model, first)
    assert torch.equal(our_scores(model), scores)
    # Merged and unmerged, the same model.
    adapter_files.merge(model, keep=True)
    assert relative(our_scores(model), scores) < 1e-5
    adapter_files.unmerge(model)
    assert torch.equal(our_scores(model), scores)
    adapter_files.remove_adapter(model)
    assert torch.equal(model(tokens), logits)


@pytest.mark.parametrize("quant", [None, "nf4"])
def test_a_merged_adapter_is_a_classifier_of_transformers(quant, bases, tmp_path, capsys):
    base = bases("llama", None)
    model = load_model(base, quant=quant)
    lora.add_lora(model, 4, 8, targets=TARGETS["llama"])
    add_score_head(model, LABELS)
    move(model)
    lora.save_adapter(model, tmp_path / "adapter")
    convert.merge_folder(base, tmp_path / "adapter", tmp_path / "merged", quant=quant or "none")
    with torch.no_grad():
        assert relative(their_scores(hugging(tmp_path / "merged"), "left"), our_scores(model)) < 1e-5
    assert read_config(tmp_path / "merged").labels == LABELS
    stored = load_file(tmp_path / "merged/model.safetensors")
    assert "lm_head.weight" not in stored and torch.equal(stored["score.weight"], model.score.weight)


def test_the_model_of_step_0_is_not_known(bases):
    model = load_model(bases("llama", None))
    lora.add_lora(model, 4, 8)
    settings = SimpleNamespace(method="lora", quant=None, adapter=None)
    assert methods.model_of_step_0(model, settings) is not None
    add_score_head(model, LABELS)
    assert methods.model_of_step_0(model, settings) is None


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_trained_tables_beside_a_head_equal_peft(family, bases, tmp_path):
    base = bases(family, None)
    for settings in ({"trainable_token_indices": [5, 17]}, {"modules_to_save": ["embed_tokens"]}):
        wrapped = in_peft(base, family, **settings)
        wrapped.save_pretrained(tmp_path / "theirs")
        with torch.no_grad():
            model = with_adapter(base, tmp_path / "theirs")
            wanted = their_scores(wrapped, "right")
            assert relative(our_scores(model), wanted) < 1e-5 and len(tables.trained_tables(model)) == 1
            lora.save_adapter(model, tmp_path / "ours")
            again = read_by_peft(base, tmp_path / "ours")
            assert relative(their_scores(again, "right"), wanted) < 1e-5


# ---- the padding token ----


def with_tokenizer(folder: Path, special: list[str], settings: dict, post_processor=None) -> Path:
    """A tokenizer of the words that the tests use, with these special tokens first."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator([sentence(i, 20) for i in range(20)], trainer)
    if post_processor:
        bpe.post_processor = post_processor
    folder.mkdir(exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts | settings))
    return folder


QWEN = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHATML}
WITHOUT_LINE_END = CHATML.replace("'<|im_end|>' + '\n'", "'<|im_end|>'")
PADDINGS = {  # name: special tokens, settings, what is chosen, why
    "its own": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], QWEN, "<|endoftext|>", ""),
    "its own ends texts, as SmolLM2's": (
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"],
        QWEN | {"bos_token": "<|im_start|>", "unk_token": "<|endoftext|>", "pad_token": "<|im_end|>"},
        "<|endoftext|>",
        "may end with the tokenizer's own, <|im_end|>",
    ),
    "its own ends turns": (
        ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<unused0>", "<other>"],
        {"eos_token": "</s>", "pad_token": "<|im_end|>", "chat_template": WITHOUT_LINE_END},
        "<unused0>",
        "may end with the tokenizer's own, <|im_end|>",
    ),
    "none, as Llama 3's": (
        ["<|begin|>", "<|eot|>", "<|reserved_0|>", "<|finetune_right_pad_id|>"],
        {"bos_token": "<|begin|>", "eos_token": "<|eot|>"},
        "<|finetune_right_pad_id|>",
        "names no padding token",
    ),
    "none, and reserved ones": (
        ["<|begin|>", "<|eot|>", "<|tool|>", "<|reserved_0|>"],
        {"bos_token": "<|begin|>", "eos_token": "<|eot|>"},
        "<|reserved_0|>",
        "names no padding token",
    ),
    "none, and any other": (
        ["<|begin|>", "<|eot|>", "<|tool|>"],
        {"bos_token": "<|begin|>", "eos_token": "<|eot|>"},
        "<|tool|>",
        "names no padding token",
    ),
    "nothing is fit, as of GPT-2": (
        ["<|endoftext|>"],
        {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
        None,
        "no token is fit",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PADDINGS)
def test_the_padding_token_is_one_that_no_text_ends_with(name, tmp_path):
    special, settings, wanted, why = PADDINGS[name]
    config = transformers.LlamaConfig(**(SIZES | {"vocab_size": 300, "pad_token_id": 1, "eos_token_id": 2}))
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    with_tokenizer(tmp_path / "base", special, settings)
    model = load_model(tmp_path / "base")
    add_score_head(model, LABELS)
    move(model)
    note = save_model(model, tmp_path / "saved")
    assert why in note and bool(note) == bool(why)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    theirs = hugging(tmp_path / "saved")
    assert theirs.config.pad_token_id == (None if wanted is None else special.index(wanted))
    before = json.loads((tmp_path / "base/tokenizer_config.json").read_text())
    if wanted is None:
        assert json.loads((tmp_path / "saved/tokenizer_config.json").read_text()) == before
        return
    assert tokenizer.pad_token == wanted and tokenizer.pad_token_id == theirs.config.pad_token_id

    # Texts of any ends in one batch of transformers' have the scores that they have alone.
    ours = load_tokenizer(tmp_path / "base")
    talks = [[("user", sentence(i, i + 1)), ("assistant", sentence(i, 3))][: 1 + i % 2] for i in range(5)]
    rows = [
        classification_ids(ours, [{"role": role, "content": text} for role, text in talk], tools=[] if i == 4 else None)
        for i, talk in enumerate(talks)
    ]
    rows += [[*ours.encode("a fox"), ours.eos_id], ours.encode("a fox")]
    scores = document_scores(
        load_model(tmp_path / "saved"),
        torch.cat([torch.tensor(row) for row in rows]),
        Documents([len(row) for row in rows]),
    )
    for side in ("left", "right"):
        tokenizer.padding_side = side
        batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        with torch.no_grad():
            assert relative(theirs(**batch).logits, scores) < 1e-5


def test_a_padding_token_without_an_embedding_is_not_taken(tmp_path):
    special = ["<|begin|>", "<|eot|>", "<|tool|>"]
    folder = with_tokenizer(tmp_path, special, {"eos_token": "<|eot|>", "pad_token": "<|tool|>"})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.padding(3).text == "<|tool|>"
    padding = tokenizer.padding(2)
    assert padding.text == "<|begin|>" and "no embedding for the tokenizer's own, <|tool|>" in padding.note


def test_without_a_tokenizer_a_padding_token_that_is_eos_is_none(bases, tmp_path):
    for pad, eos, wanted in ((0, 2, 0), (2, 2, None), (2, [1, 2], None), (None, 2, None)):
        model = load_model(bases("llama", LABELS))
        model.config.raw.update(pad_token_id=pad, eos_token_id=eos)
        save_model(model, tmp_path / "saved")
        assert json.loads((tmp_path / "saved/config.json").read_text())["pad_token_id"] == wanted


# ---- what a classifier reads ----


@pytest.mark.parametrize("around", ["nothing", "bos", "bos and eos"])
def test_a_text_alone_is_encoded_as_the_pipeline_does(around, tmp_path):
    post_processor = None
    if around != "nothing":
        single = "<s> $A </s>" if "eos" in around else "<s> $A"
        ids = [("<s>", 0), ("</s>", 1)]
        post_processor = tokenizers.processors.TemplateProcessing(single=single, special_tokens=ids)
    settings = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    folder = with_tokenizer(tmp_path, ["<s>", "</s>", "<pad>"], settings, post_processor)
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in (sentence(1, 5), " über 河\n", "a"):
        ids = classification_ids(ours, [{"role": "user", "content": text}])
        assert ids == theirs(text)["input_ids"] and (ids[0] == 0) == (around != "nothing")
        assert (ids[-1] == 1) == ("eos" in around)


def test_several_messages_are_what_the_template_writes(base):
    ours, theirs = load_tokenizer(base), transformers.AutoTokenizer.from_pretrained(base)
    talk = [{"role": role, "content": sentence(i, 4)} for i, role in enumerate(["system", "user", "assistant", "user"])]
    for messages in (talk, talk[:2], talk[1:3]):
        wanted = theirs.apply_chat_template(messages, return_dict=True)["input_ids"]
        assert classification_ids(ours, messages) == wanted
    only_system = talk[:1]
    assert (
        classification_ids(ours, only_system) == theirs.apply_chat_template(only_system, return_dict=True)["input_ids"]
    )
    with pytest.raises(UserError, match="empty text"):
        classification_ids(ours, [{"role": "user", "content": ""}])


# ---- the scripts ----


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return chat_base(tmp_path_factory.mktemp("base"))


CLASSES = ("fox", "dog", "über")


@pytest.fixture(scope="module")
def classifier(base, tmp_path_factory) -> Path:
    """A folder with a score head, and beside it an adapter of `base` with one."""
    folder = tmp_path_factory.mktemp("classifier") / "final"
    model = load_model(base)
    add_score_head(model, CLASSES)
    move(model)
    save_model(model, folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "final"
    model = load_model(base)
    lora.add_lora(model, 4, 8)
    add_score_head(model, CLASSES)
    move(model)

    def write_extra(tmp: Path) -> None:
        checkpoint.copy_tokenizer(base, tmp)
        (tmp / "plaintune.json").write_text(json.dumps({"base_sha256": checkpoint.fingerprint(base)}))

    note = lora.save_adapter(model, folder, write_extra)
    assert "<|endoftext|>" in note
    assert json.loads((folder / "tokenizer_config.json").read_text())["pad_token"] == "<|endoftext|>"
    assert json.loads((folder / LABELS_FILE).read_text())["pad_token_id"] == 0
    return folder


@pytest.fixture
def file(tmp_path) -> Path:
    rows = [{"text": sentence(i, 3 + i % 5), "label": CLASSES[i % 3]} for i in range(18)]
    path = tmp_path / "test.csv"
    path.write_text("\n".join(["text,label", *(f"{row['text']},{row['label']}" for row in rows)]), encoding="utf-8")
    return path


def test_probabilities_equal_the_pipeline_of_transformers(classifier):
    """The pipeline, which knows nothing of this program, in a batch with padding."""
    pipe = transformers.pipeline("text-classification", model=str(classifier), device="cpu", dtype=torch.float32)
    ours, model = load_tokenizer(classifier), load_model(classifier)
    read = [sentence(i, 1 + 3 * i) for i in range(6)]
    texts = [classification_ids(ours, [{"role": "user", "content": text}]) for text in read]
    probs = head_probs(model, texts, 4)
    for batch_size in (1, 4):
        theirs = pipe(read, top_k=None, batch_size=batch_size)
        for row, wanted in zip(probs, theirs, strict=True):
            by_label = {each["label"]: each["score"] for each in wanted}
            assert by_label.keys() == {*CLASSES}
            assert row.tolist() == pytest.approx([by_label[label] for label in CLASSES], abs=1e-6)


def test_classify_scores_by_the_head(base, classifier, adapter, file, monkeypatch, capsys):
    merged = load_model(base)
    methods.load_any_adapter(merged, adapter)
    tokenizer = load_tokenizer(base)
    rows = [line.rsplit(",", 1) for line in file.read_text(encoding="utf-8").splitlines()[1:]]
    gold = np.array([CLASSES.index(label) for _, label in rows])
    for words, model in ((["--model", classifier], load_model(classifier)), (["--adapter", adapter], merged)):
        out = output_of(
            evaluate, monkeypatch, capsys, "classify", "--data", file, "--dtype", "fp32", "--device", "cpu", *words
        )
        scores = [
            document_scores(model, torch.tensor(tokenizer.encode(text)), Documents([len(tokenizer.encode(text))]))[0]
            for text, _ in rows
        ]
        probs = torch.stack(scores).softmax(-1).detach().double().numpy()
        wanted = classification_scores(gold, probs, [*CLASSES], 5)
        line = next(
            line
            for line in out.splitlines()
            if line.startswith(("model  ", "adapter  ")) and "%" not in line and ":" not in line
        )
        numbers = [format(value, wanted.formats[name]) for name, value in wanted.columns.items()]
        assert line.split()[1:] == numbers
        assert "labels: fox, dog, über" in out and "wrong choices" in out


def test_a_language_model_is_compared_on_the_labels_of_the_head(base, adapter, file, monkeypatch, capsys):
    words = ["classify", "--data", file, "--dtype", "fp32", "--device", "cpu", "--model", base]
    alone = output_of(evaluate, monkeypatch, capsys, *words)
    both = output_of(evaluate, monkeypatch, capsys, *words, "--adapter", adapter, "--versus", "base")
    row = lambda out, name: next(
        line.split()[1:] for line in out.splitlines() if line.startswith(name) and ":" not in line and "\\" not in line
    )
    # The same model, with the labels in another order.
    assert row(both, "base ") == row(alone, "model ") and row(both, "adapter ") != row(both, "base ")


def test_scripts_that_need_an_lm_head_say_so_in_one_line(
    base, classifier, adapter, file, tmp_path, monkeypatch, capsys
):
    needed = "head for sequence classification and no LM head"
    for words in (["--model", classifier], ["--adapter", adapter]):
        for what in ("loss", "exact", "choices"):
            refused = refusal_of(evaluate, monkeypatch, capsys, what, "--data", file, *words)
            assert needed in refused and str(words[1]) in refused
        # So that nothing is to be said of the adapter's base.
        model = [] if "--model" in words else ["--model", base]
        assert needed in refusal_of(generate, monkeypatch, capsys, "--prompt", "a", *words, *model)
    gguf = tmp_path / "x.gguf"
    for words in (
        ["to-gguf", classifier, gguf],
        ["to-gguf", base, gguf, "--adapter", adapter],
        ["adapter-to-gguf", adapter, gguf, "--model", base],
    ):
        assert needed in refusal_of(convert, monkeypatch, capsys, *words)
    assert not gguf.exists()


def test_merge_writes_a_classifier_and_measures_its_scores(base, adapter, tmp_path, monkeypatch, capsys):
    out = output_of(convert, monkeypatch, capsys, "merge", base, adapter, tmp_path / "merged")
    assert "evaluate.py classify --model" in out and "check     merged, the scores of" in out
    config = read_config(tmp_path / "merged")
    assert config.labels == CLASSES and config.raw["pad_token_id"] == 0
    assert config.raw["architectures"] == ["LlamaForSequenceClassification"]
    assert json.loads((tmp_path / "merged/tokenizer_config.json").read_text())["pad_token"] == "<|endoftext|>"
    model = load_model(base)
    methods.load_any_adapter(model, adapter)
    ids = torch.tensor(load_tokenizer(base).encode(sentence(1, 9)))
    merged = document_scores(load_model(tmp_path / "merged"), ids, Documents([len(ids)]))
    assert relative(merged, document_scores(model, ids, Documents([len(ids)]))) < 1e-5


def test_a_classifier_in_4_bits_keeps_its_head(classifier, tmp_path, monkeypatch, capsys):
    output_of(convert, monkeypatch, capsys, "to-nf4", classifier, tmp_path / "nf4")
    head = load_file(classifier / "model.safetensors")["score.weight"]
    assert torch.equal(load_file(tmp_path / "nf4/model.safetensors")["score.weight"], head)
    quantized, theirs = load_model(tmp_path / "nf4"), load_model(classifier, quant="nf4")
    ids = torch.tensor(load_tokenizer(classifier).encode(sentence(1, 9)))
    scores = [document_scores(model, ids, Documents([len(ids)])) for model in (quantized, theirs)]
    assert torch.equal(*scores) and torch.equal(quantized.score.weight, head)
    hf = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "nf4").eval()
    assert type(hf.score) is torch.nn.Linear and hf.score.weight.dtype == torch.float32
    capsys.readouterr()
    refused = refusal_of(convert, monkeypatch, capsys, "to-nf4", classifier, tmp_path / "x", "--quant", "nf4+head")
    assert "has a score head, which stays as it is" in refused


# ---- training: several processes, and which heads go with which methods ----


@pytest.fixture(scope="module")
def shard_bases(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    make(folder / "llama", "llama", {}, None)
    make(folder / "tied", "llama", {"tie_word_embeddings": True}, None)
    make(folder / "classifier", "llama", {}, ("a", "b", "c"))
    return folder


def assert_trained_alike(name: str, bases: Path, one: Path, other: Path) -> None:
    """The results of a case of head_in_shards in two folders; the head is trained."""
    base, _, labels = head_in_shards.CASES[name]
    first, second = (load_file(next((folder / name).glob("*.safetensors"))) for folder in (one, other))
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert relative(second[key], tensor) < 1e-4, key
    (head,) = (tensor for key, tensor in first.items() if key.endswith("score.weight"))
    assert head.shape == (len(labels), 64)
    if base == "classifier":
        stored = load_file(bases / "classifier/model.safetensors")["score.weight"]
        assert 0 < relative(head, stored) < 0.5


@pytest.mark.parametrize("name", ["full, one label", "lora"])
def test_a_head_in_shards_is_trained_as_one_that_is_whole(name, shard_bases, tmp_path):
    distributed.init_distributed(torch.device("cpu"))
    head_in_shards.train(name, shard_bases, tmp_path / "shards", "full")
    distributed.destroy_process_group()
    head_in_shards.train(name, shard_bases, tmp_path / "whole", "none")
    assert_trained_alike(name, shard_bases, tmp_path / "whole", tmp_path / "shards")


@pytest.mark.slow
def test_two_processes_train_what_one_trains(shard_bases, tmp_path):
    """FSDP2 on gloo: heads of one to three rows, new ones and those of a classifier, trained fully and beside LoRA."""
    torchrun(2, ROOT / "tests/support/head_in_shards.py", shard_bases, tmp_path / "two")
    for name in head_in_shards.CASES:
        head_in_shards.train(name, shard_bases, tmp_path / "one", "none")
        assert_trained_alike(name, shard_bases, tmp_path / "one", tmp_path / "two")


def run_settings(**changes) -> Settings:
    return Settings(shard="none", **changes)


def test_a_run_goes_on_with_the_head_of_its_adapter(bases, tmp_path):
    base = bases("llama", None)
    model = ours_with_head(base, "llama")
    lora.save_adapter(model, tmp_path / "first")
    run = tmp_path / "run"
    run.mkdir()
    chosen = run_settings(method="lora", adapter=str(tmp_path / "first"), dtype="fp32", out=str(run))
    methods.keep_start(chosen)
    for changes in ({}, {"resume": True, "adapter": "gone"}):
        again = dataclasses.replace(chosen, **changes)
        trained = methods.load_trainable(again, base, torch.device("cpu"), LABELS)
        assert torch.equal(our_scores(trained), our_scores(model)) and trained.score.weight.requires_grad
    with pytest.raises(UserError, match="has the labels no, maybe, 河, not a, b"):
        methods.load_trainable(chosen, base, torch.device("cpu"), ["a", "b"])
    with pytest.raises(UserError, match="first: the model has a head for sequence classification and no LM head"):
        methods.load_trainable(chosen, base, torch.device("cpu"))


def test_full_training_stores_a_new_head_in_float32_and_measures_what_rounding_loses(bases, tmp_path):
    chosen = run_settings(method="full", dtype="fp32", save_dtype="bf16")
    # Weights in 16 bits, which move by less than these can say.
    save_model(load_model(bases("llama", None)), tmp_path / "base", torch.bfloat16)
    model = methods.load_trainable(chosen, tmp_path / "base", torch.device("cpu"), LABELS)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-6)
    remark = methods.save_full(model, chosen, tmp_path / "saved", lambda tmp: None)
    assert remark.startswith("WARNING: rounding to bf16 loses 9")
    stored = load_file(tmp_path / "saved/model.safetensors")
    assert (
        torch.equal(stored["score.weight"], model.score.weight) and stored["model.norm.weight"].dtype == torch.bfloat16
    )


METHODS_WITHOUT = {"vera": {"rank": 4}, "ia3": {}, "bottleneck": {}, "prompt-tuning": {"virtual_tokens": 3}}


@pytest.mark.parametrize("method", METHODS_WITHOUT)
def test_other_methods_are_refused_by_name(method, bases, tmp_path):
    with pytest.raises(
        UserError, match=f"--method {method}: trains no head for sequence classification; full, lora and"
    ):
        methods.load_trainable(run_settings(method=method), bases("llama", None), torch.device("cpu"), LABELS)
    # Nor are adapters of these kinds put on a model with a head.
    model = load_model(bases("llama", None))
    options = {
        "targets": "all",
        "placement": "pfeiffer",
        "reduction_factor": 8,
        "prompt_init": "random",
        "layers": None,
    }
    row = methods.METHODS[method]
    row.attach(model, SimpleNamespace(adapter=None, **(options | METHODS_WITHOUT[method])))
    with pytest.raises(UserError, match="trained with --method full, lora or qlora"):
        add_score_head(model, LABELS)
    row.save(model, None, tmp_path / "saved", lambda tmp: None)
    with pytest.raises(UserError, match=f"an adapter of --method {method}; with a head for sequence"):
        with_adapter(bases("llama", LABELS), tmp_path / "saved")


def test_a_prompt_of_peft_with_a_head_is_refused(bases, tmp_path):
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(bases("llama", LABELS))
    peft.get_peft_model(theirs, config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="an adapter of --method prompt-tuning; with a head for sequence"):
        with_adapter(bases("llama", None), tmp_path)


def test_what_can_not_be_trained_with_a_head(bases, tmp_path):
    cpu = torch.device("cpu")
    lora_of = {"method": "lora", "rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": "all", "dtype": "fp32"}
    with pytest.raises(UserError, match="--modules-to-save lm_head: with a head for sequence"):
        methods.load_trainable(run_settings(**lora_of, modules_to_save="lm_head"), bases("llama", None), cpu, LABELS)
    with pytest.raises(
        UserError, match="--modules-to-save: lm_head is not supported; of this model it can name embed_tok"
    ):
        methods.load_trainable(run_settings(**lora_of, modules_to_save="lm_head"), bases("llama", LABELS), cpu, LABELS)
    loftq = lora_of | {"method": "qlora", "init": "loftq", "quant": "nf4"}
    with pytest.raises(UserError, match="not with --init loftq"):
        methods.load_trainable(run_settings(**loftq), bases("llama", None), cpu, LABELS)
    with pytest.raises(UserError, match="nf4\\+head: a head for sequence classification is trained in float32"):
        methods.load_trainable(run_settings(**lora_of, quant="nf4+head"), bases("llama", None), cpu, LABELS)
    with pytest.raises(UserError, match="no LM head, which this run needs"):
        methods.load_trainable(run_settings(**lora_of), bases("llama", LABELS), cpu)
    # LoftQ's adapter brings its base along, which has an LM head.
    lora.save_adapter(ours_with_head(bases("llama", None), "llama"), tmp_path)
    shutil.copytree(bases("llama", None), tmp_path / "base")
    with pytest.raises(UserError, match="is the base of an adapter of LoftQ"):
        methods.load_trainable(run_settings(**lora_of), tmp_path / "base", cpu, LABELS)
    with pytest.raises(UserError, match="its score head has the labels no, maybe, 河, not x"):
        add_score_head(load_model(bases("llama", LABELS)), ["x"])
    model = ours_with_head(bases("llama", None), "llama")
    adapter_files.remove_adapter(model)
    with pytest.raises(UserError, match="no LM head"):
        model(torch.cat(texts())[None])
    for labels in ([], ["a", "a"], ["a", ""], ["a", 3]):
        with pytest.raises(UserError, match="needs 1 to 100,000 labels, all of them different texts"):
            add_score_head(load_model(bases("llama", None)), labels)


# ---- bad input ----


def broken(folder: Path, out: Path, config: dict | None = None, tensors: dict | None = None) -> Path:
    """A copy of a folder with other settings and tensors; None removes one."""
    shutil.copytree(folder, out, dirs_exist_ok=True)
    settings = json.loads((out / "config.json").read_text()) | (config or {})
    (out / "config.json").write_text(json.dumps({key: value for key, value in settings.items() if value != "GONE"}))
    stored = load_file(out / "model.safetensors") | (tensors or {})
    save_file({key: value for key, value in stored.items() if value is not None}, out / "model.safetensors")
    return out


SHAPE = r"score.weight has shape \[{}\], config.json implies \[{}\]"
BROKEN = {  # settings, tensors, what is said
    "too few labels": ({"id2label": {"0": "a", "1": "b"}}, {}, SHAPE.format("3, 64", "2, 64")),
    "no labels, and three rows": ({"id2label": "GONE"}, {}, SHAPE.format("3, 64", "2, 64")),
    "another width": ({}, {"score.weight": torch.zeros(3, 48)}, SHAPE.format("3, 48", "3, 64")),
    "no head": ({}, {"score.weight": None}, "tensors missing: score.weight"),
    "a bias": ({}, {"score.bias": torch.zeros(3)}, "tensors not part of the model: score.bias"),
    "an LM head, too": ({}, {"lm_head.weight": torch.zeros(96, 64)}, "tensors not part of the model: lm_head.weight"),
    "NaN": ({}, {"score.weight": torch.full((3, 64), float("nan"))}, "score.weight holds NaN or infinite weights"),
    "no label at all": ({"id2label": {}}, {}, "id2label is {}, it must name 1 to"),
    "num_labels 0": ({"id2label": "GONE", "num_labels": 0}, {}, "num_labels is 0, it must be from 1 to"),
    "a billion": ({"id2label": "GONE", "num_labels": 10**9}, {}, "num_labels is 1000000000, it must be from 1"),
    "a gap": ({"id2label": {"0": "a", "2": "b"}}, {}, "by their numbers from 0 on"),
    "twice": ({"id2label": {"0": "a", "1": "a", "2": "b"}}, {}, "all different"),
    "numbers": ({"id2label": {"0": 1, "1": 2, "2": 3}}, {}, "it must name"),
    "a list": ({"id2label": ["a", "b", "c"]}, {}, "it must name"),
    "another family": (
        {"model_type": "bert", "architectures": ["BertForSequenceClassification"]},
        {},
        "model_type 'bert' is not supported",
    ),
    "the class of another family": (
        {"architectures": ["Qwen2ForSequenceClassification"]},
        {},
        "supported: LlamaForCausalLM, LlamaForSequenceClassification",
    ),
    "another head": (
        {"architectures": ["LlamaForTokenClassification"]},
        {},
        "'LlamaForTokenClassification'. is not supported for llama",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders_end_in_one_line(name, bases, tmp_path):
    config, tensors, said = BROKEN[name]
    folder = broken(bases("llama", LABELS), tmp_path / "broken", config, tensors)
    with pytest.raises(UserError, match=said) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


UNUSED = "not used by its configuration, the first: base_model.model.score"
BROKEN_ADAPTERS = {  # adapter_config.json, labels.json, tensors, what is said
    "another width": (
        {},
        {},
        {"score.weight": torch.zeros(3, 48)},
        r"score.weight has shape \[3, 48\], this model needs \[3, 64\]",
    ),
    "other labels": ({}, {"id2label": {"0": "a"}}, {}, "labels.json: id2label must name the 3 labels"),
    "no labels": ({}, {"id2label": 7}, {}, "labels.json: id2label must name the 3 labels"),
    "no rows": ({}, {}, {"score.weight": torch.zeros(0, 64)}, r"score.weight must be \[labels, hidden size\]"),
    "a vector": ({}, {}, {"score.weight": torch.zeros(64)}, r"score.weight must be \[labels, hidden size\]"),
    "NaN": ({}, {}, {"score.weight": torch.full((3, 64), float("nan"))}, "score.weight holds NaN or infinite"),
    "no head": ({}, {}, {"score.weight": None}, "the file has no base_model.model.score.weight"),
    "a bias": ({}, {}, {"score.bias": torch.zeros(3)}, UNUSED + ".bias"),
    "of token classification": ({"task_type": "TOKEN_CLS"}, {}, {}, "modules_to_save: score is not supported"),
    "of a language model": ({"task_type": "CAUSAL_LM", "modules_to_save": None}, {}, {}, UNUSED + ".weight"),
}


@pytest.mark.parametrize("name", BROKEN_ADAPTERS)
def test_broken_adapters_end_in_one_line_and_leave_the_model(name, bases, tmp_path):
    config, labels, tensors, said = BROKEN_ADAPTERS[name]
    base = bases("llama", None)
    lora.save_adapter(ours_with_head(base, "llama"), tmp_path)
    for file, changes in (("adapter_config.json", config), (LABELS_FILE, labels)):
        (tmp_path / file).write_text(json.dumps(json.loads((tmp_path / file).read_text()) | changes))
    stored = load_file(tmp_path / "adapter_model.safetensors")
    stored |= {f"base_model.model.{key}": value for key, value in tensors.items()}
    save_file(
        {key: value for key, value in stored.items() if value is not None}, tmp_path / "adapter_model.safetensors"
    )
    model = load_model(base)
    before = model(torch.cat(texts())[None])
    with pytest.raises(UserError, match=said) as caught:
        methods.load_any_adapter(model, tmp_path)
    assert "\n" not in str(caught.value) and model.score is None
    assert torch.equal(model(torch.cat(texts())[None]), before)


def test_classify_refuses_what_its_head_can_not_do(base, classifier, file, tmp_path, monkeypatch, capsys):
    words = ["classify", "--data", file, "--dtype", "fp32", "--device", "cpu"]
    refused = lambda *more: refusal_of(evaluate, monkeypatch, capsys, *words, *more)
    assert "--calibrate: is for models that are asked with a prompt" in refused("--model", classifier, "--calibrate")
    (tmp_path / "labels.txt").write_text("fox\ndog\n", encoding="utf-8")
    assert "the score head has others: fox, dog, über" in refused(
        "--model", classifier, "--labels", tmp_path / "labels.txt"
    )
    other = broken(classifier, tmp_path / "other", {"id2label": {"0": "fox", "1": "dog", "2": "cat"}})
    assert "is not one of the score head's: fox, dog, cat" in refused("--model", other)
    assert "the two score heads have different labels" in refused("--model", other, "--versus", classifier)
    several = broken(classifier, tmp_path / "several", {"problem_type": "multi_label_classification"})
    assert "problem_type multi_label_classification" in refused("--model", several)
    model = load_model(base)
    add_score_head(model, [REWARD])
    save_model(model, tmp_path / "reward")
    assert "has one label, reward: a reward model, which can't classify" in refused("--model", tmp_path / "reward")
    file.write_text("text,label\n" + "fox " * 600 + ",dog\n", encoding="utf-8")
    assert "tokens; the model takes 512" in refused("--model", classifier)
