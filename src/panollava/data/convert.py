"""`panollava convert`: pictures of many kinds to upright 2:1 panoramas. Nothing is overwritten, a
bad picture does not stop the others, and an interrupted run continues."""

import dataclasses
import hashlib
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2

from panollava.config import Count, checked
from panollava.data.images import PictureError, map_pictures, read_picture
from panollava.data.panorama_files import save_panorama
from panollava.data.picture_files import open_picture
from panollava.data.upright import Conversion, face_letters, make_upright
from panollava.errors import UserError
from panollava.files import atomic_write

log = logging.getLogger(__name__)

_VERSION = 1  # of the results: another number makes them again
_SUFFIXES = set(
    ".jpg .jpeg .jpe .mpo .png .webp .avif .tif .tiff .bmp .gif .jp2 .ppm .tga .heic .heif".split()
)
_FACE_NAMES = {
    **dict.fromkeys(("front", "f", "pz", "posz"), "f"),
    **dict.fromkeys(("right", "r", "px", "posx"), "r"),
    **dict.fromkeys(("back", "b", "nz", "negz"), "b"),
    **dict.fromkeys(("left", "l", "nx", "negx"), "l"),
    **dict.fromkeys(("up", "top", "u", "py", "posy"), "u"),
    **dict.fromkeys(("down", "bottom", "d", "ny", "negy"), "d"),
}
_FACE = re.compile(rf"(?:(.+)[_. -])?({'|'.join(_FACE_NAMES)})", re.IGNORECASE)
_SOURCE = 'dc:source="sha256:{}"'  # of a result: its pictures, and what was done


@dataclasses.dataclass(frozen=True)
class Job:
    """One panorama: its pictures (one, or six faces by `face_letters`) and where it is written.
    `problem`: why it cannot be made."""

    pictures: tuple[Path, ...]
    out: Path
    problem: str = ""

    @property
    def name(self) -> str:
        first = str(self.pictures[0])
        return first if len(self.pictures) == 1 else f"{first} and {len(self.pictures) - 1} more"


def convert(inputs: Sequence[Path], out: Path, conversion: Conversion, workers: int) -> None:
    """Convert pictures, and all pictures in folders, to panoramas in the folder `out`.

    Raises:
        UserError: before anything is written: two panoramas of one name, or one that exists and is
            no earlier result of the same conversion. At the end: some could not be made.
    """
    checked(Count, workers, "--workers")
    if out.is_file() or out.suffix.lower() in _SUFFIXES:
        raise UserError(f"{out}: the last argument must be a folder to write to")
    jobs = find_jobs(inputs, out, conversion)
    _check_collisions(jobs)
    finished = [job for job in jobs if job.out.exists()]
    if foreign := [job for job in finished if not _is_result(job, conversion)]:
        raise UserError(
            f"{_some(job.out for job in foreign)}: exists, and is not the result of this "
            "conversion; move it away or choose another folder. Nothing was written"
        )
    if finished:
        log.info("%d of %d panoramas are finished already", len(finished), len(jobs))
    waiting = [job for job in jobs if job not in finished]
    cv2.setNumThreads(1)  # the workers keep the cores busy
    failed = []

    def run(job: Job) -> str | PictureError:
        try:
            return _convert(job, conversion)
        except PictureError as error:
            return error

    for job, result in map_pictures(run, waiting, workers, "panoramas"):
        if isinstance(result, str):
            log.info("%s -> %s: %s", job.name, job.out, result)
        else:
            log.warning("%s", result)
            failed.append(result)
    if failed:
        listed = "".join(f"\n- {reason}" for reason in failed)
        raise UserError(f"{len(failed)} of {len(jobs)} panoramas could not be made:{listed}")


