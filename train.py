"""Fine-tunes a language model: read `train` for the run and `train_loop` for a step.

    python train.py                                       the bundled task on the default base
    python train.py --model FOLDER --data FILE.json       LoRA on your model and your examples
    python train.py --model ... --data ... --method full  all weights
    torchrun --nproc-per-node 8 train.py ...              the same run on 8 GPUs, the same numbers
    python train.py --help                                every option with its default

Written to --out: config.json, metrics.jsonl, loss.png, report.html, checkpoints/, best/ and final/.
"""

import sys

from common.errors import run
from common.threads import choose_wait_policy
from flags import parse_flags

if __name__ == "__main__":
    # This is read when torch is loaded.
    choose_wait_policy()
    # --help and a mistake in a flag are answered here: what is imported below takes seconds.
    run(lambda: parse_flags(sys.argv[1:]))

import dataclasses
import functools
import math
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

import distributed
from adapters import check_room_for_text
from adapting.new_tokens import (
    check_room_for_tokens,
    folder_of_new_tokens,
    ids_of_tokens,
    new_tokens_of,
)
from adapting.tables import vocabulary_size
from checkpoint import read_config
from common.choices import AUTO
from common.console import lasting_output
from common.errors import UserError
from common.folder_lock import FolderLock
from common.origin import STRETCHED_FILE
from data import MicroBatches, TrainingData, load_training_data, needs_seeds
from families import Config
from flags import Flags
from interop.resolve import base_folder, pick_tokenizer
from interop.rope_scaling import stretch_line, stretched_folder
from methods import load_trainable, lr_factors, method_of_adapter, quant_of, start_of
from model import Transformer
from objectives import (
    Losses,
    RunObjective,
    StepTotals,
    check_objective,
    examples_wanted,
    labels_of_head,
    with_options_of_objective,
)
from optimizers import SCHEDULES, make_optimizers
from planning import report
from tokenizer import Tokenizer
from training.answer_score import AnswerScorer
from training.attention_trial import use_flash_version
from training.calibration import measure_pace
from training.checkpointer import Checkpoint, Checkpointer
from training.defaults import (
    Settings,
    choose_steps,
    choose_val_limit,
    is_bundled_task,
    resolve_defaults,
)
from training.demo import Demo
from training.evaluator import Evaluator
from training.ewc import EWC
from training.failures import reported_failures, training_failures
from training.lr_probe import check_lr_auto, choose_lr
from training.metrics import MetricsLogger, NoMetrics
from training.model_card import ModelCard
from training.outcome import finish, save_weights
from training.profiling import profiled
from training.reference import note_reference
from training.run_folder import (
    identify_run,
    open_run,
    open_run_folder,
    save_config,
    with_date_and_system,
)
from training.run_objective import objective_of_run
from training.run_report import answers_before
from training.safety import SafetyCheck
from training.signals import GracefulStop
from training.state import TrainState
from training.summary import print_interruption, print_model_summary, print_run_summary


def main() -> None:
    flags = parse_flags(sys.argv[1:])
    # What can't go on (out of memory, a lost rank) ends with one line and what helps; a reader of
    # stdout who leaves ends nothing; and no second run writes into the folder of this one.
    remark = "stdout is closed; what follows is not printed, a run's numbers are in metrics.jsonl"
    with reported_failures(), lasting_output(remark), FolderLock() as lock:
        train(flags, lock)
    distributed.destroy_process_group()


