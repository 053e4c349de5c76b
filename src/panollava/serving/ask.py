"""`panollava ask`: questions about panoramas, answered on the command line."""

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from PIL import Image

from panollava.data.images import PictureError
from panollava.errors import UserError
from panollava.model.generate import Answer, Sampling
from panollava.model.panollava import PanoLLaVA
from panollava.serving.words import Words

log = logging.getLogger(__name__)


def split_arguments(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Panoramas and questions. An existing file is a panorama, and so is each picture in an
    existing folder; anything else is a question.

    Raises:
        UserError: a picture that does not exist, a folder without pictures, or no panorama or no
            question at all.
    """
    suffixes = Image.registered_extensions().keys()
    panoramas: list[Path] = []
    questions: list[str] = []
    for argument in arguments:
        path = Path(argument)
        if _exists(path) and path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in suffixes)
            if not inside:
                raise UserError(f"{path}: no pictures in this folder")
            panoramas += inside
        elif _exists(path):
            panoramas.append(path)
        elif path.suffix.lower() in suffixes:
            raise UserError(f"{path}: no such picture")
        else:
            questions.append(argument)
    for what, found in (("panorama", panoramas), ("question", questions)):
        if not found:
            raise UserError(f'no {what}; expected: panollava ask PANORAMA... "QUESTION"...')
    return panoramas, questions


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a question may be longer than a name can be
        return False


def ask(
    model: PanoLLaVA,
    panoramas: Sequence[Path],
    questions: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling,
    as_json: bool = False,
    out: TextIO | None = None,
) -> None:
    """Write the answers to `out` (default: standard output), on a terminal word by word. `as_json`:
    an object per line.

    Raises:
        UserError: a picture is not a panorama; those after it are answered first.
    """
    out, faulty = out or sys.stdout, 0
    for panorama in panoramas:
        try:
            features = model.features([panorama])
        except PictureError as error:
            log.error("%s", error)
            faulty += 1
            continue
        if len(panoramas) > 1 and not as_json:
            out.write(f"{panorama}\n")
        streams = out.isatty() and not as_json
        for batch in [[question] for question in questions] if streams else [list(questions)]:
            words = _Words(model, out) if streams else None
            if words and len(questions) > 1:
                out.write(f"{batch[0]}\n")
            (answers,) = model.answer_features(features, [batch], max_new_tokens, sampling, words)
            for question, answer in zip(batch, answers, strict=True):
                if words:
                    words.finish(answer)
                else:
                    _write(panorama, question, answer, as_json, len(questions) > 1, out)
    if faulty:
        raise UserError(f"{faulty} of {len(panoramas)} panoramas could not be read")


def _write(
    panorama: Path, question: str, answer: Answer, as_json: bool, several: bool, out: TextIO
) -> None:
    if as_json:
        row = {"panorama": str(panorama), "query": question, **answer._asdict()}
        row["answer"] = row.pop("text")
        out.write(json.dumps(row, ensure_ascii=False) + "\n")
    else:
        out.write(f"{question}\n" * several + f"{answer.text}\n")
    out.flush()


class _Words:
    """Writes the text of an answer as its tokens come."""

    def __init__(self, model: PanoLLaVA, out: TextIO) -> None:
        self.words, self.out = Words(model.dialogue), out

    def __call__(self, index: int, tokens: list[int]) -> None:
        self._write(self.words.of_tokens(tokens))

    def finish(self, answer: Answer) -> None:
        self._write(self.words.rest(answer.text) + "\n")

    def _write(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()