def find_jobs(inputs: Iterable[Path], out: Path, conversion: Conversion) -> list[Job]:
    """The panoramas to make, in the order of the inputs. Folders are searched with their
    subfolders, which `out` gets too."""
    pictures: dict[Path, Path] = {}  # and the folder below `out` that each goes to
    results = out.resolve()
    for path in inputs:
        if not path.is_dir():
            pictures[path] = Path()
            continue
        for file in sorted(path.rglob("*")):
            if file.suffix.lower() not in _SUFFIXES or not file.is_file():
                continue
            if not file.parent.resolve().is_relative_to(results):
                pictures[file] = file.parent.relative_to(path)
    if not pictures:
        raise UserError(f"{_some(inputs)}: no pictures; expected files or folders of them")
    if conversion.layout == "faces":
        return _group_faces(pictures, out, conversion)
    return [
        Job((path,), out / folder / f"{path.stem}.{conversion.form}")
        for path, folder in pictures.items()
    ]


def _group_faces(pictures: dict[Path, Path], out: Path, conversion: Conversion) -> list[Job]:
    """A job for each six files whose names differ only in the face. Files that have only the
    face's name are of the scene that their folder names."""
    scenes: dict[Path, dict[str, Path]] = {}
    problems = []
    for path, folder in pictures.items():
        match = _FACE.fullmatch(path.stem)
        if match is None:
            problem = "no face of a cube by its name; expected one like NAME_front.jpg"
            problems.append(Job((path,), out / folder / path.name, problem))
            continue
        if match[1]:
            scene = folder / match[1]
        else:
            scene = folder if folder.name else Path(path.resolve().parent.name)
        faces, letter = scenes.setdefault(scene, {}), _FACE_NAMES[match[2].lower()]
        if letter in faces:
            raise UserError(f"{faces[letter]} and {path}: the same face of a cube; remove one")
        faces[letter] = path
    jobs = []
    for scene, faces in scenes.items():
        names = {letter: name for name, letter in reversed(_FACE_NAMES.items())}
        missing = [names[letter] for letter in face_letters() if letter not in faces]
        problem = f"cube faces missing: {', '.join(missing)}" if missing else ""
        ordered = tuple(faces[letter] for letter in face_letters() if letter in faces)
        target = out / scene.parent / f"{scene.name}.{conversion.form}"
        jobs.append(Job(ordered, target, problem))
    return [*jobs, *problems]


def _check_collisions(jobs: Sequence[Job]) -> None:
    """Names that differ only in case or Unicode form are one name on some file systems."""
    keys = [unicodedata.normalize("NFC", str(job.out)).casefold() for job in jobs]
    counts = Counter(keys)
    for key, count in counts.items():
        if count > 1:
            same = [job.name for job, other in zip(jobs, keys, strict=True) if other == key]
            raise UserError(
                f"{_some(same)}: would all be written to one file "
                f"({jobs[keys.index(key)].out}); rename them or convert them one folder at a time. "
                "Nothing was written"
            )


def _convert(job: Job, conversion: Conversion) -> str:
    """What was done. Raises PictureError if the panorama cannot be made."""
    if job.problem:
        raise PictureError(job.pictures[0], job.problem)
    pictures = [read_picture(path) for path in job.pictures]
    try:
        upright = make_upright(pictures, conversion)
    except PictureError as error:
        raise PictureError(job.pictures[0], error.reason) from None
    with atomic_write(job.out) as temporary:
        save_panorama(temporary, upright, pictures[0], _source(job, conversion), conversion.form)
    height, width = upright.panorama.shape[:2]
    return "; ".join((f"{width} x {height} pixels", *upright.notes))


def _source(job: Job, conversion: Conversion) -> str:
    """A digest of the pictures' bytes and of what is done to them, as an XMP attribute."""
    digest = hashlib.sha256(repr((_VERSION, conversion)).encode())
    for path in job.pictures:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return _SOURCE.format(digest.hexdigest())


def _is_result(job: Job, conversion: Conversion) -> bool:
    """Whether the file that exists is the job's result."""
    try:
        with open_picture(job.out) as (opened, _):
            xmp = opened.info.get("xmp", b"")
        return _source(job, conversion).encode() in xmp
    except (PictureError, OSError):
        return False


def _some(paths: Iterable[object]) -> str:
    names = [str(path) for path in paths]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