def train(flags: Flags, lock: FolderLock) -> None:
    """The run on a page, from the flags to final/. lock: is given the run's folder."""
    # ---- ranks, and the run this is: a new one, or the newest whole checkpoint of --out
    opened = open_run(flags, lock)
    if opened.is_complete:
        return
    device, resumed = opened.device, opened.checkpoint
    check_objective(opened.flags)
    check_lr_auto(opened.flags)

    # ---- base model, tokenizer, data: what is downloaded or converted is cached once a machine
    inputs = read_inputs(opened.flags, device)
    if inputs is None:  # --plan
        return
    folder, tokenizer, data = inputs.folder, inputs.tokenizer, inputs.data

    # ---- what was left open (rate, steps, sharding, compile), with reasons; frozen from here on
    settings = resolve_defaults(inputs.flags, folder, data, device)
    safety = inputs.safety
    if safety:
        safety.check_shard(settings)

    # ---- model, objective, micro-batches; and the settings that a trial decides
    labels = labels_of_head(settings, inputs.config, data.train)
    model = load_trainable(settings, folder, device, labels)
    objective = objective_of_run(settings, model, tokenizer, data)
    loader = MicroBatches(
        data.train, data.sampler, device, settings.batch_size, settings.accumulate, settings.max_tokens, settings.seed,
        seeded=needs_seeds(settings), context_parallel=settings.context_parallel,
    )  # fmt: skip
    settings, demo = expect_time(settings, inputs, model, objective, device)
    scorer = None
    if settings.eval_metric:
        scorer = AnswerScorer(settings, model, tokenizer, data.val, device)
    if resumed:
        print_resumed(settings, resumed)
    choose_kernels(settings, model, objective, loader)
    if inputs.flags.lr == AUTO:
        train_steps = functools.partial(train_unlogged, model, objective)
        settings = choose_lr(settings, model, objective, data, loader, train_steps)
    ewc = EWC(settings, model, tokenizer, device) if settings.ewc else None

    # ---- the run's folder, made this late so that a run that was refused leaves none behind
    origin = identify_run(settings, folder, data)
    settings, out = open_run_folder(settings, lock, resumed, origin, model, tokenizer)

    # ---- what happens between steps
    optimizers = make_optimizers(
        model, settings.optimizer, settings.lr, settings.weight_decay, settings.optimizer_offload,
        lr_factors(settings),
    )  # fmt: skip
    state = TrainState.from_dict(resumed.state) if resumed else TrainState()
    if ewc:
        ewc.begin(out)
    metrics = MetricsLogger(settings, out, settings.flops_per_token, device, state)
    if distributed.is_rank0():
        save_config(settings, out)
    distributed.start_training_timeout(settings.timeout)
    card = ModelCard(settings, origin, folder, data, tokenizer, metrics, state)
    card.see(model, inputs.config)
    note_reference(settings, model, data, out, bool(resumed))
    save = functools.partial(save_weights, card, model)
    # Before a step is taken or a checkpoint loaded, since it measures against the base.
    evaluator = Evaluator(
        settings, out, model, objective, data, metrics, state, device, save, scorer
    )
    if safety:
        safety.measure_base(model)
    card.first_answers = answers_before(card, model)
    checkpointer = Checkpointer(
        settings, out, model, optimizers, data.sampler, origin, metrics.bar.write
    )
    if resumed:
        checkpointer.restore(resumed, state)

    # ---- the loop
    run_loop = functools.partial(
        train_loop, settings, model, objective, optimizers, loader, state, metrics, ewc=ewc
    )
    if settings.profile:
        with profiled(settings.profile, device, out):
            run_loop(GracefulStop())
        metrics.close()
        return
    # Called when a GPU's memory runs out: which flags would have taken less of it.
    workload = settings.workload
    suggest = functools.partial(report.suggest_savings, settings, inputs.config, workload, device)
    try:
        with training_failures(out, checkpointer, suggest), GracefulStop() as stop:
            run_loop(stop, evaluator, checkpointer)
    finally:
        metrics.bar.close()
    finish(card, model, evaluator, checkpointer, safety, demo)


@dataclass
class Inputs:
    """What a run is made from.

    flags: with the date and the system message of its prompts.
    folder, config: of the base model.
    safety: the prompts of --safety; None without.
    """

    flags: Flags
    folder: Path
    config: Config
    tokenizer: Tokenizer
    data: TrainingData
    safety: SafetyCheck | None


def read_inputs(flags: Flags, device: torch.device) -> Inputs | None:
    """Finds the base model and reads tokenizer and data, or prints the plan for them and returns None
    (--plan)."""
    with distributed.local_rank0_first():
        folder = base_folder(flags.model, flags.adapter)
        if flags.rope_scaling:
            folder = stretched_folder(folder, flags.rope_scaling)
    if (folder / STRETCHED_FILE).is_file():
        print(stretch_line(folder))
    flags = with_options_of_objective(with_date_and_system(flags, folder))
    method = method_of_adapter(flags)
    if method:
        print(f"method    {method}, as {flags.adapter} is one of that")
        flags = dataclasses.replace(flags, method=method)
    config = read_config(folder)
    # What can't be read is refused before the plan.
    check_room_for_tokens(new_tokens_of(flags, folder), config, quant_of(flags))
    ids_of_tokens(flags, folder)
    if flags.plan and not report.needs_data(flags, folder):
        report.print_plan_of_config(flags, config, device)
        return None
    virtual_tokens = report.virtual_tokens_of(flags)
    if virtual_tokens and distributed.context_parallel:
        raise UserError("--context-parallel: is not for virtual tokens before every text")
    if virtual_tokens:
        check_room_for_text(virtual_tokens, config.max_positions)
    if config.experts and distributed.context_parallel:
        why = "not with routed experts, whose balance is of whole batches"
        raise UserError(f"--context-parallel: {why}")
    with distributed.local_rank0_first():
        own_tokenizer = folder_of_new_tokens(flags, folder)
    tokenizer = pick_tokenizer(
        folder, flags.adapter, flags.template, flags.date, flags.empty_think, flags.system, own_tokenizer
    )  # fmt: skip
    rows = vocabulary_size(config, start_of(flags))
    if own_tokenizer:
        rows = max(rows, tokenizer.vocab_size)
    with distributed.local_rank0_first():
        limit = config.max_positions - virtual_tokens
        kind, classes = examples_wanted(flags, config)
        data = load_training_data(flags, tokenizer, limit, rows, device, kind, classes)
        safety = SafetyCheck(flags.safety, tokenizer) if flags.safety else None
    if flags.plan:
        flags, steps_per_epoch = choose_steps(flags, data.sampler)
        flags, _ = choose_val_limit(flags, data, steps_per_epoch)
        data = data.validating_on(flags.val_limit or 0)
        report.print_plan_of_data(flags, steps_per_epoch, config, data, device)
        return None
    return Inputs(flags, folder, config, tokenizer, data, safety)


