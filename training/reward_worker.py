"""The process in which a user's reward function runs (training/rewards.py starts it).

Apart from the training, because a function that never returns can only be ended by ending its process.
A line of JSON comes in for each answer, and one goes out: {"reward": number} or {"error": why}. What the
function prints goes to stderr, and it has nothing to read.
"""

import inspect
import json
import os
import queue
import signal
import sys
import threading

# With these a run is asked to end after the step at hand (training/signals.py), whose answers still get
# their rewards.
END_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")


def main() -> None:
    """Answers until its input ends. sys.argv: the function, as FILE.py:NAME."""
    # This file's folder is replaced: the user's imports must not find the modules beside it.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    for name in END_SIGNALS:
        if hasattr(signal, name):
            # Not SIG_IGN, which programs that the function starts would inherit.
            signal.signal(getattr(signal, name), lambda *_: None)
    # Copies, which programs that the function starts do not get: they would read the next answer.
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        """Puts what comes in into `lines`. At its end the run has ended, whatever the function does."""
        for line in requests:
            lines.put(line)
        os._exit(0)

    def reply(message: dict) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    from common.errors import UserError
    from dataset.user_map import Map

    threading.Thread(target=read, daemon=True).start()
    names = json.loads(lines.get())
    try:
        function = Map(sys.argv[1], "--reward").function
        wanted = wanted_names(function, names)
    except (UserError, ValueError) as error:
        reply({"error": str(error)})
        return
    reply({})
    while True:
        facts = json.loads(lines.get())
        try:
            reply({"reward": number_of_reward(function(**{name: facts[name] for name in wanted}))})
        except BaseException as error:  # noqa: BLE001  a user's program may fail in any way
            reply({"error": f"{type(error).__name__}: {error}"})


def wanted_names(function, names: list[str]) -> list[str]:
    """Returns which of the names a function takes as arguments. Raises ValueError where it wants others."""
    wanted = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            return names
        if name in names and parameter.kind is parameter.POSITIONAL_ONLY:
            raise ValueError(
                f"--reward {sys.argv[1]}: takes {name} by its place alone; leave out the / behind it"
            )
        if name in names:
            wanted.append(name)
        elif (
            parameter.default is parameter.empty and parameter.kind is not parameter.VAR_POSITIONAL
        ):
            known = ", ".join(names)
            raise ValueError(
                f"--reward {sys.argv[1]}: wants {name}, which there is not; there are {known}"
            )
    return wanted


def number_of_reward(value: object) -> float:
    """Returns a reward as a float. Raises TypeError for what is no number."""
    # Numbers of numpy and torch are such as well; a text that spells one is not.
    if value is None or isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        raise TypeError(f"it returned {type(value).__name__}; a number is wanted")
    return float(value)  # type: ignore[arg-type]  it has __float__


if __name__ == "__main__":
    main()
