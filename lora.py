"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv 2106.09685), and its files in PEFT's format.

A frozen linear y = x W^T gets a trained update beside it: y = x W^T + (alpha / rank) * (x A^T) B^T, with A [rank, in]
and B [out, rank]. Those shapes are not a choice: W is stored [out, in], so the update that can be added to it is B A.
(Texts that write A [in, rank] and B [rank, out] mean the product A B, the transpose: it does not fit W.) B starts at
zero, so that step 0 is the base exactly, and A random, so that B's gradient is not zero as well.

Files are what peft writes and every server reads: adapter_config.json and adapter_model.safetensors, whose names are
`base_model.model.<published module>.lora_A.weight`, and lora_B likewise.
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

from checkpoint import copy_local_rows, fingerprint, hf_name, iterate_tensors
from common.errors import UserError, read_json, read_json_if_there
from common.files import atomic_folder, hub_origin, save_tensors, write_json
from distributed import full_tensor, is_sharded, rank0_context, run_on_rank0
from kernels.grouped import Member
from kernels.lora_linear import Casts, LoRAWeights, lora_linears
from kernels.nf4 import NF4, dequantized_weight
from kernels.triton_utils import use_triton
from model import DropoutSeeds, Experts, Linear, Transformer, forward_each, quantized_linears, stack_expert_weights
from quant import KINDS

ALL = "all"  # every linear of the blocks; not the output head, which is the embedding table in many models
PREFIX = "base_model.model."
ADAPTER_FILE = "adapter_model.safetensors"
UNSUPPORTED = (  # keys of adapter_config.json that change what an adapter computes, or on what
    *("use_dora", "use_rslora", "use_qalora", "use_bdlora", "lora_bias", "layer_replication"),
    *("rank_pattern", "alpha_pattern", "layers_to_transform", "exclude_modules", "modules_to_save"),
    *("target_parameters", "trainable_token_indices", "alora_invocation_tokens", "arrow_config"),
    *("kasa_config", "monteclora_config"),
)
PLAIN_STARTS = ("gaussian", "orthogonal", "eva")  # of init_lora_weights: pissa, olora, loftq and kin change the base


class LoRALinear(nn.Module):
    """Stands in for a Linear: `base` is frozen, lora_A [rank, in] and lora_B [out, rank] are trained, in fp32."""

    def __init__(self, base: Linear, rank: int, alpha: float, dropout: float, dropout_seeds: DropoutSeeds, number: int):
        super().__init__()
        self.dropout_seeds, self.number = dropout_seeds, number  # the model's; which of its adapted layers this is
        out_features, in_features = base.out_features, base.in_features
        self.base, self.rank, self.alpha, self.dropout = base, rank, alpha, dropout
        device = base.frozen[0].device
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, dtype=torch.float32, device=device))
        self.start()
        self.merged, self.kept = False, None
        self.casts: ModelCasts | None = None  # the model's
        self.train(base.training)  # a fresh module would drop out in a model that evaluates

    @torch.no_grad()
    def start(self) -> None:
        """A: U(-1/sqrt(in), 1/sqrt(in)), as the paper's own code; B: zeros. In shards they are the same numbers."""
        A = torch.empty(self.lora_A.shape, device=self.lora_A.device)
        copy_local_rows(self.lora_A, nn.init.kaiming_uniform_(A, a=math.sqrt(5)))
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
        if self.uses_dropout:  # dropout on the adapter's input only: two inputs, so autograd does it
            seeds = self.dropout_seeds.seeds
            left = F.dropout(x, self.dropout) if seeds is None else seeded_dropout(x, self.dropout, seeds, self.number)
            low = F.linear(left, self.lora_A.to(x.dtype))
            return self.base(x) + self.scale * F.linear(low, self.lora_B.to(x.dtype))
        return lora_linears(x, [self.adapted(x.dtype)], casts=self.group_casts([self], x.dtype))[0]

    def forward_shared(self, x: Tensor, layers: list, up: Tensor | None = None, activation: str = "") -> list[Tensor]:
        one_input = not any(type(layer) is not LoRALinear or layer.merged or layer.uses_dropout for layer in layers)
        if one_input:
            each = [layer.adapted(x.dtype) for layer in layers]
            return lora_linears(x, each, up, activation, self.group_casts(layers, x.dtype))
        return forward_each(x, layers, up, activation)

    def adapted(self, dtype: torch.dtype) -> LoRAWeights:
        bias = None if self.base.bias is None else self.base.bias.to(dtype)
        return LoRAWeights(self.base.frozen, bias, self.lora_A, self.lora_B, self.scale)

    def group_casts(self, layers: list, dtype: torch.dtype) -> Casts | None:
        if self.casts is None or torch.compiler.is_compiling():  # a graph that looks at layers' numbers fits one block
            return None
        return self.casts.of(layers, dtype)

    def member(self) -> Member | None:
        """As kernels/grouped.py takes a linear of an expert."""
        member = self.base.member()
        if member is None or self.merged:
            return member
        dropping = partial(seeded_dropout, share=self.dropout) if self.uses_dropout else None
        return Member(member.frozen, self.lora_A, self.lora_B, self.scale, dropping, self.number)

    def delta(self) -> Tensor:  # fp32 [out, in]
        return self.scale * (self.lora_B.float() @ self.lora_A.float())


