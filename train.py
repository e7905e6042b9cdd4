"""Fine-tunes a language model: read `train` for the run and `train_loop` for a step.

    python train.py                                                  the bundled task on the default base, in minutes
    python train.py --model FOLDER --data FILE.json                  LoRA on your model and your examples
    python train.py --model FOLDER --data FILE.json --method full    all weights
    torchrun --nproc-per-node 8 train.py ...                         the same run on 8 GPUs, the same numbers
    python train.py --help                                           every option with its default

Written to --out: config.json, metrics.jsonl, loss.png, checkpoints/, best/ and final/.
"""

import dataclasses
import math
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

import distributed
from checkpoint import copy_tokenizer, read_config
from common.device import DTYPES, peak_memory
from common.errors import UserError, describe_os_error, run
from common.files import atomic_file, write_json
from data import MicroBatches, load_training_data
from flags import Flags, as_dict, parse_flags
from interop.resolve import base_folder, pick_tokenizer
from methods import load_trainable, method_of
from model import Transformer
from objectives import OBJECTIVES, Losses, StepTotals
from optimizers import SCHEDULES, make_optimizers
from planning import report
from tokenizer import Tokenizer
from training.attention_trial import use_flash_version
from training.checkpointer import Checkpointer, check_same_run
from training.defaults import Settings, choose_steps, resolve_defaults
from training.demo import Demo
from training.evaluator import Evaluator, best_or_final, eager_mode
from training.failures import reported_failures, training_failures
from training.metrics import MetricsLogger
from training.plots import loss_curve
from training.profiling import profiled
from training.run_folder import check_room, identify_run, make_run_folder, open_run
from training.signals import GracefulStop
from training.state import TrainState
from training.summary import print_next_command, print_processes, print_summary


def main() -> None:
    flags = parse_flags(sys.argv[1:])
    with reported_failures():  # out of memory, a lost rank: one line and what helps
        train(flags)
    distributed.destroy_process_group()


def train(flags: Flags) -> None:
    """The run on a page, from the flags to final/."""
    # ---- ranks, and the run this is: a new one, or the newest whole checkpoint of --out
    opened = open_run(flags)
    if opened.is_complete:
        return
    flags, device, resumed = opened.flags, opened.device, opened.checkpoint

    # ---- base model, tokenizer, data (downloads, conversions and token rows are cached once a machine)
    with distributed.local_rank0_first():
        folder = base_folder(flags.model, flags.adapter)
    config = read_config(folder)
    if flags.plan and not report.needs_data(flags, folder):
        return report.print_plan_of_config(flags, config, device)
    if config.experts and distributed.context_parallel:
        raise UserError(
            "--context-parallel: not with routed experts, whose balance is of whole batches"
        )
    tokenizer = pick_tokenizer(folder, flags.adapter, flags.template)
    with distributed.local_rank0_first():
        data = load_training_data(flags, tokenizer, config.max_positions, config.vocab_size, device)
    if flags.plan:
        return report.print_plan_of_data(*choose_steps(flags, data.sampler), config, data, device)

    # ---- settings that were left open: rate, steps, sharding, compile. A reason for each; frozen from here on
    settings = resolve_defaults(flags, folder, data, device)

    # ---- model, objective, micro-batches
    model = load_trainable(settings, folder, device)
    objective = OBJECTIVES["supervised"]
    loader = MicroBatches(
        data.train, data.sampler, device, settings.batch_size, settings.accumulate, settings.max_tokens, settings.seed,
        dropout=bool(settings.dropout), context_parallel=settings.context_parallel,
    )  # fmt: skip
    print_summary(settings, model, tokenizer, device)
    print_processes(settings)
    if resumed:
        print(
            f"resumed   after step {resumed.state['step']:,} of {settings.steps:,}, from {resumed.folder}"
        )
    demo = Demo(model, tokenizer, settings.expected_seconds) if is_bundled_task(settings) else None
    if settings.compile == "on":
        model.compile_blocks()
    if settings.attention != "auto":
        print(f"attention {use_flash_version(settings.attention, model, objective, loader)}")

    # ---- the run's folder; made this late, so that what was refused so far leaves none behind
    origin = identify_run(settings, folder, data)
    if resumed:
        check_same_run(resumed, origin)
    out = Path(distributed.run_on_rank0(lambda: make_run_folder(settings, resumed)))
    settings = dataclasses.replace(settings, out=str(out))
    check_room(settings, model, out)
    print(f"saves     {settings.reasons['save_every']}")

    # ---- what happens between steps
    optimizers = make_optimizers(
        model, settings.optimizer, settings.lr, settings.weight_decay, settings.optimizer_offload
    )
    state = TrainState.from_dict(resumed.state) if resumed else TrainState()
    metrics = MetricsLogger(settings, out, settings.flops_per_token, device, state)
    if distributed.is_rank0():
        with atomic_file(out / "config.json") as tmp:
            write_json(as_dict(settings) | {"given": sorted(settings.given)}, tmp)
    distributed.start_training_timeout(settings.timeout)
    save = lambda name: save_weights(settings, model, tokenizer, origin, out / name)
    evaluator = Evaluator(settings, out, model, data, metrics, device, lambda: save("best"))
    checkpointer = Checkpointer(
        settings, out, model, optimizers, data.sampler, origin, metrics.bar.write
    )
    if resumed:
        checkpointer.restore(resumed, state)

    # ---- the loop
    loop = (settings, model, objective, optimizers, loader, state, metrics)
    if settings.profile:
        with profiled(settings.profile, device, out):
            train_loop(*loop, GracefulStop())
        return metrics.close()
    suggest = lambda: report.suggest_savings(
        settings, config, settings.workload, device, DTYPES[settings.dtype]
    )
    try:
        with training_failures(out, checkpointer, suggest), GracefulStop() as stop:
            train_loop(*loop, stop, evaluator, checkpointer)
    finally:
        metrics.bar.close()
    checkpointer.wait()
    metrics.close()
    if state.interrupted_by:
        distributed.destroy_process_group()
        sys.exit(128 + state.interrupted_by)

    # ---- final/, the picture of the losses, and what the bundled task has taught
    model.eval()
    save_final(settings, model, state, checkpointer, lambda: save("final"), out)
    if distributed.is_rank0():
        loss_curve(out / "metrics.jsonl", out / "loss.png", f"{folder.name}, {settings.method}")
    print_end(state, metrics, out, peak_memory(device))
    if demo:
        with eager_mode(settings):
            demo.finish(out)
    print_next_command(settings, out / best_or_final(state), data)


