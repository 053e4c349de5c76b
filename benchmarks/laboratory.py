"""Compare design choices on the demo over seeds: variants of the committed profile (see
`variants.py`), many trainings at once (see `replicas.py`).

Every (variant, seed) ends in a small file in runs/laboratory/results. An interrupted laboratory
continues, and the table merges all results of the same code. Models answer about valid, because
choices are made from the results.

    make laboratory                                           # tokens, in three regimes
    make laboratory ARGS="--only quarter.views --seeds 3"     # and what it is compared with
    make laboratory ARGS="--only lora 'stage1-*' --report"    # and write docs/laboratory.md"""

import argparse
import hashlib
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

import laboratory_table
from laboratory_work import COMMON, Laboratory, make_runs
from measure import ROOT
from panollava.model.device import choose_device, configure_cpu
from variants import select

log = logging.getLogger("laboratory")

FOLDER = ROOT / "runs/laboratory"
_SCRIPTS = ("variants", "replicas", "stacked_batches", "laboratory_work", "laboratory_scores")
CODE = ("src", "params.yaml", "data/demo", *(f"benchmarks/{name}.py" for name in _SCRIPTS))


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.INFO)
    warnings.filterwarnings("ignore", message=".*batching rule.*")  # attention on a processor
    disable_progress_bar()
    options = _parser().parse_args()
    device = choose_device(options.device)
    on_gpu = device.type != "cpu"
    stacked = options.stacked or (8 if on_gpu else 1)
    processes = options.processes or (2 if on_gpu else os.cpu_count() or 1)
    commit = options.commit or code_commit()
    selected = select(options.only)
    if not selected:
        sys.exit(f"no variant matches {options.only}; see benchmarks/variants.py")
    if not options.table:
        if processes > 1:
            run_side_by_side(processes)
        else:
            configure_cpu(COMMON["trainer.threads"])
            runs = make_runs(selected, range(options.seeds))
            Laboratory(options.folder, commit, device, stacked).run(runs)
    if not options.worker:
        results = laboratory_table.read_results(options.folder / "results", commit, selected)
        table = laboratory_table.format_table(results)
        log.info("%s", table)
        if options.report:
            laboratory_table.write_table(table, ROOT / "docs/laboratory.md")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="VARIANT", help="with wildcards")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--device", default="auto", choices=["cpu", "gpu", "auto"])
    parser.add_argument(
        "--stacked", type=int, help="trainings computed together; default: 8 on a GPU, else 1"
    )
    parser.add_argument(
        "--processes", type=int, help="side by side; default: 2 on a GPU, else the cores"
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of results")
    parser.add_argument("--commit", help="of results; default: the last one that changed the code")
    parser.add_argument("--table", action="store_true", help="only show what is there")
    parser.add_argument("--report", action="store_true", help="write the table into docs/")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def run_side_by_side(processes: int) -> None:
    command = [sys.executable, *sys.argv, "--processes", "1", "--worker"]
    workers = [subprocess.Popen(command) for _ in range(processes)]
    try:
        codes = [worker.wait() for worker in workers]
    finally:
        for worker in workers:
            worker.terminate()
    if any(codes):
        sys.exit("a process of the laboratory failed; run the same command again to continue")


def code_commit() -> str:
    """The last commit that changed what results depend on, and a digest of later changes."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments, "--", *CODE]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    commit, changes = git("log", "-1", "--format=%h"), git("diff", "HEAD")
    if changes:
        commit += f"-{hashlib.sha256(changes.encode()).hexdigest()[:8]}"
    return commit


if __name__ == "__main__":
    main()
