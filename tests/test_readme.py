"""The English and the Korean README say the same, and what they name exists."""

import re
from difflib import unified_diff
from itertools import chain, zip_longest

import pytest

from conftest import ROOT
from panollava.cli import main as cli

ENGLISH, KOREAN = "README.md", "README.ko.md"
LINK_TO_OTHER = {ENGLISH: f"[한국어]({KOREAN})", KOREAN: f"[English]({ENGLISH})"}
BLOCK = re.compile(r"^```.*?^```$", re.M | re.S)
COMMENT = re.compile(r"(?:^|[ \t]+)#+ .*", re.M)
CODE = re.compile(r"`[^`]+`")
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
LINK = re.compile(r"(!?)\[[^]]*\](\([^)]+\))")
PATH = r"(?<![\w./])(?:(?:docs|tests|src|presets|benchmarks)/[\w./*-]*|[\w./-]+\.md)"


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def sections(name: str) -> list[str]:
    """From heading to heading, without the link to the other README and comments in code."""
    text = read(name).replace(LINK_TO_OTHER[name], "")
    text = BLOCK.sub(lambda block: COMMENT.sub("", block[0]), text)
    return re.split(r"^(?=#+ )", text, flags=re.M)


def title(section: str) -> str:
    return section.partition("\n")[0]


def pairs() -> list[tuple[str, str]]:
    """Each section in English and in Korean."""
    found = list(zip_longest(sections(ENGLISH), sections(KOREAN), fillvalue="no heading"))
    for english, korean in found:
        same_level = english.partition(" ")[0] == korean.partition(" ")[0]
        assert same_level, f"'{title(english)}' stands beside '{title(korean)}'"
    return found


def table(section: str) -> list[list[str]]:
    """The rows of all tables of a section, as cells."""
    rows = re.findall(r"^\|(.*)\|$", BLOCK.sub("", section), re.M)
    return [[cell.strip() for cell in row.split("|")] for row in rows]


def code_and_numbers(text: str) -> list[str]:
    """In an order that doesn't depend on the language."""
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


def named(pattern: str, section: str) -> list[str]:
    """What a pattern finds in code blocks and inline code."""
    code = BLOCK.findall(section) + CODE.findall(BLOCK.sub("", section))
    return re.findall(pattern, "\n".join(code))


@pytest.mark.parametrize("name", LINK_TO_OTHER)
def test_a_link_under_the_title_leads_to_the_other_language(name: str) -> None:
    assert read(name).splitlines()[1:4] == ["", LINK_TO_OTHER[name], ""], (
        f"{name}: expected {LINK_TO_OTHER[name]} under the title"
    )


def test_sections_differ_in_their_language_alone() -> None:
    differences = []
    for english, korean in pairs():
        expected, found = same_in_every_language(english), same_in_every_language(korean)
        for kind in expected:
            lines = unified_diff(expected[kind], found[kind], ENGLISH, KOREAN, lineterm="", n=0)
            if difference := "\n".join(lines):
                differences.append(f"{title(english)} / {title(korean)}: {kind}\n{difference}")
    assert not differences, "\n\n".join(differences)


def test_cells_left_in_english_are_the_english_ones() -> None:
    for english, korean in pairs():
        cells = zip(chain(*table(english)), chain(*table(korean)), strict=False)
        for expected, found in cells:
            same = found == expected or re.search("[가-힣]", found)
            assert same, f"{title(korean)}: expected '{expected}', found '{found}'"


@pytest.mark.parametrize("name", LINK_TO_OTHER)
def test_make_s_targets_exist(name: str) -> None:
    targets = re.findall(r"^([a-z]+):", read("Makefile"), re.M)
    for section in sections(name):
        for target in named(r"\bmake ([a-z]\S*)\b", section):
            assert target in targets, f"{name}, {title(section)}: no target of make: {target}"


@pytest.mark.parametrize("name", LINK_TO_OTHER)
def test_panollava_s_commands_exist(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for section in sections(name):
        for command in named(r"\bpanollava ([a-z][\w-]*)", section):
            with pytest.raises(SystemExit) as end:
                cli.main([command, "--help"])
            assert end.value.code == 0, f"{name}, {title(section)}: no command: {command}"


@pytest.mark.parametrize("name", LINK_TO_OTHER)
def test_files_exist(name: str) -> None:
    for section in sections(name):
        links = re.findall(r"\]\((?!\w+:)([^)#]+)", section)
        for path in named(PATH, section) + links:
            assert any(ROOT.glob(path)), f"{name}, {title(section)}: no such file: {path}"
