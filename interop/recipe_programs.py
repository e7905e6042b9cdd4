"""torchtune, Axolotl, LLaMA-Factory and trl: how each one's configuration names the data and the
method, and what it does where the file says nothing. (interop/recipe.py does the rest.)

Looked up in their configuration classes and example files, 2024 to 2026. A default stands here only
if it changes the result; what merely takes more or less memory is left to ours.
"""

import json
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from common.known_names import (
    CHAT_TEMPLATE,
    COLUMNS,
    FULL_NOTE,
    METHOD_NOTE,
    OBJECTIVE_NOTE,
    OBJECTIVE_WORDS,
    Counterpart,
    hub_or_file,
)
from interop.recipe_rows import (
    AXOLOTL_ENTRY_KEYS,
    AXOLOTL_ROWS,
    DATA_FORMAT,
    LLAMA_FACTORY_KEYS,
    LLAMA_FACTORY_ROWS,
    OTHER_TRAINERS,
    TORCHTUNE_DATA,
    TORCHTUNE_MLP,
    TORCHTUNE_ROWS,
    TORCHTUNE_TARGETS,
    TRAINER_DEFAULTS,
    TRL_KEYS,
    TRL_ROWS,
    last_name,
)


@dataclass(frozen=True)
class Program:
    """A program whose configuration files are read.

    is_mine(leaves): True if these values, {dotted key: value}, are of one of its files.
    why_no_training(leaves): why they do not train, as of an evaluation; "" if they do.
    read(recipe): deals with what is particular to it: data, method.
    defaults(recipe): {name: value} of what it does where the file says nothing, by names of
        common/known_names.TRAIN_NAMES.
    rows: what its keys are here that the other programs do not have, or mean otherwise.
    """

    name: str
    is_mine: Callable[[Mapping], bool]
    why_no_training: Callable[[Mapping], str]
    read: Callable
    defaults: Callable[..., dict[str, str]]
    rows: Mapping[str, Counterpart] = field(default_factory=dict)


PREFERENCE_WARNING = (
    "WARNING: the file is for {}, which is not there yet: this command would train the preferred"
    " answers by supervised fine-tuning"
)


# ---- what several programs have ----


def hub_data(path: str, subset: str = "", split: str = "") -> str:
    """Returns the words of --data for a file or a data set on the Hub.

    split: "train" is what is read anyway.
    """
    name = hub_or_file(path)
    # Old data sets of the Hub have no owner in their name.
    if re.fullmatch(r"\w+", path) and not Path(path).exists():
        name = f"hf:{path}"
    if name.startswith("hf:"):
        split = "" if split == "train" else split
        if split or subset:
            name += f":{subset}"
        if split:
            name += f":{split}"
    return f"--data {shlex.quote(name)}"


def is_part_of_split(split: str) -> bool:
    """Returns True for a slice, as train[:20%], or a sum of splits."""
    return bool(re.search(r"[\[+]", split))


def read_data_entry(
    recipe, prefix: str, path_key: str, subset_key: str, needless_keys: tuple[str, ...] = ()
) -> None:
    """Deals with one data set that is described by several keys.

    prefix: of these keys, with its dot. path_key, subset_key: the keys without it.
    needless_keys: those that say how the columns and roles are called, which is seen here.
    """
    path = prefix + path_key
    files = f"{prefix}data_files"
    split = f"{prefix}split"
    # "json" and the like name a reader, and data_files the files.
    if recipe.is_open(path):
        names = recipe.text(files) if recipe.is_open(files) else ""
        if names:
            for name in names.split(","):
                recipe.carry(files, f"--data {shlex.quote(name)}")
            recipe.anyway[path] = DATA_FORMAT
        else:
            chosen_split = recipe.text(split)
            if is_part_of_split(chosen_split):
                recipe.left_out[split] = "the whole split is read"
                chosen_split = re.split(r"[\[+]", chosen_split)[0]
            words = hub_data(recipe.text(path), recipe.text(prefix + subset_key), chosen_split)
            recipe.carry(path, words)
            for key in (prefix + subset_key, split):
                if recipe.is_open(key) and words.startswith("--data hf:"):
                    recipe.carry(key, words)
    for key in recipe.open_under(prefix.rstrip(".")):
        name = key.removeprefix(prefix)
        if name.split(".")[0].split("[")[0] in needless_keys:
            recipe.anyway[key] = DATA_FORMAT if name in ("type", "ds_type") else COLUMNS
        elif name == "split":
            recipe.anyway[key] = "the part that is called train is trained"


