"""benchmarks/gpu.py as far as a machine without a GPU can run it. No test looks at a time."""

import json
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import gpu
from benchmarks.gpu_helpers import HelperSize, cases, largest_error, measure_case, results
from benchmarks.gpu_training import (
    Batch,
    ModelSize,
    TrainingStep,
    group_events,
    group_of,
    kernel_group,
    measure_training,
    our_loss,
    peer_loss,
)
from dlm_dist.training.metrics import json_line

CPU = torch.device("cpu")
MODEL = ModelSize("tiny", hidden=64, layers=2, rows=2, length=32, vocabulary=512)
SIZES = gpu.Sizes(
    kernels=(gpu.KernelSize(1, 70, 2, 16),),
    layers=(gpu.LayerSize(2, 20, 128),),
    models=(MODEL,),
    helpers=HelperSize(2, 20, 128, 256),
)


def test_without_a_gpu_one_sentence_and_status_2(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_unknown_section_is_refused(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--sections", "kernel,cost"])
    assert "no section 'cost'" in capsys.readouterr().err


def test_every_section_runs_where_it_needs_no_gpu(capsys):
    asked = gpu.parse(["--rounds", "2", "--steps", "2"])
    result = json.loads(json_line(gpu.measure(asked, SIZES, CPU)))
    assert list(result["sections"]) == asked.sections
    assert {"date", "command", "commit", "versions", "hardware", "options", "gemm_flops"} <= set(result)
    for name, section in result["sections"].items():
        assert section["failures"] == [], name
        assert section["rows"], name
    rows = {name: section["rows"] for name, section in result["sections"].items()}
    assert rows["errors"][0]["error"] < 0.01
    assert rows["errors"][-1]["backend"]["name"] == "pytorch"
    assert 0 < rows["kernel"][0]["forward_ms"]["min"] <= rows["kernel"][0]["both_ms"]["max"]
    for row, supervised in zip(rows["training"], (1.0, 0.5), strict=True):
        assert row["supervised"] == pytest.approx(supervised, abs=0.15)
        assert row["loss"] == pytest.approx(math.log(512), rel=0.05)
        assert 0 < row["mfu"]["median"] < 1
    assert sum(row["percent"] for row in rows["profile"]) == pytest.approx(100.0)
    assert {"WKV", "matrix products", "loss: matrix products", "optimizer"} <= {r["group"] for r in rows["profile"]}
    assert len(rows["helpers"]) == 11
    printed = capsys.readouterr().out
    assert "matrix product" in printed
    assert "head and loss" in printed


def test_what_fails_is_reported_and_the_rest_still_runs(capsys):
    def broken():
        raise RuntimeError("no kernel image\nfor this device")

    section = gpu.run_section("kernel", [broken, lambda: [{"kernel": "ours"}]])
    assert section["rows"] == [{"kernel": "ours"}]
    assert section["failures"] == ["RuntimeError no kernel image"]
    gpu.print_section("kernel", section)
    assert "FAILED: RuntimeError no kernel image" in capsys.readouterr().out

    found = gpu.in_turns({"good": lambda: None, "broken": broken}, CPU, rounds=2)
    assert found["broken"] == {"failed": "RuntimeError no kernel image"}
    assert found["good"]["ms"]["min"] >= 0
    section = gpu.run_section("kernel", [lambda: [{"kernel": "fla", **found["broken"]}]])
    assert section["failures"] == ["RuntimeError no kernel image"]

    case = cases(SIZES.helpers, CPU, torch.bfloat16, fla=False)[0]
    row = measure_case(type(case)(case.name, case.inputs, case.ours, lambda x: broken()), CPU, 1, 1, compiled=False)
    assert row["fla_failed"] == "RuntimeError no kernel image"
    assert "ours_ms" in row


def test_batches_supervise_what_their_objective_says():
    ar, masked = (Batch.draw(MODEL, objective, CPU) for objective in ("ar", "masked"))
    assert torch.equal(ar.supervised, torch.arange(64))
    assert torch.equal(ar.input_ids[:, 1:], ar.targets[:, :-1]), "the target is the next token"
    hidden = masked.input_ids == 511
    assert torch.equal(hidden.flatten().nonzero().squeeze(1), masked.supervised)
    assert torch.equal(masked.input_ids[~hidden], masked.targets[~hidden])


def test_a_step_is_adamw_with_clipping():
    model, twin = MODEL.build(), MODEL.build().train()
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-4, betas=(0.9, 0.99), weight_decay=0.1)
    step, batch = TrainingStep(model, our_loss), Batch.draw(MODEL, "ar", CPU)
    for _ in range(2):
        loss = our_loss(twin, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert step(batch).item() == pytest.approx(loss.item(), rel=1e-6)
    for got, want in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_an_error_counts_the_worst_tensor_and_nan_is_infinite():
    want = [torch.ones(4), torch.full((4,), 2.0)]
    assert largest_error([want[0], want[1] * 1.5], want) == pytest.approx(0.5)
    assert largest_error([want[0], want[1] * float("nan")], want) == math.inf


def event(name, parent=None, kernels=()):
    kernels = [SimpleNamespace(name=kernel, duration=duration) for kernel, duration in kernels]
    return SimpleNamespace(name=name, cpu_parent=parent, kernels=kernels, device_type=DeviceType.CPU)


def kernel_event(name, microseconds, annotation=False):
    time_range = SimpleNamespace(elapsed_us=lambda: microseconds)
    return SimpleNamespace(name=name, device_type=DeviceType.CUDA, is_user_annotation=annotation, time_range=time_range)


def test_kernels_are_grouped_by_who_launched_them():
    loss = event("_BlockedCrossEntropyBackward")
    linear = event("aten::linear")
    adam = event("Optimizer.step#AdamW.step")
    events = [
        event("aten::mm", loss, [("nvjet_tst", 5.0)]),
        event("aten::exp_", loss, [("vectorized_elementwise_kernel", 3.0)]),
        event("aten::mm", event("aten::matmul", linear), [("nvjet_tst", 7.0)]),
        event("ChunkDPLRDeltaRuleFunction", None, [("chunk_dplr_fwd_kernel_o", 11.0)]),
        event("aten::_fused_adamw_", adam, [("multi_tensor_apply_kernel", 13.0)]),
        event("aten::sigmoid", None, [("vectorized_elementwise_kernel", 2.0)]),
        kernel_event("nvjet_tst", 12.0),
        kernel_event("prepare_wy_repr_bwd_kernel", 17.0),  # linked to no op
        kernel_event("Optimizer.step#AdamW.step", 99.0, annotation=True),
    ]
    assert group_events(events, on_device=True) == {
        "loss: matrix products": 5.0,
        "loss: the rest": 3.0,
        "matrix products": 7.0,
        "WKV": 28.0,
        "optimizer": 13.0,
        "elementwise": 2.0,
    }
    assert group_of(event("aten::native_layer_norm", event("aten::layer_norm"))) == "norm"
    assert kernel_group("sm90_xmma_gemm_bf16bf16") == "matrix products"


# --- against fla's own code, where Triton is installed (a GPU is not needed) ------------------------------------


@pytest.fixture
def fla_in_torch(monkeypatch):
    """fla with the plain twins that it keeps of its Triton functions."""
    pytest.importorskip("triton", reason="fla's modules need it")
    import fla.layers.rwkv7 as layer
    import fla.models.rwkv7.modeling_rwkv7 as model
    from fla.modules import token_shift as shift
    from fla.ops.rwkv7 import channel_mixing, fused_addcmul, fused_k_update, gate_output_correction

    from dlm_dist.kernels.wkv7 import wkv7_chunked

    def token_shift(x, cu_seqlens=None, cache=None, output_cache=False):
        return (shift.token_shift_ref(x), None) if output_cache else shift.token_shift_ref(x)

    def kernel(r, w, k, v, a, b, **options):
        assert options["scale"] == 1.0
        return wkv7_chunked(r, w, k, v, a, b)

    twins = {
        "token_shift": token_shift,
        "fused_addcmul_rwkv7": fused_addcmul.torch_addcmul_rwkv7,
        "fused_k_rwkv7": fused_k_update.k_update_ref,
        "gate_output_correction": gate_output_correction.gate_output_correction_ref,
        "chunk_rwkv7": kernel,
        "channel_mixing_rwkv7": channel_mixing.channel_mixing_rwkv7_torch,
    }
    for module in (layer, model, shift, fused_addcmul, fused_k_update, gate_output_correction, channel_mixing):
        for name, twin in twins.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, twin)
    monkeypatch.setattr(model, "ACT2FN", {"sqrelu": lambda x: torch.relu(x) ** 2})


@pytest.mark.filterwarnings("ignore")
def test_the_peer_computes_what_our_model_computes(fla_in_torch):
    from benchmarks.fla_peer import build_peer, build_peer_layer

    ours = MODEL.build().double().train()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    theirs = build_peer(ours, CPU, torch.float64, fused=False).train()
    for objective in ("ar", "masked"):
        batch = Batch.draw(MODEL, objective, CPU)
        assert peer_loss(theirs, batch).item() == pytest.approx(our_loss(ours, batch).item(), rel=1e-6)
    peer_loss(theirs, batch).backward()
    assert all(parameter.grad is not None for parameter in theirs.parameters())

    mix = ours.blocks[1].att
    x, first = torch.randn(2, 1, 20, 64, dtype=torch.float64)
    out = build_peer_layer(mix, 1, 2, fused=False)(hidden_states=x, v_first=first)[0]
    torch.testing.assert_close(out, mix(x, first)[0])
    fused = build_peer(ours, CPU, torch.bfloat16)
    assert (fused.config.use_l2warp, fused.config.fuse_linear_cross_entropy, fused.config.fuse_norm) == (
        False,
        True,
        True,
    )
    assert {parameter.dtype for parameter in fused.parameters()} == {torch.bfloat16}


@pytest.mark.filterwarnings("ignore")
def test_training_is_compared_with_the_peer(fla_in_torch, monkeypatch):
    from benchmarks import fla_peer

    monkeypatch.setattr(fla_peer, "build_peer", partial(fla_peer.build_peer, fused=False))
    rows = measure_training(MODEL, CPU, rounds=2, peak=1e12, peer=True)
    assert [(row["objective"], row["system"]) for row in rows] == [
        ("ar", "ours"),
        ("ar", "fla"),
        ("masked", "ours"),
        ("masked", "fla"),
    ]
    for ours, theirs in (rows[:2], rows[2:]):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.01), "bf16 logits on their side"
        assert theirs["speed_over_fla"]["median"] == 1.0
        assert ours["met"] == (ours["speed_over_fla"]["median"] >= ours["goal"])
    assert [row["goal"] for row in rows if "goal" in row] == [1.0, 1.3]


@pytest.mark.filterwarnings("ignore")
def test_helpers_compute_what_fla_computes(fla_in_torch):
    compared = {}
    for case in cases(SIZES.helpers, CPU, torch.float32):
        if case.name in ("token shift", "key scaling", "output correction", "channel mix"):
            compared[case.name] = largest_error(results(case.fla, case.inputs), results(case.ours, case.inputs))
    assert len(compared) == 4
    assert max(compared.values()) < 1e-5, compared
