"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv 2106.09685), and its files in PEFT's format.

A frozen linear y = x W^T gets a trained update beside it: y = x W^T + (alpha / rank) * (x A^T) B^T,
with A [rank, in] and B [out, rank]. Those shapes are not a choice: W is stored [out, in], so the
update that can be added to it is B A. (Texts that write A [in, rank] and B [rank, out] mean the
product A B, the transpose: it does not fit W.) B starts at zero, so that step 0 is the base
exactly, and A random, so that B's gradient is not zero as well.

Its variants change one thing each (`Variant`): rsLoRA the scale, DoRA the length of the rows, PiSSA
and LoftQ the first numbers, VeRA what is trained (`VeRALinear`). LoRA+ is another rate of B, and is
the optimizer's (optimizers.py).

Files are what peft writes and every server reads: adapter_config.json and
adapter_model.safetensors, whose names are `base_model.model.<published module>.lora_A.weight`, and
lora_B likewise.
"""

import contextlib
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# lora.merge(model) is what scripts call; what it does holds for adapters of other kinds as well.
import adapter_files
from adapter_files import (  # noqa: F401
    PREFIX,
    check_transposed,
    is_number,
    load_onto,
    merge,
    peft_facts,
    refuse_keys,
    refuse_second_adapter,
    set_submodule,
    unmerge,
    whole_weight,
    write_adapter,
)
from adapting.score_head import TrainedScoreHead, add_described_head, write_labels
from adapting.stacked_experts import (
    ExpertPlace,
    match_parameters,
    pack_experts,
    share_A,
    short_parameter_names,
    stacked_parameters,
    unpack_experts,
)
from adapting.tables import add_described_tables, described_tables, tidy_tables
from checkpoint import copy_local_rows, hf_name
from common.choices import ALL, ALL_LINEAR
from common.errors import UserError
from distributed import broadcast_object, full_tensor, is_sharded
from kernels.grouped import Member
from kernels.lora_linear import Casts, LoRAWeights, lora_linears
from kernels.nf4 import NF4, dequantized_weight
from kernels.seeded_random import hash_int32
from kernels.triton_utils import use_triton
from model import (
    DropoutSeeds,
    Experts,
    Linear,
    Transformer,
    forward_each,
    stack_expert_weights,
)
from quant import can_quantize, quantize

# Keys of adapter_config.json that change what an adapter computes, or on which layers.
UNSUPPORTED = (
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
COMPUTED_SWITCHES = ("use_dora", "use_rslora")
# The least squared length that DoRA divides by.
LEAST_SQUARE = 1e-24
# Roundings and decompositions in turn, as in the LoftQ paper's experiments.
LOFTQ_ROUNDS = 5
# Singular values of larger matrices are computed approximately.
MOST_EXACT = 2048
# Values of init_lora_weights that leave the base as it is, unlike pissa, olora, loftq and others.
PLAIN_STARTS = ("gaussian", "orthogonal", "eva")


class Variant(NamedTuple):
    """What an adapter has of LoRA's variants.

    rslora: the update is scaled by alpha / sqrt(rank) instead of alpha / rank, so that a higher rank
        does not learn more slowly (Kalajdzievski 2023, arXiv 2312.03732).
    dora: the rows of the adapted weight keep the direction that LoRA gives them, and have a trained
        length (Liu et al. 2024, arXiv 2402.09353).
    start: "random"; "pissa": A and B begin as the weight's largest singular values with their
        vectors, which the base then lacks (Meng et al. 2024, arXiv 2404.02948); "loftq": as what 4
        bits lose of the weight (Li et al. 2023, arXiv 2310.08659).
    rank_pattern, alpha_pattern: {regular expression of a published name's end: another rank or
        alpha}.
    """

    rslora: bool = False
    dora: bool = False
    start: str = "random"
    rank_pattern: Mapping[str, int] = MappingProxyType({})
    alpha_pattern: Mapping[str, float] = MappingProxyType({})


ORDINARY = Variant()


class LoRALinear(nn.Module):
    """A Linear with its update: `base` is frozen, A and B are trained.

        y = g * (x W^T + scale * (x A^T) B^T) + bias

    g: 1; with DoRA, the trained length of each row over the length that W + scale B A has there, which
    counts as a constant in the backward (section 4.3 of the paper).

    base: the linear that this module takes the place of.
    rank: lora_A is fp32 [rank, in], lora_B is fp32 [out, rank].
    alpha: the update is scaled by alpha / rank.
    dropout: of the adapter's input, from 0 to 1.
    dropout_seeds: the model's, shared by all of its adapted layers.
    number: which of the model's adapted layers this is, from 0.
    variant: of LoRA. With PiSSA the first A and B are kept beside the trained ones, and their product
        is taken off again in place of changing W: so W stays what it is, in 4 bits too, and the file
        is a plain LoRA of twice the rank.
    place: where PEFT's file has a linear of an expert, if it is not by its own name.
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
        variant: Variant = ORDINARY,
        place: ExpertPlace | None = None,
    ):
        super().__init__()
        self.base = base
        self.variant = variant
        self.place = place
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
        self.lora_magnitude: nn.Parameter | None = None
        if variant.dora:
            lengths = torch.empty(base.out_features, dtype=torch.float32, device=device)
            self.lora_magnitude = nn.Parameter(lengths)
        self.lora_start_A: nn.Parameter | None = None
        self.lora_start_B: nn.Parameter | None = None
        if variant.start == "pissa":
            self.lora_start_A = nn.Parameter(torch.empty_like(A), requires_grad=False)
            self.lora_start_B = nn.Parameter(torch.empty_like(B), requires_grad=False)
        # The squared length of each row of W, fp32 [out], which DoRA asks for in every forward.
        self.base_squares: Tensor | None = None
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
        """Fills A with U(-1/sqrt(in), 1/sqrt(in)), as the paper's own code does, and B with zeros;
        or as the variant has it."""
        if self.lora_start_A is not None:
            self.start_pissa()
        else:
            self.start_plain()
        if self.lora_magnitude is not None and not self.lora_magnitude.is_meta:
            copy_local_rows(self.lora_magnitude, whole_weight(self.base).norm(dim=1))

    def start_plain(self) -> None:
        self.lora_B.zero_()
        if self.place is not None and not self.place.owns_A:
            return
        # Every rank draws the whole of A and keeps its rows, so that sharding changes no number.
        A = torch.empty(self.lora_A.shape, device=self.lora_A.device)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        copy_local_rows(self.lora_A, A)

    def start_pissa(self) -> None:
        """Splits the weight by its singular values: W = U S V^T, of which the largest `rank` make the
        first B A (equation 2 of the paper)."""
        if self.lora_A.is_meta:
            return
        assert self.lora_start_A is not None and self.lora_start_B is not None
        U, S, V = largest_singular(whole_weight(self.base), self.rank)
        roots = (S / self.scale).sqrt()
        A = roots[:, None] * V.t()
        B = U * roots
        copy_local_rows(self.lora_A, A)
        copy_local_rows(self.lora_start_A, A)
        copy_local_rows(self.lora_B, B)
        copy_local_rows(self.lora_start_B, B)

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.variant.rslora else self.rank)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Returns A [ranks, in] and B [out, ranks], whose product is what is added to W. With PiSSA
        these are the trained ones, and behind them the first ones, which are taken off."""
        if self.lora_start_A is None or self.lora_start_B is None:
            return self.lora_A, self.lora_B
        A = torch.cat([self.lora_A, self.lora_start_A])
        B = torch.cat([self.lora_B, -self.lora_start_B], 1)
        return A, B

    @torch.no_grad()
    def lengths(self, dtype: torch.dtype) -> Tensor:
        """Returns the length of each row of W + scale B A, fp32 [out], without computing that matrix:
        |w + s a|^2 = |w|^2 + 2 s (w, a) + s^2 |a|^2, with a the row of B A.

        dtype: of the product with W.
        """
        A, B = self.factors()
        weight = dequantized_weight(self.base.frozen, dtype)
        if self.base_squares is None or self.base_squares.device != weight.device:
            self.base_squares = weight.float().square().sum(1)
        low = F.linear(weight, A.to(weight.dtype)).float()  # W A^T, [out, ranks]
        crossed = (low * B).sum(1)
        own = (F.linear(B, A @ A.t()) * B).sum(1)
        squares = self.base_squares + 2 * self.scale * crossed + self.scale**2 * own
        # A row of zeros has no direction, and stays one.
        return squares.clamp(min=LEAST_SQUARE).sqrt()

    def scaled(self, y: Tensor) -> Tensor:
        """Returns y, the output without DoRA's lengths and without a bias, with both; where there is
        no DoRA, y as it is."""
        if self.lora_magnitude is None:
            return y
        y = y * (self.lora_magnitude / self.lengths(y.dtype)).to(y.dtype)
        if self.base.bias is not None:
            y = y + self.base.bias.to(y.dtype)
        return y

    @property
    def takes_score_head(self) -> bool:
        # LoftQ's folder brings a base along, which is one with an LM head.
        return self.variant.start != "loftq"

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
        return self.scaled(lora_linears(x, linears, casts=casts)[0])

    def forward_with_dropout(self, x: Tensor) -> Tensor:
        """Computes `forward` where the adapter's input is dropped out, and the base's is not.

        So the two have different inputs, and the backward is autograd's instead of `lora_linears`'.
        """
        seeds = self.dropout_seeds.seeds
        if seeds is None:
            dropped = F.dropout(x, self.dropout)
        else:
            dropped = seeded_dropout(x, self.dropout, seeds, self.number)
        A, B = self.factors()
        low = F.linear(dropped, A.to(x.dtype))  # [tokens, rank]
        y = self.base(x)  # [tokens, out]
        update = self.scale * F.linear(low, B.to(x.dtype))
        if self.lora_magnitude is None:
            return y + update
        # Only what DoRA changes reads the dropped input, as in peft: with g, (g - 1) W x + g s B A x.
        gain = (self.lora_magnitude / self.lengths(x.dtype)).to(x.dtype)
        plain = self.base(dropped)
        if self.base.bias is not None:
            plain = plain - self.base.bias.to(x.dtype)
        return y + (gain - 1) * plain + gain * update

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
        outputs = lora_linears(x, linears, up, activation, casts)
        return [layer.scaled(y) for layer, y in zip(layers, outputs, strict=True)]

    def adapted(self, dtype: torch.dtype) -> LoRAWeights:
        """Returns base and update as `lora_linears` takes them. dtype: of the activations."""
        bias: Tensor | None = self.base.bias
        if bias is not None:
            bias = bias.to(dtype)
        if self.lora_magnitude is not None:
            bias = None  # `scaled` adds it
        A, B = self.factors()
        return LoRAWeights(self.base.frozen, bias, A, B, self.scale)

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
        if self.lora_magnitude is not None or self.lora_start_A is not None:
            return None
        drop = None
        if self.uses_dropout:
            drop = partial(seeded_dropout, probability=self.dropout)
        return Member(member.frozen, self.lora_A, self.lora_B, self.scale, drop, self.number)

    def delta(self) -> Tensor:
        """Returns the update of the weight, fp32 [out, in]."""
        A, B = self.factors()
        return self.scale * (B.float() @ A.float())

    # ---- what adapter_files.py asks of every module of an adapter ----

    @property
    def saved_numbers(self) -> int:
        """Numbers for each token that the backward needs: x A^T, and with DoRA the output before its
        lengths."""
        numbers = self.rank * (1 if self.lora_start_A is None else 2)
        return numbers + (0 if self.lora_magnitude is None else self.base.out_features)

    def merged_weight(self, weight: Tensor) -> Tensor:
        adapted = weight + self.delta()
        if self.lora_magnitude is None:
            return adapted
        # Kept for `unmerged_weight`: the rows of the merged weight have lost these lengths.
        self.merged_lengths = row_lengths(adapted)
        return adapted * (self.lora_magnitude / self.merged_lengths)[:, None]

    def unmerged_weight(self, weight: Tensor) -> Tensor:
        if self.lora_magnitude is not None:
            weight = weight * (self.merged_lengths / self.lora_magnitude)[:, None]
        return weight - self.delta()

    def merged_bias(self, bias: Tensor) -> Tensor:
        return bias

    def tensors(self, model: Transformer, name: str) -> dict[str, Tensor]:
        published = PREFIX + hf_name(model, name)
        A: Tensor = self.lora_A
        B: Tensor = self.lora_B
        if self.lora_start_A is not None and self.lora_start_B is not None:
            A = torch.cat([full_tensor(A), full_tensor(self.lora_start_A)])
            B = torch.cat([full_tensor(B), -full_tensor(self.lora_start_B)], 1)
        tensors = {f"{published}.lora_A.weight": A, f"{published}.lora_B.weight": B}
        if self.lora_magnitude is not None:
            tensors[f"{published}.lora_magnitude_vector"] = self.lora_magnitude
        return tensors

    @staticmethod
    def placed(model: Transformer) -> None:
        set_casts(model)


def row_lengths(weight: Tensor) -> Tensor:
    """Returns the length of each row of a weight [out, in], never zero."""
    return weight.norm(dim=1).clamp(min=math.sqrt(LEAST_SQUARE))


def largest_singular(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the largest `rank` singular values of a matrix [out, in], S [rank], with their vectors,
    U [out, rank] and V [in, rank].

    Of a matrix with more than MOST_EXACT rows and columns they are approximate, by a randomised
    method from a fixed seed (Halko et al. 2011): exact ones would take minutes a layer.
    """
    if min(weight.shape) <= MOST_EXACT:
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        return U[:, :rank], S[:rank], Vh[:rank].t()
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
        torch.manual_seed(0)
        U, S, V = torch.svd_lowrank(weight, q=min(2 * rank, *weight.shape), niter=16)
    return U[:, :rank], S[:rank], V[:, :rank]


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
        for layer in self.layers:
            # A merged layer needs no casts. One that drops out makes its own, as does one of PiSSA,
            # whose factors are made of two.
            if layer.merged or layer.uses_dropout or layer.lora_start_A is not None:
                return False
        return True

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