def numbered(recipe, name: str) -> list[str]:
    """Returns the prefixes name[0]., name[1]., ... of a list of objects in the file."""
    numbers = {re.match(rf"{re.escape(name)}\[(\d+)\]", key) for key in recipe.leaves}
    found = sorted({int(match[1]) for match in numbers if match})
    return [f"{name}[{number}]." for number in found]


def set_method(recipe, method: str, keys: tuple[str, ...]) -> None:
    """Sets --method, which several keys of the file say together."""
    words = f"--method {method}"
    recipe.add(words)
    for key in keys:
        if not recipe.is_open(key):
            continue
        if recipe.text(key) in ("false", "none"):
            recipe.off.append(key)
        else:
            recipe.carried[key] = words


def warn_of_objective(recipe, objective: str) -> None:
    """Notes that the file is for something else than supervised fine-tuning, unless the command has
    it."""
    if "--objective" not in recipe.flags:
        recipe.differs.append(PREFERENCE_WARNING.format(objective))


def say_nothing(leaves: Mapping) -> str:
    """Returns "": there is no file of the program that does not train."""
    return ""


# ---- torchtune ----


def is_torchtune(leaves: Mapping) -> bool:
    return any(key.rpartition(".")[2] == "_component_" for key in leaves)


def why_torchtune_does_not_train(leaves: Mapping) -> str:
    if "optimizer._component_" in leaves:
        return ""
    return "of no training: it has no optimizer"


def read_torchtune(recipe) -> None:
    """Deals with the builders of a torchtune file: of the model, the data, the loss."""
    read_torchtune_model(recipe)
    if recipe.is_open("checkpointer.checkpoint_dir"):
        folder = recipe.text("checkpointer.checkpoint_dir")
        recipe.carry("checkpointer.checkpoint_dir", f"--model {shlex.quote(folder)}")
        recipe.differs.append(
            "--model wants a Hugging Face folder (config.json, safetensors, tokenizer files) or a name"
            " on the Hub"
        )
    for prefix in numbered(recipe, "dataset") or ["dataset."]:
        read_torchtune_data(recipe, prefix)
    for prefix in ("dataset_val.", "val_dataset."):
        for key in recipe.open_under(prefix.rstrip(".")):
            recipe.left_out[key] = "--val names a file of validation examples"
    # The profiler's settings mean nothing where it is off.
    if not recipe.is_true("profiler.enabled"):
        recipe.off += recipe.open_under("profiler")
    # Of the two that stand for one thing here.
    if recipe.is_true("enable_activation_offloading"):
        recipe.carry("enable_activation_offloading", "--activation-checkpointing offload")
        if recipe.is_open("enable_activation_checkpointing"):
            recipe.carried["enable_activation_checkpointing"] = "--activation-checkpointing offload"
    # Where the optimizer has weights in bf16, full fine-tuning has no others.
    loss = last_name(recipe.leaves.get("loss._component_"))
    if loss and "crossentropy" not in loss.lower() and not loss.startswith("CE"):
        words = OBJECTIVE_WORDS.get(loss.removesuffix("Loss").lower())
        if words:
            recipe.carry("loss._component_", words)
        else:
            recipe.left_out["loss._component_"] = OBJECTIVE_NOTE
        warn_of_objective(recipe, loss)


