"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv 2106.09685), and its files in PEFT's format.

A frozen linear y = x W^T gets a trained update beside it: y = x W^T + (alpha / rank) * (x A^T) B^T,
with A [rank, in] and B [out, rank]. Those shapes are not a choice: W is stored [out, in], so the
update that can be added to it is B A. (Texts that write A [in, rank] and B [rank, out] mean the
product A B, the transpose: it does not fit W.) B starts at zero, so that step 0 is the base
exactly, and A random, so that B's gradient is not zero as well.

Files are what peft writes and every server reads: adapter_config.json and
adapter_model.safetensors, whose names are `base_model.model.<published module>.lora_A.weight`, and
lora_B likewise.
"""

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapter_files
from adapter_files import (
    PREFIX,
    adapter_tensors,
    is_number,
    load_onto,
    peft_facts,
    refuse_second_adapter,
    set_submodule,
    write_adapter,
)
from checkpoint import copy_local_rows, hf_name
from common.choices import ALL
from common.errors import UserError
from distributed import is_sharded
from kernels.grouped import Member
from kernels.lora_linear import Casts, LoRAWeights, lora_linears
from kernels.nf4 import NF4
from kernels.triton_utils import use_triton
from model import (
    DropoutSeeds,
    Experts,
    Linear,
    Transformer,
    forward_each,
    stack_expert_weights,
)

# Keys of adapter_config.json that change what an adapter computes, or on which layers.
UNSUPPORTED = (
    "use_dora",
    "use_rslora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "layer_replication",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "exclude_modules",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
# Values of init_lora_weights that leave the base as it is, unlike pissa, olora, loftq and others.
PLAIN_STARTS = ("gaussian", "orthogonal", "eva")


class LoRALinear(nn.Module):
    """A Linear with its update: `base` is frozen, A and B are trained.

    base: the linear that this module takes the place of.
    rank: lora_A is fp32 [rank, in], lora_B is fp32 [out, rank].
    alpha: the update is scaled by alpha / rank.
    dropout: of the adapter's input, from 0 to 1.
    dropout_seeds: the model's, shared by all of its adapted layers.
    number: which of the model's adapted layers this is, from 0.
    """

    is_adapter = True

    def __init__(
        self,
        base: Linear,
        rank: int,
        alpha: float,
        dropout: float,
        dropout_seeds: DropoutSeeds,
        number: int,
    ):
        super().__init__()
        self.base = base
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.dropout_seeds = dropout_seeds
        self.number = number
        device = base.frozen[0].device
        A = torch.empty(rank, base.in_features, dtype=torch.float32, device=device)
        B = torch.zeros(base.out_features, rank, dtype=torch.float32, device=device)
        self.lora_A = nn.Parameter(A)
        self.lora_B = nn.Parameter(B)
        self.start()
        self.merged = False
        # While it is merged: the base's weight before, or None if `merge` did not keep it; its bias.
        self.original: Tensor | NF4 | None = None
        self.original_bias: Tensor | None = None
        # The model's, set by `set_casts`.
        self.casts: ModelCasts | None = None
        # A new module is in training mode, and would drop out in a model that evaluates.
        self.train(base.training)

    @torch.no_grad()
    def start(self, model: Transformer | None = None) -> None:
        """Fills A with U(-1/sqrt(in), 1/sqrt(in)), as the paper's own code does, and B with zeros."""
        # Every rank draws the whole of A and keeps its rows, so that sharding changes no number.
        A = torch.empty(self.lora_A.shape, device=self.lora_A.device)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        copy_local_rows(self.lora_A, A)
        self.lora_B.zero_()

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def uses_dropout(self) -> bool:
        return self.training and self.dropout > 0

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return self.base(x)
        if self.uses_dropout:
            return self.forward_with_dropout(x)
        linears = [self.adapted(x.dtype)]
        casts = self.group_casts([self], x.dtype)
        return lora_linears(x, linears, casts=casts)[0]

    def forward_with_dropout(self, x: Tensor) -> Tensor:
        """Computes `forward` where the adapter's input is dropped out, and the base's is not.

        So the two have different inputs, and the backward is autograd's instead of `lora_linears`'.
        """
        seeds = self.dropout_seeds.seeds
        if seeds is None:
            dropped = F.dropout(x, self.dropout)
        else:
            dropped = seeded_dropout(x, self.dropout, seeds, self.number)
        low = F.linear(dropped, self.lora_A.to(x.dtype))  # [tokens, rank]
        y = self.base(x)  # [tokens, out]
        return y + self.scale * F.linear(low, self.lora_B.to(x.dtype))

    def forward_shared(
        self, x: Tensor, layers: list, up: Tensor | None = None, activation: str = ""
    ) -> list[Tensor]:
        """Returns the outputs of several layers that read the same input, of which this one is the
        first: as one autograd function, if all are adapted and none has an input of its own.

        x: [tokens, in], the input; or with `up`, [tokens, in], the input is act(x) * up.
        """
        for layer in layers:
            is_adapted = type(layer) is LoRALinear and not layer.merged
            # A layer with hooks has to be called by itself for them to run.
            if not is_adapted or layer.uses_dropout or layer._forward_hooks:
                return forward_each(x, layers, up, activation)
        linears = [layer.adapted(x.dtype) for layer in layers]
        casts = self.group_casts(layers, x.dtype)
        return lora_linears(x, linears, up, activation, casts)

    def adapted(self, dtype: torch.dtype) -> LoRAWeights:
        """Returns base and update as `lora_linears` takes them. dtype: of the activations."""
        bias: Tensor | None = self.base.bias
        if bias is not None:
            bias = bias.to(dtype)
        return LoRAWeights(self.base.frozen, bias, self.lora_A, self.lora_B, self.scale)

    def group_casts(self, layers: list, dtype: torch.dtype) -> Casts | None:
        """Returns the casts of layers that read the same input; None if they must cast themselves."""
        # Compiled blocks share one graph, and a graph that looks at the numbers of layers fits only
        # one block.
        if self.casts is None or torch.compiler.is_compiling():
            return None
        return self.casts.of(layers, dtype)

    def member(self) -> Member | None:
        """Returns this linear of an expert as kernels/grouped.py takes it; None if it can't."""
        member = self.base.member()
        if member is None or self.merged:
            return member
        drop = None
        if self.uses_dropout:
            drop = partial(seeded_dropout, probability=self.dropout)
        return Member(member.frozen, self.lora_A, self.lora_B, self.scale, drop, self.number)

    def delta(self) -> Tensor:
        """Returns the update of the weight, fp32 [out, in]."""
        return self.scale * (self.lora_B.float() @ self.lora_A.float())

    # ---- what adapter_files.py asks of every module of an adapter ----

    @property
    def saved_numbers(self) -> int:
        """Numbers for each token that the backward needs: x A^T."""
        return self.rank

    def merged_weight(self, weight: Tensor) -> Tensor:
        return weight + self.delta()

    def unmerged_weight(self, weight: Tensor) -> Tensor:
        return weight - self.delta()

    def merged_bias(self, bias: Tensor) -> Tensor:
        return bias

    def tensors(self, model: Transformer, name: str) -> dict[str, Tensor]:
        published = PREFIX + hf_name(model, name)
        return {
            f"{published}.lora_A.weight": self.lora_A,
            f"{published}.lora_B.weight": self.lora_B,
        }

    @staticmethod
    def placed(model: Transformer) -> None:
        set_casts(model)


