"""The text side of a folder in Hugging Face's layout: which files it needs, and its chat template."""

from __future__ import annotations

from pathlib import Path

from llmx.formats.json_text import read_object

TOKENIZERS = ("tokenizer.json", "tokenizer.model")
TOKENIZER_CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
TEMPLATE_BYTES = 1 << 20


def has_tokenizer(folder: Path) -> bool:
    """Whether anything in the folder reads text."""
    return any((folder / name).is_file() for name in TOKENIZERS)


def template_of(folder: Path) -> str | None:
    """The chat template: in a file of its own, else the tokenizer's default one.

    Raises: IntegrityError for a broken tokenizer_config.json.
    """
    path = folder / TEMPLATE
    if path.is_file() and path.stat().st_size <= TEMPLATE_BYTES:
        return path.read_text(encoding="utf-8", errors="replace")
    told = folder / TOKENIZER_CONFIG
    found = read_object(told).get("chat_template") if told.is_file() else None
    named = {one.get("name"): one.get("template") for one in found} if isinstance(found, list) else {}
    found = named.get("default") if named else found
    return found if isinstance(found, str) else None
