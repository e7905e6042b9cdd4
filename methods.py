"""The ways to fine-tune, a row each: what --method means, and the only place that knows.

A method leaves an ordinary nn.Module behind; the loop never asks which it is. To add one: its
functions and a row of `METHODS`.
"""

import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, cast

import torch
from torch import Tensor

import adapter_files
import adapters
import checkpoint
import distributed
import lora
from adapting import tables
from adapting.new_tokens import ids_of_tokens, new_tokens_of
from adapting.score_head import (
    LABELS_FILE,
    add_score_head,
    has_described_head,
    start_score_head,
)
from adapting.stacked_experts import match_parameters, share_A, short_parameter_names
from common.device import DTYPES, STORAGE_DTYPES
from common.errors import UserError, read_json
from common.files import write_json
from model import NO_LM_HEAD, ScoreHead, Transformer, quantized_linears

# The learning rate of LoRA over that of full fine-tuning.
PLAIN_LORA_FACTOR = 10
# If rounding takes more than this share of what was trained, a warning says so.
WORTH_A_WARNING = 0.05


class Method(NamedTuple):
    """A way to fine-tune.

    attach(model, settings): freezes what is not trained and adds what is, on a model with weights
        or on the meta device.
    start(model, settings): gives what was added on the meta device its first numbers; elsewhere
        attach does it.
    save(model, settings, folder, write_extra): writes final/ or best/, and returns what a user must
        know of it, a clause, or "".
    lr_factor: of the default learning rate, or a function of the settings that returns it.
    weight_decay: the default.
    freezes_base: the base may then be in 4 bits, may be replicated on all ranks, and is not saved.
    options: names of the options that this method reads, and others don't.
    file_type: what an adapter's folder says that it is (`type_of_adapter`); None where the result is
        a whole model.
    add_described(model, config, where, tensors): puts an adapter on a model as its folder describes
        it, for adapter_files.load_onto.
    tidy: brings the tensors of such a folder into the form that the model's own have, where that is
        another one, for adapter_files.load_weights_onto.
    title: what the result is called, after "A".
    can_merge: the result can be added to the base's weights.
    defaults: of a new adapter's options, where they are others than flags.NEW_ADAPTER's.
    shape(model): rank or size, and the other options of a new adapter, of the one that a model has;
        None where there are none.
    quant: the 4-bit format of the base where --quant is not given.
    describe(settings): what is trained, in a few words for the summary.
    lighter: the method that takes less memory, to be suggested where it ran out.
    switched_off(model): a context in which what was added computes nothing, so that the logits are
        those of the model before step 1, to the bit; None, or a function that returns None, where the
        training leaves no such model.
    trains_score_head: a score head can be trained with it (adapting/score_head.py).
    held: what --ewc holds near its start: "weights", those that are trained; "updates", the change of
        the adapted weights; None where there is no such change.
    """

    attach: Callable[[Transformer, "object"], None]
    start: Callable[[Transformer, "object"], None]
    save: Callable[[Transformer, "object", Path, Callable[[Path], None]], str]
    lr_factor: float | Callable[["object"], float]
    weight_decay: float
    freezes_base: bool
    options: tuple[str, ...]
    describe: Callable[["object"], str]
    file_type: str | None = None
    add_described: Callable[[Transformer, dict, Path, dict[str, Tensor]], None] | None = None
    tidy: Callable[[Transformer, dict, Path, dict[str, Tensor]], None] | None = None
    shape: Callable[[Transformer], dict] | None = None
    title: str = ""
    can_merge: bool = False
    defaults: Mapping[str, object] = MappingProxyType({})
    quant: str | None = None
    lighter: str | None = None
    switched_off: Callable[[Transformer], AbstractContextManager[None] | None] | None = None
    trains_score_head: bool = False
    held: str | None = None


# ---- adapters of every kind ----


def or_that_of_adapter(
    add: Callable[[Transformer, "object"], None],
) -> Callable[[Transformer, "object"], None]:
    """Returns an `attach`: it puts the adapter of --adapter on a model; where none is given, a new
    one by add(model, settings)."""

    def attach(model: Transformer, settings) -> None:
        if not continues_adapter(settings):
            add(model, settings)
            return
        check_kind_of_adapter(settings)
        if settings.resume:
            # What is to be said of its base was said when the run began.
            load_any_adapter(model, start_of(settings))
        else:
            put_adapter_on(model, settings.adapter)

    return attach


