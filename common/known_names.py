"""What options of other programs are called here: for people who know those, in both directions.

The names are those of the Trainer (transformers, trl), Axolotl, LLaMA-Factory and torchtune, with
underscores. Whoever types one as a flag is answered with ours (common/cli.py), and a configuration
file of theirs becomes a command line by them (`python convert.py recipe`, interop/recipe.py). A
name is a row of a table below; a row may name an option that a script does not have, and then
nothing is offered.
"""

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from common.choices import METHOD_NAMES

# What is written for true.
TRUE = ("true", "yes", "on", "1")


@dataclass(frozen=True)
class Counterpart:
    """What an option of another program is here.

    flag: the option here, with its dashes; "": there is none.
    words: from a value of theirs, as text, to the words to type here (quoted for a shell), "" where
        nothing is to be typed and None where nothing here means it; None: the flag, and the value
        as it is.
    note: a clause for people: what is different, or what is done instead.
    needless: True if what it asks for is done anyway.
    bare: the words to type for the option without a value, as of a switch; "": it needs one.
    """

    flag: str = ""
    words: Callable[[str], str | None] | None = None
    note: str = ""
    needless: bool = False
    bare: str = ""

    def translate(self, value: str) -> str | None:
        """Returns the words to type for a value, "" for none; None if nothing here means it."""
        if self.words is not None:
            return self.words(value)
        if self.flag:
            return f"{self.flag} {shlex.quote(value)}"
        return "" if self.needless else None


def same(flag: str, note: str = "") -> Counterpart:
    """Returns the row of an option that has another name and takes the same values."""
    return Counterpart(flag, note=note)


def chosen(flag: str, words: Mapping[str, str], note: str = "") -> Counterpart:
    """Returns the row of an option whose values are called otherwise.

    words: {their value in small letters: the words to type here}. Other values have no counterpart.
    """
    return Counterpart(
        flag, lambda value: words.get(value.lower()), note, bare=words.get(TRUE[0], "")
    )


def computed(flag: str, words: Callable[[str], str | None], note: str = "") -> Counterpart:
    """Returns the row of an option whose value must be computed."""
    return Counterpart(flag, words, note)


def needless(note: str) -> Counterpart:
    """Returns the row of an option for what is done here anyway."""
    return Counterpart(note=note, needless=True)


def missing(note: str) -> Counterpart:
    """Returns the row of an option that has no counterpart."""
    return Counterpart(note=note)


# ---- values that must be computed ----


def data_words(value: str) -> str:
    """Returns --data for a file, or for the name of a data set on the Hub."""
    return "--data " + shlex.quote(hub_or_file(value))


def hub_or_file(name: str) -> str:
    """Returns hf:org/name for what looks like the name of a data set on the Hub; else the name."""
    is_hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith(".")
    has_suffix = re.search(r"\.(json|jsonl|csv|tsv|txt|parquet|arrow|zst|gz)$", name)
    if is_hub_name and not has_suffix and not Path(name).exists():
        return f"hf:{name}"
    return name


def share_words(value: str) -> str | None:
    """Returns --val-fraction for a share; None for a number of examples."""
    share = as_number(value)
    if share is None or not 0 <= share < 1:
        return None
    return f"--val-fraction {share:g}"


def step_words(value: str) -> str | None:
    """Returns --steps; "" for -1, which the Trainer takes for none."""
    number = as_number(value)
    if number is None:
        return None
    return f"--steps {number:g}" if number > 0 else ""


def warmup_words(value: str) -> str | None:
    """Returns --warmup for a number of steps; None for a share of them, as transformers 5 allows."""
    number = as_number(value)
    if number is None or 0 < number < 1:
        return warmup_share_words(value)
    return f"--warmup {number:g}"


def warmup_share_words(value: str) -> str | None:
    """Returns the words for a share of the steps, where it is 0 or what is the default here."""
    share = as_number(value)
    if share == 0:
        return "--warmup 0"
    return "" if share == 0.05 else None


def rope_words(value: str) -> str | None:
    """Returns --rope-scaling for a kind with its factor; None for a kind alone."""
    return f"--rope-scaling {shlex.quote(value)}" if "=" in value else None


def interval_words(flag: str) -> Callable[[str], str | None]:
    """Returns a function to the words for a number of steps, but for no share of them."""

    def words(value: str) -> str | None:
        number = as_number(value)
        if number is None or 0 < number < 1:
            return None
        return f"{flag} {number:g}"

    return words


