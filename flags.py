"""Every option of train.py, declared once: type, default, range, help, what a resume may change.

`Flags` is what was typed. What was left open (None) is chosen by training/defaults.py, which
returns `Settings`; neither is ever written to. An option is a line of the class `Flags`; `SECTIONS`
puts them under headings in --help.
"""

import argparse
import dataclasses
import functools
import importlib.util
import os
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from common.choices import (
    ADDED_TOKENS,
    ALL,
    AUTO,
    CHECKPOINTING_KINDS,
    DIVERGENCES,
    DTYPE_NAMES,
    ENCODER_NAMES,
    EVAL_METRICS,
    FLASH_NAMES,
    LORA_STARTS,
    METHOD_NAMES,
    OBJECTIVE_NAMES,
    OPTIMIZER_NAMES,
    PLACEMENT_NAMES,
    PROMPT_STARTS,
    PROMPT_TEXT,
    QUANT_KINDS,
    SCHEDULE_NAMES,
    STORAGE_DTYPE_NAMES,
)
from common.cli import parse_args
from common.errors import UserError
from common.files import HUB_NAME
from common.folder_lock import find_holder
from common.known_names import TRAIN_NAMES
from common.remote_names import is_remote, saved_name, shown, split_remote
from dataset.examples import TRAIN_ON, TRUNCATE
from dataset.oasst import TREES
from families import parse_rope_scaling
from tokenization.chat_template import NAMED
from tokenizer import EMPTY_THINK, check_date

# The defaults of a new adapter, of whatever method. One that --adapter names has values of its own.
NEW_ADAPTER = {
    "rank": 8,
    "alpha": 16.0,
    "dropout": 0.0,
    "targets": ALL,
    "target_parameters": None,
    "layers": None,
    "rank_pattern": None,
    "alpha_pattern": None,
    "rslora": False,
    "dora": False,
    "init": "random",
    "placement": "pfeiffer",
    "reduction_factor": 16.0,
    "virtual_tokens": 20,
    "prompt_init": "vocabulary",
    "encoder": "mlp",
    "encoder_size": None,
    "add_tokens": None,
    "train_tokens": None,
    "modules_to_save": None,
}
# The share of the prompts that validate, where --val is not given.
VAL_FRACTION = 0.05
# Any number on the command line must be below this.
MAX_NUMBER = 2**31
# A weight in --data must be below this.
MAX_WEIGHT = 1e9

# The first option of each section of --help, in the order in which a user meets them.
SECTIONS = {
    "model": "model and data",
    "method": "method",
    "objective": "objective",
    "batch_size": "optimization",
    "budget": "the bundled task",
    "eval_every": "evaluation and saving",
    "device": "machine and memory",
    "shard": "several processes",
    "plan": "looking and debugging",
}

# What --help says of some sections.
SECTION_NOTES = {
    "method": "What is said of lora holds for qlora as well.",
    "objective": "docs/objectives.md has the equations and what the data look like.",
    "the bundled task": "Without --data, --model and --adapter, SmolLM2-135M-Instruct learns to turn"
    " booking notes into JSON, and its answers to test notes are compared before and after the"
    " training. Such a run is as long as --budget says, unless --full-run, --steps or --epochs is"
    " given. (With --model or --adapter and no --data, that model learns the same task, without the"
    " comparison.)",
    "several processes": "They are started by torchrun --nproc-per-node N train.py ...",
}

# The names that options had in earlier versions: {old: (new, {old value: new value})}. They are
# answered with the new name, and read in the checkpoints of runs that had them.
FORMER_NAMES = {"remat": ("activation_checkpointing", {"block": "full"})}

# The limits of an option, as the error message says them.
POSITIVE = "above 0"
NOT_NEGATIVE = "0 or more"
# What a resumed run may do with an option: see `option`.
FREE = "free"
PER_LAUNCH = "launch"


