"""The families of models: what config.json means, as switches of one decoder, and the names of
tensors in files.

`FAMILIES` is the table. A row holds the published names of a family's tensors, the values that its
config.json may leave out (those of transformers' configuration class), and its switches: how it
differs from Llama, as fields of `Config`. To add a family that differs only by switches that exist,
add a row.

`Config.from_hf` reads config.json as transformers 4 (`rope_theta`, `rope_scaling`) and transformers
5 (`rope_parameters`, `layer_types`) write it. It refuses what model.py does not compute, because a
setting that is ignored would silently change the model.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from common.errors import UserError

# A hostile config.json must not keep the machine busy with building modules.
MAX_LAYERS = 1_000

# Of a score head, for the same reason.
MAX_CLASSES = 100_000

# In all layers together; the largest published models have 24,000.
MAX_EXPERTS = 32_000

# The largest value of any one dimension: torch can still count the elements of a product of three.
MAX_SIZE = 10**8

# {the name in config.json: the name in kernels/swiglu.py}
HF_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}

# Keys of any family that change what is computed, and the only value that is computed here.
REQUIRED_VALUES = {
    "is_causal": True,
    "use_bidirectional_attention": False,
    "add_cross_attention": False,
    "alibi": False,
}

# Settings that are random in training and have no effect elsewhere. Fine-tuning ignores them and
# prints them.
IGNORED_KEYS = (
    "attention_dropout",
    "attn_pdrop",
    "embd_pdrop",
    "resid_pdrop",
    "hidden_dropout",
    "router_jitter_noise",
)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions of the first `dim` dimensions of each head.

    theta: the base of the frequencies.
    scaling: None, or the dict that kernels/rope.py takes.
    """

    theta: float
    dim: int
    scaling: dict | None


@dataclass(frozen=True)
class Layer:
    """The settings that may differ from layer to layer.

    window: a token attends to itself and to the window - 1 tokens before it; None: to all tokens
        before it.
    rope: the index in Config.ropes; None: q and k are not rotated.
    scale: the factor of the scores q k^T.
    routed: the MLP is a mixture of experts.
    """

    window: int | None
    rope: int | None
    scale: float
    routed: bool


@dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts in place of an MLP (Shazeer et al. 2017).

    active: the number of experts that each token uses.
    normalised: the weights of the active experts sum to one.
    balance: the weight of the load-balancing loss in training.
    """

    count: int
    active: int
    intermediate_size: int
    normalised: bool
    balance: float


@dataclass(frozen=True)
class Config:
    """What distinguishes one checkpoint from another.

    raw: config.json as it was read, for writing it back.
    tied: the output head is the embedding table.
    ignored_settings: settings of raw that training here ignores, such as "attention_dropout 0.1".
    activation: one of the values of ACTIVATIONS.
    names: {a module of ours: its published name}; {} stands for the number of a layer or of an
        expert.
    labels: of the score head that stands in the place of the LM head, for sequence classification;
        None: the model has an LM head.

    The other fields with defaults are the switches; the defaults are Llama's values.
    """

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
    tied: bool
    layers: tuple[Layer, ...]
    ropes: tuple[RopeConfig, ...]
    ignored_settings: tuple[str, ...]
    activation: str
    names: dict[str, str]
    labels: tuple[str, ...] | None = None

    # "split": three matrices. "stacked": one matrix, the rows of q, then k, then v. "grouped": one
    # matrix, for each key-value head the rows of its q heads, its k and its v.
    qkv: str = "split"
    qkv_bias: bool = False
    o_bias: bool = False
    # RMSNorm of q and k: of each "head", or of all heads of a token together ("whole").
    qk_norm: str | None = None
    attention_softcap: float | None = None
    # "gated": down(act(gate x) * up x). "stacked": the same, gate and up in one matrix. "plain": down(act(up x)).
    mlp: str = "gated"
    mlp_bias: bool = False
    experts: ExpertsConfig | None = None
    # "rms", or "layer": LayerNorm with bias.
    norm: str = "rms"
    # Added to the norm's weight that is stored in files.
    norm_offset: float = 0.0
    # Norms before attention and before the MLP.
    pre_norm: bool = True
    # Norms after attention and after the MLP, on what is added to the residual.
    post_norm: bool = False
    # Attention and MLP read the same input.
    parallel: bool = False
    # They read it through the same norm.
    shared_norm: bool = False
    # A table of positions is added to the embedding.
    learned_positions: bool = False
    embed_scale: float = 1.0
    logit_softcap: float | None = None
    # Files hold the matrices of the blocks as [in, out].
    conv1d: bool = False

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def with_vocabulary(self, size: int) -> "Config":
        """Returns this configuration with another number of rows in the embedding table."""
        return dataclasses.replace(self, vocab_size=size, raw=self.raw | {"vocab_size": size})

    @property
    def rope_switch_length(self) -> int | None:
        """The length from which on a growing text is rotated by another table, so that all cached
        keys become wrong.

        None for models without longrope.
        """
        for rope in self.ropes:
            if rope.scaling and rope.scaling["rope_type"] == "longrope":
                return rope.scaling["original_max_position_embeddings"] + 1
        return None

    @staticmethod
    def from_hf(raw: dict, where: str = "config.json") -> "Config":
        """Returns the configuration that a config.json means.

        raw: the parsed file.
        where: the start of error messages.
        Raises UserError on an unknown family, on a missing or impossible value, and on a feature
        that is not computed here.
        """
        family = find_family(raw, where)
        check_required_values(raw, where)
        read = Reader(raw, family, where)

        # Sizes, with the checks that later ones rely on.
        depth = read.size("num_hidden_layers")
        hidden = read.size("hidden_size")
        heads = read.size("num_attention_heads")
        if depth > MAX_LAYERS:
            raise UserError(
                f"{where}: num_hidden_layers is {depth}, it must be at most {MAX_LAYERS}"
            )
        if hidden % heads and not raw.get("head_dim"):
            raise UserError(
                f"{where}: hidden_size {hidden} must be a multiple of num_attention_heads {heads}"
            )
        head_dim = read.size("head_dim", hidden // heads)
        default_intermediate = 4 * hidden if family.wide_mlp else None
        fields = {
            "activation": read_activation(read),
            "vocab_size": read.size("vocab_size"),
            "num_kv_heads": read.size("num_key_value_heads", heads),
            "intermediate_size": read.size("intermediate_size", default_intermediate),
            "norm_eps": read.number("rms_norm_eps"),
            "tied": read("tie_word_embeddings", bool),
        }

        # What the family says: settings of the layers, names that differ, and fields of Config. The
        # family goes last, since it may replace a field that was read above.
        switches: dict = family.switches(read, depth)
        layers = make_layers(
            depth,
            windows=switches.pop("windows", None),
            rope_of=switches.pop("rope_of", 0),
            scale=switches.pop("scale", head_dim**-0.5),
            routed=switches.pop("routed", False),
        )
        names = family.names | switches.pop("names", {})
        ropes = switches.pop("ropes", None)
        if ropes is None:
            settings = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
            ropes = (read_rope(read, settings, head_dim),)
        fields |= switches

        config = Config(
            family=raw["model_type"],
            raw=raw,
            hidden_size=hidden,
            num_heads=heads,
            head_dim=head_dim,
            max_positions=max_context(read.size("max_position_embeddings"), ropes),
            layers=layers,
            ropes=ropes,
            ignored_settings=ignored_settings(raw, family),
            names=names,
            labels=classifier_labels(raw, family, where),
            **fields,
        )
        if heads % config.num_kv_heads:
            raise UserError(
                f"{where}: {heads} attention heads do not divide over {config.num_kv_heads}"
                " key-value heads"
            )
        if heads * head_dim > MAX_SIZE:
            raise UserError(
                f"{where}: num_attention_heads {heads} x head_dim {head_dim} is too wide;"
                f" the most is {MAX_SIZE:,}"
            )
        return config


def make_layers(depth: int, windows, rope_of, scale, routed) -> tuple[Layer, ...]:
    """Returns the layers. Each argument but `depth` is a value for all of them, or a list with a
    value for each."""
    columns = []
    for values in (windows, rope_of, scale, routed):
        if not isinstance(values, list):
            values = [values] * depth
        columns.append(values)
    return tuple(Layer(*row) for row in zip(*columns, strict=True))


def find_family(raw: dict, where: str) -> "Family":
    """Returns the row of FAMILIES that `model_type` names. Raises UserError if there is none, or if
    `architectures` names another model than the decoder of that family with an LM head or a score
    head."""
    name = raw.get("model_type")
    family = FAMILIES.get(str(name))
    if family is None:
        hint = ""
        if name == "gemma3":
            hint = "; of Gemma 3 only the text models (gemma3_text) are"
        known = ", ".join(FAMILIES)
        raise UserError(
            f"{where}: model_type {short_repr(name)} is not supported{hint} (supported: {known})"
        )
    known_architectures = (family.architecture, family.classifier)
    if raw.get("architectures") not in (None, [], *([each] for each in known_architectures)):
        architectures = short_repr(raw["architectures"])
        raise UserError(
            f"{where}: architectures {architectures} is not supported for {name}"
            f" (supported: {', '.join(known_architectures)})"
        )
    return family


def classifier_labels(raw: dict, family: "Family", where: str) -> tuple[str, ...] | None:
    """Returns the labels of a model for sequence classification, in the order of its scores; None for
    a model with an LM head.

    They are those of id2label. Without it, num_labels counts them, and without that there are two:
    LABEL_0, LABEL_1, as in transformers.
    Raises UserError where there is none, or where id2label does not name each by its number.
    """
    if raw.get("architectures") != [family.classifier]:
        return None
    names = raw.get("id2label")
    if names is None:
        count = raw.get("num_labels", 2)
        if type(count) is not int or not 0 < count <= MAX_CLASSES:
            raise UserError(
                f"{where}: num_labels is {short_repr(count)}, it must be from 1 to {MAX_CLASSES:,}"
            )
        return numbered_labels(count)
    labels = labels_by_number(names)
    if labels is None:
        raise UserError(
            f"{where}: id2label is {short_repr(names)}, it must name 1 to {MAX_CLASSES:,} labels, all"
            ' different, by their numbers from 0 on, as {"0": "no", "1": "yes"}'
        )
    return labels


def labels_by_number(names: object) -> tuple[str, ...] | None:
    """Returns the labels of an id2label object in their order; None if it is none."""
    if not isinstance(names, dict) or not 0 < len(names) <= MAX_CLASSES:
        return None
    labels = []
    for number in range(len(names)):
        label = names.get(str(number))
        if not isinstance(label, str) or not label:
            return None
        labels.append(label)
    return tuple(labels) if len(set(labels)) == len(labels) else None


def numbered_labels(count: int) -> tuple[str, ...]:
    """Returns what transformers calls labels without names: LABEL_0, LABEL_1, ..."""
    return tuple(f"LABEL_{number}" for number in range(count))


def check_required_values(raw: dict, where: str) -> None:
    """Raises UserError if a key of REQUIRED_VALUES has a value that is not computed here."""
    for key, required in REQUIRED_VALUES.items():
        if raw.get(key) not in (None, required):
            raise UserError(
                f"{where}: {key} {short_repr(raw[key])} is not supported;"
                " delete the key to train without it"
            )


def read_activation(read: "Reader") -> str:
    """Returns our name of the MLP's activation. Raises UserError if it is not computed here."""
    activation = read("hidden_act", str)
    if activation not in HF_ACTIVATIONS:
        known = ", ".join(HF_ACTIVATIONS)
        raise UserError(
            f"{read.where}: hidden_act {short_repr(activation)} is not supported"
            f" (supported: {known})"
        )
    return HF_ACTIVATIONS[activation]