class ModelCasts:
    """A and B of a model's adapters as their products take them on a GPU: in the activations' dtype, the A of layers
    that read one input stacked. All are written by one call when a forward begins, a handful of launches in place of 30
    in each layer's forward and backward. They take 2 bytes a number, beside the 16 of a master, its gradient and its
    moments.

    They are used while that forward runs, and where its blocks are computed again in the backward; never elsewhere. So
    whatever has changed the masters, no old numbers are computed with. (To look at the masters' versions would be
    cheaper, and wrong: torch's fused AdamW does not count them up.)
    """

    def __init__(self, groups: list[list[LoRALinear]]):
        self.groups = {layer_numbers(layers): GroupCasts(layers) for layers in groups}
        self.running = False  # a forward

    def of(self, layers: list[LoRALinear], dtype: torch.dtype) -> Casts | None:
        """Those of a group of layers; None where the layers have to cast for themselves."""
        group = self.groups.get(layer_numbers(layers))
        if group is None or not group.current:
            return None
        in_backward = torch._C._current_graph_task_id() != -1  # as torch.utils.checkpoint asks it
        if not self.running and not in_backward:
            group.current = False  # called outside of a forward; its own backward must not find older numbers either
            return None
        return group.casts if group.casts.A.dtype == dtype else None

    @contextlib.contextmanager
    def fresh(self, dtype: torch.dtype) -> Iterator[None]:
        """Around a forward of the model in this dtype."""
        copies: list[Tensor] = []
        masters: list[Tensor] = []
        with torch.inference_mode(False), torch.no_grad():  # they outlive a text that is written, and serve training
            for group in self.groups.values():
                if group.prepare(dtype):
                    copies += group.views
                    masters += group.masters()
            if copies:
                torch._foreach_copy_(copies, masters)
        self.running = True
        try:
            yield
        finally:
            self.running = False

    def clear(self) -> None:
        """Gives their memory back."""
        for group in self.groups.values():
            group.clear()


class GroupCasts:
    """The casts of layers that read one input, or of one layer."""

    def __init__(self, layers: list[LoRALinear]):
        self.layers = layers
        self.clear()

    def clear(self) -> None:
        self.casts: Casts | None = None
        self.views: list[Tensor] = []  # of the casts, as `masters` are
        self.current = False

    def masters(self) -> list[Tensor]:
        return [layer.lora_A for layer in self.layers] + [layer.lora_B for layer in self.layers]

    def prepare(self, dtype: torch.dtype) -> bool:
        """True if the coming forward wants them; there is room for them then, still to be filled."""
        first = self.layers[0].lora_A
        # A tensor in shards is gathered for its block alone, so the block's layers cast it there
        if (
            is_sharded(first)
            or not use_triton(first)
            or any(layer.merged or layer.uses_dropout for layer in self.layers)
        ):
            self.clear()
            return False
        if self.casts is None or self.casts.A.dtype != dtype or self.casts.A.device != first.device:
            ranks = [layer.rank for layer in self.layers]
            A = first.new_empty(sum(ranks), first.shape[1], dtype=dtype)
            B = [torch.empty_like(layer.lora_B, dtype=dtype) for layer in self.layers]
            self.casts, self.views = Casts(A, B), [*A.split(ranks), *B]
        self.current = True
        return True


