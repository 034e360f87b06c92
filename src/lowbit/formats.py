"""Number formats: the grids that low-bit numbers lie on.

A format works in grid units, *real = scale * (grid - zero)*, and knows nothing of scales. `snap` moves a
tensor onto the grid, `codes` numbers grid values as they are stored, `grid` is the inverse of `codes`.
Nothing here is
differentiable: gradient rules are a quantizer's business.

Everything is exact: exponents come from the bits of a number, never from a floating-point logarithm (which
gives the wrong binade just below powers of two), and scaling by a power of two never overflows on the way.
"""

from __future__ import annotations

import abc
import math
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lowbit.rounding import round_between, round_to_int
from lowbit.serial import nearest as nearest_name
from lowbit.serial import spec

__all__ = [
    "BF16",
    "BINARY",
    "E2M1",
    "E2M3",
    "E3M2",
    "E3M4",
    "E4M3",
    "E4M3B11",
    "E4M3FNUZ",
    "E4M3_IEEE",
    "E5M2",
    "E5M2FNUZ",
    "E8M0",
    "FP16",
    "FP16_169",
    "MXINT8",
    "TERNARY",
    "Codebook",
    "Even",
    "Fixed",
    "Float",
    "Format",
    "Int",
    "Log",
    "ap2",
    "floor_log2",
    "ldexp",
    "mx_scale",
    "pow2",
]


# ----------------------------------------------------------------------------------------------------
# Powers of two

_FIELDS = {torch.float32: (torch.int32, 23, 127), torch.float64: (torch.int64, 52, 1023)}
"""Of a floating dtype: the integer dtype of its width, mantissa bits, exponent bias."""


def _real(t: Tensor) -> Tensor:
    """`t` without gradient in the dtype that formats compute in: float64 stays, all else is float32."""
    if not t.is_floating_point():
        raise TypeError(f"a floating-point tensor is needed; got {t.dtype}")
    return t.detach() if t.dtype == torch.float64 else t.detach().to(torch.float32)


def _exponent(x: Tensor) -> Tensor:
    """floor(log2|x|) of normal float32 or float64 numbers; less than any normal exponent for smaller ones."""
    integer, mantissa, bias = _FIELDS[x.dtype]
    return ((x.view(integer) >> mantissa) & (2 * bias + 1)) - bias


def _normal_pow2(e: Tensor, dtype: torch.dtype) -> Tensor:
    """2^e for exponents of normal numbers."""
    integer, mantissa, bias = _FIELDS[dtype]
    return ((e.to(integer) + bias) << mantissa).view(dtype)


