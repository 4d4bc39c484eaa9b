from __future__ import annotations

import gc
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data_pipeline import shards
from data_pipeline.errors import CorruptShardError, DataError
from data_pipeline.files import read_json, write_json
from data_pipeline.shard_file import idx_size
from data_pipeline.shards import ShardedSource, SourceIndex, verify, write_source
from data_pipeline.tokenizer_backends.bytes import ByteTokenizer
from data_pipeline.tokenizer_backends.characters import CharacterTokenizer

ROWS, LENGTH, PER_SHARD = 23, 40, 10


@pytest.fixture
def rows() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 257, (ROWS, LENGTH))


@pytest.fixture
def folder(tmp_path: Path, rows: np.ndarray) -> Path:
    write_source(tmp_path / "source", rows, ByteTokenizer(), rows_per_shard=PER_SHARD)
    return tmp_path / "source"


def test_rows_come_back_in_any_order(folder: Path, rows: np.ndarray) -> None:
    source = ShardedSource.open(folder)
    assert (source.num_rows, source.sequence_length, source.dtype) == (ROWS, LENGTH, np.uint16)
    assert (source.vocab_size, source.eos_id, source.mask_id) == (258, 256, 257)
    wanted = np.array([22, 0, 9, 10, 19, 20, 9])
    tokens, documents, text_bytes, before = source.read(wanted)
    assert np.array_equal(tokens, rows[wanted])
    assert [part.dtype for part in (tokens, documents, text_bytes, before)] == [np.int64, np.int32, np.int64, np.int64]
    assert before.tolist() == [256 if row == 0 else rows[row - 1, -1] for row in wanted]
    assert np.array_equal(text_bytes, (rows[wanted] != 256).sum(axis=1))
    starts = np.diff(documents, axis=1, prepend=0)
    assert np.array_equal(starts[:, 1:], (tokens[:, :-1] == 256).astype(int))
    assert [len(part) for part in source.read([])] == [0, 0, 0, 0]


def test_webdataset_reads_the_tars_unchanged(folder: Path, rows: np.ndarray) -> None:
    tars = sorted(str(path) for path in folder.glob("*.tar"))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [f"{i:012d}" for i in range(ROWS)]
    assert all(sample["npy"].dtype == np.uint16 for sample in samples)
    assert np.array_equal(np.stack([sample["npy"] for sample in samples]), rows)


def test_tars_are_plain_ustar_without_time_or_person(folder: Path) -> None:
    with tarfile.open(folder / "train-000000.tar") as tar:
        members = tar.getmembers()
    assert len(members) == PER_SHARD
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {
        (0, 0, 0, "bigdata", "bigdata", 0o444)
    }
    assert all(member.pax_headers == {} for member in members)


def test_wide_vocabularies_get_wide_tokens(tmp_path: Path) -> None:
    tokenizer = CharacterTokenizer(list(range(0x10000, 0x10000 + 66_000)))
    rows = np.arange(66_000).reshape(10, 6600)
    write_source(tmp_path, rows, tokenizer)
    source = ShardedSource.open(tmp_path)
    assert source.dtype == np.uint32
    assert np.array_equal(source.read(range(10)).tokens, rows)
    assert source.read([7]).before.tolist() == [rows[6, -1]]
    assert shards.row_dtype(65536) == np.uint16


def test_a_row_that_holds_the_mask_id_is_refused(tmp_path: Path, rows: np.ndarray) -> None:
    rows[14, 3] = ByteTokenizer().mask_id
    write_source(tmp_path / "source", rows, ByteTokenizer(), rows_per_shard=PER_SHARD)
    source = ShardedSource.open(tmp_path / "source")
    assert np.array_equal(source.read([2, 13]).tokens, rows[[2, 13]])
    with pytest.raises(DataError, match="row 14 holds the id 257, which bytes has for the mask and no text may have"):
        source.read([2, 14])


