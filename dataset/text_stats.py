"""Statistics of a text alone: its hash, the texts that are nearly equal to it, its script, its
addresses and secrets.

Near-duplicates are found by MinHash (Broder 1997) in memory of 128 bytes a text: `signature` makes
64 numbers of a text whose equality estimates the Jaccard similarity of two texts, and `near_groups`
compares only texts that agree in a whole band of them, instead of all pairs.
"""

import hashlib
import re
import unicodedata
from collections import Counter
from functools import lru_cache

import numpy as np

BANDS = 16  # of a signature: two texts are compared if all numbers of a band are equal
BAND_WIDTH = 4  # numbers of a band
ALIKE = 0.8  # estimated Jaccard similarity from which on two texts are nearly equal
_generator = np.random.Generator(np.random.PCG64(0))
# Odd multipliers and terms of 64 hash functions, one for each number of a signature.
FACTORS, TERMS = _generator.integers(1, 2**63, (2, BANDS * BAND_WIDTH), np.uint64) | np.uint64(1)

# A character of a script that writes no spaces (Thai, Lao, Burmese, Khmer, Japanese, Chinese), or a
# word.
WORD_PATTERN = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]|[^\W_]+"
)
HASHED_AT_ONCE = 4096  # word triples, so that a long text takes little memory


