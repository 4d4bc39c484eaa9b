"""Files from elsewhere run no code and lead nowhere: what is read, how, and from where (docs/security.md).

Manifests and links of checkpoints: tests/training/test_checkpoint.py. YAML tags: tests/test_config.py. A .pth that
would run a command: tests/models/test_conversion.py.
"""

from __future__ import annotations

import ast
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.errors import DataError
from data_pipeline.files import write_json
from data_pipeline.shards import ShardedSource, SourceIndex, verify, write_source
from data_pipeline.tokenizer_backends.bytes import ByteTokenizer
from data_pipeline.tokenizer_base import Tokenizer
from dlm_dist import models
from dlm_dist.models.conversion import read_safetensors
from dlm_dist.settings import ConfigError
from tests.commands import mistake

REPOSITORY = Path(__file__).resolve().parents[1]
OURS = ("dlm_dist", "data_pipeline", "launcher", "benchmarks", "tests")
CODE_IN_CONFIG = {"auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    """Every call in the tree: file and line, dotted name, and the call itself."""
    for package in OURS:
        for file in sorted((REPOSITORY / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    yield f"{file.relative_to(REPOSITORY)}:{node.lineno}", ast.unparse(node.func), node


def keyword(call: ast.Call, name: str) -> object:
    """The literal value of a keyword argument; None where there is none or it is computed."""
    values = [argument.value for argument in call.keywords if argument.arg == name]
    return values[0].value if values and isinstance(values[0], ast.Constant) else None


def test_nothing_in_the_tree_reads_what_could_run_code() -> None:
    """Pickles only as bare tensors, YAML only by the safe loader, no code of a model's folder, no shell."""
    found, loads = [], 0
    for place, name, call in calls():
        last = name.rpartition(".")[2]
        if name == "torch.load":
            loads += 1
            if keyword(call, "weights_only") is not True:
                found.append(f"{place}: torch.load without weights_only=True")
        if place.startswith("tests"):
            continue
        unsafe = last == "load" and name.split(".")[0] in ("pickle", "dill", "joblib", "yaml", "cloudpickle")
        unsafe |= name in ("eval", "exec", "os.system", "pickle.loads", "yaml.full_load", "yaml.unsafe_load")
        unsafe |= last == "extractall" or keyword(call, "shell") is True
        unsafe |= any(argument.arg == "trust_remote_code" for argument in call.keywords)
        unsafe |= keyword(call, "allow_pickle") is True
        if unsafe:
            found.append(f"{place}: {name}")
    assert found == []
    assert loads > 5, "the walk has found the calls that it is about"


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A model's folder whose config.json names code beside it, which would leave a trace."""
    folder = tmp_path / "planted"
    sizes = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "mask_token_id": 63}
    models.build("rwkv7", **sizes).save_pretrained(folder)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | CODE_IN_CONFIG))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w').close()\nConfig = Model = object\n")
    return folder


def test_code_beside_a_model_is_not_run(planted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = models.load(planted)
    assert type(model) is models.BACKBONES["rwkv7"][1]
    config = planted / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "evil"}))
    with pytest.raises(ValueError, match="'evil', which is none of ours"):
        models.load(planted)
    for layout in ("fla", "qwen3"):
        config.write_text(json.dumps({"model_type": {"fla": "rwkv7"}.get(layout, layout)} | CODE_IN_CONFIG))
        mistake(capsys, "convert", "--from", layout, planted, planted.parent / layout)
    assert not (planted.parent / "was_run").exists()


def test_an_index_of_weights_names_only_files_beside_it(planted: Path) -> None:
    weights = planted / "model.safetensors"
    names = list(read_safetensors(planted))
    index = planted / "model.safetensors.index.json"
    shutil.copy(weights, planted.parent / "secret.safetensors")
    for outside in ("../secret.safetensors", str(planted.parent / "secret.safetensors"), "evil.py", "..", 3):
        index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, outside)}))
        for read in (models.load, read_safetensors):
            with pytest.raises(ValueError, match=r"expected a \.safetensors file beside it|is no index"):
                read(planted)
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, weights.name)}))
    assert list(read_safetensors(planted)) == names
    models.load(planted)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rows = np.random.default_rng(0).integers(0, 256, (6, 16))
    write_source(tmp_path / "source", rows, ByteTokenizer())
    return tmp_path / "source"


@pytest.mark.parametrize("kind", ["tar", "idx"])
@pytest.mark.parametrize("outside", ["../other", "/etc/passwd", "sub/other", "..", 3])
def test_an_index_of_rows_names_only_shards_beside_it(kind: str, outside: object, source: Path) -> None:
    """With a fingerprint that fits: it does not cover the names of files."""
    (source.parent / "other").write_bytes((source / f"train-000000.{kind}").read_bytes())
    index = SourceIndex.read(source)
    content = json.loads((source / "index.json").read_text())
    assert content["fingerprint"] == index.computed_fingerprint()
    content["shards"][0][kind] = outside
    write_json(source / "index.json", content)
    with pytest.raises(DataError, match="which is not in"):
        ShardedSource.open(source)
    assert any("which is not in" in problem for problem in verify(source).problems)


@pytest.mark.parametrize("name", ["../escaped.npy", "/escaped.npy"])
def test_members_of_a_tar_are_never_unpacked(name: str, source: Path) -> None:
    """A tar with another member's name in front of a row is read by the sidecar's offsets, and told by verify."""
    tar = source / "train-000000.tar"
    before = sorted(source.parent.rglob("*"))
    member = tarfile.TarInfo(name)
    with tarfile.open(tar) as opened:
        first = next(iter(opened))
        member.size, member.mode, member.uname, member.gname = first.size, first.mode, first.uname, first.gname
    content = bytearray(tar.read_bytes())
    content[:512] = member.tobuf(tarfile.USTAR_FORMAT)
    tar.write_bytes(content)
    with tarfile.open(tar) as opened:
        assert opened.getnames()[0].lstrip("/") == name.lstrip("/")
    ShardedSource.open(source).read([0, 5])
    assert any("tar header is damaged" in problem for problem in verify(source).problems)
    assert sorted(source.parent.rglob("*")) == before


def test_a_saved_tokenizer_names_no_code(tmp_path: Path) -> None:
    ByteTokenizer().save(tmp_path)
    (file,) = (path for path in tmp_path.iterdir() if "kind" in path.read_text())
    content = json.loads(file.read_text())
    for kind in ("os:system", "../evil", "evil.Tokenizer"):
        file.write_text(json.dumps(content | {"kind": kind}))
        with pytest.raises(DataError, match="is no kind of tokenizer"):
            Tokenizer.load(tmp_path)


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system ['touch was_run']", "!!python/name:os.system"])
def test_yaml_makes_no_objects(tag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dlm_dist.config import load_config

    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(f"run: {tag}\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(Path("run.yaml"))
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(None, [f"run.dir={tag}"])
    assert not Path("was_run").exists()


def test_a_pickle_is_no_tensor_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the command: the file is refused, and what it would do is not done."""

    class Planted:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "was_run",))

    torch.save({"emb.weight": Planted()}, tmp_path / "theirs.pth")
    said = mistake(capsys, "convert", "--from", "blinkdl", tmp_path / "theirs.pth", tmp_path / "ours")
    assert "which would run code when read, and was refused" in said
    assert not (tmp_path / "was_run").exists()
    assert not (tmp_path / "ours").exists()
