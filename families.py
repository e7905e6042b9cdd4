"""The families of models: what config.json means, as switches of one decoder, and what tensors are called in files.

`FAMILIES` is the table. A row holds a family's published names, the values that its config.json may leave unsaid (those
of transformers' configuration class), and its switches: how it differs from Llama, as fields of `Config`. A new family
that differs by known switches is a new row and nothing else. `Config.from_hf` reads config.json as transformers 4
(`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`, `layer_types`) write it, and refuses what model.py does not
compute: a switch that is ignored would change the model in silence.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from common.errors import UserError

MAX_LAYERS = 1_000  # a hostile config.json must not keep the machine busy building modules
MAX_EXPERTS = 32_000  # in all layers together; the largest models published have 24,000
MAX_SIZE = 10**8  # of any one dimension: products of three stay within what torch can count
ACTIVATIONS = {  # config.json's names: ours (model.py)
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}


@dataclass(frozen=True)
class Rope:
    """Rotary positions of the first `dim` dimensions of each head. scaling: as kernels/rope.py takes it."""

    theta: float
    dim: int
    scaling: dict | None


@dataclass(frozen=True)
class Layer:
    """What may differ from layer to layer."""

    window: int | None  # a token sees itself and window - 1 before it; None: all before it
    rope: int | None  # which of Config.ropes; None: q and k are not turned
    scale: float  # of the scores q k^T
    routed: bool  # the MLP is a mixture of experts


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of an MLP (Shazeer et al. 2017)."""

    count: int
    active: int  # of them, for each token
    intermediate_size: int
    normalised: bool  # the weights of the active ones sum to one
    balance: float  # weight of the load-balancing loss in training