def ignored_settings(raw: dict, family: "Family") -> tuple[str, ...]:
    """Returns the settings of IGNORED_KEYS that are not zero, with their values, as
    "attention_dropout 0.1"."""
    settings = []
    for key in IGNORED_KEYS:
        value = raw.get(key, family.defaults.get(key))
        if type(value) in (int, float) and value:
            settings.append(f"{key} {value}")
    return tuple(settings)


def short_repr(value: object) -> str:
    """Returns the value as a message shows it: at most 80 characters, however large it is."""
    return repr(value)[:80]


class Reader:
    """Typed look-ups in a config.json, by Llama's names of the keys.

    A key that is missing has the family's default.
    """

    def __init__(self, raw: dict, family: "Family", where: str):
        self.raw = raw
        self.family = family
        self.where = where
        # {Llama's key: the key in this file}. A file of another family may use Llama's key all the
        # same.
        self.keys: dict[str, str] = {}
        for key, name in family.keys.items():
            if name in raw or key not in raw:
                self.keys[key] = name

    def __call__(self, key: str, kind: type, default=None):
        """Returns the value; `default` if it is null or missing without a default of the family.

        Raises UserError if it is of another type than `kind`; an int is also a float.
        """
        name = self.keys.get(key, key)
        if name in self.raw:
            value = self.raw[name]
        else:
            value = self.family.defaults.get(key, DEFAULTS.get(key))
        if value is None:
            value = default
        # type() and not isinstance(): a bool is also an int, and no size.
        is_int_as_float = kind is float and type(value) is int
        if value is None or type(value) is kind or is_int_as_float:
            return value
        raise UserError(
            f"{self.where}: {name} is {short_repr(value)}, it must be of type {kind.__name__}"
        )

    def size(self, key: str, default: int | None = None) -> int:
        """Returns a positive integer; raises UserError if it is missing or anything else."""
        return self.positive(key, int, default)

    def number(self, key: str, default: float | None = None) -> float:
        """Returns a positive number; raises UserError if it is missing or anything else."""
        return float(self.positive(key, float, default))

    def positive(self, key: str, kind: type, default):
        """Returns a number above 0 and up to MAX_SIZE, of type `kind`; raises UserError if it is
        missing or anything else."""
        value = self(key, kind, default)
        name = self.keys.get(key, key)
        if value is None:
            raise UserError(f"{self.where}: {name} is missing")
        if not 0 < value <= MAX_SIZE:
            raise UserError(
                f"{self.where}: {name} is {short_repr(value)},"
                f" it must be above 0 and at most {MAX_SIZE:,}"
            )
        return value

    def softcap(self, key: str) -> float | None:
        """Returns a positive number, or None if the key is null or missing."""
        if self(key, float) is None:
            return None
        return self.number(key)

    def windows(self, sliding: Callable[[int], bool], depth: int) -> list[int | None]:
        """Returns the window of each layer: `sliding_window` for sliding layers, None for the
        others.

        `layer_types` says which layers slide. Without it, `sliding` says it: the family's rule, of
        the layer's index.
        """
        types = self("layer_types", list)
        if types is None:
            slides = [sliding(i) for i in range(depth)]
        else:
            are_known = all(kind in ("full_attention", "sliding_attention") for kind in types)
            if len(types) != depth or not are_known:
                raise UserError(
                    f"{self.where}: layer_types must be a list of {depth} entries,"
                    " each full_attention or sliding_attention"
                )
            slides = [kind == "sliding_attention" for kind in types]
        # A model none of whose layers slides may leave sliding_window out.
        if not any(slides):
            return [None] * depth
        window = self.size("sliding_window")
        return [window if slide else None for slide in slides]

    def window(self) -> int | None:
        """Returns the window of a family that has the same one in all layers; None if it is null."""
        if self("sliding_window", int) is None:
            return None
        return self.size("sliding_window")


