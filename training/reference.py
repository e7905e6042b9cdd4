"""What a preference objective compares with: the model before step 1, the reference.

Where switching the adapter off gives that model to the bit (methods.model_of_step_0), it is computed beside
each micro-batch. Where training leaves no such model (full fine-tuning, an --adapter that is continued,
PiSSA, DoRA, learned prompts ...), the log-probability of each answer is computed before step 1 and kept
in reference.safetensors, which a resumed run reads again.
"""

import functools
import hashlib
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import distributed
from common.errors import UserError, describe_os_error
from common.files import atomic_file, save_tensors
from common.progress import progress
from data import Batch, TrainingData, collate, split_micro_batches
from dataset.encoding import AS_PROMPTS, PAIR_KINDS
from dataset.examples import DUMMY_EXAMPLE, Dataset, ExampleIndex
from methods import model_of_step_0
from model import Transformer, eager_mode, eval_mode
from objectives import OBJECTIVES, ReferenceFn, kind_of_examples, text_logps
from training.defaults import Settings

REFERENCE_FILE = "reference.safetensors"
# Both of a pair; a judged answer, and the mismatched one.
TEXTS_PER_EXAMPLE = 2


def reference_of_run(
    settings: Settings, model: Transformer, logps: ReferenceFn | None = None
) -> ReferenceFn | None:
    """Returns the function that a run's objective gets reference log-probabilities by; None where it needs
    none.

    logps: computes them by the model as it is; None: `text_logps`.
    Raises UserError where answers are yet to be written, and no model of step 0 will be left by then.
    """
    if not needs_reference(settings):
        return None
    if not is_under_adapter(settings, model):
        if kind_of_examples(settings) == AS_PROMPTS:
            raise UserError(
                f"--beta {settings.beta:g}: wants the model before step 1 in every step, which stays there only"
                " where a new adapter can be switched off (lora, qlora, vera, ia3, bottleneck; without"
                " --adapter, pissa, dora); leave --beta out"
            )
        return noted_reference
    compute = logps or functools.partial(text_logps, model)

    def reference(batch: Batch) -> Tensor:
        # With gradients where the caller has them: some kernels round otherwise without. Nothing of the
        # model without its adapter is trained, so that nothing is kept for a backward.
        step_0 = model_of_step_0(model, settings)
        assert step_0 is not None, "see is_under_adapter"
        with step_0, eval_mode(model):
            return compute(batch)

    return reference


def needs_reference(settings: Settings) -> bool:
    """True if a run compares with the model before step 1; GRPO does with --beta alone."""
    row = OBJECTIVES[settings.objective]
    return row.has_reference and bool(settings.beta)


def is_under_adapter(settings: Settings, model: Transformer) -> bool:
    """True if the model before step 1 is there at any time, under the adapter."""
    return model_of_step_0(model, settings) is not None


def noted_reference(batch: Batch) -> Tensor:
    """Returns what was computed before step 1 of the texts of a batch, float32 [count]."""
    assert batch.texts is not None
    if batch.texts.reference is None:
        # A trial of this machine's pace comes before it, and of that only the time counts.
        return torch.zeros_like(batch.texts.lengths)
    return batch.texts.reference


def note_reference(
    settings: Settings, model: Transformer, data: TrainingData, out: Path, is_resumed: bool
) -> None:
    """Says what the reference of a run's objective is, if it has one, and gives it to the examples where
    it has to be computed before step 1: the model must not have taken a step, or loaded a checkpoint.

    out: the run's folder. Raises UserError where a resumed run can't read what it has written there.
    """
    if not needs_reference(settings):
        return
    if is_under_adapter(settings, model):
        print("reference the model without its adapter, computed beside each step")
        return
    sets = {"train": data.train, "val": data.val}
    # The other ranks wait for rank 0's disk, which may be slow.
    with distributed.extended_timeout():
        if is_resumed:
            tensors = read_reference(out / REFERENCE_FILE, sets)
        else:
            tensors = {}
            for name, dataset in sets.items():
                tensors[name] = reference_logps(settings, model, dataset, name == "train")
            distributed.run_on_rank0(lambda: write_reference(out / REFERENCE_FILE, tensors))
    for name, dataset in sets.items():
        assert isinstance(dataset.examples, ExampleIndex)
        dataset.examples.reference = tensors[name].numpy()
    count = sum(map(len, sets.values()))
    how = "read from" if is_resumed else "computed before step 1, kept in"
    print(f"reference the model before step 1: of {count:,} examples {how} {REFERENCE_FILE}")


