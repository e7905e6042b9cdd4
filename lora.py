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
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import (
    all_finite,
    config_dtype,
    copy_local_rows,
    fingerprint,
    hf_name,
    iterate_tensors,
    read_config,
)
from common.choices import ALL, QUANT_KINDS
from common.errors import UserError, printable, read_json, read_json_if_there
from common.files import atomic_folder, save_tensors, write_json
from common.origin import base_facts
from distributed import full_tensor, is_sharded, rank0_context, run_on_rank0
from kernels.grouped import Member
from kernels.lora_linear import Casts, LoRAWeights, lora_linears
from kernels.nf4 import NF4, dequantized_weight
from kernels.triton_utils import use_triton
from model import (
    DropoutSeeds,
    Experts,
    Linear,
    Transformer,
    forward_each,
    quantized_linears,
    stack_expert_weights,
)

PREFIX = "base_model.model."
ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
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
        # While it is merged: the base's weight before, or None if `merge` did not keep it.
        self.original: Tensor | NF4 | None = None
        # The model's, set by `set_casts`.
        self.casts: ModelCasts | None = None
        # A new module is in training mode, and would drop out in a model that evaluates.
        self.train(base.training)

    @torch.no_grad()
    def start(self) -> None:
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
    """Makes one ModelCasts for all adapters of a model. Call it after layers were added."""
    casts = ModelCasts(layers_by_input(model))
    # model.py cannot name the type, since this file imports it.
    model.lora_casts = casts  # type: ignore[assignment]
    for layer in lora_layers(model).values():
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
    if has_lora(model):
        raise UserError(
            "the model has a LoRA adapter already; remove it first (lora.merge keeps its update)"
        )
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


def set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replaces the submodule `name` of a model."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def lora_layers(model: Transformer) -> dict[str, LoRALinear]:
    """Returns the LoRA layers by published name."""
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            layers[hf_name(model, name)] = module
    return layers


def has_lora(model: Transformer) -> bool:
    return any(isinstance(module, LoRALinear) for module in model.modules())


@torch.no_grad()
def merge(model: Transformer, keep: bool = False, stored: torch.dtype | None = None) -> float:
    """Adds every adapter's update to its base weight, in fp32, rounded once to the base's dtype.

    A base in NF4 leaves it, since 4 bits would not hold the update: the sum is in the model's
    dtype, and the base's numbers in it are those of its 4 bits.

    keep: keeps the weights as they were, so that `unmerge` is exact; this takes as much memory as
        they do. A base in NF4 is always kept.
    stored: the dtype that the weights are rounded to later on, if to another one.
    Returns the fraction of the update that rounding loses: the length of what rounding changes,
    over the length of the update.
    Raises UserError naming a layer whose merged weights are too large for their dtype.
    """
    # Sums of squares. They stay on the device, so that the layers need not wait for each other.
    lost: float | Tensor = 0.0
    update: float | Tensor = 0.0
    for layer in lora_layers(model).values():
        assert not layer.merged, "merged already"
        base = layer.base
        delta = layer.delta()
        # In fp32 from end to end: rounded twice, small updates would be lost.
        exact = dequantized_weight(base.frozen, torch.float32) + delta
        # NF4 would lose the update, so the linear becomes a plain one.
        if base.nf4 is not None:
            layer.original = base.nf4.tensors
            base.dequantize(exact.to(model.dtype))
        else:
            layer.original = base.weight.clone() if keep else None
            base.weight.copy_(exact)
        rounded = base.weight if stored is None else base.weight.to(stored)
        lost += (rounded - exact).square().sum()
        update += delta.square().sum()
        layer.merged = True
    # An adapter that was never trained has no update: B is zero.
    if not update:
        return 0.0
    share = math.sqrt(lost / update)
    if not math.isfinite(share):
        check_merged_weights(model, stored)
    return share


def check_merged_weights(model: Transformer, stored: torch.dtype | None) -> None:
    """Raises UserError naming the first layer whose merged weights are not finite. stored: as for
    `merge`."""
    for name, layer in lora_layers(model).items():
        weight = layer.base.weight
        dtype = stored or weight.dtype
        if not all_finite(weight.to(dtype)):
            problem = (
                f"with the adapter's update its weights are too large for {config_dtype(dtype)}"
            )
            raise UserError(f"{name}: {problem}; take another --dtype")


