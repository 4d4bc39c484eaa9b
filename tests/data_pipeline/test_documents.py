from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.documents import (
    BadRecord,
    Document,
    ReadOptions,
    find_files,
    format_of,
    name_of,
    pieces_of,
    read_piece,
)
from data_pipeline.errors import DataError


def read_all(
    path: Path, piece_bytes: int = 1 << 20, form: str = "auto", options: ReadOptions | None = None
) -> list[Document | BadRecord]:
    pieces = pieces_of([path], form, piece_bytes)
    return [record for piece in pieces for record in read_piece(piece, options or ReadOptions())]


def texts_of(records: list[Document | BadRecord]) -> list[str]:
    assert all(isinstance(record, Document) for record in records), records
    return [record.text for record in records if isinstance(record, Document)]


def lines(*texts: str) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jsonl", "jsonl"),
        ("A.JSONL.GZ", "jsonl"),
        ("a.ndjson.zst", "jsonl"),
        ("a.txt", "text"),
        ("a.py", "text"),
        ("README", "text"),
    ],
)
def test_format_is_found_by_suffix(name: str, expected: str) -> None:
    assert format_of(Path(name), "auto").name == expected
    assert format_of(Path(name), "text").name == "text"


def test_unknown_format_is_refused() -> None:
    with pytest.raises(DataError, match="'parquet' is no input format; known: auto, text, jsonl"):
        format_of(Path("a"), "parquet")


@given(
    texts=st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20), max_size=12),
    piece_bytes=st.integers(1, 200),
    last_newline=st.booleans(),
)
def test_pieces_of_a_jsonl_own_each_line_once(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], piece_bytes: int, last_newline: bool
) -> None:
    path = tmp_path_factory.mktemp("pieces") / "a.jsonl"
    content = lines(*texts)
    path.write_bytes(content if last_newline else content[:-1])
    assert texts_of(read_all(path, piece_bytes)) == texts


def test_compressed_files_with_several_members_are_read_to_the_end(tmp_path: Path) -> None:
    first, second = lines("one", "two"), lines("three" * 100_000)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(first) + gzip.compress(second))
    compress = zstandard.ZstdCompressor().compress
    (tmp_path / "a.jsonl.zst").write_bytes(compress(first) + compress(second))
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        assert texts_of(read_all(tmp_path / name)) == ["one", "two", "three" * 100_000]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("keep", [0.3, 0.6, 0.99])
def test_truncated_compressed_file_is_an_error_with_its_name(tmp_path: Path, suffix: str, keep: float) -> None:
    content = lines(*(f"{i * 7919 % 10007}" for i in range(5000)))
    whole = gzip.compress(content) if suffix == "gz" else zstandard.ZstdCompressor().compress(content)
    path = tmp_path / f"cut.jsonl.{suffix}"
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(DataError, match=rf"cut\.jsonl\.{suffix} is truncated or damaged"):
        read_all(path)


def test_file_that_is_not_compressed_is_an_error_with_its_name(tmp_path: Path) -> None:
    for suffix in ("gz", "zst"):
        (tmp_path / f"plain.jsonl.{suffix}").write_bytes(lines("one"))
        with pytest.raises(DataError, match=rf"plain\.jsonl\.{suffix} is truncated or damaged"):
            read_all(tmp_path / f"plain.jsonl.{suffix}")


def test_bad_lines_keep_their_place_and_say_why(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        lines("good")
        + b"{broken\n"
        + b'["a list"]\n'
        + b'{"body": "x"}\n'
        + b'{"text": 7}\n'
        + b"\n"
        + b'{"text": "\xff"}\n'
        + b'{"text": "\\ud800"}\n'
        + lines("good too")
    )
    records = read_all(path)
    assert [record.place for record in records] == [1, 2, 3, 4, 5, 7, 8, 9]
    reasons = [record.reason for record in records if isinstance(record, BadRecord)]
    expected = ["not JSON", "but a list", "no key 'text', only 'body'", "but a int", "not UTF-8", "surrogate"]
    assert len(reasons) == len(expected)
    assert all(part in reason for part, reason in zip(expected, reasons, strict=True)), reasons


def test_text_key_is_chosen(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x", "text": "y"}\n')
    assert texts_of(read_all(tmp_path / "a.jsonl", options=ReadOptions(text_key="body"))) == ["x"]


def test_documents_are_named_by_their_line_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(*(f"document {i}" for i in range(1, 40))))
    seen = []
    for piece in pieces_of([path], "auto", 50):
        for record in read_piece(piece, ReadOptions()):
            assert isinstance(record, Document)
            seen.append(name_of(piece, record.place) == f"{path}, line {record.text.split()[1]}")
    assert seen == [True] * 39


def test_text_file_is_one_document_unchanged(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("one\r\ntwo\n\u00e9".encode())
    assert texts_of(read_all(tmp_path / "a.txt")) == ["one\r\ntwo\n\u00e9"]


@given(st.lists(st.sampled_from(["= A =\n", "= B =\n", "body\n", "\n"]), max_size=12))
def test_splitting_a_text_loses_nothing(tmp_path_factory: pytest.TempPathFactory, parts: list[str]) -> None:
    path = tmp_path_factory.mktemp("split") / "a.txt"
    path.write_text("".join(parts))
    documents = texts_of(read_all(path, options=ReadOptions(split_text_at="^= ")))
    assert "".join(documents) == "".join(parts)
    assert all(not document.startswith("= ", 1) and "\n= " not in document for document in documents)


def test_text_that_is_not_utf8_is_a_bad_record(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    assert read_all(tmp_path / "a.txt") == [BadRecord(1, "not UTF-8 at byte 3 (unexpected end of data)")]


def test_folders_give_their_files_in_order_of_names(tmp_path: Path) -> None:
    for name in ("b.py", "a/z.py", "a/c.txt", "a/skip/d.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    found = find_files([str(tmp_path)], include=["*.py"], exclude=["a/skip/*"])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["a/z.py", "b.py"]
    assert len(find_files([str(tmp_path)])) == 4


def test_missing_and_empty_inputs_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        find_files([str(tmp_path / "nowhere")])
    with pytest.raises(DataError, match=r"holds no file that matches \*\.py"):
        find_files([str(tmp_path)], include=["*.py"])
    with pytest.raises(DataError, match="no input was given"):
        find_files([])