def layer_numbers(layers: list) -> tuple[int, ...]:
    return tuple(layer.number for layer in layers)


def layers_by_input(model: Transformer) -> list[list[LoRALinear]]:
    """The adapted layers, those together that read one input: q, k and v, or gate and up, where all are adapted.
    Without those of experts that are multiplied with together, whose adapters kernels/grouped.py casts."""
    groups, left = [], {id(module): module for module in model.modules() if isinstance(module, LoRALinear)}
    grouped = [experts for experts in model.modules() if isinstance(experts, Experts) and experts.can_group()]
    inside = {id(module) for experts in grouped for module in experts.modules()}
    left = {key: module for key, module in left.items() if key not in inside}
    for module in model.modules():
        if id(module) in inside:
            continue
        for names in (("q", "k", "v"), ("gate", "up")):
            layers = [getattr(module, name, None) for name in names]
            if all(isinstance(layer, LoRALinear) for layer in layers):
                groups.append([left.pop(id(layer)) for layer in layers])
    return groups + [[layer] for layer in left.values()]


def set_casts(model: Transformer) -> None:
    """After layers were put on a model: one place for the casts of all."""
    model.lora_casts = ModelCasts(layers_by_input(model))
    for layer in lora_layers(model).values():
        layer.casts = model.lora_casts


def seeded_dropout(x: Tensor, share: float, keys: Tensor, layer: int) -> Tensor:
    """Dropout (Srivastava et al. 2014) of x [tokens, in] by hashes instead of drawn numbers: what is dropped follows
    from a token's key, the layer and the column, so it is the same in whichever process and batch a token is computed,
    and again when a run is resumed or a block computed twice."""
    rows = hash_int32((keys + layer * 0x9E3779B9).to(torch.int32))
    columns = hash_int32(torch.arange(x.shape[1], dtype=torch.int32, device=x.device))
    numbers = hash_int32(rows[:, None] ^ columns)  # evenly spread over int32
    return torch.where(numbers >= int((share - 0.5) * 2**32), x / (1 - share), 0.0)


def hash_int32(x: Tensor) -> Tensor:
    """int32 -> int32, each bit of the result depending on all bits of x: multiplications by odd numbers, of which
    torch drops the carry, between shifts to the right (as in MurmurHash3's last lines, Appleby 2011)."""
    for shift, factor in ((16, -2048144789), (13, -1028477387)):
        x = (x ^ ((x >> shift) & ((1 << (32 - shift)) - 1))) * factor
    return x ^ ((x >> 16) & 0xFFFF)