def listed_names(value: str) -> list[str]:
    """Returns names that are separated by commas or spaces, with or without brackets and quotes."""
    return [name for name in re.split(r"[\s,\[\]'\"]+", value) if name]


def target_words(value: str) -> str:
    """Returns --targets for names of layers that are separated by commas or spaces."""
    names = listed_names(value)
    if names in (["all-linear"], ["all"]):
        return "--targets all"
    return "--targets " + shlex.quote(",".join(names))


def parameter_words(value: str) -> str:
    """Returns --target-parameters for names of parameters that are separated by commas or spaces."""
    names = listed_names(value)
    return f"--target-parameters {shlex.quote(','.join(names))}" if names else ""


def saved_module_words(value: str) -> str | None:
    """Returns --modules-to-save for names of embeddings and output heads; None for other modules."""
    names = listed_names(value)
    known = {"embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings"}
    if not {name.rpartition(".")[2] for name in names} <= known:
        return None
    return f"--modules-to-save {shlex.quote(','.join(names))}" if names else ""


def push_words(value: str) -> str | None:
    """Returns --push for org/name; None for a name alone, whose owner is not known."""
    return f"--push {shlex.quote(value)}" if re.fullmatch(r"[\w.-]+/[\w.-]+", value) else None


def beta_words(usual: float) -> Callable[[str], str | None]:
    """Returns a function to "" for the value that AdamW has here, and to None for others."""
    return lambda value: "" if as_number(value) == usual else None


def as_number(value: str) -> float | None:
    """Returns the number that a text is, or None."""
    try:
        return float(value)
    except ValueError:
        return None


# ---- train.py ----


def switch(on: str, off: str = "", note: str = "") -> Counterpart:
    """Returns the row of something that is true or false. on, off: the words for each."""
    words = dict.fromkeys(TRUE, on) | dict.fromkeys(("false", "no", "off", "0", "none"), off)
    return chosen(on.partition(" ")[0], words, note)


def unless_true(note: str) -> Counterpart:
    """Returns the row of something that is never done here, so that only true has no counterpart."""
    words = dict.fromkeys(("false", "no", "off", "0", "none"), "")
    return Counterpart(words=lambda value: words.get(value.lower()), note=note)


IN_NAME = "is a part of the name: --data hf:org/name:subset:split"
CHAT_TEMPLATE = "the model's own chat template is used; for a model without one, --template alpaca, chatml or plain"
PROCESSES = "FSDP2 is used: `torchrun --nproc-per-node N train.py` starts a process for each GPU, see --shard"
LOGGED = "every step is a line of metrics.jsonl"
LIMITED = "--limit N trains on N examples of all files together, drawn by --seed"
TRUNCATED = "--truncate says what becomes of a long conversation: no answer is ever cut"
CACHED = "token rows are cached by what is in the files"
READING = "as many processes read as pay off"
NO_PADDING = "nothing is padded"
FAST_ATTENTION = "the fastest attention of PyTorch for the device is used; versions 3 and 4: --attention flash3, flash4"
FAST_KERNELS = "kernels of this kind are always used"
COLUMNS = "columns are recognized by looking; --map renames others"
NO_PUSH = "results stay on this machine, in --out, unless --push org/name is given"
SCHEDULE_NOTE = "--schedule is cosine, linear or constant, and falls to 0"
WARMUP_NOTE = "--warmup counts steps; without it, they are 5 % of the run's"
EPOCH_NOTE = "it counts steps; without it, a fifth of the run"
OPTIMIZER_NOTE = "--optimizer is adamw, adamw8bit or muon"
MASK_NOTE = (
    "user messages are trained as well; system messages and the template's own words are not"
)
FULL_NOTE = "--method full --train REGEX trains the parameters whose names match"
ADAMW_NOTE = "AdamW has betas 0.9 and 0.999 and epsilon 1e-8"