# ---- adapters on a model ----


def add_lora(
    model: Transformer,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: str | list[str] = ALL,
    variant: Variant = ORDINARY,
    layers: Collection[int] | None = None,
    parameters: Sequence[str] = (),
) -> list[str]:
    """Freezes the model and puts LoRA on the linears that `targets` name.

    rank: from 1 to the size of the largest of these layers.
    alpha: the update is scaled by alpha / rank.
    dropout: of the adapters' input while the model trains, at least 0 and below 1.
    targets: "all" (every linear in the blocks; peft's "all-linear"), or names, as a list or with
        commas: the end of a published module name, as peft matches them (`q_proj`,
        `mlp.down_proj`, `model.layers.3.self_attn.v_proj`).
    variant: of LoRA.
    layers: the numbers of the blocks that are adapted; None: all.
    parameters: experts that are adapted in PEFT's stacked form, as adapting.stacked_experts.
        match_parameters returns them; then `targets` may be [], and "all" leaves out all experts.
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
    targeted, our_names = targeted_linears(model, targets, layers, bool(parameters))
    if layers is not None:
        parameters = [name for name in parameters if int(re.findall(r"\d+", name)[0]) in layers]
    places = places_of_experts(model, parameters, dropout, variant, targeted)
    # All in the model's order, in which first numbers are drawn.
    linears: dict[str, Linear] = {}
    for name, linear in linears_of_blocks(model)[0].items():
        if name in targeted or name in places:
            linears[name] = linear
    if not linears:
        raise UserError("--layers: none of them has what --target-parameters names")
    # A pattern names an expert's parameter, where it stands in one.
    counted = {name: places[name].parameter if name in places else name for name in linears}
    names = list(dict.fromkeys(counted.values()))
    # A rank above both sides of a matrix adds nothing to what its update can be.
    largest = max(max(layer.in_features, layer.out_features) for layer in linears.values())
    if rank > largest:
        raise UserError(f"--rank {rank}: no layer here is larger than {largest}")
    check_patterns(variant, names)
    refuse_experts(variant.dora, "--dora", names)
    for name, layer in linears.items():
        own_rank = by_pattern(variant.rank_pattern, counted[name], rank)
        if own_rank > largest:
            raise UserError(
                f"--rank-pattern: rank {own_rank:,} of {name}: no layer here is larger than {largest}"
            )
        if variant.start == "pissa" and own_rank > min(layer.in_features, layer.out_features):
            raise UserError(
                f"--rank {own_rank}: {name} has {min(layer.in_features, layer.out_features)} singular"
                " values for --init pissa; take a lower rank, or leave it out (--targets)"
            )
    model.requires_grad_(False)
    for number, (name, layer) in enumerate(linears.items()):
        own_rank = by_pattern(variant.rank_pattern, counted[name], rank)
        own_alpha = by_pattern(variant.alpha_pattern, counted[name], alpha)
        place = places.get(name)
        adapted = LoRALinear(
            layer, own_rank, own_alpha, dropout, model.dropout_seeds, number, variant, place
        )
        set_submodule(model, our_names[name], adapted)
    share_A(model)
    set_casts(model)
    stack_expert_weights(model)
    return list(linears)


def places_of_experts(
    model: Transformer,
    parameters: Sequence[str],
    dropout: float,
    variant: Variant,
    linears: Mapping[str, Linear],
) -> dict[str, ExpertPlace]:
    """Returns {published name of a linear: its place} of all linears in some three-dimensional parameters.

    linears: those that are adapted by themselves.
    Raises UserError for what PEFT does not support there.
    """
    if not parameters:
        return {}
    flags = {"--dropout": dropout > 0, "--dora": variant.dora, "--init": variant.start != "random"}
    for flag, is_given in flags.items():
        if is_given:
            raise UserError(f"{flag}: peft does not support it for --target-parameters")
    both = [name for name in linears if ".experts." in name]
    if both:
        raise UserError(
            f"{both[0]}, one of the experts, is named by --targets (target_modules) beside"
            " --target-parameters (target_parameters); name experts in one of them"
        )
    known = stacked_parameters(model)
    found: dict[str, ExpertPlace] = {}
    for parameter in parameters:
        for of_expert in known[parameter]:
            for name in of_expert:
                found[hf_name(model, name)] = ExpertPlace(parameter, owns_A=name == of_expert[0])
    return found


def targeted_linears(
    model: Transformer,
    targets: str | list[str],
    layers: Collection[int] | None,
    without_experts: bool = False,
) -> tuple[dict[str, Linear], dict[str, str]]:
    """Returns the linears of the blocks that are to be adapted by published name, and our name of
    each by the published one. targets, layers: as for `add_lora`. without_experts: experts are
    adapted in another way, so that "all" leaves them out, and there may be no targets.

    Raises UserError where nothing is left.
    """
    linears, our_names = linears_of_blocks(model)
    known = list(linears)
    if without_experts and targets in (ALL, ALL_LINEAR):
        known = [name for name in known if ".experts." not in name]
    count = model.config.num_layers
    if layers is not None and (not layers or max(layers) >= count):
        raise UserError(f"--layers: the model has layers 0 to {count - 1}")
    if without_experts and not targets:
        return {}, our_names
    names = match_targets(targets, known)
    if layers is not None:
        names = [name for name in names if int(our_names[name].split(".")[1]) in layers]
        if not names:
            raise UserError(f"--layers: none of them has what --targets {targets} names")
    return {name: linears[name] for name in names}, our_names


def linears_of_blocks(model: Transformer) -> tuple[dict[str, Linear], dict[str, str]]:
    """Returns the linears of all blocks by published name, and our name of each by the published one."""
    linears: dict[str, Linear] = {}
    our_names: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear) and "blocks." in name:
            published = hf_name(model, name)
            linears[published] = module
            our_names[published] = name
    return linears, our_names


def parse_pattern(text: str | None, flag: str) -> dict[str, float]:
    """Reads --rank-pattern and --alpha-pattern: q_proj=16,down_proj=4. Raises UserError if it is none."""
    pattern: dict[str, float] = {}
    for part in (text or "").split(","):
        if not part.strip():
            continue
        ending, equals, value = part.strip().rpartition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not equals or not ending or not math.isfinite(number):
            raise UserError(f"{flag} {text}: NAME=NUMBER,NAME=NUMBER is wanted, as q_proj=16")
        pattern[ending] = int(number) if number == int(number) else number
    return pattern


def parse_layers(text: str | None) -> set[int] | None:
    """Reads --layers: 0-11,20. None where nothing is said. Raises UserError if it is no list of
    numbers."""
    if text is None:
        return None
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise UserError(f"--layers {text}: numbers and ranges are wanted, as 0-11,20")
        if len(match[2] or match[1]) > 5:
            raise UserError(f"--layers {text}: no model has so many layers")
        numbers.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return numbers


def by_pattern(pattern: Mapping, name: str, default):
    """Returns the value of the first regular expression that a published name ends with, as peft
    matches rank_pattern; else the default."""
    for ending, value in pattern.items():
        if ends_with(name, ending):
            return value
    return default


def ends_with(name: str, ending: str) -> bool:
    """True if a published name, or whole words at its end, match a regular expression."""
    return re.match(rf"(.*\.)?({ending})$", name) is not None


def refuse_experts(is_refused: bool, flag: str, names: list[str]) -> None:
    """Raises UserError for a variant that peft has not for routed experts. names: of the layers."""
    experts = [name for name in names if ".experts." in name]
    if is_refused and experts:
        raise UserError(
            f"{flag}: is not for routed experts, such as {experts[0]}, which peft could not load;"
            " --targets q_proj,k_proj,v_proj,o_proj leaves them out"
        )


def check_patterns(variant: Variant, names: list[str]) -> None:
    """Raises UserError for a pattern that is no regular expression, that matches no adapted layer, or
    that has a value out of range. names: published ones, of the adapted layers."""
    for flag, pattern in (
        ("--rank-pattern", variant.rank_pattern),
        ("--alpha-pattern", variant.alpha_pattern),
    ):
        for ending, value in pattern.items():
            try:
                found = any(ends_with(name, ending) for name in names)
            except (re.error, OverflowError, RecursionError) as error:
                raise UserError(f"{flag} {ending}: no regular expression ({error})") from None
            if not found:
                raise UserError(f"{flag} {ending}: matches no adapted layer, such as {names[0]}")
            if not 0 < value < 1e9 or (flag == "--rank-pattern" and value != int(value)):
                raise UserError(
                    f"{flag} {ending}={value:g}: must be above 0 and below a billion, and a rank whole"
                )


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
        if target in (ALL, ALL_LINEAR):
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


# ---- LoftQ ----


@torch.no_grad()
def quantize_with_update(model: Transformer) -> None:
    """Quantises the base of a model's LoRA to NF4, and starts the LoRA as what that loses: of each
    adapted weight W, Q = nf4(W - s B A) and s B A = the largest singular values of W - Q, in turn
    LOFTQ_ROUNDS times (Li et al. 2023, algorithm 1). Other linears of the blocks are just rounded.

    model: with its weights in full, and an adapter whose variant starts with "loftq".
    """
    adapted = set()
    for layer in lora_layers(model).values():
        base = layer.base
        adapted.add(base)
        if not can_quantize(base.weight):
            model.unquantized.append(hf_name(model, our_name(model, base)))
            continue
        weight = base.weight.float()
        update = torch.zeros_like(weight)
        for _ in range(LOFTQ_ROUNDS):
            rounded = quantize(weight - update)
            U, S, V = largest_singular(
                weight - dequantized_weight(rounded, torch.float32), layer.rank
            )
            update = (U * S) @ V.t()
        roots = (S / layer.scale).sqrt()
        layer.lora_A.copy_(roots[:, None] * V.t())
        layer.lora_B.copy_(U * roots)
        base.quantize(rounded)
    for name, module in model.named_modules():
        is_plain = isinstance(module, Linear) and module.nf4 is None and module not in adapted
        if is_plain and name.startswith("blocks.") and can_quantize(module.weight):  # type: ignore[arg-type]
            module.quantize(quantize(module.weight.detach()))  # type: ignore[operator, union-attr]


def our_name(model: Transformer, module: nn.Module) -> str:
    return next(name for name, each in model.named_modules() if each is module)


# ---- VeRA ----


class Projections:
    """The two matrices that all layers of a VeRA adapter share, frozen and drawn at random: A float32
    [rank, largest in], B float32 [largest out, rank]. A layer reads as much of them as it needs."""

    def __init__(self, rank: int, linears: Iterable[Linear]):
        linears = list(linears)
        inputs = max(linear.in_features for linear in linears)
        outputs = max(linear.out_features for linear in linears)
        # From a seed of their own, so that a run that is resumed has the same ones.
        generator = torch.Generator().manual_seed(0)
        # On the host; layers on a GPU share one copy there.
        self.A = uniform_by_width(rank, inputs, generator)
        self.B = uniform_by_width(outputs, rank, generator)
        self.copies: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns A and B on a device."""
        if device.type == "cpu":
            return self.A, self.B
        if device not in self.copies:
            # They outlive a decoding that may need them first, and serve training then.
            with torch.inference_mode(False):
                self.copies[device] = (self.A.to(device), self.B.to(device))
        return self.copies[device]


