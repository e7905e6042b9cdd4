"""The first lines of a run, what was chosen and what to expect; and the last ones, what came of it.

A choice that train.py made for the user stands here with its reason.
"""

import shlex
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

import checkpoint
import distributed
import lora
import optimizers
from adapter_files import OWN_BASE, base_size
from adapting.new_tokens import new_tokens_of
from adapting.stacked_experts import why_peft_can_t
from adapting.tables import TrainedRows, trained_tables
from common.console import number_of, one_line
from common.origin import SOURCE_FILE
from common.threads import wait_policy_note
from data import TrainingData, max_tokens_per_micro_batch
from dataset.encoding import AS_PROMPTS
from methods import lr_factors, method_of
from model import Experts, Linear, Transformer, quantized_linears
from objectives import OBJECTIVES, kind_of_examples
from planning import multi_gpu
from planning.report import recipe_and_layout
from tokenizer import Tokenizer
from training.answer_score import AnswerScorer
from training.checkpointer import Checkpointer
from training.defaults import Settings
from training.gauge import Gauge
from training.metrics import MetricsLogger
from training.state import TrainState

KEPT_ACTIVATIONS = {
    "selective": "products, not norms and attention's probabilities"
    " (--activation-checkpointing selective)",
    "full": "the inputs of blocks, which are computed twice (--activation-checkpointing full)",
    "offload": "the inputs of blocks, on the host; blocks are computed twice"
    " (--activation-checkpointing offload)",
}
# If a step is too small to move more than this share of the weights, a line says so.
STUCK = 0.5
INDENT = " " * 10


def print_model_summary(settings: Settings, model: Transformer, tokenizer: Tokenizer) -> None:
    """Prints what is trained: the base, and what of it."""
    print_model(model, tokenizer)
    print_method(settings, model)
    print_base(settings, model)


def print_run_summary(settings: Settings, model: Transformer, device: torch.device) -> None:
    """Prints how it is trained, and what that will take."""
    print_objective(settings)
    print_run(settings, model, device)
    recipe, layout = recipe_and_layout(settings)
    memory = multi_gpu.memory_per_process(
        model, recipe, layout, settings.workload, device.type, settings.context_parallel
    )
    gigabytes = memory.peak / 1e9
    minutes = settings.expected_seconds / 60
    most = ""
    if kind_of_examples(settings) == AS_PROMPTS:
        most = ", if all answers are as long as they may be"
    print(
        f"expected  {gigabytes:.1f} GB of memory, {minutes:.1f} min of training{most}", flush=True
    )
    print_processes(settings)


def print_objective(settings: Settings) -> None:
    """Prints what is minimised, where that is not plain supervised fine-tuning."""
    row = OBJECTIVES[settings.objective]
    options = {name: getattr(settings, name) for name in row.options}
    changed = [
        name.replace("_", " ") + ("" if value is True else f" {value}".removesuffix(".0"))
        for name, value in options.items()
        if value
    ]
    if settings.objective == "sft" and not changed:
        return
    print(f"objective {settings.objective}: {'; '.join([row.title, *changed])}")


def print_line(text: str) -> None:
    """Prints a line that belongs to the one above it."""
    print(f"{INDENT}{text}")


def print_model(model: Transformer, tokenizer: Tokenizer) -> None:
    """Prints the base model, its tokenizer, and what is unusual about them."""
    folder = model.source
    what = f"{model.config.family}, {base_size(model):,} parameters"
    print(f"model     {folder}: {what}; tokenizer: {tokenizer.description}")
    # This file is written by the conversion of a GGUF file.
    source_file = folder / SOURCE_FILE
    if source_file.is_file():
        source = checkpoint.read_json(source_file)
        counts = source.get("tensor_types", {})
        kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        name = one_line(str(source.get("file")))
        print_line(f"made of {name}, dequantised; its tensors are {kinds}")
    for end in sorted(tokenizer.unlisted_ends):
        token = tokenizer.decode([end])
        print_line(f"NOTE: answers end with {token!r}, id {end}, which neither config.json nor")
        print_line(
            "generation_config.json lists as an end; tell the server that will run the model to"
            " stop there"
        )


def matrix_size(layers: Iterable[Linear]) -> int:
    """Returns the numbers in the matrices of some layers, which may be in 4 bits."""
    return sum(layer.in_features * layer.out_features for layer in layers)


