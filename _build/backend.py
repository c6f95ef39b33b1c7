"""PEP 517 backend: setuptools, which asks for torch only where the target environment has none.

Naming torch in build-system.requires would make pip download a second torch, of several GB and
perhaps another version, into its isolated build environment.
"""

import os
import re
import sysconfig
from pathlib import Path

from setuptools import build_meta as _setuptools
from setuptools.build_meta import *  # noqa: F403

MIN_TORCH = (2, 11)
TORCH_REQUIREMENT = "torch>=2.11"


def torch_version(package):
    """(major, minor) of the torch package in a folder, from its headers; None where there is none."""
    header = Path(package) / "include/torch/headeronly/version.h"
    if not header.is_file():
        return None
    parts = dict(re.findall(r"#define TORCH_VERSION_(MAJOR|MINOR) (\d+)", header.read_text()))
    return int(parts["MAJOR"]), int(parts["MINOR"])


def installed_torch():
    """The usable torch package of the environment that is installed into, or None.

    sysconfig tells that environment's folders even from inside pip's isolated build.
    """
    for scheme in ("purelib", "platlib"):
        package = Path(sysconfig.get_path(scheme)) / "torch"
        version = torch_version(package)
        if version and version >= MIN_TORCH:
            return package
    return None


def get_requires_for_build_wheel(config_settings=None):
    """What pip installs before it builds: setuptools' own list, and torch where it is missing."""
    needed = _setuptools.get_requires_for_build_wheel(config_settings)
    has_torch = os.environ.get("SSD_EXT_TORCH_DIR") or installed_torch()
    return needed + ([] if has_torch else [TORCH_REQUIREMENT])


def get_requires_for_build_editable(config_settings=None):
    """As for a wheel."""
    return get_requires_for_build_wheel(config_settings)