def expect_time(
    settings: Settings,
    inputs: Inputs,
    model: Transformer,
    objective: RunObjective,
    device: torch.device,
) -> tuple[Settings, Demo | None]:
    """Measures this machine's pace, and prints the model and the run that is expected. Of the bundled task
    the base answers now, and as many steps are taken as --budget leaves time for.

    Returns the settings with the expected time, and the bundled task; None with other data.
    """
    pace = measure_pace(settings, model, objective, inputs.data, device)
    settings = pace.expected(settings)
    print_model_summary(settings, model, inputs.tokenizer)
    demo = None
    if is_bundled_task(settings):
        demo = Demo(model, inputs.tokenizer, settings)
        whole = settings
        steps = demo.steps_within_budget(whole)
        if steps < whole.steps:
            flags = dataclasses.replace(inputs.flags, steps=steps)
            settings = pace.expected(resolve_defaults(flags, inputs.folder, inputs.data, device))
        demo.print_budget(settings, whole)
    print_run_summary(settings, model, device)
    return settings, demo


def choose_kernels(
    settings: Settings, model: Transformer, objective: RunObjective, loader: MicroBatches
) -> None:
    """Compiles the blocks (--compile), and takes the version of attention that --attention names."""
    if settings.compile == "on":
        model.compile_blocks()
    if settings.attention != "auto":
        result = use_flash_version(settings.attention, model, objective, loader)
        print(f"attention {result}")