METHOD_WORDS = {
    "lora": "--method lora",
    "qlora": "--method qlora",
    "full": "--method full",
    "fft": "--method full",
    "none": "--method full",
    "ia3": "--method ia3",
    "prompt_tuning": "--method prompt-tuning",
    "p_tuning": "--method p-tuning",
    "prefix_tuning": "--method prefix-tuning",
    "adapter": "--method bottleneck",
    "bottleneck": "--method bottleneck",
}
METHOD_NOTE = f"--method is {', '.join(METHOD_NAMES[:-1])} or {METHOD_NAMES[-1]}"
SCHEDULE_WORDS = {
    "cosine": "--schedule cosine",
    "cosine_with_warmup": "--schedule cosine",
    "cosine_with_min_lr": "--schedule cosine",
    "linear": "--schedule linear",
    "linear_with_warmup": "--schedule linear",
    "constant": "--schedule constant",
    "constant_with_warmup": "--schedule constant",
}
OPTIMIZER_WORDS = {
    **dict.fromkeys(
        (
            "adamw",
            "adamw_torch",
            "adamw_torch_fused",
            "adamw_hf",
            "paged_adamw",
            "paged_adamw_32bit",
        ),
        "--optimizer adamw",
    ),
    **dict.fromkeys(
        ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "adamw8bit", "pagedadamw8bit"),
        "--optimizer adamw8bit",
    ),
    "muon": "--optimizer muon",
}
DTYPE_WORDS = {
    **dict.fromkeys(
        ("bf16", "bfloat16", "bf16-mixed", "bf16-true", "torch.bfloat16"), "--dtype bf16"
    ),
    **dict.fromkeys(("fp32", "float32", "32", "32-true", "no", "torch.float32"), "--dtype fp32"),
    "auto": "--dtype auto",
}
OBJECTIVE_WORDS = {
    "sft": "", "pt": "", "pretrain": "", "rm": "--objective reward", "dft": "--objective dft",
    "grpo": "--objective grpo --reward FILE.py:NAME",
} | {name: f"--objective {name}" for name in ("dpo", "ipo", "orpo", "simpo", "kto")}  # fmt: skip
OBJECTIVE_NOTE = "this loss is not there; of reinforcement learning, --objective grpo is"
CHECKPOINTING_WORDS = {
    **dict.fromkeys(TRUE, "--activation-checkpointing full"),
    **dict.fromkeys(("unsloth", "offload", "offload_disk"), "--activation-checkpointing offload"),
    **dict.fromkeys(("false", "none", "no"), "--activation-checkpointing none"),
}

MODEL_AND_DATA = {
    "model_name_or_path": same("--model"),
    "model_name": same("--model"),
    "model_id": same("--model"),
    "model_path": same("--model"),
    "pretrained_model_name_or_path": same("--model"),
    "base_model": same("--model"),
    "model_revision": missing("is a part of the name: --model org/model@revision"),
    "revision_of_model": missing("is a part of the name: --model org/model@revision"),
    "tokenizer_name_or_path": missing("the tokenizer is the one in the model's folder"),
    "tokenizer_name": missing("the tokenizer is the one in the model's folder"),
    "tokenizer_config": missing("the tokenizer is the one in the model's folder"),
    "trust_remote_code": unless_true("code from a model's folder is never run"),
    "dataset_name": computed("--data", data_words),
    "dataset": computed("--data", data_words),
    "datasets": computed("--data", data_words),
    "dataset_path": computed("--data", data_words),
    "data_path": same("--data"),
    "data_files": same("--data"),
    "train_file": same("--data"),
    "train_files": same("--data"),
    "train_data": same("--data"),
    "train_dataset": computed("--data", data_words),
    "validation_file": same("--val"),
    "valid_file": same("--val"),
    "eval_file": same("--val"),
    "val_file": same("--val"),
    "val_data": same("--val"),
    "eval_dataset": same("--val"),
    "dataset_config": missing(IN_NAME),
    "dataset_config_name": missing(IN_NAME),
    "dataset_train_split": missing(IN_NAME),
    "dataset_test_split": missing(IN_NAME),
    "dataset_split": missing(IN_NAME),
    "dataset_text_field": needless(COLUMNS),
    "val_set_size": computed("--val-fraction", share_words, "it takes a share, not a number"),
    "val_size": computed("--val-fraction", share_words, "it takes a share, not a number"),
    "test_size": computed("--val-fraction", share_words, "it takes a share, not a number"),
    "max_seq_length": same("--seq-len"),
    "max_seq_len": same("--seq-len"),
    "max_length": same("--seq-len"),
    "model_max_length": same("--seq-len"),
    "cutoff_len": same("--seq-len"),
    "sequence_len": same("--seq-len"),
    "sequence_length": same("--seq-len"),
    "block_size": same("--seq-len"),
    "packing": switch("--pack", "--no-pack"),
    "packed": switch("--pack", "--no-pack"),
    "sample_packing": switch("--pack", "--no-pack"),
    "neat_packing": switch("--pack", "--no-pack"),
    "pack_sequences": switch("--pack", "--no-pack"),
    "chat_template": chosen(
        "--template",
        {"tokenizer_default": "", "alpaca": "--template alpaca", "chatml": "--template chatml"},
        CHAT_TEMPLATE,
    ),
    "chat_template_path": missing(CHAT_TEMPLATE),
    "chat_template_jinja": missing(CHAT_TEMPLATE),
    "prompt_template": missing(CHAT_TEMPLATE),
    "default_system": same("--system"),
    "system_prompt": same("--system"),
    "truncation_mode": missing(TRUNCATED),
    "truncation_side": missing(TRUNCATED),
    "train_on_inputs": switch("--train-on all-turns", "--train-on answers", MASK_NOTE),
    "train_on_input": switch("--train-on all-turns", "--train-on answers", MASK_NOTE),
    "train_on_prompt": switch("--train-on all-turns", "--train-on answers", MASK_NOTE),
    "mask_history": switch("--train-on last-answer"),
    "assistant_only_loss": switch("--train-on answers", "--train-on all-turns", MASK_NOTE),
    "completion_only_loss": switch("--train-on answers", "--train-on all-turns", MASK_NOTE),
    "train_on_responses_only": switch("--train-on answers", "--train-on all-turns", MASK_NOTE),
    "max_samples": missing(LIMITED),
    "max_train_samples": missing(LIMITED),
    "streaming": needless("files of any size are read piece by piece"),
    "overwrite_cache": needless(CACHED),
    "dataset_prepared_path": needless(CACHED),
    "tokenized_path": needless(CACHED),
    "preprocessing_num_workers": needless(READING),
    "preprocessing_batch_size": needless(READING),
    "dataset_num_proc": needless(READING),
    "dataset_processes": needless(READING),
    "dataloader_num_workers": needless(READING),
    "dataloader_pin_memory": needless(READING),
    "dataloader_prefetch_factor": needless(READING),
    "dataloader_persistent_workers": needless(READING),
    "shuffle": Counterpart(
        words=lambda value: "" if value.lower() in TRUE else None,
        note="examples are always shuffled, in an order that follows from --seed",
    ),
    "shuffle_dataset": needless(
        "examples are always shuffled, in an order that follows from --seed"
    ),
    "group_by_length": needless(f"{NO_PADDING}, so that lengths need not be alike"),
    "pad_to_sequence_len": needless(NO_PADDING),
    "pad_to_multiple_of": needless(NO_PADDING),
    "padding_free": needless(NO_PADDING),
    "pad_token": needless(NO_PADDING),
    "remove_unused_columns": needless(COLUMNS),
}

