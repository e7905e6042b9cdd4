"""How far a run has come: the numbers that the loop counts on, all of which go into checkpoints."""

import math
from dataclasses import dataclass
from typing import Self

# The validation's numbers stand in a checkpoint's state.json under "watch", by these names.
STORED_NAMES = {"first": "first_val_loss", "last": "val_loss", "best": "best_val_loss"}
STORED_NAMES |= {"since_best": "since_best", "kept": "has_best"}


@dataclass
class TrainState:
    """A run's progress."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # that went through them, without padding
    seconds: float = 0.0  # of wall clock, until the newest checkpoint
    skipped: int = 0  # steps without a finite loss or gradient
    skipped_in_a_row: int = 0
    wandb: str | None = None  # the id of the run there
    validated_at: int = -1  # the step of the newest validation
    first_val_loss: float = math.nan  # of the untouched base
    val_loss: float = math.nan  # the newest
    best_val_loss: float = math.inf
    since_best: int = 0  # validations
    has_best: bool = False  # whether best/ was written
    interrupted_by: int = 0  # the signal that ended the loop early

    def as_dict(self) -> dict:
        """What a checkpoint's state.json holds of it."""
        values = {stored: getattr(self, name) for stored, name in STORED_NAMES.items()}
        watch = {name: value if math.isfinite(value) else None for name, value in values.items()}
        counts = {
            "step": self.step,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "skipped": self.skipped,
        }
        counts |= {"in_a_row": self.skipped_in_a_row} | (
            {"wandb": self.wandb} if self.wandb else {}
        )
        validated_now = self.validated_at == self.step
        return counts | {"val_loss": self.val_loss if validated_now else None, "watch": watch}

    @classmethod
    def from_dict(cls, stored: dict) -> Self:
        state = cls(
            stored["step"],
            stored["tokens"],
            stored["seconds"],
            stored["skipped"],
            stored["in_a_row"],
        )
        state.wandb = stored.get("wandb")
        for name, value in stored["watch"].items():
            if value is not None:
                setattr(state, STORED_NAMES[name], value)
        return state