class ModelCasts:
    """A and B of all adapters of a model, cast to the dtype of the activations.

    The products on a GPU take them so. The A of layers that read the same input are stacked.

    All are written by one call when a forward begins: a handful of launches instead of 30 in each
    layer's forward and backward. They take 2 bytes a number, beside the 16 of a master weight, its
    gradient and its moments.

    They are used while that forward runs, and where its blocks are computed again in the backward;
    never elsewhere. So they are never older than the master weights, whatever has changed those.
    (To compare the version counters of the master weights would be cheaper, and wrong: torch's
    fused AdamW does not count them up.)
    """

    def __init__(self, groups: list[list[LoRALinear]]):
        self.groups = {group_key(layers): GroupCasts(layers) for layers in groups}
        # True while a forward runs.
        self.running = False

    def of(self, layers: list[LoRALinear], dtype: torch.dtype) -> Casts | None:
        """Returns the casts of a group of layers; None if the layers must cast by themselves."""
        group = self.groups.get(group_key(layers))
        if group is None or not group.current:
            return None
        # torch.utils.checkpoint asks in the same way whether a backward runs.
        in_backward = torch._C._current_graph_task_id() != -1
        if not self.running and not in_backward:
            # A layer is called outside of a forward. Its backward must not use old casts either.
            group.current = False
            return None
        assert group.casts is not None, "current casts are there"
        if group.casts.A.dtype != dtype:
            return None
        return group.casts

    @contextlib.contextmanager
    def fresh(self, dtype: torch.dtype) -> Iterator[None]:
        """A block in which a forward of the model runs. dtype: of its activations."""
        copies: list[Tensor] = []
        masters: list[Tensor] = []
        # Casts that are made while text is generated are used in training later on, so they must be
        # ordinary tensors.
        with torch.inference_mode(False), torch.no_grad():
            for group in self.groups.values():
                if group.prepare(dtype):
                    copies += group.views
                    masters += group.masters()
            # One call for all: launched one by one, so many small copies would take longer.
            if copies:
                torch._foreach_copy_(copies, masters)
        self.running = True
        try:
            yield
        finally:
            self.running = False

    def clear(self) -> None:
        """Frees the memory of all casts."""
        for group in self.groups.values():
            group.clear()