def text_hash(text: str) -> int:
    """Returns 64 bits of the text's SHA-256; letter case and the number of spaces do not count."""
    normalized = " ".join(text.lower().split())
    # "replace", because half of a surrogate pair has no UTF-8.
    digest = hashlib.sha256(normalized.encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big")


def signature(text: str) -> np.ndarray:
    """Returns the MinHash signature (Broder 1997) of the text's runs of three words, uint16 [64].

    The share of places in which two signatures are equal estimates the Jaccard similarity of the
    two sets of runs. Letter case, spaces and punctuation do not count. A character of a script
    without spaces counts as a word.
    """
    words = WORD_PATTERN.findall(text.lower())
    if not words:
        words = [text]
    hashes = np.array([_word_hash(word) for word in words], np.uint64)  # [words]
    # Unsigned products wrap around, which is what a hash wants.
    with np.errstate(over="ignore"):
        if len(hashes) >= 3:
            # One number for each run of three words; it depends on their order.
            first = hashes[:-2] * FACTORS[0]
            second = hashes[1:-1] * FACTORS[1]
            third = hashes[2:] * FACTORS[2]
            hashes = first + second + third  # [words - 2]
        smallest = np.full(len(FACTORS), np.iinfo(np.uint64).max, np.uint64)  # [64]
        for start in range(0, len(hashes), HASHED_AT_ONCE):
            part = hashes[start : start + HASHED_AT_ONCE, None]  # [triples, 1]
            rehashed = part * FACTORS + TERMS  # [triples, 64]
            # The low bits of a product depend on few bits of the factors; the high ones on all.
            smallest = np.minimum(smallest, (rehashed >> np.uint64(32)).min(0))
    # 16 bits are enough: two different minima agree in them once in 65,536 times.
    return smallest.astype(np.uint16)


@lru_cache(1 << 16)
def _word_hash(word: str) -> int:
    """Returns 64 bits that depend on the word alone, unlike Python's own hash of a text."""
    digest = hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def near_groups(signatures: np.ndarray) -> np.ndarray:
    """Groups texts that are linked by pairs whose estimated similarity is ALIKE or more.

    signatures: uint16 [N, 64].

    Returns int64 [N], for each text the number of the first text of its group. Memory: a few
    numbers a text, since one band is looked at after the other.
    """
    # Disjoint sets: following `parent` leads to the first text of the group.
    parent = np.arange(len(signatures))

    def root(i: int) -> int:
        while parent[i] != i:
            # Halving the path as it is walked keeps later walks short.
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for band in range(BANDS):
        start = band * BAND_WIDTH
        numbers = np.ascontiguousarray(signatures[:, start : start + BAND_WIDTH])  # [N, 4]
        # The four 16-bit numbers of a band are one 64-bit key, by which equal bands are neighbours.
        keys = numbers.view(np.uint64)[:, 0]  # [N]
        order = np.argsort(keys, kind="stable")
        sorted_keys = keys[order]
        same_as_next = np.flatnonzero(sorted_keys[1:] == sorted_keys[:-1])
        # A text is compared with the one before it in its run of equal keys, and with the first of
        # the run, which more of them resemble.
        run_start = -1
        run_end = -1
        for k in same_as_next.tolist():
            if k != run_end:
                run_start = k
            run_end = k + 1
            b = int(order[k + 1])
            for a in {int(order[k]), int(order[run_start])}:
                root_a = root(a)
                root_b = root(b)
                if root_a == root_b:
                    continue
                similarity = np.mean(signatures[a] == signatures[b])
                if similarity >= ALIKE:
                    # The smaller number becomes the root, so that a group is named by its first.
                    parent[max(root_a, root_b)] = min(root_a, root_b)
    return np.array([root(i) for i in range(len(parent))], np.int64)


def script(text: str) -> str:
    """Returns the script of most letters among the first 400 characters, or "none".

    It is the first word of their names in Unicode: LATIN, CYRILLIC, CJK, ...
    """
    part = text[:400]
    # Most texts are ASCII, and need no look at the names of their letters.
    if part.isascii():
        has_letters = any(map(str.isalpha, part))
        return "LATIN" if has_letters else "none"
    letters = filter(str.isalpha, part)
    counts = Counter(map(_script_of_letter, letters))
    if not counts:
        return "none"
    most_common, _ = counts.most_common(1)[0]
    return most_common


@lru_cache(1 << 14)
def _script_of_letter(letter: str) -> str:
    return unicodedata.name(letter, "UNKNOWN").split()[0]


PRIVATE_PATTERNS = {
    "e-mail address": r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63})+",
    "private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "AWS key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "API key": r"\b(?:sk-[\w-]{20,}|gh[pousr]_\w{30,}|hf_\w{30,}|AIza[\w-]{30,}|(?:xox[abprs]|glpat)-[\w-]{10,})",
    "token (JWT)": r"\beyJ[\w-]{10,2000}\.eyJ[\w-]{10,4000}\.[\w-]{10,}",
    "password": r"(?i)\b(?:password|passwd|secret|api_key)\s*[=:]\s*[\"'][^\s\"']{8,}[\"']",
}
_private_patterns = {kind: re.compile(pattern) for kind, pattern in PRIVATE_PATTERNS.items()}
# Each match of the patterns holds one of these; most texts hold none, and the patterns are not
# tried on them. By a character that they hold, since most texts lack that already.
_HINTS = {
    "_": ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "hf_", "pi_key", "PI_KEY"),
    "-": ("-----BEGIN", "sk-", "glpat-"),
    "": ("@", "AKIA", "ASIA", "AIza", "xox", "eyJ", "assw", "ASSW", "ecret", "ECRET"),
}


def private_parts(text: str) -> list[tuple[str, str]]:
    """Returns (kind, the part of the text) of everything that looks like a person's address or a
    secret."""
    if not _holds_hint(text):
        return []
    parts = []
    for kind, pattern in _private_patterns.items():
        for match in pattern.finditer(text):
            parts.append((kind, match[0]))
    return parts


def _holds_hint(text: str) -> bool:
    """True if a text holds one of _HINTS."""
    # Loops, since any() with a generator takes longer, and this runs for every record.
    for character, hints in _HINTS.items():
        if character not in text:
            continue
        for hint in hints:
            if hint in text:
                return True
    return False


def masked(secret: str) -> str:
    """Returns the first and last characters of a secret: enough to find it in a file, too little to
    use it."""
    if len(secret) > 10:
        return secret[:4] + "..." + secret[-2:]
    return secret[:2] + "..."
