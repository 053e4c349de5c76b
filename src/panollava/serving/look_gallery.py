"""The panoramas of a project's evaluated split, with their queries and references."""

import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from panollava import config, paths
from panollava.data.rows import SPLITS
from panollava.data.shards import Shards, open_views
from panollava.errors import UserError
from panollava.files import read_prepared_rows
from panollava.provenance.made_from import check_prepared
from panollava.serving.answer_queue import Panorama

log = logging.getLogger(__name__)

_EXAMPLES = 6


class Gallery:
    """`entries[name]` describes a panorama: its title and its queries with their references."""

    def __init__(self, folder: Path, views: config.Views) -> None:
        self.split, self._pictures = folder.name, Shards(folder.resolve() / paths.PICTURES)
        self._views = open_views(folder.resolve() / paths.PANORAMAS, views)
        self._read = lru_cache(16)(self._read_views)
        rows = read_prepared_rows(folder / "rows.csv")
        self.entries = {
            str(number): {"name": str(number), "title": urls.iloc[0], "queries": []}
            for number, urls in rows.groupby("panorama")["url"]
        }
        for (number, query), texts in rows.groupby(["panorama", "query"], sort=False)["annotation"]:
            described = {"text": query, "references": [*dict.fromkeys(texts)]}
            self.entries[str(number)]["queries"].append(described)
        self.examples = [*rows["query"].value_counts().index[:_EXAMPLES]]
        self._texts = {name: _all_text(entry) for name, entry in self.entries.items()}

    def find(self, search: str, start: int, count: int) -> tuple[int, list[dict[str, Any]]]:
        """How many panoramas have `search` in their title, queries or references, and those from
        the `start`th on."""
        wanted = search.casefold().split()
        found = [
            self.entries[name]
            for name, text in self._texts.items()
            if all(word in text for word in wanted)
        ]
        return len(found), found[start : start + count]

    def picture(self, name: str) -> bytes:
        """A JPEG."""
        return self._pictures[int(name)]

    def panorama(self, name: str) -> Panorama:
        """With the views of `prepare`, so that answers are those of `evaluate`."""
        return self._read(int(name))

    def _read_views(self, panorama: int) -> Panorama:
        return Panorama(np.array(self._views[panorama]))


def open_gallery(views: config.Views) -> Gallery | None:
    """The gallery of the project in the working directory, for a model with these views. None if
    nothing is prepared there, or other views are."""
    folders = [paths.PREPARED / split for split in SPLITS]
    folder = next((each for each in folders if (each / paths.PICTURES).is_dir()), None)
    if folder is None:
        return None
    try:
        check_prepared(views)
        return Gallery(folder, views)
    except UserError as error:
        log.warning("no gallery: %s", error)
        return None


def _all_text(entry: dict[str, Any]) -> str:
    texts = (text for query in entry["queries"] for text in (query["text"], *query["references"]))
    return "\n".join((entry["title"], *texts)).casefold()
