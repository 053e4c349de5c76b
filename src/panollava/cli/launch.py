"""The processes of a command that several devices share: starting them on this machine, or joining
those that torchrun or SLURM started, and ending all of them when one fails.

Rank 0 is the command itself: only it logs, writes and handles signals."""

import contextlib
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

from panollava import logs
from panollava.errors import UserError
from panollava.stages import STAGES

if TYPE_CHECKING:
    import torch.distributed as dist

    from panollava.config import Settings

log = logging.getLogger(__name__)

COMMANDS = ("train", "features", "evaluate")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_CONNECT_SECONDS = 300.0
_GRACE_SECONDS = 20.0  # for rank 0 to notice itself that another rank has ended


class Place(NamedTuple):
    """A process among those of a launch."""

    rank: int
    world: int
    local_rank: int
    host: str
    port: int
    agent_store: bool = False  # torchrun's agent listens at the port


def find_place() -> Place | None:
    """This process's place among several that torchrun, SLURM or `first` started.

    Raises UserError for SLURM options that Lightning does not support, and for incomplete variables
    of torchrun."""
    env = os.environ
    # Batch scripts for srun may set WORLD_SIZE and MASTER_PORT, but no rank.
    ranked = "RANK" in env or "LOCAL_RANK" in env
    if ranked and (env.get("WORLD_SIZE") or "1") != "1" and "MASTER_PORT" in env:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
        if wrong := [name for name in names if not env.get(name, "").isdecimal()]:
            raise UserError(
                f"WORLD_SIZE={env['WORLD_SIZE']} is set, but {', '.join(wrong)} is no number; "
                "start the command with torchrun, or unset WORLD_SIZE"
            )
        rank, world, local_rank, port = (int(env[name]) for name in names)
        agent = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return Place(rank, world, local_rank, env.get("MASTER_ADDR", "127.0.0.1"), port, agent)
    if int(env.get("SLURM_STEP_NUM_TASKS") or 1) > 1:  # srun's; sbatch alone does not set it
        from lightning_fabric.plugins.environments import SLURMEnvironment

        try:
            slurm = SLURMEnvironment()
        except RuntimeError as error:  # of --ntasks without --ntasks-per-node
            raise UserError(str(error)) from None
        numbers = slurm.global_rank(), slurm.world_size(), slurm.local_rank()
        return Place(*numbers, slurm.main_address, slurm.main_port)
    return None


def check_count(settings: "Settings", count: int) -> None:
    """Raises UserError if so many processes cannot share the steps of all stages."""
    parts = {name: getattr(settings.stage, name) for name in STAGES}
    parts = {name: stage.accumulate for name, stage in parts.items() if stage.epochs}
    if not parts:
        return
    common = math.gcd(*parts.values())
    valid = [2**n for n in range(common.bit_length()) if common % 2**n == 0]
    if count not in valid:
        stages = ", ".join(f"{name} {number}" for name, number in parts.items())
        raise UserError(
            f"machine.devices: {count} processes cannot share the parts of a step "
            f"(stage.*.accumulate: {stages}); valid: {', '.join(map(str, valid))}"
        )


@contextlib.contextmanager
def first(place: Place | None, settings: "Settings", trains: bool) -> Iterator[None]:
    """Run the block as rank 0. Starts the other processes unless a launcher did."""
    count = place.world if place else settings.machine.devices
    if trains:
        check_count(settings, count)
    if count == 1:
        yield
        return
    from panollava.model import ranks

    done, children = threading.Event(), []
    _use_loopback(place.host if place else "127.0.0.1")
    store = _serve(place, count)
    if place is None:
        place = Place(0, count, 0, "127.0.0.1", store.port)
        children = [_start(place._replace(rank=n, local_rank=n)) for n in range(1, count)]
        args = (children, done, _connect(place))
        threading.Thread(target=_watch, args=args, daemon=True).start()
    try:
        with ranks.join(store, 0, count, place.local_rank):
            yield
        try:
            for child in children:
                child.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            log.warning("a process has not ended %.0f s after the work; killing it", _GRACE_SECONDS)
    finally:
        done.set()
        for child in children:
            child.kill()