def print_method(settings: Settings, model: Transformer) -> None:
    """Prints how many parameters are trained, and how much of the model the adapters reach."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = base_size(model)
    layers = lora.lora_layers(model).values()
    how = method_of(settings).describe(settings)
    share = f"{100 * trained / total:.2f} % of the model's"
    print(f"method    {settings.method} ({how}): {trained:,} parameters trained, {share}")
    if layers:
        adapted = matrix_size(layer.base for layer in layers)
        percent = 100 * adapted / total
        print_line(f"the {len(layers):,} adapted layers hold {percent:.1f} % of the model")
    print_tables(settings, model)
    if model.config.experts:
        print_experts(model, total)


def print_tables(settings: Settings, model: Transformer) -> None:
    """Prints which tokens are new, and what is trained of the embedding table and the output head beside
    an adapter."""
    tokens = new_tokens_of(settings, model.source)
    if tokens is not None:
        ids = (
            f"{tokens.ids[0]:,} to {tokens.ids[-1]:,}"
            if len(tokens.ids) > 1
            else f"{tokens.ids[0]:,}"
        )
        before = checkpoint.read_config(model.source).vocab_size
        room = f"in the {before:,} rows that the table has"
        if tokens.ids.stop > before:
            room = f"the table grows from {before:,} to {tokens.ids.stop:,} rows"
        print(f"tokens    {len(tokens.texts):,} new, ids {ids}, {room}")
        shown = [
            f"{one_line(text, 30)} as that of {number_of(len(parts), 'token')}"
            for text, parts in list(zip(tokens.texts, tokens.parts, strict=True))[:3]
        ]
        more = ", ..." if len(tokens.texts) > 3 else ""
        print_line(f"their rows begin as the mean of what the text had: {', '.join(shown)}{more}")
    factors = lr_factors(settings)
    for name, table in trained_tables(model).items():
        tied = ", which is the output head too" if model.head is None else ""
        rate = settings.lr * factors[table.rate_name]
        which = ""
        if settings.train_tokens and isinstance(table, TrainedRows):
            which = (
                f" ({one_line(settings.train_tokens, 60)}{' and the new ones' if tokens else ''})"
            )
        print_line(
            f"trained as well: {table.extent}{which} of {checkpoint.hf_name(model, name)}{tied}, peak rate"
            f" {rate:.2g}"
        )


def print_experts(model: Transformer, total: int) -> None:
    """Prints how much of the model its routed experts hold. total: the base's parameters."""
    experts = model.config.experts
    inside = []
    for name, layer in model.named_modules():
        if ".experts." in name and isinstance(layer, Linear):
            inside.append(layer)
    percent = 100 * matrix_size(inside) / total
    parameters = model.named_parameters()
    is_trained = any(p.requires_grad for name, p in parameters if ".experts." in name)
    remark = "" if is_trained else ", NOT trained"
    print_line(
        f"{experts.count} experts a layer, {experts.active} a token,"
        f" hold {percent:.1f} % of the model{remark}; balance loss x {experts.balance:g}"
    )
    if is_trained and lora.lora_layers(model):
        print_adapted_experts(model)


def print_adapted_experts(model: Transformer) -> None:
    """Prints how many of the matrices of routed experts have LoRA, of each kind, and why peft could not
    load that, where it could not."""
    adapted: Counter[str] = Counter()
    present: Counter[str] = Counter()
    for module in model.modules():
        if not isinstance(module, Experts):
            continue
        for expert in module.experts:
            for part, layer in expert.named_children():
                present[part] += 1
                adapted[part] += isinstance(layer, lora.LoRALinear)
    counts = ", ".join(f"{part} {adapted[part]:,} of {present[part]:,}" for part in present)
    in_parameters = any(layer.place for layer in lora.lora_layers(model).values())
    form = "stacked, as target_parameters" if in_parameters else "each by itself"
    print_line(f"LoRA on matrices of experts in all layers: {counts} ({form})")
    problem = why_peft_can_t(model)
    if problem:
        print_line(f"NOTE: peft can't load this as it is: {problem}. Merge it (convert.py merge)")


def print_base(settings: Settings, model: Transformer) -> None:
    """Prints what of the frozen base is in 4 bits, and what of config.json is ignored."""
    layers = quantized_linears(model).values()
    if layers:
        percent = 100 * matrix_size(layers) / base_size(model)
        size = sum(p.nbytes for layer in layers for p in layer.nf4.parameters())
        rest = "embeddings and norms" if model.head in layers else "embeddings, norms and head"
        print(
            f"base      {len(layers):,} linears, {percent:.1f} % of the model, in NF4:"
            f" {size / 1e6:,.1f} MB; {rest} in {dtype_name(model.dtype)}"
        )
        for name in model.unquantized:
            print_line(f"NOTE: {name} stays in 16 bits, its rows are no whole blocks of 64")
    if model.config.ignored_settings:
        names = ", ".join(model.config.ignored_settings)
        print_line(f"NOTE: config.json's {names} is ignored in training")


