from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline import token_files
from data_pipeline.errors import CorruptShardError, DataError
from data_pipeline.export import export_source
from data_pipeline.shards import ShardedSource, write_source
from data_pipeline.sources import is_token_files, open_source
from data_pipeline.token_files import TokenFileSource, verify_token_files
from data_pipeline.token_formats import llmc
from data_pipeline.tokenizer_backends.bytes import ByteTokenizer
from data_pipeline.tokenizer_backends.characters import CharacterTokenizer
from data_pipeline.tokenizers import load
from launcher import cli

BYTES = ByteTokenizer()
EOS = BYTES.eos_id
CODES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


def write_megatron(prefix: Path, documents: list[list[int]], code: int = 8) -> Path:
    """As Megatron-LM's IndexedDatasetBuilder lays it out."""
    dtype = np.dtype(CODES[code])
    lengths = [len(document) for document in documents]
    starts = np.cumsum([0, *lengths])[:-1]
    flat = np.array([token for document in documents for token in document])
    prefix.with_suffix(".bin").write_bytes(flat.astype(dtype).tobytes())
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code)
    index += struct.pack("<QQ", len(documents), len(documents) + 1)
    index += np.array(lengths, "<i4").tobytes() + (starts * dtype.itemsize).astype("<i8").tobytes()
    index += np.arange(len(documents) + 1, dtype="<i8").tobytes()
    prefix.with_suffix(".idx").write_bytes(index)
    return prefix


def write_llmc(path: Path, tokens: np.ndarray, magic: int = 20240520, version: int = 1) -> Path:
    """As llm.c's dev/data scripts lay it out."""
    header = np.zeros(256, dtype=np.int32)
    header[:3] = magic, version, len(tokens)
    path.write_bytes(header.tobytes() + tokens.astype(np.uint16 if magic == 20240520 else np.uint32).tobytes())
    return path


def words(count: int, seed: int = 0) -> np.ndarray:
    """Bytes with an end of text now and then."""
    tokens = np.random.default_rng(seed).integers(0, 256, count)
    tokens[np.random.default_rng(seed + 1).random(count) < 0.1] = EOS
    return tokens


# --- rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", CODES)
def test_megatron_rows_are_those_of_rwkv_lm(tmp_path: Path, code: int) -> None:
    tokenizer = CharacterTokenizer.learn(["abcdefgh"]) if code in (1, 2) else BYTES
    eos = tokenizer.eos_id
    flat = np.random.default_rng(code).integers(0, eos + 1, 103)
    write_megatron(tmp_path / "data", [flat.tolist()], code)
    source = open_source(tmp_path / "data", 10, tokenizer)
    assert (source.num_rows, source.sequence_length) == (10, 10)
    rows = source.read(np.array([9, 0, 4]))
    for i, row in enumerate((9, 0, 4)):
        dix = flat[row * 10 : row * 10 + 11]  # x = dix[:-1], y = dix[1:] in RWKV-LM's dataset.py
        assert np.array_equal([rows.before[i], *rows.tokens[i, :-1]], dix[:-1])
        assert np.array_equal(rows.tokens[i], dix[1:])
        assert rows.text_bytes[i] == (dix[1:] != eos).sum()
        ends = dix[1:] == eos
        assert np.array_equal(rows.document_ids[i], np.cumsum(ends) - ends)
    assert [part.dtype for part in rows] == [np.int64, np.int32, np.int64, np.int64]
    assert [len(part) for part in source.read([])] == [0, 0, 0, 0]
    with pytest.raises(DataError, match="has rows 0 to 9"):
        source.read([10])