def test_a_damaged_token_before_a_row_is_found_where_it_is_no_id(folder: Path) -> None:
    flip(folder / "train-000001.tar", 3 * 1024 + 640 + 2 * LENGTH - 1)  # the high byte of the last token of row 13
    source = ShardedSource.open(folder)
    source.read([12, 15])
    with pytest.raises(CorruptShardError, match="row 13 ends with the id"):
        source.read([14])


def test_same_rows_give_same_bytes_and_fingerprint(folder: Path, tmp_path: Path, rows: np.ndarray) -> None:
    write_source(tmp_path / "again", rows, ByteTokenizer(), rows_per_shard=PER_SHARD)
    for path in folder.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(folder)).read_bytes(), path
    rows[3, 3] += 1
    other = write_source(tmp_path / "other", rows, ByteTokenizer(), rows_per_shard=PER_SHARD)
    assert SourceIndex.read(folder).fingerprint != other.computed_fingerprint()


def test_fingerprint_is_not_of_names(folder: Path) -> None:
    index = read_json(folder / "index.json")
    index["shards"][0]["tar"] = "renamed.tar"
    write_json(folder / "index.json", index)
    (folder / "train-000000.tar").rename(folder / "renamed.tar")
    assert verify(folder).problems == []


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def test_flipped_payload_is_named_when_read(folder: Path) -> None:
    # Row 13 is row 3 of the second shard; headers take 640 bytes, the payload starts behind them.
    flip(folder / "train-000001.tar", 3 * 1024 + 640 + 7)
    source = ShardedSource.open(folder)
    source.read([12, 14])
    message = r"train-000001\.tar: row 13 \(row 3 of the shard, at byte 3712\) is corrupt: the checksum"
    with pytest.raises(CorruptShardError, match=message):
        source.read([12, 13])
    assert any("train-000001.tar: row 13" in problem for problem in verify(folder).problems)


@pytest.mark.parametrize("at", [2, 130, 155, 512 + 20])
def test_flipped_header_is_found_by_verify(folder: Path, at: int) -> None:
    flip(folder / "train-000000.tar", 4 * 1024 + at)
    problems = verify(folder).problems
    assert any("train-000000.tar is not the file that was written" in problem for problem in problems)
    assert any("train-000000.tar: row 4 at byte 4096" in problem for problem in problems)


@pytest.mark.parametrize("what", ["offset", "checksum", "text bytes"])
def test_flipped_sidecar_is_named_when_read(folder: Path, what: str) -> None:
    start = {"offset": 64 + 8 * 2, "checksum": 64 + 8 * PER_SHARD + 8, "text bytes": 64 + 12 * PER_SHARD + 8}
    flip(folder / "train-000000.idx", start[what])
    with pytest.raises(CorruptShardError, match=r"train-000000\.tar: row 2 .* restore train-000000\.tar and"):
        ShardedSource.open(folder).read([0, 1, 2])
    assert any("train-000000.idx is not the file" in problem for problem in verify(folder).problems)


def test_flipped_sidecar_header_is_named_when_read(folder: Path) -> None:
    flip(folder / "train-000002.idx", 20)
    with pytest.raises(CorruptShardError, match=r"train-000002\.idx is damaged or belongs to another shard"):
        ShardedSource.open(folder).read([20])


def test_offset_far_outside_the_file_is_named(folder: Path) -> None:
    with open(folder / "train-000000.idx", "r+b") as file:
        file.seek(64)
        file.write(b"\xff" * 8)
    with pytest.raises(CorruptShardError, match="row 0"):
        ShardedSource.open(folder).read([0])
    assert any("row 0" in problem for problem in verify(folder).problems)


@pytest.mark.parametrize("name", ["train-000001.tar", "train-000001.idx"])
def test_truncated_or_missing_files_are_named_at_opening(folder: Path, name: str) -> None:
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-100])
    with pytest.raises(CorruptShardError, match=rf"{name} has {len(whole) - 100} bytes where {len(whole)} were"):
        ShardedSource.open(folder)
    assert any(name in problem for problem in verify(folder).problems)
    (folder / name).unlink()
    with pytest.raises(CorruptShardError, match=rf"{name} cannot be found"):
        ShardedSource.open(folder)
    assert any(name in problem for problem in verify(folder).problems)


