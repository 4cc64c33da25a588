"""Fills the reference page with every public name of the package, so that none is forgotten."""

import re
from typing import Any

import lit_basics

MARKER = "<!-- every public name -->"
SOURCE_LINK = re.compile(r"\[([^\]]+)\]\((?:\.\./)+src/[^)]*\)")
"""A link to a file of the checkout, for who reads the page there: the site has no such file."""
ROOMS = {
    "modules": "Modules",
    "nets": "Nets",
    "data": "Data",
    "callbacks": "Callbacks and checkpoints",
    "loggers": "Loggers",
    "optim": "Optimizers",
    "speed94": "speed94",
    "speed96": "speed96",
    "checkpoint_io": "Checkpoint files",
    "soft_loggers": "Loggers that fail soft",
    "verification": "Verify",
    "errors": "Errors",
}


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Replace the marker by one mkdocstrings directive a name, room by room; keep only the text of source links."""
    markdown = SOURCE_LINK.sub(r"\1", markdown)
    return markdown.replace(MARKER, directives()) if MARKER in markdown else markdown


def directives() -> str:
    """Return the Markdown of the reference."""
    rooms: dict[str, list[str]] = {room: [] for room in ROOMS}
    for name in lit_basics.__all__:
        module = getattr(lit_basics, name).__module__
        room = module.split(".")[1]
        rooms.setdefault(room, []).append(f"::: {module}.{name}\n")
    return "\n".join(f"## {ROOMS.get(room, room)}\n\n" + "\n".join(names) for room, names in rooms.items() if names)
