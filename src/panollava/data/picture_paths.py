"""Which file a row's url names: a path, or the place where the picture of a link is stored."""

import errno
import hashlib
import re
import stat
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from panollava.data.images import PictureError
from panollava.data.texts import INVISIBLE

NOT_DOWNLOADED = "link not downloaded"
UNREADABLE = "picture cannot be read"
_MISSING = "picture missing"
_NO_SUCH_PATH = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
_LINK = re.compile(r"\s*https?://", re.IGNORECASE)
_Key = Callable[[str], str]  # equal for names that differ only in spelling
_HINTS = (  # what a url looks like that names no file, and what to say about it
    (r"(?!file:)([a-z][a-z0-9+.-]+://)", r"'\1' is not supported; use https:// or a path"),
    (r"data:", "a picture within the table is not supported; store it as a file"),
    (r"www\.|//", "a link starts with https://"),
    (r"[a-z]:[\\/]", "a path of Windows; make it relative to the CSV file's folder"),
    (r"~", "'~' stands for no folder here; make the path relative to the CSV file's folder"),
)


def is_link(url: str) -> bool:
    return bool(_LINK.match(url))


def address(link: str) -> str:
    """The address behind a link: without outer spaces, its scheme in small letters."""
    scheme, rest = link.strip().split(":", 1)
    return f"{scheme.lower()}:{rest}"


def picture_file(link: str, folder: Path) -> Path:
    """Where `download` stores the picture of `link`, for a CSV file in `folder`. No other address
    has the same file, even if the file system ignores case."""
    name = PurePosixPath(_last_part(link))
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", name.stem)[:100]
    suffix = name.suffix if re.fullmatch(r"\.[A-Za-z0-9]{1,5}", name.suffix) else ""
    digest = hashlib.sha256(address(link).encode()).hexdigest()
    return folder / "images" / f"{stem}-{digest[:16]}{suffix}"


def plain_file(link: str, folder: Path) -> Path:
    """Where a picture of `link` may be that was collected in another way: under the last part of
    its address, which other links may share."""
    return folder / "images" / _last_part(link)


def _last_part(link: str) -> str:
    return re.split(r"[?#]", address(link), maxsplit=1)[0].rsplit("/", 1)[-1]


class PictureFinder:
    """Finds the files of urls. It lists each folder at most once, so use it for one command.

    A path is absolute or relative to the CSV file's folder or the project's root. The picture of a
    link is in `images` beside the CSV file. A name on the disk may differ from the table in
    spelling: Unicode form, percent-encoding, backslashes, outer spaces, invisible characters and,
    for paths, case. It counts only if no other file is as near, which no order of the folder and
    no file system changes.
    """

    def __init__(self, folder: Path, root: Path) -> None:
        self._bases = (folder, root)
        self._names: dict[tuple[Path, _Key], dict[str, list[str]]] = {}

    def find(self, url: str) -> Path:
        """The file of `url`, with symbolic links resolved.

        Raises:
            PictureError: there is none, several are equally near, or it cannot be examined, such
                as in a folder without search permission.
        """
        if picture := self.named_exactly(url):
            return picture
        folder = self._bases[0]
        if is_link(url):  # case matters in addresses
            names = self._like(folder / "images", _last_part(url), _spelling)
            paths = (folder / "images" / name for name in names)
            near = {file: path.name for path in paths if (file := _file(path))}
            if not near:
                raise PictureError(Path(url), NOT_DOWNLOADED)
        else:
            path = re.sub(r"^file:/+(localhost/+)?", "/", url.strip(), flags=re.IGNORECASE)
            searches = ((base, key) for key in (_spelling, _letters) for base in self._bases)
            near = next(filter(None, (self._near(base, path, key) for base, key in searches)), {})
        if len(near) == 1:
            return next(iter(near))
        raise PictureError(Path(url), _MISSING, self._detail(url, near.values()))

    def named_exactly(self, url: str) -> Path | None:
        """The file that has exactly the name of `url`. Raises PictureError, see `find`."""
        if is_link(url):
            folder = self._bases[0]
            candidates = [picture_file(url, folder), plain_file(url, folder)]
        else:
            candidates = [base / url for base in self._bases]
        return next(filter(None, map(_file, candidates)), None)

    def _near(self, base: Path, path: str, key: _Key) -> dict[Path, str]:
        """Files whose path has the same key, with their names."""
        path = unquote(path).replace("\\", "/")
        paths = [Path("/") if path.startswith("/") else base]
        for part in path.split("/"):
            if part not in ("", "."):
                paths = [place / name for place in paths for name in self._like(place, part, key)]
        return {file: path.name for path in paths if (file := _file(path))}

    def _like(self, folder: Path, name: str, key: _Key) -> list[str]:
        """Names in a folder with the same key as `name`, sorted."""
        if name == "..":
            return [name]
        if (folder, key) not in self._names:
            names: dict[str, list[str]] = {}
            try:
                for each in sorted(path.name for path in folder.iterdir()):
                    names.setdefault(key(each), []).append(each)
            except PermissionError:  # it may be searched though it cannot be listed
                return [name]
            except (OSError, ValueError):  # no such folder
                pass
            self._names[folder, key] = names
        return self._names[folder, key].get(key(name), [])

    def _detail(self, url: str, near: Iterable[str]) -> str:
        if names := sorted(near):
            shown = ", ".join(f"'{name}'" for name in names[:3])
            return f"{len(names)} files differ from it only in spelling: {shown}; rename one"
        for pattern, hint in _HINTS:
            if match := re.match(pattern, url.strip(), re.IGNORECASE):
                return match.expand(hint) if "\\" in hint else hint
        name = PurePosixPath(unquote(url).replace("\\", "/")).name
        for place in ("", "images/"):
            for other in self._like(self._bases[0] / place, name, _stem):
                if place + other != url:
                    return f"there is '{place}{other}'"
        return ""


def _spelling(name: str) -> str:
    return unicodedata.normalize("NFC", INVISIBLE.sub("", unquote(name))).strip()


def _letters(name: str) -> str:
    return _spelling(name).casefold()


def _stem(name: str) -> str:
    return PurePosixPath(_letters(name)).stem


def _file(path: Path) -> Path | None:
    """The file with symbolic links resolved, or None. Raises PictureError, see PictureFinder."""
    try:
        return path.resolve() if stat.S_ISREG(path.stat().st_mode) else None
    except ValueError:  # not a path: it contains a null character
        return None
    except OSError as error:
        # A url that is too long for a path may be an annotation in the wrong column.
        if error.errno in _NO_SUCH_PATH:
            return None
        detail = error.strerror or str(error)
        raise PictureError(path, UNREADABLE, detail) from None