@given(st.integers(2, 12), st.lists(st.integers(0, 60), min_size=1, max_size=5), st.integers(0, 99))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_of_several_files_do_not_cross(
    tmp_path_factory: pytest.TempPathFactory, length: int, counts: list[int], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("files")
    parts = [words(count, seed + i) for i, count in enumerate(counts)]
    for i, part in enumerate(parts):
        write_llmc(folder / f"shard_{i:03d}.bin", part)
    expected = [
        part[start : start + length + 1]
        for part in parts
        for start in range(0, max(0, len(part) - length), length)
    ]  # fmt: skip
    if not expected:
        with pytest.raises(DataError, match="too few for a row"):
            open_source(folder, length, BYTES)
        return
    source = open_source(folder, length, BYTES)
    rows = source.read(range(source.num_rows))
    assert np.array_equal(np.concatenate([rows.before[:, None], rows.tokens], axis=1), expected)


def test_documents_of_llmc_begin_with_their_delimiter(tmp_path: Path) -> None:
    path = write_llmc(tmp_path / "x.bin", np.array([EOS, 1, 2, EOS, 3, EOS, EOS, 4, 5]))
    rows = open_source(path, 4, BYTES).read([0, 1])
    assert rows.tokens.tolist() == [[1, 2, EOS, 3], [EOS, EOS, 4, 5]]
    assert rows.before.tolist() == [EOS, 3]
    assert rows.document_ids.tolist() == [[0, 0, 1, 1], [0, 1, 1, 1]]
    assert rows.text_bytes.tolist() == [3, 2]


def test_the_delimiter_of_llmc_is_what_its_first_document_begins_with(tmp_path: Path) -> None:
    """Files of Llama 3 have its begin of text, whose end of text is another id; here an id without text."""
    tokenizer = load("rwkv-world")
    path = write_llmc(tmp_path / "x.bin", np.array([65530, 10, 65530, 11, 12, 13]), 20240801, 7)
    source = open_source(path, 5, tokenizer)
    assert isinstance(source, TokenFileSource)
    assert (source.delimiter, source.eos_id) == (65530, 0)
    assert source.read([0]).document_ids.tolist() == [[0, 1, 1, 1, 1]]
    inside = write_llmc(tmp_path / "y.bin", np.array([10, 0, 11, 12]))
    source = open_source(inside, 3, tokenizer)
    assert isinstance(source, TokenFileSource)
    assert source.delimiter == 0


def test_a_folder_of_megatron_data_asks_for_the_prefix(tmp_path: Path) -> None:
    write_megatron(tmp_path / "pile", [[*words(40)]])
    refused(tmp_path, r"is a folder with Megatron data: name one of its prefixes, such as .*/pile$")


def test_every_way_to_name_the_files(tmp_path: Path) -> None:
    tokens = words(50)
    write_megatron(tmp_path / "pile_text.document", [tokens.tolist()])  # Path.suffix of the prefix is not empty
    (tmp_path / "pile_text.bin").rename(tmp_path / "pile_text.document.bin")
    (tmp_path / "pile_text.idx").rename(tmp_path / "pile_text.document.idx")
    (tmp_path / "shards").mkdir()
    for i in range(3):
        write_llmc(tmp_path / "shards" / f"fineweb_train_{i:06d}.bin", tokens)
    rows = {
        "pile_text.document": 7,
        "pile_text.document.bin": 7,
        "pile_text.document.idx": 7,
        "shards": 21,
        "shards/fineweb_train_000001.bin": 7,
        "shards/*train*.bin": 21,
        "sh*/fineweb_train_00000[12].bin": 14,
    }
    for name, count in rows.items():
        assert is_token_files(tmp_path / name), name
        assert open_source(str(tmp_path / name), 7, BYTES).num_rows == count, name


def test_built_data_sets_open_alike_and_keep_their_own(tmp_path: Path) -> None:
    write_source(tmp_path / "data", words(60).reshape(6, 10), BYTES)
    assert not is_token_files(tmp_path / "data")
    assert open_source(tmp_path / "data", 10).num_rows == 6
    with pytest.raises(DataError, match="has its own tokenizer: leave the tokenizer out"):
        open_source(tmp_path / "data", None, BYTES)
    with pytest.raises(DataError, match="holds rows of 10 tokens, not of 12"):
        open_source(tmp_path / "data", 12)
    with pytest.raises(DataError, match="does not exist; build it"):
        open_source(tmp_path / "nowhere", 12)


def test_tokenizer_goes_with_the_rows(tmp_path: Path) -> None:
    source = open_source(write_megatron(tmp_path / "data", [[*words(40)]]), 8, BYTES)
    for name, content in source.tokenizer_files().items():
        (tmp_path / "saved").mkdir(exist_ok=True)
        (tmp_path / "saved" / name).write_bytes(content)
    assert load(tmp_path / "saved").fingerprint == BYTES.fingerprint == source.tokenizer_description["fingerprint"]
    assert source.load_tokenizer() is BYTES
    assert source.token_bytes is not None
    assert source.token_bytes.tolist() == [1] * 256 + [0, 0]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are counted in /proc")
def test_threads_share_many_files_with_few_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_files, "_MAX_OPEN_FILES", 2)
    parts = [words(31, i) for i in range(12)]
    for i, part in enumerate(parts):
        write_llmc(tmp_path / f"{i:02d}.bin", part)
    before = len(os.listdir("/proc/self/fd"))
    source = open_source(tmp_path, 10, BYTES)
    expected = np.concatenate([part[1:31].reshape(3, 10) for part in parts])

    def read(seed: int) -> bool:
        wanted = np.random.default_rng(seed).integers(0, 36, 40)
        return np.array_equal(source.read(wanted).tokens, expected[wanted])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(40)))
    assert len(os.listdir("/proc/self/fd")) <= before + 2


