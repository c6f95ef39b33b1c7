"""Why the extension could not be imported."""

import importlib.machinery
import platform
from pathlib import Path

import torch


def why_not_loaded(error: ImportError, package: str | Path) -> str:
    """One sentence for a user whose ``ssd_ext._C`` cannot be imported from the folder ``package``."""
    package = Path(package)
    built = sorted(path.name for path in package.glob("_C*.so"))
    if not built and (package.parent / "CMakeLists.txt").is_file():
        return (
            f"ssd_ext is imported from its source tree {package.parent}, where the extension is not built: "
            f"run in another folder to use an installed ssd_ext, or install with: pip install -e {package.parent}"
        )
    if not built:
        return f"the extension _C is missing from {package}: reinstall ssd_ext"
    if not any(name == "_C" + suffix for name in built for suffix in importlib.machinery.EXTENSION_SUFFIXES):
        return f"ssd_ext was built for another Python ({built[0]}), this is {platform.python_version()}: reinstall it"
    return f"ssd_ext does not load under torch {torch.__version__}: reinstall it ({error})"
