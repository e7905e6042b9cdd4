"""Every architecture to GGUF and back, on random checkpoints drawn large (standard deviation 0.3): the same model comes
back, the names are those of the gguf package, and transformers' own GGUF loader reads our file with equal logits where
it can. test_gguf_real.py has llama.cpp read the same files (slow).

    pytest -k gguf_families -s       prints the table of worst errors
"""

import dataclasses
import re

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.gguf_files import CASES, TEMPLATE, checkpoint, tokens
from support.helpers import relative

import convert
from checkpoint import load_model, read_config
from interop.gguf_export import first_difference
from interop.gguf_names import ARCHITECTURE_OF, ARCHITECTURES, places
from tokenizer import load_tokenizer

NOTES = {"mistral": "no sliding window", "phi3": "no sliding window", "phi3, longrope": "LongRoPE"}


TEXT = "On 12.03.2023<|im_end|> she'll <think> naïve 東京"
WORST: dict[str, dict[str, float]] = {}


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