def uniform_by_width(rows: int, width: int, generator: torch.Generator) -> Tensor:
    """Returns float32 [rows, width], evenly spread, with a variance of 2 / width (He et al. 2015)."""
    bound = math.sqrt(6 / width)
    return torch.empty(rows, width).uniform_(-bound, bound, generator=generator)


class VeRALinear(nn.Module):
    """A frozen linear with an update of which two vectors are trained (Kopiczko et al. 2024, arXiv
    2310.11454, equation 2):

        y = x W^T + b * (B (d * (A x)))

    d: fp32 [rank], 0.1 at the start; b: fp32 [out], 0 at the start. A and B: of `Projections`.
    """

    is_adapter = True

    def __init__(self, base: Linear, rank: int, projections: Projections):
        super().__init__()
        self.base = base
        self.rank = rank
        self.projections = projections
        device = base.frozen[0].device
        self.vera_lambda_d = nn.Parameter(torch.empty(rank, device=device))
        self.vera_lambda_b = nn.Parameter(torch.empty(base.out_features, device=device))
        self.start()
        self.merged = False
        # While it is merged: the base's weight and bias before.
        self.original: Tensor | NF4 | None = None
        self.original_bias: Tensor | None = None

    @torch.no_grad()
    def start(self, model: Transformer | None = None) -> None:
        self.vera_lambda_d.fill_(0.1)
        self.vera_lambda_b.zero_()

    def adapted(self, dtype: torch.dtype) -> LoRAWeights:
        """Returns base and update as `lora_linears` takes them: with the vectors in the matrices, the
        update is one of LoRA. dtype: of the activations."""
        bias: Tensor | None = self.base.bias
        if bias is not None:
            bias = bias.to(dtype)
        A, B = self.factors()
        return LoRAWeights(self.base.frozen, bias, A, B, 1.0)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Returns d * A, fp32 [rank, in], and b * B, fp32 [out, rank]."""
        shared_A, shared_B = self.projections.on(self.vera_lambda_d.device)
        A = shared_A[:, : self.base.in_features]
        B = shared_B[: self.base.out_features]
        return self.vera_lambda_d[:, None] * A, self.vera_lambda_b[:, None] * B

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return self.base(x)
        return self.forward_shared(x, [self])[0]

    def forward_shared(
        self, x: Tensor, layers: list, up: Tensor | None = None, activation: str = ""
    ) -> list[Tensor]:
        """Returns the outputs of several layers that read the same input, as LoRALinear's does."""
        if not all(type(layer) is VeRALinear and not layer.merged for layer in layers):
            return forward_each(x, layers, up, activation)
        return lora_linears(x, [layer.adapted(x.dtype) for layer in layers], up, activation)

    def member(self) -> None:
        """None: experts with VeRA are computed one after the other."""

    @property
    def saved_numbers(self) -> int:
        """Numbers for each token that the backward needs: x A^T."""
        return self.rank

    def delta(self) -> Tensor:
        """Returns the update of the weight, fp32 [out, in]."""
        A, B = self.factors()
        return B @ A

    def merged_weight(self, weight: Tensor) -> Tensor:
        return weight + self.delta()

    def unmerged_weight(self, weight: Tensor) -> Tensor:
        return weight - self.delta()

    def merged_bias(self, bias: Tensor) -> Tensor:
        return bias

    def tensors(self, model: Transformer, name: str) -> dict[str, Tensor]:
        published = PREFIX + hf_name(model, name)
        return {
            f"{published}.vera_lambda_b": self.vera_lambda_b,
            f"{published}.vera_lambda_d": self.vera_lambda_d,
            # Shared, so each layer names the same two.
            VERA_A: self.projections.A,
            VERA_B: self.projections.B,
        }