@dataclass(frozen=True)
class Config:
    """What distinguishes one checkpoint from another. `raw` is config.json as found, for writing it back."""

    family: str
    raw: dict
    vocab_size: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    norm_eps: float
    tied: bool  # the output head is the embedding table
    layers: tuple[Layer, ...]
    ropes: tuple[Rope, ...]
    ignored_settings: tuple[str, ...]  # keys of raw that training here does not follow, as "attention_dropout 0.1"
    activation: str  # one of ACTIVATIONS' values
    names: dict[str, str]  # a module of ours: the published one; {} is the number of a layer or an expert
    # What follows are the switches, with Llama's values.
    qkv: str = "split"  # or one matrix: "stacked", rows of q, k, v; "grouped", for each kv head the rows of its q, k, v
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: str | None = None  # RMSNorm of q and k, of each "head" or of the "whole" row
    attention_softcap: float | None = None
    mlp: str = "gated"  # down(act(gate x) * up x); "stacked", gate and up in one matrix; "plain", down(act(up x))
    mlp_bias: bool = False
    experts: Experts | None = None
    norm: str = "rms"  # or "layer": LayerNorm with bias
    norm_offset: float = 0.0  # files hold a norm's weight less this
    pre_norm: bool = True  # norms before attention and MLP
    post_norm: bool = False  # norms after them, on what is added to the residual
    parallel: bool = False  # attention and MLP read the same input
    shared_norm: bool = False  # through the same norm
    learned_positions: bool = False  # a table of positions added to the embedding
    embed_scale: float = 1.0
    logit_softcap: float | None = None
    conv1d: bool = False  # matrices of the blocks lie in files as [in, out]

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def rope_switch_length(self) -> int | None:
        """The length at which a growing text is turned by another table, so that no cached key is right any more."""
        long = [r.scaling for r in self.ropes if r.scaling and r.scaling["rope_type"] == "longrope"]
        return long[0]["original_max_position_embeddings"] + 1 if long else None

    @staticmethod
    def from_hf(raw: dict, where: str = "config.json") -> "Config":
        """The configuration that a config.json means.

        Raises UserError, beginning with `where`, on an unknown family, a missing or impossible value, or a feature that
        is not computed here.
        """
        name = raw.get("model_type")
        family = FAMILIES.get(str(name))
        if family is None:
            hint = "; of Gemma 3 the text models (gemma3_text) are" if name == "gemma3" else ""
            known = f"(supported: {', '.join(FAMILIES)})"
            raise UserError(f"{where}: model_type {shown(name)} is not supported{hint} {known}")
        if raw.get("architectures") not in (None, [], [family.architecture]):
            raise UserError(f"{where}: architectures {shown(raw['architectures'])} is not supported for {name}")
        read = Reader(raw, family, where)
        for key, fine in REQUIRED_VALUES.items():
            if raw.get(key) not in (None, fine):
                raise UserError(f"{where}: {key} {shown(raw[key])} is not supported; take it out to do without")
        depth, hidden, heads = (
            read.size("num_hidden_layers"),
            read.size("hidden_size"),
            read.size("num_attention_heads"),
        )
        if depth > MAX_LAYERS:
            raise UserError(f"{where}: num_hidden_layers is {depth}, at most {MAX_LAYERS} are possible")
        if hidden % heads and not raw.get("head_dim"):
            raise UserError(f"{where}: hidden_size {hidden} is no multiple of num_attention_heads {heads}")
        head_dim = read.size("head_dim", hidden // heads)
        activation = read("hidden_act", str)
        if activation not in ACTIVATIONS:
            raise UserError(f"{where}: hidden_act {shown(activation)} is not supported ({', '.join(ACTIVATIONS)} are)")
        basics = {
            "vocab_size": read.size("vocab_size"),
            "num_kv_heads": read.size("num_key_value_heads", heads),
            "intermediate_size": read.size("intermediate_size", 4 * hidden if family.wide_mlp else None),
            "norm_eps": read.number("rms_norm_eps"),
            "tied": read("tie_word_embeddings", bool),
            "activation": ACTIVATIONS[activation],
        }
        switches = {"windows": None, "rope_of": 0, "scale": head_dim**-0.5, "routed": False, "ropes": None}
        switches |= family.switches(read, depth)
        per_layer = [switches.pop(key) for key in ("windows", "rope_of", "scale", "routed")]
        columns = [value if isinstance(value, list) else [value] * depth for value in per_layer]
        random = {key: raw.get(key, family.defaults.get(key)) for key in UNHEEDED}
        ropes = switches.pop("ropes")
        if ropes is None:
            ropes = (read_rope(read, raw.get("rope_scaling") or raw.get("rope_parameters") or {}, head_dim),)
        config = Config(
            family=name,
            raw=raw,
            hidden_size=hidden,
            num_heads=heads,
            head_dim=head_dim,
            max_positions=max_context(read.size("max_position_embeddings"), ropes),
            layers=tuple(Layer(*row) for row in zip(*columns, strict=True)),
            ropes=ropes,
            ignored_settings=tuple(f"{key} {value}" for key, value in random.items() if type(value) in (int, float) and value),
            names=family.names | switches.pop("names", {}),
            **basics | switches,
        )
        if heads % config.num_kv_heads:
            raise UserError(
                f"{where}: {heads} attention heads do not divide over {config.num_kv_heads} key-value heads"
            )
        if heads * head_dim > MAX_SIZE:
            raise UserError(f"{where}: num_attention_heads {heads} x head_dim {head_dim} is no possible width")
        return config


REQUIRED_VALUES = {  # keys of any family that change what is computed, and the only value that is computed here
    "is_causal": True,
    "use_bidirectional_attention": False,
    "add_cross_attention": False,
    "alibi": False,
}
# Random in training, of no effect elsewhere: fine-tuning goes without and says so
UNHEEDED = ("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout", "router_jitter_noise")


def shown(value: object) -> str:
    """The value as a message may show it, however large it is."""
    return repr(value)[:80]


class Reader:
    """Typed look-ups in a config.json, by Llama's names of keys; what it leaves unsaid has the family's value."""

    def __init__(self, raw: dict, family: "Family", where: str):
        self.raw, self.family, self.where = raw, family, where
        self.keys = {key: name for key, name in family.keys.items() if name in raw or key not in raw}

    def __call__(self, key: str, kind: type, otherwise=None):
        """The value, None where it is null and there is no `otherwise`; UserError where it is of another type."""
        name = self.keys.get(key, key)
        value = self.raw[name] if name in self.raw else self.family.defaults.get(key, DEFAULTS.get(key))
        value = otherwise if value is None else value
        if value is None or type(value) is kind or (kind is float and type(value) is int):
            return value
        raise UserError(f"{self.where}: {name} is {shown(value)}, {kind.__name__} is wanted")

    def size(self, key: str, otherwise: int | None = None) -> int:
        return self.positive(key, int, otherwise)

    def number(self, key: str, otherwise: float | None = None) -> float:
        return float(self.positive(key, float, otherwise))

    def positive(self, key: str, kind: type, otherwise):
        value, name = self(key, kind, otherwise), self.keys.get(key, key)
        if value is None:
            raise UserError(f"{self.where}: {name} is missing")
        if not 0 < value <= MAX_SIZE:
            raise UserError(f"{self.where}: {name} is {shown(value)}, a positive size is wanted")
        return value

    def softcap(self, key: str) -> float | None:
        return None if self(key, float) is None else self.number(key)

    def windows(self, sliding: Callable[[int], bool], depth: int) -> list[int | None]:
        """The window of each layer: `sliding_window` where the layer is a sliding one, by `layer_types`, else by the
        family's rule."""
        types = self("layer_types", list)
        if types is None:
            slides = [sliding(i) for i in range(depth)]
        elif len(types) != depth or not {*map(str, types)} <= {"full_attention", "sliding_attention"}:
            raise UserError(f"{self.where}: layer_types is no list of {depth} full_attention or sliding_attention")
        else:
            slides = [kind == "sliding_attention" for kind in types]
        window = self.size("sliding_window") if any(slides) else None
        return [window if slide else None for slide in slides]

    def window(self) -> int | None:
        """The window of families that have one for all layers; null is none."""
        return None if self("sliding_window", int) is None else self.size("sliding_window")


def read_rope(read: Reader, settings: object, head_dim: int, theta_key: str = "rope_theta") -> Rope:
    """Rotary positions by one `rope_parameters` or `rope_scaling` object, or {} and the keys beside it."""
    where, raw = read.where, read.raw
    if not isinstance(settings, dict) or any(isinstance(value, dict) for value in settings.values()):
        wanted = "an object of plain values is wanted"
        raise UserError(f"{where}: rope_parameters or rope_scaling is {shown(settings)}, {wanted}")

    def need(key: str, otherwise=None) -> float:
        value = settings.get(key)
        value = otherwise if value is None else value
        if type(value) not in (int, float) or not 0 < value < 1e30:
            raise UserError(f"{where}: rope scaling {shown(kind)} needs a positive number {key}, found {shown(value)}")
        return value

    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind == "su" or (kind == "yarn" and "long_factor" in settings):  # Phi-3's earlier names
        kind = "longrope"
    theta = settings.get("rope_theta", raw.get(read.keys.get(theta_key, theta_key)))
    theta = read.family.defaults.get(theta_key, DEFAULTS["rope_theta"]) if theta is None else theta
    if type(theta) not in (int, float) or not 1 < theta < 1e30:
        raise UserError(f"{where}: rope_theta is {shown(theta)}, a number above 1 is wanted")
    part = settings.get("partial_rotary_factor")
    part = read("partial_rotary_factor", float, 1.0) if part is None else part
    dim = int(head_dim * part) if type(part) in (int, float) and 0 < part <= 1 else 0
    if dim != head_dim and not read.family.partial_rope:
        raise UserError(f"{where}: partial_rotary_factor {shown(part)} is not supported for {raw['model_type']}")
    if dim < 2 or dim % 2:
        raise UserError(f"{where}: {dim} of head_dim {head_dim} would be turned, rotary positions need pairs")
    if kind == "default":
        return Rope(float(theta), dim, None)
    positions = read.size("max_position_embeddings")
    scaling, original = {"rope_type": kind}, None
    if kind in ("llama3", "yarn", "longrope"):
        if read("original_max_position_embeddings", int) is not None:  # beside the settings: it comes first
            original = read.size("original_max_position_embeddings")
        else:
            original = need("original_max_position_embeddings", positions)
        scaling["original_max_position_embeddings"] = original
    match kind:
        case "linear":
            scaling |= {"factor": need("factor")}
        case "dynamic":
            scaling |= {"factor": need("factor"), "max_positions": positions}
            if dim <= 2:
                raise UserError(f"{where}: rope scaling dynamic needs more than one pair of dimensions a head")
        case "llama3":
            scaling |= {key: need(key) for key in ("factor", "low_freq_factor", "high_freq_factor")}
            if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
                raise UserError(f"{where}: rope scaling llama3 needs low_freq_factor below high_freq_factor")
        case "yarn":
            factor = need("factor", positions / original)
            scaling |= {"factor": factor, "beta_fast": need("beta_fast", 32), "beta_slow": need("beta_slow", 1)}
            scaling |= {"truncate": settings.get("truncate", True) is not False}
            sharper = lambda mscale: 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
            mscale, all_dim = settings.get("mscale"), settings.get("mscale_all_dim")
            ratio = sharper(need("mscale")) / sharper(need("mscale_all_dim")) if mscale and all_dim else sharper(1)
            scaling |= {"attention_factor": need("attention_factor", ratio)}
        case "longrope":
            factor = need("factor", positions / original)
            ratio = math.sqrt(1 + math.log(factor) / math.log(original)) if min(factor, original) > 1 else 1.0
            scaling |= {"attention_factor": need("attention_factor", ratio)}
            for key in ("short_factor", "long_factor"):
                scaling[key] = settings.get(key)
                good = isinstance(scaling[key], list) and len(scaling[key]) == dim // 2
                if not good or not all(type(x) in (int, float) and 0 < x < 1e30 for x in scaling[key]):
                    raise UserError(f"{where}: rope scaling longrope needs {dim // 2} positive numbers {key}")
        case _:
            known = "linear, dynamic, llama3, yarn, longrope"
            raise UserError(f"{where}: rope scaling {shown(kind)} is not supported (supported: {known})")
    return Rope(float(theta), dim, scaling)


def max_context(positions: int, ropes: tuple[Rope, ...]) -> int:
    """How long a text may be. max_position_embeddings says it, but where rope scaling stretches it: files differ in
    whether they wrote the old length or the new, and vLLM's reading is the generous one."""
    for rope in ropes:
        match rope.scaling:
            case {"rope_type": "linear" | "dynamic", "factor": factor}:
                positions = max(positions, int(positions * factor))
            case {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}:
                positions = max(positions, int(original * factor))
    return positions


# ---- a family's switches ----


@dataclass(frozen=True)
class Family:
    """A row. names: a module of ours to the published one, {} is a layer's or an expert's number. switches: of a Reader
    and the number of layers, the fields of Config that are not Llama's, and `windows`, `rope_of`, `scale`, `routed`,
    each for all layers or a list by layer. keys: Llama's names of keys to this family's."""

    architecture: str
    names: dict[str, str]
    switches: Callable[[Reader, int], dict]
    defaults: dict
    keys: dict[str, str]
    partial_rope: bool  # a part of each head's dimensions may be turned
    wide_mlp: bool  # an intermediate_size that is null or missing is 4 x hidden_size


def family(architecture, names, switches, keys=(), partial_rope=False, wide_mlp=False, **defaults) -> Family:
    return Family(architecture, names, switches, defaults, dict(keys), partial_rope, wide_mlp)


DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "layer_types": None,
}


