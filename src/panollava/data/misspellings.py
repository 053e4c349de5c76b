"""Likely misspellings: rare queries, and rare words of queries, that are similar to frequent ones.

Candidates come from an index of all frequent ones spelled without one or two letters, as in
SymSpell, so that the time is proportional to the texts."""

import difflib
import re
from collections import Counter
from collections.abc import Iterator
from itertools import combinations

import pandas as pd
from tqdm import tqdm

_RARE = 0.05  # relative to how often the likely intended text occurs
_SIMILARITY = 0.85  # difflib's ratio; 1 is equal
_MIN_LETTERS = 5  # shorter words are similar too often
_MAX_LETTERS = 40  # of a word
_LONG_WORD = 10  # letters; two missing ones leave it similar
_MAX_TEXT = 300  # characters; nobody types a longer text twice


def find_misspellings(rows: pd.DataFrame) -> list[str]:
    """Rare queries that differ from a frequent one in a single, similar word, and words of queries
    that are rare in the annotations but similar to a frequent word there. Words that differ only in
    a plural `s` do not count."""
    suspicions = []
    queries = Counter(filter(str.strip, rows["query"]))
    frequent = _Frequent(queries)
    for query, count in tqdm(sorted(queries.items()), desc="queries", delay=2, disable=None):
        if near := frequent.likely_intended(query):
            suspicions.append(
                f"query '{query}' ({count} rows): is '{near}' ({queries[near]} rows) meant?"
            )
    words: Counter[str] = Counter()
    for text in tqdm(rows["annotation"], desc="annotations", delay=2, disable=None):
        words.update(set(re.findall(r"\w+", text.lower())))
    frequent = _Frequent(words)
    for word in sorted({word for query in queries for word in re.findall(r"\w+", query.lower())}):
        if near := frequent.likely_intended(word):
            suspicions.append(
                f"'{word}' in queries and in {words[word]} annotations: is '{near}' "
                f"(in {words[near]} annotations) meant?"
            )
    return suspicions


class _Frequent:
    """The texts that occur often enough to be what rarer ones mean."""

    def __init__(self, counts: Counter[str]) -> None:
        self._counts = counts
        # By the text before and after a word: that word without some letters, and the words
        self._words: dict[tuple[str, str], dict[str, list[str]]] = {}
        self._joined: dict[str, str] = {}
        for text in sorted(text for text, count in counts.items() if count * _RARE >= 1):
            self._joined.setdefault("".join(text.split()), text)
            for before, word, after in _places(text):
                words = self._words.setdefault((before, after), {})
                for form in _shorter(word):
                    words.setdefault(form, []).append(word)

    def likely_intended(self, text: str) -> str | None:
        """A similar text that occurs far more often."""
        least = max(self._counts[text], 1) / _RARE
        joined = self._joined.get("".join(text.split()), text)
        if joined != text and self._counts[joined] >= least:
            return joined
        for before, word, after in _places(text):
            if words := self._words.get((before, after)):
                found = {near for form in _shorter(word) for near in words.get(form, ())}
                often = sorted(w for w in found if self._counts[before + w + after] >= least)
                for near in difflib.get_close_matches(word, often, n=3, cutoff=_SIMILARITY):
                    if near.rstrip("s") != word.rstrip("s"):
                        return before + near + after
        return None


def _places(text: str) -> Iterator[tuple[str, str, str]]:
    """Each word that is long enough, between the text before and after it."""
    if len(text) <= _MAX_TEXT:
        for found in re.finditer(r"\S+", text):
            if _MIN_LETTERS <= len(found[0]) <= _MAX_LETTERS:
                yield text[: found.start()], found[0], text[found.end() :]


def _shorter(word: str) -> set[str]:
    """The word itself, and without each letter; a long one also without each two."""
    letters = range(len(word))
    forms = {word} | {word[:i] + word[i + 1 :] for i in letters}
    if _LONG_WORD <= len(word) <= 2 * _LONG_WORD:
        forms |= {word[:i] + word[i + 1 : j] + word[j + 1 :] for i, j in combinations(letters, 2)}
    return forms