def option(default, text: str, **more):
    """Returns a field of Flags.

    default: a list becomes a tuple, as Flags are frozen.
    text: the help.
    more: choices, metavar, nargs and const for argparse;
        limits: POSITIVE or NOT_NEGATIVE;
        is_path: True if it names a file or folder, which is saved by its absolute path;
        word: what may stand in place of a number;
        kept: the name in the run's folder of a copy of that file, which a resume reads;
        resume: FREE if the option may differ when a run is resumed, because it does not change what
        is trained on or with (data and model are compared by hashes of what they hold); PER_LAUNCH
        if it belongs to one start of the program and not to the run. Others must not differ.
    """
    metadata = {"help": text, **more}
    if isinstance(default, list):
        default = tuple(default)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Flags:
    """What was typed. None: left open, chosen at the start and printed."""

    # ---- model and data
    model: str | None = option(
        None,
        "the model to fine-tune: a Hugging Face folder, a GGUF file, or a name on the Hub"
        " (org/model); default: the model that --adapter was trained on, else"
        " SmolLM2-135M-Instruct",
        resume=FREE,
        is_path=True,
    )
    data: tuple[str, ...] = option(
        [],
        "files or folders of training examples in any known format, on this disk, or by name where"
        " people keep them: hf:org/name[:subset][:split] (the Hub), s3://bucket/key, gs://bucket/key,"
        " https://host/file. FILE=W mixes several files by weight: with a.json=2 b.json=1, two examples"
        " of a are drawn for each of b, whatever their sizes (a file without =W has 1; where no file"
        " has it, each example comes once an epoch). Before a name with :// the weight stands in"
        " front, as in 3=https://host/file. Default: the bundled task, see there",
        metavar="FILE[=W]",
        resume=FREE,
        is_path=True,
    )
    replay: tuple[str, ...] = option(
        [],
        "general data that is mixed in against forgetting: FILE=0.1 makes a tenth of all training"
        " examples come from it; for names with ://, 0.1=https://host/file; default: none",
        metavar="FILE=SHARE",
        resume=FREE,
        is_path=True,
    )
    ewc: float = option(
        0.0,
        "elastic weight consolidation, against forgetting: a penalty LAMBDA / 2 x F x (weight - its"
        " start)^2 on each weight (lora: on the change of the adapted weight), where F, its Fisher"
        " information, says how much the model's predictions on general text depend on it; in nats a"
        " token, as the loss; 0: none",
        metavar="LAMBDA",
        limits=NOT_NEGATIVE,
    )
    ewc_data: str | None = option(
        None,
        "--ewc: general data on which F is computed, named as in --data; of conversations the answers,"
        " of plain text every token; default: the files of --replay, else a bundled text of 5,000"
        " tokens (assets/general.txt)",
        metavar="FILE",
        is_path=True,
    )
    ewc_samples: int = option(
        64,
        "--ewc: sequences of that data from which F is computed, before the first step: examples, or"
        " 128 tokens of plain text; more make F more exact and take longer",
        metavar="N",
        limits=POSITIVE,
    )
    val: str | None = option(
        None,
        "file of validation examples, named as in --data; default: the validation part of --data, if"
        " it has one (valid.jsonl in a folder, the validation split of a data set on the Hub, a"
        " column called split), else --val-fraction of it",
        metavar="FILE",
        resume=FREE,
        is_path=True,
    )
    val_fraction: float | None = option(
        None,
        "without --val: the share of --data that is held out for validation; examples with the same"
        f" prompt stay on one side; 0: no validation; default: {VAL_FRACTION}",
        resume=FREE,
    )
    template: str | None = option(
        None,
        "chat template (how a conversation is written as one text) for a model that has none, or in"
        " place of its own; plain: the messages' texts alone; default: its own",
        choices=[*NAMED],
    )
    date: str | None = option(
        None,
        "date for chat templates that write one into the prompt, as 2026-11-29; default: the one"
        " stored with an --adapter or --model that plaintune has trained, else the day on which the"
        " run first starts",
        metavar="DATE",
    )
    empty_think: str = option(
        "train",
        "for templates that write an empty <think></think> before an answer without a thought: train:"
        " it counts in the loss; mask: it does not",
        choices=[*EMPTY_THINK],
    )
    system: str | None = option(
        None,
        "system message that is put before every conversation that has none, in --data, --val and"
        " --replay. It is saved with the result, and generate.py and evaluate.py use it, too; '': none;"
        " default: the one stored with an --adapter or --model that plaintune has trained, else none",
        metavar="TEXT",
    )
    train_on: str = option(
        "answers",
        "the parts of a conversation that count in the loss: every answer of the assistant, only its"
        " last one, or the user's messages as well (the system message never does)",
        choices=[*TRAIN_ON],
    )
    pack: bool | None = option(
        None,
        "put several whole examples into one row of --seq-len tokens; no example sees another;"
        " default: yes on a GPU if an epoch of such rows still has 100 steps, else no",
    )
    map: str | None = option(
        None,
        "a Python function of yours that every record of --data and --val goes through first: from a"
        " record (a dict) to a record of a known format, a list of them, or None to leave it out",
        metavar="FILE.py:NAME",
        is_path=True,
    )
    trees: str = option(
        "best",
        "of OpenAssistant's message trees (OASST files): train the path of best-ranked replies, or"
        " every path",
        choices=[*TREES],
    )
    seq_len: int | None = option(
        None,
        "longest example in tokens, and the length of packed rows; longer conversations are treated as"
        " --truncate says, plain text is cut into pieces; default: 2048, or the model's limit if that"
        " is smaller",
        limits=POSITIVE,
    )
    rope_scaling: str | None = option(
        None,
        "longer texts than the model was made for: yarn=4 stretches its positions to four times as many (YaRN);"
        " linear=4: position interpolation; dynamic=4: only of texts that are longer. It is written into"
        " config.json, of an adapter into plaintune.json; train with a --seq-len of the lengths that are wanted;"
        " default: as the model's config.json says",
        metavar="KIND=FACTOR",
    )
    truncate: str = option(
        "drop",
        "conversations longer than --seq-len lose whole turns, never a part of an answer. drop: the"
        " turns after the last answer that fits; prompt: the oldest turns, then the beginning of the"
        " user's text, so that the last answer stays (as do the system message and the token that"
        " begins a text). Where that isn't enough, the conversation is left out. How many is printed",
        choices=[*TRUNCATE],
    )
    limit: int | None = option(
        None,
        "train on N examples of --data, drawn at random by --seed (a larger N adds to a smaller one),"
        " from several files in proportion; of plain text N pieces. Validation and --replay are not"
        " limited; default: all",
        metavar="N",
        limits=POSITIVE,
    )
    skip_bad: bool = option(
        False,
        "leave out records that can't be read, and print how many for each reason; null in place of a"
        " text is read as an empty one; default: stop before the training, and list the first 20",
    )
    out: str | None = option(
        None,
        "folder of the run: metrics.jsonl, loss.png, checkpoints/ to resume from, final/ with the"
        " result (full: the model; lora: the adapter alone), best/ with that of the lowest validation"
        " loss; default: a new one under runs/",
        metavar="DIR",
        resume=PER_LAUNCH,
        is_path=True,
    )
    overwrite: bool = option(
        False, "replace the run that --out holds; default: refuse to", resume=PER_LAUNCH
    )

    # ---- method
    method: str = option(
        "lora",
        "what is trained: lora: small low-rank matrices beside the frozen weights; qlora: the"
        " same, with the frozen weights in 4 bits, for a quarter of their memory; full: the"
        " weights themselves; vera: two vectors a layer between matrices that all layers share;"
        " bottleneck: small networks after each layer's own; prompt-tuning:"
        " vectors that stand before every text; p-tuning: the same, computed by a trained network;"
        " prefix-tuning: keys and values that stand before those of every text; ia3: factors of"
        " keys, values and the MLPs' middle (docs/methods.md compares them)",
        choices=METHOD_NAMES,
    )
    quant: str | None = option(
        None,
        "4-bit format of the frozen weights: nf4 (NormalFloat, of the QLoRA paper) for the blocks' linear"
        " layers; nf4+head: for the output head as well; default: nf4 for qlora. (lora --quant nf4 is"
        " the same as qlora)",
        choices=QUANT_KINDS,
    )
    rank: int | None = option(
        None,
        "lora: rank of the trained matrices; a higher one learns more and takes more memory;"
        f" default: {NEW_ADAPTER['rank']}",
        limits=POSITIVE,
    )
    alpha: float | None = option(
        None,
        "lora: the update is scaled by alpha / rank; default:"
        f" {NEW_ADAPTER['alpha']:g}, whatever the rank",
        limits=POSITIVE,
    )
    dropout: float | None = option(
        None,
        "lora: share of the adapters' inputs that is dropped in training; default:"
        f" {NEW_ADAPTER['dropout']:g}",
        limits=NOT_NEGATIVE,
    )
    targets: str | None = option(
        None,
        "lora: layers that are adapted, as names separated by commas (q_proj,v_proj); default:"
        " all, which is every linear layer of the transformer blocks, and not the output head; none: for"
        " --target-parameters alone",
    )
    target_parameters: str | None = option(
        None,
        "lora: routed experts that are adapted as peft does it where the weights of all experts are one"
        " parameter, as mlp.experts.gate_up_proj,mlp.experts.down_proj; gate and up then share their A, and"
        " --targets all leaves experts out; default: each linear of an expert by itself, as --targets says",
        metavar="NAME,...",
    )
    layers: str | None = option(
        None,
        "lora, vera: numbers of the transformer blocks that are adapted, from 0, as 0-11,20; default: all",
        metavar="NUMBERS",
    )
    rank_pattern: str | None = option(
        None,
        "lora: other ranks for some layers, as q_proj=16,layers.0.*=4: a regular expression that the"
        " layer's name in the model's files ends with, and a rank; the first that matches counts;"
        " default: --rank for all",
        metavar="NAME=RANK,...",
    )
    alpha_pattern: str | None = option(
        None,
        "lora: likewise other values of --alpha; default: --alpha for all",
        metavar="NAME=ALPHA,...",
    )
    rslora: bool = option(
        False,
        "lora: scale the update by alpha / sqrt(rank), so that high ranks learn as fast (rsLoRA);"
        " default: by alpha / rank",
    )
    dora: bool = option(
        False,
        "lora: train the length of each row of the adapted weights as well (DoRA), which takes longer;"
        " default: off",
    )
    init: str | None = option(
        None,
        "lora: how the matrices begin: random; pissa: as the weights' largest singular values, so that"
        " these are trained; loftq (with --quant nf4): as what 4 bits lose of the weights; then final/"
        " holds a base of its own; default: random",
        choices=LORA_STARTS,
    )
    lora_plus: float | None = option(
        None,
        "lora: learning rate of B over that of A (LoRA+; its authors take 16, with a lower --lr);"
        " default: 1",
        metavar="RATIO",
        limits=POSITIVE,
    )
    placement: str | None = option(
        None,
        "bottleneck: houlsby: a network after attention and one after the MLP; pfeiffer: one after"
        " the MLP; parallel: one beside the MLP; default: pfeiffer",
        choices=PLACEMENT_NAMES,
    )
    reduction_factor: float | None = option(
        None,
        "bottleneck: the model's hidden size over that of the networks' middle; a lower one learns"
        f" more and takes more memory; default: {NEW_ADAPTER['reduction_factor']:g}",
        limits=POSITIVE,
    )
    virtual_tokens: int | None = option(
        None,
        "prompt-tuning, p-tuning, prefix-tuning: how many learned tokens stand before every text;"
        f" default: {NEW_ADAPTER['virtual_tokens']}",
        limits=POSITIVE,
    )
    prompt_init: str | None = option(
        None,
        "prompt-tuning: what the virtual tokens are at the start: vocabulary: tokens that are drawn;"
        " random: numbers that are drawn; text:Answer in JSON. (the tokens of a text of your own,"
        " over and over); default: vocabulary",
        metavar="START",
    )
    encoder: str | None = option(
        None,
        "p-tuning, prefix-tuning: the network that the virtual tokens are computed by in training:"
        " mlp, lstm (p-tuning alone) or none (prefix-tuning alone); default: mlp",
        choices=ENCODER_NAMES,
    )
    encoder_size: int | None = option(
        None,
        "p-tuning, prefix-tuning: size of the inner layers of that network; default: the model's"
        " hidden size",
        limits=POSITIVE,
    )
    adapter: str | None = option(
        None,
        "with any method but full: start a new run from this adapter (the folder of one), with its"
        " rank or size; to go on with a run that was stopped, see --resume; default: a new adapter",
        metavar="DIR",
        is_path=True,
    )
    train: str | None = option(
        None,
        "full: train only parameters whose name in the model's files contains a match of this regular"
        " expression, as 'layers.2[0-9]'; default: all",
        metavar="REGEX",
    )
    add_tokens: str | None = option(
        None,
        "full, lora: a text file of new tokens, one on each line, which the tokenizer gets. Each begins as"
        " the mean of the tokens that its text had before; lora trains the new rows of the embedding"
        " table and of the output head beside its matrices; default: none",
        metavar="FILE",
        is_path=True,
        kept=ADDED_TOKENS,
    )
    train_tokens: str | None = option(
        None,
        "lora: tokens that the tokenizer has, whose rows of the embedding table and of the output head are"
        " trained as well, as '<|im_start|>,<|im_end|>'; default: none",
        metavar="TOKEN,...",
    )
    modules_to_save: str | None = option(
        None,
        "lora: train the embedding table or the output head as a whole beside the matrices, and save it"
        " with them, as embed_tokens,lm_head; where the two are one, it stays one; default: none",
        metavar="NAME,...",
    )
    embedding_lr: float | None = option(
        None,
        "lora with --add-tokens, --train-tokens or --modules-to-save: learning rate of these rows and"
        " tables; default: for tables a tenth of lora's (that of --method full), for rows lora's;"
        " they follow --lr",
        limits=POSITIVE,
    )

    # ---- objective
    objective: str = option(
        "sft",
        "what is minimised. sft: cross-entropy of the trained tokens; dft: the same, each token's times its"
        " probability. Of preferences (prompt, chosen, rejected): dpo, ipo: the chosen answer becomes"
        " likelier than the rejected one, compared with the model before step 1; simpo, orpo: without that"
        " comparison, which takes less time. kto: of answers that are each good or bad. reward: a model"
        " that scores answers, of preferences. classify: a score of each class, of texts with a label."
        " grpo: the model answers prompts while it is trained, and answers with a higher --reward become"
        " likelier (reinforcement learning). distill: the --teacher's probabilities of each next token are"
        " learnt",
        choices=OBJECTIVE_NAMES,
    )
    beta: float | None = option(
        None,
        "dpo, kto: how strongly the model is held near what it was before step 1: a lower one lets it move"
        " further; ipo: tau of the paper; simpo: scale of the rewards; orpo: weight of the odds ratio;"
        " grpo: weight of the KL to the model before step 1; default: 0.1, simpo 2, grpo none",
        limits=POSITIVE,
    )
    label_smoothing: float = option(
        0.0,
        "sft, classify: share of each token's (class's) loss that is spread over all of them; dpo: share"
        " of the pairs whose two answers are taken to be exchanged",
        limits=NOT_NEGATIVE,
    )
    length_normalized: bool = option(
        False,
        "dpo: divide each answer's log-probability ratio by its tokens, so that long answers do not weigh"
        " more; beta is then to be higher, such as 5",
    )
    margin: float | None = option(
        None,
        "simpo: by how much the reward of the chosen answer is to be higher (gamma of the paper);"
        " default: 1",
        limits=NOT_NEGATIVE,
    )
    desirable_weight: float | None = option(
        None,
        "kto: weight of good answers; with few of them, raise it until both sides' sums are alike;"
        " default: 1",
        limits=POSITIVE,
    )
    undesirable_weight: float | None = option(
        None, "kto: weight of bad answers; default: 1", limits=POSITIVE
    )
    reward: str | None = option(
        None,
        "grpo: what scores an answer: a Python function of yours, which names what it wants to see of"
        " answer, reference, references, prompt, messages, record, is_cut and returns a number; or the"
        " folder of a reward model that --objective reward has trained",
        metavar="FILE.py:NAME|DIR",
        is_path=True,
    )
    teacher: str | None = option(
        None,
        "distill: the model that is learnt from: a folder, GGUF or name as of --model, or the folder of an"
        " adapter; or self: the model before step 1, which is shown the reference answer (with"
        " --own-answers)",
        metavar="MODEL|DIR|self",
        is_path=True,
    )
    divergence: str | None = option(
        None,
        "distill: forward: KL(teacher || student), which covers all that the teacher might say; reverse:"
        " KL(student || teacher), which keeps to what it is likely to say; default: forward, with"
        " --own-answers reverse",
        choices=DIVERGENCES,
    )
    own_answers: bool = option(
        False,
        "distill: on answers that the model writes itself to the prompts of the data, a new one in each"
        " epoch (on-policy distillation), in place of those in the data",
    )
    group_size: int | None = option(
        None,
        "grpo: answers to each prompt of a step, which are compared with each other; default: 8. distill"
        " with --own-answers: the same, not compared; default: 1",
        limits=POSITIVE,
    )
    max_new_tokens: int | None = option(
        None,
        "grpo, and distill with --own-answers: the most tokens of an answer, where it is cut off;"
        " --seq-len has room for it behind a prompt; default: 256",
        limits=POSITIVE,
    )
    dr_grpo: bool = option(
        False,
        "grpo: without the division of each answer by its length and of each group by the standard"
        " deviation of its rewards, which favour long wrong answers and groups that agree (Dr. GRPO)",
    )
    reward_timeout: float | None = option(
        None,
        "grpo: seconds that your function may take for an answer, before the run ends; default: 60",
        limits=POSITIVE,
        resume=FREE,
    )
    neftune: float = option(
        0.0,
        "sft, dft: noise on the embeddings in training, of ALPHA / sqrt(length x hidden size), as 5 (NEFTune);"
        " 0: none",
        metavar="ALPHA",
        limits=NOT_NEGATIVE,
    )

    # ---- optimization
    batch_size: int = option(
        8,
        "examples (packed: rows) that one process takes at a time, a micro-batch",
        limits=POSITIVE,
        resume=FREE,
    )
    accumulate: int = option(
        1,
        "gradient accumulation: micro-batches that make one optimizer step. A step has batch size x"
        " accumulate x processes examples, and gives the same result however they are divided",
        limits=POSITIVE,
        resume=FREE,
    )
    steps: int | None = option(
        None, "optimizer steps, in place of --epochs; default: as --epochs says", limits=POSITIVE
    )
    epochs: float | None = option(
        None,
        "passes over the data, as 2 or 0.5; default: 3 below 500 examples, 2 below 1,500, else 1",
        limits=POSITIVE,
    )
    lr: float | Literal["auto"] | None = option(
        None,
        "peak learning rate; auto: short trainings on the run's own data, before it begins, say which;"
        " default: by the method and the model's hidden size (for 2048 4.9e-05 with full, ten times that"
        " with lora; the same for every --optimizer), printed at the start",
        metavar="RATE|auto",
        limits=POSITIVE,
        word=AUTO,
    )
    schedule: str = option(
        "cosine",
        "the learning rate after the warm-up: cosine, linear: falls to 0 in that shape; constant: stays"
        " at its peak",
        choices=SCHEDULE_NAMES,
    )
    warmup: int | None = option(
        None,
        "steps in which the learning rate rises to its peak; default: 5 %% of the steps",
        limits=NOT_NEGATIVE,
    )
    weight_decay: float | None = option(
        None,
        "weight decay of matrices (never of norms and biases); default: 0.01 for full, else 0",
        limits=NOT_NEGATIVE,
    )
    optimizer: str = option(
        "adamw",
        "adamw8bit: AdamW with moments in 8 bits, a quarter of their memory, on any device; muon: Muon"
        " on the matrices that train in the blocks (the adapters' too), AdamW on the rest",
        choices=OPTIMIZER_NAMES,
    )
    optimizer_offload: bool = option(
        False,
        "for AdamW on one GPU: keep the fp32 weights and the moments in the CPU's memory and take the"
        " optimizer step there; the GPU keeps weights and gradients in 16 bits, 4 bytes a trained"
        " weight in place of 16 (with shards of several processes: --shard-offload)",
    )
    weights: str = option(
        "fp32",
        "full: dtype that the trained weights are kept in; bf16: half the memory, with stochastic"
        " rounding, so that small steps are not lost",
        choices=["fp32", "bf16"],
    )
    clip: float = option(
        1.0,
        "largest norm of the gradient; a larger one is scaled down to it; 0: no clipping",
        limits=NOT_NEGATIVE,
    )
    seed: int = option(
        0,
        "seed of the examples' order, of what --limit draws, of new weights and of dropout",
        limits=NOT_NEGATIVE,
    )

    # ---- the bundled task
    budget: float | None = option(
        None,
        "minutes that the bundled task may take in all; training steps and test items are fitted to"
        " that (other data: --steps, --epochs); default: 5 where the hardware has bf16, else 10",
        metavar="MINUTES",
        limits=POSITIVE,
        resume=FREE,
    )
    full_run: bool = option(
        False,
        "the bundled task without a budget: a whole epoch and all 200 test items, however long they"
        " take",
        resume=FREE,
    )
    # ---- evaluation and saving
    eval_every: int | None = option(
        None,
        "steps between validations (the loss on examples that are not trained on); one more is made"
        " before the training and one after the last step; 0: only the one after the last step;"
        " default: a fifth of the run",
        limits=NOT_NEGATIVE,
        resume=FREE,
    )
    val_limit: int | None = option(
        None,
        "examples that a validation reads at most, the same each time; 0: all; default: as"
        " many as keep all validations together under a tenth of the training's time",
        metavar="N",
        limits=NOT_NEGATIVE,
        resume=FREE,
    )
    eval_metric: str | None = option(
        None,
        "at each validation the model also answers validation prompts, greedily, and the answers are"
        " scored as evaluate.py does it: best/ is then that of the highest score (of equal ones, of the"
        " lower loss) in place of the lowest loss, and --patience counts by the score. exact: equal to"
        " the reference; f1: shared words (SQuAD); numeric: the final number (GSM8K); bleu, chrf:"
        " translations; rouge: summaries, ROUGE-1; meteor: shared words, stems and synonyms;"
        " code-similarity: CodeBLEU; json: fields of JSON; tools: tool calls. Not with a sharded model"
        " (--shard); default: the validation loss alone",
        choices=EVAL_METRICS,
    )
    eval_metric_limit: int | None = option(
        None,
        "prompts that --eval-metric answers at most, the same each time; 0: all; default: as many as"
        " keep all answers together to about a tenth of the training's time, but 16",
        metavar="N",
        limits=NOT_NEGATIVE,
    )
    log_every: int | None = option(
        None,
        "steps between printed lines with loss, tokens/s and time left; 0: no lines; default: a"
        " progress bar on a terminal, elsewhere a line every 30 seconds",
        metavar="N",
        limits=NOT_NEGATIVE,
        resume=FREE,
    )
    patience: int = option(
        0,
        "early stopping: stop after N validations in a row without a new best (lowest loss; with"
        " --eval-metric: highest score); 0: never",
        metavar="N",
        limits=NOT_NEGATIVE,
        resume=FREE,
    )
    forget_limit: float | None = option(
        None,
        "largest distance from the model as it was before the training that best/ may have: of the"
        " validations at which KL(base || tuned), in nats a token, is under X, best/ keeps the"
        " best; the end says so if none is. Every validation prints that distance, so"
        " a first run tells which X to ask for. With --forget-data, the limit is of that file's loss"
        " rise; default: no limit",
        metavar="X",
        limits=POSITIVE,
    )
    forget_data: str | None = option(
        None,
        "file of general text or conversations, named as in --data, to see what is forgotten: each"
        " validation also measures the loss on some of its examples, and by how much it has risen"
        " since before the training, in nats a token. --forget-limit X is then the largest such rise"
        " that best/ may have, in place of a distance; default: none",
        metavar="FILE",
        resume=FREE,
        is_path=True,
    )
    safety: str | None = option(
        None,
        "prompts that should be refused, and harmless ones that should not: AdvBench's or XSTest's CSV, or"
        " any file of prompts with a label, safe or unsafe. At most 100 of each are answered before step"
        " 1 and after the last step, in 32 tokens each, and the end says what the training changed;"
        " default: no such check (the bundled task asks 40 of its own)",
        metavar="FILE",
        resume=FREE,
        is_path=True,
    )
    save_every: int | None = option(
        None,
        "steps between checkpoints, from which a stopped run is resumed; 0: none; default: five in a"
        " run, or every half an hour if that is more often; none in a run of under 10 steps",
        limits=NOT_NEGATIVE,
        resume=FREE,
    )
    keep: int = option(
        2,
        "keep the N newest checkpoints, and besides them the one with the best validation",
        metavar="N",
        limits=POSITIVE,
        resume=FREE,
    )
    save_async: bool = option(
        False, "write checkpoints in the background, from a copy in the CPU's memory", resume=FREE
    )
    save_dtype: str | None = option(
        None,
        "full: dtype of the saved models, best/ and final/; 16 bits round small changes away (the"
        " run prints what share), fp32 keeps all; default: that of the base's files",
        choices=STORAGE_DTYPE_NAMES,
        resume=FREE,
    )
    push: str | None = option(
        None,
        "upload final/, the result after the last step, to the Hugging Face Hub under this name, in a"
        " private repository, which is made before the training begins, so that a wrong token (`hf"
        " auth login` or HF_TOKEN) is found then; default: nothing is uploaded",
        metavar="ORG/NAME",
        resume=FREE,
    )
    resume: str | None = option(
        None,
        "continue the run in --out from its newest complete checkpoint, with the flags that it was"
        " started with; of what is trained none may change but --steps: with more of them a run that"
        " has ended is prolonged. --resume auto: start the run if there is no checkpoint yet; default:"
        " a new run",
        nargs="?",
        const="on",
        choices=["on", "auto"],
        resume=PER_LAUNCH,
    )
    wandb: str | None = option(
        None,
        "log to this Weights & Biases project as well; default: no",
        metavar="PROJECT",
        resume=FREE,
    )
    tensorboard: bool = option(
        False,
        "write what metrics.jsonl holds for TensorBoard as well, into tensorboard/ in --out; needs the"
        " package (pip install tensorboard), and `tensorboard --logdir` shows it",
        resume=FREE,
    )

    # ---- machine and memory
    device: str = option(
        "auto",
        "where to compute; auto: a GPU if there is one, else the CPU",
        choices=["auto", "cpu", "cuda", "mps"],
        resume=PER_LAUNCH,
    )
    dtype: str = option(
        "auto",
        "mixed precision: dtype of activations, matrix products and frozen weights; what is trained,"
        " the optimizer's state and the loss stay fp32 (--weights, --save-dtype); auto: bf16 where the"
        " hardware has it, else fp32",
        choices=["auto", *DTYPE_NAMES],
    )
    compile: str = option(
        "auto",
        "run the transformer blocks through torch.compile; auto: only on a CPU, in bf16, and if the run"
        " takes a quarter of an hour or more",
        choices=["auto", "on", "off"],
        resume=FREE,
    )
    attention: str = option(
        "auto",
        "version of FlashAttention on a GPU. auto: PyTorch's version 2; flash3, flash4: that one; the run"
        " stops if its package is missing or if its results differ from version 2 in a first step",
        choices=["auto", *FLASH_NAMES],
        resume=FREE,
    )
    activation_checkpointing: str = option(
        "none",
        "also called gradient checkpointing: save memory by computing activations again in the"
        " backward pass; each choice takes less memory than the one before, and more time: none;"
        " selective: outputs of norms, and attention probabilities, are computed again; full: whole"
        " blocks, of which only the inputs are kept; offload: these inputs go to the CPU's memory",
        choices=CHECKPOINTING_KINDS,
        resume=FREE,
    )
    deterministic: bool = option(
        False,
        "two runs on one machine give identical numbers: only operations with a fixed order, and no"
        " choice by measured time (--compile auto, --budget); slower on a GPU",
        resume=FREE,
    )

    # ---- several processes
    shard: str | None = option(
        None,
        "data parallel: how FSDP2 shards the model: none (every process holds a full copy), full"
        " (sharded over all processes), hybrid (sharded within a node, replicated across nodes);"
        " default: full, or none for adapters on a base that takes a quarter of a GPU's memory or less",
        choices=["none", "full", "hybrid"],
        resume=PER_LAUNCH,
    )
    shard_offload: bool = option(
        False,
        "keep shards of weights, gradients and optimizer state in the CPU's memory (one process:"
        " --optimizer-offload)",
        resume=FREE,
    )
    reduce: str = option(
        "last",
        "when the gradients of shards are summed over the processes: once, after a step's last"
        " micro-batch, or after each micro-batch, which takes less memory and more time",
        choices=["last", "each"],
        resume=FREE,
    )
    context_parallel: int = option(
        1,
        "processes that share the tokens of each batch, for sequences too long for one GPU; they count"
        " as one in --accumulate's product (experimental)",
        metavar="N",
        limits=POSITIVE,
        resume=PER_LAUNCH,
    )
    timeout: float = option(
        600.0,
        "seconds that a process waits for another one before it gives up",
        limits=POSITIVE,
        resume=PER_LAUNCH,
    )

    # ---- looking and debugging
    plan: bool = option(
        False,
        "print the memory and time that each method would take with these data on this machine, and"
        " stop; the model's weights are not loaded",
        resume=PER_LAUNCH,
    )
    gpus: tuple[int, ...] = option(
        [],
        "only for --plan: estimate for these numbers of GPUs, in nodes of 8, in place of this machine"
        " (how many GPUs a run uses, torchrun says); default: this machine",
        metavar="N",
        resume=PER_LAUNCH,
    )
    gpu_memory: float = option(
        80.0,
        "--plan --gpus: memory of a GPU in GB, such as 8, 24, 48, 80 or 141; a common card of that"
        " size, which is named, gives its speed",
        metavar="GB",
        limits=POSITIVE,
        resume=PER_LAUNCH,
    )
    profile: int = option(
        0,
        "run N steps under torch.profiler, print the most expensive operations, and stop; 0: no"
        " profiling",
        metavar="N",
        limits=NOT_NEGATIVE,
        resume=FREE,
    )

    given: frozenset[str] = frozenset()  # not an option: the names of those that were typed


