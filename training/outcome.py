"""What a run leaves behind: the weights in best/ and final/, the picture of the losses, what the bundled
task has taught, and the report."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import distributed
from adapter_files import base_numbers
from checkpoint import all_finite, copy_tokenizer
from common.device import peak_memory
from common.errors import UserError, describe_os_error
from common.files import write_json
from interop.push import push_folder
from methods import method_of
from model import Transformer, eager_mode
from training.best import best_or_final
from training.checkpointer import Checkpointer
from training.defaults import Settings
from training.demo import Demo
from training.evaluator import Evaluator
from training.model_card import ModelCard
from training.plots import loss_curve
from training.run_report import write_run_report
from training.safety import SafetyCheck
from training.state import TrainState
from training.summary import print_end, print_next_command


def finish(
    card: ModelCard,
    model: Transformer,
    evaluator: Evaluator,
    checkpointer: Checkpointer,
    safety: SafetyCheck | None,
    demo: Demo | None,
) -> None:
    """Ends a run behind its last step, or exits as after a signal.

    card: knows the run. safety, demo: None without --safety, and for other data than the bundled task's.
    """
    settings, state, metrics = card.settings, card.state, card.metrics
    out = metrics.out
    checkpointer.wait()
    metrics.close()
    if state.interrupted_by:
        write_run_report(card, model)
        distributed.destroy_process_group()
        # The shell's convention for a program that a signal has ended.
        sys.exit(128 + state.interrupted_by)

    model.eval()
    save = functools.partial(save_weights, card, model, out / "final")
    save_final(settings, model, state, checkpointer, save, out)
    if distributed.is_rank0():
        title = f"{out.name}: {settings.method} of {card.base_name}"
        loss_curve(out / "metrics.jsonl", out / "loss.png", title)
    scorer = evaluator.scorer
    memory = peak_memory(evaluator.device)
    print_end(settings, state, metrics, out, memory, evaluator.gauge, scorer)
    changes = []
    change = evaluator.change.change()
    if change is not None:
        changes.append(change)
    if safety:
        safety.finish(model, out)
        changes += safety.changes
    if demo:
        with eager_mode(model):
            demo.finish(out, state.kl_base)
    write_run_report(card, model, changes, demo)
    tuned = out / best_or_final(settings, state, scorer.heading if scorer else "")
    print_next_command(settings, tuned, card.data)
    if settings.push and distributed.is_rank0():
        # The other ranks have nothing to wait for.
        push_folder(tuned, settings.push)


def save_weights(card: ModelCard, model: Transformer, folder: Path) -> None:
    """Writes final/ or best/: a Hugging Face folder, or a PEFT adapter folder with the tokenizer
    and chat template it was trained with.

    In it, plaintune.json names the base, its weights' hash, and which of its linears were in 4 bits,
    and README.md says what a reader of the weights must know.

    card: knows the run.
    """
    settings, tokenizer = card.settings, card.tokenizer
    method = method_of(settings)

    def write_extra(tmp: Path) -> None:
        # A whole model is saved by save_model, which copies its base's files itself.
        if method.freezes_base or tokenizer.source != model.source:
            copy_tokenizer(tokenizer.source, tmp)
        tokenizer.save_template(tmp)
        facts = dict(card.origin)
        facts["method"] = settings.method
        facts["steps"] = settings.steps
        facts |= base_numbers(model)
        if tokenizer.writes_date:
            facts["date"] = tokenizer.day
        if tokenizer.system:
            facts["system"] = tokenizer.system
        write_json(facts, tmp / "plaintune.json")
        card.write(tmp, folder.name)

    remark = method.save(model, settings, folder, write_extra)
    if remark and distributed.is_rank0():
        card.metrics.bar.write(f"{folder.name + '/':9} {remark}")


def save_final(
    settings: Settings,
    model: Transformer,
    state: TrainState,
    checkpointer: Checkpointer,
    save: Callable[[], None],
    out: Path,
) -> None:
    """Writes final/ by save().

    Raises UserError if the weights are no numbers any more, or if final/ can't be written. It names
    the newest checkpoint, from which the run can be ended once more.
    """
    trained = [distributed.to_local(p) for p in model.parameters() if p.requires_grad]
    if not distributed.all_ranks_agree(all(map(all_finite, trained))):
        problem = "weights are no numbers any more; nothing saved, try a lower --lr"
        raise UserError(f"step {settings.steps}: {problem}")
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
        reason = describe_os_error(error, out)
        raise UserError(f"final/ could not be written, {reason}{advice}") from None