def start_adapter(model: Transformer, settings) -> None:
    """Gives an adapter that was put on a model without memory its first numbers: those of --adapter,
    or new ones."""
    if continues_adapter(settings):
        adapter_files.load_weights_onto(model, start_of(settings), method_of(settings).tidy)
        return
    for module in adapter_files.adapter_modules(model).values():
        module.start(model)


def check_kind_of_adapter(settings) -> None:
    """Raises UserError if the adapter of --adapter is of another kind than --method trains."""
    wanted = method_of(settings).file_type
    found = type_of_adapter(start_of(settings))
    # Without its encoder, which no file has, a prompt of P-tuning is one of prompt tuning.
    alike = {"PROMPT_TUNING", "P_TUNING"}
    if found in ADAPTER_ROWS and found != wanted and {found, wanted} != alike:
        raise UserError(
            f"--adapter {settings.adapter}: is one of --method {ADAPTER_ROWS[found]}, not of"
            f" --method {settings.method}"
        )


def start_of(settings) -> str | Path:
    """Returns the folder of the adapter that a run begins with: --adapter; once it is resumed the copy
    in its own folder, which nobody changes."""
    if settings.resume and settings.out:
        kept = Path(settings.out) / START_FOLDER
        if adapter_files.is_adapter(kept):
            return kept
    return settings.adapter


def keep_start(settings) -> None:
    """Copies the adapter of --adapter into the run's folder, for a resume."""
    if not settings.adapter or settings.resume:
        return
    kept = Path(settings.out) / START_FOLDER
    kept.mkdir(exist_ok=True)
    weights = adapter_files.weights_file(settings.adapter)
    labels = Path(settings.adapter) / LABELS_FILE
    for file in (Path(settings.adapter) / adapter_files.CONFIG_FILE, weights, labels):
        if file != labels or file.is_file():
            shutil.copy(file, kept / file.name)


def method_of_adapter(settings) -> str | None:
    """Returns the method of the adapter of --adapter, where --method was not typed and is another; else
    None."""
    if not settings.adapter or settings.resume or "method" in settings.given:
        return None
    if not adapter_files.is_adapter(settings.adapter):
        return None
    name = ADAPTER_ROWS.get(type_of_adapter(settings.adapter))
    is_another = name and METHODS[name].file_type != method_of(settings).file_type
    return name if is_another else None


def type_of_adapter(folder: str | Path) -> str:
    """Returns what the adapter in a folder is: PEFT's peft_type, or ADAPTERHUB; "None" where its
    configuration says nothing."""
    config = read_json(Path(folder) / adapter_files.CONFIG_FILE)
    if "peft_type" not in config and isinstance(config.get("config"), dict):
        return ADAPTERHUB
    return str(config.get("peft_type"))


def put_adapter_on(
    model: Transformer, adapter: str | Path, print_fn: Callable[[str], None] = print
) -> None:
    """Loads an adapter of any kind, and says what of this base differs from the one that it was
    trained on.

    print_fn: is called with each line to print.
    """
    load_any_adapter(model, adapter)
    kind = adapter_files.quant_kind(model)
    for line in (
        adapter_files.numbers_note(adapter, model.source, kind),
        adapter_files.base_note(adapter, model.source),
    ):
        if line:
            print_fn(line)


def load_any_adapter(model: Transformer, adapter: str | Path) -> None:
    """Puts the adapter of a folder on a model: it is trainable, everything else is frozen.

    Raises UserError, and leaves the model as it was, if the folder holds none, or one that does not
    fit or is not supported.
    """
    folder = Path(adapter)
    if not adapter_files.is_adapter(folder):
        raise UserError(f"{folder}: {adapter_files.why_no_adapter(folder)}")
    kind = type_of_adapter(folder)
    if kind not in ADAPTER_ROWS:
        raise UserError(
            f"{folder / adapter_files.CONFIG_FILE}: peft_type {kind!r} is not supported (supported:"
            f" {', '.join(ADAPTER_ROWS)})"
        )
    row = METHODS[ADAPTER_ROWS[kind]]
    assert row.add_described is not None, "ADAPTER_ROWS has only rows with adapters"
    if not row.trains_score_head:
        described = read_json(folder / adapter_files.CONFIG_FILE)
        if model.score is not None or has_described_head(described):
            raise UserError(
                f"{folder}: an adapter of --method {ADAPTER_ROWS[kind]}; with a head for sequence"
                f" classification, {SCORE_METHODS} are supported"
            )
    adapter_files.load_onto(model, folder, row.add_described)