OPTIONS = {each.name: each for each in dataclasses.fields(Flags) if each.name != "given"}


def as_dict(flags: Flags) -> dict:
    """Returns {option: value}, as it is saved in config.json and checkpoints.

    Paths are absolute, so that the run can be resumed from another working directory.
    """
    return {name: saved_value(name, getattr(flags, name)) for name in OPTIONS}


def saved_value(name: str, value):
    """Returns the value of an option with the absolute paths of what exists."""
    if not OPTIONS[name].metadata.get("is_path"):
        return value
    if isinstance(value, str):
        return absolute_path(value)
    # argparse makes lists.
    if isinstance(value, list | tuple):
        return tuple(absolute_path(word) for word in value)
    return value


def absolute_path(word: str) -> str:
    """Returns FILE, FILE=W or FILE.py:NAME with the file's absolute path, if there is such a file
    or folder; a name that lies elsewhere without its secrets; any other word as it is, such as the
    name of a model on the Hub."""
    if is_remote(word):
        return saved_name(word)
    file = existing_file(word)
    # Not resolved: a link may lead elsewhere when the run is resumed.
    return os.path.abspath(file) + word[len(file) :] if file else word


def existing_file(word: str) -> str:
    """Returns the file or folder that FILE, FILE=W or FILE.py:NAME names, or "" if there is
    none."""
    # rpartition puts a word without the sign into the last part.
    for file in (word, word.rpartition("=")[0], word.rpartition(":")[0]):
        if file and Path(file).exists():
            return file
    return ""


