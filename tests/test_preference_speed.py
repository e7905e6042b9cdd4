"""benchmarks/preference_speed.py: what both sides are given, and that it notices two jobs that are not one."""

import json
import math
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import preference_speed

from dataset.examples import Example
from interop.resolve import model_folder

PAIR = {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]}
LOG_2 = math.log(2)


def results(*losses) -> list[dict]:
    return [{"losses": list(losses)}]


def test_a_pair_is_the_same_for_both():
    example = preference_speed.example_of_pair(PAIR)
    assert example.ids == [1, 2, 3, 4, 5, 1, 2, 3, 6]
    assert example.loss_weights == [0, 0, 0, 1, 1, 0, 0, 0, 1]
    assert example.text_lengths == [5, 4]
    assert preference_speed.pair_of_example(example) == PAIR


def test_tokens_behind_an_answer_are_left_out():
    ids = [1, 2, 3, 4, 5, 9, 1, 2, 3, 6, 9]
    weights = [0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 0]
    assert preference_speed.pair_of_example(Example(ids, weights, split=6)) == PAIR


@pytest.mark.parametrize(
    ("weights", "ids"),
    [
        ([0, 1, 0, 1, 0, 0, 0, 1], [1, 2, 3, 4, 1, 2, 3, 6]),  # a question inside the chosen answer
        ([0, 0, 1, 1, 0, 0, 0, 1], [1, 2, 3, 4, 1, 2, 3, 6]),  # prompts of two lengths
        ([0, 0, 0, 1, 0, 0, 0, 1], [1, 2, 3, 4, 1, 2, 7, 6]),  # prompts of other tokens
    ],
)
def test_what_one_mask_cannot_say_is_no_pair(weights, ids):
    assert preference_speed.pair_of_example(Example(ids, weights, split=4)) is None


def test_losses_of_one_job_are_accepted():
    found = {"plaintune": results(LOG_2, 0.70), "trl": results(LOG_2 + 5e-5, 0.72)}
    apart, wrong = preference_speed.compare_losses(found)
    assert apart == pytest.approx([5e-5, 0.02])
    assert wrong == []


def test_a_first_loss_that_is_not_log_2_is_named():
    found = {"plaintune": results(LOG_2, 0.7) + results(0.6733, 0.7), "trl": results(LOG_2, 0.7) * 2}
    _, wrong = preference_speed.compare_losses(found)
    assert wrong == ["plaintune: the first loss is 0.6733, not log 2"]


def test_made_up_preferences_become_pairs(tmp_path):
    data, file = tmp_path / "made_up.json", tmp_path / "pairs.json"
    data.write_text(json.dumps(preference_speed.generated_records(8)))
    said = preference_speed.write_pairs(data, model_folder(None), 1024, 2, 3, file)
    pairs = json.loads(file.read_text())
    assert said.startswith("6 pairs of 8, ")
    assert len(pairs) == 6
    assert all(pair.keys() == PAIR.keys() and all(pair.values()) for pair in pairs)
    with pytest.raises(SystemExit, match="--steps 1: the pairs suffice for 0 of 3 after 2"):
        preference_speed.write_pairs(data, model_folder(None), 1024, 3, 3, file)