def train_loop(
    settings: Settings,
    model: Transformer,
    objective: Callable[..., Tensor],
    optimizers: list,
    loader: MicroBatches,
    state: TrainState,
    metrics: MetricsLogger,
    stop: GracefulStop,
    evaluator: Evaluator | None = None,
    checkpointer: Checkpointer | None = None,
) -> None:
    """The loop on a page: from `state.step` to the last step, a signal, or early stopping."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if evaluator and state.step == 0 and evaluator.due(state):
        evaluator.run(state)  # the untouched base, to compare with
    model.train()
    last_step = min(settings.profile or settings.steps, settings.steps)
    for step in range(state.step, last_step):
        micro_batches = loader.step(step)  # this rank's share; every rank has as many

        # The loss of a step is the sum over its trained tokens, on all ranks, divided by their number. So 1 x 8 = 2 x 4
        # = 2 ranks x 4. The stop signal travels along, since all ranks must stop at the same step.
        totals = StepTotals.of(micro_batches, stop.signal)

        losses = Losses(loader.device)
        for i, batch in enumerate(micro_batches):  # gradient accumulation
            is_last = i == len(micro_batches) - 1
            distributed.set_gradient_sync(model, is_last or settings.reduce == "each")
            objective(model, batch, totals, losses).backward()
        distributed.all_reduce_gradients(
            trained
        )  # data parallel without FSDP; with it they are reduced already
        grad_norm = distributed.clip_grad_norm_(trained, settings.clip or math.inf)
        losses.all_reduce()

        # A step without a finite loss or gradient is skipped. The flag stays on the device: nothing here waits for it.
        found_inf = (~(losses.loss + grad_norm).isfinite()).float()
        lr = lr_at(step, settings)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step(found_inf)
            optimizer.zero_grad()

        state.step = step + 1
        examples = [example for batch in micro_batches for example in batch.examples]
        metrics.log_step(
            state.step, losses, grad_norm, lr, totals, examples
        )  # read one step late: nothing waits here

        out_of_patience = False
        if evaluator and evaluator.due(state):
            out_of_patience = evaluator.run(
                state
            )  # validates, keeps best/, counts for early stopping
        # A single rank need not wait for the next step's totals to know of a signal, also one during the validation.
        stop_signal = totals.stop_signal or (stop.signal if distributed.world_size() == 1 else 0)
        interrupted = bool(stop_signal) and state.step < settings.steps
        # Early stopping ends the run: it goes straight to final/, and needs no checkpoint.
        if checkpointer and not out_of_patience and (checkpointer.due(state) or interrupted):
            with metrics.paused():
                metrics.sync()
                checkpointer.save(state)
        if checkpointer and interrupted:
            state.interrupted_by = (
                stop.signal or signal.SIGTERM
            )  # of another rank, the number is not known here
            print_interruption(settings, state, checkpointer, metrics)
            return
        if out_of_patience:
            return


def lr_at(step: int, settings: Settings) -> float:
    """Learning rate of step 0, 1, ...: linear warm-up, above 0 from the first step, then --schedule."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / (settings.warmup + 1)
    progress = (step - settings.warmup) / (
        settings.steps - settings.warmup
    )  # 0 at the peak, 1 a step after the last
    return settings.lr * SCHEDULES[settings.schedule](progress)


