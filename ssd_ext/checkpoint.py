"""Files that survive: written whole or not at all, read without running code."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch


def save(state: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write ``state`` by ``torch.save`` so that ``path`` is at every moment the old file or the new one, whole.

    Args:
        state: tensors, numbers, strings, and dicts, lists and tuples of them: what :func:`load` reads.
        path: of the file. The new one is written beside it first, which takes room for both.

    Raises:
        OSError: the file cannot be written, as on a full disk; the old one is then as it was.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.part")
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


def load(path: str | os.PathLike[str], map_location: str | torch.device = "cpu") -> Any:
    """Read what :func:`save` or ``torch.save`` wrote, or a ``.safetensors`` file. No code of the file is run.

    Args:
        path: of the file.
        map_location: where tensors go.

    Raises:
        OSError: no such file, or one that may not be read.
        ValueError: a damaged file, or one with other things than tensors, numbers, strings and their containers.
        ImportError: a ``.safetensors`` file without that package.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no file {path}")
    try:
        if path.suffix == ".safetensors":
            return _safetensors(path, map_location)
        return torch.load(path, map_location=map_location, weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: corrupt, or holds more than tensors (it is read with weights_only=True)") from error
    except Exception as error:  # what the readers raise for a broken file is not documented
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path}: corrupt: {reason}") from error


def _safetensors(path: Path, device: str | torch.device) -> dict[str, torch.Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f'{path} needs safetensors: pip install "ssd_ext[train]"', name="safetensors") from error
    tensors: dict[str, torch.Tensor] = load_file(path, device=str(device))
    return tensors
