"""Makes the docstrings fit for the site, where griffe, which reads them, would not."""

import re
import textwrap

import griffe

ROLE = re.compile(r":(\w+):`([\w.]+)`")
LINKED = ("class", "func", "meth")  # what has a heading on the site
RETURNS = re.compile(r"^Returns:\n((?: +.*\n?|\n)+)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites the docstrings of a package once all its names are known.

    Sphinx roles, which editors understand, become links. What a function returns becomes a paragraph: griffe would
    take all up to its first colon for a type, and the signature tells the type anyway.
    """

    def on_package(self, *, pkg, loader, **kwargs):
        """Called by griffe."""
        self._rewrite(pkg)

    def _rewrite(self, obj) -> None:
        if obj.is_alias:
            return
        if obj.name == "__init__" and obj.is_function:
            obj.docstring = None  # "See the class", which is where the site shows it
        elif obj.docstring:
            text = RETURNS.sub(lambda found: f"**Returns:**\n\n{textwrap.dedent(found[1])}", obj.docstring.value)
            obj.docstring.value = ROLE.sub(lambda role: _link(obj, *role.groups()), text)
        for member in obj.members.values():
            self._rewrite(member)


def _link(obj, role: str, name: str) -> str:
    short = f"`{name.removeprefix('ssd_ext.')}`"
    path = _path(obj, name) if role in LINKED else ""
    return f"[{short}][{path}]" if path.startswith("ssd_ext.") else short


def _path(obj, name: str) -> str:
    """A full name stands for itself, a short one for what it means to ``obj``, or for an op; "" for other packages'."""
    try:
        path = name if name.startswith("ssd_ext.") else obj.resolve(name)
    except griffe.NameResolutionError:
        path = "" if "." in name else f"ssd_ext.ops.{name}"
    # To griffe this is the module, not the function of its name.
    return f"{path}.augmentation" if path == "ssd_ext.data.augmentation" else path
