"""The first lines of a run: everything that was chosen, and what to expect; and the last ones."""

import shlex
from pathlib import Path

import torch

import checkpoint
import distributed
import lora
import optimizers
from common.console import one_line
from data import TrainingData, max_tokens_per_micro_batch
from methods import method_of
from model import Linear, Transformer, quantized_linears
from planning import multi_gpu
from planning.report import recipe_and_layout
from tokenizer import Tokenizer
from training.defaults import Settings

KEPT_ACTIVATIONS = {
    "selective": "products, not norms and attention's probabilities (--activation-checkpointing selective)",
    "full": "the inputs of blocks, which are computed twice (--activation-checkpointing full)",
    "offload": "the inputs of blocks, on the host; blocks are computed twice (--activation-checkpointing offload)",
}
STUCK = 0.5  # the share of the weights that a step can't move from which on that is worth a line
INDENT = " " * 10


def print_summary(
    settings: Settings, model: Transformer, tokenizer: Tokenizer, device: torch.device
) -> None:
    """What is trained, on what, how, and what it will take."""
    print_model(model, tokenizer)
    print_method(settings, model)
    print_base(settings, model)
    print_run(settings, model, device)
    recipe, layout = recipe_and_layout(settings)
    memory = multi_gpu.memory_per_process(
        model, recipe, layout, settings.workload, device.type, settings.context_parallel
    )
    minutes = settings.expected_seconds / 60
    print(
        f"expected  {memory.peak / 1e9:.1f} GB of memory, {minutes:.1f} min of training", flush=True
    )


def print_model(model: Transformer, tokenizer: Tokenizer) -> None:
    folder = model.source
    size = base_size(model)
    print(
        f"model     {folder}: {model.config.family}, {size:,} parameters; tokenizer: {tokenizer.description}"
    )
    if (folder / "source.json").is_file():  # written by the conversion of a GGUF file
        source = checkpoint.read_json(folder / "source.json")
        kinds = ", ".join(
            f"{count} {kind}" for kind, count in source.get("tensor_types", {}).items()
        )
        print(
            f"{INDENT}made of {one_line(str(source.get('file')))}, dequantised; its tensors are {kinds}"
        )
    for end in sorted(tokenizer.unlisted_ends):
        print(
            f"{INDENT}NOTE: answers end with {tokenizer.decode([end])!r}, id {end}, which neither config.json nor"
        )
        print(
            f"{INDENT}generation_config.json lists as an end; tell the server that will run the model to stop there"
        )


def base_size(model: Transformer) -> int:
    """Numbers in the base model's parameters."""
    adapters = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    return model.size - adapters


def print_method(settings: Settings, model: Transformer) -> None:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = base_size(model)
    layers = lora.lora_layers(model).values()
    if settings.adapter:
        how = f"going on from {settings.adapter}"
    elif layers:
        how = f"rank {settings.rank}, alpha {settings.alpha:g} on {settings.targets}"
    else:
        how = settings.train or "all"
    share = f"{100 * trained / total:.2f} % of the model's"
    print(f"method    {settings.method} ({how}): {trained:,} parameters trained, {share}")
    if layers:
        adapted = sum(layer.base.in_features * layer.base.out_features for layer in layers)
        print(
            f"{INDENT}the {len(layers):,} adapted layers hold {100 * adapted / total:.1f} % of the model"
        )
    if experts := model.config.experts:
        inside = [
            layer
            for name, layer in model.named_modules()
            if ".experts." in name and isinstance(layer, Linear)
        ]
        share = 100 * sum(layer.in_features * layer.out_features for layer in inside) / total
        trains = any(p.requires_grad for name, p in model.named_parameters() if ".experts." in name)
        print(
            f"{INDENT}{experts.count} experts a layer, {experts.active} a token, hold {share:.1f} % of the model"
            f"{'' if trains else ', NOT trained'}; balance loss x {experts.balance:g}"
        )