def relocate_paths(saved: dict, directory: str | None) -> dict:
    """Returns a checkpoint's flags with the paths by which their files are found now.

    Where a file is gone and one lies in the same place relative to the working directory, that one
    is taken: the folder of it all was moved, or is mounted elsewhere.

    saved: {option: value}.
    directory: the working directory of the run; None if it is not known.
    """
    flags = dict(saved)
    if directory is None:
        return flags
    for name, value in saved.items():
        if not OPTIONS[name].metadata.get("is_path") or value is None:
            continue
        words = [value] if isinstance(value, str) else value
        found = []
        for word in words:
            here = word
            if os.path.isabs(word) and not existing_file(word):
                here = absolute_path(os.path.relpath(word, directory))
            found.append(here if existing_file(here) else word)
        flags[name] = found[0] if isinstance(value, str) else found
    return flags


def check_paths_exist(saved: dict, where: Path) -> None:
    """Raises UserError if a file that a checkpoint's flags name is not there.

    saved: {option: value}. where: the checkpoint's folder, for messages.
    """
    for name, value in saved.items():
        if not OPTIONS[name].metadata.get("is_path") or value is None:
            continue
        kept = OPTIONS[name].metadata.get("kept")
        if kept and (where.parent.parent / kept).is_file():
            continue
        words = [value] if isinstance(value, str) else value
        for word in words:
            may_be_on_hub = name in ("model", "teacher") and not os.path.isabs(word)
            if existing_file(word) or may_be_on_hub or is_remote(word):
                continue
            advice = "start from the folder in which the run was begun, or"
            if os.path.isabs(word):
                advice = "if it was moved,"
            raise UserError(
                f"--resume: {where} was made with {dashed(name)} {word}, which is not here;"
                f" {advice} give {dashed(name)} again"
            )