def read_torchtune_model(recipe) -> None:
    """Sets --method and --targets by the builder of the model and its arguments."""
    builder = last_name(recipe.leaves.get("model._component_"))
    is_quantized = builder.startswith(("qlora_", "qdora_")) or recipe.is_true("model.quantize_base")
    has_adapter = is_quantized or builder.startswith(("lora_", "dora_"))
    method = "full"
    if has_adapter:
        method = "qlora" if is_quantized else "lora"
    set_method(recipe, method, ("model._component_", "model.quantize_base"))
    if builder.startswith(("dora_", "qdora_")):
        problem = recipe.add("--dora")
        if problem:
            recipe.differs.append(f"WARNING: the file is for DoRA, and {problem}")
    if not has_adapter:
        return
    keys = ("model.lora_attn_modules", "model.apply_lora_to_mlp", "model.apply_lora_to_output")
    if not recipe.is_open(keys[0]):
        return
    targets = []
    for module in recipe.text(keys[0]).split(","):
        name = TORCHTUNE_TARGETS.get(module, module)
        if name not in targets:
            targets.append(name)
    if recipe.is_true(keys[1]):
        targets += TORCHTUNE_MLP
    everything = {*TORCHTUNE_TARGETS.values(), *TORCHTUNE_MLP}
    if recipe.is_true(keys[2]):
        targets.append("lm_head")
    words = "all" if set(targets) == everything else ",".join(targets)
    recipe.carry(keys[0], f"--targets {shlex.quote(words)}")
    for key in keys[1:]:
        if recipe.is_true(key):
            recipe.carry(key, f"--targets {shlex.quote(words)}")
        elif recipe.is_open(key):
            recipe.off.append(key)


def read_torchtune_data(recipe, prefix: str) -> None:
    """Deals with one data set. prefix: of its keys, with its dot."""
    component = f"{prefix}_component_"
    builder = last_name(recipe.leaves.get(component))
    source = f"{prefix}source"
    if recipe.is_open(source):
        read_data_entry(recipe, prefix, "source", "name")
        if recipe.is_open(component):
            recipe.anyway[component] = DATA_FORMAT
    elif builder in TORCHTUNE_DATA:
        path, subset = TORCHTUNE_DATA[builder]
        recipe.carry(component, hub_data(path, subset, recipe.text(f"{prefix}split")))
        if recipe.is_open(f"{prefix}split"):
            recipe.anyway[f"{prefix}split"] = "the part that is called train is trained"
    elif recipe.is_open(component):
        recipe.left_out[component] = "--data names the file, or hf:org/name on the Hub"
    if builder.startswith("alpaca") and f"{prefix}train_on_input" not in recipe.leaves:
        # Unlike its other builders.
        recipe.filled["train_on_input"] = "--train-on all-turns"
        recipe.add("--train-on all-turns")
    for name in (
        "conversation_style",
        "conversation_column",
        "column_map",
        "template",
        "chat_format",
    ):
        for key in recipe.open_under(prefix + name):
            recipe.anyway[key] = COLUMNS
    if prefix == "dataset.":
        return
    for key in recipe.open_under(prefix.rstrip(".")):
        # The rows of the one data set hold for each of several.
        row = TORCHTUNE_ROWS.get("dataset." + key.removeprefix(prefix))
        if row is not None:
            recipe.take(key, row)


def torchtune_defaults(recipe) -> dict[str, str]:
    """Returns what torchtune does where the file says nothing."""
    defaults = {"max_grad_norm": "0", "gradient_accumulation_steps": "1", "packing": "false"}
    # torch.optim.AdamW's own.
    defaults["weight_decay"] = "0.01"
    defaults["val_set_size"] = "0"
    if "lr_scheduler._component_" not in recipe.leaves:
        defaults |= {"lr_scheduler_type": "constant", "warmup_steps": "0"}
    defaults |= {"lora_rank": "8", "lora_alpha": "16", "lora_dropout": "0"}
    if recipe.text("tokenizer.max_seq_len") == "":
        recipe.differs.append("torchtune limits no example without max_seq_len; see --seq-len")
    return defaults


