"""The gauge of every run: how far training has moved the model from what it was before step 1.

At each validation KL(base || tuned) is measured on some fixed tokens of the validation's prompts and
answers (evals/forgetting.py). The base is the model before step 1. What its head was given for these
tokens is computed once, so that a measurement is one forward and two products with the head.

With an adapter that starts at nothing the base is there all the time, under the adapter. Where
training leaves no such model (full fine-tuning, an --adapter that is continued) these hidden states
are written to gauge.safetensors before step 1, with the base's head where the head is trained; a
resumed run reads them again. They are exact: the numbers that the base itself computes with.
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import distributed
from common.errors import describe_os_error
from common.files import atomic_file, save_tensors
from data import Batch, batches_by_length
from dataset.examples import Dataset
from evals.forgetting import fixed_examples, hidden_states, mean_divergence
from methods import model_of_step_0
from model import Transformer, eager_mode, eval_mode
from training.checkpointer import format_bytes
from training.defaults import Settings
from training.state import TrainState

FILE = "gauge.safetensors"
BATCH = 8  # examples that are computed at a time


class Gauge:
    """Measures KL(base || tuned) of a run, on the same tokens each time.

    It has to be made before the weights of a checkpoint are loaded or a step is taken.

    examples: what is measured; empty where the gauge is off.
    state: is told how many tokens these have, for a resumed run to take as many.
    seconds: spent on it in this launch.
    """

    def __init__(
        self,
        settings: Settings,
        model: Transformer,
        val: Dataset,
        state: TrainState,
        out: Path,
        device: torch.device,
    ):
        self.settings = settings
        self.model = model
        self.out = out
        self.device = device
        self.seconds = 0.0
        self.base_hidden: Tensor | None = None
        # The base's head, on the host; None where the head is not trained, or can be had at any time.
        self.base_head: Tensor | None = None
        if state.gauge_tokens is None:
            # A run of an earlier version goes on as it began.
            state.gauge_tokens = settings.gauge_tokens if state.step == 0 else 0
        count = state.gauge_tokens if settings.gauge_tokens else 0
        self.examples = fixed_examples(val, count)
        if not count:
            was_off = "off: the run was begun without it"
            print(f"gauge     {was_off if settings.gauge_tokens else settings.reasons['gauge']}")
            return
        with self.timed():
            self.find_base(state)

    @property
    def is_on(self) -> bool:
        return self.base_hidden is not None

    def measure(self, state: TrainState) -> float | None:
        """Returns KL(base || tuned) in nats a token; None where the gauge is off. All ranks must call
        it: they compute the same, and rank 0's number counts."""
        if not self.is_on:
            return None
        if state.step == 0:
            # The model is the base. (That it is so to the bit is tested.)
            return 0.0
        with self.timed():
            hidden, head = self.compute()
            base_head = self.head_of_base(head)
            softcap = self.model.config.logit_softcap
            value = mean_divergence(self.base_hidden, hidden, base_head, head, softcap)
            self.release()
        return distributed.broadcast_object(value)

    # ---- the base ----

    def head_of_base(self, head: Tensor) -> Tensor:
        """Returns the weight of the base's output head. head: that of the model now."""
        if self.base_head is not None:
            return self.base_head.to(self.device)
        if not self.model.trains_head:
            return head
        step_0 = model_of_step_0(self.model, self.settings)
        assert step_0 is not None, "else find_base has kept it"
        with step_0:
            return self.model.head_weight()

    def find_base(self, state: TrainState) -> None:
        """Computes what the base's head is given, or reads what the run has written of it; and says
        on what the gauge measures."""
        step_0 = model_of_step_0(self.model, self.settings)
        if step_0 is not None:
            with step_0:
                self.base_hidden, _ = self.compute()
            self.release()
            base = "the model without its adapter"
        elif state.step == 0:
            self.base_hidden, head = self.compute()
            if self.model.trains_head:
                self.base_head = head.detach().to(self.base_hidden.dtype).to("cpu", copy=True)
            self.release()
            # The others wait for rank 0's disk, which may be slow.
            with distributed.extended_timeout():
                base = distributed.run_on_rank0(self.write_base)
        else:
            with distributed.extended_timeout():
                problem = self.read_base()
            if problem:
                print(f"gauge     off: {problem}")
                return
            base = f"what {FILE} holds"
        tokens = f"{self.examples.tokens:,} tokens of {len(self.examples)} validation examples"
        print(
            f"gauge     distance from the base, KL(base || tuned), at each validation on {tokens}:"
            f" {self.settings.reasons['gauge']}"
        )
        print(f"          the base is {base}")

    def compute(self) -> tuple[Tensor, Tensor]:
        """Returns the hidden states of all tokens in their order, [N, D], and the head's weight."""
        with eval_mode(self.model), eager_mode(self.model):
            hidden = hidden_states(self.model, self.batches())
            return hidden, self.model.head_weight()

    def batches(self) -> Iterator[Batch]:
        max_tokens = self.settings.max_tokens
        return batches_by_length(self.examples, BATCH, self.device, max_tokens=max_tokens)

    def release(self) -> None:
        """Frees what FSDP keeps gathered around the blocks for a backward, which does not come."""
        if distributed.has_shards(self.model):
            self.model.reshard()

    def write_base(self) -> str:
        """Writes the base's hidden states, and its head where it is kept. Returns a clause about it.
        A disk that is full ends nothing."""
        tensors = {"hidden": self.base_hidden.cpu(), "tokens": self.token_ids()}
        if self.base_head is not None:
            tensors["head"] = self.base_head
        size = format_bytes(sum(tensor.nbytes for tensor in tensors.values()))
        try:
            with atomic_file(self.out / FILE) as tmp:
                save_tensors(tensors, tmp)
        except OSError as error:
            why = describe_os_error(error, self.out / FILE)
            return f"in memory alone: {why}; if this run is resumed, the gauge will be off"
        return f"the model before step 1, of which {FILE} keeps {size}"

    def read_base(self) -> str:
        """Reads what `write_base` wrote. Returns why that is not possible on all ranks, or ""."""
        path = self.out / FILE
        problem = ""
        tensors = {}
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError):
            problem = f"{path} is missing or damaged"
        if not problem and not torch.equal(tensors.get("tokens", torch.empty(0)), self.token_ids()):
            problem = f"{path} is of other tokens"
        if not distributed.all_ranks_agree(not problem):
            return problem or f"another process can't read {path}"
        self.base_hidden = tensors["hidden"].to(self.device)
        self.base_head = tensors.get("head")
        return ""

    def token_ids(self) -> Tensor:
        """Returns the ids that are measured, in the order of the hidden states, int64 [N]."""
        return torch.cat([batch.tokens for batch in self.batches()]).cpu()

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """A block whose time counts as the gauge's."""
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start
