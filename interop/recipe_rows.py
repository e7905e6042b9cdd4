"""What the keys of torchtune, Axolotl, LLaMA-Factory and trl are here that are not options of all of
them (those are in common/known_names.py), and the names of torchtune's builders.

A key is dotted as it is nested in their files. A row of a key holds for what is below it as well.
"""

from common.known_names import (
    CHAT_TEMPLATE,
    FAST_KERNELS,
    FULL_NOTE,
    PROCESSES,
    SCHEDULE_NOTE,
    TRAIN_NAMES,
    Counterpart,
    chosen,
    missing,
    needless,
    same,
    switch,
    unless_true,
)

DATA_FORMAT = "formats are recognized by looking, see `python data.py inspect`"
TOKENIZER = "the tokenizer and the weights are read from the model's folder"
NEW_TOKENS = "new tokens are read from a file, one on each line: --add-tokens FILE"
LOGGING = needless("every step is a line of metrics.jsonl")
OVERWRITE = missing("--overwrite would replace an earlier run in --out; add it if you mean that")

# The Trainer's, which Axolotl, LLaMA-Factory and trl are made of.
TRAINER_DEFAULTS = {
    "per_device_train_batch_size": "8",
    "gradient_accumulation_steps": "1",
    "num_train_epochs": "3",
    "learning_rate": "5e-5",
    "lr_scheduler_type": "linear",
    "warmup_steps": "0",
    "weight_decay": "0",
    "max_grad_norm": "1",
    "optim": "adamw_torch",
    "seed": "42",
    "packing": "false",
}


def last_name(component: object) -> str:
    """Returns lora_llama3_1_8b of torchtune.models.llama3_1.lora_llama3_1_8b."""
    return str(component or "").rpartition(".")[2]


# ---- torchtune ----

# The data sets that its builders read if the file names no other.
TORCHTUNE_DATA = {
    "alpaca_dataset": ("tatsu-lab/alpaca", ""),
    "alpaca_cleaned_dataset": ("yahma/alpaca-cleaned", ""),
    "grammar_dataset": ("liweili/c4_200m", ""),
    "samsum_dataset": ("Samsung/samsum", ""),
    "slimorca_dataset": ("Open-Orca/SlimOrca-Dedup", ""),
    "stack_exchange_paired_dataset": ("lvwerra/stack-exchange-paired", ""),
    "hh_rlhf_helpful_dataset": ("RLHFlow/HH-RLHF-Helpful-standard", ""),
    "wikitext_dataset": ("EleutherAI/wikitext_document_level", "wikitext-103-v1"),
}
TORCHTUNE_TARGETS = {
    "q_proj": "q_proj",
    "k_proj": "k_proj",
    "v_proj": "v_proj",
    "output_proj": "o_proj",
}
TORCHTUNE_MLP = ("gate_proj", "up_proj", "down_proj")
TORCHTUNE_ROWS = {
    "optimizer.lr": same("--lr"),
    "optimizer.weight_decay": same("--weight-decay"),
    "optimizer.fused": needless("AdamW is fused where it can be"),
    "optimizer._component_": Counterpart(
        "--optimizer",
        lambda value: {
            "adamw": "--optimizer adamw",
            "pagedadamw": "--optimizer adamw",
            "adamw8bit": "--optimizer adamw8bit",
            "pagedadamw8bit": "--optimizer adamw8bit",
        }.get(last_name(value).lower()),
        "--optimizer is adamw, adamw8bit or muon",
    ),
    "optimizer_in_bwd": unless_true("--optimizer-offload or --optimizer adamw8bit save as much"),
    "lr_scheduler._component_": Counterpart(
        "--schedule",
        lambda value: (
            "--schedule cosine" if last_name(value) == "get_cosine_schedule_with_warmup" else None
        ),
        SCHEDULE_NOTE,
    ),
    "lr_scheduler.num_warmup_steps": same("--warmup"),
    "loss": needless("the loss is cross-entropy, computed in chunks of the vocabulary's logits"),
    "model.lora_rank": same("--rank"),
    "model.lora_alpha": same("--alpha"),
    "model.lora_dropout": same("--dropout"),
    "model.use_dora": switch("--dora"),
    "tokenizer.max_seq_len": same("--seq-len"),
    "tokenizer.prompt_template": missing(CHAT_TEMPLATE),
    "tokenizer": needless(TOKENIZER),
    "checkpointer.output_dir": needless("all that a run writes is in --out"),
    "checkpointer.adapter_checkpoint": missing(
        "--resume goes on with a run, --adapter with an adapter"
    ),
    "checkpointer.recipe_checkpoint": missing("--resume goes on with the run in --out"),
    "checkpointer": needless(TOKENIZER),
    "dataset.packed": switch("--pack", "--no-pack"),
    "dataset.train_on_input": switch("--train-on all-turns", "--train-on answers"),
    "dataset.max_seq_len": same("--seq-len"),
    "dataset.new_system_prompt": same("--system"),
    "metric_logger.project": same("--wandb"),
    "metric_logger": LOGGING,
    "profiler": missing("--profile N looks at a run's first N steps"),
    "enable_activation_checkpointing": chosen(
        "--activation-checkpointing", {"true": "--activation-checkpointing full", "false": ""}
    ),
    "enable_activation_offloading": switch("--activation-checkpointing offload"),
    "custom_sharded_layers": missing(PROCESSES),
    "fsdp_sharding_strategy": missing(PROCESSES),
    "fsdp_reshard_after_forward": missing(PROCESSES),
    "tensor_parallel_dim": missing(PROCESSES),
    "data_parallel_shard_dim": missing(PROCESSES),
    "data_parallel_replicate_dim": missing(PROCESSES),
    "log_level": LOGGING,
    "save_adapter_weights_only": needless("with LoRA, only the adapter is saved"),
    "keep_last_n_checkpoints": same("--keep"),
    "memory_efficient_fsdp_wrap": missing(PROCESSES),
    "ac_mode": missing("--activation-checkpointing is none, selective, full or offload"),
    "ac_option": missing("--activation-checkpointing is none, selective, full or offload"),
}

