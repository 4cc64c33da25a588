"""The command lines of the README and of the pages: each is one that the command line takes."""

import re
import shlex
from pathlib import Path

import pytest

from lit_basics.config import Config
from lit_basics.words import taken

ROOT = Path(__file__).parents[1]
NOT_THERE = re.compile(r"--resume|mine\.|my_package|\b(DIR|FILE|GREY|KEY)\b|quikstart|[|…]")
"""What these name."""


def command_lines():
    """Return every ``fit`` and ``verify`` of the blocks of commands, by its words and where it stands."""
    found = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text = page.read_text()
        for block in re.finditer(r"^```(\w*).*?\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            for line in block[2].replace("\\\n", " ").splitlines():
                match = re.search(r"lit_basics (fit|verify) (.*)", line)
                if match and not NOT_THERE.search(match[2]):
                    found.append((f"{page.relative_to(ROOT)}: {match[0]}", shlex.split(match[2], comments=True)))
    return found


LINES = command_lines()


def test_there_are_command_lines():
    assert len(LINES) > 30


@pytest.mark.parametrize("words", [words for _, words in LINES], ids=[place for place, _ in LINES])
def test_the_command_line_is_taken(words):
    _, words = taken(words, "--checks", "--steps")
    Config(words)
