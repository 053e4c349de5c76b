"""Run the package next to this file, even if another copy is installed: DVC runs experiments in
copies of the project, which must use their own code."""

from panollava.cli.main import main

main()
