"""The README's commands run, both languages say the same, and what the pages name exists."""

import re
import shutil
import tomllib
from difflib import unified_diff
from itertools import chain, zip_longest
from pathlib import Path
from typing import NamedTuple

import pytest
from ruamel.yaml import YAML

from helpers import ROOT, Project, copy_project
from panollava.cli import main as cli

ENGLISH, KOREAN = "README.md", "README.ko.md"
LINK_TO_OTHER = {ENGLISH: f"[한국어]({KOREAN})", KOREAN: f"[English]({ENGLISH})"}
PAGES = [
    *LINK_TO_OTHER,
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md")),
    *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("data/*/README.md")),
]
BLOCK = re.compile(r"^ *```.*?^ *```$", re.M | re.S)
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
SHELL_BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.M | re.S)
COMMENT = re.compile(r"(?:^|[ \t]+)#+ .*", re.M)
CODE = re.compile(r"`[^`]+`")
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
LINK = re.compile(r"(!?)\[[^]]*\](\([^)]+\))")
PATH = r"(?<![\w./])(?:(?:docs|tests|src|presets|benchmarks)/[\w./*-]*|[\w./-]+\.md)"


class NotRun(NamedTuple):
    reason: str
    instead: str  # a command that shows that the arguments are accepted
    output: str  # must be in its output


NOT_RUN = {
    "make repro": NotRun("installs packages, takes minutes", "make -n repro", "dvc repro"),
    "make test": NotRun("would run this test again", "make -n test", "pytest"),
    "panollava look --open": NotRun(
        "serves until it is interrupted", "panollava look --help", "--open"
    ),
    "source .venv/bin/activate": NotRun(
        "needs the environment that make installs", "make -n setup", "-m venv .venv"
    ),
}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def commands() -> list[str]:
    """All commands of the README, in their order."""
    lines = COMMENT.sub("", "".join(SHELL_BLOCK.findall(read(ENGLISH)))).splitlines()
    return [line.strip() for line in lines if line.strip()]


@pytest.fixture
def readers_project(tmp_path: Path, towers: Path, small_data: Path) -> Project:
    """The project, and data/mine with a preset for it, with small towers and data."""
    project = copy_project(tmp_path / "project", towers, small_data)
    shutil.copytree(small_data, project.folder / "data/mine")
    preset = (project.folder / "params.yaml").read_text().replace("small/data", "data/mine")
    (project.folder / "presets/quic360-recommended.yaml").write_text(preset)
    copy_first_panorama(project.folder)
    project.commit("data")
    return project


def copy_first_panorama(folder: Path) -> None:
    """Where the demo has it."""
    target = folder / "data/demo/images/test_0000.jpg"
    target.parent.mkdir(parents=True)
    shutil.copy(folder / "small/data/images/test_0.jpg", target)


def run(project: Project, command: str) -> str:
    # Make must not take over the options and job slots of a `make test` around it.
    return project.run("env", "-u", "MAKEFLAGS", "-u", "MAKELEVEL", "bash", "-c", command)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_readme_s_commands_run_in_their_order(readers_project: Project) -> None:
    output = {c: run(readers_project, c) for c in commands() if c not in NOT_RUN}
    for number in ("best.step", "val_loss", "val_accuracy"):
        assert number in output["dvc metrics show"], number
    assert run(readers_project, "dvc exp list --name-only").strip(), "no experiment was saved"
    for line in re.findall(r"^\| `((?:runs|metrics|logs)/[^`]*)`", read(ENGLISH), re.M):
        assert any(readers_project.folder.glob(line)), f"the README promises {line}"


def test_the_readme_s_commands_for_own_data_run(readers_project: Project) -> None:
    for command in commands():
        if command.startswith(("panollava check", "panollava plan", "cp ")):
            run(readers_project, command)


@pytest.mark.parametrize("page", [ENGLISH, "docs/use.md"])
def test_the_python_code_runs_after_the_pipeline(finished: Project, page: str) -> None:
    if not (finished.folder / "data/demo/images").is_dir():
        copy_first_panorama(finished.folder)
    blocks = PYTHON_BLOCK.findall(read(page))
    assert blocks, f"{page} has no Python code"
    blocks = [block for block in blocks if "base_url" not in block]  # test_server.py runs it
    if "panollava export exported" in read(page):
        finished.run("python", "src/run.py", "export", "exported")
    for block in blocks:
        *_, last = block.strip().splitlines()
        check = f"assert all(isinstance(text, str) for text in {last}), 'no texts'\n"
        check = "" if last.startswith("print(") else check
        finished.run("python", "-c", block + check)


@pytest.mark.parametrize("command", NOT_RUN)
def test_commands_that_are_not_run_are_accepted(command: str, tmp_path: Path) -> None:
    assert command in commands(), "the README has no such command any more"
    for file in ("Makefile", "pyproject.toml", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / file, tmp_path)
    _, instead, expected = NOT_RUN[command]
    assert expected in run(Project(tmp_path), instead)


@pytest.mark.parametrize("name", LINK_TO_OTHER)
def test_the_readme_is_short(name: str) -> None:
    assert len(read(name).splitlines()) <= 120


