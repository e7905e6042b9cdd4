"""Conversations and templates that several test files render."""

import itertools

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 12 + 7?"},
    {"role": "assistant", "content": "It is 19 🦊."},
    {"role": "user", "content": "And in German?"},
    {"role": "assistant", "content": "Neunzehn, größer als 12.\n\n- Ende"},
]


def trained_text(ours, ids: list[int], mask: list[bool]) -> list[str]:
    """The text of each run of trained tokens."""
    runs = itertools.groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
    return [ours.decode([id for id, _ in run]) for trained, run in runs if trained]
