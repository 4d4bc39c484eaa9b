"""RWKV-7 weights to and from BlinkDL's and fla's layouts: equal bits, equal logits, mistakes told by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dlm_dist import models
from dlm_dist.models import conversion, conversion_fla
from dlm_dist.models.conversion import Weights, read_folder, write_folder
from dlm_dist.models.conversion_blinkdl import config_from_shapes, read_blinkdl, write_blinkdl
from dlm_dist.models.conversion_fla import UNUSED_FILE, read_fla, write_fla
from dlm_dist.models.rwkv7 import RWKV7ForDiffusion

V, C, L, N = 97, 128, 3, 64
PROJECTIONS = {"r": "receptance", "k": "key", "v": "value", "o": "output"}
RANKS = {"w": 24, "a": 40, "v": 16, "g": 48}  # of no published rule, and all different


def shapes(
    layers: int = L, width: int = C, head: int = N, vocab: int = V, ranks: dict[str, int] = RANKS
) -> dict[str, Any]:
    """BlinkDL's file, name by name."""
    table: dict[str, tuple[int, ...]] = {"emb.weight": (vocab, width)}
    for i in range(layers):
        norms = ("ln0", "ln1", "ln2") if i == 0 else ("ln1", "ln2")
        block: dict[str, tuple[int, ...]] = {f"{n}.{part}": (width,) for n in norms for part in ("weight", "bias")}
        vectors = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "v0", "k_k", "k_a")
        block |= {f"att.{name}": (1, 1, width) for name in vectors} | {"ffn.x_k": (1, 1, width)}
        block |= {f"att.{kind}1": (width, rank) for kind, rank in ranks.items()}
        block |= {f"att.{kind}2": (rank, width) for kind, rank in ranks.items()}
        block |= {"att.r_k": (width // head, head), "att.ln_x.weight": (width,), "att.ln_x.bias": (width,)}
        block |= {f"att.{name}.weight": (width, width) for name in ("receptance", "key", "value", "output")}
        block |= {"ffn.key.weight": (4 * width, width), "ffn.value.weight": (width, 4 * width)}
        table |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return table | {"ln_out.weight": (width,), "ln_out.bias": (width,), "head.weight": (vocab, width)}


def theirs(dtype: torch.dtype = torch.float32, **sizes: Any) -> dict[str, Tensor]:
    """Random tensors of sensible size, so that every one of them matters and every one is different."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, shape in shapes(**sizes).items():
        value = torch.randn(shape, generator=generator)
        if name.endswith("weight") and len(shape) == 1:
            value = 1.0 + 0.2 * value
        elif len(shape) == 2 and name != "emb.weight":
            value = value / shape[1 if name.endswith("weight") else 0] ** 0.5
        else:
            value = 0.5 * value
        tensors[name] = value.to(dtype)
    return tensors


def pth(folder: Path, tensors: Any, name: str = "theirs.pth") -> Path:
    torch.save(tensors, folder / name)
    return folder / name


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Equal names, shapes, dtypes and bits."""
    assert set(left) == set(right)
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


def tokens(length: int = 20) -> Tensor:
    return torch.randint(0, V, (1, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp16", "mixed"])
def test_blinkdl_there_and_back_gives_the_same_bits(kind: str, tmp_path: Path) -> None:
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "mixed": torch.bfloat16}
    tensors = theirs(dtypes[kind])
    if kind == "mixed":
        tensors["blocks.1.att.w0"] = theirs()["blocks.1.att.w0"]
    weights = read_blinkdl(pth(tmp_path, tensors))
    assert weights.notes == ()
    write_folder(weights, tmp_path / "ours", mask_token_id=V - 1)
    write_blinkdl(read_folder(tmp_path / "ours"), tmp_path / "again.pth")
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    same(tensors, again)
    assert all(type(tensor) is Tensor and tensor.is_contiguous() for tensor in again.values())

    model = models.load(tmp_path / "ours")
    assert isinstance(model, RWKV7ForDiffusion)
    assert model.dtype == (torch.float32 if kind == "mixed" else dtypes[kind])
    same({name: tensor.to(model.dtype) for name, tensor in tensors.items()}, model.state_dict())
    assert (model.config.mask_token_id, model.direction) == (V - 1, "causal")
    assert model.config.lora_ranks._asdict() == RANKS


@pytest.mark.parametrize(
    ("width", "ranks"),
    [
        (768, (64, 64, 32, 128)),
        (1024, (64, 64, 64, 160)),
        (1024, (64, 64, 32, 160)),
        (2048, (128, 128, 64, 224)),
        (2048, (96, 96, 64, 256)),
        (2560, (128, 128, 96, 256)),
        (2560, (96, 96, 64, 320)),
        (4096, (160, 160, 96, 320)),
        (4096, (128, 128, 96, 480)),
    ],
)
def test_ranks_of_the_old_and_the_new_rule_are_read_from_the_shapes(width: int, ranks: tuple[int, ...]) -> None:
    by_kind = dict(zip("wavg", ranks, strict=True))
    table = shapes(layers=2, width=width, vocab=65536, ranks=by_kind)
    tensors = {name: torch.empty(shape, device="meta") for name, shape in table.items()}
    config = config_from_shapes(tensors, "x.pth")
    assert config.lora_ranks._asdict() == by_kind
    assert (config.hidden_size, config.head_size, config.num_hidden_layers) == (width, 64, 2)
    assert conversion.expected_shapes(config) == table


def test_a_large_file_is_split_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "MAX_FILE_SIZE", "300KB")
    tensors = theirs(torch.bfloat16)
    weights = read_blinkdl(pth(tmp_path, tensors))
    write_folder(weights, tmp_path / "ours", 0)
    write_fla(weights, tmp_path / "fla")
    for folder in ("ours", "fla"):
        assert len(list((tmp_path / folder).glob("model-*.safetensors"))) > 1
    same(tensors, read_folder(tmp_path / "ours").tensors)
    same(tensors, read_fla(tmp_path / "fla").tensors)
    next((tmp_path / "fla").glob("model-*.safetensors")).unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        read_fla(tmp_path / "fla")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fla_there_and_back_gives_the_same_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = theirs(dtype)
    write_folder(read_blinkdl(pth(tmp_path, tensors)), tmp_path / "ours", 5)
    write_fla(read_folder(tmp_path / "ours"), tmp_path / "fla")
    write_folder(read_fla(tmp_path / "fla"), tmp_path / "back", 5)
    same(load_file(tmp_path / "ours" / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors"))
    for folder in ("ours", "fla"):
        assert len({file.stat().st_mode for file in (tmp_path / folder).iterdir()}) == 1, "all as the umask says"
    assert (tmp_path / "ours" / "config.json").read_text() == (tmp_path / "back" / "config.json").read_text()
    write_blinkdl(read_fla(tmp_path / "fla"), tmp_path / "back.pth")
    same(tensors, torch.load(tmp_path / "back.pth", weights_only=True))


def test_the_names_and_places_of_fla(tmp_path: Path) -> None:
    """Each tensor under fla's name, as fla's class holds it, and nothing else in the file."""
    tensors = theirs()
    write_fla(read_blinkdl(pth(tmp_path, tensors)), tmp_path / "fla")
    want = {"model.embeddings.weight": tensors["emb.weight"], "lm_head.weight": tensors["head.weight"]}
    want |= {f"model.norm.{part}": tensors[f"ln_out.{part}"] for part in ("weight", "bias")}
    for i in range(L):
        b = {name.removeprefix(f"blocks.{i}."): t for name, t in tensors.items() if name.startswith(f"blocks.{i}.")}
        layer = {f"attn.x_{kind}": b[f"att.x_{kind}"] for kind in "rwkvag"}
        layer |= {f"attn.{kind}_proj.weight": b[f"att.{name}.weight"] for kind, name in PROJECTIONS.items()}
        for kind in "wag" if i == 0 else "wavg":
            layer[f"attn.{kind}_lora.lora.0.weight"] = b[f"att.{kind}1"].T
            layer[f"attn.{kind}_lora.lora.2.weight"] = b[f"att.{kind}2"].T
            if kind != "g":
                layer[f"attn.{kind}_lora.lora.2.bias"] = b[f"att.{kind}0"][0, 0]
        layer |= {"attn.k_k": b["att.k_k"][0, 0], "attn.k_a": b["att.k_a"][0, 0], "attn.r_k": b["att.r_k"]}
        layer |= {"ffn.x_k": b["ffn.x_k"][0, 0]}
        layer |= {f"ffn.{name}.weight": b[f"ffn.{name}.weight"] for name in ("key", "value")}
        for part in ("weight", "bias"):
            layer[f"attn.g_norm.{part}"] = b[f"att.ln_x.{part}"]
            layer |= {f"attn_norm.{part}": b[f"ln1.{part}"], f"ffn_norm.{part}": b[f"ln2.{part}"]}
            if i == 0:
                layer[f"pre_norm.{part}"] = b[f"ln0.{part}"]
        want |= {f"model.layers.{i}.{name}": tensor for name, tensor in layer.items()}
    same(want, load_file(tmp_path / "fla" / "model.safetensors"))
    fields = json.loads((tmp_path / "fla" / "config.json").read_text())
    assert {name: fields[f"{name}_low_rank_dim"] for name in ("decay", "a", "v", "gate")} == {
        "decay": 24,
        "a": 40,
        "v": 16,
        "gate": 48,
    }
    assert (fields["head_dim"], fields["num_heads"], fields["value_dim"]) == (64, 2, [128] * 3)
    assert (fields["intermediate_size"], fields["fuse_norm"], fields["dtype"]) == (512, False, "float32")


def test_what_only_layer_0_of_blinkdl_has_gets_initial_values_and_a_note(tmp_path: Path) -> None:
    tensors = theirs(torch.bfloat16)
    whole = read_blinkdl(pth(tmp_path, tensors))
    write_fla(whole, tmp_path / "fla")
    (tmp_path / "fla" / UNUSED_FILE).unlink()
    for name in ("v0", "v1", "v2"):
        del tensors[f"blocks.0.att.{name}"]
    for weights in (read_fla(tmp_path / "fla"), read_blinkdl(pth(tmp_path, tensors, "dropped.pth"))):
        (note,) = weights.notes
        assert "blocks.0.att.v0, blocks.0.att.v1, blocks.0.att.v2 are absent" in note
        assert weights.tensors["blocks.0.att.v2"].dtype == torch.bfloat16
        value = weights.tensors["blocks.0.att.v0"].flatten()
        torch.testing.assert_close(value[[0, -1]], torch.tensor([0.93, 0.53]).bfloat16())
        assert not weights.tensors["blocks.0.att.v1"].any()
        same(tensors, {name: t for name, t in weights.tensors.items() if name in tensors})
        write_folder(weights, tmp_path / "ours", 0)
        write_folder(whole, tmp_path / "whole", 0)
        with torch.no_grad():
            logits = [models.load(tmp_path / name)(tokens()).logits for name in ("ours", "whole")]
        assert torch.equal(*logits)
        for name in ("ours", "whole"):
            for file in (tmp_path / name).iterdir():
                file.unlink()
            (tmp_path / name).rmdir()


# What is refused.


def changed(**changes: Any) -> dict[str, Any]:
    """`theirs` with tensors put in, or left out where the value is None; __ stands for a dot."""
    tensors: dict[str, Any] = theirs()
    for name, value in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if value is not None:
            tensors[name.replace("__", ".")] = value
    return tensors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks__1__att__k_a": None}, r"blocks\.1\.att\.k_a is missing; expected one of shape \[1, 1, 128\]"),
        ({"emb__weight": None}, r"emb\.weight is missing; expected one of shape \[vocabulary, width\]"),
        ({"blocks__0__att__r_k": None}, r"blocks\.0\.att\.r_k is missing; expected one of shape \[heads, head size\]"),
        ({"blocks__0__ln0__bias": None}, r"blocks\.0\.ln0\.bias is missing"),
        ({"blocks__1__att__v1": None}, r"blocks\.1\.att\.v1 is missing; expected one of shape \[128, 16\]"),
        ({"head__weight": torch.zeros(V + 1, C)}, r"head\.weight has shape \[98, 128\], expected \[97, 128\]"),
        ({"blocks__2__att__w1": torch.zeros(24, C)}, r"2\.att\.w1 has shape \[24, 128\], expected \[128, 24\]"),
        ({"blocks__0__att__w1": torch.zeros(24, C)}, r"0\.att\.w1 has shape \[24, 128\], expected \[128, rank\]"),
        ({"blocks__0__att__x_r": torch.zeros(C)}, r"att\.x_r has shape \[128\], expected \[1, 1, 128\]"),
        ({"blocks__0__att__r_k": torch.zeros(3, N)}, r"r_k has shape \[3, 64\], expected .* the width, 128"),
        ({"emb__weight": torch.zeros(C)}, r"emb\.weight has shape \[128\], expected \[vocabulary, width\]"),
        ({"ln_out__bias": torch.zeros(C, dtype=torch.int8)}, r"ln_out\.bias holds torch\.int8"),
        ({"ln_out__bias": 3}, r"ln_out\.bias is of type int, expected a tensor \[128\]"),
        (
            {"blocks__0__ffn__s_emb__weight": torch.zeros(V, 8)},
            r"s_emb\.weight \(shape \[97, 8\]\) is none of this model's",
        ),
        ({"blocks__4__ln1__bias": torch.zeros(C)}, "block 3 is missing, though there is a block 4"),
        ({"blocks__0__att__time_maa_x": torch.zeros(C)}, r"RWKV-6 \(x060\).*time_maa_x"),
        ({"blocks__0__att__time_decay": torch.zeros(C)}, r"RWKV-4, 5 or 6.*time_decay"),
    ],
)
def test_a_file_that_is_not_whole_is_refused_by_naming_the_tensor(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = pth(tmp_path, changed(**changes))
    with pytest.raises(ValueError, match=message) as raised:
        read_blinkdl(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch was_run",)


def test_files_that_are_no_dictionary_of_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    whole = pth(tmp_path, theirs()).read_bytes()
    cases: list[tuple[bytes | Any, str]] = [
        (whole[: len(whole) // 2], "cut short"),
        (whole[:1], "damaged"),
        (b"", "damaged"),
        (b"\x08" * 100, r"damaged or no \.pth file of tensors"),
        (changed(emb__weight=Malicious()), r"posix\.system.*would run code when read, and was refused"),
        ([torch.zeros(2)], "an object of type list"),
        ({"state_dict": theirs()}, r"emb\.weight is missing"),
    ]
    for content, message in cases:
        path = tmp_path / "bad.pth"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(ValueError, match=message) as raised:
            read_blinkdl(path)
        assert str(raised.value).startswith(str(path))
        assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="there is no such file"):
        read_blinkdl(tmp_path / "none.pth")
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model_type", "rwkv6", "model_type is 'rwkv6', expected 'rwkv7'"),
        ("hidden_act", "relu", "hidden_act is 'relu', and only 'sqrelu'"),
        ("norm_first", False, "norm_first is False"),
        ("norm_bias", False, "norm_bias is False"),
        ("norm_eps", 1e-6, "norm_eps is 1e-06, and only 1e-05"),
        ("attn", {"layers": [1], "num_heads": 2}, "attn is {'layers'"),
        ("tie_word_embeddings", True, "tie_word_embeddings is True"),
        ("head_dim", 32, "head_dim is 32, and only 64"),
        ("intermediate_size", 384, "intermediate_size is 384, and only 512"),
        ("value_dim", [128, 256, 128], "value_dim is 256, and only 128"),
        ("value_dim", 256, "value_dim is 256, and only 128"),
        ("v_low_rank_dim", None, "v_low_rank_dim is None, expected a whole number"),
        ("hidden_size", 96, "only|multiple of head_dim"),
        ("a_low_rank_dim", 48, r"layers\.0\.attn\.a_lora\.lora\.0\.weight has shape \[40, 128\], expected \[48, 128\]"),
        ("num_hidden_layers", 4, r"model\.layers\.3\.attn_norm\.weight is missing; expected one of shape \[128\]"),
        ("num_hidden_layers", 2, r"model\.layers\.2\.\S+ \(shape \S+(, \d+)*\]\) is none of this model's"),
    ],
)
def test_a_field_of_fla_that_our_model_cannot_represent_is_named(
    field: str, value: Any, message: str, tmp_path: Path
) -> None:
    write_fla(read_blinkdl(pth(tmp_path, theirs())), tmp_path / "fla")
    file = tmp_path / "fla" / "config.json"
    fields = json.loads(file.read_text()) | {field: value}
    if field == "num_hidden_layers":
        fields["value_dim"] = None
    file.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message) as raised:
        read_fla(tmp_path / "fla")
    assert "\n" not in str(raised.value)


def test_what_fla_leaves_to_its_defaults_and_to_older_versions_is_read(tmp_path: Path) -> None:
    tensors = theirs()
    write_fla(read_blinkdl(pth(tmp_path, tensors)), tmp_path / "fla")
    file = tmp_path / "fla" / "config.json"
    fields = json.loads(file.read_text())
    for name in ("hidden_act", "norm_eps", "norm_first", "attn", "value_dim", "num_heads", "fuse_norm", "dtype"):
        del fields[name]
    file.write_text(json.dumps(fields | {"intermediate_size": None, "hidden_ratio": 4.0, "eos_token_id": 0}))
    weights = tmp_path / "fla" / "model.safetensors"
    flat = load_file(weights)
    for layer in range(L):
        mixes = [flat.pop(f"model.layers.{layer}.attn.x_{kind}").view(-1) for kind in "rwkvag"]
        flat[f"model.layers.{layer}.attn.x_x"] = torch.stack(mixes)
    save_file(flat, weights)
    read = read_fla(tmp_path / "fla")
    same(tensors, read.tensors)
    assert read.config.eos_token_id == 0
    file.write_text(json.dumps(fields | {"head_dim": None, "num_heads": 4}))
    with pytest.raises(ValueError, match="num_heads is 4, and only 2"):
        read_fla(tmp_path / "fla")
    file.write_text(json.dumps(fields | {"intermediate_size": None, "hidden_ratio": 3}))
    with pytest.raises(ValueError, match="hidden_ratio is 3, and only 4"):
        read_fla(tmp_path / "fla")
    file.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is no JSON"):
        read_fla(tmp_path / "fla")
    with pytest.raises(ValueError, match=r"it has no config\.json"):
        read_fla(tmp_path)


def test_only_causal_models_are_exported_and_to_fla_only_heads_of_64(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "mask_token_id": 1}
    models.build("rwkv7", head_size=16, direction="bidirectional", **sizes).save_pretrained(tmp_path / "both")
    with pytest.raises(ValueError, match="direction bidirectional: other programs know one scan"):
        write_blinkdl(read_folder(tmp_path / "both"), tmp_path / "both.pth")
    models.build("rwkv7", head_size=16, **sizes).save_pretrained(tmp_path / "heads")
    with pytest.raises(ValueError, match=r"head_size is 16: .* at head_size 64 only"):
        write_fla(read_folder(tmp_path / "heads"), tmp_path / "fla")
    models.build("qwen3", num_attention_heads=2, **sizes).save_pretrained(tmp_path / "qwen3")
    with pytest.raises(ValueError, match="type 'dlm_qwen3', and the layout is one of RWKV-7"):
        write_fla(read_folder(tmp_path / "qwen3"), tmp_path / "fla")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both", "heads", "qwen3"]


def test_nothing_is_overwritten_and_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = read_blinkdl(pth(tmp_path, theirs()))
    (tmp_path / "there").mkdir()
    (tmp_path / "there.pth").write_text("mine")
    writers: list[tuple[Any, Path]] = [
        (lambda path: write_folder(weights, path, 0), tmp_path / "there"),
        (lambda path: write_fla(weights, path), tmp_path / "there"),
        (lambda path: write_blinkdl(weights, path), tmp_path / "there.pth"),
    ]
    for write, path in writers:
        with pytest.raises(ValueError, match="exists already and is left as it is"):
            write(path)
    assert (tmp_path / "there.pth").read_text() == "mine"
    with pytest.raises(ValueError, match="lies outside the vocabulary"):
        write_folder(weights, tmp_path / "new" / "folder", V)
    with pytest.raises(ValueError, match=r"does not end with \.pth"):
        write_blinkdl(weights, tmp_path / "new" / "file")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(conversion, "save_torch_state_dict", full)
    for write, path in writers:
        with pytest.raises(OSError, match="No space"):
            write(tmp_path / "new" / path.name)

    def stopped(_: Any, file: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_blinkdl(weights, tmp_path / "new.pth")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs.pth", "there", "there.pth"]
    assert not list((tmp_path / "there").iterdir())


def test_init_from_a_foreign_checkpoint_names_the_command(tmp_path: Path) -> None:
    path = pth(tmp_path, theirs())
    with pytest.raises(ValueError, match=f"dlm convert --from blinkdl {path} DIR"):
        models.load(path)
    write_fla(read_blinkdl(path), tmp_path / "fla")
    with pytest.raises(ValueError, match=f"dlm convert --from fla {tmp_path / 'fla'} DIR"):
        models.load(tmp_path / "fla")


# Whoever else reads what we write computes what we compute.


def our_logits(weights: Weights, ids: Tensor, folder: Path) -> Tensor:
    write_folder(weights, folder, 0)
    with torch.no_grad():
        return models.load(folder)(ids).logits


@pytest.mark.filterwarnings("ignore")
def test_fla_loads_what_we_write_and_computes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fla's own model class with the plain PyTorch twins that it has of each kernel."""
    pytest.importorskip("triton")
    from fla.layers import rwkv7 as layer
    from fla.models.rwkv7 import RWKV7Config, RWKV7ForCausalLM
    from fla.models.rwkv7 import modeling_rwkv7 as modeling
    from fla.modules.token_shift import token_shift_ref
    from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence
    from fla.ops.rwkv7.fused_addcmul import torch_addcmul_rwkv7
    from fla.ops.rwkv7.fused_k_update import k_update_ref
    from fla.ops.rwkv7.gate_output_correction import gate_output_correction_ref

    def chunk(*, r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, **_: Any) -> tuple[Tensor, None]:
        r, w, k, v, a, b = (x.transpose(1, 2) for x in (r * r.shape[-1] ** 0.5, w, k, v, a, b))
        return dplr_recurrence(r, k, v, a, b, w)[0].transpose(1, 2), None

    def shift(x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return token_shift_ref(x), None

    monkeypatch.setattr(modeling, "token_shift", shift)
    monkeypatch.setattr(layer, "token_shift", shift)
    monkeypatch.setattr(layer, "fused_addcmul_rwkv7", torch_addcmul_rwkv7)
    monkeypatch.setattr(layer, "chunk_rwkv7", chunk)
    monkeypatch.setattr(layer, "fused_k_rwkv7", k_update_ref)
    monkeypatch.setattr(layer, "gate_output_correction", gate_output_correction_ref)

    weights = read_blinkdl(pth(tmp_path, theirs()))
    write_fla(weights, tmp_path / "fla")
    config = RWKV7Config.from_pretrained(tmp_path / "fla")
    model = RWKV7ForCausalLM(config)
    model.load_state_dict(load_file(tmp_path / "fla" / "model.safetensors"), strict=True)
    ids = tokens()
    theirs_logits = model.lm_head(model.model(ids, use_cache=False).last_hidden_state)
    ours = our_logits(weights, ids, tmp_path / "ours")
    assert (ours - theirs_logits).abs().max() < 1e-5 * theirs_logits.abs().max()

    model.save_pretrained(tmp_path / "saved")
    back = read_fla(tmp_path / "saved")
    names = [name for name in back.tensors if conversion_fla.fla_name(name) is not None]
    same({name: weights.tensors[name] for name in names}, {name: back.tensors[name] for name in names})


CLIENT = """
import os, sys
os.environ |= {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
import torch
from rwkv.model import RWKV
ids = torch.load(sys.argv[2], weights_only=True)
logits, _ = RWKV(model=sys.argv[1], strategy="cpu fp32").forward(ids, None, full_output=True)
torch.save(logits, sys.argv[3])
"""


def test_the_package_rwkv_runs_an_exported_file_with_our_logits(tmp_path: Path) -> None:
    write_folder(read_blinkdl(pth(tmp_path, theirs())), tmp_path / "ours", 0)
    weights = read_folder(tmp_path / "ours")
    write_blinkdl(weights, tmp_path / "exported.pth")
    ids = tokens()
    torch.save(ids[0].tolist(), tmp_path / "ids.pt")
    arguments = [tmp_path / "exported", tmp_path / "ids.pt", tmp_path / "logits.pt"]
    command = [sys.executable, "-c", textwrap.dedent(CLIENT), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    theirs_logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    ours = models.load(tmp_path / "ours")(ids).logits[0].detach()
    assert theirs_logits.shape == ours.shape
    assert (ours - theirs_logits).abs().max() < 1e-4 * theirs_logits.abs().max()