def add_lora(
    model: Transformer, rank: int, alpha: float, dropout: float = 0.0, targets: str | list[str] = ALL
) -> list[str]:
    """Freezes the model and puts LoRA on the linears that `targets` name. Returns their published names.

    targets: "all" (every linear in the blocks), or names, as a list or with commas: the end of a published module name,
    as peft matches them (`q_proj`, `mlp.down_proj`, `model.layers.3.self_attn.v_proj`).
    Raises UserError on a rank below 1 or above every layer's size, an alpha of 0 or less, a dropout outside [0, 1), and
    a target that matches nothing.
    """
    if rank < 1:
        raise UserError(f"--rank {rank}: must be 1 or more")
    if not 0 < alpha < 1e9:
        raise UserError(f"--alpha {alpha}: must be above 0, and no more than a billion")
    if not 0 <= dropout < 1:
        raise UserError(f"--dropout {dropout:g}: must be at least 0 and below 1")
    if has_lora(model):
        raise UserError("the model carries a LoRA adapter already; merge and drop_lora, or drop_lora alone, come first")
    linears = {
        hf_name(model, name): name for name, m in model.named_modules() if isinstance(m, Linear) and "blocks." in name
    }
    wanted = (targets if isinstance(targets, str) else ",".join(targets)).split(",")
    chosen = []
    for target in (t.strip() for t in wanted):
        found = [name for name in linears if target == ALL or name == target or name.endswith("." + target)]
        if not found:
            kinds = sorted({name.rpartition(".")[2] for name in linears})
            raise UserError(f"--targets {target}: matches no linear layer (the model has {', '.join(kinds)})")
        chosen += found
    layers = [model.get_submodule(linears[name]) for name in chosen]
    most = max(max(layer.in_features, layer.out_features) for layer in layers)
    if rank > most:
        raise UserError(f"--rank {rank}: no layer here is larger than {most}")
    model.requires_grad_(False)
    chosen = [name for name in linears if name in set(chosen)]  # in the model's order, however they were named
    for number, name in enumerate(chosen):
        parent, leaf = model.get_submodule(linears[name].rpartition(".")[0]), linears[name].rpartition(".")[2]
        setattr(parent, leaf, LoRALinear(getattr(parent, leaf), rank, alpha, dropout, model.dropout_seeds, number))
    set_casts(model)
    stack_expert_weights(model)
    return chosen


