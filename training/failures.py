"""Where a run can't go on: one line that says why, what is whole, and what helps."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import distributed
from common.errors import UserError
from training import checkpointer
from training.checkpointer import Checkpointer


@contextlib.contextmanager
def reported_failures() -> Iterator[None]:
    """A block in which out of memory and a lost rank are UserErrors: the whole program."""
    try:
        yield
    # Before the loop only: inside it `training_failures`, which knows more, comes first.
    except torch.OutOfMemoryError as error:
        advice = "--plan says what fits, --method qlora takes least"
        raise UserError(f"out of memory: {first_sentence(error)}; {advice}") from None
    except RuntimeError as error:
        if not distributed.is_lost_rank(error):
            raise
        raise distributed.lost_rank_error(error) from None


@contextlib.contextmanager
def training_failures(
    out: Path, checkpoints: Checkpointer, suggest: Callable[[], str]
) -> Iterator[None]:
    """A block in which the same errors name the checkpoint that is whole: the loop.

    suggest: returns a sentence that says what would have taken less memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of memory: {first_sentence(error)}. {suggest()}") from None
    except (UserError, RuntimeError) as error:
        reported: BaseException = error
        if distributed.is_lost_rank(error):
            reported = distributed.lost_rank_error(error)
        if not isinstance(reported, UserError):
            raise
        newest = checkpoints.newest
        whole = ""
        if newest:
            whole = f"; {out / checkpointer.FOLDER / newest} is whole"
        raise UserError(f"{reported}{whole}") from None


def first_sentence(error: Exception) -> str:
    return str(error).partition(".")[0]