def dashed(name: str) -> str:
    """Returns --batch-size of batch_size."""
    return "--" + name.replace("_", "-")


def parse_flags(argv: list[str]) -> Flags:
    """Returns the Flags of a command line.

    Raises UserError naming the option that is wrong, before any file is opened.
    """
    refuse_configuration_file(argv)
    refuse_former_names(argv)
    given = vars(parse_args(make_parser(), argv, TRAIN_NAMES))
    flags = Flags(**given, given=frozenset(given))
    check(flags)
    # This late, as it imports torch: --help and most mistakes are answered before.
    from methods import quant_of

    return dataclasses.replace(flags, quant=quant_of(flags))


def refuse_configuration_file(argv: list[str]) -> None:
    """Raises UserError if the command line begins with a file of settings, as those of other
    programs do."""
    if argv and Path(argv[0]).suffix in (".yaml", ".yml", ".json"):
        file = shlex.quote(argv[0])
        advice = f"`python convert.py recipe {file}` makes them of another program's file"
        raise UserError(f"{argv[0]}: settings are flags here; {advice}")


def refuse_former_names(argv: list[str]) -> None:
    """Raises UserError with today's name, if an option is called as in an earlier version."""
    for word in argv:
        if not word.startswith("--"):
            continue
        flag = word.partition("=")[0]
        old = flag.removeprefix("--").replace("-", "_")
        if old in FORMER_NAMES:
            new, values = FORMER_NAMES[old]
            message = f"{dashed(old)}: is now called {dashed(new)}"
            for old_value, new_value in values.items():
                message += f"; its value {old_value} is now {new_value}"
            raise UserError(message)


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of train.py. An option that was not typed is missing from its result."""
    parser = argparse.ArgumentParser(
        "train.py",
        allow_abbrev=False,
        description="Fine-tunes a language model on examples:"
        " python train.py --model FOLDER --data FILE.json. To know what fits this machine, add --plan."
        " Without any flag a small model learns a bundled task, as a demonstration.",
    )
    section: argparse._ActionsContainer = parser
    for name, each in OPTIONS.items():
        if name in SECTIONS:
            title = SECTIONS[name]
            section = parser.add_argument_group(title, SECTION_NOTES.get(title))
        arguments = dict(each.metadata)
        arguments.pop("limits", None)
        arguments.pop("resume", None)
        arguments.pop("is_path", None)
        arguments.pop("kept", None)
        arguments.pop("word", None)
        # Of an open option the help says itself what is chosen.
        if each.default is not None and each.default is not False and each.default != ():
            arguments["help"] += f"; default: {each.default}"
        elif each.default is False and "default:" not in each.metadata["help"]:
            arguments["help"] += "; default: no"
        arguments |= type_arguments(each)
        section.add_argument(dashed(name), default=argparse.SUPPRESS, **arguments)
    return parser


def type_arguments(each: dataclasses.Field) -> dict:
    """Returns argparse's arguments for an option's type, as bool, int | None, tuple[str, ...]."""
    kind = str(each.type)
    if kind == "bool | None":
        # --pack and --no-pack.
        return {"action": argparse.BooleanOptionalAction}
    if each.type is bool:
        return {"action": "store_true"}
    converter: Callable = str
    word = each.metadata.get("word")
    if word:
        converter = functools.partial(number_or_word, word)
    elif "int" in kind:
        converter = int
    elif "float" in kind:
        converter = float
    if "tuple" in kind:
        # Several values, and several times: --data a.json b.json --data c.json.
        return {"nargs": "+", "action": "extend", "type": converter}
    return {"type": converter}


def number_or_word(word: str, text: str) -> float | str:
    """Returns the number that a text is, or the one word that may stand in its place."""
    if text == word:
        return word
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a number or {word} is wanted, not {text!r}") from None


def check(flags: Flags) -> None:
    """Raises UserError for what can be said to be wrong before a file is opened."""
    check_numbers(flags)
    check_data(flags)
    check_memory(flags)
    check_out(flags)
    check_method(flags)


def check_numbers(flags: Flags) -> None:
    """Raises UserError for a number out of its range."""
    for name, each in OPTIONS.items():
        value = getattr(flags, name)
        limits = each.metadata.get("limits")
        if limits is None or value is None or value == each.metadata.get("word"):
            continue
        if value >= MAX_NUMBER:
            raise UserError(f"{dashed(name)} {value:g}: must be {limits} and below {MAX_NUMBER:g}")
        # Asked this way round, NaN is refused as well.
        in_range = value > 0 if limits == POSITIVE else value >= 0
        if not in_range:
            raise UserError(f"{dashed(name)} {value:g}: must be {limits}")
    if flags.val_fraction is not None and not 0 <= flags.val_fraction < 1:
        raise UserError(f"--val-fraction {flags.val_fraction:g}: must be at least 0 and below 1")
    if flags.seq_len == 1:
        why = "the first token of an example is never trained"
        raise UserError(f"--seq-len 1: must be 2 or more, {why}")
    if flags.steps is not None and flags.epochs is not None:
        raise UserError("--steps and --epochs: give one of them")
    check_length_of_bundled_task(flags)
    if not all(0 < count < MAX_NUMBER for count in flags.gpus):
        raise UserError("--gpus: numbers above 0 are wanted")
    if "gpu_memory" in flags.given and not flags.gpus:
        raise UserError("--gpu-memory: is about the GPUs of --plan --gpus; give --gpus 1 as well")
    if flags.gpus and not flags.plan:
        raise UserError(
            "--gpus is what --plan is to plan for; a run has as many as torchrun starts processes"
        )


def check_length_of_bundled_task(flags: Flags) -> None:
    """Raises UserError if --budget or --full-run does not suit the other flags."""
    given = [name for name in ("budget", "full_run", "steps", "epochs") if getattr(flags, name)]
    if not flags.resume and len(given) > 1 and {"budget", "full_run"} & set(given):
        both = " and ".join(map(dashed, given[:2]))
        raise UserError(f"{both}: each says how long the run is; give one of them")
    own = [each for each in ("data", "model", "adapter") if each in flags.given]
    for name in ("budget", "full_run"):
        if name in flags.given and own:
            why = "--steps and --epochs say how long it is"
            raise UserError(
                f"{dashed(name)}: is for the bundled task, not for one with {dashed(own[0])}; {why}"
            )


def check_data(flags: Flags) -> None:
    """Raises UserError for options of the data that can't be read or exclude each other."""
    # These raise it. What they return is asked for again when the files are read.
    parse_weights(flags.data)
    parse_replay(flags.replay)
    if flags.date is not None:
        check_date(flags.date)
    if flags.rope_scaling is not None:
        parse_rope_scaling(flags.rope_scaling)
    if flags.val_fraction is not None and (flags.val or not flags.data):
        raise UserError(
            "--val-fraction parts the files of --data; with --val or without --data it means"
            " nothing"
        )
    if flags.forget_limit is not None and flags.val_fraction == 0:
        raise UserError("--forget-limit chooses among validations, and --val-fraction 0 has none")
    if flags.eval_metric_limit is not None and flags.eval_metric is None and not flags.resume:
        raise UserError(
            "--eval-metric-limit: is for the prompts of --eval-metric; give that one too"
        )
    for name in ("eval_metric", "forget_data"):
        if getattr(flags, name) is not None and flags.val_fraction == 0:
            raise UserError(
                f"{dashed(name)}: is measured at validations, and --val-fraction 0 has none"
            )
    for name in ("ewc_data", "ewc_samples"):
        if name in flags.given and not flags.ewc:
            raise UserError(f"{dashed(name)}: is for --ewc LAMBDA, which is not given")
    if flags.patience and flags.eval_every == 0:
        raise UserError("--patience counts validations, and --eval-every 0 has one, at the end")


