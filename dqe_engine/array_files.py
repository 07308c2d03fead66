"""NumPy's `.npy` files of others, mapped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .files import describe_os_error, require_regular


def open_array(path: Path, remedy: str = "save it again with np.save") -> NDArray[Any]:
    """The array in a file, mapped read-only. Raises InputError, which ends in `remedy` where the file is no whole `.npy` file."""
    try:
        require_regular(path)  # a pipe would be waited for
        array = np.load(path, mmap_mode="r")
    except OSError as error:
        raise InputError(describe_os_error(error, path)) from error
    except Exception as error:  # NumPy has Python parse the header, and passes on what its tokenizer and parser raise
        raise InputError(f"{path}: not a whole .npy file of numbers ({str(error)[:200]}); {remedy}") from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise InputError(f"{path}: an .npz archive, expected a .npy file of one array; save the array with np.save")
    return array