def write_reference(file: Path, tensors: dict[str, Tensor]) -> None:
    try:
        with atomic_file(file) as tmp:
            save_tensors(tensors | {"sha256": digest_of(tensors)}, tmp)
    except OSError as error:
        why = describe_os_error(error, file)
        raise UserError(f"the reference could not be written, {why}; make room") from None


def digest_of(tensors: dict[str, Tensor]) -> Tensor:
    """Returns the SHA-256 of some tensors, uint8 [32], by which damage is noticed."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def read_reference(file: Path, sets: dict[str, Dataset]) -> dict[str, Tensor]:
    """Reads what `write_reference` wrote. Raises UserError, on all ranks, where it is not whole."""
    tensors = {}
    problem = ""
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError):
        problem = "is missing or damaged"
    sha256 = tensors.pop("sha256", None)
    if not problem and (sha256 is None or not torch.equal(sha256, digest_of(tensors))):
        problem = "is damaged"
    for name, dataset in sets.items():
        found = tensors.get(name)
        if not problem and (found is None or found.shape != (len(dataset), TEXTS_PER_EXAMPLE)):
            problem = "is of other examples"
    if not distributed.all_ranks_agree(not problem):
        raise UserError(
            f"--resume: {file} {problem or 'can not be read by another process'}, and the model before"
            " step 1 can't be had any more; begin the run anew (--overwrite)"
        )
    return tensors


def reference_logps(
    settings: Settings, model: Transformer, dataset: Dataset, is_trained: bool
) -> Tensor:
    """Returns the log-probability of each text of each example by the model as it is now, on every rank,
    float32 [examples, texts]: of a pair two; of a judged answer its own and that of the mismatched one.

    is_trained: compute as a step does, with gradients, without which some kernels round otherwise; else
        as a validation does. In bf16 that is some tenths of a nat.
    """
    device = model.device
    logps = torch.zeros(len(dataset), TEXTS_PER_EXAMPLE)
    groups = split_micro_batches(dataset.lengths.tolist(), settings.batch_size, settings.max_tokens)
    size, rank = distributed.world_size(), distributed.rank()
    bar = progress("reference", len(dataset), "example", shown=distributed.is_rank0())
    with bar, eval_mode(model), eager_mode(model):
        for start in range(0, len(groups), size):
            # At the end some ranks have nothing left, and collectives must match all the same.
            numbers = groups[start + rank] if start + rank < len(groups) else []
            examples = [dataset.examples[i] for i in numbers] or [DUMMY_EXAMPLE]
            batch = collate(examples, device, whole=True)
            with torch.set_grad_enabled(is_trained):
                own = text_logps(model, batch).detach().cpu()
            if dataset.kind in PAIR_KINDS:
                logps[numbers] = own.reshape(-1, TEXTS_PER_EXAMPLE)
            else:
                # Its KL is an estimate without a gradient.
                with torch.no_grad():
                    other = text_logps(model, batch.mismatched or batch).cpu()
                logps[numbers] = torch.stack([own, other], 1)
            bar.update(sum(map(len, groups[start : start + size])))
    if distributed.has_shards(model):
        model.reshard()
    return torch.from_numpy(np.sum(distributed.all_gather_object(logps.numpy()), axis=0))
