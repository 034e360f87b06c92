"""Operators, one file each: schema, PyTorch definition, fake kernel, autograd; then the compiled kernels.

Every module of this folder is imported, so adding an operator is adding its file. Nothing is compiled here:
the C++ library is loaded where the installation built one; elsewhere the definitions run, and
`lowbit.backends()` says why.
"""

from __future__ import annotations

import importlib
import pkgutil

from . import backends

__all__ = ["backends"]

# sub-packages hold kernels of other devices and are imported where the device is
for _name in sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg):
    importlib.import_module(f"{__name__}.{_name}")

backends.load_compiled()
