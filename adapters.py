"""The other ways to train a frozen model: bottleneck adapters, learned prompts, and (IA)^3.

    bottleneck      after a sublayer a small MLP of its own, with a narrow middle (Houlsby et al. 2019,
                    Pfeiffer et al. 2021; beside the sublayer: He et al. 2022)
    prompt-tuning   vectors that stand before every text, in place of the embeddings of tokens (Lester
                    et al. 2021)
    p-tuning        the same, computed by a small network, the encoder, that is trained (Liu et al. 2021)
    prefix-tuning   in every layer, keys and values that stand before those of the text (Li and Liang
                    2021)
    ia3             keys, values and the middle of the MLP, each number times a factor (Liu et al. 2022)

Each is one kind of module, with the equation at its `forward`, and a function that puts it on a
model. What these modules have in common with LoRA's stands in adapter_files.py. Files are those of
PEFT, whose prompts are computed ones: an encoder lives in our checkpoints alone. Bottleneck adapters,
which PEFT has not, are in the layout of the adapters library (AdapterHub), and compute what it
computes for models that norm before the sublayer.

Shapes: N tokens, D hidden, P virtual tokens, L layers, G key-value heads of size d.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from adapter_files import (
    ADAPTER_FILE,
    HUB_FILE,
    PREFIX,
    adapter_modules,
    check_transposed,
    is_number,
    peft_facts,
    refuse_keys,
    refuse_second_adapter,
    set_submodule,
    write_adapter,
)
from checkpoint import copy_local_rows, hf_name
from common.choices import PROMPT_TEXT
from common.errors import UserError
from distributed import full_tensor
from kernels.shared_rows import Prefix
from kernels.swiglu import ACTIVATIONS
from model import Linear, Transformer, forward_each
from tokenizer import load_tokenizer

# ---- bottleneck adapters ----


class Placement(NamedTuple):
    """Where bottleneck adapters are, and what they compute.

    after_attention: each block has one there as well, and not after the MLP alone.
    reads: "output": what the sublayer adds to the residual; "sum": the residual with that added;
        "residual": the residual as the sublayer found it.
    activation: a key of ACTIVATIONS.
    scaling: a factor of what the adapter adds.
    """

    after_attention: bool
    after_mlp: bool
    reads: str
    activation: str
    scaling: float


# --placement. The activations and factors are those of AdapterHub's double_seq_bn, seq_bn and par_bn.
PLACEMENTS = {
    "houlsby": Placement(True, True, "output", "silu", 1.0),
    "pfeiffer": Placement(False, True, "sum", "relu", 1.0),
    "parallel": Placement(False, True, "residual", "relu", 4.0),
}
# AdapterHub's names of activations, and ours.
HUB_ACTIVATIONS = {"relu": "relu", "swish": "silu", "silu": "silu", "gelu": "gelu"}
# What its configurations say of adapters that are computed here: other values are refused.
HUB_COMPUTED: dict[str, tuple] = {
    "original_ln_after": (True,),
    "residual_before_ln": (True,),
    "ln_before": (False,),
    "ln_after": (False,),
    "use_gating": (False,),
    "phm_layer": (False,),
    "inv_adapter": (None,),
    "cross_adapter": (False,),
    "leave_out": ([], None),
    "dropout": (0, 0.0),
    "stochastic_depth": (0, 0.0, None),
}


class BottleneckAdapter(nn.Module):
    """y + s * up(act(down(input))): a sublayer's output y, and beside it a narrow MLP.

    Both halves are float32, [r, D] and [D, r], each with a bias. `up` begins at zero, so that step 0
    is the base exactly.
    """

    is_adapter = True
    base = None

    def __init__(self, hidden: int, size: int, placement: Placement, device: torch.device):
        super().__init__()
        self.placement = placement
        self.activation = ACTIVATIONS[placement.activation]
        self.down = nn.Parameter(torch.empty(size, hidden, device=device, dtype=torch.float32))
        self.down_bias = nn.Parameter(torch.zeros(size, device=device, dtype=torch.float32))
        self.up = nn.Parameter(torch.zeros(hidden, size, device=device, dtype=torch.float32))
        self.up_bias = nn.Parameter(torch.zeros(hidden, device=device, dtype=torch.float32))
        self.merged = False
        # What AdapterHub's file calls the adapter.
        self.file_name = "plaintune"

    @property
    def saved_numbers(self) -> int:
        """Numbers for each token that the backward needs."""
        size, hidden = self.down.shape
        return 2 * size + (hidden if self.placement.reads == "sum" else 0)

    @torch.no_grad()
    def start(self, model: Transformer) -> None:
        # Every rank draws the whole and keeps its rows, so that sharding changes no number.
        down = torch.empty(self.down.shape, device=self.down.device)
        copy_local_rows(self.down, nn.init.kaiming_uniform_(down, a=math.sqrt(5)))
        for zeros in (self.down_bias, self.up, self.up_bias):
            zeros.zero_()

    def forward(self, y: Tensor, residual: Tensor) -> Tensor:  # [N, D], [N, D] -> [N, D]
        if self.merged:
            return y
        reads = self.placement.reads
        x = {"output": y, "residual": residual}.get(reads)
        if x is None:
            x = y + residual
        low = F.linear(x, self.down.to(x.dtype), self.down_bias.to(x.dtype))  # [N, r]
        high = F.linear(self.activation(low), self.up.to(x.dtype), self.up_bias.to(x.dtype))
        return y + self.placement.scaling * high

    def tensors(self, model: Transformer, name: str) -> dict[str, Tensor]:
        _, number, place = name.split(".")
        place = {"attention_adapter": "attention_adapters", "mlp_adapter": "output_adapters"}[place]
        stem = f"{published_block(model, int(number))}.{place}.adapters.{self.file_name}"
        return {
            f"{stem}.adapter_down.0.weight": self.down,
            f"{stem}.adapter_down.0.bias": self.down_bias,
            f"{stem}.adapter_up.weight": self.up,
            f"{stem}.adapter_up.bias": self.up_bias,
        }


def add_bottleneck(
    model: Transformer, placement: str | Placement, reduction_factor: float, name: str = "plaintune"
) -> None:
    """Freezes the model and puts bottleneck adapters into its blocks.

    placement: a key of PLACEMENTS, or a placement.
    reduction_factor: hidden size over the size of the bottleneck, which is rounded down.
    name: what AdapterHub's file calls the adapter.
    Raises UserError if no whole number is left of the bottleneck, or if the model has an adapter.
    """
    hidden = model.config.hidden_size
    if not 0.01 <= reduction_factor <= hidden:
        raise UserError(
            f"--reduction-factor {reduction_factor:g}: must be at least 0.01, and at most the hidden size,"
            f" {hidden}"
        )
    refuse_second_adapter(model)
    model.requires_grad_(False)
    if isinstance(placement, str):
        placement = PLACEMENTS[placement]
    size = int(hidden // reduction_factor)
    places = [
        place
        for place, is_used in (
            ("attention_adapter", placement.after_attention),
            ("mlp_adapter", placement.after_mlp),
        )
        if is_used
    ]
    for number in range(model.config.num_layers):
        for place in places:
            adapter = BottleneckAdapter(hidden, size, placement, model.device)
            adapter.file_name = name
            adapter.start(model)
            set_submodule(model, f"blocks.{number}.{place}", adapter)


def published_block(model: Transformer, number: int) -> str:
    """Returns the published name of a block, such as model.layers.3."""
    inside = hf_name(model, f"blocks.{number}.attention.o")
    return inside[: inside.index(f".{number}.") + len(f".{number}")]


def bottleneck_config(model: Transformer) -> dict:
    """Returns adapter_config.json of bottleneck adapters, as AdapterHub writes it."""
    adapter = next(iter(adapter_modules(model).values()))
    assert isinstance(adapter, BottleneckAdapter)
    size, hidden = adapter.down.shape
    placement = adapter.placement
    is_parallel = placement.reads == "residual"
    activation = next(hub for hub, name in HUB_ACTIVATIONS.items() if name == placement.activation)
    config: dict[str, object] = {key: values[0] for key, values in HUB_COMPUTED.items()}
    config |= {
        "mh_adapter": placement.after_attention,
        "output_adapter": placement.after_mlp,
        "non_linearity": activation,
        "original_ln_before": placement.reads == "sum",
        "is_parallel": is_parallel,
        "scaling": placement.scaling,
        "reduction_factor": exact_factor(hidden, size),
        "adapter_residual_before_ln": False,
        "init_weights": "mam_adapter" if is_parallel else "bert",
    }
    facts = peft_facts(model, "")
    base = facts["base_model_name_or_path"]
    return {
        "base_model_name_or_path": base,
        "revision": facts["revision"],
        "config": config,
        "hidden_size": hidden,
        "model_class": (model.config.raw.get("architectures") or [""])[0],
        "model_name": base,
        "model_type": model.config.raw.get("model_type"),
        "name": adapter.file_name,
        "version": "adapters.1.3.0",
    }


def exact_factor(hidden: int, size: int) -> float:
    """Returns a reduction factor of which hidden // factor is the size, also after rounding."""
    factor = hidden / size
    # A factor that was rounded up would give a bottleneck that is smaller by one.
    while hidden // factor < size:
        factor = math.nextafter(factor, 0)
    return int(factor) if factor == int(factor) else factor


