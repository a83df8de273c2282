"""How numbers are written: short, with their unit, and a dash where nothing was measured."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

UNKNOWN = "\N{EN DASH}"


def percent(value: float, *, digits: int = 1) -> str:
    """Return a ratio as a percentage.

    Example:
        >>> percent(0.8125), percent(float("nan")) == UNKNOWN
        ('81.2%', True)
    """
    return UNKNOWN if math.isnan(value) else f"{100 * value:.{digits}f}%"


def points(value: float, *, signed: bool = True) -> str:
    """Return a difference of two ratios in percentage points.

    Example:
        >>> points(0.034), points(0.034, signed=False), points(-0.00001)
        ('+3.4 pp', '3.4 pp', '0.0 pp')
    """
    if math.isnan(value):
        return UNKNOWN
    text = f"{100 * value:+.1f}" if signed else f"{100 * value:.1f}"
    if float(text) == 0:
        text = "0.0"
    return text.replace("-", "\N{MINUS SIGN}") + " pp"


def size(num_bytes: float) -> str:
    """Return a number of bytes, in powers of 1024.

    Example:
        >>> size(812), size(19240), size(1.5 * 2**30)
        ('812 B', '18.8 KiB', '1.5 GiB')
    """
    if math.isnan(num_bytes):
        return UNKNOWN
    divisor, unit = size_unit(num_bytes)
    return f"{num_bytes / divisor:.{int(divisor > 1)}f} {unit}"


def size_unit(num_bytes: float) -> tuple[int, str]:
    """Return the unit for a number of bytes: what to divide by, and its name.

    Example:
        >>> size_unit(19240)
        (1024, 'KiB')
    """
    power = next((p for p in range(4) if abs(num_bytes) < 1023.95 * 1024**p), 4)
    return 1024**power, ("B", "KiB", "MiB", "GiB", "TiB")[power]


def energy(joules: float) -> str:
    """Return an energy.

    Example:
        >>> energy(0.0214), energy(812), energy(19_240)
        ('0.0214 J', '812 J', '19.2 kJ')
    """
    if math.isnan(joules):
        return UNKNOWN
    power = next((p for p in range(3) if abs(joules) < 999.5 * 1000**p), 3)
    return f"{joules / 1000**power:.3g} {('J', 'kJ', 'MJ', 'GJ')[power]}"


def duration(seconds: float) -> str:
    """Return a duration.

    Example:
        >>> duration(8.25), duration(125), duration(7_320)
        ('8.2 s', '2 min 5 s', '2 h 2 min')
    """
    if math.isnan(seconds):
        return UNKNOWN
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def count(number: int, noun: str) -> str:
    """Return a number of things.

    Example:
        >>> count(1, "device"), count(1_200, "device")
        ('1 device', '1,200 devices')
    """
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def classes(names: Sequence[object], *, longest: int = 12) -> str:
    """Return the classes of an experience; runs of numbers and long lists are shortened.

    Example:
        >>> classes([0, 1]), classes([0, 1, 2, 3, 7]), classes(list(range(0, 40, 2)))
        ('0, 1', '0-3, 7', '20 classes')
    """
    parts: list[str] = []
    group: list[object] = []
    for name in [*names, None]:
        last = group[-1] if group else None
        if isinstance(name, int) and isinstance(last, int) and name == last + 1:
            group.append(name)
            continue
        if len(group) > 2:
            parts.append(f"{group[0]}-{group[-1]}")
        else:
            parts += [str(member) for member in group]
        group = [name]
    text = ", ".join(parts)
    return text if len(text) <= longest else f"{len(names)} classes"
