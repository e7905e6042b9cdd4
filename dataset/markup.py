"""Finds chats that are rendered already: the markup of a chat template inside a text or a message.

A control token is one only where the program or the template writes it, so that such markup is
trained as plain characters: without control tokens, and in a text without a mask. That is hardly
ever what was meant, and no error either, since a text may speak of chat templates.
"""

import re

# What a template writes before a message, and the templates that write it.
MARKUP = (
    "<|im_start|>",  # ChatML: Qwen, SmolLM, Yi
    "<|start_header_id|>",  # Llama 3
    "<|header_start|>",  # Llama 4
    "[INST]",  # Llama 2, Mistral
    "<start_of_turn>",  # Gemma
    "<|turn>",  # Gemma, from 4 on
    "<|user|>",  # Phi 3, Zephyr, GLM
    "<|assistant|>",
    "<|im_user|>",  # Kimi
    "<|User|>",  # DeepSeek, in ASCII and as it is
    "<｜User｜>",
    "<|start|>",  # gpt-oss
    "<|start_of_role|>",  # Granite
    "<|START_OF_TURN_TOKEN|>",  # Command R
    "<|prompter|>",  # OpenAssistant
)
# All but two of them begin with one of these.
BEGINNINGS = ("<|", "<｜")
OTHERS = ("[INST]", "<start_of_turn>")
# Words that may stand in a text by chance are markup only where an answer's follow.
TURN_MARKS = (
    ("### Instruction:", "### Response:"),  # Alpaca
    ("USER: ", "ASSISTANT:"),  # Vicuna
    ("### Human:", "### Assistant:"),  # Guanaco
    ("### User:", "### Assistant:"),
    ("Human: ", "\n\nAssistant:"),  # Anthropic's HH
    ("<extra_id_1>User", "<extra_id_1>Assistant"),  # Nemotron
    ("GPT4 Correct User:", "<|end_of_turn|>"),  # OpenChat
)
ROLE_NAMES = "system|developer|user|assistant|model|tool|ipython|human|gpt"
ROLE = re.compile(rf"\s*({ROLE_NAMES})\b", re.IGNORECASE)
# These come before the name of a role.
NEEDS_ROLE = {"<|im_start|>", "<|start_header_id|>", "<|header_start|>", "<start_of_turn>"}
NEEDS_ROLE |= {"<|turn>", "<|start|>", "<|start_of_role|>"}


def holds_rendered_chat(text: str) -> bool:
    """True if a text holds the markup that a chat template writes around messages."""
    # Plain searches, since a pattern of all would take longer than the text's tokenising allows.
    ascii_bar, wide_bar = BEGINNINGS
    markers = OTHERS
    if ascii_bar in text or wide_bar in text:
        markers = MARKUP
    for marker in markers:
        if marker not in text:
            continue
        if marker not in NEEDS_ROLE:
            return True
        for part in text.split(marker)[1:]:
            if ROLE.match(part):
                return True
    for question, answer in TURN_MARKS:
        position = text.find(question)
        if position >= 0 and text.find(answer, position) >= 0:
            return True
    return False
