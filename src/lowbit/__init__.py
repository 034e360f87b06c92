"""lowbit trains, quantizes and ships neural networks in few bits: one interface to the published methods.

import lowbit

recipe = lowbit.create("luq")
lowbit.apply(model, recipe)             # layers quantize their operands and products
lowbit.attach(model, optimizer)         # the optimizer does what the method says of updates
"""

from . import ops
from .attention import scaled_dot_product_attention
from .backward import InRange, LearnedClip, LearnedStep, PassThrough
from .blocks import PerAxis, PerChannel, PerGroup, PerRow, PerSample, PerTensor, PerTile
from .formats import Codebook, Even, Fixed, Float, Int, Log
from .memory import keep_memory
from .methods import Card, create, list_methods
from .model import apply, calibrate, penalty, quantizer
from .ops.backends import Backend, backends
from .quantizer import QSpec, QTensor, Quantizer
from .recipe import (
    Chunked,
    Float32,
    Int32,
    Keep,
    LossScale,
    Product,
    Products,
    Recipe,
    Roles,
    Rule,
    Stage,
    Swap,
    Update,
)
from .report import Report, report
from .scales import (
    AbsMax,
    Average,
    History,
    Learned,
    Microscale,
    MinMax,
    MinMSE,
    Moments,
    Percentile,
    PowerOfTwo,
    Static,
)
from .storage import load, save
from .update import attach

__version__ = "0.1.0"

__all__ = [
    "AbsMax",
    "Average",
    "Backend",
    "Card",
    "Chunked",
    "Codebook",
    "Even",
    "Fixed",
    "Float",
    "History",
    "InRange",
    "Int",
    "Float32",
    "Int32",
    "Keep",
    "Learned",
    "LearnedClip",
    "LearnedStep",
    "Log",
    "LossScale",
    "Microscale",
    "MinMSE",
    "MinMax",
    "Moments",
    "PassThrough",
    "PerAxis",
    "PerChannel",
    "PerGroup",
    "PerRow",
    "PerSample",
    "PerTensor",
    "PerTile",
    "Percentile",
    "PowerOfTwo",
    "Product",
    "Products",
    "QSpec",
    "QTensor",
    "Quantizer",
    "Recipe",
    "Report",
    "Roles",
    "Rule",
    "Stage",
    "Static",
    "Swap",
    "Update",
    "__version__",
    "apply",
    "attach",
    "backends",
    "calibrate",
    "create",
    "keep_memory",
    "list_methods",
    "load",
    "ops",
    "penalty",
    "quantizer",
    "report",
    "save",
    "scaled_dot_product_attention",
]
