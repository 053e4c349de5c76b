"""Ours against the usual way: `make bench` runs all sections and prints one table.

    make bench ARGS="prepare answers"         only these sections
    make bench ARGS="--pictures FOLDER"       with these photos instead of synthetic ones
    make bench ARGS="--last"                  print the last results, measure nothing

Each section is a process. Within it, both ways are checked to give the same result and are timed
alternately; times are medians. On a shared machine the ratios are more reliable than the times."""

import argparse
import subprocess
import sys
from pathlib import Path

from measure import ROOT, format_table, read

SECTIONS = {  # the script and its arguments
    "prepare": ("prepare.py",),
    "convert": ("convert.py",),
    "resampler": ("training.py", "resampler"),
    "finetune": ("training.py", "finetune"),
    "memory": ("memory.py",),
    "answers": ("evaluation.py", "demo"),
    "answers-real": ("evaluation.py", "real"),
    "sphere": ("sphere_tokens.py",),
    "ask": ("ask.py",),
    "look": ("look.py",),
    "pipeline": ("pipeline.py",),
    "scaling": ("scaling.py",),
    "gpu": ("gpu.py",),  # measures nothing without a GPU
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--pictures", type=Path, help="a folder of large panoramas (*.jpg)")
    parser.add_argument("--repeats", type=int, help="timed runs of each")
    parser.add_argument("--last", action="store_true", help="print the last results")
    options = parser.parse_args()
    if unknown := set(options.sections) - SECTIONS.keys():
        parser.error(f"unknown section '{min(unknown)}'; the sections are {', '.join(SECTIONS)}")
    selected = [name for name in SECTIONS if name in (options.sections or SECTIONS)]
    results = {name: ROOT / f"runs/bench/{name}.json" for name in selected}
    for name, result in results.items():
        if options.last:
            continue
        script, *arguments = SECTIONS[name]
        command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
        command += ["--out", str(result)]
        if options.repeats:
            command += ["--repeats", str(options.repeats)]
        if options.pictures and name == "prepare":
            command += ["--pictures", str(options.pictures.resolve())]
        subprocess.run(command, check=True)
    lines = [line for file in results.values() if file.is_file() for line in read(file)]
    sys.stdout.write(format_table(lines) + "\n")


if __name__ == "__main__":
    main()
