"""The speed table: what has a target, and what explains the figures.

Every row compares calls that are made in turn in one process, round by round; a ratio is the median of the ratios
within a round, always to the first case of its part. Where low-bit execution should be fast it comes first, and the
ratio is how much longer the others take: a speed-up, with a least value. Where it should cost little, float32 (or
`clone`) comes first, and the ratio is the cost, with a largest value.

A call that has two memory layouts is measured in both and stands in the table with the faster one, float32 too.
"""

from lowbit.lab.speed import training, kernels, explain  # noqa: F401, I001  (they register, in the order of the table)
from lowbit.lab.speed.table import ROWS, SCHEMA, TARGETS, Settings, head, lines, measure, reached, save, wins_from

__all__ = ["ROWS", "SCHEMA", "TARGETS", "Settings", "head", "lines", "measure", "reached", "save", "wins_from"]