# ---- rotary positions ----


def read_rope(
    read: Reader, settings: object, head_dim: int, theta_key: str = "rope_theta"
) -> RopeConfig:
    """Returns the rotary positions of one `rope_parameters` or `rope_scaling` object.

    settings: that object, or {}; what it does not say is read from the keys of config.json.
    theta_key: the key that holds theta then.
    Raises UserError on an impossible value and on an unknown kind of scaling.
    """
    where = read.where
    if not isinstance(settings, dict) or has_object(settings):
        raise UserError(
            f"{where}: rope_parameters or rope_scaling is {short_repr(settings)},"
            " it must be an object of plain values"
        )
    # "type" is what transformers 4 called it at first.
    kind = settings.get("rope_type", settings.get("type", "default"))
    is_early_longrope = kind == "su" or (kind == "yarn" and "long_factor" in settings)
    if is_early_longrope:  # Phi-3's earlier names
        kind = "longrope"

    key_in_file = read.keys.get(theta_key, theta_key)
    theta = settings.get("rope_theta", read.raw.get(key_in_file))
    if theta is None:
        theta = read.family.defaults.get(theta_key, DEFAULTS["rope_theta"])
    if type(theta) not in (int, float) or not 1 < theta < 1e30:
        raise UserError(f"{where}: rope_theta is {short_repr(theta)}, it must be a number above 1")

    dim = rotary_dim(read, settings, head_dim)
    scaling = None
    if kind != "default":
        scaling = read_rope_scaling(read, settings, kind, dim)
    return RopeConfig(float(theta), dim, scaling)


def has_object(settings: dict) -> bool:
    """True if a value is an object, as where transformers 5 writes one for each kind of layer."""
    return any(isinstance(value, dict) for value in settings.values())


def rotary_dim(read: Reader, settings: dict, head_dim: int) -> int:
    """Returns how many dimensions of each head are rotated: an even number."""
    where = read.where
    part = settings.get("partial_rotary_factor")
    if part is None:
        part = read("partial_rotary_factor", float, 1.0)
    dim = 0
    if type(part) in (int, float) and 0 < part <= 1:
        dim = int(head_dim * part)
    if dim != head_dim and not read.family.partial_rope:
        model_type = read.raw["model_type"]
        raise UserError(
            f"{where}: partial_rotary_factor {short_repr(part)} is not supported for {model_type}"
        )
    if dim < 2 or dim % 2:
        raise UserError(
            f"{where}: rotary positions would rotate {dim} dimensions of head_dim {head_dim};"
            " that number must be even and at least 2"
        )
    return dim


class RopeKind(NamedTuple):
    """A row of ROPE_KINDS: the positive numbers that the object of one kind of rope scaling holds.

    required: the keys of those that must be there.
    optional: {key: its value where it is missing}.
    has_original: original_max_position_embeddings, the longest text before it was stretched, is
        another; where it is missing, it is max_position_embeddings.
    """

    required: tuple[str, ...]
    optional: dict[str, float | None]
    has_original: bool


# As an optional value, None stands for max_position_embeddings / original_max_position_embeddings.
ROPE_KINDS = {
    "linear": RopeKind(required=("factor",), optional={}, has_original=False),
    "dynamic": RopeKind(required=("factor",), optional={}, has_original=False),
    "llama3": RopeKind(
        required=("factor", "low_freq_factor", "high_freq_factor"),
        optional={},
        has_original=True,
    ),
    "yarn": RopeKind(
        required=(),
        optional={"factor": None, "beta_fast": 32, "beta_slow": 1},
        has_original=True,
    ),
    "longrope": RopeKind(required=(), optional={"factor": None}, has_original=True),
}


# Those that --rope-scaling can switch on: they need nothing but a factor.
ROPE_SCALINGS = ("yarn", "linear", "dynamic")
MAX_ROPE_FACTOR = 1024


def parse_rope_scaling(words: str) -> tuple[str, float]:
    """Returns the kind and the factor of --rope-scaling, as of "yarn=4". Raises UserError."""
    kind, sign, number = words.partition("=")
    wanted = " or ".join(f"{each}=FACTOR" for each in ROPE_SCALINGS)
    if kind not in ROPE_SCALINGS or not sign:
        raise UserError(f"--rope-scaling {words}: {wanted} is wanted, as yarn=4")
    try:
        factor = float(number)
    except ValueError:
        factor = math.nan
    if not 1 < factor <= MAX_ROPE_FACTOR:
        raise UserError(
            f"--rope-scaling {words}: the factor must be above 1 and at most {MAX_ROPE_FACTOR}"
        )
    return kind, factor