VERA_A, VERA_B = "base_model.vera_A", "base_model.vera_B"  # their names in PEFT's file


def add_vera(
    model: Transformer,
    rank: int,
    targets: str | list[str] = ALL,
    layers: Collection[int] | None = None,
) -> list[str]:
    """Freezes the model and puts VeRA on the linears that `targets` name. Arguments, result and errors:
    as of `add_lora`. PEFT's usual rank is 256, since a rank costs one number a layer."""
    if rank < 1:
        raise UserError(f"--rank {rank}: must be 1 or more")
    refuse_second_adapter(model)
    linears, our_names = targeted_linears(model, targets, layers)
    refuse_experts(True, "--method vera", list(linears))
    projections = Projections(rank, linears.values())
    model.requires_grad_(False)
    for name, layer in linears.items():
        set_submodule(model, our_names[name], VeRALinear(layer, rank, projections))
    return list(linears)


def save_vera(
    model: Transformer, folder, write_extra: Callable[[Path], None] | None = None
) -> None:
    """Writes the PEFT folder of a VeRA adapter, its projections in it. Arguments and errors: as of
    `save_adapter`."""
    layers = adapter_files.adapter_modules(model)
    first = next(iter(layers.values()))
    config = {
        **peft_facts(model, "VERA"),
        "r": first.rank,
        "target_modules": target_modules(model, [hf_name(model, name) for name in layers]),
        "projection_prng_key": 0,
        "save_projection": True,
        "vera_dropout": 0.0,
        "d_initial": 0.1,
        "bias": "none",
        "fan_in_fan_out": model.config.conv1d,
    }
    write_adapter(model, folder, config, write_extra)