def new_lora(model: Transformer, settings) -> None:
    rank_pattern = lora.parse_pattern(settings.rank_pattern, "--rank-pattern")
    variant = lora.Variant(
        rslora=settings.rslora,
        dora=settings.dora,
        start=settings.init,
        rank_pattern=cast(dict[str, int], rank_pattern),
        alpha_pattern=lora.parse_pattern(settings.alpha_pattern, "--alpha-pattern"),
    )
    layers = lora.parse_layers(settings.layers)
    parameters = match_parameters(model, settings.target_parameters)
    targets = [] if settings.targets == "none" else settings.targets
    lora.add_lora(
        model, settings.rank, settings.alpha, settings.dropout, targets, variant, layers, parameters
    )
    add_asked_tables(model, settings)
    # A plan's model is without memory, and in 4 bits already.
    if variant.start == "loftq" and model.device.type != "meta":
        if quantized_linears(model):
            raise UserError(
                f"--init loftq: {model.source} is in 4 bits already; give the weights that it was"
                " made from"
            )
        lora.quantize_with_update(model)


def add_asked_tables(model: Transformer, settings) -> None:
    """Trains the rows of --add-tokens and --train-tokens and the tables of --modules-to-save, on a model
    that has an adapter."""
    saved = tables.asked_tables(model, settings.modules_to_save)
    parts = parts_of_new_tokens(model, settings)
    ids = [*parts]
    if settings.train_tokens:
        ids += ids_of_tokens(settings, model.source)
    if not ids and not saved:
        return
    # --train-tokens may name one that the table has no row for: then those before it get rows, too.
    have = model.config.vocab_size
    ids += sorted(set(range(have, max(ids, default=0))).difference(ids))
    parts |= {id: () for id in ids if id >= have and id not in parts}
    rows = dict.fromkeys(tables.tables_of(model), ids)
    tables.add_tables(model, rows, saved, parts=parts)
    for table in tables.trained_tables(model).values():
        table.start()


def parts_of_new_tokens(model: Transformer, settings) -> dict[int, tuple[int, ...]]:
    """Returns {id: the ids that its text had before} of the tokens of --add-tokens. A tokenizer may have
    tokens that the table has no rows for, as for padding: those before the new ones get rows, too."""
    if not settings.add_tokens:
        return {}
    tokens = new_tokens_of(settings, model.source)
    assert tokens is not None, "a file was named"
    rows = checkpoint.read_config(model.source).vocab_size
    parts: dict[int, tuple[int, ...]] = {id: () for id in range(rows, tokens.first_id)}
    return parts | dict(zip(tokens.ids, tokens.parts, strict=True))


def lr_factors(settings) -> dict[str, float]:
    """Returns {the end of a parameter's name: its learning rate over --lr}, for those that have another
    one."""
    factors = {}
    # Hayou et al. 2024, LoRA+, arXiv 2402.12354.
    if settings.lora_plus not in (None, 1):
        factors[".lora_B"] = settings.lora_plus
    if "modules_to_save" not in method_of(settings).options:
        return factors
    # A whole table is no small matrix: it wants the rate of the weights themselves. Rows, which are few,
    # learn at that of plain LoRA, whatever the variant (experiments/LOG.md).
    whole = 1 / lr_factor_of(settings)
    rows = PLAIN_LORA_FACTOR * whole
    if settings.embedding_lr is not None:
        whole = rows = settings.embedding_lr / settings.lr
    return factors | {".trained_table": whole, ".trained_rows": rows}


def lr_factor_of(settings) -> float:
    """Returns the factor of a run's method for the default learning rate."""
    factor = method_of(settings).lr_factor
    return factor(settings) if callable(factor) else factor


def new_vera(model: Transformer, settings) -> None:
    layers = lora.parse_layers(settings.layers)
    lora.add_vera(model, settings.rank, settings.targets, layers)


def new_bottleneck(model: Transformer, settings) -> None:
    adapters.add_bottleneck(model, settings.placement, settings.reduction_factor)


def new_prompt(model: Transformer, settings) -> None:
    adapters.add_prompt(model, settings.virtual_tokens, settings.prompt_init)


def new_encoded_prompt(model: Transformer, settings) -> None:
    adapters.add_prompt(
        model, settings.virtual_tokens, "random", settings.encoder, settings.encoder_size
    )


def new_prefix(model: Transformer, settings) -> None:
    adapters.add_prefix(model, settings.virtual_tokens, settings.encoder, settings.encoder_size)


