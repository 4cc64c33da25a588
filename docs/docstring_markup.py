"""A griffe extension: the docstrings' reStructuredText (roles, simple tables) as Markdown."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|attr):`(~?)([\w.]+)`")
RULE = re.compile(r"\s*=+( +=+)+\s*")


class DocstringMarkup(griffe.Extension):
    """Rewrites each docstring before it is rendered."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Convert one object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    """Return ``text`` with roles as links or code and simple tables as Markdown tables."""
    return "\n".join(_tables(ROLE.sub(_reference, text).split("\n")))


def _reference(match: re.Match[str]) -> str:
    short, path = match.groups()
    name = path.rpartition(".")[2] if short else path
    return f"[`{name}`][{path}]" if path.startswith("lit_basics.") else f"`{name}`"


def _tables(lines: list[str]) -> list[str]:
    result: list[str] = []
    starts: list[int] = []
    rows: list[list[str]] = []
    rules = 0
    for line in lines:
        if RULE.fullmatch(line):
            rules += 1
            starts = [match.start() for match in re.finditer("=+", line)]
            if rules == 3:
                head, *body = rows
                result += [_row(head), _row(["---"] * len(head)), *map(_row, body)]
                rules, rows = 0, []
        elif rules:
            cells = [line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]
            if cells[0]:
                rows.append(cells)
            else:  # a cell of several lines
                rows[-1] = [f"{old} {new}".strip() for old, new in zip(rows[-1], cells, strict=True)]
        else:
            result.append(line)
    return result


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
