"""Pages that say what came of a run or of an evaluation: one HTML file each, which loads nothing.

`train.py` writes one into every run's folder (training/run_report.py), `evaluate.py WHAT --html FILE` one
of what it prints (evals/printed_page.py), and `evaluate.py report RUN RUN ...` lays runs side by side
(evals/side_by_side.py). A page is a title and sections of blocks; evals/report.html.jinja writes them.

Everything on a page is text: what comes from data, models or file names is escaped by the template, the
page's Content-Security-Policy forbids scripts, and characters that would turn the text around them (marks of
direction, which may never be closed) or are none (control characters) are shown as their codes. What looks
like a key or an address in examples and answers is masked, since such a page is sent around.
"""

import contextlib
import functools
import json
import platform
import re
import shlex
import subprocess
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from common.errors import UserError
from common.files import atomic_file
from dataset.text_stats import masked, private_parts
from evals.pairwise import csp_hash

if TYPE_CHECKING:
    import jinja2

# Where the templates and styles of pages are.
PAGES_FOLDER = Path(__file__).parent
# Only a file with this near its beginning is a page of these, which another may replace.
REPORT_MARK = '<meta name="generator" content="plaintune report">'
FACTS = re.compile(r'<script type="application/json" id="facts">(.*?)</script>', re.DOTALL)
# Characters that a browser takes for more than a letter. Line ends and tabs stay.
CONTROL_CATEGORIES = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
# Of these categories, what holds letters and pictures together.
JOINERS = "\u200c\u200d\n\t"
# A longer text of an example or an answer is shown by its beginning and its end.
LONGEST_TEXT = 1500


class PageBlock(NamedTuple):
    """A part of a section. kind: a branch of the template; value: what it shows. label: of a folded
    table."""

    kind: str
    value: object
    label: str = ""


class PageSection(NamedTuple):
    """A heading, "" for none, and the blocks below it."""

    heading: str
    blocks: list[PageBlock]


def render_report(
    title: str,
    subtitle: str,
    sections: Sequence[PageSection],
    facts: dict | None = None,
    footer: str = "Made with plaintune. Nothing on this page is loaded from elsewhere.",
) -> str:
    """Returns the page. facts: what programs may read of it again (`read_facts`)."""
    style = (PAGES_FOLDER / "report.css").read_text(encoding="ascii")
    return page_template("report.html.jinja", visible).render(
        mark=REPORT_MARK,
        title=title,
        subtitle=subtitle,
        sections=[section for section in sections if section.blocks],
        facts=facts and script_json(facts),
        footer=footer,
        style=style,
        style_hash=csp_hash(style),
    )


def write_report(file: Path, page: str) -> None:
    """Writes a page so that it is there whole or not at all."""
    with atomic_file(file) as tmp:
        tmp.write_text(page, encoding="utf-8")


def page_template(
    name: str, finalize: Callable[[object], object] | None = None
) -> "jinja2.Template":
    """Returns a template of this folder that escapes what it is given. finalize: is called with each
    value before."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGES_FOLDER),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        finalize=finalize,
    )
    return environment.get_template(name)


def check_report_file(file: Path, mark: str = REPORT_MARK, kind: str = "a report") -> None:
    """Raises UserError if --html names a file that is no page of a kind, or is in no folder. mark: stands
    at the beginning of such pages."""
    if not file.parent.is_dir():
        raise UserError(f"--html {file}: there is no such folder")
    if file.is_dir():
        raise UserError(f"--html {file}: is a folder, a file is wanted")
    if file.exists() and mark.encode() not in file.read_bytes()[:500]:
        raise UserError(f"--html {file}: is there already and no page of {kind}; give another name")


# ---- text ----


def visible(value):
    """Returns text without characters that a browser takes for more than a letter: their codes stand in
    their place. What is safe already, as a chart, and what is no text stay as they are."""
    if (
        not isinstance(value, str)
        or hasattr(value, "__html__")
        or value.isascii()
        and value.isprintable()
    ):
        return value
    return "".join(map(visible_character, value))


@functools.cache
def visible_character(character: str) -> str:
    """Returns a character, or its code, as \\u202e, if it shows nothing by itself."""
    if character in JOINERS or unicodedata.category(character) not in CONTROL_CATEGORIES:
        return character
    return ascii(character)[1:-1]


def middle_left_out(text: str, longest: int = LONGEST_TEXT) -> str:
    """Returns the text, of a longer one its beginning and its end."""
    if len(text) <= longest:
        return text
    half = longest // 2
    left_out = len(text) - 2 * half
    return f"{text[:half]} [... {left_out:,} characters left out ...] {text[-half:]}"


def without_secrets(text: str) -> tuple[str, int]:
    """Returns the text with what looks like a key or a person's address masked, and how many there
    were."""
    parts = private_parts(text)
    for _, secret in parts:
        text = text.replace(secret, masked(secret))
    return text, len(parts)


def masked_note(count: int) -> str:
    """Returns a sentence on what `without_secrets` has masked."""
    are = "part looks like an address or a secret and is"
    if count > 1:
        are = "parts look like addresses or secrets and are"
    return f"{count:,} {are} masked on this page; the model saw it whole."


def command_text(script: str, words: Sequence[str]) -> str:
    """Returns a command line as it is typed, with a line for each flag."""
    lines = [f"python {script}"]
    for word in words:
        if word.startswith("--"):
            lines.append(f"    {word}")
        else:
            lines[-1] += f" {shlex.quote(word)}"
    return " \\\n".join(lines)


def program_versions() -> str:
    """Returns the versions of Python, torch and, where it is a checkout of git, this program."""
    import torch

    known = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    root = Path(__file__).resolve().parents[1]
    words = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*"]
    if (root / ".git").exists():
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(words, capture_output=True, text=True, timeout=5, check=True)
            known.append(f"plaintune {done.stdout.strip()}")
    return ", ".join(known)


def script_json(value: object) -> str:
    """Returns JSON that can't end the script element it stands in."""
    text = json.dumps(value, ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def read_facts(file: Path) -> dict:
    """Returns the facts in a page, {} where there are none, as in a file that is damaged or of an older
    version."""
    if not file.is_file():
        return {}
    match = FACTS.search(file.read_text(encoding="utf-8", errors="replace"))
    if match is None:
        return {}
    try:
        facts = json.loads(match[1])
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}