def read_rope_scaling(read: Reader, settings: dict, kind: object, dim: int) -> dict:
    """Returns the dict that kernels/rope.py takes as `scaling`.

    settings: the object that says it.
    kind: its rope_type.
    dim: the number of dimensions of a head that are rotated.
    Raises UserError on a kind that is not in ROPE_KINDS and on an impossible value.
    """
    where = read.where

    def number(key: str, default: float | None = None) -> float:
        value = settings.get(key)
        if value is None:
            value = default
        # A bool is an int to Python, and no number of a config.json.
        is_bool = isinstance(value, bool)
        if is_bool or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise UserError(
                f"{where}: rope scaling {short_repr(kind)} needs a positive number as {key},"
                f" not {short_repr(value)}"
            )
        return value

    positions = read.size("max_position_embeddings")
    row = ROPE_KINDS.get(str(kind))
    if row is None:
        known = ", ".join(ROPE_KINDS)
        raise UserError(
            f"{where}: rope scaling {short_repr(kind)} is not supported (supported: {known})"
        )

    # The numbers of the table.
    scaling: dict = {"rope_type": kind}
    original: float = positions
    if row.has_original:
        # A key of config.json itself wins over the key inside the object.
        if read("original_max_position_embeddings", int) is not None:
            original = read.size("original_max_position_embeddings")
        else:
            original = number("original_max_position_embeddings", positions)
        scaling["original_max_position_embeddings"] = original
    for key in row.required:
        scaling[key] = number(key)
    for key, value_if_missing in row.optional.items():
        if value_if_missing is None:
            value_if_missing = positions / original
        scaling[key] = number(key, value_if_missing)

    # What a kind has besides, and what its numbers must fulfil.
    match kind:
        case "dynamic":
            scaling["max_positions"] = positions
            # The stretch of its base is raised to the power dim / (dim - 2).
            if dim <= 2:
                raise UserError(
                    f"{where}: rope scaling dynamic must rotate more than 2 dimensions of a head"
                )
        case "llama3":
            if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
                raise UserError(
                    f"{where}: rope scaling llama3 needs low_freq_factor below high_freq_factor"
                )
        case "yarn":
            scaling["truncate"] = settings.get("truncate", True) is not False
            default = yarn_attention_factor(scaling["factor"], 1)
            # DeepSeek's form of YaRN: a quotient in place of the paper's factor.
            if settings.get("mscale") and settings.get("mscale_all_dim"):
                numerator = yarn_attention_factor(scaling["factor"], number("mscale"))
                divisor = yarn_attention_factor(scaling["factor"], number("mscale_all_dim"))
                default = numerator / divisor
            scaling["attention_factor"] = number("attention_factor", default)
        case "longrope":
            # Only the factor of cosines and sines depends on it: the angles have lists of factors.
            factor = scaling.pop("factor")
            default = 1.0
            if factor > 1 and original > 1:
                default = math.sqrt(1 + math.log(factor) / math.log(original))
            scaling["attention_factor"] = number("attention_factor", default)
            for key in ("short_factor", "long_factor"):
                factors = settings.get(key)
                if not is_list_of_factors(factors, dim // 2):
                    raise UserError(
                        f"{where}: rope scaling longrope needs {dim // 2} positive numbers as {key}"
                    )
                scaling[key] = factors
    return scaling


def yarn_attention_factor(factor: float, mscale: float) -> float:
    """Returns the factor of cosines and sines that YaRN recommends for a stretch of `factor` (Peng
    et al. 2023)."""
    if factor <= 1:
        return 1.0
    return 0.1 * mscale * math.log(factor) + 1.0


def is_list_of_factors(value: object, length: int) -> bool:
    """True for a list of `length` positive numbers."""
    if not isinstance(value, list) or len(value) != length:
        return False
    return all(type(x) in (int, float) and 0 < x < 1e30 for x in value)


def max_context(positions: int, ropes: tuple[RopeConfig, ...]) -> int:
    """Returns how many tokens a text may have.

    That is max_position_embeddings, unless rope scaling stretches it. Files differ in whether they
    hold the old length or the new one; like vLLM, this takes the larger reading.
    """
    for rope in ropes:
        scaling = rope.scaling
        if scaling is None:
            continue
        stretched = positions
        if scaling["rope_type"] in ("linear", "dynamic"):
            stretched = int(positions * scaling["factor"])
        elif scaling["rope_type"] == "yarn":
            stretched = int(scaling["original_max_position_embeddings"] * scaling["factor"])
        positions = max(positions, stretched)
    return positions


# ---- the switches of a family ----


@dataclass(frozen=True)
class Family:
    """A row of FAMILIES.

    architecture: the value of `architectures` for a model with an LM head.
    classifier: that for a model with a score head, as transformers 5.24 names it.
    names: {a module of ours: its published name}; {} stands for the number of a layer or of an
        expert.
    switches: a function of a Reader and the number of layers. It returns the fields of Config that
        differ from Llama's, and may return `windows`, `rope_of`, `scale` and `routed`, the fields
        of Layer: each a value for all layers, or a list with a value for each layer.
    defaults: {Llama's key: the value that this family's config.json may leave out}.
    keys: {Llama's key: this family's key}.
    partial_rope: a part of the dimensions of each head may be rotated.
    wide_mlp: an intermediate_size that is null or missing means 4 x hidden_size.
    """

    architecture: str
    classifier: str
    names: dict[str, str]
    switches: Callable[[Reader, int], dict]
    defaults: dict
    keys: dict[str, str]
    partial_rope: bool
    wide_mlp: bool


def family(
    architecture,
    names,
    switches,
    classifier=None,
    keys=(),
    partial_rope=False,
    wide_mlp=False,
    **defaults,
) -> Family:
    """Returns a row of FAMILIES: the fields of `Family`, with the defaults as keyword arguments.

    classifier: None: the architecture, with the usual name of its other head.
    """
    classifier = classifier or architecture.replace("ForCausalLM", "ForSequenceClassification")
    # The score head is called so in all families.
    names = names | {"score": "score"}
    return Family(
        architecture, classifier, names, switches, defaults, dict(keys), partial_rope, wide_mlp
    )


# Of a family that does not say otherwise: the values that config.json may leave out.
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


def attention_biases(read: Reader) -> dict:
    """Returns the switches of `attention_bias`, one setting for the biases of q, k, v and o."""
    bias = read("attention_bias", bool)
    return {"qkv_bias": bias, "o_bias": bias}


def llama(read: Reader, depth: int) -> dict:
    return attention_biases(read) | {"mlp_bias": read("mlp_bias", bool)}


def mistral(read: Reader, depth: int) -> dict:
    return {"windows": read.window()}


def qwen2(read: Reader, depth: int) -> dict:
    return {"qkv_bias": True, "windows": qwen_windows(read, depth)}


def qwen3(read: Reader, depth: int) -> dict:
    return attention_biases(read) | {"qk_norm": "head", "windows": qwen_windows(read, depth)}


def qwen_windows(read: Reader, depth: int) -> list[int | None]:
    """Returns the windows of a model whose layers from `max_window_layers` on slide, if any do."""
    # Qwen's files name a sliding_window also where it is switched off.
    if not read("use_sliding_window", bool, False):
        return [None] * depth
    first = read("max_window_layers", int, 28)
    return read.windows(lambda i: i >= first, depth)


def gemma(read: Reader, depth: int) -> dict:
    switches = gemma_basics(read)
    # The files of the first Gemma that were released say gelu and mean its tanh form.
    if read("hidden_act", str) == "gelu":
        switches["activation"] = "gelu_tanh"
    return switches


def gemma_basics(read: Reader) -> dict:
    """Returns the switches that all generations of Gemma share."""
    return attention_biases(read) | {
        "norm_offset": 1.0,
        "embed_scale": read.size("hidden_size") ** 0.5,
    }


def gemma2(read: Reader, depth: int) -> dict:
    return gemma_basics(read) | {
        "post_norm": True,
        "windows": read.windows(lambda i: i % 2 == 0, depth),
        "scale": read.number("query_pre_attn_scalar") ** -0.5,
        "attention_softcap": read.softcap("attn_logit_softcapping"),
        "logit_softcap": read.softcap("final_logit_softcapping"),
    }


def gemma3(read: Reader, depth: int) -> dict:
    """Layers of full attention rotate with rope_theta, scaled; sliding layers with
    rope_local_base_freq. Every sixth layer (sliding_window_pattern) has full attention."""
    pattern = read.size("sliding_window_pattern", 6)
    windows = read.windows(lambda i: (i + 1) % pattern != 0, depth)

    # transformers 5 writes one object for each kind of layer, transformers 4 one for full attention
    # alone.
    by_kind = read("rope_parameters", dict, {})
    full = by_kind.get("full_attention") or {}
    local = by_kind.get("sliding_attention") or {}
    older = read("rope_scaling", dict, {})
    if isinstance(full, dict):
        full = full | older
    head_dim = read.size("head_dim")
    ropes = (
        read_rope(read, full, head_dim),
        read_rope(read, local, head_dim, "rope_local_base_freq"),
    )
    return gemma2(read, depth) | {
        "windows": windows,
        "qk_norm": "head",
        "ropes": ropes,
        "rope_of": [0 if window is None else 1 for window in windows],
    }


def phi3(read: Reader, depth: int) -> dict:
    return {"qkv": "stacked", "mlp": "stacked", "windows": read.window()}


def olmo2(read: Reader, depth: int) -> dict:
    return attention_biases(read) | {"pre_norm": False, "post_norm": True, "qk_norm": "whole"}


def smollm3(read: Reader, depth: int) -> dict:
    """The layers with a 0 in no_rope_layers have no rotary positions; by default each layer whose
    number, from 1, is a multiple of no_rope_layer_interval."""
    interval = read.size("no_rope_layer_interval", 4)
    has_rope = read("no_rope_layers", list)
    if not has_rope:
        has_rope = [int((i + 1) % interval != 0) for i in range(depth)]
    are_flags = all(type(flag) is int and flag in (0, 1) for flag in has_rope)
    if len(has_rope) != depth or not are_flags:
        raise UserError(f"{read.where}: no_rope_layers must be a list of {depth} zeros and ones")
    windows = None
    if read("use_sliding_window", bool, False):
        windows = read.windows(lambda i: not has_rope[i], depth)
    rope_of = [0 if flag else None for flag in has_rope]
    return attention_biases(read) | {
        "mlp_bias": read("mlp_bias", bool),
        "rope_of": rope_of,
        "windows": windows,
    }


def read_experts(read: Reader, normalised: bool, size_key: str) -> ExpertsConfig:
    """Returns the experts of a model. size_key: the key of an expert's intermediate_size."""
    count = read.size("num_experts")
    active = read.size("num_experts_per_tok")
    depth = read.size("num_hidden_layers")
    if count * depth > MAX_EXPERTS or active > count:
        limit = f"at most {MAX_EXPERTS} in all layers together"
        raise UserError(
            f"{read.where}: {active} of {count} experts in {depth} layers is not possible here"
            f" ({limit})"
        )
    balance = read("router_aux_loss_coef", float)
    if balance is None:
        balance = 0.0
    elif not 0 <= balance < 1e9:
        raise UserError(
            f"{read.where}: router_aux_loss_coef is {short_repr(balance)},"
            " it must be 0 or more and below 1e9"
        )
    intermediate_size = read.size(size_key)
    return ExpertsConfig(count, active, intermediate_size, normalised, balance)


def mixtral(read: Reader, depth: int) -> dict:
    experts = read_experts(read, True, "intermediate_size")
    return {"windows": read.window(), "routed": True, "experts": experts}


def qwen3_moe(read: Reader, depth: int) -> dict:
    """A layer has experts if its number, from 1, is a multiple of decoder_sparse_step and
    mlp_only_layers does not name its index."""
    step = read.size("decoder_sparse_step", 1)
    without_experts = read("mlp_only_layers", list, [])
    if len(without_experts) > depth:
        raise UserError(
            f"{read.where}: mlp_only_layers names {len(without_experts)} layers,"
            f" the model has {depth}"
        )
    window = None
    if read("use_sliding_window", bool, False):
        window = read.window()
    normalised = read("norm_topk_prob", bool)
    experts = read_experts(read, normalised, "moe_intermediate_size")
    routed = [(i + 1) % step == 0 and i not in without_experts for i in range(depth)]
    return attention_biases(read) | {
        "qk_norm": "head",
        "windows": window,
        "experts": experts,
        "routed": routed,
    }


def gpt2(read: Reader, depth: int) -> dict:
    """Positions are learned, and q, k and v are one matrix. The factor of the scores may fall with
    the layer's number, from 1."""
    heads = read.size("num_attention_heads")
    head_dim = read.size("head_dim", read.size("hidden_size") // heads)
    scale = 1.0
    if read("scale_attn_weights", bool, True):
        scale = head_dim**-0.5
    scales = [scale] * depth
    if read("scale_attn_by_inverse_layer_idx", bool, False):
        scales = [scale / (i + 1) for i in range(depth)]
    return {
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
        "norm": "layer",
        "num_kv_heads": heads,
        "qkv": "stacked",
        "mlp": "plain",
        "learned_positions": True,
        "ropes": (),
        "rope_of": None,
        "scale": scales,
        "conv1d": True,
    }


def neox(read: Reader, depth: int) -> dict:
    return attention_biases(read) | {
        "mlp_bias": True,
        "norm": "layer",
        "num_kv_heads": read.size("num_attention_heads"),
        "qkv": "grouped",
        "mlp": "plain",
        "parallel": read("use_parallel_residual", bool, True),
    }


def falcon(read: Reader, depth: int) -> dict:
    """7B style: one key-value head, one norm for attention and MLP. 40B style
    (new_decoder_architecture): groups of heads, two norms."""
    heads = read.size("num_attention_heads")
    bias = read("bias", bool, False)
    names: dict[str, str] = {}
    if read("new_decoder_architecture", bool, False):
        parallel = True
        num_norms = read("num_ln_in_parallel_attn", int, 2)
        num_kv_heads = read.size("num_key_value_heads", heads)
        if num_norms == 2:
            names = FALCON_TWO_NORMS
    else:
        parallel = read("parallel_attn", bool, True)
        num_norms = 1
        num_kv_heads = heads
        if read("multi_query", bool, True):
            num_kv_heads = 1
    return {
        "qkv_bias": bias,
        "o_bias": bias,
        "mlp_bias": bias,
        "norm": "layer",
        "qkv": "grouped",
        "num_kv_heads": num_kv_heads,
        "mlp": "plain",
        "parallel": parallel,
        "shared_norm": parallel and num_norms == 1,
        "names": names,
    }


# ---- names of tensors ----
# fmt: off

BLOCK_NAMES = "model.layers.{}."
LLAMA_NAMES = {
    "embed": "model.embed_tokens",
    "blocks.{}.attention_norm": BLOCK_NAMES + "input_layernorm",
    "blocks.{}.attention.q": BLOCK_NAMES + "self_attn.q_proj",
    "blocks.{}.attention.k": BLOCK_NAMES + "self_attn.k_proj",
    "blocks.{}.attention.v": BLOCK_NAMES + "self_attn.v_proj",
    "blocks.{}.attention.o": BLOCK_NAMES + "self_attn.o_proj",
    "blocks.{}.mlp_norm": BLOCK_NAMES + "post_attention_layernorm",
    "blocks.{}.mlp.gate": BLOCK_NAMES + "mlp.gate_proj",
    "blocks.{}.mlp.up": BLOCK_NAMES + "mlp.up_proj",
    "blocks.{}.mlp.down": BLOCK_NAMES + "mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
QK_NORM = {
    "blocks.{}.attention.q_norm": BLOCK_NAMES + "self_attn.q_norm",
    "blocks.{}.attention.k_norm": BLOCK_NAMES + "self_attn.k_norm",
}
POST_NORM = {
    "blocks.{}.attention_post_norm": BLOCK_NAMES + "post_attention_layernorm",
    "blocks.{}.mlp_norm": BLOCK_NAMES + "pre_feedforward_layernorm",
    "blocks.{}.mlp_post_norm": BLOCK_NAMES + "post_feedforward_layernorm",
}
FUSED = {
    "blocks.{}.attention.qkv": BLOCK_NAMES + "self_attn.qkv_proj",
    "blocks.{}.mlp.gate_up": BLOCK_NAMES + "mlp.gate_up_proj",
}
MIXTRAL = {
    "blocks.{}.mlp.router": BLOCK_NAMES + "block_sparse_moe.gate",
    "blocks.{}.mlp.experts.{}.gate": BLOCK_NAMES + "block_sparse_moe.experts.{}.w1",
    "blocks.{}.mlp.experts.{}.up": BLOCK_NAMES + "block_sparse_moe.experts.{}.w3",
    "blocks.{}.mlp.experts.{}.down": BLOCK_NAMES + "block_sparse_moe.experts.{}.w2",
}
QWEN_MOE = {
    "blocks.{}.mlp.router": BLOCK_NAMES + "mlp.gate",
    "blocks.{}.mlp.experts.{}.gate": BLOCK_NAMES + "mlp.experts.{}.gate_proj",
    "blocks.{}.mlp.experts.{}.up": BLOCK_NAMES + "mlp.experts.{}.up_proj",
    "blocks.{}.mlp.experts.{}.down": BLOCK_NAMES + "mlp.experts.{}.down_proj",
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
    "llama": family("LlamaForCausalLM", LLAMA_NAMES, llama),
    "mistral": family("MistralForCausalLM", LLAMA_NAMES, mistral,
        num_key_value_heads=8, sliding_window=4096, max_position_embeddings=131_072),
    "qwen2": family("Qwen2ForCausalLM", LLAMA_NAMES, qwen2,
        num_key_value_heads=32, sliding_window=4096, max_position_embeddings=32_768),
    "qwen3": family("Qwen3ForCausalLM", LLAMA_NAMES | QK_NORM, qwen3,
        num_key_value_heads=32, head_dim=128, sliding_window=4096, max_position_embeddings=32_768),
    "gemma": family("GemmaForCausalLM", LLAMA_NAMES, gemma,
        num_key_value_heads=16, head_dim=256, hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True,
        max_position_embeddings=8192),
    "gemma2": family("Gemma2ForCausalLM", LLAMA_NAMES | POST_NORM, gemma2,
        keys={"hidden_act": "hidden_activation"},
        num_key_value_heads=4, head_dim=256, sliding_window=4096, query_pre_attn_scalar=256,
        hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True, max_position_embeddings=8192,
        attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
    "gemma3_text": family("Gemma3ForCausalLM", LLAMA_NAMES | POST_NORM | QK_NORM, gemma3,
        classifier="Gemma3TextForSequenceClassification",
        keys={"hidden_act": "hidden_activation"},
        num_key_value_heads=4, head_dim=256, sliding_window=4096, query_pre_attn_scalar=256,
        hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True, max_position_embeddings=131_072,
        rope_theta=1_000_000.0, rope_local_base_freq=10_000.0),
    "phi3": family("Phi3ForCausalLM", LLAMA_NAMES | FUSED, phi3,
        partial_rope=True,
        rms_norm_eps=1e-5, max_position_embeddings=4096, original_max_position_embeddings=4096),
    "olmo2": family("Olmo2ForCausalLM", LLAMA_NAMES | POST_NORM | QK_NORM, olmo2,
        rms_norm_eps=1e-5),
    "smollm3": family("SmolLM3ForCausalLM", LLAMA_NAMES, smollm3,
        num_key_value_heads=4, rope_theta=2_000_000.0, max_position_embeddings=32_768, tie_word_embeddings=True),
    "gpt2": family("GPT2LMHeadModel", GPT2, gpt2,
        classifier="GPT2ForSequenceClassification",
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
    "mixtral": family("MixtralForCausalLM", LLAMA_NAMES | MIXTRAL, mixtral,
        keys={"num_experts": "num_local_experts"},
        num_key_value_heads=8, num_experts=8, num_experts_per_tok=2, router_aux_loss_coef=0.001,
        rms_norm_eps=1e-5, rope_theta=1_000_000.0, max_position_embeddings=131_072),
    "qwen3_moe": family("Qwen3MoeForCausalLM", LLAMA_NAMES | QK_NORM | QWEN_MOE, qwen3_moe,
        keys={"num_experts": "num_local_experts"},
        num_key_value_heads=4, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=False,
        router_aux_loss_coef=0.001, sliding_window=4096, max_position_embeddings=32_768),
}
