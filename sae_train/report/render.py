"""Fills the page's templates. Whatever a run, a model or a name holds is escaped; markup stands in templates alone."""

from __future__ import annotations

import functools
from importlib import resources
from types import ModuleType
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from sae_train.report import (
    absorbing,
    claims,
    data,
    drawing,
    figures,
    findings,
    layers,
    letters,
    matched,
    pareto,
    tables,
    text,
)

if TYPE_CHECKING:
    from jinja2 import Environment

OPEN = (  # to the templates
    absorbing, claims, data, drawing, figures, findings, layers, letters, matched, pareto, tables, text,
)  # fmt: skip


def render(template: str, **values: object) -> str:
    """The page as one text that loads nothing from anywhere."""
    return _environment().get_template(template).render(**values)


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("sae_train.report"), autoescape=True, undefined=StrictUndefined, lstrip_blocks=True
    )
    made.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    made.filters |= _public(text)
    made.globals |= {name: value for module in OPEN for name, value in _public(module).items()}
    made.globals |= {"asset": asset, "refresh": 0}
    return made


def _public(module: ModuleType) -> dict[str, Any]:
    """A module's own functions and constants."""
    own = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    return {name: v for name, v in own.items() if name.isupper() or getattr(v, "__module__", "") == module.__name__}


def asset(name: str) -> Markup:
    """A style sheet or script of ours."""
    return Markup(resources.files("sae_train.report").joinpath(name).read_text(encoding="utf-8"))
