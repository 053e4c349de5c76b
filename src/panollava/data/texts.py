"""What is odd about a query or an annotation: characters that nobody sees, and texts that programs
wrote instead of people."""

import re
import unicodedata

import pandas as pd

# Control and format characters, fillers and other characters that take no ink. Whitespace is not
# among them.
INVISIBLE = re.compile(
    "[\0-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f"
    "\u200b-\u200f\u202a-\u202e\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
# Of these, emoji and some scripts need joiners, variants and tags after another character, and
# texts from right to left need the marks of direction.
_JOINER = re.compile(
    "(?<=[^\0- ])[\u034f\u180b-\u180f\u200c\u200d\ufe00-\ufe0f\U000e0020-\U000e0fff]+"
)
_DIRECTION = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_PLACEHOLDER = re.compile(r"<\|?(image|image_pad|img|im_patch|video)\|?>", re.IGNORECASE)
_NOTHING = {"none", "null", "nan", "n/a", "#n/a", "<na>", "undefined"}
_PLURAL = {"query": "queries have", "annotation": "annotations have"}


def is_blank(text: str) -> bool:
    """Whether there is nothing to see."""
    return not INVISIBLE.sub("", text).strip()


def find_odd_texts(splits: dict[str, pd.DataFrame]) -> list[str]:
    """A suspicion for each way in which queries or annotations are odd: how many are, how the first
    one is, and where."""
    suspicions = []
    for column, plural in _PLURAL.items():
        for describe in (_outer_spaces, _invisible, _placeholder, _lost, _nothing):
            odd = [
                (f"{details}: {split}, row {row}")
                for split, rows in splits.items()
                for row, text in zip(rows["row"], rows[column], strict=True)
                if (details := describe(text))
            ]
            if odd:
                start = f"{column} has" if len(odd) == 1 else f"{plural}"
                end = "" if len(odd) == 1 else " is the first"
                suspicions.append(f"{len(odd)} {start} {odd[0]}{end}")
    return suspicions


def _outer_spaces(text: str) -> str:
    return "spaces before or after the text" if text != text.strip() and text.strip() else ""


def _invisible(text: str) -> str:
    if text.isascii() and text.isprintable():
        return ""
    text = _JOINER.sub("", text)
    if any(unicodedata.bidirectional(character) in ("R", "AL") for character in text):
        text = _DIRECTION.sub("", text)
    if not (found := INVISIBLE.search(text)):
        return ""
    name = unicodedata.name(found[0], "control character").lower()
    return f"invisible characters (U+{ord(found[0]):04X}, {name})"


def _placeholder(text: str) -> str:
    found = _PLACEHOLDER.search(text)
    return f"the text '{found[0]}', which stands for no picture here" if found else ""


def _lost(text: str) -> str:
    return "lost characters (U+FFFD)" if "\N{REPLACEMENT CHARACTER}" in text else ""


def _nothing(text: str) -> str:
    nothing = text.strip().lower() in _NOTHING
    return f"only '{text.strip()}', as programs write for an empty cell" if nothing else ""