# --- mistakes --------------------------------------------------------------------------------------------------


def refused(path: Path, message: str, length: int = 8) -> None:
    with pytest.raises(DataError, match=message) as caught:
        open_source(path, length, BYTES)
    assert "\n" not in str(caught.value)


def test_damaged_megatron_files_are_named(tmp_path: Path) -> None:
    prefix = write_megatron(tmp_path / "data", [[*words(40)], [*words(9)]])
    tokens, index = prefix.with_suffix(".bin"), prefix.with_suffix(".idx")
    good_tokens, good_index = tokens.read_bytes(), index.read_bytes()
    tokens.write_bytes(good_tokens[:-2])
    refused(prefix, r"data\.bin has 96 bytes, and data\.idx describes 98: it is truncated, or belongs to another")
    tokens.write_bytes(good_tokens + b"\0\0")
    refused(prefix, r"data\.bin has 100 bytes, and data\.idx describes 98: it belongs to another index")
    tokens.write_bytes(good_tokens)
    for content, message in (
        (b"XX" + good_index[2:], "data.idx is no Megatron index"),
        (good_index[:20], "header is not complete"),
        (good_index[:-1], "data.idx has 81 bytes, its header describes 82"),
        (good_index[:9] + b"\2" + good_index[10:], "version 2, and only version 1"),
        (good_index[:17] + b"\6" + good_index[18:], r"floating-point numbers, not ids \(type code 6\)"),
        (good_index[:17] + b"\x0c" + good_index[18:], r"an unknown type \(type code 12\)"),
        (good_index[:18] + bytes(8) + bytes(8), "without any sequence"),
    ):
        index.write_bytes(content)
        refused(prefix, message)
    index.unlink()
    refused(tokens, r"data\.bin does not begin like a token file of llm\.c, and data\.idx, which a Megatron")
    refused(prefix, r"data\.idx, which a Megatron data set has, is not beside it: restore")
    tokens.unlink()
    refused(tokens, r"the token file .*data\.bin does not exist")
    index.write_bytes(good_index)
    refused(prefix, r"data\.idx is there without .*data\.bin, which holds the tokens")


def test_an_index_with_modes_is_read(tmp_path: Path) -> None:
    prefix = write_megatron(tmp_path / "data", [[*words(40)], [*words(9)]])
    with open(prefix.with_suffix(".idx"), "ab") as file:
        file.write(b"\0\0")
    assert open_source(prefix, 8, BYTES).num_rows == 6


def test_damaged_llmc_files_are_named(tmp_path: Path) -> None:
    path = write_llmc(tmp_path / "x.bin", words(40))
    good = path.read_bytes()
    for content, message in (
        (good[:-1], r"x\.bin has 1103 bytes, its header describes 1104 \(40 tokens\): it is truncated"),
        (good + b"\0", "it is damaged"),
        (good[:500], "shorter than the header"),
        (good[:4] + b"\3" + good[5:], "magic 20240520 and version 3, a model or a newer format"),
        (struct.pack("<i", 20240326) + good[4:], "magic 20240326 and version 1, a model"),
        (struct.pack("<i", 1) + good[4:], r"x\.bin does not begin like a token file of llm\.c"),
    ):
        path.write_bytes(content)
        refused(path, message)
    write_llmc(tmp_path / "good.bin", words(40))
    refused(tmp_path / "*.bin", r"x\.bin is no token file of llm\.c: it begins with 1 instead of 20240520 or 20240801")
    refused(tmp_path / "*.tok", r"no file matches .*\*\.tok")


