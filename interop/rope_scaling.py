"""--rope-scaling yarn=4: a base that is stretched for longer texts than it was made for.

The rotary positions are a matter of config.json alone, so the base becomes a folder in the cache whose
config.json says the scaling and whose other files are links to those of the base. Whatever reads the base
reads that folder; a model that is trained from it has its config.json in final/. An adapter has none, so
its plaintune.json says `rope_scaling`, and every script here stretches the base that it is loaded on; the
adapter's card says what to write for other programs.

What the kinds compute is in kernels/rope.py. config.json gets what transformers reads:

    yarn      Peng et al. 2023: rope_type, factor and original_max_position_embeddings, the length before;
              max_position_embeddings becomes the length after
    linear    Chen et al. 2023, position interpolation: rope_type and factor
    dynamic   NTK-aware, by the length of each text: rope_type and factor

Of the last two max_position_embeddings stays the length before, as their published files have it.
"""

import copy
import hashlib
import json
from pathlib import Path

from checkpoint import read_config
from common.errors import UserError, read_json
from common.files import atomic_folder, cache_folder, check_cache_takes_files, write_json
from common.origin import STRETCHED_FILE
from families import Config, parse_rope_scaling

FORMAT = 1  # of the folders: a higher number has every cached one made anew


def stretched_folder(folder: Path, words: str) -> Path:
    """Returns the folder of a base with rope scaling, which is made in the cache the first time.

    folder: of the base. words: as of --rope-scaling, such as "yarn=4".
    Raises UserError where the base has no rotary positions, or is scaled already.
    """
    kind, factor = parse_rope_scaling(words)
    config = read_config(folder)
    check_can_be_stretched(folder, config)
    raw = stretched_config(config.raw, config.max_positions, kind, factor)
    path = cache_folder() / f"rope-{stretched_name(folder, raw)}-v{FORMAT}"
    if path.is_dir():
        return path
    check_cache_takes_files(path.parent)
    try:
        with atomic_folder(path) as tmp:
            for file in folder.iterdir():
                # An adapter's folder in it, as of a run, belongs to the base as it was.
                if file.is_file() and file.name != "config.json":
                    (tmp / file.name).symlink_to(file.resolve())
            write_json(raw, tmp / "config.json")
            write_json(
                {"base": str(folder.absolute()), "rope_scaling": words}, tmp / STRETCHED_FILE
            )
    except FileExistsError:
        # Another process was faster.
        if not path.is_dir():
            raise
    return path


def check_can_be_stretched(folder: Path, config: Config) -> None:
    """Raises UserError where a base has no rotary positions, or where they are scaled already."""
    if not config.ropes:
        raise UserError(
            f"--rope-scaling: {folder} has no rotary positions ({config.raw['model_type']})"
        )
    for rope in config.ropes:
        if rope.scaling is not None:
            kind, factor = rope.scaling["rope_type"], rope.scaling.get("factor")
            by = f" by {factor:g}" if factor else ""
            raise UserError(
                f"--rope-scaling: {folder} is scaled already ({kind}{by}, up to {config.max_positions:,} tokens); leave"
                " it out, or take the model that was made from"
            )


def stretched_config(raw: dict, max_positions: int, kind: str, factor: float) -> dict:
    """Returns a config.json with rope scaling. raw: without it. max_positions: before."""
    raw = copy.deepcopy(raw)
    scaling: dict = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = max_positions
        raw["max_position_embeddings"] = int(max_positions * factor)
    parameters = raw.get("rope_parameters")
    if not isinstance(parameters, dict):
        # transformers 4.
        raw["rope_scaling"] = scaling
    elif "full_attention" in parameters:
        # Layers with a window see no further than it, so they are left as they are.
        parameters["full_attention"] = (parameters["full_attention"] or {}) | scaling
    else:
        raw["rope_parameters"] = parameters | scaling
    return raw


def stretched_name(folder: Path, raw: dict) -> str:
    """Returns a name for a base's files, as they are now, with a config.json."""
    facts: list = [str(folder.absolute()), raw]
    for file in sorted(folder.iterdir()):
        if file.is_file():
            state = file.stat()
            facts.append([file.name, state.st_size, state.st_mtime_ns])
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def stretched_for_adapter(folder: Path, adapter_facts: dict) -> Path:
    """Returns the base that an adapter is computed on: stretched, if it was trained so and the base is not
    scaled already. adapter_facts: of its plaintune.json."""
    words = adapter_facts.get("rope_scaling")
    if not isinstance(words, str):
        return folder
    if any(rope.scaling is not None for rope in read_config(folder).ropes):
        return folder
    return stretched_folder(folder, words)


def stretch_line(folder: Path) -> str:
    """Returns the line that a run prints about its stretched base."""
    facts = read_json(folder / STRETCHED_FILE)
    words = facts["rope_scaling"]
    before = read_config(Path(facts["base"])).max_positions
    after = read_config(folder).max_positions
    return (
        f"rope      {words}: texts of up to {after:,} tokens, {before:,} before; --seq-len says how long those are"
        " that train"
    )