def test_file_truncated_after_opening_is_named(folder: Path) -> None:
    source = ShardedSource.open(folder)
    os.truncate(folder / "train-000001.tar", 2048)
    with pytest.raises(CorruptShardError, match=r"train-000001\.tar: row 19 .* only 0 of 80 bytes"):
        source.read([19])


def test_shards_that_changed_places_are_noticed(folder: Path) -> None:
    for suffix in ("tar", "idx"):
        one, two = folder / f"train-000000.{suffix}", folder / f"train-000001.{suffix}"
        one.rename(folder / "aside")
        two.rename(one)
        (folder / "aside").rename(two)
    with pytest.raises(CorruptShardError, match=r"train-000000\.tar: row 0"):
        ShardedSource.open(folder).read([0])


def test_changed_index_is_refused(folder: Path) -> None:
    index = read_json(folder / "index.json")
    write_json(folder / "index.json", index | {"num_rows": 22})
    with pytest.raises(DataError, match=r"index\.json was changed after it was written"):
        ShardedSource.open(folder)
    assert any("was changed" in problem for problem in verify(folder).problems)
    write_json(folder / "index.json", index | {"format_version": 2})
    with pytest.raises(DataError, match="has format version 2"):
        ShardedSource.open(folder)
    (folder / "index.json").write_text("{")
    with pytest.raises(DataError, match="is damaged: it is no valid JSON"):
        ShardedSource.open(folder)


def test_what_is_no_data_set_is_refused(tmp_path: Path, rows: np.ndarray) -> None:
    with pytest.raises(DataError, match="does not exist; build it"):
        ShardedSource.open(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no finished data set"):
        ShardedSource.open(tmp_path)
    write_source(tmp_path / "train", rows, ByteTokenizer())
    assert ShardedSource.open(tmp_path).num_rows == ROWS
    write_source(tmp_path / "validation", rows, ByteTokenizer(), split="validation")
    with pytest.raises(DataError, match=r"holds 2 splits; name one of them: .*train or .*validation"):
        ShardedSource.open(tmp_path)


def test_rows_outside_are_refused(folder: Path) -> None:
    for outside in ([ROWS], [-1]):
        with pytest.raises(DataError, match="has rows 0 to 22"):
            ShardedSource.open(folder).read(outside)


def test_tokenizer_travels_with_the_rows(folder: Path) -> None:
    source = ShardedSource.open(folder)
    assert source.load_tokenizer().fingerprint == ByteTokenizer().fingerprint
    assert source.token_bytes is not None
    assert source.token_bytes.tolist() == [1] * 256 + [0, 0]
    CharacterTokenizer.learn(["abc"]).save(folder / "tokenizer")
    with pytest.raises(DataError, match="is not the one that made the rows"):
        ShardedSource.open(folder).load_tokenizer()


@pytest.fixture
def few_open_shards(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(shards, "_MAX_OPEN_SHARDS", 2)
    return 2


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are counted in /proc")
def test_threads_share_a_source_with_few_open_files(tmp_path: Path, rows: np.ndarray, few_open_shards: int) -> None:
    write_source(tmp_path, rows, ByteTokenizer(), rows_per_shard=1)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    sources = [ShardedSource.open(tmp_path)]

    def read(seed: int) -> bool:
        wanted = np.random.default_rng(seed).integers(0, ROWS, 40)
        return np.array_equal(sources[0].read(wanted).tokens, rows[wanted])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(40)))
    gc.collect()
    # A shard holds its tar and the descriptor of its mapped sidecar.
    assert len(os.listdir("/proc/self/fd")) <= before + 2 * few_open_shards
    sources.clear()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_sidecar_has_the_documented_size(folder: Path) -> None:
    assert (folder / "train-000002.idx").stat().st_size == idx_size(3) == 64 + 16 * 3