def sections(name: str) -> list[str]:
    """From heading to heading, without the link to the other README and comments in code."""
    text = read(name).replace(LINK_TO_OTHER.get(name, ""), "")
    text = BLOCK.sub(lambda block: COMMENT.sub("", block[0]), text)
    return re.split(r"^(?=#+ )", text, flags=re.M)


def title(section: str) -> str:
    return section.partition("\n")[0]


def pairs() -> list[tuple[str, str]]:
    """Each section in English and in Korean."""
    result = list(zip_longest(sections(ENGLISH), sections(KOREAN), fillvalue="no heading"))
    for english, korean in result:
        same_level = english.partition(" ")[0] == korean.partition(" ")[0]
        assert same_level, f"'{title(english)}' corresponds to '{title(korean)}'"
    return result


def table(section: str) -> list[list[str]]:
    """The rows of all tables of a section, as cells."""
    rows = re.findall(r"^\|(.*)\|$", BLOCK.sub("", section), re.M)
    return [[cell.strip() for cell in row.split("|")] for row in rows]


def code_and_numbers(text: str) -> list[str]:
    """In an order that does not depend on the language."""
    return sorted(CODE.findall(text) + NUMBER.findall(CODE.sub("", text)))


def same_in_every_language(section: str) -> dict[str, list[str]]:
    prose = BLOCK.sub("", section)
    kinds = {"# ": "heading", "##": "heading", "- ": "list item", "| ": "table", "``": "code block"}
    blocks = re.split(r"\n{2,}|\n(?=- )", section.strip())
    return {
        "form": [kinds.get(block[:2], "paragraph") for block in blocks],
        "code blocks": "\n".join(BLOCK.findall(section)).splitlines(),
        "tables": [" | ".join(map(str, map(code_and_numbers, row))) for row in table(section)],
        "links and images": sorted(map("".join, LINK.findall(prose))),
        "inline code and numbers": code_and_numbers(prose),
    }


@pytest.mark.parametrize("name", LINK_TO_OTHER)
def test_a_link_under_the_title_leads_to_the_other_language(name: str) -> None:
    assert read(name).splitlines()[1:4] == ["", LINK_TO_OTHER[name], ""], (
        f"{name}: expected {LINK_TO_OTHER[name]} under the title"
    )


def test_the_two_readmes_differ_only_in_their_language() -> None:
    differences = []
    for english, korean in pairs():
        expected, actual = same_in_every_language(english), same_in_every_language(korean)
        for kind in expected:
            lines = unified_diff(expected[kind], actual[kind], ENGLISH, KOREAN, lineterm="", n=0)
            if difference := "\n".join(lines):
                differences.append(f"{title(english)} / {title(korean)}: {kind}\n{difference}")
    assert not differences, "\n\n".join(differences)


def test_cells_left_in_english_are_the_english_ones() -> None:
    for english, korean in pairs():
        cells = zip(chain(*table(english)), chain(*table(korean)), strict=False)
        for expected, actual in cells:
            same = actual == expected or re.search("[가-힣]", actual)
            assert same, f"{title(korean)}: expected '{expected}', found '{actual}'"


def named(pattern: str, section: str) -> list[str]:
    """What a pattern matches in code blocks and inline code."""
    blocks = [block for block in BLOCK.findall(section) if not block.startswith("```python")]
    code = blocks + CODE.findall(BLOCK.sub("", section))
    return re.findall(pattern, "\n".join(code))


@pytest.mark.parametrize("name", PAGES)
def test_make_targets_exist(name: str) -> None:
    targets = re.findall(r"^([a-z-]+):", read("Makefile"), re.M)
    for section in sections(name):
        for target in named(r"\bmake ([a-z]\S*)\b", section):
            assert target in targets, f"{name}, {title(section)}: no target of make: {target}"


@pytest.mark.parametrize("name", PAGES)
def test_panollava_commands_exist(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for section in sections(name):
        for command in named(r"\bpanollava ([a-z][\w-]*)", section):
            with pytest.raises(SystemExit) as end:
                cli.main([command, "--help"])
            assert end.value.code == 0, f"{name}, {title(section)}: no command: {command}"


@pytest.mark.parametrize("name", PAGES)
def test_files_exist(name: str) -> None:
    folder = (ROOT / name).parent
    for section in sections(name):
        for path in named(PATH, section):
            exists = any(ROOT.glob(path)) or any(folder.glob(path))
            assert exists, f"{name}, {title(section)}: no such file: {path}"


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_files_and_headings(name: str) -> None:
    for path, anchor in re.findall(r"\]\((?!\w+:)([^)#]*)#?([^)]*)\)", BLOCK.sub("", read(name))):
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.is_file(), f"{name}: no such file: {path}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M)
            anchors = [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]
            assert anchor in anchors, f"{name}: no such heading in {path}: {anchor}"


def test_the_code_page_has_one_line_for_each_module() -> None:
    package = ROOT / "src/panollava"
    modules = {path.relative_to(package).as_posix() for path in package.rglob("*.py")}
    expected = sorted(module for module in modules if not module.endswith("__init__.py"))
    assert sorted(re.findall(r"^- `([\w/]+\.py)`: ", read("docs/code.md"), re.M)) == expected


def test_the_citation_names_the_package_s_version() -> None:
    citation = YAML(typ="safe", pure=True).load(read("CITATION.cff"))
    assert citation["version"] == tomllib.loads(read("pyproject.toml"))["project"]["version"]