# ---- Axolotl ----


def is_axolotl(leaves: Mapping) -> bool:
    return "base_model" in leaves


def read_axolotl(recipe) -> None:
    """Deals with adapter and datasets of an Axolotl file."""
    adapter = recipe.text("adapter").lower()
    is_quantized = adapter == "qlora" or recipe.is_true("load_in_4bit")
    known = {"": "full", "lora": "lora", "qlora": "qlora"}
    if adapter in known:
        method = "qlora" if adapter and is_quantized else known[adapter]
        set_method(recipe, method, ("adapter",))
        if adapter and recipe.is_open("load_in_4bit"):
            set_method(recipe, method, ("load_in_4bit",))
        elif recipe.is_true("load_in_4bit"):
            recipe.left_out["load_in_4bit"] = "all weights are trained, which 4 bits can't hold"
    else:
        recipe.left_out["adapter"] = METHOD_NOTE
    for name in ("datasets", "pretraining_dataset"):
        for prefix in numbered(recipe, name):
            read_data_entry(recipe, prefix, "path", "name", AXOLOTL_ENTRY_KEYS)
            read_chat_template(recipe, f"{prefix}chat_template")
        if recipe.is_open(name):
            recipe.carry(name, hub_data(recipe.text(name)))
    prefixes = numbered(recipe, "test_datasets")
    for number, prefix in enumerate(prefixes):
        path = f"{prefix}data_files" if recipe.is_open(f"{prefix}data_files") else f"{prefix}path"
        if number == 0 and recipe.is_open(path):
            recipe.carry(path, f"--val {shlex.quote(hub_or_file(recipe.text(path)))}")
        read_data_entry(recipe, prefix, "", "", (*AXOLOTL_ENTRY_KEYS, "path"))
        for key in recipe.open_under(prefix.rstrip(".")):
            recipe.left_out[key] = "--val takes one file"
    read_objective(recipe, "rl")


def read_chat_template(recipe, key: str) -> None:
    """Deals with the chat template of one data set."""
    if not recipe.is_open(key):
        return
    if recipe.text(key) == "tokenizer_default":
        recipe.anyway[key] = CHAT_TEMPLATE
    else:
        recipe.left_out[key] = CHAT_TEMPLATE


def read_objective(recipe, key: str) -> None:
    """Deals with a key that names what is minimized."""
    objective = recipe.text(key).lower()
    if not recipe.is_open(key):
        return
    if objective in ("sft", "pt"):
        recipe.anyway[key] = "texts are trained whole, and of conversations the answers"
        return
    words = OBJECTIVE_WORDS.get(objective)
    # LLaMA-Factory's stage dpo has several losses, one of which another key names.
    loss = recipe.text("pref_loss").lower()
    if objective == "dpo" and recipe.is_open("pref_loss"):
        words = f"--objective {loss}" if loss in OBJECTIVE_WORDS else words
        if loss not in (*OBJECTIVE_WORDS, "sigmoid"):
            recipe.left_out["pref_loss"] = OBJECTIVE_NOTE
        else:
            recipe.carried["pref_loss"] = words or ""
    if words:
        recipe.carry(key, words)
    else:
        recipe.left_out[key] = OBJECTIVE_NOTE
    warn_of_objective(recipe, objective)


def axolotl_defaults(recipe) -> dict[str, str]:
    """Returns what Axolotl does where the file says nothing. Its warm-up then depends on the run."""
    defaults = {
        **TRAINER_DEFAULTS,
        "micro_batch_size": "1",
        "num_epochs": "1",
        "lr_scheduler": "cosine",
        "sequence_len": "512",
        "val_set_size": "0",
        "lora_dropout": "0",
    }
    for name in ("per_device_train_batch_size", "num_train_epochs", "lr_scheduler_type"):
        del defaults[name]
    del defaults["warmup_steps"]
    # It has to be in the file.
    del defaults["learning_rate"]
    return defaults


