"""How far a run has come: the numbers that the loop counts on, which go into checkpoints."""

import math
from dataclasses import dataclass, field
from typing import Self

# The validation's numbers stand in a checkpoint's state.json under "watch", by these names.
STORED_NAMES = {
    "first": "first_val_loss",
    "last": "val_loss",
    "best": "best_val_loss",
    "since_best": "since_best",
    "kept": "has_best",
    "kl": "kl_base",
    "best_kl": "best_kl_base",
    "lowest_kl": "lowest_kl_base",
    "first_score": "first_score",
    "score": "score",
    "best_score": "best_score",
    "first_general": "first_general_loss",
    "general": "general_loss",
    "best_general": "best_general_loss",
    "lowest_general": "lowest_general_loss",
}


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
    gauge_tokens: int | None = None  # that the gauge reads; None: not chosen yet
    kl_base: float = math.nan  # the newest KL(base || tuned), in nats a token
    best_kl_base: float = math.nan  # of the weights in best/
    lowest_kl_base: float = math.nan  # after step 0
    first_score: float = math.nan  # of the untouched base's answers, by --eval-metric
    score: float = math.nan  # the newest
    best_score: float = -math.inf
    first_general_loss: float = math.nan  # of the untouched base, on --forget-data
    general_loss: float = math.nan  # the newest
    best_general_loss: float = math.nan  # of the weights in best/
    lowest_general_loss: float = math.nan  # after step 0
    general_examples: int | None = None  # of --forget-data that are read; None: not chosen yet
    general_digest: str = ""  # a hash of them
    over_forget_limit: bool = False  # whether the newest is not under --forget-limit
    # Steps after which the run had ended, and was prolonged.
    earlier_ends: list[int] = field(default_factory=list)
    interrupted_by: int = 0  # the signal that ended the loop early

    def as_dict(self) -> dict:
        """Returns what a checkpoint's state.json holds of it."""
        watch = {}
        for stored_name, name in STORED_NAMES.items():
            value = getattr(self, name)
            # JSON has no number for "not validated yet", which is NaN or infinity here.
            watch[stored_name] = value if math.isfinite(value) else None
        stored = {
            "step": self.step,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "skipped": self.skipped,
            "in_a_row": self.skipped_in_a_row,
        }
        if self.wandb:
            stored["wandb"] = self.wandb
        # The loss of these very weights, by which the best checkpoint is kept.
        validated_now = self.validated_at == self.step
        stored["val_loss"] = self.val_loss if validated_now else None
        if validated_now and math.isfinite(self.score):
            stored["val_score"] = self.score
        if self.gauge_tokens is not None:
            stored["gauge_tokens"] = self.gauge_tokens
        if self.general_examples is not None:
            stored["general_examples"] = self.general_examples
            stored["general_digest"] = self.general_digest
        if self.over_forget_limit:
            # Such a checkpoint is not kept as the best one.
            stored["over_forget_limit"] = True
        if self.earlier_ends:
            stored["earlier_ends"] = self.earlier_ends
        stored["watch"] = watch
        return stored

    @classmethod
    def from_dict(cls, stored: dict) -> Self:
        """Returns the state that `as_dict` stored. What was not validated yet keeps its default."""
        state = cls(
            step=stored["step"],
            tokens=stored["tokens"],
            seconds=stored["seconds"],
            skipped=stored["skipped"],
            skipped_in_a_row=stored["in_a_row"],
            wandb=stored.get("wandb"),
            gauge_tokens=stored.get("gauge_tokens"),
            general_examples=stored.get("general_examples"),
            general_digest=stored.get("general_digest", ""),
            over_forget_limit=stored.get("over_forget_limit", False),
            earlier_ends=list(stored.get("earlier_ends", [])),
        )
        if stored.get("val_loss") is not None:
            state.validated_at = state.step
        for stored_name, value in stored["watch"].items():
            if value is not None:
                setattr(state, STORED_NAMES[stored_name], value)
        return state