class GroupCasts:
    """The casts of layers that read the same input, or of a single layer."""

    def __init__(self, layers: list[LoRALinear]):
        self.layers = layers
        self.clear()

    def clear(self) -> None:
        self.casts: Casts | None = None
        # Parts of the casts, in the order of `masters`.
        self.views: list[Tensor] = []
        # True if the casts are those of the last forward.
        self.current = False

    def masters(self) -> list[Tensor]:
        """Returns the fp32 weights that are cast: A of all layers, then B of all layers."""
        masters: list[Tensor] = [layer.lora_A for layer in self.layers]
        masters += [layer.lora_B for layer in self.layers]
        return masters

    def needed(self) -> bool:
        """True if the layers read these casts in the coming forward."""
        first = self.layers[0].lora_A
        # A sharded tensor is gathered only while its block computes, so the layers of the block
        # cast it there.
        if is_sharded(first) or not use_triton(first):
            return False
        # A merged layer needs no casts, and one that drops out makes its own.
        return not any(layer.merged or layer.uses_dropout for layer in self.layers)

    def prepare(self, dtype: torch.dtype) -> bool:
        """True if the coming forward needs these casts. Then they have memory, not yet filled."""
        if not self.needed():
            self.clear()
            return False
        first = self.layers[0].lora_A
        casts = self.casts
        if casts is None or casts.A.dtype != dtype or casts.A.device != first.device:
            ranks = [layer.rank for layer in self.layers]
            A = first.new_empty(sum(ranks), first.shape[1], dtype=dtype)  # [ranks, in]
            B = [torch.empty_like(layer.lora_B, dtype=dtype) for layer in self.layers]
            self.casts = Casts(A, B)
            self.views = [*A.split(ranks), *B]
        self.current = True
        return True


def group_key(layers: list) -> tuple[int, ...]:
    """Returns the numbers of layers, by which ModelCasts looks up their group."""
    return tuple(layer.number for layer in layers)


def layers_by_input(model: Transformer) -> list[list[LoRALinear]]:
    """Returns the adapted layers in groups that read the same input.

    These are q, k and v, or gate and up, if all of them are adapted; any other layer is alone.
    Experts that are multiplied together are left out: kernels/grouped.py casts their adapters.
    """
    grouped_modules: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, Experts) and module.can_group():
            grouped_modules.update(module.modules())
    modules = [module for module in model.modules() if module not in grouped_modules]
    groups: list[list[LoRALinear]] = []
    in_a_group: set[nn.Module] = set()
    for module in modules:
        for names in (("q", "k", "v"), ("gate", "up")):
            layers = [getattr(module, name, None) for name in names]
            adapted = [layer for layer in layers if isinstance(layer, LoRALinear)]
            if len(adapted) == len(names):
                groups.append(adapted)
                in_a_group.update(adapted)
    for module in modules:
        if isinstance(module, LoRALinear) and module not in in_a_group:
            groups.append([module])
    return groups


def set_casts(model: Transformer) -> None:
    """Makes one ModelCasts for all adapters of a model. Call it after layers were added or taken
    off."""
    if model.lora_casts is not None:
        model.lora_casts.clear()
        model.lora_casts = None
    layers = lora_layers(model)
    if not layers:
        return
    casts = ModelCasts(layers_by_input(model))
    # model.py cannot name the type, since this file imports it.
    model.lora_casts = casts  # type: ignore[assignment]
    for layer in layers.values():
        layer.casts = casts


