"""A reward for the bundled task, as --reward assets/booking_reward.py:reward takes it.

python train.py --adapter runs/.../final --objective grpo --reward assets/booking_reward.py:reward
"""

import json


def reward(answer: str, reference: str) -> float:
    """Returns 1 for the right booking, less for one with wrong fields, 0 for what is no JSON object."""
    try:
        booking = json.loads(answer)
    except ValueError:
        return 0.0
    if not isinstance(booking, dict):
        return 0.0
    wanted = json.loads(reference)
    names = wanted.keys() | booking.keys()
    right = [name in wanted and name in booking and wanted[name] == booking[name] for name in names]
    # A whole booking counts as much again as all of its fields: almost right is of no use.
    return 0.1 + 0.4 * sum(right) / len(right) + 0.5 * all(right)
