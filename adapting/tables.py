"""Trained embeddings and output heads beside an adapter: single rows, or whole tables.

An adapter leaves the embedding table and the output head as they are, and so a new token would keep
the row that it began with. Here the rows of chosen tokens are trained beside it (PEFT calls that
`trainable_token_indices`), or a table as a whole (`modules_to_save`). Where the output head is the
embedding table, it stays so: one trained row serves both.

Rows are stored as they are, not as a difference: what stood in their place does not matter to whoever
loads them. The base may lack the rows of new tokens; it grows by them while the adapter is on it.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapter_files import (
    CONFIG_FILE,
    PREFIX,
    is_adapter,
    set_submodule,
    tell_placed,
    weights_file,
    whole_weight,
)
from adapting.score_head import other_saved_modules
from checkpoint import copy_local_rows, open_safetensors
from common.errors import UserError, read_json_if_there
from distributed import to_local
from families import Config
from kernels.nf4 import NF4
from model import Embedding, Linear, Transformer

# {id of a new token: the ids whose mean it begins as}
Parts = Mapping[int, Sequence[int]]
# The end of the name, in PEFT's file, of the rows of a table.
ROWS_END = ".token_adapter.trainable_tokens_delta"
# {a module's name in the files of models: its name in transformers 5}
CURRENT_NAMES = {"embed_out": "lm_head"}


class RowPlaces:
    """Which rows of a table are meant. ids: of these rows, each once. size: the rows of the table."""

    def __init__(self, ids: Sequence[int], size: int):
        self.ids = tuple(ids)
        self.size = size
        self.tensors: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns the ids, int64 [R], and of every id of the vocabulary its place among them, int64 [V],
        -1 where it is none of them."""
        if device not in self.tensors:
            # They outlive a decoding that may need them first, and serve training then.
            with torch.inference_mode(False):
                ids = torch.tensor(self.ids, dtype=torch.int64, device=device)
                places = torch.full((self.size,), -1, device=device)
                places[ids] = torch.arange(len(ids), device=device)
                self.tensors[device] = (ids, places)
        return self.tensors[device]

    def look_up(self, x: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
        """Returns x [..., D], what a table has for ids [...], with these rows [R, D] in their places."""
        place = self.on(ids.device)[1][ids]  # [...]
        looked_up = F.embedding(place.clamp(min=0), rows)
        return torch.where((place >= 0)[..., None], looked_up.to(x.dtype), x)

    def put_into(self, weight: Tensor, rows: Tensor) -> Tensor:
        """Returns a copy of a table [V, D] with these rows, without a gradient."""
        ids, _ = self.on(weight.device)
        return weight.detach().index_copy(0, ids, rows.detach().to(weight.dtype))


class TrainedTable(nn.Module):
    """An embedding table, or an output head, that is trained as a whole: `base` is frozen, and a float32
    copy of its weight is used and trained in its place.

    before: what stood in its place: `base`, or a smaller one with the first of its rows.
    parts: of new tokens. While the adapter is switched off they have the rows that they began with, so
        that the model is that of step 0.
    """

    is_adapter = True
    takes_score_head = True
    # The end of its parameter's name, by which optimizers.py gives it a rate.
    rate_name = ".trained_table"

    def __init__(self, base: Embedding | Linear, before: nn.Module, parts: Parts):
        super().__init__()
        self.base = base
        # In a tuple, so that its weight is no second one of the model.
        self.replaced = (before,)
        self.parts = parts
        self.new = RowPlaces(tuple(parts), rows_of_table(base))
        self.trained_first: nn.Parameter | None = None
        if parts:
            self.trained_first = nn.Parameter(self.memory(len(parts)), requires_grad=False)
        self.merged = False
        # True while the base has the trained rows in it; `merged` alone is an adapter that is off.
        self.is_in_base = False
        # While it is merged: what the trained rows have replaced.
        self.unmerged: Tensor | None = None
        self.original: Tensor | NF4 | None = None
        self.original_bias: Tensor | None = None
        self.add_trained()
        self.train(base.training)

    def add_trained(self) -> None:
        self.trained_table = nn.Parameter(self.memory(rows_of_table(self.base)))

    def memory(self, count: int) -> Tensor:
        """Returns memory for rows of the table, float32 [count, D]."""
        is_head = isinstance(self.base, Linear)
        width = self.base.in_features if is_head else self.base.weight.shape[1]
        device = self.base.frozen[0].device
        return torch.empty(count, width, dtype=torch.float32, device=device)

    @property
    def weight(self) -> Tensor:
        """The frozen weight, whose dtype and device are the model's."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def extent(self) -> str:
        """What is trained of the table, in words."""
        return "all rows"

    def forward(self, ids: Tensor) -> Tensor:  # int64 [...] -> [..., D]
        if not self.merged:
            return F.embedding(ids, self.trained_table)
        return self.looked_up_off(ids)

    def looked_up_off(self, ids: Tensor) -> Tensor:
        """Returns what the base has for ids; for new tokens, unless it is merged, the first rows."""
        x = self.base(ids)
        if self.is_in_base or self.trained_first is None:
            return x
        return self.new.look_up(x, ids, self.trained_first)

    def whole_weight(self, dtype: torch.dtype) -> Tensor:
        if not self.merged:
            return self.trained_table
        return self.whole_weight_off(dtype)

    def whole_weight_off(self, dtype: torch.dtype) -> Tensor:
        """Returns the table as `looked_up_off` reads it."""
        weight = self.base.whole_weight(dtype)
        if self.is_in_base or self.trained_first is None:
            return weight
        return self.new.put_into(weight, self.trained_first)

    # ---- what adapter_files.py asks of every module of an adapter ----

    @property
    def before(self) -> nn.Module:
        # Once it is merged, the base has the rows of the new tokens.
        return self.base if self.is_in_base else self.replaced[0]

    @property
    def saved_numbers(self) -> int:
        return 0

    @torch.no_grad()
    def start(self, model: Transformer | None = None) -> None:
        first = self.first_weight()
        if first is not None:
            copy_local_rows(self.trained_table, first)

    def first_weight(self) -> Tensor | None:
        """Returns the table that the training begins with, float32 [V, D], and keeps the rows of new
        tokens; None on the meta device. All ranks must call it."""
        if to_local(self.base.frozen[0]).is_meta:
            return None
        whole = with_new_rows(whole_weight(self.base), self.parts)
        if self.trained_first is not None:
            copy_local_rows(self.trained_first, whole[list(self.new.ids)])
        return whole

    def merged_weight(self, weight: Tensor) -> Tensor:
        self.unmerged = weight.clone()
        self.is_in_base = True
        return self.trained_table.detach().clone()

    def unmerged_weight(self, weight: Tensor) -> Tensor:
        self.is_in_base = False
        assert self.unmerged is not None, "it was merged"
        return self.unmerged

    def merged_bias(self, bias: Tensor) -> Tensor:
        return bias

    def tensors(self, model: Transformer, name: str) -> dict[str, Tensor]:
        places = [name, "head"] if is_head_tied(model) else [name]
        # peft wants the table of a tied head twice, though it makes one of it.
        return {name_of_table(model, place): self.trained_table for place in places}

    @staticmethod
    def placed(model: Transformer) -> None:
        """Counts the rows of the table that the model has now."""
        rows = rows_of_table(model.embed)
        if model.config.vocab_size != rows:
            model.config = model.config.with_vocabulary(rows)


class TrainedRows(TrainedTable):
    """A table of which some rows are trained, and all others are the base's.

    ids: of these rows, each once.
    """

    rate_name = ".trained_rows"

    def __init__(
        self, base: Embedding | Linear, before: nn.Module, parts: Parts, ids: Sequence[int]
    ):
        self.ids = tuple(ids)
        super().__init__(base, before, parts)

    def add_trained(self) -> None:
        self.places = RowPlaces(self.ids, rows_of_table(self.base))
        self.trained_rows = nn.Parameter(self.memory(len(self.ids)))

    @property
    def extent(self) -> str:
        return f"{len(self.ids):,} rows" if len(self.ids) > 1 else "1 row"

    def forward(self, ids: Tensor) -> Tensor:  # int64 [...] -> [..., D]
        if self.merged:
            return self.looked_up_off(ids)
        return self.places.look_up(self.base(ids), ids, self.trained_rows)

    @property
    def live_rows(self) -> tuple[Tensor, Tensor] | None:
        """The ids and their rows, as Transformer.head_rows has them."""
        if self.merged:
            return None
        return self.places.on(self.trained_rows.device)[0], self.trained_rows

    def whole_weight(self, dtype: torch.dtype) -> Tensor:
        if self.merged:
            return self.whole_weight_off(dtype)
        return self.places.put_into(self.base.whole_weight(dtype), self.trained_rows)

    @torch.no_grad()
    def start(self, model: Transformer | None = None) -> None:
        first = self.first_weight()
        if first is not None:
            copy_local_rows(self.trained_rows, first[list(self.ids)])

    def merged_weight(self, weight: Tensor) -> Tensor:
        self.unmerged = weight[list(self.ids)]
        self.is_in_base = True
        return self.places.put_into(weight, self.trained_rows)

    def unmerged_weight(self, weight: Tensor) -> Tensor:
        self.is_in_base = False
        assert self.unmerged is not None, "it was merged"
        return self.places.put_into(weight, self.unmerged)

    def tensors(self, model: Transformer, name: str) -> dict[str, Tensor]:
        return {f"{PREFIX}{peft_name(model, name)}{ROWS_END}": self.trained_rows}


def rows_of_table(table: Any) -> int:
    """Returns the number of rows of an embedding table or an output head."""
    if isinstance(table, TrainedTable):
        table = table.base
    return table.out_features if isinstance(table, Linear) else len(table.weight)


def tables_of(model: Transformer) -> dict[str, nn.Module]:
    """Returns the embedding table and, where it is another one, the output head, by our names."""
    tables: dict[str, nn.Module] = {"embed": model.embed}
    # Where there is a score head, an LM head is not used.
    if model.head is not None and model.score is None:
        tables["head"] = model.head
    return tables


def is_head_tied(model: Transformer) -> bool:
    """True if the embedding table is the output head, too."""
    return model.head is None and model.score is None


def trained_tables(model: Transformer) -> dict[str, TrainedTable]:
    """Returns the tables of a model that are trained beside an adapter, or rows of them."""
    return {
        name: table for name, table in tables_of(model).items() if isinstance(table, TrainedTable)
    }


def vocabulary_size(config: Config, adapter: str | Path | None) -> int:
    """Returns how many ids a model takes: the rows of its table, or of that which an adapter brings.

    config: of the base.
    """
    if adapter is None or not is_adapter(adapter):
        return config.vocab_size
    sizes = [config.vocab_size]
    indices = read_json_if_there(Path(adapter) / CONFIG_FILE).get("trainable_token_indices")
    lists = list(indices.values()) if isinstance(indices, dict) else [indices]
    for ids in lists:
        if isinstance(ids, list):
            sizes += [id + 1 for id in ids if type(id) is int]
    file = weights_file(adapter)
    if file.is_file():
        names = [
            CURRENT_NAMES.get(config.names[name], config.names[name]) for name in ("embed", "head")
        ]
        places = tuple(f"{PREFIX}{name}." for name in names)
        with open_safetensors(file) as stored:
            for name in stored.keys():  # noqa: SIM118 (it is no dict)
                shape = stored.get_slice(name).get_shape()
                if name.startswith(places) and name.endswith(".weight") and len(shape) == 2:
                    sizes.append(shape[0])
    return max(sizes)


def has_tables(adapter: str | Path) -> bool:
    """True if the adapter in a folder says that it has rows or tables of embeddings."""
    config = read_json_if_there(Path(adapter) / CONFIG_FILE)
    return bool(config.get("trainable_token_indices") or other_saved_modules(config))


# ---- new rows ----


def grow_vocabulary(model: Transformer, rows: int) -> dict[str, nn.Module]:
    """Gives the embedding table and the output head as many rows as `rows`, those that are new filled
    with zeros; the model may have no memory yet.

    Returns what the tables were before, by our names: modules of their own that share the memory.
    Raises UserError where the output head is in 4 bits.
    """
    tables = tables_of(model)
    if rows <= model.config.vocab_size:
        return tables
    for table in tables.values():
        if table.nf4 is not None:
            raise UserError(
                "its output head is in 4 bits, and can't get rows for new tokens; keep it in 16 bits, with"
                " --quant nf4 in place of nf4+head"
            )
    before = {name: with_more_rows(table, rows) for name, table in tables.items()}
    model.config = model.config.with_vocabulary(rows)
    return before


def with_more_rows(table: Any, rows: int) -> nn.Module:
    """Adds rows of zeros to a table. Returns another module with the first rows, which shares their
    memory."""
    old = table.weight
    with torch.device("meta"):
        if isinstance(table, Linear):
            smaller: Any = Linear(table.in_features, table.out_features, bias=False)
            table.out_features = rows
        else:
            smaller = Embedding(*old.shape)
    grown = old.new_zeros(rows, old.shape[1])
    grown[: len(old)] = old.detach()
    table.weight = nn.Parameter(grown, requires_grad=old.requires_grad)
    smaller.weight = nn.Parameter(grown[: len(old)], requires_grad=old.requires_grad)
    return smaller.train(table.training)


def with_new_rows(weight: Tensor, parts: Parts) -> Tensor:
    """Returns a table [V, D] in which each new token has the mean of the rows that its text had before, or
    of all rows before the first new one where it had none. Changes no table that it is given."""
    if not parts:
        return weight
    new = weight.clone()
    for id, old_ids in parts.items():
        new[id] = (weight[list(old_ids)] if old_ids else weight[: min(parts)]).mean(0)
    return new


@torch.no_grad()
def fill_new_rows(model: Transformer, parts: Parts) -> None:
    """Writes the first rows of new tokens into the tables of a model that is trained itself."""
    for table in tables_of(model).values():
        weight: Any = table.weight
        if parts and not to_local(weight).is_meta:
            copy_local_rows(weight, with_new_rows(whole_weight(table), parts))


# ---- on a model ----


def check_saved_names(model: Transformer, names: Sequence[str], where: str) -> set[str]:
    """Returns our names of the tables that modules_to_save names. where: the start of a message.

    Raises UserError for a name that is none of them.
    """
    known = {"embed": peft_name(model, "embed")}
    what = "the embedding table"
    if model.score is None:
        known["head"] = peft_name(model, "head")
        what += " and the output head"
    found = set()
    for name in names:
        # Of older versions of transformers, which peft's files may be from.
        current = CURRENT_NAMES.get(name, name)
        matching = [
            our_name
            for our_name, published in known.items()
            if published == current or published.endswith(f".{current}")
        ]
        if not matching:
            wanted = " and ".join(each.rpartition(".")[2] for each in known.values())
            raise UserError(
                f"{where}: {name} is not supported; of this model it can name {wanted}, {what}"
            )
        found.update(matching)
    return found


def asked_tables(model: Transformer, text: str | None) -> set[str]:
    """Returns our names of the tables that --modules-to-save names. Raises UserError for another name, and
    where it means a head that is the embedding table."""
    if not text:
        return set()
    names = [name.strip() for name in text.split(",")]
    if "" in names:
        raise UserError(f"--modules-to-save {text}: a name in it is empty")
    saved = check_saved_names(model, names, "--modules-to-save")
    if is_head_tied(model) and saved == {"head"}:
        embedding = peft_name(model, "embed").rpartition(".")[2]
        raise UserError(
            f"--modules-to-save {text}: the output head of this model is its embedding table; name"
            f" {embedding}, which trains both"
        )
    return saved


def add_tables(
    model: Transformer,
    rows: Mapping[str, Sequence[int]],
    saved: Collection[str],
    size: int = 0,
    parts: Parts = MappingProxyType({}),
) -> None:
    """Trains rows of the embedding table and the output head of a model that has an adapter, or these
    as a whole. The model may have no memory yet.

    rows: {our name of a table: the ids whose rows are trained}.
    saved: our names of the tables that are trained as a whole.
    size: the rows that both must have; 0: as many as the ids need.
    parts: of new tokens.
    """
    largest = max((max(ids) + 1 for ids in rows.values() if ids), default=0)
    before = grow_vocabulary(model, max(largest, size))
    added: dict[str, nn.Module] = {}
    for name, table in tables_of(model).items():
        assert isinstance(table, (Embedding, Linear)), "one adapter at a time"
        table.requires_grad_(False)
        if name in saved:
            added[name] = TrainedTable(table, before[name], parts)
        elif rows.get(name):
            added[name] = TrainedRows(table, before[name], parts, rows[name])
    for name, module in added.items():
        set_submodule(model, name, module)
    tell_placed(model, added)


# ---- PEFT's files ----


def described_tables(model: Transformer) -> dict:
    """Returns what adapter_config.json says of the trained tables of a model; {} where there are none."""
    config: dict = {}
    for name, table in trained_tables(model).items():
        published = peft_name(model, name).rpartition(".")[2]
        if isinstance(table, TrainedRows):
            config.setdefault("trainable_token_indices", {})[published] = list(table.ids)
        else:
            config.setdefault("modules_to_save", []).append(published)
    # Without it peft would train and load a table that the head is no longer tied to.
    if config.get("modules_to_save") and is_head_tied(model):
        config["ensure_weight_tying"] = True
    return config


def add_described_tables(
    model: Transformer, config: dict, where: Path, tensors: dict[str, Tensor]
) -> None:
    """Trains the tables of a model that has an adapter, or rows of them, as an adapter_config.json
    describes it, and as the file holds whole tables that it does not name (peft writes those of a
    base that was given more tokens).

    tensors: the adapter's, which are tidied.
    Raises UserError for what would be ignored here.
    """
    named, rows = tidy_tables(model, config, where, tensors)
    saved = set()
    size = 0
    for name in tables_of(model):
        tensor = tensors.get(name_of_table(model, name))
        if tensor is not None:
            saved.add(name)
            # Of another one the shape is refused when it is read.
            if tensor.dim() == 2:
                size = max(size, len(tensor))
    missing = sorted(named - saved)
    if missing:
        raise UserError(f"{where}: the file has no {name_of_table(model, missing[0])}")
    check_new_rows(model, rows, saved, size, where)
    add_tables(model, rows, saved, size)


def tidy_tables(
    model: Transformer, config: dict, where: Path, tensors: dict[str, Tensor]
) -> tuple[set[str], dict[str, list[int]]]:
    """Takes out of an adapter's tensors what is there twice of a table, and adds what peft leaves out, so
    that they are those of `TrainedTable.tensors`.

    Returns what adapter_config.json says: our names of the tables that are saved as a whole, and {our
    name of a table: the ids whose rows are}.
    Raises UserError for what would be ignored here.
    """
    names = other_saved_modules(config) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: modules_to_save must be a list of names")
    named = check_saved_names(model, names, f"{where}: modules_to_save")
    rows = described_rows(model, config.get("trainable_token_indices"), where)
    for name in ("embed", "head"):
        take_what_is_there_twice(model, name, rows, tensors)
    if is_head_tied(model):
        refuse_untied(model, named, where, tensors)
        named.discard("head")
    return named, rows


def name_of_table(model: Transformer, name: str) -> str:
    """Returns the name in PEFT's file of the embedding table or the output head."""
    return f"{PREFIX}{peft_name(model, name)}.weight"


def peft_name(model: Transformer, name: str) -> str:
    """Returns the name of the embedding table or the output head in transformers, whose modules PEFT's
    files name: GPT-NeoX's head has another one in the model's own files."""
    published = model.config.names[name]
    return CURRENT_NAMES.get(published, published)


def take_what_is_there_twice(
    model: Transformer, name: str, rows: dict[str, list[int]], tensors: dict[str, Tensor]
) -> None:
    """Leaves one tensor of a table. Beside a table that got more rows, peft writes the base's own, and the
    trained one under two names; beside trained rows the base's table, which then belongs to the
    adapter, and takes these rows in.

    name: ours of the table. rows, tensors: as in `add_described_tables`.
    """
    whole = name_of_table(model, name)
    published = whole.removesuffix(".weight")
    for former, current in CURRENT_NAMES.items():
        for key in list(tensors):
            if key.startswith(f"{PREFIX}{former}."):
                tensors[key.replace(former, current, 1)] = tensors.pop(key)
    other = tensors.pop(f"{published}.modules_to_save.weight", None)
    if other is not None:
        tensors.setdefault(whole, other)
    tensors.pop(f"{published}.original_module.weight", None)
    table = tensors.pop(f"{published}.token_adapter.base_layer.weight", None)
    trained = tensors.get(published + ROWS_END)
    # The output head's list is not repeated where it is tied.
    ids = rows.get(name) or (rows.get("embed", []) if is_head_tied(model) else [])
    if table is None:
        return
    fits = trained is not None and trained.shape == (len(ids), *table.shape[1:])
    if not ids or not fits or max(ids) >= len(table):
        # Then it has another name that nothing has, and is refused.
        tensors[f"{published}.token_adapter.base_layer.weight"] = table
    else:
        del tensors[published + ROWS_END]
        tensors[whole] = table.index_copy(0, torch.tensor(ids), trained.to(table.dtype))


def described_rows(model: Transformer, indices: object, where: Path) -> dict[str, list[int]]:
    """Returns {our name of a table: ids} of trainable_token_indices, whose list alone means the embedding
    table's. Raises UserError where it is neither of peft's two forms."""
    if indices in (None, [], {}):
        return {}
    if isinstance(indices, list):
        indices = {peft_name(model, "embed"): indices}
    if not isinstance(indices, dict):
        raise UserError(f"{where}: trainable_token_indices must be a list, or lists by name")
    found: dict[str, list[int]] = {}
    for published, ids in indices.items():
        (name,) = check_saved_names(model, [published], f"{where}: trainable_token_indices")
        is_list = isinstance(ids, list) and all(type(id) is int and id >= 0 for id in ids)
        if not is_list or len(set(ids)) != len(ids):
            raise UserError(f"{where}: trainable_token_indices must be numbers, each once")
        if max(ids, default=0) >= model.config.vocab_size + 1_000_000:
            raise UserError(f"{where}: trainable_token_indices names token {max(ids)}")
        if name in found:
            raise UserError(f"{where}: trainable_token_indices names {published} twice")
        found[name] = ids
    if is_head_tied(model) and "head" in found:
        if found.get("embed") != found["head"]:
            raise UserError(
                f"{where}: trainable_token_indices unties the output head from the embedding, which is"
                " not supported"
            )
        del found["head"]
    return found


def refuse_untied(
    model: Transformer, named: set[str], where: Path, tensors: dict[str, Tensor]
) -> None:
    """Raises UserError if a file gives a model whose output head is its embedding table a head of its
    own. Leaves in `tensors` what `TrainedTable.tensors` names.

    named: our names of the tables that modules_to_save names.
    """
    problem = (
        f"{where}: it unties the output head from the embedding table, which is not supported; train"
        " with ensure_weight_tying"
    )
    is_tied = False
    for end in (".weight", ROWS_END):
        head = tensors.pop(f"{PREFIX}{peft_name(model, 'head')}{end}", None)
        table = tensors.get(f"{PREFIX}{peft_name(model, 'embed')}{end}")
        if head is not None:
            if table is None or not are_same(head, table):
                raise UserError(problem)
            is_tied = True
    # What peft ties is there under both names. (Of GPT-2 it ties nothing, whatever is asked for.)
    if named and not is_tied:
        raise UserError(problem)
    whole = tensors.get(name_of_table(model, "embed"))
    if whole is not None:
        tensors[name_of_table(model, "head")] = whole


def are_same(a: Tensor, b: Tensor) -> bool:
    """True if two tensors hold the same numbers, NaN in the same places included."""
    return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())


def check_new_rows(
    model: Transformer, rows: dict[str, list[int]], saved: set[str], size: int, where: Path
) -> None:
    """Raises UserError if a table would get a row of which nothing is known. size: the rows of the tables
    in the file."""
    have = model.config.vocab_size
    needed = max([size, *(max(ids, default=0) + 1 for ids in rows.values())])
    for name in tables_of(model):
        known = set(rows.get(name, ()))
        for id in range(have, needed):
            if name not in saved and id not in known:
                raise UserError(
                    f"{where}: its token {id} is beyond the model's {have}, and has no row for"
                    f" {peft_name(model, name)} in the file"
                )
