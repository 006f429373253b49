"""The page docs/settings.md, made from the settings tree: a Markdown table a group.

`python -m sae_train.config.page` prints it; the test suite compares it with the file.
"""

from __future__ import annotations

from typing import Any

from sae_train.config import groups

HEAD = """# Settings

Every setting, made from the code by `python -m sae_train.config.page > docs/settings.md`. The same names serve as
flags (`--batch-tokens 2048`), in YAML files (`--config FILE`: `batch_tokens: 2048`) and in Python
(`train(batch_tokens=2048)`). Defaults < the model's preset (`configs/speller.yaml`,
`toy.yaml`, `smollm2.yaml`) < file < flags.
Numbers may be written 16k (a power of two for widths, thousands elsewhere), 1M, 1B; what takes a list takes commas.
"""


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *(_group(model) for model in groups().values())])


def _group(model: Any) -> str:
    rows = [
        f"| `--{name.replace('_', '-')}` | {_default(field.default)} | {_cell(field.description)} |"
        for name, field in model.model_fields.items()
    ]
    title = (model.__doc__ or "").strip()
    return "\n".join([f"## {title}", "", "| setting | default | |", "|---|---|---|", *rows, ""])


def _default(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return (
            f"`{','.join(f'{item:g}' if isinstance(item, float) else str(item) for item in value)}`" if value else "–"
        )
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|").replace("{", "\\{").replace("}", "\\}")


if __name__ == "__main__":
    print(page(), end="")