def new_ia3(model: Transformer, settings) -> None:
    adapters.add_ia3(model)


def continues_adapter(settings) -> bool:
    """True if the run began with the adapter of --adapter. It has that one's layers and sizes; the
    numbers of a run that is resumed come from its checkpoint."""
    return bool(settings.adapter)


def select_weights(model: Transformer, settings) -> None:
    """Marks the model's own weights as trained, those alone that --train names if it is given.

    Raises UserError if the model is in 4 bits, or if --train matches no parameter.
    """
    if quantized_linears(model):
        raise UserError(
            f"{model.source}: its weights are in 4 bits, which can't be trained; use --method qlora"
        )
    compute_dtype = DTYPES[settings.dtype]
    model.compute_dtype = compute_dtype
    parts = parts_of_new_tokens(model, settings)
    if parts:
        tables.grow_vocabulary(model, max(parts) + 1)
        tables.fill_new_rows(model, parts)
    if not settings.train:
        return
    # Users know the published names, so --train is matched with those.
    names = {name: checkpoint.hf_name(model, name) for name, _ in model.named_parameters()}
    selected = {name for name in names if re.search(settings.train, names[name])}
    if not selected:
        example = names["norm.weight"]
        raise UserError(
            f"--train {settings.train}: matches no parameter (they are named like {example})"
        )
    for name in tables.tables_of(model):
        if parts and f"{name}.weight" not in selected:
            raise UserError(
                f"--add-tokens: --train {settings.train} leaves {names[f'{name}.weight']} out, so new"
                " tokens would stay what they begin as"
            )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in selected)
        # A frozen weight needs no float32 master, which saves memory where the narrow dtype holds
        # the same number. Frozen means: not even rounded. On the meta device, before it is sharded,
        # whether that is so is not known yet.
        if name not in selected and not parameter.is_meta:
            narrow = parameter.data.to(compute_dtype)
            if torch.equal(narrow.float(), parameter.data):
                parameter.data = narrow


def start_full(model: Transformer, settings) -> None:
    """Fills the rows of new tokens: full fine-tuning adds no other parameters."""
    tables.fill_new_rows(model, parts_of_new_tokens(model, settings))


def save_full(
    model: Transformer, settings, folder: Path, write_extra: Callable[[Path], None]
) -> str:
    """Writes a Hugging Face folder in the dtype of --save-dtype. Returns how much of what was
    trained the rounding to it takes.

    If weights have become too large for it, float32 is written: the training must not be lost.
    """
    dtype = STORAGE_DTYPES[settings.save_dtype]
    too_large = weights_beyond(model, dtype)
    if too_large:
        padding = checkpoint.save_model(model, folder, torch.float32, write_extra)
        return joined(
            f"WARNING: stored in fp32, for {too_large} has become too large for"
            f" {settings.save_dtype} (--save-dtype)",
            padding,
        )
    lost = checkpoint.share_lost_by_rounding(model, dtype)
    padding = checkpoint.save_model(model, folder, dtype, write_extra)
    if not lost:
        return padding
    remark = f"rounding to {settings.save_dtype} loses {100 * lost:.3g} % of what was trained"
    if lost > WORTH_A_WARNING:
        remark = f"WARNING: {remark}; --save-dtype fp32 keeps it"
    return joined(remark, padding)


def joined(*clauses: str) -> str:
    """Returns clauses as one, without those that are empty."""
    return "; ".join(clause for clause in clauses if clause)


def weights_beyond(model: Transformer, dtype: torch.dtype) -> str | None:
    """Returns the published name of a parameter that holds finite weights beyond the range of a
    dtype; None if there is none. All ranks must call it."""
    largest = torch.finfo(dtype).max
    if largest >= torch.finfo(torch.bfloat16).max:
        return None
    for name, parameter in model.named_parameters():
        # It is stored in float32 in any case.
        if name == "score.weight":
            continue
        local = distributed.to_local(parameter.detach())
        fits = True
        if local.numel() and local.is_floating_point():
            # What is not finite is refused elsewhere.
            smallest, greatest = (float(each) for each in torch.aminmax(local))
            fits = not largest < max(-smallest, greatest) < math.inf
        if not distributed.all_ranks_agree(fits):
            return checkpoint.hf_name(model, name)
    return None


def check_save_dtype(model: Transformer, settings) -> None:
    """Raises UserError if weights of the base are too large for --save-dtype, before hours are spent
    on it. All ranks must call it."""
    name = weights_beyond(model, STORAGE_DTYPES[settings.save_dtype])
    if name:
        raise UserError(
            f"--save-dtype {settings.save_dtype}: {name} of {model.source} holds weights too large"
            " for it; take bf16 or fp32"
        )


