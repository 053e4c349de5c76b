"""Whether all machines of a Ray cluster see the same files, and have the same versions, as the one
that runs the command."""

import contextlib
import hashlib
import importlib
import logging
import platform
import secrets
import time
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import panollava
from panollava.errors import UserError

log = logging.getLogger(__name__)

PACKAGE = Path(panollava.__file__).parent
_ANSWER_SECONDS = 120.0  # for a machine to start Python and to answer
_VISIBLE_SECONDS = 10.0  # until a new file is seen through a shared file system
# Those that decide which bytes the shards have.
_LIBRARIES = ("torch", "transformers", "numpy", "opencv-python-headless", "pillow", "simplejpeg")
_SAMPLE, _MAX_FILES = 1024, 50  # bytes of a file; each task reads all


class Expected(NamedTuple):
    """What a machine must have in common with the one that runs the command."""

    project: Path
    versions: dict[str, str]
    files: dict[Path, bytes]  # how each starts
    tokens: list[Path]  # of these files, those that were written for this purpose


@contextlib.contextmanager
def expect(written: Sequence[Path], read: Sequence[Path]) -> Iterator[Expected]:
    tokens = {}
    for folder in written:
        token = folder.absolute() / f".shared-{secrets.token_hex(8)}"
        tokens[token] = secrets.token_bytes(16)
    samples = [file.absolute() for file in read[:_MAX_FILES]]
    files = {file: content for file in samples if (content := _start_of(file))}
    try:
        for token, content in tokens.items():
            token.parent.mkdir(parents=True, exist_ok=True)
            token.write_bytes(content)
        yield Expected(Path.cwd(), _versions(), files | tokens, list(tokens))
    finally:
        for token in tokens:
            for file in token.parent.glob(f"{token.name}*"):  # answers, too
                file.unlink(missing_ok=True)


def _start_of(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            return file.read(_SAMPLE)
    except OSError:
        return None


@cache
def _versions() -> dict[str, str]:
    """Of Python, the libraries that decide what shards contain, and this package's code."""
    versions = {"Python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "(none)"
    digest = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        digest.update(f"{file.relative_to(PACKAGE)}\0".encode() + file.read_bytes())
    return versions | {"panollava's code": digest.hexdigest()[:12]}


def check_machines(ray: Any, machines: list[dict[str, Any]], expected: Expected) -> None:
    strategy = importlib.import_module("ray.util.scheduling_strategies")
    visit = ray.remote(_visit)
    for machine in machines:
        place = strategy.NodeAffinitySchedulingStrategy(machine["NodeID"], soft=False)
        machine["answer"] = visit.options(num_cpus=0, scheduling_strategy=place).remote(
            expected, machine["NodeID"]
        )
    ray.wait(
        [machine["answer"] for machine in machines],
        num_returns=len(machines),
        timeout=_ANSWER_SECONDS,
    )
    for machine in machines:
        name = machine["NodeManagerHostname"]
        try:
            fault = ray.get(machine["answer"], timeout=0)
        except (ray.exceptions.TaskUnschedulableError, ray.exceptions.NodeDiedError):
            log.warning("machine %s was lost", name)
            continue
        except ray.exceptions.GetTimeoutError:
            fault = f"no answer within {_ANSWER_SECONDS:.0f} s; see `ray status` and its logs"
        except ray.exceptions.RayError as error:
            fault = (
                f"cannot run this code ({last_line(error)}); install the environment of this "
                "machine there, and the code in the same folder"
            )
        answers = [_answer(token, machine["NodeID"]) for token in expected.tokens]
        for token, answer in zip(expected.tokens, answers, strict=True):
            fault = fault or (
                None if _appears(answer, token.name.encode()) else _not_shared(token.parent)
            )
        if fault:
            raise UserError(f"--ray: machine {name}: {fault}")


def _visit(expected: Expected, node: str) -> str | None:
    """On each machine: why it cannot run tasks."""
    if fault := fault_of_machine(expected):
        return fault
    for token in expected.tokens:
        try:
            _answer(token, node).write_bytes(token.name.encode())
        except OSError as error:
            return f"{token.parent}: cannot be written ({error.strerror}); get permission there"
    return None


def _answer(token: Path, node: str) -> Path:
    return token.with_name(f"{token.name}-{node}")


def fault_of_machine(expected: Expected) -> str | None:
    """What this machine lacks for tasks. Asked before each one, since machines may join later."""
    for name, here in _versions().items():
        if here != expected.versions[name]:
            return (
                f"{name}: {here}, but {expected.versions[name]} where the command runs; install "
                "the same version"
            )
    for path, content in expected.files.items():
        if not _appears(path, content):
            return _not_shared(path.parent)
    return None


def _not_shared(folder: Path) -> str:
    return (
        f"{folder} holds other files than where the command runs; put it on storage that all "
        "machines mount in the same place"
    )


def _appears(path: Path, content: bytes) -> bool:
    """Whether a file starts so, now or soon."""
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while (found := _start_of(path)) != content:
        if found is not None or time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()[:200]
