"""Chat templates: found, parsed before use, and rendered in a sandbox with limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmx.errors import IntegrityError
from llmx.models.chat_template import check_template, read_templates, render

HELLO = [{"role": "user", "content": "Hello"}]


def _render(template: str, **names: Any) -> str:
    return render(template, HELLO, add_generation_prompt=True, **names)


def test_the_extensions_of_hugging_face_are_there() -> None:
    template = (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
        "{{ {'é': 1} | tojson }}{{ strftime_now('%Y') | length }}{{ tools is none }}"
    )
    assert _render(template) == 'Hello{"é": 1}4True'


def test_a_template_that_does_not_parse_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{{ a }}\n{% for x in %}\n")
    with pytest.raises(IntegrityError, match=r"line 2(.|\n)*for x in"):
        read_templates(tmp_path, {})


def test_an_empty_template_parses() -> None:
    check_template("")


def test_templates_come_from_config_file_and_folder(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "a"}, {"name": "rag", "template": "b"}]
    assert read_templates(tmp_path, {"chat_template": "x"}) == {"default": "x"}
    (tmp_path / "chat_template.jinja").write_text("c")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("d")
    assert read_templates(tmp_path, {"chat_template": named}) == {"default": "c", "rag": "b", "tool_use": "d"}


@pytest.mark.parametrize("value", [7, [7], [{"name": "x"}]])
def test_a_template_that_is_no_text_is_refused(value: object, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="chat_template"):
        read_templates(tmp_path, {"chat_template": value})


def test_a_template_may_refuse_a_conversation() -> None:
    with pytest.raises(IntegrityError, match="roles must alternate"):
        _render("{{ raise_exception('roles must alternate') }}")


HOSTILE = {
    "reaching for Python": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "changing its input": "{{ messages.append(1) }}",
    "a large repetition": "{{ 'a' * 100000000 }}",
    "a large power": "{{ 2 ** 100000 }}",
    "a wide format": "{{ '%1000000000d' % 1 }}",
    "a long output": "{% for i in range(90000) %}" + "a" * 100 + "{% endfor %}",
    "an unknown function": "{{ missing() }}",
    "a wrong type": "{{ 1 + 'a' }}",
    "a wide column": "{{ 'a' | center(1000000000) }}",
    "replacements of replacements": "{{ ('a' * 1000) | replace('a', 'b' * 1000) | replace('b', 'c' * 10000) }}",
    "a text that doubles": "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{%endfor%}",
    "lists of lists": "{% set a = [1] * 1000 %}{% set b = [a] * 1000 %}{% set c = [b] * 1000 %}{{ c }}",
    "brackets nested too deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "another file": "{% include '/etc/passwd' %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_and_broken_templates_are_stopped(name: str) -> None:
    with pytest.raises(IntegrityError, match="chat template"):
        _render(HOSTILE[name])


def test_a_template_that_does_not_end_is_stopped_and_the_next_one_is_rendered() -> None:
    loops = "".join(f"{{% for i{n} in range(90000) %}}" for n in range(3)) + "{% endfor %}" * 3
    with pytest.raises(IntegrityError, match="more time or memory than a template may"):
        _render(loops)
    assert _render("{{ messages[0].content }}") == "Hello"


def test_a_constant_is_not_computed_when_a_template_is_parsed() -> None:
    check_template("{{ 'a' | center(1000000000) }}")


def test_a_template_that_is_too_long_to_compile_is_refused() -> None:
    with pytest.raises(IntegrityError, match="more time or memory than a template may"):
        check_template("{{ 1 }}" * 250_000)


def test_rendering_equals_transformers() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    template = (
        "{%- if messages[0].role == 'system' %}\n    {{- messages[0].content }}\n{%- endif %}\n"
        "{% for m in messages %}\n  {{ bos_token }}{{ m | tojson(indent=1) }}\n{% endfor %}\n{% if tools %}x{% endif %}"
    )
    messages = [{"role": "system", "content": "é<b>"}, *HELLO]
    theirs, _ = render_jinja_template(conversations=[messages], chat_template=template, bos_token="<s>")
    ours = render(template, messages, add_generation_prompt=False, bos_token="<s>")
    assert json.dumps(ours) == json.dumps(theirs[0])