def save_lora(
    model: Transformer, settings, folder: Path, write_extra: Callable[[Path], None]
) -> str:
    """Writes a PEFT adapter folder, in float32: nothing is rounded."""
    if not starts_with_loftq(settings) and not has_own_base(model):
        return lora.save_adapter(model, folder, write_extra)

    # Beside the folder at first, since all ranks write a model and one the rest. A run that is resumed
    # removes what has such a name.
    base = folder.parent / f".{folder.name}-base.partial-0"
    modules = adapter_files.remove_adapter(model)
    try:
        checkpoint.save_model(model, base)
    finally:
        adapter_files.put_back(model, modules)

    def with_base(tmp: Path) -> None:
        write_extra(tmp)
        ship_base(base, tmp, folder)

    lora.save_adapter(model, folder, with_base)
    if folder.name == "best":  # it is written often
        return ""
    return f"{folder.name}/base is the base in 4 bits that LoftQ's adapter belongs to"


def has_own_base(model: Transformer) -> bool:
    """True if the base is one that an adapter of LoftQ brings along."""
    source = model.source
    return source.name == adapter_files.OWN_BASE and adapter_files.is_adapter(source.parent)


def ship_base(base: Path, folder: Path, final_folder: Path) -> None:
    """Moves a base into its adapter's folder, and names it there.

    folder: the adapter's, which will be called `final_folder`.
    """
    file = folder / "plaintune.json"
    facts = read_json(file)
    config_file = folder / adapter_files.CONFIG_FILE
    config = read_json(config_file)
    own_base = final_folder.resolve() / adapter_files.OWN_BASE
    config |= {"base_model_name_or_path": str(own_base), "revision": None}
    write_json(config, config_file)
    shutil.move(base, folder / adapter_files.OWN_BASE)
    own = checkpoint.fingerprint(folder / adapter_files.OWN_BASE)
    facts |= {"base_sha256": own, "made_from_sha256": facts.get("base_sha256")}
    write_json(facts, file)


def save_vera_folder(
    model: Transformer, settings, folder: Path, write_extra: Callable[[Path], None]
) -> str:
    """Writes a PEFT adapter folder, in float32, with the projections."""
    lora.save_vera(model, folder, write_extra)
    return ""


def save_adapter_folder(
    model: Transformer, settings, folder: Path, write_extra: Callable[[Path], None]
) -> str:
    """Writes the folder of an adapter of adapters.py, in float32: nothing is rounded."""
    adapters.save_non_lora(model, folder, write_extra)
    return ""


def describe_full(settings) -> str:
    return settings.train or "all"


def describe_lora(settings) -> str:
    if settings.adapter:
        return f"going on from {settings.adapter}"
    places = [settings.targets, settings.target_parameters]
    where = " and ".join(place for place in places if place and place != "none")
    return f"rank {settings.rank}, alpha {settings.alpha:g} on {where}{lora_words(settings)}"


def lora_words(settings) -> str:
    """Returns the variants of a LoRA, for a summary; "" where it has none."""
    words = {"DoRA": settings.dora, "rsLoRA": settings.rslora}
    words |= {"PiSSA": settings.init == "pissa", "LoftQ": settings.init == "loftq"}
    found = [word for word, is_used in words.items() if is_used]
    if settings.lora_plus not in (None, 1):
        found.append(f"LoRA+ {settings.lora_plus:g}")
    for name in ("rank_pattern", "alpha_pattern", "layers"):
        value = getattr(settings, name)
        if value:
            found.append(f"{name.replace('_', ' ')} {value}")
    return "".join(f", {each}" for each in found)


def describe_vera(settings) -> str:
    if settings.adapter:
        return f"going on from {settings.adapter}"
    layers = f", layers {settings.layers}" if settings.layers else ""
    return f"rank {settings.rank} on {settings.targets}{layers}"


def describe_bottleneck(settings) -> str:
    if settings.adapter:
        return f"going on from {settings.adapter}"
    size = f"1/{settings.reduction_factor:g} of the hidden size"
    return f"{settings.placement}, with a middle of {size}"