def test_a_folder_with_held_out_files_asks_for_a_pattern(tmp_path: Path) -> None:
    for name in ("fineweb_val_000000", "fineweb_train_000001", "fineweb_train_000002"):
        write_llmc(tmp_path / f"{name}.bin", words(40))
    refused(tmp_path, r"holds both training files and held-out ones \(fineweb_val_000000\.bin\): name those")
    assert open_source(tmp_path / "*_train_*.bin", 8, BYTES).num_rows == 8
    for path in tmp_path.glob("*train*"):
        path.unlink()
    assert open_source(tmp_path, 8, BYTES).num_rows == 4


def test_a_folder_leaves_no_damaged_file_out(tmp_path: Path) -> None:
    for i in range(3):
        write_llmc(tmp_path / f"train_{i}.bin", words(40))
    assert open_source(tmp_path, 8, BYTES).num_rows == 12
    (tmp_path / "train_1.bin").write_bytes(b"")
    refused(tmp_path, r"holds files of llm\.c and train_1\.bin, which is none or is damaged")
    (tmp_path / "train_1.bin").write_bytes(bytes(4096))
    refused(tmp_path, r"train_1\.bin, which is none or is damaged")


@pytest.mark.parametrize(
    ("bad", "what"), [(258, "the tokenizer does not have"), (257, "hides tokens and is in no text")]
)
def test_unknown_ids_are_named_at_opening_or_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: int, what: str
) -> None:
    tokens = words(40)
    tokens[13] = bad
    refused(write_llmc(tmp_path / "x.bin", tokens), rf"x\.bin: token 13 is the id {bad}, which {what}: bytes has ids")
    # Large enough that the samples leave token 33,500 out.
    tokens = words(2_200_000)
    tokens[33_500] = bad
    large = write_llmc(tmp_path / "y.bin", tokens)
    refused(large, rf"y\.bin: token 33500 is the id {bad}, which {what}")
    monkeypatch.setattr(token_files, "_SCANNED_BYTES", 4_000_000)
    source = open_source(large, 1000, BYTES)
    assert any("only a sample was looked at" in note for note in source.notes)
    source.read([32, 34])
    with pytest.raises(DataError, match=rf"y\.bin: token 33500 is the id {bad}"):
        source.read([33])
    assert isinstance(source, TokenFileSource)


def test_negative_ids_are_unknown(tmp_path: Path) -> None:
    refused(write_megatron(tmp_path / "x", [[5, -1, *words(30)]], code=4), r"token 1 is the id -1")


def test_ids_too_narrow_for_the_tokenizer_are_named(tmp_path: Path, real_data: Callable[[str], Path]) -> None:
    path = write_llmc(tmp_path / "x.bin", words(40))
    with pytest.raises(DataError, match="ids of type uint16, and qwen ends documents with the id 151643"):
        open_source(path, 8, load(real_data("tok_qwen")))


def test_what_token_files_need_is_asked_for(tmp_path: Path) -> None:
    path = write_llmc(tmp_path / "x.bin", words(40))
    with pytest.raises(DataError, match="tokens and nothing else: give a tokenizer and a sequence length with it"):
        open_source(path)
    with pytest.raises(DataError, match="give a sequence length with it"):
        open_source(path, None, BYTES)
    refused(path, "the sequence length is 1; a row needs at least 2", length=1)
    refused(path, "holds 40 tokens, too few for a row of 40 and the token before it", length=40)
    assert open_source(path, 39, BYTES).num_rows == 1


def test_a_file_that_shrinks_is_an_error(tmp_path: Path) -> None:
    path = write_llmc(tmp_path / "x.bin", words(40))
    source = open_source(path, 8, BYTES)
    os.truncate(path, 1024 + 2 * 20)
    with pytest.raises(
        CorruptShardError, match=r"x\.bin has become shorter: 18 bytes were expected at byte 1056, 8 are"
    ):
        source.read([2])
    assert isinstance(source, TokenFileSource)
    assert verify_token_files(source).problems == [
        f"{path} has become shorter: 18 bytes were expected at byte {1024 + 16 * row}, {there} are there; "
        "restore the file"
        for row, there in ((2, 8), (3, 0))
    ]


