"""Numbers and words as the report prints them; a value that is not finite becomes a dash."""

from __future__ import annotations

import math
from typing import Any

from markupsafe import Markup

ABSENT = "–"


def number(value: object) -> float | None:
    """Read a finite number; None for everything else (null, NaN, text, lists)."""
    try:
        finite = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return finite if math.isfinite(finite) else None


def fixed(value: object, digits: int = 3) -> str:
    """Write 0.1239 as '0.124', a missing value as a dash; never '-0.000'."""
    finite = number(value)
    if finite is None:
        return ABSENT
    text = f"{finite:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text


def short(value: object) -> str:
    """Write with about three significant digits: 50.0, 7.98, 0.0031, 1.2e-7."""
    finite = number(value)
    if finite is None:
        return ABSENT
    if finite == 0 or 0.001 <= abs(finite) < 10_000:
        digits = 0 if abs(finite) >= 1000 else 1 if abs(finite) >= 20 else 2 if abs(finite) >= 1 else 3
        return fixed(finite, digits)
    return f"{finite:.1e}".replace("e-0", "e-").replace("e+0", "e")


def tick(value: float) -> str:
    """Write an axis number: 250k, 1.5M, 0.02."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def percent(value: object, digits: int = 1) -> str:
    finite = number(value)
    return ABSENT if finite is None else f"{fixed(100 * finite, digits)}\u00a0%"


def share(value: object) -> float:
    """A value as a length between 0 and 1."""
    return min(max(number(value) or 0.0, 0.0), 1.0)


def interval(low: object, high: object, digits: int = 3) -> str:
    return "" if number(low) is None or number(high) is None else f"{fixed(low, digits)} to {fixed(high, digits)}"


def span(figures: dict[str, Any], name: str) -> str:
    """The interval that stands beside a figure; empty where there is none."""
    return interval(figures.get(f"{name}_low"), figures.get(f"{name}_high"))


def joined(value: object) -> object:
    """A setting as it is read: lists by commas, a dash for none."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return ABSENT if value is None else value


def duration(seconds: object) -> str:
    """Write 250 as '4 min 10 s'."""
    finite = number(seconds)
    if finite is None:
        return ABSENT
    whole = round(finite)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{finite:.3g} s"


def _left_out_at(facts: dict[str, Any]) -> str:
    """Say, from what run.json holds, which activations were outliers; empty where none was to be left out."""
    outliers, norm = facts.get("outliers"), number((facts.get("settings") or {}).get("outlier_norm"))
    if not outliers:
        return ""
    seen = (number(facts.get("tokens")) or 0) + outliers["trained"]
    share = percent(outliers["trained"] / seen, 2) if seen else ABSENT
    sinks = ", and the first position of each sequence" if outliers["first_position"] else ""
    median = "" if outliers["median_norm"] is None else f" of {short(outliers['median_norm'])}"
    return (
        f"{outliers['trained']:,} training activations ({share}) and {outliers['held_out']:,} held-out ones, of more "
        f"than {target(norm)} times the median norm{median}{sinks}"
    )


def left_out(facts: dict[str, Any]) -> str:
    """What a run left out as outliers, hook by hook where it has several."""
    if not facts.get("hooks"):
        return _left_out_at(facts)
    return "; ".join(f"{hook}: {_left_out_at(facts | own) or 'nothing'}" for hook, own in facts["hooks"].items())


def leaves_out(facts: dict[str, Any]) -> bool:
    """Whether a run left anything out as an outlier."""
    places = [own.get("outliers") or {} for own in (facts.get("hooks") or {"": facts}).values()]
    return any(outliers.get(name) for outliers in places for name in ("trained", "held_out", "first_position"))


def listed(items: list[str], most: int = 6) -> Markup:
    """Join names: 'a, b and c', with a count for what is left out; markup stays markup."""
    shown = items[:most] + ([f"{len(items) - most} more"] if len(items) > most else [])
    return Markup(" and ").join(filter(None, [Markup(", ").join(shown[:-1]), *shown[-1:]]))


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun if count == 1 else nouns(noun)}"


def nouns(noun: str) -> str:
    """Plural of a noun: letters, classes, countries."""
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}es" if noun.endswith(("s", "x", "ch", "sh")) else f"{noun}s"


def noun_of(hierarchy: object) -> str:
    """What one label of a hierarchy is called: letter, word class."""
    name = str(hierarchy or "first-letter").replace("\\", "/").split("/")[-1].removesuffix(".json")
    return "letter" if name == "first-letter" else name.replace("-", " ").replace("_", " ")


def label_name(label: object) -> str:
    """A label as it is printed: letters in upper case, everything else as it is."""
    text = str(label)
    return text.upper() if len(text) == 1 else text


def target(value: float | None) -> str:
    """Write an L0 that was asked for as it was given: 50, 7.5."""
    return ABSENT if value is None else f"{value:g}"