def biases(read: Reader) -> dict:
    bias = read("attention_bias", bool)
    return {"qkv_bias": bias, "o_bias": bias}


def qwen_windows(read: Reader, depth: int) -> list[int | None]:
    if not read("use_sliding_window", bool, False):
        return [None] * depth
    first = read("max_window_layers", int, 28)
    return read.windows(lambda i: i >= first, depth)


def gemma(read: Reader, depth: int) -> dict:
    return biases(read) | {"norm_offset": 1.0, "embed_scale": read.size("hidden_size") ** 0.5}


def tanh_gelu(read: Reader) -> dict:
    """The first Gemma's released files say gelu and mean its tanh form."""
    return {"activation": "gelu_tanh"} if read("hidden_act", str) == "gelu" else {}


def gemma2(read: Reader, depth: int) -> dict:
    return gemma(read, depth) | {
        "post_norm": True,
        "windows": read.windows(lambda i: i % 2 == 0, depth),
        "scale": read.number("query_pre_attn_scalar") ** -0.5,
        "attention_softcap": read.softcap("attn_logit_softcapping"),
        "logit_softcap": read.softcap("final_logit_softcapping"),
    }


def gemma3(read: Reader, depth: int) -> dict:
    """Two rotary bases: that of rope_theta, scaled, for full attention, rope_local_base_freq's for sliding layers."""
    every = read.size("sliding_window_pattern", 6)
    windows = read.windows(lambda i: bool((i + 1) % every), depth)
    both, old = read("rope_parameters", dict, {}), read("rope_scaling", dict, {})
    full, local = ((both.get(kind) or {}) for kind in ("full_attention", "sliding_attention"))
    d = read.size("head_dim")
    full = full | old if isinstance(full, dict) else full
    ropes = (read_rope(read, full, d), read_rope(read, local, d, "rope_local_base_freq"))
    switches = gemma2(read, depth) | {"windows": windows, "qk_norm": "head", "ropes": ropes}
    return switches | {"rope_of": [0 if window is None else 1 for window in windows]}


