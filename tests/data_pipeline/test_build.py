from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import build, tokenizers
from data_pipeline.build import BuildOptions, BuildSummary, build_dataset
from data_pipeline.errors import DataError
from data_pipeline.shards import ShardedSource, verify
from data_pipeline.work_units import document_hash
from launcher.data_commands import add_data_commands
from tests.data_pipeline.killed_builds import build_until_killed

TEXTS = [f"document {i}: " + "lorem ipsum \u00e9 \u4e16\u754c " * (i % 7) for i in range(60)]


def jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture
def options(tmp_path: Path) -> BuildOptions:
    """Small units and shards, so that there are several of each."""
    return BuildOptions(
        inputs=(str(jsonl(tmp_path / "input" / "a.jsonl", TEXTS)),),
        output=str(tmp_path / "out"),
        tokenizer="bytes",
        sequence_length=64,
        validation_fraction=0.2,
        rows_per_shard=20,
        unit_bytes=1500,
    )


def contents(folder: str | Path) -> dict[str, bytes]:
    found = {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
    assert "build.json" in found
    return found


def documents_of(folder: Path) -> list[str]:
    """The texts of a source, from its rows."""
    source = ShardedSource.open(folder)
    tokens = source.read(np.arange(source.num_rows)).tokens.reshape(-1)
    stored = tokens[: len(tokens) - source.index.repeated_tokens]
    pieces = np.split(stored, np.flatnonzero(stored == source.eos_id) + 1)
    assert len(pieces[-1]) == 0
    tokenizer = source.load_tokenizer()
    return [tokenizer.decode(piece[:-1]) for piece in pieces[:-1]]


def test_every_document_is_in_one_split_in_order(options: BuildOptions) -> None:
    summary = build_dataset(options)
    train, validation = (documents_of(Path(options.output) / split) for split in ("train", "validation"))
    held_out = [document_hash(text) < 0.2 * 2**64 for text in TEXTS]
    assert train == [text for text, out in zip(TEXTS, held_out, strict=True) if not out]
    assert validation == [text for text, out in zip(TEXTS, held_out, strict=True) if out]
    assert len(validation) > 0
    assert verify(options.output).problems == []
    assert not (Path(options.output) / ".build").exists()
    counted = summary.splits["train"]
    assert counted.documents == len(train)
    assert counted.tokens == sum(len(text.encode()) + 1 for text in train)
    assert counted.rows * 64 == counted.tokens + counted.repeated_tokens
    assert counted.shards == -(-counted.rows // 20) > 2
    source = ShardedSource.open(Path(options.output) / "train")
    assert source.read(range(source.num_rows)).text_bytes.sum() == counted.text_bytes == source.index.text_bytes


@pytest.mark.parametrize("tokenizer", ["bytes", "characters"])
def test_same_bytes_from_any_number_of_workers_and_any_units(options: BuildOptions, tokenizer: str) -> None:
    options = replace(options, tokenizer=tokenizer)
    build_dataset(options)
    build_dataset(replace(options, output=options.output + "-again"))
    assert contents(options.output) == contents(options.output + "-again")
    build_dataset(replace(options, output=options.output + "-2", workers=2))
    assert contents(options.output) == contents(options.output + "-2")
    build_dataset(replace(options, output=options.output + "-other", unit_bytes=10**6))
    one, other = contents(options.output), contents(options.output + "-other")
    del one["build.json"], other["build.json"]  # It records the options.
    assert one == other


def test_finished_build_is_recognised_and_another_is_refused(
    options: BuildOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build_dataset(options)
    before = contents(options.output)
    with monkeypatch.context() as patched:
        patched.setattr(build, "_build", lambda *_: pytest.fail("a finished build was done again"))
        again = build_dataset(replace(options, workers=2))
    assert again == replace(first, already_built=True)
    with pytest.raises(DataError, match="finished build with other options: sequence_length is 64 there, 32 now"):
        build_dataset(replace(options, sequence_length=32))
    jsonl(tmp_path / "input" / "a.jsonl", [*TEXTS, "one more"])
    with pytest.raises(DataError, match=r"the input files \(other names, sizes or times\)"):
        build_dataset(options)
    assert contents(options.output) == before


def test_build_killed_at_any_rename_finishes_with_the_same_bytes(options: BuildOptions) -> None:
    options = replace(options, unit_bytes=4000, tokenizer="characters")
    build_dataset(options)
    expected = contents(options.output)
    at_rename, killed = 1, True
    while killed:
        attempt = replace(options, output=f"{options.output}-{at_rename}")
        killed = build_until_killed(attempt, at_rename)
        assert build_dataset(attempt).already_built != killed
        assert contents(attempt.output) == expected, at_rename
        at_rename += 1
    assert at_rename > 20


def test_build_killed_again_and_again_gets_on(options: BuildOptions) -> None:
    build_dataset(replace(options, output=options.output + "-whole"))
    kills = 0
    while build_until_killed(options, at_rename=6):
        kills += 1
        assert kills < 100
    assert kills > 3
    assert contents(options.output) == contents(options.output + "-whole")


def test_restart_does_not_redo_finished_work(options: BuildOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build_until_killed(options, at_rename=26)
    scratch = Path(options.output) / ".build"
    done = {path.stem for path in scratch.glob("*.json")} - {"plan"}
    assert any(name.startswith("train-") for name in done), done
    redone: list[str] = []
    for name in ("tokenise_unit", "pack_shard"):
        function = getattr(build, name)

        def noted(task, function=function):  # type: ignore[no-untyped-def]
            redone.append(f"unit-{task.unit.number:06d}" if hasattr(task, "unit") else task.stem)
            return function(task)

        monkeypatch.setattr(build, name, noted)
    build_dataset(options)
    assert redone
    assert not done & set(redone)


_PARALLEL_BUILD = """
import sys
from data_pipeline.build import BuildOptions, build_dataset
if __name__ == "__main__":
    build_dataset(BuildOptions(inputs=(sys.argv[1],), output=sys.argv[2], tokenizer="bytes", sequence_length=64,
                               workers=2, unit_bytes=200_000, rows_per_shard=500))
"""


def test_parallel_build_killed_from_outside_finishes_with_the_same_bytes(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [f"{i} " * 400 for i in range(1000)])
    script = tmp_path / "parallel_build.py"
    script.write_text(_PARALLEL_BUILD)
    output = tmp_path / "out"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(script), str(source), str(output)]
    running = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(output.glob(".build/unit-*.json")):
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    running.kill()
    running.wait()
    assert not (output / "build.json").exists()
    options = BuildOptions(
        inputs=(str(source),),
        output=str(output),
        tokenizer="bytes",
        sequence_length=64,
        unit_bytes=200_000,
        rows_per_shard=500,
    )
    build_dataset(options)
    build_dataset(replace(options, output=str(tmp_path / "whole")))
    assert contents(output) == contents(tmp_path / "whole")


def test_unfinished_build_with_other_options_is_refused(options: BuildOptions) -> None:
    assert build_until_killed(options, at_rename=10)
    with pytest.raises(DataError, match=r"unfinished build with other options: tokenizer is bytes .* rwkv-world"):
        build_dataset(replace(options, tokenizer="rwkv-world"))
    with pytest.raises(DataError, match=r"holds no finished data set .* start the same `dlm data build` again"):
        ShardedSource.open(options.output)


def test_two_builds_of_one_folder_do_not_meet(options: BuildOptions) -> None:
    assert build_until_killed(options, at_rename=10)
    with (
        build._lock(Path(options.output) / ".build"),
        pytest.raises(DataError, match="another build is writing to"),
    ):
        build_dataset(options)


def test_bad_records_are_counted_and_listed(options: BuildOptions, tmp_path: Path) -> None:
    source = tmp_path / "input" / "a.jsonl"
    good = source.read_text(encoding="utf-8").splitlines()
    source.write_text("\n".join([*good[:30], "{broken", *good[30:], '{"text": ""}', '{"body": 1}']) + "\n")
    (tmp_path / "input" / "b.txt").write_bytes(b"caf\xe9")
    with gzip.open(tmp_path / "input" / "c.jsonl.gz", "wb") as file:
        file.write(b'{"text": "zipped"}\n[]\n')
    summary = build_dataset(replace(options, inputs=(str(tmp_path / "input"),)))
    assert (summary.bad_records, summary.empty_documents) == (4, 1)
    assert summary.quarantine is not None
    listed = [json.loads(line) for line in Path(summary.quarantine).read_text().splitlines()]
    assert [(Path(one["file"]).name, one["place"]) for one in listed] == [
        ("a.jsonl", "line 31"),
        ("a.jsonl", "line 63"),
        ("b.txt", "part 1"),
        ("c.jsonl.gz", "line 2"),
    ]
    assert "not JSON" in listed[0]["reason"]
    train, validation = (documents_of(Path(options.output) / split) for split in ("train", "validation"))
    assert sorted(train + validation) == sorted([*TEXTS, "zipped"])


def test_input_without_documents_is_refused(options: BuildOptions, tmp_path: Path) -> None:
    (tmp_path / "input" / "a.jsonl").write_text('\n{"text": ""}\n{"body": "x"}\n')
    with pytest.raises(DataError, match=r"no document: 1 files, 1 empty documents, 1 bad .*a\.jsonl, line 3: no key"):
        build_dataset(options)
    (tmp_path / "input" / "a.jsonl").write_text("")
    with pytest.raises(DataError, match="no document: 1 files, 0 empty documents, 0 bad"):
        build_dataset(replace(options, output=options.output + "-2"))


@pytest.mark.parametrize("workers", [1, 2])
def test_reserved_text_is_refused_naming_the_document(
    options: BuildOptions, tmp_path: Path, real_data: Callable[[str], Path], workers: int
) -> None:
    jsonl(tmp_path / "input" / "a.jsonl", [*TEXTS, "one <|endoftext|> two"])
    gpt2 = replace(options, tokenizer=str(real_data("tok_gpt2")), workers=workers)
    with pytest.raises(DataError, match=r"a\.jsonl, line 61 contains the text <\|endoftext\|>, which gpt2 uses"):
        build_dataset(gpt2)
    assert build_dataset(replace(options, output=options.output + "-bytes")).bad_records == 0


def test_mask_id_in_a_document_is_refused(options: BuildOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    class MaskIsALetter(tokenizers.backend("bytes")):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.mask_id = ord("7")

    monkeypatch.setattr("data_pipeline.tokenizer_backends.bytes.ByteTokenizer", MaskIsALetter)
    with pytest.raises(DataError, match=r"a\.jsonl, line 8 contains the mask id 55 of bytes"):
        build_dataset(options)


def test_validation_has_at_least_one_document_and_so_has_train(options: BuildOptions, tmp_path: Path) -> None:
    by_hash = sorted(TEXTS, key=document_hash)
    few = build_dataset(replace(options, validation_fraction=1e-9))
    assert few.splits["validation"].documents == 1
    assert documents_of(Path(options.output) / "validation") == [by_hash[0]]
    assert len(documents_of(Path(options.output) / "train")) == len(TEXTS) - 1
    most = replace(options, validation_fraction=1 - 1e-9, output=options.output + "-most")
    build_dataset(most)
    assert documents_of(Path(most.output) / "train") == [by_hash[-1]]
    jsonl(tmp_path / "input" / "a.jsonl", ["same", "same"])
    with pytest.raises(DataError, match="a validation split needs at least two different ones"):
        build_dataset(replace(options, output=options.output + "-one"))


def test_without_validation_there_is_one_split(options: BuildOptions) -> None:
    summary = build_dataset(replace(options, validation_fraction=0.0))
    assert list(summary.splits) == ["train"]
    assert documents_of(Path(options.output)) == TEXTS
    assert not (Path(options.output) / "validation").exists()


def test_split_shorter_than_a_row_is_one_row(options: BuildOptions, tmp_path: Path) -> None:
    jsonl(tmp_path / "input" / "a.jsonl", ["ab"])
    summary = build_dataset(replace(options, sequence_length=8, validation_fraction=0.0))
    assert (summary.splits["train"].rows, summary.splits["train"].repeated_tokens) == (1, 5)
    tokens, documents, text_bytes, _ = ShardedSource.open(options.output).read([0])
    assert tokens.tolist() == [[97, 98, 256, 97, 98, 256, 97, 98]]
    assert documents.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2]]
    assert text_bytes.tolist() == [6]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequence_length": 1}, "a row needs at least 2 tokens"),
        ({"validation_fraction": 1.0}, "from 0 to below 1"),
        ({"workers": 0}, "give at least 1"),
        ({"rows_per_shard": 0}, "rows per shard"),
        ({"format": "pdf"}, "'pdf' is no input format"),
        ({"split_text_at": "("}, "is no regular expression"),
        ({"inputs": ("nowhere.txt",)}, "nowhere.txt does not exist"),
        ({"tokenizer": "nothing"}, "'nothing' is neither a tokenizer"),
    ],
)
def test_impossible_options_are_refused(options: BuildOptions, change: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        build_dataset(replace(options, **change))
    assert not Path(options.output).exists()


def test_folders_that_cannot_be_built_into_are_refused(options: BuildOptions, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="is not empty and holds no build"):
        build_dataset(options)
    inside = replace(options, inputs=(str(tmp_path / "input"),), output=str(tmp_path / "input" / "out"))
    with pytest.raises(DataError, match="lies inside the input folder"):
        build_dataset(inside)


def command(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_data_commands(parser.add_subparsers(required=True))
    parsed = parser.parse_args(["data", *arguments])
    status: int = parsed.run(parsed)
    return status


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = jsonl(tmp_path / "a.jsonl", TEXTS), str(tmp_path / "out")
    built = ["build", "--input", str(source), "--tokenizer", "bytes", "--sequence-length", "64", "--output", output]
    built += ["--validation-fraction", "0.1", "--workers", "1"]
    assert command(*built) == 0
    assert "train: " in capsys.readouterr().out
    assert command(*built, "--json") == 0
    assert BuildSummary(**json.loads(capsys.readouterr().out)).already_built
    assert command("inspect", output) == 0
    table = capsys.readouterr().out
    assert "bytes_per_token" in table
    assert command("inspect", output, "--json") == 0
    described = json.loads(capsys.readouterr().out)["splits"]
    assert described["train"]["fingerprint"] == ShardedSource.open(tmp_path / "out" / "train").fingerprint
    assert described["train"]["documents"] + described["validation"]["documents"] == len(TEXTS)
    assert command("show", f"{output}/train", "--row", "0") == 0
    assert capsys.readouterr().out.startswith(TEXTS[0] + tokenizers.EOS_MARK)
    assert command("show", f"{output}/train", "--row", "1", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["tokens"]) == 64
    assert command("verify", output) == 0
    assert "all intact" in capsys.readouterr().out
    with open(tmp_path / "out" / "train" / "train-000000.tar", "r+b") as file:
        file.seek(700)
        file.write(b"\xff")
    assert command("verify", output) == 1
    said = capsys.readouterr()
    assert "train-000000.tar: row 0" in said.err
    assert "2 problems" in said.out
    assert command("verify", output, "--json") == 1
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 2


def test_real_text_builds_and_reads_back(tmp_path: Path, real_data: Callable[[str], Path]) -> None:
    source = real_data("rwkv_demo/demo.jsonl")
    texts = [json.loads(line)["text"] for line in source.read_text(encoding="utf-8").splitlines()]
    for name in ("rwkv-world", str(real_data("tok_qwen"))):
        output = tmp_path / Path(name).name
        build_dataset(BuildOptions(inputs=(str(source),), output=str(output), tokenizer=name, sequence_length=512))
        assert documents_of(output) == texts
        opened = ShardedSource.open(output)
        assert opened.dtype == (np.uint16 if name == "rwkv-world" else np.uint32)
        assert opened.index.text_bytes >= sum(len(text.encode()) for text in texts)