METHOD = {
    "finetuning_type": chosen("--method", METHOD_WORDS, METHOD_NOTE),
    "peft_type": chosen("--method", METHOD_WORDS, METHOD_NOTE),
    "train_type": chosen("--method", METHOD_WORDS, METHOD_NOTE),
    "use_peft": switch("--method lora", "--method full"),
    "use_lora": switch("--method lora", "--method full"),
    "use_qlora": switch("--method qlora"),
    "load_in_4bit": switch("--method qlora"),
    "use_4bit": switch("--method qlora"),
    "load_in_8bit": unless_true("a frozen base is in 16 bits, or with --method qlora in 4"),
    "quantization_bit": chosen("--method", {"4": "--method qlora"}, "--method qlora is in 4 bits"),
    "quantization_method": chosen("--quant", {"bnb": "", "bitsandbytes": ""}, "--quant is nf4"),
    "quantization_type": chosen("--quant", {"nf4": ""}, "--quant is nf4"),
    "bnb_4bit_quant_type": chosen("--quant", {"nf4": ""}, "--quant is nf4"),
    "bnb_4bit_use_double_quant": Counterpart(
        words=lambda value: "" if value.lower() in TRUE else None,
        note="the scales of NF4 are always quantized as well",
    ),
    "use_bnb_nested_quant": Counterpart(
        words=lambda value: "" if value.lower() in TRUE else None,
        note="the scales of NF4 are always quantized as well",
    ),
    "bnb_4bit_compute_dtype": chosen("--dtype", DTYPE_WORDS, "--dtype is bf16, fp32 or auto"),
    "lora_r": same("--rank"),
    "lora_rank": same("--rank"),
    "peft_lora_r": same("--rank"),
    "lora_alpha": same("--alpha"),
    "peft_lora_alpha": same("--alpha"),
    "lora_dropout": same("--dropout"),
    "peft_lora_dropout": same("--dropout"),
    "lora_target": computed("--targets", target_words),
    "lora_target_modules": computed("--targets", target_words),
    "target_modules": computed("--targets", target_words),
    "target_parameters": computed("--target-parameters", parameter_words),
    "lora_target_parameters": computed("--target-parameters", parameter_words),
    "lora_target_linear": switch("--targets all"),
    "use_dora": switch("--dora"),
    "peft_use_dora": switch("--dora"),
    "use_rslora": switch("--rslora"),
    "peft_use_rslora": switch("--rslora"),
    "peft_layers_to_transform": computed(
        "--layers", lambda value: f"--layers {re.sub('[^0-9,]', '', value)}"
    ),
    "peft_init_lora_weights": chosen(
        "--init", {"true": "", "gaussian": "", "pissa": "--init pissa", "loftq": "--init loftq"}
    ),
    "lora_bias": chosen("", {"none": ""}, "biases are not trained by --method lora"),
    "loraplus_lr_ratio": same("--lora-plus"),
    "pissa_init": switch("--init pissa"),
    "modules_to_save": computed("--modules-to-save", saved_module_words),
    "lora_modules_to_save": computed("--modules-to-save", saved_module_words),
    "additional_target": computed("--modules-to-save", saved_module_words),
    "embedding_learning_rate": same("--embedding-lr"),
    "embedding_lr": same("--embedding-lr"),
    "lora_fan_in_fan_out": needless("how a layer stores its weight is known of each family"),
    "adapter_name_or_path": same("--adapter"),
    "lora_model_dir": same("--adapter"),
    "freeze_trainable_layers": missing(FULL_NOTE),
    "unfrozen_parameters": missing(FULL_NOTE),
    "stage": chosen("--objective", OBJECTIVE_WORDS, OBJECTIVE_NOTE),
    "rl": chosen("--objective", OBJECTIVE_WORDS, OBJECTIVE_NOTE),
    "pref_loss": chosen(
        "--objective", OBJECTIVE_WORDS | {"sigmoid": "--objective dpo"}, OBJECTIVE_NOTE
    ),
    "simpo_gamma": same("--margin"),
    "num_generations": same("--group-size"),
    "max_completion_length": same("--max-new-tokens"),
    "kto_chosen_weight": same("--desirable-weight"),
    "kto_desirable_weight": same("--desirable-weight"),
    "kto_rejected_weight": same("--undesirable-weight"),
    "kto_undesirable_weight": same("--undesirable-weight"),
    "dpo_label_smoothing": same("--label-smoothing"),
    "label_smoothing_factor": same("--label-smoothing"),
    "pref_beta": same("--beta"),
    "rl_beta": same("--beta"),
    "beta": same("--beta"),
    "neftune_noise_alpha": same("--neftune"),
    "rope_scaling": computed(
        "--rope-scaling", rope_words, "with its factor, as yarn=4; without it, as config.json says"
    ),
    "noisy_embedding_alpha": same("--neftune"),
}