def add_described_bottleneck(
    model: Transformer, config: dict, where: Path, tensors: dict[str, Tensor]
) -> None:
    """Puts bottleneck adapters on a model as AdapterHub's adapter_config.json describes them.

    Raises UserError on settings that are not computed here.
    """
    inner = config.get("config")
    if not isinstance(inner, dict) or inner.get("architecture"):
        raise UserError(f"{where}: describes no bottleneck adapter")
    for key, computed in HUB_COMPUTED.items():
        value = inner.get(key, computed[0])
        if value not in computed:
            raise UserError(f"{where}: {key} is {value!r}, which is not supported")
    scaling = inner.get("scaling", 1.0)
    factor = inner.get("reduction_factor")
    if not is_number(scaling) or not is_number(factor):
        raise UserError(f"{where}: scaling and reduction_factor must be numbers")
    activation = HUB_ACTIVATIONS.get(str(inner.get("non_linearity")).lower())
    if activation is None:
        raise UserError(
            f"{where}: non_linearity {inner.get('non_linearity')!r} is not supported (supported:"
            f" {', '.join(HUB_ACTIVATIONS)})"
        )
    reads = "sum" if inner.get("original_ln_before") else "output"
    if inner.get("is_parallel"):
        reads = "residual"
    after_attention = bool(inner.get("mh_adapter"))
    after_mlp = bool(inner.get("output_adapter"))
    if not after_attention and not after_mlp:
        raise UserError(f"{where}: neither mh_adapter nor output_adapter is set")
    placement = Placement(after_attention, after_mlp, reads, activation, float(scaling))
    # The name stands in every tensor's; that of the configuration may be another one.
    name = str(config.get("name") or "plaintune")
    for tensor_name in tensors:
        if ".adapters." in tensor_name:
            name = tensor_name.partition(".adapters.")[2].partition(".adapter_")[0]
            break
    add_bottleneck(model, placement, factor, name)


