"""From flat keys to one `Settings` and back: what flags, files and Python users give, merged over defaults."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sae_train.config.settings import CONFIGS, PRESETS, Settings
from sae_train.config.spec import SettingsGroup
from sae_train.config.units import plain
from sae_train.errors import UserError, explaining, sentences_of, unknown_setting


def groups() -> dict[str, type[SettingsGroup]]:
    """Settings groups by name, in the order of the tree."""
    return {name: field.annotation for name, field in Settings.model_fields.items()}


def leaves() -> dict[str, str]:
    """Every setting's name with its group's name."""
    return {leaf: group for group, model in groups().items() for leaf in model.model_fields}


def resolve(given: dict[str, Any], file: str | Path | None = None, presets: bool = True) -> Settings:
    """Merge defaults < the model's preset < `file` < `given`, all with flat keys, where None means not given.

    Presets (unless they are left out) are the files in configs/ of the embedded model, the toy and SmolLM2.
    Raises UserError that names every problem, one line each.
    """
    flat = (read_yaml(file) if file else {}) | {key: value for key, value in given.items() if value is not None}
    flat, problems = _plain(flat)
    model = flat.get("model", "speller")
    if presets and model in PRESETS:
        flat = read_yaml(CONFIGS / f"{model}.yaml") | flat
    known = leaves()
    problems += [unknown_setting(key, known) for key in flat if key not in known]
    tree: dict[str, dict[str, Any]] = {group: {} for group in groups()}
    for key in flat.keys() & known.keys():
        tree[known[key]][key] = flat[key]
    try:
        settings = Settings.model_validate(tree)
    except ValidationError as error:
        problems += [line for item in error.errors() for line in sentences_of(item)]
    if problems:
        raise UserError("\n".join(problems))
    return settings


def _plain(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The settings in plain values, and what is wrong with those that have none."""
    kept, problems = {}, []
    for key, value in given.items():
        try:
            kept[key] = plain(value)
        except ValueError as error:
            problems.append(f"{key}: {error}")
    return kept, problems


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a settings file: a YAML mapping with flat keys; UserError if absent, unreadable or of another shape."""
    import yaml

    path = Path(path)
    file = f"the settings file {str(path)!r}"
    problem = f"{file} cannot be read as YAML"
    with explaining(lambda error: f"{problem}: {' '.join(str(error).split())}", OSError, ValueError, yaml.YAMLError):
        if not path.exists():
            raise UserError(f"{file} does not exist: give the path of a YAML file")
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
        twice = _keys_twice(yaml.compose(text, yaml.SafeLoader))
    if twice:
        raise UserError(f"{file} says {' and '.join(twice)} twice: say it once, the last one alone would count")
    if not isinstance(content or {}, dict) or not all(isinstance(key, str) for key in content or {}):
        raise UserError(f"{file} must be a mapping such as 'width: 16k', one setting a line")
    return content or {}


def _keys_twice(node: Any) -> list[str]:
    """Keys that a mapping of a YAML document, however deep, holds more than once."""
    if node is None or isinstance(node.value, str):
        return []
    pairs = [pair for pair in node.value if isinstance(pair, tuple)]
    keys = [key.value for key, _ in pairs]
    inner = [value for _, value in pairs] or node.value
    own = [key for key in keys if keys.count(key) > 1 and key != "<<"]
    return list(dict.fromkeys([*own, *chain.from_iterable(map(_keys_twice, inner))]))


def flat(settings: Settings) -> dict[str, Any]:
    """The tree as one flat dictionary of JSON values, as `resolve` takes it."""
    return {key: value for group in settings.model_dump(mode="json").values() for key, value in group.items()}