def smollm3(read: Reader, depth: int) -> dict:
    every = read.size("no_rope_layer_interval", 4)
    turned = read("no_rope_layers", list) or [int((i + 1) % every != 0) for i in range(depth)]
    if len(turned) != depth or not all(type(yes) is int and yes in (0, 1) for yes in turned):
        raise UserError(f"{read.where}: no_rope_layers is no list of {depth} zeros and ones")
    windows = read.windows(lambda i: not turned[i], depth) if read("use_sliding_window", bool, False) else None
    rope_of = [0 if yes else None for yes in turned]
    return biases(read) | {"mlp_bias": read("mlp_bias", bool), "rope_of": rope_of, "windows": windows}


def routed(read: Reader, normalised: bool, inner: str) -> Experts:
    count, active, depth = map(read.size, ("num_experts", "num_experts_per_tok", "num_hidden_layers"))
    if count * depth > MAX_EXPERTS or active > count:
        most = f"at most {MAX_EXPERTS} in all layers together"
        raise UserError(f"{read.where}: {active} of {count} experts in {depth} layers is not possible here ({most})")
    balance = read("router_aux_loss_coef", float)
    if balance is not None and not 0 <= balance < 1e9:
        raise UserError(f"{read.where}: router_aux_loss_coef is {shown(balance)}, 0 or a positive number is wanted")
    return Experts(count, active, read.size(inner), normalised, 0.0 if balance is None else balance)


