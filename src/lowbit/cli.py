"""The command `lowbit`. The commands themselves are in `lowbit.lab.commands`, which needs the lab extra."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .memory import keep_memory

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong use."""
    try:
        from lowbit.lab.commands import app
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich", "click"):
            raise
        print(f"lowbit: the command line needs {error.name}: pip install 'lowbit[lab]'", file=sys.stderr)
        raise SystemExit(1) from None
    keep_memory()
    app(args=None if arguments is None else list(arguments), prog_name="lowbit")


if __name__ == "__main__":
    main()