def print_base(settings: Settings, model: Transformer) -> None:
    """The frozen base, where it is in 4 bits, and what of config.json is not heeded."""
    if layers := quantized_linears(model).values():
        share = (
            100 * sum(layer.in_features * layer.out_features for layer in layers) / base_size(model)
        )
        size = sum(p.nbytes for layer in layers for p in layer.nf4.parameters())
        rest = "embeddings and norms" if model.head in layers else "embeddings, norms and head"
        print(
            f"base      {len(layers):,} linears, {share:.1f} % of the model, in NF4: {size / 1e6:,.1f} MB;"
            f" {rest} in {dtype_name(model.dtype)}"
        )
        for name in model.unquantized:
            print(f"{INDENT}NOTE: {name} stays in 16 bits, its rows are no whole blocks of 64")
    if model.config.ignored_settings:
        print(
            f"{INDENT}NOTE: config.json's {', '.join(model.config.ignored_settings)} is ignored in training"
        )


def print_run(settings: Settings, model: Transformer, device: torch.device) -> None:
    reasons, ranks = settings.reasons, distributed.dp_size()
    print(
        f"machine   {device}, {dtype_name(model.dtype)}: {reasons['dtype']}; {reasons['compile']}"
    )
    print(
        f"run       {settings.steps:,} steps of {settings.batch_size} x {settings.accumulate}"
        f"{f' x {ranks}' if ranks > 1 else ''} {'rows' if settings.pack else 'examples'}"
        f" ({settings.steps / settings.steps_per_epoch:.2f} epochs);"
        f" {optimizers.DESCRIPTIONS[settings.optimizer]}, rate {settings.lr:g},"
        f" {settings.schedule} after {settings.warmup} steps of warm-up, decay {settings.weight_decay:g},"
        f" clip {settings.clip:g}, seed {settings.seed}"
    )
    if settings.max_tokens < max_tokens_per_micro_batch(device):
        print(
            f"{INDENT}in micro-batches of at most {settings.max_tokens:,} tokens; more do not fit"
        )
    if settings.activation_checkpointing != "none":
        print(
            f"{INDENT}kept for the backward: {KEPT_ACTIVATIONS[settings.activation_checkpointing]}"
        )
    if settings.weights == "bf16":
        print(
            f"{INDENT}trained weights in bfloat16, rounded up or down at random, right on average"
        )
    if settings.optimizer_offload:
        print(
            f"{INDENT}masters and moments in fp32 on the host; weights on the GPU in {dtype_name(model.dtype)}"
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    stuck = optimizers.share_too_small_to_move(trained, settings.lr)
    if stuck > STUCK:
        fate = (
            "they move at random, right on average" if settings.weights == "bf16" else "raise --lr"
        )
        print(
            f"{INDENT}NOTE: steps of --lr {settings.lr:g} are too small for {100 * stuck:.0f} % of the weights; {fate}"
        )


def print_processes(settings: Settings) -> None:
    """How several ranks share the model and its batches; nothing where there is one that holds all."""
    count = distributed.world_size()
    if count == 1 and settings.shard == "none":
        return
    held = {"none": "each holds the whole model", "full": "each holds a part of every tensor"}
    layout = held.get(settings.shard, "each node holds the whole model")
    shared = ""
    if distributed.context_parallel:
        shared = f"; {settings.context_parallel} share each batch's tokens (experimental)"
    print(f"processes {count} processes, {layout}{settings.reasons['shard']}{shared}")


def print_next_command(settings: Settings, folder: Path, data: TrainingData) -> None:
    """The command that tries what was trained. folder: best/ or final/."""
    words = ["python generate.py"]
    is_adapter = method_of(settings).freezes_base
    if settings.model and is_adapter:
        words.append(f"--model {shlex.quote(settings.model)}")
    quant = settings.quant
    if quant:
        words.append(f"--quant {quant}")
    words.append(f"--{'adapter' if is_adapter else 'model'} {shlex.quote(str(folder))}")
    if not data.train.chat:
        words.append("--complete")
    print(f"next      {' '.join(words)}")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