def lora_layers(model: Transformer) -> dict[str, LoRALinear]:
    """The LoRA layers by published name."""
    return {hf_name(model, name): m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def has_lora(model: Transformer) -> bool:
    return any(isinstance(module, LoRALinear) for module in model.modules())


@torch.no_grad()
def merge(model: Transformer, keep: bool = False, stored: torch.dtype | None = None) -> float:
    """Adds every adapter's update to its base weight: computed in fp32, rounded once to the base's dtype. keep: holds
    the weights as they were, so that unmerge is exact, in the memory that they take. A base in NF4 leaves it, since 4
    bits would not hold the update: the sum is in the model's dtype, and the base's numbers are those of its 4 bits.

    Returns the share of the update that rounding loses: the length of what it changes, over the update's. stored: the
    dtype that the weights are rounded to later on, if to another.
    """
    lost = update = 0.0
    for layer in lora_layers(model).values():
        assert not layer.merged, "merged already"
        base, delta = layer.base, layer.delta()
        wanted = dequantized_weight(base.frozen, torch.float32) + delta
        if base.nf4 is not None:
            layer.kept = base.nf4.tensors
            base.dequantize(wanted.to(model.dtype))
        else:
            layer.kept = base.weight.clone() if keep else None
            base.weight.copy_(wanted)
        lost += (base.weight.to(stored or base.weight.dtype) - wanted).square().sum()
        update += delta.square().sum()
        layer.merged = True
    return math.sqrt(lost / update) if update else 0.0


@torch.no_grad()
def unmerge(model: Transformer) -> None:
    """Takes the updates out again: exact if they were kept, as NF4 always is, else up to merge's rounding to the base's
    dtype."""
    for layer in lora_layers(model).values():
        assert layer.merged, "not merged"
        base = layer.base
        if isinstance(layer.kept, NF4):
            base.quantize(layer.kept)
        else:
            base.weight.copy_(base.weight.float() - layer.delta() if layer.kept is None else layer.kept)
        layer.merged, layer.kept = False, None


def remove_lora(model: Transformer) -> dict[str, LoRALinear]:
    """Puts the plain linears back; after merge the model is an ordinary one that save_model writes. Returns the layers
    that were taken out, by our names of them, for put_lora."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    for name, layer in layers.items():
        setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], layer.base)
    if model.lora_casts is not None:
        model.lora_casts.clear()
        model.lora_casts = None
    return layers


def restore_lora(model: Transformer, layers: dict[str, LoRALinear]) -> None:
    """Puts layers that drop_lora took out of this model in again: several adapters can share one base in turn."""
    assert not has_lora(model), "one adapter at a time"
    for name, layer in layers.items():
        setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], layer)
    set_casts(model)


def save_adapter(model: Transformer, folder, write_extra: Callable[[Path], None] | None = None) -> None:
    """Writes a PEFT adapter folder in place of what is there. Rank, alpha and dropout are those of the model's layers.

    write_extra: writes more files into the folder before it takes its name. Raises UserError where the folder holds a
    model.
    """
    if (Path(folder) / "config.json").is_file():
        raise UserError(f"{folder}: holds a model, which an adapter would replace; name another folder")
    layers = lora_layers(model)
    assert layers, "the model carries no adapter"
    first = next(iter(layers.values()))
    base_name, revision = hub_origin(model.source) or (str(model.source.resolve()), None)
    weights = {}
    for name, layer in layers.items():
        weights[f"{PREFIX}{name}.lora_A.weight"] = full_tensor(layer.lora_A.detach()).cpu().contiguous()
        weights[f"{PREFIX}{name}.lora_B.weight"] = full_tensor(layer.lora_B.detach()).cpu().contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "revision": revision,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "target_modules": target_modules(model, list(layers)),
        "bias": "none",
        "fan_in_fan_out": model.config.conv1d,
        "inference_mode": True,
    }
    with rank0_context(atomic_folder(folder, replace=True)) as tmp:
        if not tmp:
            return
        write_json(config, tmp / "adapter_config.json")
        save_tensors(weights, tmp / ADAPTER_FILE)
        if write_extra:
            write_extra(tmp)


def target_modules(model: Transformer, names: list[str]) -> list[str]:
    """Short names (q_proj) where they mean exactly the adapted layers, else full ones: peft adapts all that match."""
    short = sorted({name.rpartition(".")[2] for name in names})
    linears = [hf_name(model, name) for name, m in model.named_modules() if isinstance(m, Linear)]
    return short if {n for n in linears if n.rpartition(".")[2] in short} == set(names) else sorted(names)


def is_adapter(folder: str | Path) -> bool:
    return (Path(folder) / "adapter_config.json").is_file()


def why_no_adapter(folder: Path) -> str:
    """What a path is that should have been an adapter folder."""
    if not folder.is_dir():
        return "no such folder"
    if is_adapter(folder / "final"):
        return f"is the folder of a run; its adapter is {folder / 'final'}"
    if (folder / "config.json").is_file() and list(folder.glob("*.safetensors")):
        return "is a whole model, not an adapter; give it as --model"
    return "no adapter_config.json in it, so it is no PEFT adapter folder"


def adapter_metadata(folder: str | Path) -> dict:
    """plaintune.json: what train.py writes beside the weights about the base; {} in what others made."""
    return read_json_if_there(Path(folder) / "plaintune.json")


def load_adapter(model: Transformer, folder) -> None:
    """Puts a PEFT LoRA adapter on the model, trainable, everything else frozen.

    Strict: raises UserError where the file's tensors are not exactly those that its configuration promises for this
    model, or where it asks for what would be ignored here (another method, bias, rank patterns, saved modules).
    """
    folder = Path(folder)
    if not is_adapter(folder):
        raise UserError(f"{folder}: {why_no_adapter(folder)}")
    config = read_json(folder / "adapter_config.json")
    rank, alpha, dropout, targets = adapter_settings(config, folder / "adapter_config.json", model)
    file = folder / ADAPTER_FILE
    if not file.is_file():
        pickled = " (adapter_model.bin is a pickle, which can run code and is not read)"
        raise UserError(f"{file}: no such file{pickled if (folder / 'adapter_model.bin').exists() else ''}")
    found, trainable = dict(iterate_tensors([file])), {p for p in model.parameters() if p.requires_grad}
    try:
        names = add_lora(model, rank, alpha, dropout, targets)
    except UserError as error:
        raise UserError(f"{folder / 'adapter_config.json'}: does not fit this model ({error})") from None
    assert len(lora_layers(model)) == len(names)
    try:
        copy_tensors(model, found, file)
    except UserError:
        remove_lora(model)
        for parameter in model.parameters():
            parameter.requires_grad_(parameter in trainable)
        raise


def put_adapter_on(model: Transformer, adapter: str | Path, print_fn: Callable[[str], None] = print) -> None:
    """`load_adapter`, with a line where the adapter's metadata says that its base was another one than this."""
    load_adapter(model, adapter)
    metadata = adapter_metadata(adapter)
    made_on, quant = metadata.get("base_sha256"), metadata.get("quant")
    if quant in KINDS and not quantized_linears(model):
        print_fn(f"NOTE: {adapter} was trained on its base in {quant}; --quant {quant} gives it that one")
    if made_on is not None and made_on != run_on_rank0(lambda: fingerprint(model.source)):
        print_fn(
            f"WARNING: {adapter} was trained on other weights than those of {model.source}; its answers will suffer"
        )


def load_lora_weights(model: Transformer, folder) -> None:
    """Gives a model that carries an adapter's layers the numbers in the adapter's file."""
    file = Path(folder) / ADAPTER_FILE
    copy_tensors(model, dict(iterate_tensors([file])), file)


def copy_tensors(model: Transformer, found: dict[str, Tensor], file: Path) -> None:
    """Copies an adapter's tensors into the model's LoRA layers; UserError where they are not exactly those."""
    wanted = {}
    for name, layer in lora_layers(model).items():
        wanted[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A
        wanted[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B
    missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing or extra:
        kind, culprits = ("missing", missing) if missing else ("not used by its configuration", extra)
        raise UserError(f"{file}: {len(culprits)} of its tensors {kind}, the first: {culprits[0]}")
    with torch.no_grad():
        for name, parameter in wanted.items():
            if found[name].shape != parameter.shape:
                raise UserError(
                    f"{file}: {name} has shape {list(found[name].shape)}, {list(parameter.shape)} is wanted"
                )
            if not found[name].is_floating_point():
                raise UserError(f"{file}: {name} holds {found[name].dtype}, floating point numbers are wanted")
            copy_local_rows(parameter, found[name])


def adapter_settings(config: dict, where: Path, model: Transformer) -> tuple[int, float, float, str | list[str]]:
    """rank, alpha, dropout and targets of an adapter_config.json; UserError on what this file would have to ignore."""
    if config.get("peft_type") != "LORA":
        raise UserError(f"{where}: peft_type {config.get('peft_type')!r} is not supported (supported: LORA)")
    for key in UNSUPPORTED:
        if config.get(key) not in (None, False, [], {}):
            raise UserError(f"{where}: {key} is set, which is not supported")
    if bool(config.get("fan_in_fan_out")) != model.config.conv1d:  # peft corrects it with a warning; which is meant?
        raise UserError(f"{where}: fan_in_fan_out is {config.get('fan_in_fan_out')}, which is wrong for this model")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in PLAIN_STARTS:
        raise UserError(f"{where}: init_lora_weights {start!r} means a changed base, which is not supported")
    if config.get("bias", "none") != "none":
        raise UserError(f"{where}: bias {config['bias']!r} is not supported")
    rank, alpha, dropout = config.get("r"), config.get("lora_alpha"), config.get("lora_dropout", 0.0)
    if type(rank) is not int or type(alpha) not in (int, float) or type(dropout) not in (int, float):
        raise UserError(f"{where}: r, lora_alpha and lora_dropout must be numbers")
    targets = config.get("target_modules")
    if targets == "all-linear":
        return rank, alpha, dropout, ALL
    if isinstance(targets, str):  # peft takes a string as a regular expression over whole module names
        try:
            pattern = re.compile(targets)
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(f"{where}: target_modules is no regular expression ({error})") from None
        names = [hf_name(model, name) for name, m in model.named_modules() if isinstance(m, Linear)]
        targets = [name for name in names if pattern.fullmatch(name)]
    if not isinstance(targets, list) or not targets or not all(isinstance(t, str) for t in targets):
        raise UserError(f"{where}: target_modules names no layer of this model")
    return rank, alpha, dropout, targets