def _halves(e: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    bias = _FIELDS[dtype][2]
    e = e.clamp(2 - 2 * bias, 2 * bias)
    half = e >> 1
    return _normal_pow2(half, dtype), _normal_pow2(e - half, dtype)


def ldexp(x: Tensor, e: Tensor) -> Tensor:
    """x * 2^e, exact wherever the result is a number of the dtype.

    Unlike `torch.ldexp` it does not go through 2^e, which may overflow where the product does not.

    Args:
        x: float32 or float64, any shape.
        e: integers, shape broadcastable with `x`, |e| <= 252 (float32) or 2044 (float64); others are clamped.
    """
    a, b = _halves(e, x.dtype)
    return x * a * b


def pow2(e: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """2^e for integers `e`, exact, subnormals included; 0 below the range of the dtype and infinity above.

    Args:
        e: integer dtype, any shape.
        dtype: float32 or float64.
    """
    a, b = _halves(e, dtype)
    return a * b


def floor_log2(x: Tensor) -> Tensor:
    """The integer e with 2^e <= |x| < 2^(e+1), exact, for subnormal numbers too.

    Args:
        x: any floating dtype, any shape. float16 and bfloat16 are read as float32.

    Returns:
        int32 of the shape of `x`. 0 gives -2**20 and infinity or NaN 2**20, so that `pow2` gives 0 and
        infinity.
    """
    x = _real(x)
    _, mantissa, bias = _FIELDS[x.dtype]
    normal = _exponent(x)
    lifted = _exponent(x * 2.0 ** (mantissa + 1)) - (mantissa + 1)
    e = torch.where(normal <= -bias, lifted, normal)
    e = torch.where(x == 0, -(1 << 20), torch.where(normal > bias, 1 << 20, e))
    return e.to(torch.int32)


def ap2(x: Tensor) -> Tensor:
    """The power of two nearest to x in the exponent, sign(x) * 2^round(log2|x|): from sqrt(2) * 2^k on 2^(k+1).
    0 stays 0, NaN NaN and infinity infinity; exact for subnormal numbers too.

    Args:
        x: any floating dtype, any shape.

    Returns:
        The shape of `x`, float32 (float64 for float64 input).
    """
    x = _real(x)
    e = floor_log2(x)
    # the fraction in [1, 2) is exact, and the double nearest to sqrt(2) lies above it: so this compares with sqrt(2)
    up = ldexp(x.abs(), -e).to(torch.float64) >= math.sqrt(2)
    power = torch.copysign(pow2(e + up, x.dtype), x)
    return torch.where(x.isfinite() & (x != 0), power, x)


def mx_scale(
    amax: Tensor, emax_element: int, mode: Literal["floor", "ceil", "even"] = "floor", mantissa: int = 1
) -> Tensor:
    """The power-of-two scale of a block with largest magnitude `amax` (OCP Microscaling Formats 1.0, section
    6.3).

        floor   2^(floor(log2 amax) - emax)     the standard; elements up to 2^(emax+1) may saturate
        ceil    2^(ceil(log2 amax) - emax)      no element saturates
        even    the floor rule for an amax first rounded to `mantissa` bits after the leading one: only blocks
                whose largest element would round up to 2^(emax+1) get the larger scale

    Args:
        amax: float, any shape, not negative.
        emax_element: exponent of the element's largest value: 8 for E4M3, 15 for E5M2, 4 for E3M2, 2 for E2M3
            and E2M1, 0 for MXINT8.
        mode: one of the three rules.
        mantissa: mantissa bits of the element; used by "even" only.

    Returns:
        Scales in [2^-127, 2^127], dtype float32 (float64 for float64 input), shape of `amax`. 1 where amax is
        0, NaN where it is NaN.

    Raises:
        ValueError: unknown mode.
    """
    x = _real(amax)
    e = floor_log2(x)
    fraction = ldexp(x, -e)  # in [1, 2)
    if mode == "ceil":
        e = e + (fraction > 1)
    elif mode == "even":
        e = e + (fraction >= 2 - 2.0 ** -(mantissa + 1))
    elif mode != "floor":
        raise ValueError(f"unknown scale mode {mode!r}; {nearest_name(mode, ('floor', 'ceil', 'even'))}")
    scale = pow2((e - emax_element).clamp(-127, 127), x.dtype)
    return torch.where(x.isnan(), x, torch.where(x == 0, 1.0, scale))


# ----------------------------------------------------------------------------------------------------
# Formats


class Format(abc.ABC):
    """A set of numbers that can be stored in few bits.

    Attributes:
        bits: stored bits of one code.
        max: largest finite grid value.
        min: most negative grid value (smallest, for unsigned formats).
        signed: whether there are negative values.
    """

    if TYPE_CHECKING:  # fields in some formats, properties in others; real ones here would hide the fields

        @property
        def bits(self) -> int: ...

        @property
        def max(self) -> float: ...

        @property
        def min(self) -> float: ...

        @property
        def signed(self) -> bool: ...

    @abc.abstractmethod
    def snap(self, t: Tensor, rounding: str = "half_even", u: Tensor | None = None) -> Tensor:
        """Round to the grid; values beyond it saturate.

        Args:
            t: floating dtype, any shape, in grid units. NaN stays NaN.
            rounding: one of `lowbit.rounding.ROUNDINGS`.
            u: uniforms in [0, 1) of the shape of `t`, for "stochastic".

        Returns:
            Grid values of the shape of `t`, float32 (float64 for float64 input).

        Raises:
            TypeError: `t` is not floating point.
            ValueError: unknown rounding, missing or misshapen `u`.
        """

    @abc.abstractmethod
    def codes(self, grid: Tensor) -> Tensor:
        """The stored codes of values that lie on the grid.

        Returns:
            Integers in the smallest of uint8, int8, int16, int32 (int64 for 32 unsigned bits) that holds
            every code of the format; the shape of `grid`.

        Raises:
            TypeError: `grid` is not floating point.
            ValueError: NaN or infinity in a format without (not checked inside `torch.compile`).
        """

    @abc.abstractmethod
    def grid(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The grid values of codes: the inverse of `codes`.

        Args:
            codes: integers, any shape; not checked.
            dtype: floating dtype of the result.
        """

    @abc.abstractmethod
    def levels(self) -> Tensor:
        """All finite grid values, ascending and distinct: float64 of shape (number of values,).

        Raises:
            ValueError: a format of more than 2**16 values.
        """


def _code_dtype(least: int, most: int) -> torch.dtype:
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        info = torch.iinfo(dtype)
        if info.min <= least and most <= info.max:
            return dtype
    return torch.int64


def _refuse(fmt: Format, bad: Tensor, what: str) -> None:
    """Raise where `bad` is true anywhere, except inside torch.compile, which can't look at values."""
    if not torch.compiler.is_compiling() and bool(bad.any()):
        raise ValueError(f"{fmt} has no code for {what}")


def _countable(fmt: Format) -> None:
    if fmt.bits > 16:
        raise ValueError(f"{fmt} has more than 2**16 values; levels() lists at most 2**16")


def _toward_zero(value: int, dtype: torch.dtype) -> int:
    """The integer nearest to `value` that `dtype` represents and that is not larger in magnitude."""
    drop = max(0, abs(value).bit_length() - _FIELDS[dtype][1] - 1)
    kept = (abs(value) >> drop) << drop
    return kept if value >= 0 else -kept


@spec
class Int(Format):
    """Integers: b-bit two's complement, or 0 ... 2^b - 1.

        signed           -2^(b-1) ... 2^(b-1) - 1          codes are the integers
        signed, narrow   -(2^(b-1) - 1) ... 2^(b-1) - 1    symmetric: int8 is +-127, 2 bits are ternary
        unsigned         0 ... 2^b - 1

    Zero is always +0. Above 24 bits float32 does not hold every integer; the largest one it holds is then the
    bound.
    """

    bits: int  # 1 to 32
    signed: bool = True  # two's complement, or from 0
    narrow: bool = False  # leave out -2^(b-1)

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 32:
            raise ValueError(f"Int has 1 to 32 bits; got bits={self.bits!r}")
        if self.narrow and (not self.signed or self.bits < 2):
            raise ValueError(f"narrow needs a signed Int of 2 bits or more; got {self}")

    @property
    def max(self) -> float:
        return float(self._range[1])

    @property
    def min(self) -> float:
        return float(self._range[0])

    @property
    def _range(self) -> tuple[int, int]:
        if not self.signed:
            return 0, 2**self.bits - 1
        top = 2 ** (self.bits - 1) - 1
        return (-top if self.narrow else -top - 1), top

    def snap(self, t: Tensor, rounding: str = "half_even", u: Tensor | None = None) -> Tensor:
        x = _real(t)
        low, high = (_toward_zero(v, x.dtype) for v in self._range)
        return round_to_int(x.clamp(low, high), rounding, u) + 0.0  # -0 becomes +0

    def codes(self, grid: Tensor) -> Tensor:
        x = _real(grid)
        _refuse(self, x.isnan(), "NaN")
        return x.to(_code_dtype(*self._range))

    def grid(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return codes.to(dtype)

    def levels(self) -> Tensor:
        _countable(self)
        low, high = self._range
        return torch.arange(low, high + 1, dtype=torch.float64)


@spec
class Even(Format):
    """An even number of levels, symmetric about zero and without it: the odd integers +-1, +-3, ... +-(2^b -
    1).

    Real step = 2 * scale. One bit is binary, {-1, +1}. In the nearest roundings 0 goes to +1, whatever the
    rule for ties; other ties follow the rule, where "even" refers to the code. The code of v is (v + 2^b - 1)
    / 2.
    """

    bits: int  # 1 to 16

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 16:
            raise ValueError(f"Even has 1 to 16 bits; got bits={self.bits!r}")

    @property
    def max(self) -> float:
        return float(2**self.bits - 1)

    @property
    def min(self) -> float:
        return -self.max

    @property
    def signed(self) -> bool:
        return True

    def snap(self, t: Tensor, rounding: str = "half_even", u: Tensor | None = None) -> Tensor:
        x = _real(t).clamp(self.min, self.max)
        lo = 2 * torch.floor((torch.floor(x) - 1) / 2) + 1  # exact: halves of small integers
        even = torch.remainder((lo + self.max) / 2, 2) == 0
        q = round_between(x, lo, lo + 2, rounding, u, even)
        return torch.where(x == 0, 1.0, q) if rounding.startswith("half") else q

    def codes(self, grid: Tensor) -> Tensor:
        x = _real(grid)
        _refuse(self, x.isnan(), "NaN")
        return ((x + self.max) / 2).to(_code_dtype(0, 2**self.bits - 1))

    def grid(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return (2 * codes.to(torch.int32) - (2**self.bits - 1)).to(dtype)

    def levels(self) -> Tensor:
        return torch.arange(-self.max, self.max + 1, 2, dtype=torch.float64)


@spec
class Fixed(Format):
    """Fixed point <IL, FL>: multiples of 2^-FL in [-2^(IL-1), 2^(IL-1) - 2^-FL] (Gupta et al., 2015, section
    3).

    IL counts the sign; either may be negative as long as IL + FL is 1 to 32. The codes are the integers,
    multiples of 2^-FL. `narrow` leaves out -2^(IL-1); Fixed(2, 6, narrow=True) is the element of MXINT8.
    """

    il: int  # integer bits with the sign
    fl: int  # fraction bits
    narrow: bool = False  # symmetric range

    def __post_init__(self) -> None:
        if not 1 <= self.il + self.fl <= 32:
            raise ValueError(f"Fixed has 1 to 32 bits; got il={self.il}, fl={self.fl}")
        if not -96 <= self.fl <= 126:  # keeps codes and grid values in the range of float32
            raise ValueError(f"fl must be in -96 to 126; got {self.fl}")
        self._integer  # noqa: B018  refuses narrow=True for one bit

    @property
    def _integer(self) -> Int:
        return Int(self.il + self.fl, narrow=self.narrow)

    @property
    def bits(self) -> int:
        return self.il + self.fl

    @property
    def max(self) -> float:
        return math.ldexp(self._integer.max, -self.fl)

    @property
    def min(self) -> float:
        return math.ldexp(self._integer.min, -self.fl)

    @property
    def signed(self) -> bool:
        return True

    def snap(self, t: Tensor, rounding: str = "half_even", u: Tensor | None = None) -> Tensor:
        return self._integer.snap(_real(t) * 2.0**self.fl, rounding, u) * 2.0**-self.fl

    def codes(self, grid: Tensor) -> Tensor:
        return self._integer.codes(_real(grid) * 2.0**self.fl)

    def grid(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return codes.to(dtype) * 2.0**-self.fl

    def levels(self) -> Tensor:
        _countable(self)
        return self._integer.levels() * 2.0**-self.fl


_SPECIALS = ("ieee", "fn", "fnuz", "none")
_OVERFLOWS = ("saturate", "native")


def _snap_float(x: Tensor, emin: int, mantissa: int, top: float, u: Tensor | None) -> Tensor:
    """`Float._snap` with the bits of x instead of its exponent as a number: the same result in fewer passes.

    With p = max(2^floor(log2|x|), 2^emin) the step is p * 2^-mantissa. Without `u`, adding and subtracting
    p * 1.5 * 2^(carrier bits - mantissa) lets the processor's own rounding to even fall on the step.
    """
    integer, carrier, bias = _FIELDS[x.dtype]
    x = x.clamp(-top, top)
    power = x.view(integer) & ((2 * bias + 1) << carrier)
    power = power.clamp_(min=(emin + bias) << carrier)
    if u is None:
        magic = (power + ((carrier - mantissa << carrier) + (1 << carrier - 1))).view(x.dtype)
        y = (x + magic) - magic
    else:
        step = (power - (mantissa << carrier)).view(x.dtype)
        y = (round_to_int(x / step, "stochastic", u) * step).clamp_(-top, top)
    return torch.copysign(y, x)


@spec
class Float(Format):
    """Binary floating point: sign, exponent E, mantissa M.

        E >= 1   (-1)^s * 2^(E - bias) * (1 + M / 2^m)
        E  = 0   (-1)^s * 2^(1 - bias) * M / 2^m          zero and subnormals

    With e = max(floor(log2|x|), 1 - bias) and step d = 2^(e - m), `snap` rounds x / d to an integer; a carry
    into the next binade is right. "half_even" sends ties to the even code; without mantissa bits it sends
    1.5 d to 2 d, the even integer. The codes are the bits, as in `ml_dtypes`.

    An unsigned format without mantissa (E8M0) is a pure scale: it has no zero, code c is 2^(c - bias), and 0
    and negative numbers saturate at the smallest value. Other unsigned formats map negative numbers to 0.

    Special codes: "ieee" keeps the top exponent for infinity and NaN, "fn" only the code of all ones for NaN,
    "fnuz" only the code of -0 for NaN; with "none" every code is a number. "native" overflow keeps finite
    numbers finite where the rounding is directed inwards ("truncate", and "floor" of positive numbers), as
    IEEE 754 does.
    """

    exponent: int  # exponent bits, 1 to 8
    mantissa: int  # mantissa bits, 0 to 23
    bias: int | None = None  # of the exponent; None is 2^(exponent-1) - 1
    specials: Literal["ieee", "fn", "fnuz", "none"] = "ieee"  # codes that are no numbers: see below
    overflow: Literal["saturate", "native"] = "saturate"  # native: to inf, else to NaN, if there is one
    subnormals: bool = True  # without them 0 and 2^(1 - bias) are neighbours, and rounded between as such
    signed: bool = True  # with a sign bit

    def __post_init__(self) -> None:
        if not (1 <= self.exponent <= 8 and 0 <= self.mantissa <= 23):
            got = f"{self.exponent} and {self.mantissa}"
            raise ValueError(f"Float has 1 to 8 exponent bits and 0 to 23 mantissa bits; got {got}")
        if self.specials not in _SPECIALS:
            raise ValueError(f"unknown specials {self.specials!r}; {nearest_name(self.specials, _SPECIALS)}")
        if self.overflow not in _OVERFLOWS:
            raise ValueError(f"unknown overflow {self.overflow!r}; {nearest_name(self.overflow, _OVERFLOWS)}")
        if self.specials == "fnuz" and not self.signed:
            raise ValueError("fnuz is for signed formats (NaN takes the code of -0); use specials='fn'")
        top, _ = self._top
        if top < (1 if self._zero else 0):
            raise ValueError(f"{self.specials} leaves no normal number with {self.exponent} exponent bits")
        if self._emax > 127 or self._emin < -127 or self._emin - self.mantissa * self.subnormals < -149:
            raise ValueError(f"bias {self._bias} puts values of {self} outside float32")

    @property
    def _bias(self) -> int:
        return 2 ** (self.exponent - 1) - 1 if self.bias is None else self.bias

    @property
    def _zero(self) -> bool:
        return self.signed or self.mantissa > 0

    @property
    def _top(self) -> tuple[int, int]:
        """Exponent and mantissa field of the largest finite value."""
        ones, full = 2**self.exponent - 1, 2**self.mantissa - 1
        if self.specials == "ieee":
            return ones - 1, full
        if self.specials == "fn":
            return (ones, full - 1) if self.mantissa else (ones - 1, 0)
        return ones, full

    @property
    def _emin(self) -> int:
        return 1 - self._bias if self._zero else -self._bias

    @property
    def _emax(self) -> int:
        return self._top[0] - self._bias

    @property
    def _infinity(self) -> int:
        """The code of infinity in "ieee", without sign bit."""
        return ((1 << self.exponent) - 1) << self.mantissa

    @property
    def _nan(self) -> int | None:
        """The code of NaN, without sign bit; None if there is none."""
        if self.specials == "ieee":
            quiet = (1 << self.mantissa) >> 1  # the upper mantissa bit
            return self._infinity + quiet if quiet else None
        if self.specials == "fn":
            return (1 << self.exponent + self.mantissa) - 1
        return 1 << self.exponent + self.mantissa if self.specials == "fnuz" else None

    @property
    def bits(self) -> int:
        return self.signed + self.exponent + self.mantissa

    @property
    def max(self) -> float:
        return math.ldexp(2**self.mantissa + self._top[1], self._emax - self.mantissa)

    @property
    def min(self) -> float:
        if self.signed:
            return -self.max
        return 0.0 if self._zero else math.ldexp(1.0, self._emin)

    @property
    def tiny(self) -> float:
        """The smallest positive value."""
        return math.ldexp(1.0, self._emin - self.mantissa * self.subnormals)

    def snap(self, t: Tensor, rounding: str = "half_even", u: Tensor | None = None) -> Tensor:
        x = _real(t)
        if not self._by_bits(x, rounding, u):
            return self._snap(x, rounding, u)
        y = _snap_float(x, self._emin, self.mantissa, self.max, u if rounding == "stochastic" else None)
        return y + 0.0 if self.specials == "fnuz" else y  # fnuz has no -0

    def _by_bits(self, x: Tensor, rounding: str, u: Tensor | None) -> bool:
        """Whether the short way of `_snap_float` holds: all that it adds and divides by are normal numbers."""
        _, mantissa, bias = _FIELDS[x.dtype]
        room = self._emin - self.mantissa > 1 - bias and self._emax + mantissa - self.mantissa < bias
        plain = self.signed and self.subnormals and self.mantissa > 0
        bounded = self.overflow == "saturate" or self.specials == "none"
        drawn = rounding == "stochastic" and u is not None and u.shape == x.shape
        return plain and bounded and room and (rounding == "half_even" or drawn)

    def _snap(self, x: Tensor, rounding: str, u: Tensor | None) -> Tensor:
        """The definition of `snap`."""
        if not self.signed:
            x = x.clamp(min=self.min)
        e = _exponent(x).clamp(self._emin, self._emax)
        step = e - self.mantissa
        if not self.subnormals:
            step = torch.where(x.abs() < math.ldexp(1.0, self._emin), e, step)
        n = round_to_int(ldexp(x, -step), rounding, u)  # of a magnitude in [2^m, 2^(m+1)) for normal numbers
        y = self._overflow(ldexp(n, step), x, rounding)
        if not self.signed:
            return y
        y = torch.copysign(y, x)
        return y + 0.0 if self.specials == "fnuz" else y  # fnuz has no -0

    def _overflow(self, y: Tensor, x: Tensor, rounding: str) -> Tensor:
        bounded = y.clamp(self.min, self.max)
        if self.overflow == "saturate" or self.specials == "none":
            return bounded
        over = y.abs() > self.max
        if rounding == "truncate":
            over = x.isinf()
        elif rounding == "floor":
            over = over & (x.isinf() | (x < 0))
        beyond = torch.copysign(torch.full_like(x, math.inf), x) if self.specials == "ieee" else math.nan
        return torch.where(over, beyond, bounded)

    def codes(self, grid: Tensor) -> Tensor:
        x = _real(grid)
        integer = torch.int64 if self.bits > 24 else torch.int32
        nan, inf = x.isnan(), x.isinf()
        if self._nan is None:
            _refuse(self, nan, "NaN")
        if self.specials != "ieee":
            _refuse(self, inf, "infinity")
        a = torch.where(nan | inf, 0.0, x.abs())
        e = _exponent(a).clamp(self._emin, self._emax)
        code = ((e - self._emin) << self.mantissa).to(integer) + ldexp(a, self.mantissa - e).to(integer)
        if not self._zero:
            code = code - 1
        code = torch.where(inf, self._infinity, code)
        if self.signed:
            negative = torch.signbit(x)
            if self.specials == "fnuz":
                negative = negative & (x != 0) & ~nan
            code = code | (negative.to(integer) << self.exponent + self.mantissa)
        if self._nan is not None:
            code = torch.where(nan, code | self._nan, code)
        return code.to(_code_dtype(0, 2**self.bits - 1))

    def grid(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        integer = torch.int64 if self.bits > 24 else torch.int32
        c = codes.to(integer)
        body = c & ((1 << self.exponent + self.mantissa) - 1)
        field, fraction = body >> self.mantissa, body & ((1 << self.mantissa) - 1)
        if self._zero:
            small = fraction if self.subnormals else torch.zeros_like(fraction)
            n = torch.where(field > 0, fraction + (1 << self.mantissa), small)
            e = field.clamp(min=1)
        else:
            n, e = fraction + 1, field
        y = ldexp(n.to(wide), e - self._bias - self.mantissa)
        if self.specials == "ieee":
            y = y.masked_fill(body == self._infinity, math.inf).masked_fill(body > self._infinity, math.nan)
        elif self._nan is not None:  # the code of -0 has a sign bit, and all ones counts with either sign
            y = y.masked_fill((c if self.specials == "fnuz" else body) == self._nan, math.nan)
        if self.signed:
            y = torch.where((c >> self.exponent + self.mantissa) & 1 == 1, -y, y)
        return y.to(dtype)

    def levels(self) -> Tensor:
        _countable(self)
        values = self.grid(torch.arange(2**self.bits, dtype=torch.int32), torch.float64)
        return torch.unique(values[values.isfinite()] + 0.0)


def _snap_table(
    x: Tensor, values: Tensor, even: Tensor, rounding: str, u: Tensor | None, mid: Tensor | None = None
) -> Tensor:
    """Round to a sorted table of at least two values.

    Args:
        x: float32 or float64, any shape.
        values: float64 (n,), ascending.
        even: bool (n,): whether the code of the value is even.
        mid: float64 (n - 1,): switch points of the nearest modes, if not the arithmetic midpoints.
    """
    v = values.to(x.dtype)
    x = x.clamp(v[0], v[-1]).contiguous()
    i = (torch.searchsorted(v, x, right=True) - 1).clamp(0, len(v) - 2)
    return round_between(x, v[i], v[i + 1], rounding, u, even[i], None if mid is None else mid[i])


def _log_table(fmt: Log) -> tuple[list[float], list[int], list[float]]:
    """Values ascending, their codes, and the geometric switch points between them."""
    root = round(fmt.base**2)
    whole = abs(fmt.base**2 - root) < 1e-12 * root  # a base like sqrt(2): its even powers are integers

    def power(k: int) -> float:
        if whole:
            return float(root) ** (k // 2) * (fmt.base if k % 2 else 1.0)
        return fmt.base**k

    sizes = [fmt.offset * power(k) for k in range(fmt.kmin, fmt.kmax + 1)]
    least = fmt.offset * power(fmt.kmin - 1)  # the missing level below the smallest
    below = [least if fmt.zero else sizes[0], *sizes[:-1]]
    switch = [
        math.sqrt(a) * math.sqrt(b) if a * b in (0.0, math.inf) else math.sqrt(a * b)
        for a, b in zip(below, sizes, strict=True)
    ]
    values, codes = sizes, list(range(fmt.zero, fmt.zero + len(sizes)))
    mids = switch if fmt.zero else switch[1:]
    if fmt.zero:
        values, codes = [0.0, *values], [0, *codes]
    if fmt.signed:
        negative = [-v for v in reversed(values) if v]
        flags = [c | 1 << fmt.bits - 1 for v, c in zip(reversed(values), reversed(codes), strict=True) if v]
        mids = [-m for m in reversed(mids)] + ([] if fmt.zero else [0.0]) + mids
        values, codes = negative + values, flags + codes
    return values, codes, mids


@spec
class Log(Format):
    """Powers of a base: +-offset * base^k, k = kmin ... kmax, with or without zero.

    "stochastic" rounds between the two neighbouring levels with probabilities linear in the value, so it is
    unbiased: logarithmic stochastic rounding, and between 0 and the smallest level the stochastic underflow
    of LUQ (Chmiel et al., 2021, arXiv 2112.10769). With zero, nearest="value" switches to 0 at half the
    smallest level, and nearest="log" at offset * base^(kmin - 1/2), where the rounded exponent would fall
    below kmin. Without zero, smaller numbers saturate at the smallest level of their sign, and 0 becomes the
    smallest positive level. An unsigned format maps negative numbers to its smallest value.

    Codes: 0 is zero where there is one, then the levels upwards; a sign bit above. Ties go to the even code.
    Radix-4 FP4 [1,3,0] (Sun et al., 2020) is Log(4.0, -3, 3), and its second phase has offset 2.
    """

    base: float  # ratio of neighbouring levels, above 1
    kmin: int  # smallest exponent
    kmax: int  # largest exponent
    offset: float = 1.0  # factor of every level
    zero: bool = True  # whether 0 is a level
    signed: bool = True  # whether negative levels exist
    nearest: Literal["value", "log"] = "value"  # switch at the arithmetic or at the geometric midpoint

    def __post_init__(self) -> None:
        if not (self.base > 1 and self.offset > 0 and self.kmin <= self.kmax):
            raise ValueError(f"Log needs base > 1, offset > 0 and kmin <= kmax; got {self}")
        if self.nearest not in ("value", "log"):
            raise ValueError(f"unknown nearest {self.nearest!r}; allowed: log, value")
        if self.kmax - self.kmin >= 2**15 or self.kmax - self.kmin + self.zero + self.signed < 1:
            raise ValueError(f"Log has 2 to 2**15 magnitudes; got {self}")
        ends = [self.offset * self.base**k for k in (self.kmin, self.kmax)]
        if ends[0] < 2.0**-126 or ends[1] > (2 - 2.0**-23) * 2.0**127:
            raise ValueError(f"levels {ends[0]:g} to {ends[1]:g} leave the normal range of float32")

    @property
    def _table(self) -> tuple[Tensor, Tensor, Tensor]:
        values, codes, mids = _log_table(self)
        return (
            torch.tensor(values, dtype=torch.float64),
            torch.tensor(codes, dtype=torch.int32),
            torch.tensor(mids, dtype=torch.float64),
        )

    @property
    def bits(self) -> int:
        return self.signed + (self.kmax - self.kmin + self.zero).bit_length()

    @property
    def max(self) -> float:
        return _log_table(self)[0][-1]

    @property
    def min(self) -> float:
        return _log_table(self)[0][0]

    def snap(self, t: Tensor, rounding: str = "half_even", u: Tensor | None = None) -> Tensor:
        x = _real(t)
        if rounding == "stochastic" and u is not None and u.shape == x.shape and self._octaves:
            return _snap_octaves(x, self.kmin, self.kmax, u)
        return self._snap(x, rounding, u)

    @property
    def _octaves(self) -> bool:
        return self.base == 2.0 and self.offset == 1.0 and self.zero and self.signed and self.kmin > -126

    def _snap(self, x: Tensor, rounding: str, u: Tensor | None) -> Tensor:
        """The definition of `snap`."""
        values, codes, mids = (table.to(x.device) for table in self._table)
        if self.signed and not self.zero:
            least = values[len(values) // 2].to(x.dtype)
            x = torch.where(x.abs() < least, torch.where(x < 0, -least, least), x)
        return _snap_table(x, values, codes % 2 == 0, rounding, u, mids if self.nearest == "log" else None)

    def codes(self, grid: Tensor) -> Tensor:
        x = _real(grid)
        _refuse(self, x.isnan(), "NaN")
        values, codes, _ = (table.to(x.device) for table in self._table)
        return codes[_index(x, values)].to(_code_dtype(0, 2**self.bits - 1))

    def grid(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        values, order, _ = (table.to(codes.device) for table in self._table)
        by_code = torch.zeros(2**self.bits, dtype=torch.float64, device=codes.device)
        by_code[order] = values
        return by_code[codes.to(torch.int64)].to(dtype)

    def levels(self) -> Tensor:
        return self._table[0]


def _snap_octaves(x: Tensor, kmin: int, kmax: int, u: Tensor) -> Tensor:
    """`Log._snap` for powers of two with stochastic rounding, from the bits of x: the same result in fewer passes.

    |x| lies between low = 2^floor(log2|x|), or 0 below the smallest level, and high; the value form rounds a
    negative number up, toward low, when u < (high - |x|) / (high - low). Every difference and quotient is exact.
    """
    integer, carrier, bias = _FIELDS[x.dtype]
    least = 2.0**kmin
    size = x.abs().clamp_(max=2.0**kmax)
    low = (size.view(integer) & ((2 * bias + 1) << carrier)).view(x.dtype)
    below = size < least
    low = low.masked_fill_(below, 0.0)
    gap = low.clamp(min=least)  # to the next level
    part = (size - low) / gap
    away = torch.where(x < 0, u >= 1 - part, u < part)
    y = torch.where(away, low + gap, low).copysign_(x)
    return torch.where(x.isnan(), x, y) + 0.0


def _index(x: Tensor, values: Tensor) -> Tensor:
    """The place of the nearest of sorted float64 values; finds those that went through a shorter dtype."""
    return torch.searchsorted((values[1:] + values[:-1]) / 2, x.to(torch.float64).contiguous())


@spec
class Codebook(Format):
    """Any levels: nearest by the arithmetic midpoint, ties by the rounding mode; the code is the index."""

    values: tuple[float, ...]  # ascending and distinct (in float32), 2 to 2**16 of them

    def __post_init__(self) -> None:
        if not 2 <= len(self.values) <= 2**16:
            raise ValueError(f"a Codebook has 2 to 2**16 values; got {len(self.values)}")
        exact = torch.tensor(self.values, dtype=torch.float64).to(torch.float32)
        if not bool(exact.isfinite().all()):
            raise ValueError("a Codebook has finite values")
        rising = exact[1:] > exact[:-1]
        if not bool(rising.all()):
            i = int((~rising).nonzero()[0])
            pair = f"{self.values[i]!r} comes before {self.values[i + 1]!r}"
            raise ValueError(f"a Codebook is ascending and distinct in float32; {pair}")

    @property
    def bits(self) -> int:
        return (len(self.values) - 1).bit_length()

    @property
    def max(self) -> float:
        return float(self.values[-1])

    @property
    def min(self) -> float:
        return float(self.values[0])

    @property
    def signed(self) -> bool:
        return self.min < 0

    def snap(self, t: Tensor, rounding: str = "half_even", u: Tensor | None = None) -> Tensor:
        x = _real(t)
        values = self.levels().to(x.device)
        even = torch.arange(len(values), device=x.device) % 2 == 0
        return _snap_table(x, values, even, rounding, u)

    def codes(self, grid: Tensor) -> Tensor:
        x = _real(grid)
        _refuse(self, x.isnan(), "NaN")
        return _index(x, self.levels().to(x.device)).to(_code_dtype(0, len(self.values) - 1))

    def grid(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.levels().to(codes.device)[codes.to(torch.int64)].to(dtype)

    def levels(self) -> Tensor:
        return torch.tensor(self.values, dtype=torch.float64)


# ----------------------------------------------------------------------------------------------------
# Formats with a name

TERNARY = Int(2, narrow=True)
BINARY = Even(1)
MXINT8 = Fixed(2, 6, narrow=True)  # OCP MX 1.0: int8 times 2^-6; -2 is a code that is never written

FP16 = Float(5, 10)
BF16 = Float(8, 7)
FP16_169 = Float(6, 9)  # Wang et al., 2018: 1-6-9
E5M2 = Float(5, 2)  # OCP FP8
E4M3 = Float(4, 3, specials="fn")  # OCP FP8
E4M3_IEEE = Float(4, 3)
E5M2FNUZ = Float(5, 2, bias=16, specials="fnuz")
E4M3FNUZ = Float(4, 3, bias=8, specials="fnuz")
E4M3B11 = Float(4, 3, bias=11, specials="fnuz")  # HFP8, Sun et al., 2019: 1-4-3 with bias 7 + 4
E3M4 = Float(3, 4)
E3M2 = Float(3, 2, specials="none")  # OCP FP6
E2M3 = Float(2, 3, specials="none")  # OCP FP6
E2M1 = Float(2, 1, specials="none")  # OCP FP4
E8M0 = Float(8, 0, specials="fn", signed=False)  # OCP scale