# ---- virtual tokens ----


class VirtualTokens(nn.Module):
    """What stands before every text and is learned: P vectors in place of embeddings, or in each
    layer P keys and values.

    embedding: float32 [P, width], the numbers themselves, or what the encoder computes them from.
    encoder: a module of [P, width] -> [P, D] or, for a prefix, [P, L * 2 * G * d]; None.
    is_prefix: keys and values are learned.

    Positions are those of a text that is P tokens longer. The keys of a prefix are not rotated, as in
    PEFT: no position is meant by them.
    """

    is_adapter = True
    base = None
    saved_numbers = 0

    def __init__(
        self,
        model: Transformer,
        count: int,
        is_prefix: bool,
        encoder: nn.Module | None = None,
        start_with: str = "random",
    ):
        super().__init__()
        config = model.config
        check_room_for_text(count, config.max_positions)
        self.count = count
        self.is_prefix = is_prefix
        self.start_with = start_with
        self.layers = config.num_layers
        self.kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        width = config.hidden_size
        if is_prefix and encoder is None:
            width = self.prefix_width
        self.embedding = nn.Parameter(
            torch.empty(count, width, device=model.device, dtype=torch.float32)
        )
        self.encoder = encoder
        self.merged = False

    @property
    def prefix_width(self) -> int:
        return self.layers * 2 * self.kv_heads * self.head_dim

    @torch.no_grad()
    def start(self, model: Transformer) -> None:
        """Fills in the first numbers. The same on every rank, of which each keeps its rows."""
        if self.embedding.is_meta:
            return
        copy_local_rows(self.embedding, self.first_embedding(model))
        if self.encoder is None:
            return
        for module in self.encoder.modules():
            own = dict(module.named_parameters(recurse=False))
            if not own:
                continue
            # As torch's own linears and LSTMs begin: uniform, by the number of their inputs.
            inputs = module.hidden_size if isinstance(module, nn.LSTM) else module.in_features
            bound = 1 / math.sqrt(inputs)  # type: ignore[arg-type]
            for parameter in own.values():
                values = torch.empty(parameter.shape, device=parameter.device)
                copy_local_rows(parameter, values.uniform_(-bound, bound))

    def first_embedding(self, model: Transformer) -> Tensor:
        """Returns the first numbers of `embedding`: drawn, or embeddings of the model's tokens."""
        values = torch.empty(self.embedding.shape, device=self.embedding.device)
        if self.encoder is not None:
            return values.normal_()
        if self.is_prefix:
            return values.normal_(std=0.02)
        if self.start_with == "random":
            # Lester et al. 2021, section 2.1.
            return values.uniform_(-0.5, 0.5)
        table = full_tensor(model.embed.weight.detach())
        if self.start_with == "vocabulary":
            ids = torch.randint(len(table), (self.count,), device=table.device)
        else:
            text = self.start_with.removeprefix(PROMPT_TEXT)
            own = load_tokenizer(model.source).encode(text)
            if not own:
                raise UserError(f"--prompt-init {self.start_with}: no tokens in it")
            repeated = own * -(-self.count // len(own))
            ids = torch.tensor(repeated[: self.count], device=table.device)
        # As if these tokens stood in the text.
        return table[ids].float() * model.config.embed_scale

    def values(self) -> Tensor:
        """Returns what is learned, float32 [P, D] or [P, L * 2 * G * d]."""
        if self.encoder is None:
            return self.embedding
        return self.encoder(self.embedding)

    def vectors(self) -> Tensor | None:
        """Returns the vectors that stand before those of a text, [P, D]; None for a prefix."""
        return None if self.is_prefix else self.values()

    def prefixes(self) -> list[Prefix] | None:
        """Returns each layer's keys and values, [P, G, d]; None where there is no prefix."""
        if not self.is_prefix:
            return None
        by_layer = self.values().view(self.count, self.layers, 2, self.kv_heads, self.head_dim)
        keys, values = by_layer.permute(2, 1, 0, 3, 4)  # [L, P, G, d] each
        return [Prefix(keys[i], values[i]) for i in range(self.layers)]

    def tensors(self, model: Transformer, name: str) -> dict[str, Tensor]:
        if self.encoder is None:
            return {PROMPT: self.embedding}
        # Outside of a forward FSDP has only this rank's rows in place.
        whole = {key: full_tensor(each) for key, each in self.encoder.named_parameters()}
        embedding = full_tensor(self.embedding)
        with torch.no_grad():
            return {PROMPT: functional_call(self.encoder, whole, (embedding,))}


def check_room_for_text(count: int, positions: int) -> None:
    """Raises UserError if so many virtual tokens leave no room for a text in a model's positions."""
    if not 0 < count < positions - 1:
        fault = "must be at least 1" if count < 1 else "leave no room for a text"
        raise UserError(f"--virtual-tokens {count}: {fault}; the model has {positions:,} positions")


PROMPT = "prompt_embeddings"  # the only tensor of PEFT's file


class LSTMEncoder(nn.Module):
    """A bidirectional LSTM over the virtual tokens, then an MLP of two layers (Liu et al. 2021,
    section 3.2)."""

    def __init__(self, hidden: int, size: int, device: torch.device):
        super().__init__()
        self.lstm = nn.LSTM(
            hidden, size, num_layers=2, bidirectional=True, device=device, dtype=torch.float32
        )
        self.mlp = mlp([2 * size, 2 * size, hidden], nn.ReLU, device)

    def forward(self, embedding: Tensor) -> Tensor:  # [P, D] -> [P, D]
        hidden, _ = self.lstm(embedding)
        return self.mlp(hidden)


def mlp(sizes: list[int], activation: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    """Returns linears of these sizes, with an activation between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs, device=device, dtype=torch.float32), activation()]
    return nn.Sequential(*layers[:-1])


def add_prompt(
    model: Transformer,
    count: int,
    start_with: str = "vocabulary",
    encoder: str = "none",
    encoder_size: int | None = None,
) -> None:
    """Freezes the model and puts virtual tokens before every text: prompt tuning, or P-tuning with an
    encoder.

    count: how many, P.
    start_with: "vocabulary": the embeddings of tokens that are drawn; "random": drawn numbers; or
        "text:" and a text, whose tokens' embeddings are taken, over and over. With an encoder all is
        drawn.
    encoder: "mlp", of three layers; "lstm"; or "none".
    encoder_size: the size of its inner layers; None: the model's hidden size.
    Raises UserError if the model has too few positions, or has an adapter.
    """
    hidden = model.config.hidden_size
    size = encoder_size or hidden
    network: nn.Module | None = None
    if encoder == "lstm":
        network = LSTMEncoder(hidden, size, model.device)
    elif encoder == "mlp":
        network = mlp([hidden, size, size, hidden], nn.ReLU, model.device)
    put_virtual_tokens(model, VirtualTokens(model, count, False, network, start_with))


def add_prefix(
    model: Transformer, count: int, encoder: str = "mlp", encoder_size: int | None = None
) -> None:
    """Freezes the model and puts a learned prefix before the keys and values of every layer.

    count: its tokens, P.
    encoder: "mlp": keys and values are computed by a network from P vectors, which trains more
        steadily than the numbers themselves (Li and Liang 2021, section 4.3); "none".
    encoder_size: the size of its inner layer; None: the model's hidden size.
    Raises UserError if the model has too few positions, or has an adapter.
    """
    config = model.config
    network: nn.Module | None = None
    if encoder == "mlp":
        outputs = config.num_layers * 2 * config.num_kv_heads * config.head_dim
        sizes = [config.hidden_size, encoder_size or config.hidden_size, outputs]
        network = mlp(sizes, nn.Tanh, model.device)
    put_virtual_tokens(model, VirtualTokens(model, count, True, network))


def put_virtual_tokens(model: Transformer, tokens: VirtualTokens) -> None:
    """Freezes a model and puts virtual tokens on it."""
    refuse_second_adapter(model)
    model.requires_grad_(False)
    tokens.start(model)
    model.prompt = tokens


def virtual_config(model: Transformer) -> dict:
    """Returns adapter_config.json of a learned prompt or prefix, as PEFT writes it."""
    tokens = model.prompt
    assert isinstance(tokens, VirtualTokens)
    config = model.config
    if tokens.is_prefix:
        kind = {"peft_type": "PREFIX_TUNING", "prefix_projection": False}
    elif tokens.encoder is not None:
        # Of the encoder only the name is left: the file holds what it has computed.
        is_lstm = isinstance(tokens.encoder, LSTMEncoder)
        kind = {
            "peft_type": "P_TUNING",
            "encoder_reparameterization_type": "LSTM" if is_lstm else "MLP",
            "encoder_hidden_size": config.hidden_size,
        }
    else:
        kind = {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM"}
    # For a prefix these are the shape of keys and values, whatever the queries have.
    heads = config.num_kv_heads if tokens.is_prefix else config.num_heads
    width = heads * config.head_dim if tokens.is_prefix else config.hidden_size
    return peft_facts(model, "") | {
        **kind,
        "num_virtual_tokens": tokens.count,
        "token_dim": width,
        "num_transformer_submodules": 1,
        "num_attention_heads": heads,
        "num_layers": config.num_layers,
    }


def add_described_prompt(
    model: Transformer, config: dict, where: Path, tensors: dict[str, Tensor]
) -> None:
    """Puts a prompt or a prefix on a model as PEFT's adapter_config.json describes it; without an
    encoder, of which the file holds the result.

    Raises UserError where the shape is not the model's.
    """
    count = config.get("num_virtual_tokens")
    if type(count) is not int:
        raise UserError(f"{where}: num_virtual_tokens must be a number")
    refuse_keys(config, ["modules_to_save"], where)
    if config.get("num_transformer_submodules") not in (None, 1):
        raise UserError(f"{where}: num_transformer_submodules is not 1, which is not supported")
    if config.get("peft_type") == "PREFIX_TUNING":
        add_prefix(model, count, "none")
    else:
        add_prompt(model, count, "random")


# ---- (IA)^3 ----


class ScaledLinear(nn.Module):
    """A frozen linear of which each output, or each input, has a learned factor: y * l, or
    (x * l) W^T (Liu et al. 2022, section 3.3).

    ia3_scale: float32 [out] or [in], 1 at the start.
    on_input: the factors are those of the inputs.
    """

    is_adapter = True

    def __init__(self, base: Linear, on_input: bool):
        super().__init__()
        self.base = base
        self.on_input = on_input
        size = base.in_features if on_input else base.out_features
        device = base.frozen[0].device
        self.ia3_scale = nn.Parameter(torch.ones(size, dtype=torch.float32, device=device))
        self.merged = False
        # While it is merged: the base's weight and bias before.
        self.original: object = None
        self.original_bias: Tensor | None = None

    @property
    def saved_numbers(self) -> int:
        """Numbers for each token that the backward needs."""
        return len(self.ia3_scale)

    @torch.no_grad()
    def start(self, model: Transformer) -> None:
        self.ia3_scale.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:  # [N, in] -> [N, out]
        if self.merged:
            return self.base(x)
        scale = self.ia3_scale.to(x.dtype)
        if self.on_input:
            return self.base(x * scale)
        return self.base(x) * scale

    def forward_shared(
        self, x: Tensor, layers: list, up: Tensor | None = None, activation: str = ""
    ) -> list[Tensor]:
        """Returns the outputs of several layers that read the same input, as Linear's does."""
        return forward_each(x, layers, up, activation)

    def member(self) -> None:
        """None: experts are not adapted."""

    @property
    def file_shape(self) -> torch.Size:
        """In PEFT's files: a row for the inputs, a column for the outputs."""
        size = len(self.ia3_scale)
        return torch.Size((1, size) if self.on_input else (size, 1))

    # In the shape of the file, the factors go with a weight [out, in].

    def merged_weight(self, weight: Tensor) -> Tensor:
        return weight * self.ia3_scale.view(self.file_shape)

    def unmerged_weight(self, weight: Tensor) -> Tensor:
        return weight / self.ia3_scale.view(self.file_shape)

    def merged_bias(self, bias: Tensor) -> Tensor:
        return bias if self.on_input else bias * self.ia3_scale.float()

    def tensors(self, model: Transformer, name: str) -> dict[str, Tensor]:
        return {f"{PREFIX}{hf_name(model, name)}{IA3_END}": self.ia3_scale}


# Keys, values and the middle of the MLP; where one matrix holds queries too, all of its outputs, as
# PEFT does. Of a mixture of experts, the experts are left as they are.
IA3_OUTPUTS = ("attention.k", "attention.v", "attention.qkv")
IA3_INPUTS = ("mlp.down",)
IA3_END = ".ia3_l"  # of a name in PEFT's file


def add_ia3(model: Transformer) -> None:
    """Freezes the model and puts learned factors on keys, values and the middle of each MLP.

    Raises UserError if the model has an adapter.
    """
    put_factors(model, ia3_places(model))


def ia3_places(model: Transformer) -> dict[str, bool]:
    """Returns {our name of a linear: True if its inputs get the factors}."""
    places = {}
    for name, module in model.named_modules():
        if not isinstance(module, Linear):
            continue
        if name.endswith(IA3_OUTPUTS):
            places[name] = False
        elif name.endswith(IA3_INPUTS):
            places[name] = True
    return places


def put_factors(model: Transformer, places: dict[str, bool]) -> None:
    """Freezes a model and puts learned factors on its linears. places: as of `ia3_places`."""
    refuse_second_adapter(model)
    model.requires_grad_(False)
    for name, on_input in places.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, Linear)
        set_submodule(model, name, ScaledLinear(linear, on_input))


def ia3_config(model: Transformer) -> dict:
    """Returns adapter_config.json of (IA)^3, as PEFT writes it."""
    names: dict[bool, set[str]] = {True: set(), False: set()}
    for name, module in adapter_modules(model).items():
        names[module.on_input].add(hf_name(model, name))
    inputs = endings_of(model, names[True])
    return peft_facts(model, "IA3") | {
        "target_modules": sorted({*endings_of(model, names[False]), *inputs}),
        "feedforward_modules": inputs,
        "fan_in_fan_out": model.config.conv1d,
    }


def endings_of(model: Transformer, names: set[str]) -> list[str]:
    """Returns the ends of some linears' published names that no other linear's name ends with; where
    there are none, the names."""
    everywhere = [
        hf_name(model, name) for name, module in model.named_modules() if isinstance(module, Linear)
    ]
    for parts in (1, 2):
        ends = {".".join(name.split(".")[-parts:]) for name in names}
        # PEFT takes feedforward_modules by the last letters, and target_modules by whole words.
        matching = {name for name in everywhere if name.endswith(tuple(ends))}
        if matching == names:
            return sorted(ends)
    return sorted(names)


def add_described_ia3(
    model: Transformer, config: dict, where: Path, tensors: dict[str, Tensor]
) -> None:
    """Puts (IA)^3 on a model as PEFT's adapter_config.json and the tensors describe it: the names of
    the tensors say which linears have factors, the configuration which side.

    Raises UserError if the configuration asks for what is not computed here.
    """
    refuse_keys(config, ["modules_to_save"], where)
    check_transposed(model, config, where)
    feedforward = config.get("feedforward_modules") or []
    if not isinstance(feedforward, list) or not all(isinstance(each, str) for each in feedforward):
        raise UserError(f"{where}: feedforward_modules must be a list of names")
    targets = config.get("target_modules")
    scaled = {name.removeprefix(PREFIX).removesuffix(IA3_END) for name in tensors}
    places = {}
    for name, module in model.named_modules():
        if not isinstance(module, Linear):
            continue
        published = hf_name(model, name)
        is_wanted = isinstance(targets, list) and any(
            published == each or published.endswith(f".{each}") for each in targets
        )
        if published not in scaled and not is_wanted:
            continue
        if module is model.head:
            raise UserError(f"{where}: factors of the output head, {published}, are not supported")
        # By the last letters, as PEFT has it. A linear without a tensor is missed when these are read.
        places[name] = published.endswith(tuple(feedforward))
    if not places:
        raise UserError("no tensor has the name of a linear of it")
    put_factors(model, places)


# ---- what is saved ----

CONFIGS: dict[type, Callable[[Transformer], dict]] = {
    BottleneckAdapter: bottleneck_config,
    VirtualTokens: virtual_config,
    ScaledLinear: ia3_config,
}


def save_non_lora(
    model: Transformer, folder: str | Path, write_extra: Callable[[Path], None] | None = None
) -> None:
    """Writes the folder of a model's adapter that is one of this file's, in place of what is there.
    All ranks must call it.

    write_extra: writes more files into the new folder, before that gets its name.
    Raises UserError if the folder holds a model.
    """
    kind = type(next(iter(adapter_modules(model).values())))
    file_name = HUB_FILE if kind is BottleneckAdapter else ADAPTER_FILE
    write_adapter(model, folder, CONFIGS[kind](model), write_extra, file_name)