def add_described_vera(
    model: Transformer, config: dict, where: Path, tensors: dict[str, Tensor]
) -> None:
    """Puts VeRA on a model as PEFT's adapter_config.json describes it.

    Raises UserError if the projections are not in the file: which numbers a generator gives is no
    matter of a file.
    """
    if VERA_A not in tensors or VERA_B not in tensors:
        raise UserError(
            f"{where}: its projections are not in the file (save_projection), and what a seed gives"
            " elsewhere is not known"
        )
    refuse_keys(config, ("modules_to_save", "exclude_modules"), where)
    if config.get("bias", "none") != "none" or config.get("vera_dropout"):
        raise UserError(f"{where}: bias and vera_dropout are not supported")
    check_transposed(model, config, where)
    if type(config.get("r")) is not int:
        raise UserError(f"{where}: r must be a number")
    targets = adapter_targets(config.get("target_modules"), where, model)
    targets = narrowed_targets(config, targets, where, model)
    add_vera(model, config["r"], targets)


# ---- PEFT's files ----


def save_adapter(
    model: Transformer, folder, write_extra: Callable[[Path], None] | None = None
) -> str:
    """Writes a PEFT adapter folder, in place of what is there. With a score head it is one of task_type
    SEQ_CLS, with labels.json in it.

    It names its base as common/origin.py does.
    write_extra: writes more files into the new folder, before that gets its name.
    Returns what a user must know of the padding token beside a score head, a clause, or "".
    Raises UserError if the folder holds a model.
    """
    layers = lora_layers(model)
    assert layers, "the model has no adapter"
    stacked = stacked_names(layers.values())
    # Dropout and variant are the same for all layers of an adapter.
    first = next(iter(layers.values()))
    stored: dict[str, tuple[int, float]] = {}
    for name, layer in layers.items():
        stored[layer.place.parameter if layer.place else name] = stored_shape(layer)
    rank, alpha = Counter(stored.values()).most_common(1)[0][0]
    config = {
        **peft_facts(model, "LORA"),
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: own for name, (own, _) in stored.items() if own != rank},
        "alpha_pattern": {name: own for name, (_, own) in stored.items() if own != alpha},
        "use_rslora": first.variant.rslora,
        "use_dora": first.variant.dora,
        "lora_dropout": first.dropout,
        "target_modules": target_modules(
            model, [name for name, layer in layers.items() if not layer.place]
        ),
        "bias": "none",
        "fan_in_fan_out": model.config.conv1d,
        **described_tables(model),
    }
    note = ""

    def write_more(tmp: Path) -> None:
        nonlocal note
        if write_extra is not None:
            write_extra(tmp)
        if has_trained_head:
            # The tokenizer's files are there by now.
            note = write_labels(model, tmp)

    has_trained_head = isinstance(model.score, TrainedScoreHead)
    if has_trained_head:
        config["modules_to_save"] = [*config.get("modules_to_save", []), "score"]
    pack = None
    if stacked:
        config["target_parameters"] = short_parameter_names(model, stacked)
        pack = partial(pack_experts, model, stacked)
    write_adapter(model, folder, config, write_more, pack=pack)
    return broadcast_object(note) if has_trained_head else ""


