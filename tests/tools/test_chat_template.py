"""A chat template is a program in a stranger's checkpoint: it ends within bounds, in one line that names its file."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from peraxis_tools.compress.calibration.generate import starts_of
from peraxis_tools.errors import ToolError
from peraxis_tools.texts.chat_template import chat_template_of
from peraxis_tools.texts.samples import load_samples
from tests.tools.compress_pairs import write_tokenizer

TURNS = [{"role": "user", "content": "sun \ud800 'moon'"}, {"role": "assistant", "content": "red {{ 1 }}"}]
ORDINARY = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] | upper }}: {{ m.content }}{{ eos_token }}{% endfor %}",
    "{% for m in messages %}{{ m | tojson }}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}",
)
HOSTILE = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "one long operation": "{{ 7 ** (10 ** 9) }}",
    "a long text": "{{ 'a' * 10 ** 10 }}",
    "a text that doubles": "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s * 2 %}{% endfor %}",
    "a filter that fills": "{{ 'a' | center(10 ** 11) }}",
    "a width": "{{ '%99999999999d' | format(1) }}",
    "many lists": "{% set n = namespace(s=[1]) %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "a long output": "{% for a in range(99999) %}{{ 'abcdefghijklmnopqrstuvwxyz' }}{% endfor %}",
    "a constant": "{% if 'a' * 10 ** 11 == 'b' %}{% endif %}",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path)
    return tmp_path


def with_template(folder: Path, template: str) -> Any:
    (folder / "chat_template.jinja").write_text(template)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("template", ORDINARY)
def test_a_template_writes_the_same_as_transformers(folder: Path, template: str) -> None:
    tokenizer = with_template(folder, template)
    with chat_template_of(tokenizer) as render:
        assert render is not None
        for turns in (TURNS, TURNS[:1]):
            assert render(turns) == tokenizer.apply_chat_template(turns, tokenize=False)


def test_a_template_that_refuses_a_conversation_is_no_error_and_takes_the_next(folder: Path) -> None:
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}"
    with chat_template_of(with_template(folder, refuses)) as render:
        assert render is not None
        assert render([{"role": "system", "content": "a"}]) is None
        assert render([{"role": "user", "content": "a"}]) == "a"


@pytest.mark.parametrize("template", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_template_ends_in_one_line_that_names_its_file(folder: Path, template: str) -> None:
    tokenizer = with_template(folder, template)
    text = folder / "chat.jsonl"
    text.write_text(json.dumps({"messages": [{"role": "user", "content": "sun"}]}) + "\n")
    used = time.process_time()
    with pytest.raises(ToolError) as caught:
        load_samples(str(text), tokenizer, samples=2, length=8, seed=0)
    assert str(caught.value).startswith(f"{folder / 'chat_template.jinja'}: its chat template ")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 2
    assert time.process_time() - used < 5  # of this process; the kernel bounds the other one


def test_the_starts_of_generated_samples_are_bounded_too(folder: Path) -> None:
    with pytest.raises(ToolError, match="its chat template takes too much memory"):
        starts_of(with_template(folder, HOSTILE["a long text"]))


def test_a_template_that_is_slow_in_each_conversation_is_bounded_over_all(folder: Path) -> None:
    slow = "{% for a in range(400) %}{% for b in range(40000) %}{% endfor %}{% endfor %}"
    with chat_template_of(with_template(folder, slow)) as render:
        assert render is not None
        render(TURNS)  # one is within the bound
        with pytest.raises(ToolError, match="does not end"):
            all(True for _ in iter(lambda: render(TURNS), 0))


def test_the_folder_of_the_user_adds_no_module_to_the_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("json.py", "jinja2.py", "transformers.py"):
        (folder / name).write_text("raise SystemExit(9)")
    tokenizer = with_template(folder, ORDINARY[0])
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend("")
    with chat_template_of(tokenizer) as render:
        assert render is not None
        assert render(TURNS)
