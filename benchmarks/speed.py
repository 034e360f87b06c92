"""The speed table: every row with a target, and what explains the figures. The same as `lowbit bench --rows all`.

    python benchmarks/speed.py [--rows gpt,linear] [--threads 2] [--quick] [--save results/speed.json]

All sides of a comparison run in turn in one process; ratios are medians of the ratios within a round. With
ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 in the environment neither PyTorch's oneDNN nor our kernels use AMX, as on a
processor without it.
"""

from __future__ import annotations

import sys

from lowbit.cli import main

if __name__ == "__main__":
    given = sys.argv[1:]
    main(["bench", *([] if "--rows" in given or "--help" in given else ["--rows", "all"]), *given])