def qwen3_moe(read: Reader, depth: int) -> dict:
    step, plain = read.size("decoder_sparse_step", 1), read("mlp_only_layers", list, [])
    if len(plain) > depth:
        raise UserError(f"{read.where}: mlp_only_layers names {len(plain)} of {depth} layers")
    window = read.window() if read("use_sliding_window", bool, False) else None
    experts = routed(read, read("norm_topk_prob", bool), "moe_intermediate_size")
    layers = [(i + 1) % step == 0 and i not in plain for i in range(depth)]
    return biases(read) | {"qk_norm": "head", "windows": window, "experts": experts, "routed": layers}


def gpt2(read: Reader, depth: int) -> dict:
    d = read.size("head_dim", read.size("hidden_size") // read.size("num_attention_heads"))
    scale = d**-0.5 if read("scale_attn_weights", bool, True) else 1.0
    by_layer = read("scale_attn_by_inverse_layer_idx", bool, False)
    biased = {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "norm": "layer"}
    return biased | {
        "num_kv_heads": read.size("num_attention_heads"),
        "qkv": "stacked",
        "mlp": "plain",
        "learned_positions": True,
        "ropes": (),
        "rope_of": None,
        "scale": [scale / (i + 1) if by_layer else scale for i in range(depth)],
        "conv1d": True,
    }


def neox(read: Reader, depth: int) -> dict:
    parallel = read("use_parallel_residual", bool, True)
    return (
        biases(read)
        | {"mlp_bias": True, "norm": "layer"}
        | {
            "num_kv_heads": read.size("num_attention_heads"),
            "qkv": "grouped",
            "mlp": "plain",
            "parallel": parallel,
        }
    )


def falcon(read: Reader, depth: int) -> dict:
    """7B style: one kv head, one norm for both. 40B style (new_decoder_architecture): groups of heads, two norms."""
    heads, new = read.size("num_attention_heads"), read("new_decoder_architecture", bool, False)
    parallel = new or read("parallel_attn", bool, True)
    norms = read("num_ln_in_parallel_attn", int, 2) if new else 1
    bias = read("bias", bool, False)
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": bias, "norm": "layer"} | {
        "qkv": "grouped",
        "num_kv_heads": read.size("num_key_value_heads", heads)
        if new
        else 1
        if read("multi_query", bool, True)
        else heads,
        "mlp": "plain",
        "parallel": parallel,
        "shared_norm": parallel and norms == 1,
        "names": FALCON_TWO_NORMS if new and norms == 2 else {},
    }


