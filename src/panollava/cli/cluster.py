"""`--ray ADDRESS`: a command's shards as tasks of a running Ray cluster, which repeats those of
machines that are lost. Which shards there are, and making one, is the command's business.

Ray is an optional requirement, imported only by this module and `cluster_check`."""

import contextlib
import importlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tqdm import tqdm

from panollava import paths
from panollava.cli.cluster_check import (
    PACKAGE,
    Expected,
    check_machines,
    expect,
    fault_of_machine,
    last_line,
)
from panollava.data.shard_work import Distribute
from panollava.errors import UserError, system_errors_as_user_errors

log = logging.getLogger(__name__)

_MAX_RETRIES = 5  # of a task whose machine or process was lost
_CONNECT_SECONDS = 10.0

_MEMORY_HINT = "lower machine.decode_threads, or use machines with more memory"
_MAX_SHARDS = 16  # of a task on a GPU, whose process Ray ends with the task

Shard = TypeVar("Shard")
Make = Callable[[Sequence[Shard]], object]


class Needs(NamedTuple):
    """What a task needs."""

    cpus: int
    gpus: int
    files: Callable[[Sequence[Any]], Sequence[Path]]  # some of those that making shards reads


@contextlib.contextmanager
def connect(address: str, needs: Needs, written: Sequence[Path]) -> Iterator[Distribute]:
    """Connect to the cluster. Yields a function that makes shards there: it checks the machines,
    and calls on them the function that it gets, which they can import, in the project's folder.

    `written`: folders that the machines must share.

    Raises:
        UserError: no Ray, no cluster. The function raises that of a task, or for a machine with
            other files or versions. All tasks end with the block.
    """
    ray = _import_ray()
    handler = signal.getsignal(signal.SIGTERM)  # Ray replaces it
    with contextlib.ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGTERM, handler)
        _init(ray, address, needs.gpus)
        stack.callback(ray.shutdown)  # ends all tasks that are running
        signal.signal(signal.SIGTERM, handler)
        if not (machines := _machines(ray, needs.gpus)):
            raise UserError(
                f"--ray {address}: no machine of the cluster has a "
                f"{'GPU' if needs.gpus else 'CPU'} for tasks; see `ray status`"
            )
        log.info("%d machines of the Ray cluster at %s", len(machines), address)

        def distribute(make: Make, shards: Sequence[Shard]) -> None:
            with expect(written, [paths.PARAMS, *needs.files(shards)]) as expected:
                check_machines(ray, machines, expected)
                # A task must fit on the smallest machine.
                cpus = min(needs.cpus, *(int(each["Resources"]["CPU"]) for each in machines))
                _run(ray, make, shards, needs._replace(cpus=cpus), expected)

        yield distribute


def _import_ray() -> Any:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise UserError(f"--ray needs Ray ({error}); install it: pip install -e .[ray]") from None


def _init(ray: Any, address: str, gpus: int) -> None:
    path = os.environ.get("PYTHONPATH", "")
    if "site-packages" not in PACKAGE.parts:  # the code of this folder, installed or not
        path = f"{PACKAGE.parent}:{path}".rstrip(":")
    variables = {"PYTHONPATH": path, "TQDM_DISABLE": "1"}
    if not gpus:  # so that `trainer.accelerator: auto` means the same on all machines
        variables["CUDA_VISIBLE_DEVICES"] = ""
    try:
        if address != "auto":  # Ray tries for minutes, and then ends the process
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
        ray.init(
            address=address,
            runtime_env={"env_vars": variables},
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise UserError(
            f"--ray {address}: cannot connect ({' '.join(str(error).split())[:200]}); run the "
            "command on a machine of the cluster, where `ray status` shows it"
        ) from None


def _machines(ray: Any, gpus: int) -> list[dict[str, Any]]:
    """Those that run tasks."""
    machines = [machine for machine in ray.nodes() if machine["Alive"]]
    needed = {"CPU": 1, "GPU": gpus}
    return [
        machine
        for machine in machines
        if all(machine["Resources"].get(name, 0) >= number for name, number in needed.items())
    ]


def _slots(ray: Any, needs: Needs) -> int:
    """How many tasks fit on the cluster, which may grow or shrink."""
    total = 0
    for machine in _machines(ray, needs.gpus):
        resources = machine["Resources"]
        slots = resources["CPU"] // needs.cpus
        total += int(min(slots, resources["GPU"]) if needs.gpus else slots)
    return total


def _work(make: Make, shards: Sequence[Shard], expected: Expected) -> str | None:
    """A task, on some machine. Returns the message of a UserError: Ray repeats no finished task."""
    if fault := fault_of_machine(expected):
        return f"--ray: machine {socket.gethostname()}: {fault}"
    os.chdir(expected.project)
    try:
        with system_errors_as_user_errors(_MEMORY_HINT):
            make(shards)
    except UserError as error:
        return str(error)
    return None


def _run(ray: Any, make: Make, shards: Sequence[Shard], needs: Needs, expected: Expected) -> None:
    # Not by `options`: without GPUs here, Ray would keep a process and give it another's GPU later.
    options = {"num_cpus": needs.cpus, "num_gpus": needs.gpus, "max_retries": _MAX_RETRIES}
    task = ray.remote(**options)(_work)
    size = 1
    if needs.gpus:
        size = max(1, min(_MAX_SHARDS, len(shards) // (8 * _slots(ray, needs) or 1)))
    firsts = iter(range(0, len(shards), size))
    running: dict[Any, int] = {}  # the number of shards of each task
    with tqdm(total=len(shards), desc="shards", disable=None) as bar:
        for _ in range(0, len(shards), size):
            # Some wait, so that no machine does. Ray would keep all of a million in memory.
            ready: list[Any] = []
            while not ready:
                for first in islice(firsts, max(0, 2 * _slots(ray, needs) - len(running))):
                    part = shards[first : first + size]
                    running[task.remote(make, part, expected)] = len(part)
                if not running:
                    raise UserError(
                        "--ray: no machine is left in the cluster; see `ray status`, and run the "
                        "same command again"
                    )
                ready, _ = ray.wait(list(running), timeout=1.0)
            if message := _result(ray, ready[0]):
                raise UserError(message)
            bar.update(running.pop(ready[0]))


def _result(ray: Any, task: Any) -> str | None:
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError:
        raise  # an internal error
    except ray.exceptions.RayError as error:
        return (
            f"--ray: a task failed {1 + _MAX_RETRIES} times ({last_line(error)}); see Ray's logs, "
            "and run the same command again"
        )
