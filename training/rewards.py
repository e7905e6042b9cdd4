"""What an answer is worth, for --objective grpo: by a function of the user, or by a reward model.

A function runs in a process of its own (training/reward_worker.py), so that one that never returns is
ended after --reward-timeout, and says so, where the training would stand still. A reward model is a
folder that `train.py --objective reward` has written: a whole model, or an adapter with its head.
"""

import atexit
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from adapting.score_head import document_scores, head_labels
from checkpoint import load_model, read_config
from common.console import one_line
from common.errors import UserError
from data import split_micro_batches
from dataset.records import Record
from interop.resolve import base_folder, pick_tokenizer
from kernels.attention import Documents
from methods import put_adapter_on
from model import eval_mode

WORKER = Path(__file__).resolve().parent / "reward_worker.py"
# A module may take so long to be imported, whatever --reward-timeout says of an answer.
IMPORT_SECONDS = 120.0
# Rewards are summed in float32.
LARGEST_REWARD = 1e30
# What a function may ask for.
REWARD_FACTS = ("answer", "reference", "references", "prompt", "messages", "record", "is_cut")


class AskedQuestion(NamedTuple):
    """A record as a question.

    messages: that ask. references: accepted answers, [] where there is none.
    columns: what stands in the file for it.
    """

    record: Record
    messages: list[dict]
    references: list[str]
    columns: object


class GivenAnswer(NamedTuple):
    """An answer to a question. is_cut: it was cut off at the most tokens that it may have."""

    question: AskedQuestion
    text: str
    is_cut: bool = False

    def facts(self) -> dict:
        """Returns what a function may ask for."""
        references = self.question.references
        return {
            "answer": self.text,
            "reference": references[0] if references else None,
            "references": references,
            "prompt": self.question.messages[-1].get("content") or "",
            "messages": self.question.messages,
            "record": self.question.columns,
            "is_cut": self.is_cut,
        }


class RewardFunction:
    """A user's function as rewards of answers.

    name: FILE.py:NAME. timeout: seconds that it may take for an answer.
    """

    def __init__(self, name: str, timeout: float):
        """Starts its process. Raises UserError if there is no such function, or it wants other facts."""
        self.name = name
        self.timeout = timeout
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            # Ctrl-C asks for an end after the step at hand, whose answers still get their rewards.
            start_new_session=True,
        )
        atexit.register(self.end)
        # A thread reads, because a pipe can't be waited for with a time limit on every system.
        self.replies: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self.read, daemon=True).start()
        reply = self.ask(REWARD_FACTS, "when it was imported", max(timeout, IMPORT_SECONDS))
        if "error" in reply:
            raise UserError(one_line(reply["error"], 400))

    def end(self) -> None:
        """Ends the process, and what the function has started."""
        if self.process.poll() is not None:
            return
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        else:
            self.process.kill()
        self.process.wait()

    def read(self) -> None:
        """Puts the lines of the process into `replies`, and "" at their end."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.replies.put(line)
        self.replies.put("")

    def ask(self, message: object, when: str, timeout: float) -> dict:
        """Returns the reply to a message. Raises UserError where there is none in time, in seconds. when: for
        that."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message, default=str) + "\n")
            self.process.stdin.flush()
            reply = self.replies.get(timeout=timeout)
        except (OSError, queue.Empty) as error:
            self.end()
            problem = f"did not return within {timeout:g} s (--reward-timeout)"
            if isinstance(error, OSError):
                problem = "has ended its process"
            raise UserError(f"--reward {self.name}: {problem} {when}") from None
        if not reply:
            raise UserError(f"--reward {self.name}: has ended its process {when}")
        return json.loads(reply)

    def __call__(self, answers: Sequence[GivenAnswer]) -> list[float]:
        """Returns the reward of each answer. Raises UserError, with the record, for one that is none."""
        rewards = []
        for answer in answers:
            when = f'for the answer "{one_line(answer.text, 60)}" to {answer.question.record.where}'
            reply = self.ask(answer.facts(), when, self.timeout)
            if "error" in reply:
                problem = one_line(reply["error"], 300)
                raise UserError(f"--reward {self.name}: {problem}, {when}")
            reward = reply["reward"]
            if not abs(reward) <= LARGEST_REWARD:
                problem = f"returned {reward:g}, a number up to {LARGEST_REWARD:g} is wanted,"
                raise UserError(f"--reward {self.name}: {problem} {when}")
            rewards.append(reward)
        return rewards


class RewardModel:
    """A reward model as rewards of answers: the score of the whole conversation, as it was trained.

    folder: of a whole model, or of an adapter. max_tokens: of a batch.
    """

    def __init__(self, folder: str, dtype: torch.dtype, device: torch.device, max_tokens: int):
        """Loads it. Raises UserError if the folder holds no model with one score."""
        path = Path(folder)
        adapter = path if (path / "adapter_config.json").is_file() else None
        base = base_folder(None, adapter) if adapter else path
        config = read_config(base)
        labels = head_labels(config, adapter)
        if labels is None or len(labels) != 1:
            what = f"a score head with {len(labels)} labels" if labels else "an output head"
            raise UserError(
                f"--reward {folder}: has {what}; a reward model has one score (train.py --objective reward)"
            )
        self.name = folder
        self.tokenizer = pick_tokenizer(base, adapter, None)
        self.model = load_model(base, dtype, device)
        if adapter:
            put_adapter_on(self.model, adapter)
        self.model.requires_grad_(False)
        self.max_tokens = max_tokens

    def __call__(self, answers: Sequence[GivenAnswer]) -> list[float]:
        """Returns the score of each answer behind its question. There may be none."""
        if not answers:
            return []
        conversations = []
        for answer in answers:
            said = {"role": "assistant", "content": answer.text}
            conversations.append(([*answer.question.messages, said], answer.question.record.tools))
        # As the pairs were encoded that it was trained on.
        chats = self.tokenizer.render_each(conversations)
        encoded: list[list[int]] = []
        limit = self.model.max_positions
        for answer, chat in zip(answers, chats, strict=True):
            if isinstance(chat, UserError):
                problem = str(chat)
            elif len(chat.ids) > limit:
                problem = (
                    f"{len(chat.ids):,} tokens with an answer; the reward model takes {limit:,}"
                )
            else:
                encoded.append(chat.ids)
                continue
            where = answer.question.record.where
            raise UserError(f"--reward {self.name}: {where}: {one_line(problem, 200)}")
        rewards = [0.0] * len(answers)
        batches = split_micro_batches([len(ids) for ids in encoded], len(encoded), self.max_tokens)
        with eval_mode(self.model), torch.no_grad():
            for batch in batches:
                documents = Documents([len(encoded[i]) for i in batch], self.model.device)
                ids = [id for i in batch for id in encoded[i]]
                tokens = torch.tensor(ids, device=self.model.device)
                scores = document_scores(self.model, tokens, documents)[:, 0].tolist()
                for i, score in zip(batch, scores, strict=True):
                    rewards[i] = score
        return rewards


Rewards = RewardFunction | RewardModel


def rewards_of_run(settings, dtype: torch.dtype, device: torch.device) -> Rewards:
    """Returns what --reward names. dtype, device: where a reward model computes."""
    if Path(settings.reward).is_dir():
        return RewardModel(settings.reward, dtype, device, settings.max_tokens)
    return RewardFunction(settings.reward, settings.reward_timeout)