# ---- names of tensors ----
# fmt: off

BLOCK = "model.layers.{}."
LLAMA = {
    "embed": "model.embed_tokens",
    "blocks.{}.attention_norm": BLOCK + "input_layernorm",
    "blocks.{}.attention.q": BLOCK + "self_attn.q_proj",
    "blocks.{}.attention.k": BLOCK + "self_attn.k_proj",
    "blocks.{}.attention.v": BLOCK + "self_attn.v_proj",
    "blocks.{}.attention.o": BLOCK + "self_attn.o_proj",
    "blocks.{}.mlp_norm": BLOCK + "post_attention_layernorm",
    "blocks.{}.mlp.gate": BLOCK + "mlp.gate_proj",
    "blocks.{}.mlp.up": BLOCK + "mlp.up_proj",
    "blocks.{}.mlp.down": BLOCK + "mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
QK_NORM = {
    "blocks.{}.attention.q_norm": BLOCK + "self_attn.q_norm",
    "blocks.{}.attention.k_norm": BLOCK + "self_attn.k_norm",
}
POST_NORM = {
    "blocks.{}.attention_post_norm": BLOCK + "post_attention_layernorm",
    "blocks.{}.mlp_norm": BLOCK + "pre_feedforward_layernorm",
    "blocks.{}.mlp_post_norm": BLOCK + "post_feedforward_layernorm",
}
FUSED = {
    "blocks.{}.attention.qkv": BLOCK + "self_attn.qkv_proj",
    "blocks.{}.mlp.gate_up": BLOCK + "mlp.gate_up_proj",
}
MIXTRAL = {
    "blocks.{}.mlp.router": BLOCK + "block_sparse_moe.gate",
    "blocks.{}.mlp.experts.{}.gate": BLOCK + "block_sparse_moe.experts.{}.w1",
    "blocks.{}.mlp.experts.{}.up": BLOCK + "block_sparse_moe.experts.{}.w3",
    "blocks.{}.mlp.experts.{}.down": BLOCK + "block_sparse_moe.experts.{}.w2",
}
QWEN_MOE = {
    "blocks.{}.mlp.router": BLOCK + "mlp.gate",
    "blocks.{}.mlp.experts.{}.gate": BLOCK + "mlp.experts.{}.gate_proj",
    "blocks.{}.mlp.experts.{}.up": BLOCK + "mlp.experts.{}.up_proj",
    "blocks.{}.mlp.experts.{}.down": BLOCK + "mlp.experts.{}.down_proj",
}
GPT2 = {
    "embed": "transformer.wte",
    "positions": "transformer.wpe",
    "blocks.{}.attention_norm": "transformer.h.{}.ln_1",
    "blocks.{}.attention.qkv": "transformer.h.{}.attn.c_attn",
    "blocks.{}.attention.o": "transformer.h.{}.attn.c_proj",
    "blocks.{}.mlp_norm": "transformer.h.{}.ln_2",
    "blocks.{}.mlp.up": "transformer.h.{}.mlp.c_fc",
    "blocks.{}.mlp.down": "transformer.h.{}.mlp.c_proj",
    "norm": "transformer.ln_f",
    "head": "lm_head",
}
NEOX = {
    "embed": "gpt_neox.embed_in",
    "blocks.{}.attention_norm": "gpt_neox.layers.{}.input_layernorm",
    "blocks.{}.attention.qkv": "gpt_neox.layers.{}.attention.query_key_value",
    "blocks.{}.attention.o": "gpt_neox.layers.{}.attention.dense",
    "blocks.{}.mlp_norm": "gpt_neox.layers.{}.post_attention_layernorm",
    "blocks.{}.mlp.up": "gpt_neox.layers.{}.mlp.dense_h_to_4h",
    "blocks.{}.mlp.down": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    "norm": "gpt_neox.final_layer_norm",
    "head": "embed_out",
}
FALCON = {
    "embed": "transformer.word_embeddings",
    "blocks.{}.attention_norm": "transformer.h.{}.input_layernorm",
    "blocks.{}.attention.qkv": "transformer.h.{}.self_attention.query_key_value",
    "blocks.{}.attention.o": "transformer.h.{}.self_attention.dense",
    "blocks.{}.mlp_norm": "transformer.h.{}.post_attention_layernorm",
    "blocks.{}.mlp.up": "transformer.h.{}.mlp.dense_h_to_4h",
    "blocks.{}.mlp.down": "transformer.h.{}.mlp.dense_4h_to_h",
    "norm": "transformer.ln_f",
    "head": "lm_head",
}
FALCON_TWO_NORMS = {
    "blocks.{}.attention_norm": "transformer.h.{}.ln_attn",
    "blocks.{}.mlp_norm": "transformer.h.{}.ln_mlp",
}


# ---- the table ----

FAMILIES = {
    "llama": family("LlamaForCausalLM", LLAMA,
        lambda read, depth: biases(read) | {"mlp_bias": read("mlp_bias", bool)}),
    "mistral": family("MistralForCausalLM", LLAMA,
        lambda read, depth: {"windows": read.window()},
        num_key_value_heads=8, sliding_window=4096, max_position_embeddings=131_072),
    "qwen2": family("Qwen2ForCausalLM", LLAMA,
        lambda read, depth: {"qkv_bias": True, "windows": qwen_windows(read, depth)},
        num_key_value_heads=32, sliding_window=4096, max_position_embeddings=32_768),
    "qwen3": family("Qwen3ForCausalLM", LLAMA | QK_NORM,
        lambda read, depth: biases(read) | {"qk_norm": "head", "windows": qwen_windows(read, depth)},
        num_key_value_heads=32, head_dim=128, sliding_window=4096, max_position_embeddings=32_768),
    "gemma": family("GemmaForCausalLM", LLAMA,
        lambda read, depth: gemma(read, depth) | tanh_gelu(read),
        num_key_value_heads=16, head_dim=256, hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True,
        max_position_embeddings=8192),
    "gemma2": family("Gemma2ForCausalLM", LLAMA | POST_NORM, gemma2,
        keys={"hidden_act": "hidden_activation"},
        num_key_value_heads=4, head_dim=256, sliding_window=4096, query_pre_attn_scalar=256,
        hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True, max_position_embeddings=8192,
        attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
    "gemma3_text": family("Gemma3ForCausalLM", LLAMA | POST_NORM | QK_NORM, gemma3,
        keys={"hidden_act": "hidden_activation"},
        num_key_value_heads=4, head_dim=256, sliding_window=4096, query_pre_attn_scalar=256,
        hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True, max_position_embeddings=131_072,
        rope_theta=1_000_000.0, rope_local_base_freq=10_000.0),
    "phi3": family("Phi3ForCausalLM", LLAMA | FUSED,
        lambda read, depth: {"qkv": "stacked", "mlp": "stacked", "windows": read.window()},
        partial_rope=True,
        rms_norm_eps=1e-5, max_position_embeddings=4096, original_max_position_embeddings=4096),
    "olmo2": family("Olmo2ForCausalLM", LLAMA | POST_NORM | QK_NORM,
        lambda read, depth: biases(read) | {"pre_norm": False, "post_norm": True, "qk_norm": "whole"},
        rms_norm_eps=1e-5),
    "smollm3": family("SmolLM3ForCausalLM", LLAMA, smollm3,
        num_key_value_heads=4, rope_theta=2_000_000.0, max_position_embeddings=32_768, tie_word_embeddings=True),
    "gpt2": family("GPT2LMHeadModel", GPT2, gpt2,
        keys={"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
              "intermediate_size": "n_inner", "max_position_embeddings": "n_positions",
              "rms_norm_eps": "layer_norm_epsilon", "hidden_act": "activation_function"},
        wide_mlp=True,
        rms_norm_eps=1e-5, hidden_act="gelu_new", max_position_embeddings=1024, tie_word_embeddings=True,
        attn_pdrop=0.1, embd_pdrop=0.1, resid_pdrop=0.1),
    "gpt_neox": family("GPTNeoXForCausalLM", NEOX, neox,
        keys={"rms_norm_eps": "layer_norm_eps", "rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
        partial_rope=True,
        rms_norm_eps=1e-5, hidden_act="gelu", attention_bias=True, partial_rotary_factor=0.25),
    "falcon": family("FalconForCausalLM", FALCON, falcon,
        keys={"rms_norm_eps": "layer_norm_epsilon", "hidden_act": "activation",
              "num_key_value_heads": "num_kv_heads", "intermediate_size": "ffn_hidden_size"},
        wide_mlp=True,
        rms_norm_eps=1e-5, hidden_act="gelu", tie_word_embeddings=True),
    "mixtral": family("MixtralForCausalLM", LLAMA | MIXTRAL,
        lambda read, depth: {"windows": read.window(), "routed": True,
                             "experts": routed(read, True, "intermediate_size")},
        keys={"num_experts": "num_local_experts"},
        num_key_value_heads=8, num_experts=8, num_experts_per_tok=2, router_aux_loss_coef=0.001,
        rms_norm_eps=1e-5, rope_theta=1_000_000.0, max_position_embeddings=131_072),
    "qwen3_moe": family("Qwen3MoeForCausalLM", LLAMA | QK_NORM | QWEN_MOE, qwen3_moe,
        keys={"num_experts": "num_local_experts"},
        num_key_value_heads=4, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=False,
        router_aux_loss_coef=0.001, sliding_window=4096, max_position_embeddings=32_768),
}