# ---- Axolotl ----

AXOLOTL_ENTRY_KEYS = (
    "type", "ds_type", "field_messages", "field_instruction", "field_input", "field_output",
    "field_system", "field_chosen", "field_rejected", "field", "message_property_mappings",
    "message_field_role", "message_field_content", "roles", "conversation", "field_human",
    "field_model", "trust_remote_code",
)  # fmt: skip
AXOLOTL_ROWS = {
    "batch_size": missing("a step is --batch-size x --accumulate x processes"),
    "model_type": needless(TOKENIZER),
    "tokenizer_type": needless(TOKENIZER),
    "base_model_config": missing(TOKENIZER),
    "is_llama_derived_model": needless(TOKENIZER),
    "is_mistral_derived_model": needless(TOKENIZER),
    "is_qwen_derived_model": needless(TOKENIZER),
    "is_falcon_derived_model": needless(TOKENIZER),
    "special_tokens.pad_token": needless("nothing is padded"),
    "special_tokens": missing("the special tokens are those of the model's own tokenizer"),
    "tokens": missing(NEW_TOKENS),
    "eot_tokens": needless("the end of each answer, as the chat template writes it, is trained"),
    "roles_to_train": missing("--train-on says which parts of a conversation are trained"),
    "train_on_eos": missing("the end of each answer is trained"),
    "plugins": missing("there are no plugins"),
    "fsdp_config.fsdp_offload_params": switch("--shard-offload"),
    "fsdp_config.offload_params": switch("--shard-offload"),
    "liger_rope": needless(FAST_KERNELS),
    "liger_rms_norm": needless(FAST_KERNELS),
    "liger_glu_activation": needless(FAST_KERNELS),
    "liger_swiglu": needless(FAST_KERNELS),
    "liger_layer_norm": needless(FAST_KERNELS),
    "liger_cross_entropy": needless(FAST_KERNELS),
    "liger_fused_linear_cross_entropy": needless(FAST_KERNELS),
    "cut_cross_entropy": needless(FAST_KERNELS),
    "lora_mlp_kernel": needless(FAST_KERNELS),
    "lora_qkv_kernel": needless(FAST_KERNELS),
    "lora_o_kernel": needless(FAST_KERNELS),
    "flash_attn_cross_entropy": needless(FAST_KERNELS),
    "flash_attn_rms_norm": needless(FAST_KERNELS),
    "flash_attn_fuse_qkv": needless(FAST_KERNELS),
    "flash_attn_fuse_mlp": needless(FAST_KERNELS),
    "attention": needless("the fastest attention of PyTorch for the device is used"),
    "eval_sample_packing": needless("validation has the same result, packed or not"),
    "eval_table_size": missing("`python evaluate.py exact` prints answers"),
    "loss_watchdog_threshold": missing("a step whose loss or gradient is no number is skipped"),
    "loss_watchdog_patience": missing("a step whose loss or gradient is no number is skipped"),
    "save_first_step": missing("--save-every counts steps"),
    "strict": needless("a key that is not known is named here"),
    "lora_on_cpu": needless("weights are read straight to where they are computed with"),
    "wandb_entity": missing("--wandb names the project alone"),
    "wandb_run_id": missing("--wandb names the project alone"),
    "wandb_watch": missing("--wandb names the project alone"),
    "wandb_log_model": missing("--wandb names the project alone"),
    "shuffle_merged_datasets": needless("examples are always shuffled"),
    "unfrozen_parameters": missing(FULL_NOTE),
}

