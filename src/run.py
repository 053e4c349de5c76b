"""Runs the package that stands beside this file, wherever another copy may be installed: a copy
of the project, as DVC makes for an experiment, thus runs its own code."""

from panollava.cli.main import main

main()