def run_as_rank(place: Place, run: Callable[[], None]) -> None:
    """Run as a rank other than 0, and exit. Rank 0 logs its error."""
    from panollava.model import ranks

    os.environ["TQDM_DISABLE"] = "1"
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # rank 0 says when to stop
    if os.environ.get("PANOLLAVA_PARENT"):
        threading.Thread(target=_exit_with_parent, daemon=True).start()
    _use_loopback(place.host)
    store = _connect(place)
    try:
        with logs.to_nowhere(), ranks.join(store, place.rank, place.world, place.local_rank):
            run()
    except KeyboardInterrupt:  # rank 0 stops all
        os._exit(0)
    except ranks.LostRank as error:
        if error.args[0].startswith("rank 0") and place.rank == 1:  # nobody else says it
            sys.stderr.write(f"error: {error}\n")
            _kill_parent()
        os._exit(1)
    except UserError as error:
        _report_and_exit(store, place, str(error))
    except BaseException as error:  # noqa: BLE001 - whatever it is, rank 0 reports it
        text = "".join(traceback.format_exception(error))
        _report_and_exit(store, place, f"internal error ({type(error).__name__})\n{text}")
    os._exit(0)


def _report_and_exit(store: "dist.TCPStore", place: Place, cause: str) -> None:
    from panollava.model import ranks

    with contextlib.suppress(RuntimeError):  # rank 0 has ended
        ranks.report(store, f"rank {place.rank}: {cause}")
    os._exit(1)


def _use_loopback(host: str) -> None:
    """Also where the machine's name has no address, as in some containers."""
    if host == "127.0.0.1" and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _serve(place: Place | None, count: int) -> "dist.TCPStore":
    if place is not None and place.agent_store:
        return _connect(place)
    return _open_store(place or Place(0, count, 0, "127.0.0.1", 0), serves=True)


def _connect(place: Place) -> "dist.TCPStore":
    return _open_store(place, serves=False)


def _open_store(place: Place, serves: bool) -> "dist.TCPStore":
    import torch.distributed as dist

    limit = timedelta(seconds=_CONNECT_SECONDS)
    address = place.host, place.port, place.world
    try:
        return dist.TCPStore(*address, serves, limit, wait_for_workers=False)
    except dist.DistError as error:
        doing = "listen" if serves else "connect to rank 0"
        hint = "set MASTER_PORT to a free port" if serves else "see the messages of rank 0"
        reason = str(error).partition("\n")[0]
        raise UserError(f"{place.host}:{place.port}: cannot {doing} ({reason}); {hint}") from None


def _start(place: Place) -> subprocess.Popen:
    """Run this process's command line once more, as another rank."""
    environment = {
        **os.environ,
        "RANK": str(place.rank),
        "LOCAL_RANK": str(place.local_rank),
        "WORLD_SIZE": str(place.world),
        "MASTER_ADDR": place.host,
        "MASTER_PORT": str(place.port),
        "PANOLLAVA_PARENT": str(os.getpid()),
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # rank 0 reports failed connections
    }
    command = [sys.executable, *sys.orig_argv[1:]]
    # In a new session, so that Ctrl-C reaches rank 0 only.
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True
    )


def _watch(children: list[subprocess.Popen], done: threading.Event, store: "dist.TCPStore") -> None:
    """Report a child that fails. End this process if it does not notice that itself, because it
    waits for something else."""
    from panollava.model import ranks

    while not done.wait(0.2):
        for number, child in enumerate(children, start=1):
            if child.poll():
                ranks.report(store, f"rank {number} {_ending(child.returncode)}")
        if (cause := ranks.reported(store)) and not done.wait(_GRACE_SECONDS):
            log.error("%s", cause)
            for child in children:
                child.kill()
            os._exit(1)


def _ending(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}; run the same command again to resume"
    return f"ended with exit status {code}"


def _exit_with_parent() -> None:
    while os.getppid() == int(os.environ["PANOLLAVA_PARENT"]):
        time.sleep(1)
    os._exit(1)


def _kill_parent() -> None:
    if parent := os.environ.get("PANOLLAVA_PARENT"):
        os.kill(int(parent), signal.SIGKILL)