def is_bundled_task(settings: Settings) -> bool:
    """True for `python train.py` and options that leave task, base and method of the demonstration as they are."""
    sharded = distributed.world_size() > 1 or settings.shard != "none"
    return not (settings.data or settings.model or settings.adapter or settings.profile or sharded)


def save_weights(
    settings: Settings, model: Transformer, tokenizer: Tokenizer, origin: dict, folder: Path
) -> None:
    """Writes final/ or best/: a Hugging Face folder, or a PEFT adapter folder with the tokenizer and chat template it
    was trained with; beside it plaintune.json, which names the base and its weights' hash."""

    def write_extra(tmp: Path) -> None:
        if method_of(settings).freezes_base:  # save_model carries them over by itself
            copy_tokenizer(tokenizer.source, tmp)
        tokenizer.save_template(tmp)
        write_json(
            {**origin, "method": settings.method, "quant": settings.quant}, tmp / "plaintune.json"
        )

    method_of(settings).save(model, folder, write_extra)


def save_final(
    settings: Settings,
    model: Transformer,
    state: TrainState,
    checkpointer: Checkpointer,
    save,
    out: Path,
):
    """Writes final/. UserError where the weights are no numbers any more, or where it can't be written."""
    trained = [distributed.to_local(p) for p in model.parameters() if p.requires_grad]
    if not distributed.all_ranks_agree(all(bool(p.isfinite().all()) for p in trained)):
        raise UserError(
            f"step {settings.steps}: weights are no numbers any more; nothing saved, try a lower --lr"
        )
    newest = checkpointer.newest
    again = f"--out {out} --resume goes on from {newest}"
    try:
        with distributed.extended_timeout():
            save()
    except RuntimeError as error:
        if not distributed.is_lost_rank(error) or not newest:
            raise
        raise UserError(f"{distributed.lost_rank_error(error)}; {again}") from None
    except OSError as error:
        advice = f"; make room, then {again}" if newest else ""
        raise UserError(
            f"final/ could not be written, {describe_os_error(error, out)}{advice}"
        ) from None


def print_interruption(
    settings: Settings, state: TrainState, checkpointer: Checkpointer, metrics: MetricsLogger
) -> None:
    checkpointer.wait()
    newest = checkpointer.newest
    since = f", from {newest}" if newest != f"step-{state.step}" else ""
    resume = f"python train.py --out {shlex.quote(settings.out)} --resume goes on{since}"
    metrics.bar.write(
        f"stopped   after step {state.step}; {resume if newest else 'nothing is saved'}"
    )


def print_end(state: TrainState, metrics: MetricsLogger, out: Path, memory: float) -> None:
    seconds = time.perf_counter() - metrics.start
    best = "best/, " if state.has_best else ""
    print(
        f"trained   {state.tokens:,} tokens in {seconds:.0f} s; peak memory {memory / 1e9:.2f} GB;"
        f" in {out}: final/, {best}metrics.jsonl, loss.png"
    )


if __name__ == "__main__":
    run(main)