def test_files_without_delimiters_are_noted(tmp_path: Path) -> None:
    source = open_source(write_megatron(tmp_path / "x", [[1] * 40]), 8, BYTES)
    (note,) = source.notes
    assert "none of the 40 tokens looked at is 256" in note
    assert open_source(write_megatron(tmp_path / "y", [[*words(40)]]), 8, BYTES).notes == ()


# --- fingerprint -----------------------------------------------------------------------------------------------


def test_the_fingerprint_is_of_content_and_not_of_names(tmp_path: Path) -> None:
    tokens = words(300_000)
    path = write_llmc(tmp_path / "a.bin", tokens)
    first = open_source(path, 8, BYTES).fingerprint
    path.rename(tmp_path / "b.bin")
    assert open_source(tmp_path / "b.bin", 8, BYTES).fingerprint == first
    others = {
        "length": open_source(tmp_path / "b.bin", 9, BYTES).fingerprint,
        "tokenizer": open_source(tmp_path / "b.bin", 8, CharacterTokenizer(list(range(300)))).fingerprint,
        "type": open_source(write_llmc(tmp_path / "c.bin", tokens, 20240801, 7), 8, BYTES).fingerprint,
        "format": open_source(write_megatron(tmp_path / "d", [[*tokens]]), 8, BYTES).fingerprint,
        "size": open_source(write_llmc(tmp_path / "e.bin", tokens[:-1]), 8, BYTES).fingerprint,
    }
    for place in (0, 150_000, 299_999):
        changed = tokens.copy()
        changed[place] ^= 1
        others[f"token {place}"] = open_source(write_llmc(tmp_path / "f.bin", changed), 8, BYTES).fingerprint
    assert len({first, *others.values()}) == 1 + len(others)


def test_the_sampled_blocks_cover_small_files_and_the_ends_of_large_ones() -> None:
    def blocks(tokens: int, count: int) -> list[tuple[int, int]]:
        return token_files._blocks(token_files.TokenFile(Path("x"), 0, np.dtype("<u2"), tokens), count)

    assert blocks(64 * 32768, 64) == [(0, 64 * 32768)]
    large = blocks(10**12, 64)
    assert len(large) == 64
    assert large[0] == (0, 32768)
    assert large[-1] == (10**12 - 32768, 32768)
    assert all(start < later for (start, _), (later, _) in pairwise(large))
    assert blocks(65537, 2) == [(0, 32768), (32769, 32768)]


