"""Files that survive: written whole or not at all, read without running code."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch


def save(state: dict[str, Any], path: str | Path) -> None:
    """Write ``state`` by ``torch.save`` so that ``path`` is at every moment the old file or the new one, whole.

    Args:
        state: tensors, numbers, strings, and dicts, lists and tuples of them: what :func:`load` reads.
        path: of the file. The new one is written beside it first, which takes room for both.

    Raises:
        OSError: the file cannot be written, as on a full disk; the old one is then as it was.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as e:  # torch's zip writer turns the system's error into a RuntimeError
        raise OSError(f"cannot write {path} ({e}); an older one there is unharmed") from e
    finally:
        beside.unlink(missing_ok=True)


def load(path: str | Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read what :func:`save` or ``torch.save`` wrote, tensors and plain values alone: no code of the file is run.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, a damaged one, one with other objects than those, or no dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, ValueError) as e:
        first = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise ValueError(f"{path} cannot be read as a checkpoint, is it damaged? ({first})") from e
    if not isinstance(state, dict):
        raise ValueError(f"{path} must hold a dict, got {type(state).__name__}")
    return state
