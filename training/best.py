"""What came of a run: which of best/ and final/ is to be used, and why."""

import math

from training.defaults import Settings
from training.state import TrainState


def best_or_final(settings: Settings, state: TrainState, score_name: str = "") -> str:
    """Returns which of best/ and final/ is to be used. Says so where the end is not the best, or has
    forgotten more than --forget-limit allows.

    score_name: the heading of --eval-metric's score, by which best/ was kept; "": by the loss.
    """
    limit = settings.forget_limit
    before = quality(state.first_score, state.first_val_loss, score_name)
    best = quality(state.best_score, state.best_val_loss, score_name)
    last = quality(state.score, state.val_loss, score_name)
    if limit is not None and not state.has_best:
        print(f"WARNING   {why_none_is_kept(settings, state, score_name)}")
        return "final"
    # The lowest is the best: of equal scores that of the lower loss.
    ranks = [(0.0, loss) for loss in (state.first_val_loss, state.best_val_loss, state.val_loss)]
    if score_name:
        scores = (state.first_score, state.best_score, state.score)
        ranks = [(-score, loss) for score, (_, loss) in zip(scores, ranks, strict=True)]
    rank_before, rank_of_best, rank_of_last = ranks
    if rank_before <= rank_of_best:
        remark = f"no validation was better than the {before} before training"
        print(f"WARNING   {remark}; try a lower --lr")
    what = "" if score_name else "validation loss "
    if state.has_best and state.over_forget_limit:
        forgotten = forgotten_text(settings, state, state.best_kl_base, state.best_general_loss)
        at_end = f"{state.kl_base:.4f}"
        if settings.forget_data is not None:
            at_end = f"{state.general_loss - state.first_general_loss:+.4f}"
        print(
            f"          best/ is the best under --forget-limit {limit:g}: {what}{best}, {forgotten} nats a"
            f" token; final/ {last} and {at_end}"
        )
        return "best"
    if state.has_best and rank_of_best < rank_of_last:
        print(f"          best/ has {what}{best}, final/ {last}")
        return "best"
    return "final"


def quality(score: float, loss: float, score_name: str) -> str:
    """Returns how good some weights are, as it is printed: "0.1234", or "exact % 84.00 (loss 0.1234)"."""
    if not score_name:
        return f"{loss:.4f}"
    return f"{score_name} {score:.2f} (loss {loss:.4f})"


def forgotten_text(settings: Settings, state: TrainState, distance: float, general: float) -> str:
    """Returns how much some weights have forgotten, by what --forget-limit limits. distance: their KL
    to the base. general: their loss on --forget-data."""
    if settings.forget_data is None:
        return f"KL to the base {distance:.4f}"
    return f"rise of the general loss {general - state.first_general_loss:+.4f}"


def why_none_is_kept(settings: Settings, state: TrainState, score_name: str = "") -> str:
    """Returns why there is no best/ with --forget-limit. score_name: as of `best_or_final`."""
    before = quality(state.first_score, state.first_val_loss, score_name)
    limit = settings.forget_limit
    lowest = state.lowest_kl_base
    what, name = "KL(base || tuned)", "KL to the base"
    if settings.forget_data is not None:
        lowest = state.lowest_general_loss - state.first_general_loss
        what, name = "the loss on --forget-data", "rise of the general loss"
    if math.isnan(lowest):
        return f"--forget-limit: {what} was not measured, so there is no best/"
    if lowest < limit:
        return (
            f"no validation under --forget-limit {limit:g} was better than the {before} before training,"
            " so there is no best/"
        )
    return (
        f"no validation was under --forget-limit {limit:g}, so there is no best/: the lowest {name} was"
        f" {lowest:.4f} nats a token; try a lower --lr, fewer steps, or --replay"
    )
