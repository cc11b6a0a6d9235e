"""What a stranger's name may do to a terminal: nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Done
from hostile_gguf import build, info, pair, string

from llmx.errors import IntegrityError
from llmx.printing import harmless, harmless_json, on_one_line

EVIL = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202egpj\r\nverified: all is well\x7f"


def obeyed(text: str) -> list[str]:
    """Characters that a terminal obeys, of a text whose lines are our own."""
    return [c for c in text if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 or c in "\u202e\u202d"]


def test_what_terminals_obey_is_spelled_out_and_all_else_stays() -> None:
    assert harmless("a\x1b[1mb\tc\nd é 我 🦙") == "a\\x1b[1mb\tc\nd é 我 🦙"
    assert on_one_line("a\nb\t\u2028") == "a\\nb\\t\\u2028"
    assert harmless("\udcff").encode() == b"\\udcff"


def test_json_stays_the_same_value() -> None:
    told = {"name": EVIL, "more": "\ud800"}
    shown = harmless_json(json.dumps(told, ensure_ascii=False))
    assert json.loads(shown) == told and not obeyed(shown)


def test_an_offence_with_lines_of_its_own_is_one_line_of_ours() -> None:
    error = IntegrityError("broken", problems=["a\nerror: nothing"], where="b\nfix: run this")
    assert str(error).splitlines() == ["broken", "  - a\\nerror: nothing", "  where: b\\nfix: run this"]


@pytest.mark.parametrize("options", [(), ("--json",)], ids=["words", "json"])
def test_names_in_a_gguf_file_do_not_reach_the_terminal_raw(
    options: tuple[str, ...], tmp_path: Path, here: Callable[..., Done]
) -> None:
    path = tmp_path / "evil.gguf"
    path.write_bytes(build((pair(EVIL, 8, string(EVIL)),), (info(EVIL[:40], (16,)),)))
    done = here("inspect", path, *options)
    assert done.code == 0 and not obeyed(done.stdout + done.stderr)
    assert "verified: all is well" not in done.stdout.splitlines()
    if options:
        assert done.told["tensors"][0]["name"] == EVIL[:40]


def test_names_in_a_refusal_do_not_reach_the_terminal_raw(tmp_path: Path, here: Callable[..., Done]) -> None:
    path = tmp_path / f"{EVIL[:9]}\n.gguf"
    path.write_bytes(build((), (info(EVIL[:20], (16,), offset=64),)))
    for given in (path, tmp_path / "\udcff.gguf"):
        done = here("inspect", given)
        assert done.code in (2, 6) and not obeyed(done.stdout + done.stderr)