def seeded_dropout(x: Tensor, probability: float, keys: Tensor, layer: int) -> Tensor:
    """Returns the dropout (Srivastava et al. 2014) of x, by hashes instead of drawn numbers.

    What is dropped follows from a token's key, the layer and the column. So it is the same on
    whichever rank and in whichever batch a token is computed, and again when a run is resumed or a
    block is computed twice.

    x: [tokens, in].
    probability: of a number to be dropped.
    keys: int64 [tokens].
    layer: the number of the adapted layer.
    """
    # 2^32 divided by the golden ratio, whose multiples are spread over all int32 numbers.
    layer_keys = (keys + layer * 0x9E3779B9).to(torch.int32)
    rows = hash_int32(layer_keys)  # [tokens]
    columns = hash_int32(torch.arange(x.shape[1], dtype=torch.int32, device=x.device))  # [in]
    # Evenly spread over all int32 numbers, [tokens, in].
    numbers = hash_int32(rows[:, None] ^ columns)
    # int32 has negative numbers: half of them are below 0.
    threshold = int((probability - 0.5) * 2**32)
    kept = numbers >= threshold
    return torch.where(kept, x / (1 - probability), 0.0)


def hash_int32(x: Tensor) -> Tensor:
    """Hashes int32 to int32, so that each bit of the result depends on all bits of x.

    Multiplications by odd numbers, of which torch drops the carry, alternate with shifts to the
    right, as in MurmurHash3's last lines (Appleby 2011).
    """
    # 0x85EBCA6B and 0xC2B2AE35, as signed numbers.
    for shift, factor in ((16, -2048144789), (13, -1028477387)):
        # The mask makes the shift unsigned.
        unsigned_mask = (1 << (32 - shift)) - 1
        x = (x ^ ((x >> shift) & unsigned_mask)) * factor
    return x ^ ((x >> 16) & 0xFFFF)


# ---- adapters on a model ----


def add_lora(
    model: Transformer,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: str | list[str] = ALL,
) -> list[str]:
    """Freezes the model and puts LoRA on the linears that `targets` name.

    rank: from 1 to the size of the largest of these layers.
    alpha: the update is scaled by alpha / rank.
    dropout: of the adapters' input while the model trains, at least 0 and below 1.
    targets: "all" (every linear in the blocks), or names, as a list or with commas: the end of a
        published module name, as peft matches them (`q_proj`, `mlp.down_proj`,
        `model.layers.3.self_attn.v_proj`).
    Returns the published names of these linears, in the model's order.
    Raises UserError if one of these is out of range, if a target matches no layer, and if the model
    has an adapter.
    """
    if rank < 1:
        raise UserError(f"--rank {rank}: must be 1 or more")
    if not 0 < alpha < 1e9:
        raise UserError(f"--alpha {alpha}: must be above 0, and no more than a billion")
    if not 0 <= dropout < 1:
        raise UserError(f"--dropout {dropout:g}: must be at least 0 and below 1")
    refuse_second_adapter(model)
    linears: dict[str, Linear] = {}  # by published name
    our_names: dict[str, str] = {}  # likewise
    for name, module in model.named_modules():
        if isinstance(module, Linear) and "blocks." in name:
            published = hf_name(model, name)
            linears[published] = module
            our_names[published] = name
    names = match_targets(targets, list(linears))
    layers = [linears[name] for name in names]
    # A rank above both sides of a matrix adds nothing to what its update can be.
    largest = max(max(layer.in_features, layer.out_features) for layer in layers)
    if rank > largest:
        raise UserError(f"--rank {rank}: no layer here is larger than {largest}")
    model.requires_grad_(False)
    for number, (name, layer) in enumerate(zip(names, layers, strict=True)):
        adapted = LoRALinear(layer, rank, alpha, dropout, model.dropout_seeds, number)
        set_submodule(model, our_names[name], adapted)
    set_casts(model)
    stack_expert_weights(model)
    return names


def match_targets(targets: str | list[str], linears: list[str]) -> list[str]:
    """Returns the linears that `targets` name (see `add_lora`), in the order of `linears`.

    linears: published names.
    Raises UserError if a target matches none of them.
    """
    if not isinstance(targets, str):
        targets = ",".join(targets)
    matched = set()
    for target in targets.split(","):
        target = target.strip()
        if target == ALL:
            names = linears
        else:
            # The dot keeps "v_proj" from matching "kv_proj".
            ending = "." + target
            names = [name for name in linears if name == target or name.endswith(ending)]
        if not names:
            short_names = {name.rpartition(".")[2] for name in linears}
            kinds = ", ".join(sorted(short_names))
            raise UserError(f"--targets {target}: matches no linear layer (the model has {kinds})")
        matched.update(names)
    return [name for name in linears if name in matched]


def lora_layers(model: Transformer) -> dict[str, LoRALinear]:
    """Returns the LoRA layers by published name."""
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            layers[hf_name(model, name)] = module
    return layers


# Scripts call lora.merge(model); what it does holds for adapters of other kinds as well.
merge = adapter_files.merge
unmerge = adapter_files.unmerge


