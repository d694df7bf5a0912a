"""The text that a fit reads: columns, conversations, the end of a document, several sources, unread tokens."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peraxis_tools.compress.calibration.generate import starts_of
from peraxis_tools.errors import OptionError
from peraxis_tools.texts import samples as text_module
from peraxis_tools.texts.documents import Conversation, read_documents
from peraxis_tools.texts.samples import Source, check_calibration, load_samples, unread_tokens
from tests.tools.compress_pairs import write_text, write_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ '<r>' + m['role'] + ' ' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}<r>assistant {% endif %}"
)
TURNS = [{"role": "user", "content": "sun moon"}, {"role": "assistant", "content": "red blue"}]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path / "tokenizer")
    return AutoTokenizer.from_pretrained(tmp_path / "tokenizer")


def rows_file(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("row", "read"),
    [
        ({"text": "sun", "other": "moon"}, "sun"),
        ({"id": "row-1", "messages": TURNS}, Conversation(turns=(("user", "sun moon"), ("assistant", "red blue")))),
        (
            {"source": "x", "conversations": [{"from": "human", "value": "sun"}, {"from": "gpt", "value": "red"}]},
            Conversation(turns=(("user", "sun"), ("assistant", "red"))),
        ),
        ({"prompt": "sun", "response": "red"}, Conversation(turns=(("user", "sun"), ("assistant", "red")))),
        (
            {"instruction": "sun", "input": "moon", "output": "red"},
            Conversation(turns=(("user", "sun\nmoon"), ("assistant", "red"))),
        ),
        ({"id": "row-1", "first": "sun", "second": "moon"}, "sun\nmoon"),
    ],
)
def test_a_row_is_read_where_its_text_is(tmp_path: Path, row: dict[str, Any], read: object) -> None:
    assert read_documents(rows_file(tmp_path / "rows.jsonl", row), text_column=None, limit=9) == [read]


def test_rows_without_text_are_refused_with_what_they_hold(tmp_path: Path) -> None:
    source = rows_file(tmp_path / "rows.jsonl", {"id": "a", "score": 3, "messages": []})
    with pytest.raises(OptionError, match=r"holds no text; its columns: id \(text\), score \(number\)"):
        read_documents(source, text_column=None, limit=9)
    with pytest.raises(OptionError, match="column 'score' holds a number, not text or turns"):
        read_documents(source, text_column="score", limit=9)


def test_a_column_of_several_types_is_refused_with_all_of_them(tmp_path: Path) -> None:
    source = rows_file(tmp_path / "rows.jsonl", {"text": 3}, {"text": []}, {"text": {}}, {"text": 0.5}, {"text": None})
    with pytest.raises(OptionError, match=r"its columns: text \(number or list or mapping\);"):
        read_documents(source, text_column=None, limit=9)


@pytest.mark.parametrize(("limit", "said"), [(9, "no text in 3 of 5 rows, left out"), (2, "2 of the first 4 rows")])
def test_rows_without_text_are_counted_in_a_note(
    limit: int, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows: list[dict[str, Any]] = [{"text": "sun"}, {"foo": 3}, {"text": " "}, {"messages": TURNS}, {"text": None}]
    source = rows_file(tmp_path / "rows.jsonl", *rows)
    assert len(read_documents(source, text_column=None, limit=limit)) == 2
    (record,) = caplog.records
    assert record.getMessage().startswith(f"text {source}: no text in ")
    assert said in record.getMessage()


def test_nothing_is_said_of_a_text_whose_rows_all_have_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read_documents(rows_file(tmp_path / "rows.jsonl", {"text": "sun"}), text_column=None, limit=9)
    (tmp_path / "a.txt").write_text("sun\n\n \n\n\n\nmoon\n\n")
    assert read_documents(str(tmp_path / "a.txt"), text_column=None, limit=9) == ["sun", "moon"]
    assert not caplog.records


def test_a_text_that_holds_nothing_is_called_empty(tmp_path: Path) -> None:
    for rows in ((), ({},)):
        with pytest.raises(OptionError, match="is empty; name another text"):
            read_documents(rows_file(tmp_path / "rows.jsonl", *rows), text_column=None, limit=9)


def test_a_damaged_table_is_one_line_of_ours_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "table.parquet").write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    with pytest.raises(OptionError, match="cannot be read") as found:
        read_documents(str(tmp_path / "table.parquet"), text_column=None, limit=9)
    assert "\n" not in str(found.value)
    assert capfd.readouterr().err == ""


def test_a_text_shorter_than_one_sample_is_noted(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    short = rows_file(tmp_path / "short.jsonl", {"text": "sun"})
    long = rows_file(tmp_path / "long.jsonl", *[{"text": "sun moon red blue"}] * 30)
    load_samples(long, tokenizer, samples=2, length=16, seed=0)
    assert caplog.text == ""
    load_samples([long, short], tokenizer, samples=2, length=16, seed=0)
    assert "short.jsonl: has 4 tokens, less than one sample of 16" in caplog.text
    assert "long.jsonl" not in caplog.text


def test_fewer_samples_than_were_asked_for_are_noted(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    few = rows_file(tmp_path / "few.jsonl", *[{"text": "sun moon red blue"}] * 2)  # 18 tokens each
    many = rows_file(tmp_path / "many.jsonl", *[{"text": "sun moon red blue"}] * 99)
    load_samples([few, many], tokenizer, samples=6, length=16, seed=0)
    load_samples(many, tokenizer, samples=6, length=16, seed=0, asked=True)
    assert not caplog.records
    load_samples([few, many], tokenizer, samples=6, length=16, seed=0, asked=True)
    (record,) = caplog.records
    assert record.getMessage() == f"text {few}: holds 2 of the 3 samples asked for"


def test_only_the_documents_that_are_read_are_said_to_hold_too_little(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    source = rows_file(tmp_path / "short.jsonl", *[{"text": "a"}] * 1001)
    load_samples(source, tokenizer, samples=40, length=64, seed=0, asked=True)
    assert f"text {source}: its first 1000 documents hold 31 of the 40 samples asked for" in caplog.text


def test_a_text_is_named_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        Path(name).write_text('{"text": "sun"}')
    Path("link.jsonl").symlink_to("a.jsonl")
    assert check_calibration(("a.jsonl:2", "b.jsonl", "c4", "org/data:a", "org/data:b")) == [
        "a.jsonl", "b.jsonl", "c4", "org/data:a", "org/data:b"
    ]  # fmt: skip
    assert check_calibration("a.jsonl") == ["a.jsonl"]
    assert check_calibration(None) == []
    for twice in (("a.jsonl", "a.jsonl"), ("c4", "b.jsonl", "c4:0.5"), ("org/data", "org/data:2")):
        with pytest.raises(OptionError, match=r"is given twice; name it once, with a weight for more of it \(\S+:2\)"):
            check_calibration(twice)
    for same in ("./a.jsonl", "link.jsonl", str(tmp_path / "a.jsonl:3")):
        with pytest.raises(OptionError, match=r"is the same file as a\.jsonl; name it once"):
            check_calibration(("b.jsonl", "a.jsonl", same))


def test_each_document_ends_with_one_end_of_text_token(tmp_path: Path, tokenizer: Any) -> None:
    source = str(write_text(tmp_path / "text.jsonl", documents=12, words=5))
    ids = load_samples(source, tokenizer, samples=64, length=8, seed=0).ids.flatten().tolist()
    end = tokenizer.eos_token_id
    assert ids.count(end) in (11, 12)  # the last one may be after the last sample
    assert not any(a == b == end for a, b in itertools.pairwise(ids))


def test_a_conversation_is_written_with_the_chat_template(tmp_path: Path, tokenizer: Any) -> None:
    source = rows_file(tmp_path / "chat.jsonl", *[{"messages": TURNS}] * 4)
    plain = load_samples(source, tokenizer, samples=4, length=8, seed=0).ids
    tokenizer.chat_template = TEMPLATE
    ids = load_samples(source, tokenizer, samples=64, length=8, seed=0).ids.flatten().tolist()
    wanted = tokenizer("<r>user sun moon</s><r>assistant red blue</s>", add_special_tokens=False)["input_ids"]
    assert ids[: len(wanted)] == wanted  # no second end of text after that of the template
    assert ids[len(wanted)] == wanted[0]
    assert plain.flatten().tolist()[:8] != wanted[:8]


def test_several_texts_share_the_samples_by_weight(tmp_path: Path, tokenizer: Any) -> None:
    paths = [write_text(tmp_path / f"{name}.jsonl", seed=i) for i, name in enumerate("ab")]
    mixed = load_samples([f"{paths[0]}:3", f"{paths[1]}:1"], tokenizer, samples=12, length=8, seed=0)
    assert mixed.counts == (9, 3)
    assert mixed.source == "a.jsonl; b.jsonl"
    alone = load_samples(str(paths[1]), tokenizer, samples=3, length=8, seed=0)
    np.testing.assert_array_equal(mixed.by_source[1], alone.ids)
    assert Source.parse("org/data:config") == Source(name="org/data:config")
    assert Source.parse("c4:0.5") == Source(name="c4", weight=0.5)
    with pytest.raises(OptionError, match="above 0"):
        Source.parse("c4:0")


@pytest.mark.parametrize(
    "weight", ["0", "0.0", "-1", "-0.5", "nan", "inf", "-inf", "1e300", "1e400", "1e-400", "9" * 400, "1000001"]
)
@pytest.mark.parametrize("name", ["c4", "cal.jsonl", "there", "a:b.jsonl", "missing.jsonl"])
def test_a_weight_out_of_its_bounds_is_refused_with_them(
    name: str, weight: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for there in ("cal.jsonl", "there", "a:b.jsonl"):
        Path(there).write_text("")
    with pytest.raises(OptionError, match=f"a weight must be above 0, up to 1000000, like {name}:0.5"):
        Source.parse(f"{name}:{weight}")


def test_a_file_whose_name_has_a_colon_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("cal:-1", "cal:2", "a:b.jsonl"):
        Path(name).write_text('{"text": "sun"}')
        assert Source.parse(name) == Source(name=name)
        assert Source.parse(f"{name}:2") == Source(name=name, weight=2.0)
        assert Source.parse(f"{name}:2e-1") == Source(name=name, weight=0.2)
    assert read_documents("a:b.jsonl", text_column=None, limit=9) == ["sun"]
    for name in ("org/data:nan", "org/data:1e3", "org/data:-1"):  # configurations of a data set
        assert Source.parse(name) == Source(name=name)


def test_special_tokens_that_no_sample_holds_are_named(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<r>", "<other>"]})
    tokenizer.chat_template = TEMPLATE
    ids = np.array([[5, 6, tokenizer.eos_token_id]])
    assert unread_tokens(tokenizer, ids) == ["<s>", "<r>", "<other>"]
    role = tokenizer.convert_tokens_to_ids("<r>")
    assert unread_tokens(tokenizer, np.array([[0, 1, role]])) == ["<other>"]


def test_generated_samples_start_where_a_user_does(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    starts = starts_of(tokenizer)
    assert starts[:2] == [[tokenizer.bos_token_id], [tokenizer.eos_token_id]]
    parts = ("<r>user ", "</s><r>assistant ")
    user, assistant = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in parts)
    assert user in starts
    assert any(start[-len(assistant) :] == assistant and len(start) > len(assistant) for start in starts)
    assert len({tuple(start) for start in starts}) == len(starts)


@pytest.mark.parametrize("text", ["sun moon ", "sun" + " " * 40, "sun" + " " * 2000])
def test_of_a_huge_document_only_the_tokens_that_are_used_are_computed(
    text: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "huge.jsonl").write_text(json.dumps({"text": text * (400_000 // len(text))}))
    lengths: list[int] = []
    encode = text_module.token_ids

    def measured(tokenizer: Any, text: str, **how: Any) -> list[int]:
        lengths.append(len(text))
        return encode(tokenizer, text, **how)

    def ids() -> Any:
        return load_samples(str(tmp_path / "huge.jsonl"), tokenizer, samples=4, length=32, seed=0).ids

    monkeypatch.setattr(text_module, "token_ids", measured)
    short = ids()
    assert lengths[0] < 10_000
    monkeypatch.setattr(text_module, "_CHARACTERS", 1 << 20)
    assert np.array_equal(short, ids())


@pytest.mark.parametrize("name", ["b[1].txt", "b*.csv", "q::z.txt", "run[1]/b.json", "a{1}.csv.gz"])
def test_a_name_is_no_pattern(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    kinds = {".txt": "the right one\n", ".csv": "text\nthe right one\n", ".json": '[{"text": "the right one"}]'}
    data = kinds[Path(name.removesuffix(".gz")).suffix].encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    for other in ("b1.txt", "bx.csv", "a1.csv"):
        (tmp_path / other).write_text("text\nanother\n")
    (found,) = read_documents(str(path), text_column=None, limit=5)
    assert isinstance(found, str)
    assert found.strip() == "the right one"


def test_half_of_a_surrogate_pair_is_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = rows_file(tmp_path / "t.jsonl", {"text": "a \ud800 b"}, {"text": "whole"}, {"messages": TURNS})
    assert read_documents(path, text_column=None, limit=5) == [
        "whole",
        Conversation(turns=(("user", "sun moon"), ("assistant", "red blue"))),
    ]
    assert "half of a surrogate pair (like \\ud800) in 1 row, left out" in caplog.text
    only = rows_file(tmp_path / "only.jsonl", {"text": "a \udfff b"})
    with pytest.raises(OptionError, match="every row has half of a surrogate pair"):
        read_documents(only, text_column=None, limit=5)


def test_rows_without_any_letter_are_called_blank(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "t.jsonl", {"text": " "}, {"text": ""})
    with pytest.raises(OptionError, match="every row is blank; name another text"):
        read_documents(path, text_column=None, limit=5)