def describe_virtual(settings) -> str:
    if settings.adapter:
        encoder = ", without an encoder" if settings.encoder else ""
        return f"going on from {settings.adapter}{encoder}"
    how = f"{settings.virtual_tokens} virtual tokens"
    if settings.encoder not in (None, "none"):
        return f"{how}, encoder {settings.encoder}"
    if settings.prompt_init is not None:
        return f"{how}, beginning as {settings.prompt_init}"
    return how


def describe_ia3(settings) -> str:
    if settings.adapter:
        return f"going on from {settings.adapter}"
    return "factors of keys, values and the middle of the MLPs"


def shape_of_lora(model: Transformer) -> dict:
    layers = lora.lora_layers(model)
    first = next(iter(layers.values()))
    own = [name for name, layer in layers.items() if layer.place is None]
    targets = ",".join(lora.target_modules(model, own)) or "none"
    stacked = lora.stacked_names(layers.values())
    rank, alpha = lora.usual_shape(layers.values())
    # Of an expert in a stacked parameter the name of that counts.
    layers = {
        layer.place.parameter if layer.place else name: layer for name, layer in layers.items()
    }
    others = {name: layer for name, layer in layers.items() if layer.rank != rank}
    ranks = ",".join(f"{name}={layer.rank}" for name, layer in others.items())
    others = {name: layer for name, layer in layers.items() if layer.alpha != alpha}
    alphas = ",".join(f"{name}={layer.alpha!r}" for name, layer in others.items())
    return {
        "rank": rank,
        "alpha": alpha,
        "dropout": first.dropout,
        "targets": targets,
        "target_parameters": ",".join(short_parameter_names(model, stacked)) or None,
        "rank_pattern": ranks or None,
        "alpha_pattern": alphas or None,
        "rslora": first.variant.rslora,
        "dora": first.variant.dora,
        "init": first.variant.start,
    }


def shape_of_vera(model: Transformer) -> dict:
    modules = adapter_files.adapter_modules(model)
    names = [checkpoint.hf_name(model, name) for name in modules]
    first = next(iter(modules.values()))
    return {"rank": first.rank, "targets": ",".join(lora.target_modules(model, names))}


def lora_off(model: Transformer) -> AbstractContextManager[None] | None:
    """Returns a context in which LoRA computes nothing, None where that is not the model of step 0 to
    the bit: with DoRA, PiSSA and LoftQ, which begin as the base but for rounding."""
    for layer in lora.lora_layers(model).values():
        if layer.variant.dora or layer.variant.start != "random":
            return None
    return adapter_files.adapter_off(model)


def shape_of_bottleneck(model: Transformer) -> dict:
    adapter = next(iter(adapter_files.adapter_modules(model).values()))
    size, hidden = adapter.down.shape
    known = {row: name for name, row in adapters.PLACEMENTS.items()}
    return {"reduction_factor": hidden / size, "placement": known.get(adapter.placement)}


def shape_of_prompt(model: Transformer) -> dict:
    return {"virtual_tokens": model.virtual_tokens}


def shape_without_encoder(model: Transformer) -> dict:
    return {"virtual_tokens": model.virtual_tokens, "encoder": "none"}


def rate_of_lora(settings) -> float:
    # PiSSA trains the largest singular values themselves.
    return PLAIN_LORA_FACTOR if settings.init != "pissa" else 3


def rate_of_qlora(settings) -> float:
    # A base in 4 bits wants a learning rate half as high again (experiments/LOG.md).
    return 1.5 * rate_of_lora(settings)


def rate_of_prefix(settings) -> float:
    return 500 if settings.encoder == "none" else 4


# ---- the table ----


# Methods with trains_score_head, for messages.
SCORE_METHODS = "full, lora and qlora"
# In a run's folder, the adapter that it went on from.
START_FOLDER = "adapter"
# What `type_of_adapter` returns for the adapters library's folders, which name no peft_type.
ADAPTERHUB = "AdapterHub"

