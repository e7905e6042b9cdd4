"""What --forget-data says at each validation: how far the loss on a general file has risen.

The rise is the loss on some examples of the file minus that of the model before step 1, in nats a
token. It is what the gauge (training/gauge.py) only predicts: how much worse the model has become at
what the file holds. --forget-limit X, where there is such a file, is a limit of it.
"""

import math

import torch

from common.console import one_line
from common.errors import UserError
from common.remote_names import shown
from data import TrainingData, sample_by_hash
from evals.targets import digest_of_ids
from model import Transformer, eager_mode
from training.defaults import Settings
from training.signals import GracefulStop
from training.state import TrainState
from training.validation import validation_loss


class GeneralLoss:
    """Measures the loss on examples of --forget-data, the same ones each time.

    It has to be made before the weights of a checkpoint are loaded or a step is taken: the base is
    measured then. state: is told its loss and which examples these are, for a resumed run.
    """

    def __init__(
        self,
        settings: Settings,
        model: Transformer,
        data: TrainingData,
        state: TrainState,
        device: torch.device,
    ):
        """Raises UserError where a resumed run has begun without the file, or with another one."""
        assert settings.forget_data is not None and data.general is not None
        self.settings = settings
        self.model = model
        self.device = device
        name = f"--forget-data {shown(settings.forget_data)}"
        if state.general_examples is None:
            if state.step > 0:
                raise UserError(
                    f"{name}: the run was begun without it, so the loss before the training is not known"
                )
            state.general_examples = settings.general_examples
        self.examples = sample_by_hash(data.general, state.general_examples)
        digest = digest_of_ids(self.examples)
        if state.general_digest not in ("", digest):
            raise UserError(f"{name}: holds other text than when the run was begun")
        state.general_digest = digest
        if math.isnan(state.first_general_loss):
            state.first_general_loss = self.measure()
        limit = ""
        if settings.forget_limit is not None:
            limit = f"; --forget-limit {settings.forget_limit:g} is a limit of its rise, not of the distance"
        print(
            f"general   loss on {one_line(shown(settings.forget_data))} at each validation,"
            f" {settings.reasons['general']}: {state.first_general_loss:.4f} before the training{limit}"
        )

    def measure(self, stop: GracefulStop | None = None) -> float:
        """Returns the loss of the model as it is now, in nats a token, over all ranks.

        Raises ValidationInterrupted on all ranks soon after a signal has reached one.
        """
        max_tokens = self.settings.max_tokens
        with eager_mode(self.model):
            return validation_loss(self.model, self.examples, self.device, max_tokens, stop)
