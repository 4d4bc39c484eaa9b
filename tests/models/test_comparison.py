"""Two sets of weights side by side: the same model in any layout is equal, and what differs is named."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from dlm_dist import models
from dlm_dist.models.comparison import compare
from dlm_dist.models.conversion import read_folder, write_folder
from dlm_dist.models.conversion_blinkdl import read_blinkdl, write_blinkdl
from dlm_dist.models.conversion_fla import write_fla
from dlm_dist.models.conversion_qwen3 import read_qwen3

RWKV: dict[str, Any] = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "mask_token_id": 63}


def statuses(a: Path, b: Path, values: bool = True) -> dict[str, str]:
    return {one.name: one.status for one in compare(a, b, values)}


def test_one_rwkv7_in_every_layout_is_equal(tmp_path: Path) -> None:
    model = models.build("rwkv7", seed=1, **RWKV)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    model.save_pretrained(tmp_path / "step-1" / "model")
    write_blinkdl(read_folder(tmp_path / "step-1"), tmp_path / "x.pth")
    write_fla(read_blinkdl(tmp_path / "x.pth"), tmp_path / "fla")
    places = [tmp_path / "step-1", tmp_path / "x.pth", tmp_path / "fla", tmp_path / "step-1/model/model.safetensors"]
    for a in places:
        for b in places:
            found = compare(a, b, values=True)
            assert {one.name for one in found} == set(model.state_dict())
            assert all(one.status == "equal" and one.largest == 0.0 for one in found)
    # The bare file lacks the three tensors that fla has no place for.
    found = statuses(tmp_path / "x.pth", tmp_path / "fla" / "model.safetensors")
    assert {name for name, status in found.items() if status == "only a"} == {f"blocks.0.att.v{i}" for i in range(3)}
    assert set(found.values()) == {"equal", "only a"}


@pytest.mark.parametrize("tied", [False, True])
def test_one_qwen3_in_both_layouts_is_equal(tied: bool, tmp_path: Path) -> None:
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": tied}
    peer = Qwen3ForCausalLM(Qwen3Config(**sizes, **heads))
    peer.save_pretrained(tmp_path / "theirs", max_shard_size="3KB")
    write_folder(read_qwen3(tmp_path / "theirs"), tmp_path / "ours", 49)
    found = compare(tmp_path / "theirs", tmp_path / "ours", values=True)
    assert {one.name for one in found} == set(peer.state_dict())
    assert {one.status for one in found} == {"equal"}


def test_every_kind_of_difference_is_told(tmp_path: Path) -> None:
    a = {"same": torch.ones(2), "value": torch.tensor([1.0, 2.0, 3.0]), "shape": torch.ones(2, 3), "a": torch.ones(1)}
    b = {"same": torch.ones(2), "value": torch.tensor([1.0, 2.5, 2.9]), "shape": torch.ones(3, 2), "b": torch.ones(1)}
    nan, inf = torch.tensor([math.nan]), torch.tensor([math.inf])
    a |= {"dtype": torch.ones(2), "nan": nan, "one nan": torch.ones(1), "inf": inf, "sign": torch.tensor([0.0])}
    b |= {"dtype": torch.ones(2).half(), "nan": nan, "one nan": nan, "inf": inf, "sign": torch.tensor([-0.0])}
    save_file(a, tmp_path / "a.safetensors")
    torch.save(b, tmp_path / "b.pth")
    found = {one.name: one for one in compare(tmp_path / "a.safetensors", tmp_path / "b.pth", values=True)}
    assert {name: one.status for name, one in found.items()} == {
        "same": "equal",
        "value": "values",
        "shape": "shape",
        "a": "only a",
        "b": "only b",
        "dtype": "dtype",
        "nan": "equal",
        "one nan": "values",
        "inf": "equal",
        "sign": "equal",
    }
    assert found["value"].largest == 0.5
    assert found["dtype"].largest == 0.0
    assert math.isnan(found["one nan"].largest or 0.0)
    assert found["shape"].largest is None
    without = statuses(tmp_path / "a.safetensors", tmp_path / "b.pth", values=False)
    assert without["value"] == without["one nan"] == "equal"
    side = found["dtype"].b
    assert side is not None
    assert (side.shape, side.dtype) == ((2,), "float16")


def test_what_holds_no_weights_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="no such file or folder"):
        compare(tmp_path / "a.safetensors", tmp_path / "none")
    with pytest.raises(ValueError, match="weights are missing"):
        compare(tmp_path, tmp_path / "a.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-2])
    with pytest.raises(ValueError, match="cannot be read"):
        compare(tmp_path / "cut.safetensors", tmp_path / "a.safetensors")
    torch.save({"step": 3}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match="step is of type int, and only tensors are compared"):
        compare(tmp_path / "b.pth", tmp_path / "a.safetensors")
    assert set(load_file(tmp_path / "a.safetensors")) == {"x"}