OPTIMIZATION = {
    "per_device_train_batch_size": same("--batch-size"),
    "per_gpu_train_batch_size": same("--batch-size"),
    "train_batch_size": same("--batch-size"),
    "micro_batch_size": same("--batch-size"),
    "device_batch_size": same("--batch-size"),
    "batch_size": same("--batch-size"),
    "per_device_eval_batch_size": needless("validation takes --batch-size, with the same result"),
    "eval_batch_size": needless("validation takes --batch-size, with the same result"),
    "gradient_accumulation_steps": same("--accumulate"),
    "gradient_accumulation": same("--accumulate"),
    "accumulation_steps": same("--accumulate"),
    "accumulate_grad_batches": same("--accumulate"),
    "grad_accum": same("--accumulate"),
    "global_batch_size": missing("a step is --batch-size x --accumulate x processes"),
    "auto_find_batch_size": missing("`--plan` says what fits"),
    "num_train_epochs": same("--epochs"),
    "num_epochs": same("--epochs"),
    "max_epochs": same("--epochs"),
    "epochs": same("--epochs"),
    "max_steps": computed("--steps", step_words),
    "max_train_steps": computed("--steps", step_words),
    "num_train_steps": computed("--steps", step_words),
    "max_steps_per_epoch": missing(
        "an epoch is a pass over all data; --steps N ends the run earlier"
    ),
    "learning_rate": same("--lr"),
    "lr": same("--lr"),
    "lr_scheduler_type": chosen("--schedule", SCHEDULE_WORDS, SCHEDULE_NOTE),
    "lr_scheduler": chosen("--schedule", SCHEDULE_WORDS, SCHEDULE_NOTE),
    "scheduler": chosen("--schedule", SCHEDULE_WORDS, SCHEDULE_NOTE),
    "lr_scheduler_kwargs": missing(SCHEDULE_NOTE),
    "cosine_min_lr_ratio": missing(SCHEDULE_NOTE),
    "min_lr": missing(SCHEDULE_NOTE),
    "warmup_steps": computed("--warmup", warmup_words, WARMUP_NOTE),
    "num_warmup_steps": computed("--warmup", warmup_words, WARMUP_NOTE),
    "lr_warmup_steps": computed("--warmup", warmup_words, WARMUP_NOTE),
    "warmup_ratio": computed("--warmup", warmup_share_words, WARMUP_NOTE),
    "weight_decay": same("--weight-decay"),
    "optim": chosen("--optimizer", OPTIMIZER_WORDS, OPTIMIZER_NOTE),
    "optimizer": chosen("--optimizer", OPTIMIZER_WORDS, OPTIMIZER_NOTE),
    "optim_args": missing(OPTIMIZER_NOTE),
    "adam_beta1": computed("", beta_words(0.9), ADAMW_NOTE),
    "adam_beta2": computed("", beta_words(0.999), ADAMW_NOTE),
    "adam_epsilon": computed("", beta_words(1e-8), ADAMW_NOTE),
    "adam_eps": computed("", beta_words(1e-8), ADAMW_NOTE),
    "max_grad_norm": same("--clip"),
    "gradient_clip_val": same("--clip"),
    "gradient_clipping": same("--clip"),
    "clip_grad_norm": same("--clip"),
    "grad_clip": same("--clip"),
    "seed": same("--seed"),
    "data_seed": same("--seed"),
    "random_seed": same("--seed"),
    "random_state": same("--seed"),
    "average_tokens_across_devices": needless("a step's loss is always a mean over all its tokens"),
    "num_items_in_batch": needless("a step's loss is always a mean over all its tokens"),
}