# ---- PEFT's files ----


def save_adapter(
    model: Transformer, folder, write_extra: Callable[[Path], None] | None = None
) -> None:
    """Writes a PEFT adapter folder, in place of what is there.

    It names its base as common/origin.py does.
    write_extra: writes more files into the new folder, before that gets its name.
    Raises UserError if the folder holds a model.
    """
    layers = lora_layers(model)
    assert layers, "the model has no adapter"
    # Rank, alpha and dropout are the same for all layers of an adapter.
    first = next(iter(layers.values()))
    config = {
        **peft_facts(model, "LORA"),
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "target_modules": target_modules(model, list(layers)),
        "bias": "none",
        "fan_in_fan_out": model.config.conv1d,
    }
    write_adapter(folder, config, adapter_tensors(model), write_extra)


def linear_names(model: Transformer) -> list[str]:
    """Returns the published names of all linears of a model."""
    names = []
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            names.append(hf_name(model, name))
    return names


def target_modules(model: Transformer, names: list[str]) -> list[str]:
    """Returns what PEFT's target_modules must be for the adapted layers `names`.

    It is their short names (q_proj) if no other layers have these, because peft adapts all layers
    that match; else their full names.
    """
    short_names = {name.rpartition(".")[2] for name in names}
    matching = set()
    for name in linear_names(model):
        if name.rpartition(".")[2] in short_names:
            matching.add(name)
    if matching == set(names):
        return sorted(short_names)
    return sorted(names)


def load_adapter(model: Transformer, folder) -> None:
    """Puts a PEFT LoRA adapter on the model: the adapter is trainable, everything else is frozen.

    Raises UserError, and leaves the model as it was, if the file's tensors are not exactly those
    that its configuration promises for this model, or if the configuration asks for what would be
    ignored here (another method, bias, rank patterns, saved modules).
    """
    load_onto(model, folder, add_described)


def add_described(
    model: Transformer, config: dict, where: Path, tensors: dict[str, Tensor]
) -> None:
    """Puts LoRA on a model as an adapter_config.json describes it, with its first numbers. where: the
    file. tensors: the adapter's own, which are not looked at here."""
    rank, alpha, dropout, targets = adapter_settings(config, where, model)
    add_lora(model, rank, alpha, dropout, targets)


def adapter_settings(
    config: dict, where: Path, model: Transformer
) -> tuple[int, float, float, str | list[str]]:
    """Returns rank, alpha, dropout and targets of an adapter_config.json.

    where: the file, for messages.
    Raises UserError on settings that this program would have to ignore.
    """
    method = config.get("peft_type")
    if method != "LORA":
        raise UserError(f"{where}: peft_type {method!r} is not supported (supported: LORA)")
    for key in UNSUPPORTED:
        # peft writes keys that are not used as well, with one of these values.
        if config.get(key) not in (None, False, [], {}):
            raise UserError(f"{where}: {key} is set, which is not supported")
    # peft corrects a wrong value with a warning, but then it is unclear what the file means.
    transposed = config.get("fan_in_fan_out")
    if bool(transposed) != model.config.conv1d:
        raise UserError(f"{where}: fan_in_fan_out is {transposed}, which is wrong for this model")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in PLAIN_STARTS:
        raise UserError(
            f"{where}: init_lora_weights {start!r} changes the base, which is not supported"
        )
    bias = config.get("bias", "none")
    if bias != "none":
        raise UserError(f"{where}: bias {bias!r} is not supported")
    rank = config.get("r")
    alpha = config.get("lora_alpha")
    dropout = config.get("lora_dropout", 0.0)
    if type(rank) is not int or not is_number(alpha) or not is_number(dropout):
        raise UserError(f"{where}: r, lora_alpha and lora_dropout must be numbers")
    targets = adapter_targets(config.get("target_modules"), where, model)
    return rank, alpha, dropout, targets


def adapter_targets(targets: object, where: Path, model: Transformer) -> str | list[str]:
    """Returns target_modules of an adapter_config.json as `add_lora` takes it.

    targets: the value in the file `where`: "all-linear", a regular expression, or a list of names.
    Raises UserError if it is none of these, or matches no layer.
    """
    if targets == "all-linear":
        return ALL
    # peft takes a string as a regular expression over whole module names.
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(f"{where}: target_modules is no regular expression ({error})") from None
        targets = [name for name in linear_names(model) if pattern.fullmatch(name)]
    names = targets if isinstance(targets, list) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: target_modules names no layer of this model")
    return names
