import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastdiff.data import PromptFileError, read_prompts


def test_text_lines_keep_unicode_and_lose_only_their_ends(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffa red apple\r\nein Käse \u2028 am Stück\nlast".encode())
    assert read_prompts(path) == ["a red apple", "ein Käse \u2028 am Stück", "last"]


@pytest.mark.parametrize("field", ["prompt", "text", "caption"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_json_lines_find_their_field(tmp_path, field, suffix):
    path = tmp_path / f"p{suffix}"
    path.write_text("".join(json.dumps({"id": i, field: f"prompt {i}"}) + "\n" for i in range(3)))
    assert read_prompts(path) == ["prompt 0", "prompt 1", "prompt 2"]


def test_a_named_column_wins_over_the_defaults(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "no", "long": "yes"}\n')
    assert read_prompts(path, "long") == ["yes"]
    pq.write_table(pa.table({"prompt": ["no"], "long": ["yes"]}), tmp_path / "p.parquet")
    assert read_prompts(tmp_path / "p.parquet", "long") == ["yes"]
    assert read_prompts(tmp_path / "p.parquet") == ["no"]


def test_a_folder_is_read_in_the_order_of_names(tmp_path):
    (tmp_path / "b.txt").write_text("three\n")
    (tmp_path / "a.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    (tmp_path / "notes.md").write_text("not a prompt")
    assert read_prompts(tmp_path) == ["one", "two", "three"]


@pytest.mark.parametrize(
    "name, text",
    [
        ("p.txt", "one\n\n   \ntwo\n"),
        ("p.jsonl", '{"prompt": "one"}\n\n{"prompt": null}\n{"prompt": "two"}\n'),
    ],
)
def test_blank_prompts_are_counted_and_named(tmp_path, caplog, name, text):
    (tmp_path / name).write_text(text)
    with caplog.at_level(logging.WARNING):
        assert read_prompts(tmp_path / name) == ["one", "two"]
    assert "2 of 4 prompts are blank" in caplog.text
    assert "lines 2, 3" in caplog.text


def test_no_warning_without_blanks(tmp_path, caplog):
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    read_prompts(tmp_path / "p.txt")
    assert not caplog.records


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("p.txt", b"", "holds no prompt"),
        ("p.txt", b"\n\n", "2 blank lines"),
        ("p.jsonl", b"\n", "holds no prompt"),
        ("p.txt", b"ok\n\xff\xfe\n", r"not UTF-8 \(line 2, byte 3\)"),
        ("p.jsonl", b'{"prompt": "a"}\n{oops\n', "line 2 is not JSON"),
        ("p.jsonl", b'["a", "b"]\n', "line 1 is a list"),
        ("p.jsonl", b'{"title": "a"}\n', "no column one of prompt, text, caption: it has title"),
        ("p.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', "line 2 has no field 'prompt'"),
        ("p.jsonl", b'{"prompt": 3}\n', "must be a string, got int"),
        ("p.parquet", b"PAR1 not really", "not a readable parquet"),
        ("p.csv", b"prompt\na\n", "not a prompt file"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path, name, data, message):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(PromptFileError, match=message) as caught:
        read_prompts(path)
    assert str(path) in str(caught.value)


def test_missing_things(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_prompts(tmp_path / "nowhere.txt")
    with pytest.raises(PromptFileError, match="no prompt file"):
        read_prompts(tmp_path)
    pq.write_table(pa.table({"title": ["a"]}), tmp_path / "p.parquet")
    with pytest.raises(PromptFileError, match="has no column 'prompt': it has title"):
        read_prompts(tmp_path / "p.parquet", "prompt")
