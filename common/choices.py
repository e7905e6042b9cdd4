"""The words that options take, without what they stand for: --help is to be answered before torch is
imported, which takes seconds.

The files named beside them hold what the words mean. Where that is a table, its keys are these
words: tests/test_words.py compares them.
"""

# --method: methods.METHODS.
METHOD_NAMES = (
    "full", "lora", "qlora", "vera", "bottleneck", "prompt-tuning", "p-tuning", "prefix-tuning", "ia3",
)  # fmt: skip
# --objective: objectives.OBJECTIVES.
OBJECTIVE_NAMES = (
    "sft",
    "dft",
    "dpo",
    "ipo",
    "kto",
    "orpo",
    "simpo",
    "reward",
    "classify",
    "grpo",
    "distill",
)
# --lr: by training/lr_probe.py.
AUTO = "auto"
# --divergence: kernels/divergence.py. --teacher SELF: the model itself, before step 1.
DIVERGENCES = ("forward", "reverse")
SELF = "self"
# --placement: adapters.PLACEMENTS. --encoder and --prompt-init: adapters.py.
PLACEMENT_NAMES = ("houlsby", "pfeiffer", "parallel")
ENCODER_NAMES = ("none", "mlp", "lstm")
# --init: lora.Variant.
LORA_STARTS = ("random", "pissa", "loftq")
PROMPT_STARTS = ("vocabulary", "random")
PROMPT_TEXT = "text:"  # stands before a text of one's own
# --template: tokenization/chat_template.NAMED.
TEMPLATE_NAMES = ("alpaca", "chatml", "plain")
# --optimizer and --schedule: optimizers.DESCRIPTIONS, optimizers.SCHEDULES.
OPTIMIZER_NAMES = ("adamw", "adamw8bit", "muon")
SCHEDULE_NAMES = ("cosine", "linear", "constant")
# In a run's folder: the file of --add-tokens as it was, for a resume.
ADDED_TOKENS = "added_tokens.txt"
# --targets: every linear of the blocks, but not the output head, which is the embedding table in
# many models (lora.py).
ALL = "all"
ALL_LINEAR = "all-linear"  # peft's word for the same
# --quant: what of a frozen model is in 4 bits (quant.py).
QUANT_KINDS = ("nf4", "nf4+head")
# --dtype of what is computed, and of weights that are stored: common/device.py.
DTYPE_NAMES = ("fp32", "bf16")
STORAGE_DTYPE_NAMES = ("fp32", "fp16", "bf16")
# --activation-checkpointing (kernels/activation_checkpointing.py).
CHECKPOINTING_KINDS = ("none", "selective", "full", "offload")
# --attention, beside auto: kernels/flash_versions.VERSIONS.
FLASH_NAMES = ("flash3", "flash4")
# --eval-metric: the rows of evals/table.EVALUATIONS for which the model writes answers.
EVAL_METRICS = (
    "exact", "f1", "numeric", "bleu", "chrf", "rouge", "meteor", "code-similarity", "json", "tools",
)  # fmt: skip
# --type of convert.py: interop/gguf_export.TYPES.
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
