"""The packaged recipes: whole ones here, and in ``overlays`` small ones to lay over them."""

from pathlib import Path

from lit_basics.errors import UserError, nearest

_FOLDER = Path(__file__).parent


def recipe_names(folder: str = "") -> list[str]:
    """Return the names of the recipes, or of the overlays in ``overlays``."""
    return sorted(path.stem for path in (_FOLDER / folder).glob("*.yaml"))


def all_names() -> list[str]:
    """Return the names of all recipes and overlays."""
    return [*recipe_names(), *recipe_names("overlays")]


def recipe_path(name: str) -> Path:
    """Return the file of a recipe or an overlay.

    Raises:
        UserError: If there is none of that name.
    """
    for folder in (_FOLDER, _FOLDER / "overlays"):
        path = folder / f"{name}.yaml"
        if path.is_file():
            return path
    raise UserError(f"there is no recipe {name!r}{nearest(name, all_names())} (lit_basics recipes lists them)")