def print_run(settings: Settings, model: Transformer, device: torch.device) -> None:
    """Prints the machine, the steps and the optimizer, and what was done to save memory."""
    reasons = settings.reasons
    dtype = dtype_name(model.dtype)
    print(f"machine   {device}, {dtype}: {reasons['dtype']}; {reasons['compile']}")
    waiting = wait_policy_note()
    if waiting:
        print_line(waiting)

    ranks = distributed.dp_size()
    factors = f"{settings.batch_size} x {settings.accumulate}"
    if ranks > 1:
        factors += f" x {ranks}"
    unit = "rows" if settings.pack else "examples"
    epochs = settings.steps / settings.steps_per_epoch
    print(
        f"run       {number_of(settings.steps, 'step')} of {factors} {unit} ({epochs:.2f} epochs);"
        f" {optimizers.DESCRIPTIONS[settings.optimizer]}, rate {settings.lr:g}{settings.reasons['lr']},"
        f" {settings.schedule} after {number_of(settings.warmup, 'step')} of warm-up,"
        f" decay {settings.weight_decay:g}, clip {settings.clip:g}, seed {settings.seed}"
    )
    if settings.reasons["val_limit"]:
        print(f"validates {settings.reasons['val_limit']}")
    if settings.max_tokens < max_tokens_per_micro_batch(device):
        limit = f"{settings.max_tokens:,}"
        print_line(f"in micro-batches of at most {limit} tokens; more do not fit")
    if settings.activation_checkpointing != "none":
        kept = KEPT_ACTIVATIONS[settings.activation_checkpointing]
        print_line(f"kept for the backward: {kept}")
    if settings.weights == "bf16":
        print_line("trained weights in bfloat16, rounded up or down at random, right on average")
    if settings.save_dtype:
        print_line(f"saved in {settings.save_dtype}: {settings.reasons['save_dtype']}")
    if settings.optimizer_offload:
        print_line(f"masters and moments in fp32 on the host; weights on the GPU in {dtype}")

    trained = [p for p in model.parameters() if p.requires_grad]
    stuck = optimizers.share_too_small_to_move(trained, settings.lr)
    if stuck > STUCK:
        advice = "raise --lr"
        if settings.weights == "bf16":
            advice = "they move at random, right on average"
        print_line(
            f"NOTE: steps of --lr {settings.lr:g} are too small for {100 * stuck:.0f} % of the"
            f" weights; {advice}"
        )


def print_processes(settings: Settings) -> None:
    """Prints how several ranks share the model and its batches; nothing for one that has it all."""
    count = distributed.world_size()
    if count == 1 and settings.shard == "none":
        return
    if settings.shard == "none":
        layout = "each holds the whole model"
    elif settings.shard == "full":
        layout = "each holds a part of every tensor"
    else:
        layout = "each node holds the whole model"
    shared = ""
    if distributed.context_parallel:
        shared = f"; {settings.context_parallel} share each batch's tokens (experimental)"
    print(f"processes {count} processes, {layout}{settings.reasons['shard']}{shared}")


def print_interruption(
    state: TrainState, checkpointer: Checkpointer, metrics: MetricsLogger
) -> None:
    """Says how to go on with a run that a signal has stopped, once its checkpoint is written."""
    checkpointer.wait()
    newest = checkpointer.newest
    # Another step's where the last checkpoint could not be written, as on a full disk.
    since = f", from {newest}" if newest != f"step-{state.step}" else ""
    advice = "nothing is saved"
    if newest:
        out = shlex.quote(str(checkpointer.out))
        advice = f"python train.py --out {out} --resume goes on{since}"
    metrics.bar.write(f"stopped   after step {state.step}; {advice}")


def print_end(
    settings: Settings,
    state: TrainState,
    metrics: MetricsLogger,
    out: Path,
    memory: float,
    gauge: Gauge,
    scorer: AnswerScorer | None = None,
) -> None:
    """Says what the training took, how far it has moved the model, and where its outcome is. memory:
    the peak, in bytes."""
    seconds = time.perf_counter() - metrics.start
    best = "best/, " if state.has_best else ""
    print(
        f"trained   {state.tokens:,} tokens in {seconds:.0f} s ({settings.expected_seconds:.0f}"
        f" were expected); peak memory {memory / 1e9:.2f} GB; in {out}: final/, {best}metrics.jsonl, loss.png"
    )
    launch = time.perf_counter() - metrics.launched
    if scorer:
        print(
            f"metric    {scorer.written(state.score)} of {len(scorer.questions):,} validation prompts"
            f" ({scorer.written(state.first_score)} before the training); answering took"
            f" {scorer.seconds:.1f} s, {100 * scorer.seconds / launch:.1f} % of the time"
        )
    if gauge.is_on:
        print(
            f"gauge     KL(base || tuned) {state.kl_base:.4f} nats a token on"
            f" {gauge.examples.tokens:,} validation tokens (0 before the training); measuring it"
            f" took {gauge.seconds:.1f} s, {100 * gauge.seconds / launch:.1f} % of the time"
        )


def print_next_command(settings: Settings, folder: Path, data: TrainingData) -> None:
    """Prints the command that tries what was trained. folder: best/ or final/."""
    has_head = OBJECTIVES[settings.objective].has_head
    if settings.objective == "reward":
        print(f"next      {folder / 'README.md'} says how transformers scores an answer with it")
        return
    words = ["python evaluate.py classify" if has_head else "python generate.py"]
    is_adapter = method_of(settings).freezes_base
    if (folder / OWN_BASE).is_dir():
        # Its base is found there.
        named = {"--adapter": str(folder)}
    elif is_adapter:
        named = {"--model": settings.model, "--quant": settings.quant, "--adapter": str(folder)}
    else:
        named = {"--model": str(folder)}
    for flag, value in named.items():
        if value:
            words.append(f"{flag} {shlex.quote(value)}")
    if has_head:
        words.append("--data FILE")
    elif not data.train.chat:
        words.append("--complete")
    command = " ".join(words)
    print(f"next      {command}")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