def check_method(flags: Flags) -> None:
    """Raises UserError for options that --method or --adapter does not use."""
    # The method of a run that is resumed stands in its checkpoint, and is asked for there.
    if not flags.resume or "method" in flags.given:
        check_owned_options(flags)
    shape = [dashed(name) for name in NEW_ADAPTER if getattr(flags, name) not in (None, False)]
    if shape and flags.adapter:
        raise UserError(f"{shape[0]}: the adapter that --adapter names has its own")
    check_prompt_init(flags)
    check_encoder(flags)
    check_tables(flags)
    if flags.targets == "none" and not flags.target_parameters:
        raise UserError("--targets none: is for --target-parameters, which is not given")
    if flags.target_parameters == "":
        raise UserError("--target-parameters '': is empty; leave it out")
    if flags.init == "loftq":
        if flags.quant != "nf4" and (flags.quant or flags.method != "qlora"):
            raise UserError("--init loftq: makes up for 4 bits; give --quant nf4 as well")
        if flags.shard in ("full", "hybrid"):
            raise UserError(f"--init loftq: rounds whole weights, not with --shard {flags.shard}")
    if flags.train:
        try:
            re.compile(flags.train)
        except re.error as error:
            problem = f"no regular expression ({error})"
            raise UserError(f"--train {flags.train}: {problem}") from None