# ---- LLaMA-Factory ----


def is_llama_factory(leaves: Mapping) -> bool:
    return "model_name_or_path" in leaves and any(key in leaves for key in LLAMA_FACTORY_KEYS)


def why_llama_factory_does_not_train(leaves: Mapping) -> str:
    if leaves.get("do_train") is True or ("stage" in leaves and leaves.get("dataset")):
        return ""
    return "of no training: do_train is not true"


def read_llama_factory(recipe) -> None:
    """Deals with stage, finetuning_type and dataset of a LLaMA-Factory file."""
    kind = recipe.text("finetuning_type").lower() or "lora"
    is_quantized = recipe.text("quantization_bit") == "4"
    if kind in ("lora", "full"):
        method = "qlora" if kind == "lora" and is_quantized else kind
        set_method(recipe, method, ("finetuning_type",))
        if is_quantized and kind == "lora":
            set_method(recipe, method, ("quantization_bit",))
    else:
        recipe.left_out["finetuning_type"] = f"{METHOD_NOTE}; {FULL_NOTE}"
    folder = Path(recipe.text("dataset_dir") or "data")
    described = described_data(folder)
    for key, flag in (("dataset", "--data"), ("eval_dataset", "--val")):
        if not recipe.is_open(key):
            continue
        places = []
        for name in recipe.text(key).split(","):
            name = name.strip()
            places.append(described.get(name, name))
            if name not in described:
                recipe.differs.append(
                    f"WARNING: {name} is a name in {folder / 'dataset_info.json'}, which does not lead to"
                    f" it from here: put its file, or hf:org/name, in its place behind {flag}"
                )
        recipe.carry(key, f"{flag} {shlex.join(places)}")
    read_objective(recipe, "stage")


def described_data(folder: Path) -> dict[str, str]:
    """Returns {name: file or hf:org/name} of a LLaMA-Factory data folder; {} if it is not there."""
    try:
        entries = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    places = {}
    for name, entry in entries.items() if isinstance(entries, dict) else ():
        if not isinstance(entry, dict):
            continue
        if isinstance(entry.get("file_name"), str):
            places[name] = str(folder / entry["file_name"])
        elif isinstance(entry.get("hf_hub_url"), str):
            places[name] = f"hf:{entry['hf_hub_url']}"
    return places


def llama_factory_defaults(recipe) -> dict[str, str]:
    """Returns what LLaMA-Factory does where the file says nothing."""
    rank = recipe.text("lora_rank") or "8"
    alpha = str(2 * int(rank)) if rank.isdigit() else "16"
    return {
        **TRAINER_DEFAULTS,
        "cutoff_len": "2048",
        "val_size": "0",
        "lora_rank": "8",
        "lora_alpha": alpha,
        "lora_dropout": "0",
    }


# ---- trl, and the Trainer ----


def is_trl(leaves: Mapping) -> bool:
    return sum(key in leaves for key in TRL_KEYS) >= 2