@torch.no_grad()
def unmerge(model: Transformer) -> None:
    """Takes the updates out of the base weights again.

    The result is exact if `merge` kept the weights, as it always does for NF4; else up to its
    rounding to the base's dtype.
    """
    for layer in lora_layers(model).values():
        assert layer.merged, "not merged"
        base = layer.base
        if isinstance(layer.original, NF4):
            base.quantize(layer.original)
        elif layer.original is not None:
            base.weight.copy_(layer.original)
        else:
            base.weight.copy_(base.weight.float() - layer.delta())
        layer.merged = False
        layer.original = None


@contextlib.contextmanager
def adapter_off(model: Transformer) -> Iterator[None]:
    """A block in which the model computes as its base alone. Nothing is moved or rounded."""
    layers = lora_layers(model).values()
    assert not any(layer.merged for layer in layers), "a merged layer's base has the update in it"
    for layer in layers:
        # Then the layer is its base.
        layer.merged = True
    try:
        yield
    finally:
        for layer in layers:
            layer.merged = False


def remove_lora(model: Transformer) -> dict[str, LoRALinear]:
    """Puts the plain linears back. After `merge` the model is an ordinary one for save_model.

    Returns the layers that were removed, by our names of them, for `restore_lora`.
    """
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            layers[name] = module
    # In a loop of its own, because nothing may change while named_modules() walks over it.
    for name, layer in layers.items():
        set_submodule(model, name, layer.base)
    if model.lora_casts is not None:
        model.lora_casts.clear()
        model.lora_casts = None
    return layers


def restore_lora(model: Transformer, layers: dict[str, LoRALinear]) -> None:
    """Puts layers back that `remove_lora` removed from this model.

    So several adapters can use one base, one after the other.
    """
    assert not has_lora(model), "one adapter at a time"
    for name, layer in layers.items():
        set_submodule(model, name, layer)
    set_casts(model)


# ---- PEFT's files ----


def save_adapter(
    model: Transformer, folder, write_extra: Callable[[Path], None] | None = None
) -> None:
    """Writes a PEFT adapter folder, in place of what is there.

    It names its base as common/origin.py does.
    write_extra: writes more files into the new folder, before that gets its name.
    Raises UserError if the folder holds a model.
    """
    if (Path(folder) / "config.json").is_file():
        raise UserError(
            f"{folder}: holds a model, which an adapter would replace; name another folder"
        )
    layers = lora_layers(model)
    assert layers, "the model has no adapter"
    # Rank, alpha and dropout are the same for all layers of an adapter.
    first = next(iter(layers.values()))
    base = base_facts(model.source)
    # Every rank gathers, because the shards of a tensor are on all of them.
    weights = {}
    for name, parameter in adapter_parameters(model).items():
        weights[name] = full_tensor(parameter.detach()).cpu().contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base["base"],
        "revision": base.get("base_revision"),
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "target_modules": target_modules(model, list(layers)),
        "bias": "none",
        "fan_in_fan_out": model.config.conv1d,
        "inference_mode": True,
    }
    with rank0_context(atomic_folder(folder, replace=True)) as tmp:
        # None on the other ranks.
        if not tmp:
            return
        write_json(config, tmp / CONFIG_FILE)
        save_tensors(weights, tmp / ADAPTER_FILE)
        if write_extra:
            write_extra(tmp)


