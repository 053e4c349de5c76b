"""Ours against the usual way: `make bench` measures all sections and prints one table.

    make bench ARGS="prepare answers"         these sections alone
    make bench ARGS="--pictures FOLDER"       views of these photos, not of made ones
    make bench ARGS="--last"                  the last results of all sections

A section is a process of its own. Within it, each pair is checked to
give the same thing, and is timed in turns; times are medians. On a shared machine the ratios say
more than they do."""

import argparse
import subprocess
import sys
from pathlib import Path

import measure

ROOT = Path(__file__).parents[1]
SECTIONS = {  # the script and its arguments
    "prepare": ("prepare.py",),
    "resampler": ("training.py", "resampler"),
    "finetune": ("training.py", "finetune"),
    "memory": ("memory.py",),
    "answers": ("evaluation.py", "demo"),
    "answers-real": ("evaluation.py", "real"),
    "pipeline": ("pipeline.py",),
    "scaling": ("scaling.py",),
    "gpu": ("gpu.py",),  # where there is one
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; none: all")
    parser.add_argument("--pictures", type=Path, help="a folder of large panoramas (*.jpg)")
    parser.add_argument("--turns", type=int, help="how often each is timed")
    parser.add_argument("--last", action="store_true", help="measure nothing")
    options = parser.parse_args()
    if odd := set(options.sections) - SECTIONS.keys():
        parser.error(f"no section '{min(odd)}'")
    chosen = [name for name in SECTIONS if name in (options.sections or SECTIONS)]
    results = {name: ROOT / f"runs/bench/{name}.json" for name in chosen}
    for name, result in results.items():
        if options.last:
            continue
        script, *arguments = SECTIONS[name]
        command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
        command += ["--out", str(result)]
        if options.turns:
            command += ["--turns", str(options.turns)]
        if options.pictures and name == "prepare":
            command += ["--pictures", str(options.pictures.resolve())]
        subprocess.run(command, check=True)
    lines = [line for file in results.values() if file.is_file() for line in measure.read(file)]
    sys.stdout.write(measure.show(lines) + "\n")


if __name__ == "__main__":
    main()