def stacked_names(layers: Iterable[LoRALinear]) -> list[str]:
    """Returns the three-dimensional parameters that some layers stand in, by published name."""
    return list(dict.fromkeys(layer.place.parameter for layer in layers if layer.place))


def usual_shape(layers: Iterable[LoRALinear]) -> tuple[int, float]:
    """Returns the rank and alpha that most layers of an adapter have."""
    return Counter((layer.rank, layer.alpha) for layer in layers).most_common(1)[0][0]


def stored_shape(layer: LoRALinear) -> tuple[int, float]:
    """Returns rank and alpha of a layer in PEFT's file: with PiSSA twice its rank, and the alpha that
    has the same scale there."""
    if layer.lora_start_A is None:
        return layer.rank, layer.alpha
    factor = math.sqrt(2) if layer.variant.rslora else 2
    return 2 * layer.rank, factor * layer.alpha


def linear_names(model: Transformer) -> list[str]:
    """Returns the published names of all linears of a model."""
    names = []
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            names.append(hf_name(model, name))
    return names


def linear_names_of_blocks(model: Transformer) -> list[str]:
    """Returns the published names of the linears that "all" means."""
    head = None if model.head is None else hf_name(model, "head")
    return [name for name in linear_names(model) if name != head]


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
    ignored here (another kind of adapter, biases). methods.load_any_adapter takes adapters of every
    kind.
    """
    load_onto(model, folder, add_described_lora)


def add_described_lora(
    model: Transformer, config: dict, where: Path, tensors: dict[str, Tensor]
) -> None:
    """Puts LoRA on a model as an adapter_config.json describes it, with its first numbers, and the score
    head, rows and tables that are trained beside it. where: the file. tensors: the adapter's own."""
    parameters = described_parameters(config, where, model)
    settings = adapter_settings(config, where, model, parameters)
    add_lora(model, *settings, parameters=parameters)
    unpack_experts(model, parameters, tensors)
    # Before the tables, of which an LM head is none beside it.
    add_described_head(model, config, where, tensors)
    add_described_tables(model, config, where, tensors)