EVALUATION_AND_SAVING = {
    "output_dir": same("--out"),
    "output_path": same("--out"),
    "save_dir": same("--out"),
    "save_path": same("--out"),
    "checkpoint_dir": missing("--model is what is read, --out the folder of the run"),
    "overwrite_output_dir": switch("--overwrite"),
    "do_train": needless("train.py trains"),
    "do_eval": needless("a part of the data validates, see --val-fraction"),
    "eval_steps": computed("--eval-every", interval_words("--eval-every"), EPOCH_NOTE),
    "eval_interval": computed("--eval-every", interval_words("--eval-every"), EPOCH_NOTE),
    "val_check_interval": computed("--eval-every", interval_words("--eval-every"), EPOCH_NOTE),
    "eval_strategy": chosen(
        "--eval-every", {"steps": "", "no": "--val-fraction 0"}, f"--eval-every: {EPOCH_NOTE}"
    ),
    "evaluation_strategy": chosen(
        "--eval-every", {"steps": "", "no": "--val-fraction 0"}, f"--eval-every: {EPOCH_NOTE}"
    ),
    "evals_per_epoch": missing(f"--eval-every: {EPOCH_NOTE}"),
    "save_steps": computed("--save-every", interval_words("--save-every"), EPOCH_NOTE),
    "checkpointing_steps": computed("--save-every", interval_words("--save-every"), EPOCH_NOTE),
    "save_strategy": chosen(
        "--save-every", {"steps": "", "no": "--save-every 0"}, f"--save-every: {EPOCH_NOTE}"
    ),
    "saves_per_epoch": missing(f"--save-every: {EPOCH_NOTE}"),
    "save_total_limit": same("--keep"),
    "save_only_model": needless(
        "final/ and best/ hold the model alone, checkpoints all of the run"
    ),
    "save_safetensors": needless("weights are always saved as safetensors"),
    "save_adapter_weights_only": needless("with LoRA, only the adapter is saved"),
    "load_best_model_at_end": needless(
        "the best validated weights are in best/, the last in final/"
    ),
    "metric_for_best_model": chosen(
        "--eval-metric",
        {
            **dict.fromkeys(("loss", "eval_loss"), ""),
            **dict.fromkeys(("exact_match", "eval_exact_match"), "--eval-metric exact"),
            **dict.fromkeys(("rouge1", "eval_rouge1"), "--eval-metric rouge"),
            **dict.fromkeys(("bleu", "eval_bleu", "sacrebleu"), "--eval-metric bleu"),
            **dict.fromkeys(("chrf", "eval_chrf"), "--eval-metric chrf"),
            **dict.fromkeys(("meteor", "eval_meteor"), "--eval-metric meteor"),
        },
        "best/ is by validation loss, or by the score of generated answers (--eval-metric)",
    ),
    "early_stopping_patience": same("--patience"),
    "resume_from_checkpoint": switch(
        "--resume", "", "--resume goes on from the newest checkpoint in --out"
    ),
    "auto_resume_from_checkpoints": switch("--resume auto"),
    "report_to": chosen(
        "--wandb",
        {
            "wandb": "--wandb plaintune",
            "['wandb']": "--wandb plaintune",
            "tensorboard": "--tensorboard",
            "['tensorboard']": "--tensorboard",
            "none": "",
            "[]": "",
        },
        "--wandb PROJECT logs to Weights & Biases, --tensorboard writes event files, metrics.jsonl is"
        " written anyway",
    ),
    "use_tensorboard": switch("--tensorboard"),
    "wandb_project": same("--wandb"),
    "wandb_name": missing("--wandb names the project alone"),
    "run_name": missing("--out names the run"),
    "logging_steps": needless(f"{LOGGED}; --log-every N prints one of every N steps"),
    "logging_strategy": needless(LOGGED),
    "logging_first_step": needless(LOGGED),
    "logging_dir": needless(f"{LOGGED}, in --out"),
    "log_level": needless(LOGGED),
    "log_every_n_steps": needless(f"{LOGGED}; --log-every N prints one of every N steps"),
    "log_peak_memory_stats": needless(LOGGED),
    "include_num_input_tokens_seen": needless(LOGGED),
    "include_mfu": needless(LOGGED),
    "plot_loss": needless("loss.png is always drawn"),
    "push_to_hub": unless_true(NO_PUSH),
    "hub_model_id": computed("--push", push_words, NO_PUSH),
    "hub_strategy": missing(NO_PUSH),
    "hub_token": missing("set HF_TOKEN in the environment"),
    "hf_token": missing("set HF_TOKEN in the environment"),
    "cache_dir": missing("set HF_HOME, or PLAINTUNE_CACHE for what is converted"),
    "config": missing(
        "settings are flags; `python convert.py recipe FILE` makes them of a configuration file"
    ),
    "config_file": missing(
        "settings are flags; `python convert.py recipe FILE` makes them of a configuration file"
    ),
}