FULL = Method(
    attach=select_weights,
    start=start_full,
    save=save_full,
    lr_factor=1,
    weight_decay=0.01,
    freezes_base=False,
    options=("train", "weights", "save_dtype", "add_tokens"),
    describe=describe_full,
    lighter="lora",
    trains_score_head=True,
    held="weights",
)
LORA = Method(
    attach=or_that_of_adapter(new_lora),
    start=start_adapter,
    save=save_lora,
    lr_factor=rate_of_lora,
    weight_decay=0.0,
    freezes_base=True,
    options=(
        "quant",
        "rank",
        "alpha",
        "dropout",
        "targets",
        "target_parameters",
        "layers",
        "rank_pattern",
        "alpha_pattern",
        "rslora",
        "dora",
        "init",
        "lora_plus",
        "add_tokens",
        "train_tokens",
        "modules_to_save",
        "embedding_lr",
        "adapter",
    ),
    describe=describe_lora,
    file_type="LORA",
    add_described=lora.add_described_lora,
    tidy=lora.tidy_lora,
    shape=shape_of_lora,
    title="LoRA adapter",
    can_merge=True,
    lighter="qlora",
    switched_off=lora_off,
    trains_score_head=True,
    held="updates",
)
QLORA = LORA._replace(lr_factor=rate_of_qlora, quant="nf4", lighter=None)
VERA = LORA._replace(
    attach=or_that_of_adapter(new_vera),
    save=save_vera_folder,
    options=("quant", "rank", "targets", "layers", "adapter"),
    describe=describe_vera,
    file_type="VERA",
    add_described=lora.add_described_vera,
    tidy=None,
    shape=shape_of_vera,
    title="VeRA adapter",
    switched_off=adapter_files.adapter_off,
    trains_score_head=False,
    held=None,
    lighter=None,
    lr_factor=200,
    defaults={"rank": 256},
)
# The factors below are those of a sweep on the bundled task alone (experiments/LOG.md).
BOTTLENECK = Method(
    attach=or_that_of_adapter(new_bottleneck),
    start=start_adapter,
    save=save_adapter_folder,
    lr_factor=20,
    weight_decay=0.0,
    freezes_base=True,
    options=("quant", "placement", "reduction_factor", "adapter"),
    describe=describe_bottleneck,
    file_type=ADAPTERHUB,
    add_described=adapters.add_described_bottleneck,
    shape=shape_of_bottleneck,
    title="set of bottleneck adapters",
    switched_off=adapter_files.adapter_off,
)
# At step 0 a learned prompt is there already, so the base alone is not the model of step 0.
PROMPT_TUNING = BOTTLENECK._replace(
    attach=or_that_of_adapter(new_prompt),
    options=("quant", "virtual_tokens", "prompt_init", "adapter"),
    describe=describe_virtual,
    file_type="PROMPT_TUNING",
    add_described=adapters.add_described_prompt,
    shape=shape_of_prompt,
    title="learned prompt",
    switched_off=None,
    lr_factor=1500,
)
P_TUNING = PROMPT_TUNING._replace(
    attach=or_that_of_adapter(new_encoded_prompt),
    options=("quant", "virtual_tokens", "encoder", "encoder_size", "adapter"),
    file_type="P_TUNING",
    shape=shape_without_encoder,
    lr_factor=6,
)
PREFIX_TUNING = P_TUNING._replace(
    attach=or_that_of_adapter(new_prefix),
    file_type="PREFIX_TUNING",
    title="learned prefix",
    lr_factor=rate_of_prefix,
)
IA3 = BOTTLENECK._replace(
    attach=or_that_of_adapter(new_ia3),
    options=("quant", "adapter"),
    describe=describe_ia3,
    file_type="IA3",
    add_described=adapters.add_described_ia3,
    shape=None,
    title="set of learned factors, (IA)^3,",
    can_merge=True,
    lr_factor=150,
)
METHODS = {
    "full": FULL,
    "lora": LORA,
    "qlora": QLORA,
    "vera": VERA,
    "bottleneck": BOTTLENECK,
    "prompt-tuning": PROMPT_TUNING,
    "p-tuning": P_TUNING,
    "prefix-tuning": PREFIX_TUNING,
    "ia3": IA3,
}
# {what an adapter's folder says that it is: the first method that reads it}.
ADAPTER_ROWS: dict[str, str] = {}
for _name, _row in METHODS.items():
    if _row.file_type is not None:
        ADAPTER_ROWS.setdefault(_row.file_type, _name)


def quant_of(flags) -> str | None:
    """Returns the kind of quantization of a run: what --quant says, or else what --method implies."""
    return flags.quant or METHODS[flags.method].quant


def method_name(settings) -> str:
    """Returns the name of a run's row: --method lora on a quantized base is QLoRA by another name."""
    if settings.quant and settings.method == "lora":
        return "qlora"
    return settings.method


def method_of(settings) -> Method:
    """Returns the row of a run."""
    return METHODS[method_name(settings)]


def model_of_step_0(model: Transformer, settings) -> AbstractContextManager[None] | None:
    """Returns a context in which a run's model computes as before step 1, to the bit; None where it
    no longer can."""
    switched_off = method_of(settings).switched_off
    # A run that goes on from an adapter did not begin with the base alone, and the first numbers of a
    # score head are gone once it is trained.
    if switched_off is None or settings.adapter or model.score is not None:
        return None
    return switched_off(model)