def train_loop(
    settings: Settings,
    model: Transformer,
    objective: RunObjective,
    optimizers: list,
    loader: MicroBatches,
    state: TrainState,
    metrics: MetricsLogger,
    stop: GracefulStop,
    evaluator: Evaluator | None = None,
    checkpointer: Checkpointer | None = None,
    ewc: EWC | None = None,
) -> None:
    """The loop on a page: from `state.step` to the last step, a signal, or early stopping.

    objective: of objectives.make_objective.
    optimizers: stepped one after the other.
    evaluator, checkpointer: None where only the steps count, as under --profile.
    ewc: None without --ewc.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if evaluator and evaluator.due(state) and state.validated_at != state.step:
        # The untouched base, to compare with; or what a signal cut short before a resume.
        out_of_patience = evaluator.run(state, stop)
        if checkpointer and evaluator.was_interrupted:
            end_by_signal(stop, state, checkpointer, metrics)
            return
        if out_of_patience:
            return
    model.train()
    last_step = settings.steps
    if settings.profile:
        last_step = min(settings.profile, settings.steps)
    for step in range(state.step, last_step):
        micro_batches = loader.step(step)  # this rank's share; every rank has as many

        # The loss of a step is the weighted sum over its trained tokens, on all ranks, divided by
        # the sum of their weights. So one micro-batch of 8 equals two of 4, or one of 4 on each of
        # two ranks. The stop signal travels along, since all ranks must stop at the same step.
        # (In reinforcement learning, the micro-batches of prompts become such of answers here.)
        micro_batches, totals = objective.begin_step(model, micro_batches, step, stop.signal)

        losses = Losses(loader.device)
        for i, batch in enumerate(micro_batches):  # gradient accumulation
            is_last = i == len(micro_batches) - 1
            distributed.set_gradient_sync(model, is_last or settings.reduce == "each")
            objective(model, batch, totals, losses).backward()
        # Data parallel without FSDP sums here. With FSDP the backward has done it.
        distributed.all_reduce_gradients(trained)
        if ewc:
            # A penalty on the weights, whose gradients are the same on every rank.
            losses.ewc_penalty = ewc.add_gradients()
        grad_norm = distributed.clip_grad_norm_(trained, settings.clip or math.inf)
        losses.all_reduce()

        # A step without a finite loss or gradient is skipped. The flag stays on the device: AdamW
        # reads it there, so that the loop does not wait for it (Muon and offloading do).
        found_inf = (~(losses.loss + grad_norm).isfinite()).float()
        lr = lr_at(step, settings)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_factor", 1.0)
            optimizer.step(found_inf)
            optimizer.zero_grad()

        state.step = step + 1
        examples = [example for batch in micro_batches for example in batch.examples]
        # These tensors are read one step late, so that nothing waits here.
        metrics.log_step(state.step, losses, grad_norm, lr, totals, examples)

        if ends_here(settings, state, totals, stop, evaluator, checkpointer, metrics):
            return


def train_unlogged(
    model: Transformer,
    objective: RunObjective,
    settings: Settings,
    optimizers: list,
    loader: MicroBatches,
) -> None:
    """Takes all steps of some settings, for --lr auto: the loop, of which nothing is written or validated,
    and which a signal ends at once."""
    # Without an evaluator and a checkpointer, the loop calls nothing else of it.
    metrics = cast(MetricsLogger, NoMetrics())
    train_loop(
        settings, model, objective, optimizers, loader, TrainState(), metrics, GracefulStop()
    )


def ends_here(
    settings: Settings,
    state: TrainState,
    totals: StepTotals,
    stop: GracefulStop,
    evaluator: Evaluator | None,
    checkpointer: Checkpointer | None,
    metrics: MetricsLogger,
) -> bool:
    """Validates (which keeps best/ and counts for early stopping) and writes a checkpoint, if they are
    due after a step. Returns True if the run ends with it: out of patience, or by a signal.

    totals: of the step; with a signal of which all ranks know.
    """
    out_of_patience = False
    if evaluator and evaluator.due(state):
        out_of_patience = evaluator.run(state, stop)
    stop_signal = totals.stop_signal
    if distributed.world_size() == 1:
        # A single rank need not wait for the next step's totals to know of a signal, also of one
        # during the validation.
        stop_signal = stop_signal or stop.signal
    is_interrupted = bool(stop_signal) and state.step < settings.steps
    is_interrupted = is_interrupted or bool(evaluator and evaluator.was_interrupted)
    if checkpointer is None:
        return out_of_patience
    # Early stopping ends the run: it goes straight to final/, and needs no checkpoint.
    if not out_of_patience and (checkpointer.due(state) or is_interrupted):
        with metrics.paused():
            metrics.sync()
            checkpointer.save(state)
    if is_interrupted:
        end_by_signal(stop, state, checkpointer, metrics)
    return is_interrupted or out_of_patience


def end_by_signal(
    stop: GracefulStop, state: TrainState, checkpointer: Checkpointer, metrics: MetricsLogger
) -> None:
    """Notes the signal that ends the loop, and says how to go on."""
    # The number of a signal that another rank got is not known here.
    state.interrupted_by = stop.signal or signal.SIGTERM
    print_interruption(state, checkpointer, metrics)


def lr_at(step: int, settings: Settings) -> float:
    """Returns the learning rate of step 0, 1, ...: linear warm-up, then --schedule."""
    if step < settings.warmup:
        # Above 0 from the first step, which would otherwise train nothing.
        return settings.lr * (step + 1) / (settings.warmup + 1)
    # 0 at the peak, 1 a step after the last.
    progress = (step - settings.warmup) / (settings.steps - settings.warmup)
    return settings.lr * SCHEDULES[settings.schedule](progress)


def print_resumed(settings: Settings, resumed: Checkpoint) -> None:
    """Says after which step a run goes on, and at which rate if it had ended after fewer steps."""
    steps_done = f"{resumed.state['step']:,} of {settings.steps:,}"
    print(f"resumed   after step {steps_done}, from {resumed.folder}")
    before = resumed.state["flags"]["steps"]
    if settings.steps == before:
        return
    rate = lr_at(resumed.state["step"], settings)
    print(
        f"          prolonged from {before:,} to {settings.steps:,} steps: the rate goes on at"
        f" {rate:.2g} and falls as in one run of {settings.steps:,} ({settings.schedule} from"
        f" {settings.lr:g})"
    )


if __name__ == "__main__":
    with distributed.safe_exit():
        run(main)