def tidy_lora(model: Transformer, config: dict, where: Path, tensors: dict[str, Tensor]) -> None:
    """Brings the tensors of an adapter's file into the form that a model's own have, which has the adapter
    already. Arguments: as of `add_described_lora`."""
    unpack_experts(model, described_parameters(config, where, model), tensors)
    tidy_tables(model, config, where, tensors)


def described_parameters(config: dict, where: Path, model: Transformer) -> list[str]:
    """Returns the stacked experts that target_parameters of an adapter_config.json names. Raises UserError
    where it names something else."""
    names = config.get("target_parameters") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: target_parameters must be a list of names")
    try:
        return match_parameters(model, names)
    except UserError as error:
        problem = str(error).removeprefix("--target-parameters ")
        raise UserError(f"{where}: target_parameters {problem}") from None


def adapter_settings(
    config: dict, where: Path, model: Transformer, parameters: list[str]
) -> tuple[int, float, float, str | list[str], Variant]:
    """Returns rank, alpha, dropout, targets and variant of an adapter_config.json.

    where: the file, for messages.
    parameters: the stacked experts that it names.
    Raises UserError on settings that this program would have to ignore.
    """
    method = config.get("peft_type")
    if method != "LORA":
        raise UserError(f"{where}: peft_type {method!r} is not supported (supported: LORA)")
    # What later versions switch on by a name of its own is refused as well.
    switches = [key for key in config if key.startswith("use_") and key not in COMPUTED_SWITCHES]
    refuse_keys(config, (*UNSUPPORTED, *switches), where)
    check_transposed(model, config, where)
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
    variant = Variant(
        rslora=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
        rank_pattern=described_pattern(config, "rank_pattern", where),
        alpha_pattern=described_pattern(config, "alpha_pattern", where),
    )
    targets: str | list[str] = []
    names: list[str] = []
    if config.get("target_modules") or not parameters:
        targets = adapter_targets(config.get("target_modules"), where, model)
        targets = narrowed_targets(config, targets, where, model)
        names = match_targets(targets, linear_names(model))
    # Patterns may name layers that are not adapted.
    names += parameters
    variant = variant._replace(
        rank_pattern=used_pattern(variant.rank_pattern, names),
        alpha_pattern=used_pattern(variant.alpha_pattern, names),
    )
    return rank, alpha, dropout, targets, variant