def load_trainable(
    settings, folder: Path, device: torch.device, labels: Sequence[str] | None = None
) -> Transformer:
    """Loads the base model and makes it trainable by the run's method; sharded over the ranks where
    --shard asks.

    labels: of the score head that the run trains in the place of the LM head: a new one, unless the
        model or the adapter of --adapter has one with these labels. None: the run trains with the LM
        head.
    Raises UserError where the model has the other kind of head or other labels, and where the method
    trains no score head.
    """
    check_head_method(settings, labels)
    # LoRA's first numbers are random.
    torch.manual_seed(settings.seed)
    method = method_of(settings)
    if method.freezes_base or settings.optimizer_offload:
        stored = DTYPES[settings.dtype]
    elif settings.weights == "bf16":
        stored = torch.bfloat16
    else:
        # fp32 masters: rounded to the nearest bf16 number, small updates would be lost.
        stored = torch.float32
    if settings.shard == "none":
        # LoftQ rounds the weights itself.
        quant = None if starts_with_loftq(settings) else settings.quant
        model = checkpoint.load_model(folder, stored, device, quant)
        attach_with_head(model, settings, labels)
    else:
        model = load_sharded(settings, folder, stored, device, labels)
    model.activation_checkpointing = settings.activation_checkpointing
    model.embedding_noise = settings.neftune
    if settings.save_dtype:
        check_save_dtype(model, settings)
    return model


def check_head_method(settings, labels: Sequence[str] | None) -> None:
    """Raises UserError where a run's method trains no score head, and one is asked for. labels: as for
    `load_trainable`."""
    if labels is None:
        return
    if not method_of(settings).trains_score_head:
        raise UserError(
            f"--method {settings.method}: trains no head for sequence classification; {SCORE_METHODS} do"
        )
    if settings.quant == "nf4+head":
        raise UserError(
            "--quant nf4+head: a head for sequence classification is trained in float32; take nf4"
        )


def attach_with_head(model: Transformer, settings, labels: Sequence[str] | None) -> None:
    """Makes a model trainable by a run's method, and puts the score head on it, if it is to have one.
    labels: as for `load_trainable`."""
    if labels is not None and "head" in tables.asked_tables(model, settings.modules_to_save):
        raise UserError(
            f"--modules-to-save {settings.modules_to_save}: with a head for sequence classification the"
            " model has no LM head"
        )
    if labels is not None and has_own_base(model):
        raise UserError(
            f"{model.source}: is the base of an adapter of LoftQ, with which no head for sequence"
            " classification is trained"
        )
    method_of(settings).attach(model, settings)
    if labels is not None:
        add_score_head(model, labels)
    elif model.score is not None:
        raise UserError(f"{settings.adapter or model.source}: {NO_LM_HEAD}, which this run needs")


def starts_with_loftq(settings) -> bool:
    return settings.init == "loftq" and not continues_adapter(settings)


def load_sharded(
    settings,
    folder: Path,
    stored: torch.dtype,
    device: torch.device,
    labels: Sequence[str] | None,
) -> Transformer:
    """Returns what `load_trainable` does: the model is made trainable and sharded on the meta
    device, then each rank reads its own rows.

    stored: the dtype of the weights.
    """
    method = method_of(settings)
    # Masters are cast before they are gathered for a layer, which sends half the bytes.
    dtype = DTYPES[settings.dtype]
    gathered = None
    if not method.freezes_base and dtype != stored:
        gathered = dtype

    def attach_and_shard(model: Transformer) -> None:
        attach_with_head(model, settings, labels)
        distributed.shard_model(model, settings.shard, device, gathered, settings.shard_offload)

    memory = torch.device("cpu") if settings.shard_offload else device
    model = checkpoint.load_model(folder, stored, memory, settings.quant, attach_and_shard)
    # Their memory is new, and so is no longer one's.
    share_A(model)
    if settings.shard_offload:
        # What is not sharded is not brought to the device when it is needed.
        for parameter in model.parameters():
            if not distributed.is_sharded(parameter):
                parameter.data = parameter.data.to(device)
    method.start(model, settings)
    # One of an adapter was started with it, and one of the folder has its numbers.
    if isinstance(model.score, ScoreHead) and model.config.labels is None:
        start_score_head(model)
    return model
