"""Picks the backend once: NANOLONG_BACKEND=torch|mlx, else MLX on a Mac, else torch, else whichever is installed.

The model and the mechanisms import this and nothing else of a framework. The names are listed in backends/torch_.py and,
in the same order, in backends/mlx_.py.
"""

import os
import platform
from importlib.util import find_spec

from errors import Refused


def pick():
    installed = [name for name in ("torch", "mlx") if find_spec(name)]
    if not installed:
        raise Refused("neither PyTorch nor MLX is installed: pip install torch, or on a Mac pip install mlx")
    asked = os.environ.get("NANOLONG_BACKEND")
    if asked and asked not in ("torch", "mlx"):
        raise Refused(f"NANOLONG_BACKEND={asked} is not a backend: choose torch or mlx")
    if asked and asked not in installed:
        raise Refused(f"the backend {asked} is asked for but not installed: pip install {asked}, or choose {installed[0]}")
    mac = platform.system() == "Darwin" and platform.machine() == "arm64"
    return asked or ("mlx" if mac and "mlx" in installed else installed[0])


BACKEND = pick()
if BACKEND == "mlx":
    from backends.mlx_ import *
else:
    from backends.torch_ import *
