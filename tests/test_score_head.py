"""Score heads against transformers and peft: scores, folders and adapters in both directions, padding tokens, what a
classifier reads, evaluate.py classify, two processes, and bad input."""

import functools
import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.family_cases import CASES, IDS, SIZES
from support.helpers import move, relative

import checkpoint
import lora
from adapting.score_head import (
    add_score_head,
    document_scores,
    start_score_head,
)
from checkpoint import load_model, read_config, save_model
from families import FAMILIES, Config
from kernels.attention import Documents

LABELS = ("no", "maybe", "河")
LENGTHS = [5, 9, 1, 12, 7]

# ---- random models of transformers, and their scores ----


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