# --- export ----------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=20), min_size=1, max_size=6), st.integers(3, 9))
@settings(max_examples=40)
@pytest.mark.parametrize("form", ["megatron", "llmc"])
def test_exported_documents_come_back(
    tmp_path_factory: pytest.TempPathFactory, form: str, documents: list[list[int]], length: int
) -> None:
    folder = tmp_path_factory.mktemp("export")
    stream = [token for document in documents for token in [*document, EOS]]
    stream = stream[: max(1, len(stream) // length) * length]  # rows from memory may end within a document
    stream += [7] * (-len(stream) % length)
    write_source(folder / "data", np.array(stream).reshape(-1, length), BYTES)
    summary = export_source(ShardedSource.open(folder / "data"), form, folder / "out" / "x.bin")
    ended = stream if stream[-1] == EOS else [*stream, EOS]
    expected = ended if form == "megatron" else [EOS, *ended[:-1]]
    assert (summary.tokens, summary.documents) == (len(ended), ended.count(EOS))
    raw = np.fromfile(folder / "out" / "x.bin", dtype="<u2", offset=0 if form == "megatron" else 1024)
    assert raw.tolist() == expected
    source = open_source(folder / "out" / "x", len(expected) - 1, BYTES)
    rows = source.read([0])
    assert [rows.before[0], *rows.tokens[0]] == expected


def test_export_of_a_built_data_set_leaves_the_repeated_tokens_out(tmp_path: Path) -> None:
    from data_pipeline.build import BuildOptions, build_dataset

    (tmp_path / "in.jsonl").write_text('{"text": "first"}\n{"text": "second one"}\n')
    build_dataset(BuildOptions((str(tmp_path / "in.jsonl"),), str(tmp_path / "data"), "bytes", 8))
    source = ShardedSource.open(tmp_path / "data")
    assert source.index.repeated_tokens == 7
    summary = export_source(source, "megatron", tmp_path / "x")
    assert summary.files == [str(tmp_path / "x.bin"), str(tmp_path / "x.idx")]
    assert np.fromfile(tmp_path / "x.bin", dtype="<u2").tolist() == [*b"first", EOS, *b"second one", EOS]
    index = (tmp_path / "x.idx").read_bytes()
    assert struct.unpack("<9sQBQQ", index[:34]) == (b"MMIDIDX\0\0", 1, 8, 2, 3)
    assert struct.unpack("<2i2q3q", index[34:]) == (6, 11, 0, 12, 0, 1, 2)
    with pytest.raises(DataError, match=r"x\.bin exists; name another --output"):
        export_source(source, "llmc", tmp_path / "x")


def test_wide_vocabularies_are_exported_wide(tmp_path: Path) -> None:
    tokenizer = CharacterTokenizer(list(range(0x10000, 0x10000 + 66_000)))
    rows = np.arange(66_000).reshape(10, 6600)
    write_source(tmp_path / "data", rows, tokenizer)
    for form, offset, dtype in (("megatron", 0, "<i4"), ("llmc", 1024, "<u4")):
        export_source(ShardedSource.open(tmp_path / "data"), form, tmp_path / form)
        raw = np.fromfile(tmp_path / f"{form}.bin", dtype=dtype, offset=offset)
        expected = [*range(66_000), 66_000] if form == "megatron" else [66_000, *range(66_000)]
        assert raw.tolist() == expected
        assert open_source(tmp_path / form, 66_000, tokenizer).num_rows == 1


def test_more_tokens_than_a_header_can_count_go_to_several_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llmc, "_MAX_TOKENS", 25)
    rows = words(60).reshape(6, 10)
    rows[-1, -1] = EOS
    write_source(tmp_path / "data", rows, BYTES)
    summary = export_source(ShardedSource.open(tmp_path / "data"), "llmc", tmp_path / "out" / "x")
    assert [Path(file).name for file in summary.files] == ["x_000000.bin", "x_000001.bin", "x_000002.bin"]
    raw = [np.fromfile(file, dtype="<u2", offset=1024) for file in summary.files]
    assert np.concatenate(raw).tolist() == [EOS, *rows.reshape(-1)[:-1]]
    assert [len(part) for part in raw] == [25, 25, 10]
    assert open_source(tmp_path / "out", 8, BYTES).num_rows == 3 + 3 + 1


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = words(60).reshape(6, 10)
    rows[-1, -1] = EOS
    write_source(tmp_path / "data", rows, BYTES)
    prefix = str(tmp_path / "out" / "x")
    assert cli.main(["data", "export", str(tmp_path / "data"), "--to", "megatron", "--output", prefix]) == 0
    assert f"{prefix}.idx: 60 tokens in {(rows == EOS).sum()} documents" in capsys.readouterr().out
    given = ["--tokenizer", "bytes", "--sequence-length", "9"]
    assert cli.main(["data", "inspect", prefix, *given, "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    expected = {"format": "megatron", "rows": 6, "tokens": 60, "cubic_prime": 5, "dtype": "uint16", "delimiter": EOS}
    assert expected.items() <= described.items()
    assert cli.main(["data", "inspect", prefix, *given]) == 0
    assert described["fingerprint"][:16] in capsys.readouterr().out
    assert cli.main(["data", "show", prefix, *given, "--row", "1", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    flat = rows.reshape(-1).tolist()
    assert (shown["before"], shown["tokens"]) == (flat[9], flat[10:19])
    assert cli.main(["data", "verify", prefix, *given]) == 0
    assert "6 rows in 1 shards: all intact" in capsys.readouterr().out
    assert cli.main(["data", "verify", prefix]) == 2
    assert "give a tokenizer and a sequence length" in capsys.readouterr().err
    assert cli.main(["data", "show", str(tmp_path / "data"), *given, "--row", "1"]) == 2
    assert "--tokenizer and --sequence-length are for token files" in capsys.readouterr().err