# ---- LLaMA-Factory ----

LLAMA_FACTORY_KEYS = (
    "stage",
    "finetuning_type",
    "cutoff_len",
    "dataset_dir",
    "lora_target",
    "template",
)
LLAMA_FACTORY_ROWS = {
    "template": chosen("--template", {"alpaca": "--template alpaca"}, CHAT_TEMPLATE),
    "enable_thinking": missing(CHAT_TEMPLATE),
    "overwrite_output_dir": OVERWRITE,
    "dataset_dir": needless("--data names the files themselves"),
    "media_dir": missing("pictures are not trained"),
    "train_on_prompt": switch("--train-on all-turns"),
    "mix_strategy": missing("--data FILE=W gives a file the weight W"),
    "interleave_probs": missing("--data FILE=W gives a file the weight W"),
    "new_special_tokens": missing(NEW_TOKENS),
    "resize_vocab": needless("the embedding table grows where new tokens need it"),
    "freeze_vision_tower": needless("only text is read"),
    "freeze_multi_modal_projector": needless("only text is read"),
    "disable_gradient_checkpointing": switch("--activation-checkpointing none"),
    "use_muon": switch("--optimizer muon"),
    **dict.fromkeys(
        ("use_galore", "use_apollo", "use_badam", "use_adam_mini"),
        unless_true("--optimizer is adamw, adamw8bit or muon"),
    ),
    "upcast_layernorm": needless("norms are computed in fp32"),
    "double_quantization": needless("the scales of NF4 are always quantized as well"),
    "predict_with_generate": missing("`python evaluate.py exact` lets the model answer"),
}

# ---- trl, and the Trainer ----

TRL_KEYS = (
    "model_name_or_path", "dataset_name", "per_device_train_batch_size", "learning_rate", "output_dir",
    "num_train_epochs", "use_peft", "max_steps",
)  # fmt: skip
# Keys that only other trainers than SFTTrainer have, and what those do.
OTHER_TRAINERS = {
    "beta": "preference optimization (DPO or the like)",
    "max_prompt_length": "preference optimization (DPO or the like)",
    "desirable_weight": "KTO",
    "reward_model_path": "PPO",
}
TRL_ROWS = {
    "env": missing("set it in the shell"),
    "overwrite_output_dir": OVERWRITE,
    "dataset_kwargs": missing("data are read as they are"),
    "eos_token": missing(CHAT_TEMPLATE),
    "eval_packing": needless("validation has the same result, packed or not"),
    "packing_strategy": needless("whole examples are packed, none is cut to fit"),
    "use_liger": needless(FAST_KERNELS),
    "gradient_checkpointing_use_reentrant": needless("there is one kind of autograd underneath"),
    "dataset_mixture.seed": missing("--seed decides the order of all examples"),
    "dataset_mixture.test_split_size": missing("--val-fraction takes a share of the prompts"),
    "test_split_size": TRAIN_NAMES["test_size"],
    "dataset_streaming": needless("files of any size are read piece by piece"),
    "lora_task_type": needless("language models are trained"),
    "hub_private_repo": missing("results stay on this machine, in --out"),
    "hub_model_revision": missing("results stay on this machine, in --out"),
}
