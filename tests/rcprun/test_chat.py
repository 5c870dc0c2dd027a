"""Chat templates: the transformers dialect, and templates that mean harm."""

import json

import pytest

from rcprun import template_child
from rcprun.chat import ChatRenderer, TemplateLimits
from rcprun.errors import BadRequest, ChatTemplateError

HI = [{"role": "user", "content": "hi"}]


def render(template: str | None, messages=HI, **options) -> str:
    with ChatRenderer(template, **options) as renderer:
        return renderer.render(messages)


def test_renders_messages_with_special_tokens() -> None:
    template = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    assert render(template, bos_token="<s>", eos_token="</s>") == "<s><user>hi</s>"


def test_trims_blocks_as_transformers_does() -> None:
    assert render("{% if true %}\n  {% set x = 1 %}\nA\n  {% endif %}\n") == "A\n"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", "hi"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "02"),
        ("{{ {'b': '<ü>', 'a': 1} | tojson }}", '{"b": "<ü>", "a": 1}'),
        ("{{ [1] | tojson(indent=1) }}", "[\n 1\n]"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ tools is none }} {{ documents is none }} {{ add_generation_prompt }}", "True True True"),
        ("{{ 'ab' * 3 }}{{ 2 ** 10 }}{{ 2 ** -1 }}{{ 1.5 * 2 }}", "ababab10240.53.0"),
    ],
)
def test_dialect(template: str, expected: str) -> None:
    variables = {"messages": HI, "tools": None, "documents": None, "add_generation_prompt": True}
    assert template_child.render(template_child.compiled(template), variables, largest_output=100) == expected


def test_raise_exception_gives_the_templates_message() -> None:
    with pytest.raises(ChatTemplateError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


def test_no_template() -> None:
    with pytest.raises(ChatTemplateError, match="no chat template"):
        render(None)


def test_broken_template() -> None:
    with pytest.raises(ChatTemplateError, match="TemplateSyntaxError"):
        render("{% for %}")


@pytest.mark.parametrize("messages", [[], "hi", [{"role": "user"}], ["hi"], [{"role": 1, "content": "x"}]])
def test_messages_are_checked(messages) -> None:
    with pytest.raises(BadRequest, match="messages"):
        render("x", messages)


HOSTILE = {
    "attribute access": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__['sys'] }}",
    "attr filter": "{{ (''|attr('__class__')).__mro__ }}",
    "format string": "{{ '{0.__class__.__mro__}'.format('') }}",
    "mutation": "{% set _ = messages.append(1) %}",
    "repetition": "{{ 'a' * 10**9 }}",
    "repetition, turned": "{{ 10**9 * ['a'] }}",
    "tower of powers": "{{ 10**(10**10) }}",
    "huge product": "{% set ns = namespace(x=9) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "huge range": "{{ range(10**9) | list }}",
    "doubling": "{% set ns = namespace(x='aaaa') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubling by +": "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "join": "{% set s = 'a' * 1000000 %}{{ range(100000) | join(s) | length }}",
    "width of %": "{{ '%999999999d' | format(1) | length }}",
    "width of format": "{{ '{:999999999}'.format(1) | length }}",
    "center": "{{ 'a' | center(10000000000) | length }}",
    "indent": "{{ ('a\\n' * 100000) | indent(1000000) | length }}",
    "replace": "{{ ('a' * 1000000).replace('a', 'b' * 1000000) | length }}",
    "long output": "{% for i in range(100000) %}{{ 'a' * 1000 }}{% endfor %}",
    "recursive macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "include": "{% include '/etc/passwd' %}",
}


@pytest.mark.parametrize("template", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_templates_are_refused(template: str) -> None:
    with pytest.raises(ChatTemplateError):
        render(template)


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    ],
    ids=["nested loops", "branching macro"],
)
def test_endless_templates_are_stopped(template: str) -> None:
    with pytest.raises(ChatTemplateError, match=r"took longer than 1 s"):
        render(template, limits=TemplateLimits(seconds=1))


def test_a_template_sees_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even what escapes the sandbox finds no token in its environment."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    import subprocess

    seen = {}
    original = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: seen.update(k["env"]) or original(*a, **k))
    assert render("x") == "x"
    assert "HF_TOKEN" not in seen


def test_one_child_renders_many_conversations_and_is_started_anew_after_a_death(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import subprocess

    started = []
    original = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(1) or original(*a, **k))
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    template = "{% set c = messages[0].content %}{% if c == 'fail' %}{{ none.x.y }}{% endif %}<{{ c }}>"
    template += "{% if c == 'loop' %}" + loop + "{% endif %}"
    with ChatRenderer(template, limits=TemplateLimits(seconds=1)) as renderer:

        def answer(content: object) -> str:
            return renderer.render([{"role": "user", "content": content}])

        assert [answer(str(i)) for i in range(50)] == [f"<{i}>" for i in range(50)]
        with pytest.raises(ChatTemplateError, match="UndefinedError"):
            answer("fail")
        with pytest.raises(BadRequest, match="JSON"):
            answer(object())
        assert answer("ü\n🙂") == "<ü\n🙂>" and len(started) == 1
        with pytest.raises(ChatTemplateError, match="took longer than 1 s"):
            answer("loop")
        assert answer("on") == "<on>" and len(started) == 2


def test_json_lines_for_other_programs() -> None:
    import os
    import subprocess
    import sys

    lines = [{"template": "{{ eos_token }}{{ messages[0].content.upper() }}", "eos_token": "</s>"}, HI, [], HI]
    child = subprocess.run(
        [sys.executable, "-m", "rcprun.chat"],
        input="".join(json.dumps(line) + "\n" for line in lines),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=True,
    )
    first, none, last = map(json.loads, child.stdout.splitlines())
    assert first == last == {"text": "</s>HI"} and "non-empty list" in none["error"]
    assert child.stderr == ""