def described_pattern(config: dict, key: str, where: Path) -> dict:
    """Returns rank_pattern or alpha_pattern of an adapter_config.json. Raises UserError if it is no
    table of regular expressions and numbers."""
    pattern = config.get(key) or {}
    is_table = isinstance(pattern, dict) and all(is_number(each) for each in pattern.values())
    if not is_table:
        raise UserError(f"{where}: {key} must be a table of names and numbers")
    for ending in pattern:
        try:
            re.compile(ending)
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(f"{where}: {key} has no regular expression ({error})") from None
    return pattern


def used_pattern(pattern: Mapping, names: list[str]) -> dict:
    """Returns the rows of a pattern that match one of some published names."""
    used = {}
    for ending, value in pattern.items():
        if any(ends_with(name, ending) for name in names):
            used[ending] = value
    return used


def narrowed_targets(
    config: dict, targets: str | list[str], where: Path, model: Transformer
) -> str | list[str]:
    """Returns the targets without the layers that layers_to_transform and exclude_modules of an
    adapter_config.json leave out, as peft reads these.

    Raises UserError if they leave no layer, or say what peft would not take.
    """
    chosen, excluded = config.get("layers_to_transform"), config.get("exclude_modules")
    if chosen in (None, []) and not excluded:
        return targets
    names = match_targets(targets, linear_names_of_blocks(model))
    if excluded:
        if isinstance(excluded, str):
            names = [name for name in names if not re.fullmatch(excluded, name)]
        else:
            ends = tuple(f".{end}" for end in excluded)
            names = [name for name in names if name not in excluded and not name.endswith(ends)]
    if chosen not in (None, []):
        # Of a regular expression peft takes all that matches, whatever the layers.
        if isinstance(config.get("target_modules"), str):
            raise UserError(
                f"{where}: layers_to_transform beside a regular expression is not supported"
            )
        numbers = [chosen] if isinstance(chosen, int) else chosen
        if not all(type(number) is int for number in numbers):
            raise UserError(f"{where}: layers_to_transform must be numbers")
        patterns = config.get("layers_pattern") or [r"[^.]*"]
        patterns = [patterns] if isinstance(patterns, str) else patterns
        names = [name for name in names if number_of_layer(name, patterns) in numbers]
    if not names:
        raise UserError(f"{where}: layers_to_transform and exclude_modules leave no layer")
    return names


def number_of_layer(name: str, patterns: list[str]) -> int | None:
    """Returns the number of the layer in a published name, None if there is none. patterns: regular
    expressions of what stands before it."""
    for pattern in patterns:
        match = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name)
        if match:
            return int(match[1])
    return None


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
