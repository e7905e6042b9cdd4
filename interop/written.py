"""What a conversion has written: size, tensors by type, whether a tokenizer and a chat template are
in it. It is read back from the files themselves, so that it is what others will find there."""

from collections import Counter
from pathlib import Path

from checkpoint import TEMPLATES, open_safetensors, weight_files
from common.files import file_sha256
from interop.gguf_reader import read_gguf
from interop.resolve import has_tokenizer

# Digits of a SHA-256 that are printed: enough to tell two files apart.
SHOWN_DIGITS = 16


def describe_gguf(file: Path) -> str:
    """Returns size, tensors, what else is in a GGUF file, and the beginning of its SHA-256."""
    gguf = read_gguf(file)
    types = Counter(tensor.kind for tensor in gguf.tensors.values())
    parts = [megabytes(file.stat().st_size), count_types(types)]
    if gguf.fields.get("general.type") != "adapter":
        has_words = "tokenizer.ggml.tokens" in gguf.fields
        has_template = "tokenizer.chat_template" in gguf.fields
        parts.append(name_texts(has_words, has_template))
    parts.append(f"SHA-256 {file_sha256(file)[:SHOWN_DIGITS]}...")
    return ", ".join(parts)


def describe_folder(folder: Path) -> str:
    """Returns size, number of files, tensors, and what else is in a Hugging Face folder."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    types: Counter[str] = Counter()
    for file in weight_files(folder):
        with open_safetensors(file) as shard:
            names = list(shard.keys())
            types.update(shard.get_slice(name).get_dtype() for name in names)
    templates = [folder / "chat_template.jinja", *(folder / TEMPLATES).glob("*.jinja")]
    has_template = any(path.is_file() for path in templates)
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and b'"chat_template"' in settings.read_bytes():
        has_template = True
    texts = name_texts(has_tokenizer(folder), has_template)
    return f"{megabytes(size)} in {len(files)} files, {count_types(types)}, {texts}"


def megabytes(size: int) -> str:
    """Returns a size in MB; in kB what would be none."""
    if size < 100_000:
        return f"{size / 1e3:,.1f} kB"
    return f"{size / 1e6:,.1f} MB"


def count_types(types: Counter) -> str:
    """Returns "272 tensors (210 Q4_0, 61 F32, 1 Q8_0)", the commonest type first."""
    counts = [f"{count} {kind}" for kind, count in types.most_common()]
    return f"{types.total()} tensors ({', '.join(counts)})"


def name_texts(has_words: bool, has_template: bool) -> str:
    """Returns which of tokenizer and chat template are there."""
    if has_words and has_template:
        return "with tokenizer and chat template"
    if has_words:
        return "with a tokenizer, without a chat template"
    return "without a tokenizer"
