"""What can be told from a text alone: a hash, what it is nearly equal to, its script, what it had better not hold."""

import hashlib
import re
import unicodedata
from collections import Counter
from functools import lru_cache

import numpy as np

BANDS, WIDTH = 16, 4  # of a signature: texts that agree in a whole band are compared
ALIKE = 0.8  # estimated Jaccard similarity from which two texts are nearly equal
_draw = np.random.Generator(np.random.PCG64(0))
FACTORS, TERMS = _draw.integers(1, 2**63, (2, BANDS * WIDTH), np.uint64) | np.uint64(1)


def text_hash(text: str) -> int:
    """64 bits; letter case and spaces aside."""
    digest = hashlib.sha256(" ".join(text.lower().split()).encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big")


def signature(text: str) -> np.ndarray:
    """MinHash (Broder 1997) of the text's runs of three words: uint16 [64]. The share of places in which two signatures
    are equal estimates the Jaccard similarity of their sets. Letter case, spaces and punctuation aside; a character of
    a script without spaces counts as a word."""
    words = WORDS.findall(text.lower()) or [text]
    hashed = np.array([_word(word) for word in words], np.uint64)
    if len(hashed) >= 3:
        with np.errstate(over="ignore"):
            hashed = hashed[:-2] * FACTORS[0] + hashed[1:-1] * FACTORS[1] + hashed[2:] * FACTORS[2]
    least = np.full(len(FACTORS), np.iinfo(np.uint64).max, np.uint64)
    with np.errstate(over="ignore"):
        for start in range(0, len(hashed), 4096):  # a long text in little memory
            part = hashed[start : start + 4096, None] * FACTORS + TERMS
            least = np.minimum(least, (part >> np.uint64(32)).min(0))
    return least.astype(np.uint16)


WORDS = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]|[^\W_]+")


@lru_cache(1 << 16)
def _word(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest(), "big")


def near_groups(signatures: np.ndarray) -> np.ndarray:
    """Of each signature the number of the first one of its group: signatures that are linked by pairs estimated to be
    ALIKE. int64 [N]. Memory: a few numbers a signature, a band at a time."""
    parent = np.arange(len(signatures))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for band in range(BANDS):
        keys = np.ascontiguousarray(signatures[:, band * WIDTH : (band + 1) * WIDTH]).view(np.uint64)[:, 0]
        order = np.argsort(keys, kind="stable")
        same = np.flatnonzero(keys[order][1:] == keys[order][:-1])
        # each with the one before it in its run, and with the run's first, which more of them resemble
        start = end = -1
        for k in same.tolist():
            start, end = start if end == k else k, k + 1
            for a in {int(order[k]), int(order[start])}:
                b = int(order[k + 1])
                x, y = root(a), root(b)
                if x != y and np.mean(signatures[a] == signatures[b]) >= ALIKE:
                    parent[max(x, y)] = min(x, y)
    return np.array([root(i) for i in range(len(parent))], np.int64)


def script(text: str) -> str:
    """The script of most of its letters, as Unicode's names of them begin: LATIN, CYRILLIC, CJK, ...; "none"."""
    part = text[:400]
    if part.isascii():
        return "LATIN" if any(map(str.isalpha, part)) else "none"
    counts = Counter(map(_script, filter(str.isalpha, part)))
    return counts.most_common(1)[0][0] if counts else "none"


@lru_cache(1 << 14)
def _script(letter: str) -> str:
    return unicodedata.name(letter, "UNKNOWN").split()[0]


PRIVATE = {
    "e-mail address": r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63})+",
    "private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "AWS key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "API key": r"\b(?:sk-[\w-]{20,}|gh[pousr]_\w{30,}|hf_\w{30,}|AIza[\w-]{30,}|(?:xox[abprs]|glpat)-[\w-]{10,})",
    "token (JWT)": r"\beyJ[\w-]{10,2000}\.eyJ[\w-]{10,4000}\.[\w-]{10,}",
    "password": r"(?i)\b(?:password|passwd|secret|api_key)\s*[=:]\s*[\"'][^\s\"']{8,}[\"']",
}
_private = {kind: re.compile(pattern) for kind, pattern in PRIVATE.items()}
_hints = ("@", "-----BEGIN", "AKIA", "ASIA", "sk-", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "hf_", "AIza", "xox", "eyJ")
_hints += ("glpat-", "assw", "ASSW", "ecret", "ECRET", "pi_key", "PI_KEY")


def private_parts(text: str) -> list[tuple[str, str]]:
    """(kind, what was found) of what looks like somebody's address, or a secret."""
    if not any(hint in text for hint in _hints):
        return []
    return [(kind, match[0]) for kind, pattern in _private.items() for match in pattern.finditer(text)]


def masked(secret: str) -> str:
    """Enough of it to find it by."""
    return secret[:4] + "..." + secret[-2:] if len(secret) > 10 else secret[:2] + "..."