def read_trl(recipe) -> None:
    """Deals with the method and the data of a trl file, or of the alignment handbook's."""
    is_quantized = recipe.is_true("load_in_4bit")
    has_adapter = recipe.is_true("use_peft")
    method = "full"
    if has_adapter:
        method = "qlora" if is_quantized else "lora"
    set_method(recipe, method, ("use_peft",))
    if has_adapter:
        set_method(recipe, method, ("load_in_4bit",))
    elif is_quantized:
        recipe.left_out["load_in_4bit"] = "all weights are trained, which 4 bits can't hold"
    revision = recipe.text("model_revision")
    if revision and revision != "main" and recipe.is_open("model_name_or_path"):
        name = recipe.text("model_name_or_path")
        for key in ("model_name_or_path", "model_revision"):
            recipe.carry(key, f"--model {shlex.quote(f'{name}@{revision}')}")
    elif revision:
        recipe.anyway["model_revision"] = "the newest revision is taken"
    if recipe.is_open("dataset_name"):
        subset_key = (
            "dataset_config" if "dataset_config" in recipe.leaves else "dataset_config_name"
        )
        keys = ("dataset_name", subset_key, "dataset_train_split")
        name, subset, split = (recipe.text(key) for key in keys)
        words = hub_data(name, subset, split)
        for key in keys:
            if recipe.is_open(key):
                recipe.carry(key, words)
    for name, path_key, subset_key in (
        ("datasets", "path", "name"),
        ("dataset_mixture.datasets", "id", "config"),
    ):
        for prefix in numbered(recipe, name):
            read_data_entry(recipe, prefix, path_key, subset_key, ("columns",))
            weight = f"{prefix}weight"
            if recipe.text(weight) == "1":
                recipe.anyway[weight] = "all records are read"
            elif recipe.is_open(weight):
                recipe.left_out[weight] = (
                    "all records are read; --data FILE=W gives a relative weight"
                )
    for key in recipe.open_under("dataset_mixer"):
        recipe.carry(key, hub_data(key.removeprefix("dataset_mixer.")))
        if recipe.text(key) != "1":
            recipe.differs.append(
                f"{key}: a share of {recipe.text(key)} there; here all records are read"
            )
    for key in recipe.open_under("dataset_splits"):
        recipe.left_out[key] = "a split is a part of the name: --data hf:org/name:subset:split"
    if "num_generations" in recipe.leaves:
        # A script of trl's says in Python what rewards.
        recipe.add(OBJECTIVE_WORDS["grpo"])
        return
    trained_as = {purpose for key, purpose in OTHER_TRAINERS.items() if key in recipe.leaves}
    for purpose in sorted(trained_as):
        warn_of_objective(recipe, purpose)


def trl_defaults(recipe) -> dict[str, str]:
    """Returns what trl's SFTTrainer does where the file says nothing."""
    defaults = {
        **TRAINER_DEFAULTS,
        "learning_rate": "2e-5",
        "max_length": "1024",
        "lora_r": "16",
        "lora_alpha": "32",
        "lora_dropout": "0.05",
    }
    if "eval_strategy" not in recipe.leaves and "evaluation_strategy" not in recipe.leaves:
        defaults["val_set_size"] = "0"
    if recipe.is_true("use_peft") and recipe.text("lora_target_modules") == "":
        recipe.differs.append(
            "without lora_target_modules peft adapts a few layers that it has for each family, mostly"
            " q_proj and v_proj; here it is every linear of the blocks (--targets)"
        )
    masks = ("assistant_only_loss", "completion_only_loss", "train_on_responses_only")
    if not any(key in recipe.leaves for key in masks):
        recipe.differs.append(
            "trl trains whole conversations unless assistant_only_loss is set; here only the answers"
            " are trained, and --train-on all-turns comes near to it"
        )
    return defaults


OTHER_PROGRAMS = (
    Program(
        "torchtune",
        is_torchtune,
        why_torchtune_does_not_train,
        read_torchtune,
        torchtune_defaults,
        TORCHTUNE_ROWS,
    ),
    Program("Axolotl", is_axolotl, say_nothing, read_axolotl, axolotl_defaults, AXOLOTL_ROWS),
    Program(
        "LLaMA-Factory",
        is_llama_factory,
        why_llama_factory_does_not_train,
        read_llama_factory,
        llama_factory_defaults,
        LLAMA_FACTORY_ROWS,
    ),
    Program("trl", is_trl, say_nothing, read_trl, trl_defaults, TRL_ROWS),
)