MACHINE = {
    "bf16": chosen(
        "--dtype",
        dict.fromkeys((*TRUE, "full"), "--dtype bf16") | {"auto": "--dtype auto", "false": ""},
    ),
    "fp16": unless_true("float16 overflows and is not offered; --dtype bf16 or fp32"),
    "float16": unless_true("float16 overflows and is not offered; --dtype bf16 or fp32"),
    "bfloat16": switch("--dtype bf16"),
    "torch_dtype": chosen("--dtype", DTYPE_WORDS, "--dtype is bf16, fp32 or auto"),
    "dtype": chosen("--dtype", DTYPE_WORDS, "--dtype is bf16, fp32 or auto"),
    "precision": chosen("--dtype", DTYPE_WORDS, "--dtype is bf16, fp32 or auto"),
    "mixed_precision": chosen("--dtype", DTYPE_WORDS, "--dtype is bf16, fp32 or auto"),
    "pure_bf16": switch("--weights bf16"),
    "tf32": unless_true("fp32 products keep all their bits; --dtype bf16 is faster"),
    "gradient_checkpointing": chosen("--activation-checkpointing", CHECKPOINTING_WORDS),
    "use_gradient_checkpointing": chosen("--activation-checkpointing", CHECKPOINTING_WORDS),
    "enable_activation_checkpointing": chosen("--activation-checkpointing", CHECKPOINTING_WORDS),
    "activation_checkpointing": chosen("--activation-checkpointing", CHECKPOINTING_WORDS),
    "gradient_checkpointing_kwargs": needless("there is one kind of autograd underneath"),
    "enable_activation_offloading": switch("--activation-checkpointing offload"),
    "activation_offloading": switch("--activation-checkpointing offload"),
    "torch_compile": switch("--compile on", "--compile off"),
    "compile": switch("--compile on", "--compile off"),
    "torch_compile_backend": chosen("", {"inductor": ""}, "--compile takes inductor"),
    "full_determinism": switch("--deterministic"),
    "device_map": missing(PROCESSES),
    "device": chosen(
        "--device", {name: f"--device {name}" for name in ("auto", "cpu", "cuda", "mps")}
    ),
    "use_cpu": switch("--device cpu"),
    "no_cuda": switch("--device cpu"),
    "deepspeed": missing(PROCESSES),
    "fsdp": missing(PROCESSES),
    "fsdp_config": missing(PROCESSES),
    "fsdp_version": missing(PROCESSES),
    "fsdp_cpu_offload": switch("--shard-offload"),
    "num_processes": missing(PROCESSES),
    "nproc_per_node": missing(PROCESSES),
    "num_gpus": missing(PROCESSES),
    "local_rank": missing(PROCESSES),
    "ddp_find_unused_parameters": needless("the gradients of all ranks are summed in one call"),
    "ddp_timeout": same("--timeout", "in seconds"),
    "ddp_backend": needless("chosen by the device"),
    "sequence_parallel_size": same("--context-parallel"),
    "context_parallel_size": same("--context-parallel"),
    "attn_implementation": needless(FAST_ATTENTION),
    "attn": needless(FAST_ATTENTION),
    "flash_attn": needless(FAST_ATTENTION),
    "flash_attention": needless(FAST_ATTENTION),
    "use_flash_attention_2": needless(FAST_ATTENTION),
    "sdp_attention": needless(FAST_ATTENTION),
    "xformers_attention": needless(FAST_ATTENTION),
    "use_liger_kernel": needless(FAST_KERNELS),
    "use_liger": needless(FAST_KERNELS),
    "enable_liger_kernel": needless(FAST_KERNELS),
    "use_unsloth": needless(FAST_KERNELS),
    "use_cache": needless("training needs no KV cache"),
}

