"""Run the package next to this file, even if another copy is installed: DVC runs experiments in
copies of the project, which must use their own code."""

import sys
from importlib.util import find_spec

if missing := [name for name in ("torch", "transformers", "pydantic") if find_spec(name) is None]:
    sys.exit(
        f"error: {sys.executable} has no {missing[0]}: it is not the project's environment; run "
        "'make setup', then 'source .venv/bin/activate'"
    )

from panollava.cli.main import main

main()