def check_tables(flags: Flags) -> None:
    """Raises UserError for options of trained embeddings that have none, or that they do not go with."""
    names = ("add_tokens", "train_tokens", "modules_to_save")
    empty = [dashed(name) for name in names if getattr(flags, name) == ""]
    if empty:
        raise UserError(f"{empty[0]} '': is empty; leave it out")
    given = [dashed(name) for name in names if getattr(flags, name)]
    if flags.embedding_lr is not None and not given and not flags.adapter and not flags.resume:
        raise UserError(f"--embedding-lr: is for {', '.join(map(dashed, names))}; none is given")
    if given and flags.ewc and flags.method != "full":
        raise UserError(
            f"{given[0]}: --ewc holds the change of the adapted weights, not embeddings; leave one out"
        )


def check_encoder(flags: Flags) -> None:
    """Raises UserError for an encoder that --method has not, and for the size of none."""
    if flags.resume:
        return
    if flags.encoder == "none" and flags.method == "p-tuning":
        raise UserError("--encoder none: P-tuning without one is --method prompt-tuning")
    if flags.encoder == "lstm" and flags.method == "prefix-tuning":
        raise UserError("--encoder lstm: is of --method p-tuning; a prefix has mlp or none")
    if flags.encoder == "none" and flags.encoder_size is not None:
        raise UserError("--encoder-size: there is no encoder (--encoder none)")


def check_prompt_init(flags: Flags) -> None:
    """Raises UserError for a --prompt-init that is no beginning."""
    start = flags.prompt_init
    if start is None or start in PROMPT_STARTS:
        return
    if not start.startswith(PROMPT_TEXT):
        known = ", ".join(PROMPT_STARTS)
        raise UserError(f"--prompt-init {start}: must be {known}, or {PROMPT_TEXT} and a text")
    if not start.removeprefix(PROMPT_TEXT).strip():
        raise UserError(f"--prompt-init {start}: no text stands behind {PROMPT_TEXT}")


def check_owned_options(flags: Flags) -> None:
    """Raises UserError for an option that belongs to other methods than --method."""
    # This late, as it imports torch.
    from methods import METHODS

    check_options_of_row(flags, "method", {name: row.options for name, row in METHODS.items()})