def adapter_parameters(model: Transformer) -> dict[str, Tensor]:
    """Returns the parameters of a model's adapter by their names in PEFT's file."""
    parameters: dict[str, Tensor] = {}
    for name, layer in lora_layers(model).items():
        parameters[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A
        parameters[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B
    return parameters


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


def is_adapter(folder: str | Path) -> bool:
    return (Path(folder) / CONFIG_FILE).is_file()


def why_no_adapter(folder: Path) -> str:
    """Returns what a path is that should have been an adapter folder, for messages."""
    if not folder.is_dir():
        return "no such folder"
    final = folder / "final"
    if is_adapter(final):
        return f"is the folder of a run; its adapter is {final}"
    if (folder / "config.json").is_file() and list(folder.glob("*.safetensors")):
        return "is a whole model, not an adapter; give it as --model"
    return f"no {CONFIG_FILE} in it, so it is no PEFT adapter folder"


def adapter_metadata(folder: str | Path) -> dict:
    """Returns what plaintune.json says of the adapter's base; {} if there is no such file.

    train.py writes it beside the weights.
    """
    return read_json_if_there(Path(folder) / "plaintune.json")


def load_adapter(model: Transformer, folder) -> None:
    """Puts a PEFT LoRA adapter on the model: the adapter is trainable, everything else is frozen.

    Raises UserError, and leaves the model as it was, if the file's tensors are not exactly those
    that its configuration promises for this model, or if the configuration asks for what would be
    ignored here (another method, bias, rank patterns, saved modules).
    """
    folder = Path(folder)
    config_file = folder / CONFIG_FILE
    if not is_adapter(folder):
        raise UserError(f"{folder}: {why_no_adapter(folder)}")
    config = read_json(config_file)
    rank, alpha, dropout, targets = adapter_settings(config, config_file, model)
    file = folder / ADAPTER_FILE
    if not file.is_file():
        message = f"{file}: no such file"
        if (folder / "adapter_model.bin").exists():
            message += " (adapter_model.bin is a pickle, which can run code and is not read)"
        raise UserError(message)
    tensors = dict(iterate_tensors([file]))
    # To leave the model as it was if the tensors do not fit.
    trainable = {p for p in model.parameters() if p.requires_grad}
    try:
        names = add_lora(model, rank, alpha, dropout, targets)
    except UserError as error:
        raise UserError(f"{config_file}: does not fit this model ({error})") from None
    assert len(lora_layers(model)) == len(names)
    try:
        copy_tensors(model, tensors, file)
    except UserError:
        remove_lora(model)
        for parameter in model.parameters():
            parameter.requires_grad_(parameter in trainable)
        raise


def put_adapter_on(
    model: Transformer, adapter: str | Path, print_fn: Callable[[str], None] = print
) -> None:
    """Loads an adapter, and says what of this base differs from the one that it was trained on.

    print_fn: is called with each line to print.
    """
    load_adapter(model, adapter)
    kind = quant_kind(model)
    for line in (numbers_note(adapter, model.source, kind), base_note(adapter, model.source)):
        if line:
            print_fn(line)


def quant_kind(model: Transformer) -> str | None:
    """Returns which linears of a model are in 4 bits, as --quant names it; None if none are."""
    quantized = list(quantized_linears(model).values())
    if not quantized:
        return None
    return "nf4+head" if model.head in quantized else "nf4"


def base_numbers(model: Transformer) -> dict:
    """Returns what plaintune.json says of the numbers that a model was trained on: {"quant": kind},
    and if its base is a folder of to-nf4, the hash of what that was made from."""
    facts: dict[str, str | None] = {"quant": quant_kind(model)}
    if is_quantized(model.source):
        facts["quantized_from_sha256"] = adapter_metadata(model.source).get("base_sha256")
    return facts


def trained_kind(adapter: str | Path) -> str | None:
    """Returns the numbers of the base that an adapter was trained on: one of QUANT_KINDS, "stored"
    for the weights as they are stored, or None if it is not known."""
    metadata = adapter_metadata(adapter)
    kind = metadata.get("quant")
    if kind in QUANT_KINDS:
        return kind
    return "stored" if "quant" in metadata else None


def numbers_note(adapter: str | Path, folder: Path, kind: str | None) -> str | None:
    """Returns a line where an adapter was trained on other numbers of its base than these; None
    where they are the same, or where it is not known.

    folder: of the base.
    kind: how it is loaded, one of QUANT_KINDS or None.
    """
    trained = trained_kind(adapter)
    if trained is None or trained == (kind or "stored"):
        return None
    if trained in QUANT_KINDS:
        note = f"NOTE: {adapter} was trained on its base in {trained}; --quant {trained} gives it that one"
        return f"{note} (here it is in {kind})" if kind else note
    if is_quantized(folder):
        # Runs from before `quant` was noted for folders that are in 4 bits already.
        if adapter_metadata(adapter).get("base_sha256") == fingerprint(folder):
            return None
        return (
            f"NOTE: {adapter} was trained on its base as it is stored, and {folder} is in {kind};"
            " give the folder that this one was quantised from"
        )
    return (
        f"NOTE: {adapter} was trained on its base as it is stored, and here it is in {kind}; without"
        " --quant it has the weights that it was trained on"
    )


def base_note(adapter: str | Path, folder: Path) -> str | None:
    """Returns a line where an adapter was trained on another base than that of a folder, by the
    hash of the weights, or where only its name for the base is known and is another; else None."""
    metadata = adapter_metadata(adapter)
    base_sha256 = metadata.get("base_sha256")
    if base_sha256 is None:
        return name_note(adapter, folder)
    # One rank reads the base's files, which takes a second a GB, and tells the others.
    sha256 = run_on_rank0(lambda: fingerprint(folder))
    # A folder that to-nf4 wrote notes what it was made from. In 4 bits both are the same numbers.
    same_weights = {sha256}
    if is_quantized(folder):
        same_weights.add(adapter_metadata(folder).get("base_sha256"))
    if base_sha256 in same_weights or metadata.get("quantized_from_sha256") == sha256:
        return None
    return (
        f"WARNING: {adapter} was trained on other weights than those of {folder};"
        " its answers will suffer"
    )


def name_note(adapter: str | Path, folder: Path) -> str | None:
    """Returns a line where an adapter, of which no hash of its base is known, names another base
    than this folder; else None."""
    named = read_json(Path(adapter) / CONFIG_FILE).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        return None
    names = {str(folder), str(folder.resolve()), folder.resolve().name, base_facts(folder)["base"]}
    if named in names or Path(named).name in names:
        return None
    return (
        f"NOTE: {adapter} names {printable(named[:100])} as its base; whether {folder} holds the"
        " same weights is not known"
    )


def is_quantized(folder: Path) -> bool:
    """True if a model folder is in 4 bits on disk."""
    return read_config(folder).raw.get("quantization_config") is not None


def load_lora_weights(model: Transformer, folder) -> None:
    """Reads an adapter's file into the adapter that the model has already."""
    file = Path(folder) / ADAPTER_FILE
    copy_tensors(model, dict(iterate_tensors([file])), file)


def copy_tensors(model: Transformer, tensors: dict[str, Tensor], file: Path) -> None:
    """Copies the tensors of an adapter's file into the model's LoRA layers.

    Raises UserError if they are not exactly those of the layers: by name, shape, and being finite
    numbers of a float dtype.
    """
    parameters = adapter_parameters(model)
    missing = sorted(set(parameters) - set(tensors))
    extra = sorted(set(tensors) - set(parameters))
    if missing:
        instead = other_name(missing[0], extra)
        raise UserError(
            f"{file}: {len(missing)} of its tensors missing, the first: {missing[0]}{instead}"
        )
    if extra:
        raise UserError(
            f"{file}: {len(extra)} of its tensors not used by its configuration, the first:"
            f" {extra[0]}"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            tensor = tensors[name]
            if tensor.shape != parameter.shape:
                shape = list(tensor.shape)
                expected = list(parameter.shape)
                raise UserError(f"{file}: {name} has shape {shape}, this model needs {expected}")
            if not tensor.is_floating_point():
                raise UserError(
                    f"{file}: {name} holds {tensor.dtype}, floating point numbers are needed"
                )
            # As float32, since a file may have numbers in float64 that are too large for it.
            if not all_finite(tensor.float()):
                raise UserError(
                    f"{file}: {name} holds NaN or infinite weights; take another checkpoint of it"
                )
            copy_local_rows(parameter, tensor)


def other_name(missing: str, extra: list[str]) -> str:
    """Returns how a file's own names differ from the one that is missing, to be put behind it; ""
    if the file has no other names.

    extra: the names in the file that the model does not have.
    """
    if not extra:
        return ""
    closest = max(extra, key=lambda name: common_end(name, missing))
    same = common_end(closest, missing)
    theirs = closest[: len(closest) - same]
    ours = missing[: len(missing) - same]
    # The same layer of the same block, only that its name begins differently.
    is_prefix = same > 0 and not any(character.isdigit() for character in theirs + ours)
    if is_prefix:
        return f"; the file has {closest}, which begins with {theirs!r} in place of {ours!r}"
    return f"; the file has others, the first: {extra[0]}"


def common_end(a: str, b: str) -> int:
    """Returns the length of the longest common end of two names that is made of whole parts."""
    parts = a.split(".")
    for first in range(len(parts)):
        end = ".".join(parts[first:])
        if b == end or b.endswith("." + end):
            return len(end)
    return 0


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


def is_number(value: object) -> TypeGuard[float]:
    """True if a value of a JSON file is a number. isinstance() would take true and false for one."""
    return type(value) in (int, float)


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