TRAIN_NAMES = MODEL_AND_DATA | METHOD | OPTIMIZATION | EVALUATION_AND_SAVING | MACHINE

# ---- the other scripts ----

OF_A_MODEL = {
    "model_name_or_path": same("--model"),
    "model_name": same("--model"),
    "model_path": same("--model"),
    "base_model": same("--model"),
    "pretrained": same("--model"),
    "adapter_name_or_path": same("--adapter"),
    "lora": same("--adapter"),
    "lora_path": same("--adapter"),
    "lora_model_dir": same("--adapter"),
    "peft": same("--adapter"),
    "peft_model": same("--adapter"),
    "load_in_4bit": switch("--quant nf4"),
    "load_in_8bit": unless_true("--quant is in 4 bits"),
    "chat_template": MODEL_AND_DATA["chat_template"],
    "torch_dtype": MACHINE["torch_dtype"],
    "bf16": MACHINE["bf16"],
    "trust_remote_code": MODEL_AND_DATA["trust_remote_code"],
    "flash_attn": needless(FAST_ATTENTION),
    "attn_implementation": needless(FAST_ATTENTION),
    "device_map": same("--device"),
}
GENERATE_NAMES = OF_A_MODEL | {
    "max_length": same("--max-new-tokens", "the prompt does not count"),
    "n_predict": same("--max-new-tokens"),
    "num_tokens": same("--max-new-tokens"),
    "temp": same("--temperature"),
    "do_sample": switch("--temperature 1"),
    "repeat_penalty": same("--repetition-penalty"),
    "system_prompt": same("--system"),
    "input": same("--prompt"),
    "text": same("--prompt"),
    "num_beams": missing("answers are drawn token by token, without beams"),
    "stream": needless("answers are printed while they are generated"),
    "prompt_lookup_num_tokens": same("--lookup"),
    "stop": missing("an answer ends where the model ends it"),
}
EVALUATE_NAMES = OF_A_MODEL | {
    "dataset": same("--data"),
    "eval_dataset": same("--data"),
    "data_path": same("--data"),
    "test_file": same("--data"),
    "validation_file": same("--data"),
    "per_device_eval_batch_size": same("--batch-size"),
    "eval_batch_size": same("--batch-size"),
    "max_seq_length": same("--seq-len"),
    "max_length": same("--seq-len"),
    "cutoff_len": same("--seq-len"),
    "max_samples": same("--limit"),
    "max_eval_samples": same("--limit"),
    "n_samples": same("--samples"),
    "num_samples": same("--samples"),
    "confirm_run_unsafe_code": switch("--allow-code-execution"),
    "tasks": missing(
        "`choices --data FILE --task NAME` asks MMLU, HellaSwag, ARC and other multiple choice of a file"
    ),
    "num_fewshot": same(
        "--shots",
        "`choices` takes it; --shots-data FILE holds the examples, of MMLU its dev folder",
    ),
}