def check_options_of_row(flags: Flags, choice: str, rows: Mapping[str, tuple[str, ...]]) -> None:
    """Raises UserError for an option that belongs to other rows of a table than the one that an option
    chooses. rows: {row: the names of the options that it reads, and not all others do}."""
    chosen = getattr(flags, choice)
    owners: dict[str, list[str]] = {}
    for row, names in rows.items():
        for name in names:
            owners.setdefault(name, []).append(row)
    for name, owning_rows in owners.items():
        was_changed = getattr(flags, name) != OPTIONS[name].default
        if was_changed and name not in rows[chosen]:
            owning = " or ".join(owning_rows)
            raise UserError(
                f"{dashed(name)}: is for --{choice} {owning}, not for --{choice} {chosen}"
            )


def check_memory(flags: Flags) -> None:
    """Raises UserError for ways to save memory that exclude each other."""
    if flags.activation_checkpointing == "selective" and flags.compile == "on":
        raise UserError(
            "--activation-checkpointing selective with --compile on: the compiler chooses what to"
            " compute again by itself"
        )
    if flags.optimizer == "muon" and flags.weights == "bf16":
        raise UserError(
            "--weights bf16: Muon rounds to the nearest, which loses small steps; take adamw or"
            " adamw8bit"
        )
    if flags.shard_offload and (flags.optimizer != "adamw" or flags.optimizer_offload):
        raise UserError(
            "--shard-offload: the host steps by AdamW, and has the optimizer's state already"
        )
    if flags.optimizer_offload and flags.optimizer != "adamw":
        raise UserError(
            f"--optimizer-offload: the host steps by AdamW, not by --optimizer {flags.optimizer}"
        )
    if flags.ewc:
        check_ewc(flags)
    if flags.optimizer_offload and flags.weights == "bf16":
        raise UserError(
            "--optimizer-offload: keeps fp32 masters on the host, which --weights bf16 is to do"
            " without"
        )


def check_ewc(flags: Flags) -> None:
    """Raises UserError for what --ewc can't be combined with: it needs the trained weights, and their
    gradients, whole and on the device."""
    if flags.shard in ("full", "hybrid"):
        raise UserError(f"--ewc: needs whole weights on every process, not --shard {flags.shard}")
    if flags.optimizer_offload:
        raise UserError("--ewc: is not for --optimizer-offload, which has the weights on the host")
    if flags.context_parallel > 1:
        raise UserError("--ewc: is not for --context-parallel")
    if flags.gpus:
        raise UserError("--ewc: is not counted by --plan --gpus; --plan alone does")


def check_out(flags: Flags) -> None:
    """Raises UserError where --out can't be the folder of this run, or --push not its name."""
    if flags.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard: the package is not installed; pip install tensorboard")
    if flags.push is not None:
        match = HUB_NAME.fullmatch(flags.push)
        if not match or match[2]:
            raise UserError(f"--push {flags.push}: ORG/NAME is wanted, a name on the Hub")
        if flags.profile:
            raise UserError("--push: a run under --profile has no result to put on the Hub")
    if flags.resume and not flags.out:
        raise UserError("--resume: needs --out, the folder of the run that is to go on")
    if flags.resume and flags.profile:
        raise UserError("--profile looks at a run's first steps, and --resume has them behind it")
    if flags.resume and flags.overwrite:
        raise UserError("--resume goes on with a run and --overwrite replaces it; give one of them")
    if not flags.out:
        return
    out = Path(flags.out)
    if out.is_file():
        raise UserError(f"--out {out}: is a file; name a folder")
    is_part = out.name in ("best", "final", "checkpoints")
    if is_part and (out.parent / "metrics.jsonl").is_file():
        raise UserError(f"--out {out}: is a part of the run in {out.parent}; name another folder")
    # Hidden files, such as a file manager's, do not make a folder a used one.
    if not out.exists() or all(path.name.startswith(".") for path in out.iterdir()):
        return
    if not (out / "metrics.jsonl").is_file():
        problem = "holds something that is no run of train.py"
        raise UserError(f"--out {flags.out}: {problem}; name another folder")
    if not (flags.overwrite or flags.resume):
        holder = find_holder(out)
        if holder is not None:
            raise UserError(f"--out {flags.out}: {holder}; name another folder")
        advice = "name another folder, or add --resume or --overwrite"
        raise UserError(f"--out {flags.out}: holds a run already; {advice}")
    check_inputs_outside(flags, out)


def check_inputs_outside(flags: Flags, out: Path) -> None:
    """Raises UserError if an input lies in --out, of which an earlier run's files are removed."""
    files, _ = parse_weights(flags.data)
    replay_files, _ = parse_replay(flags.replay)
    folder = out.resolve()
    named = (flags.model, flags.adapter, flags.val, flags.forget_data, flags.ewc_data, flags.safety)
    for file in (*named, *files, *replay_files):
        if not file or is_remote(file):
            continue
        path = Path(file).resolve()
        if path == folder or folder in path.parents:
            flag = "--resume" if flags.resume else "--overwrite"
            raise UserError(
                f"{flag}: {file} lies in --out {flags.out}, and would be gone before it is used"
            )


def parse_weights(words: tuple[str, ...]) -> tuple[list[str], list[float] | None]:
    """Returns the files of --data and their weights, or None for these where no file has one.

    Where only some files have a weight, that of the others is 1.
    """
    parts = [split_number(word) for word in words]
    files = []
    weights = []
    has_weights = False
    for word, (file, weight) in zip(words, parts, strict=True):
        if weight is None:
            weight = 1.0
        else:
            has_weights = True
        if not 0 < weight < MAX_WEIGHT:
            raise UserError(f"--data {shown(word)}: a weight must be above 0")
        files.append(file)
        weights.append(weight)
    return files, weights if has_weights else None


def parse_replay(words: tuple[str, ...]) -> tuple[list[str], list[float]]:
    """Returns the files of --replay and their shares of all training examples."""
    parts = [split_number(word) for word in words]
    files = []
    shares = []
    for word, (file, share) in zip(words, parts, strict=True):
        if share is None or not 0 < share < 1:
            wanted = "SHARE=URL" if "://" in word else "FILE=SHARE"
            raise UserError(
                f"--replay {shown(word)}: {wanted} is wanted, a share above 0 and below 1"
            )
        files.append(file)
        shares.append(share)
    if sum(shares) >= 1:
        raise UserError("--replay: the shares leave no draw to --data")
    return files, shares


def split_number(word: str) -> tuple[str, float | None]:
    """Returns (a.json, 3.0) of a.json=3; and (a.json=3, None) if there is a file of that name. The
    number of a URL stands in front of it: (https://host/a?b=3, 2.0) of 2=https://host/a?b=3.

    Raises UserError if it names no file, or if what follows an existing file is no number.
    """
    if is_remote(word):
        name, text = split_remote(word)
        try:
            return name, None if text is None else float(text)
        except ValueError:
            raise UserError(f"{shown(word)}: {text!r} is no number") from None
    file, sign, number = word.rpartition("=")
    if not word or (sign and not file):
        raise UserError(f"{word!r}: names no file")
    if not sign or Path(word).exists():
        return word, None
    try:
        return file, float(number)
    except ValueError:
        if Path(file).exists():
            raise UserError(f"{word}: {number!r} is no number") from None
    return word, None
