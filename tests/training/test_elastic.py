"""A checkpoint goes on in another layout: real engines of every stage, and the reading itself on drawn layouts."""

import itertools
import json
import tempfile
from pathlib import Path

import bitsandbytes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dlm_dist import models
from dlm_dist.config import load_config
from dlm_dist.training import checkpoint, elastic, zero_state
from dlm_dist.training.checkpoint_files import FORMAT_VERSION, TRAINER_STATE, CheckpointError
from dlm_dist.training.elastic import SavedShards
from dlm_dist.training.optimizers import ROLE_RULES
from dlm_dist.training.pieces import Piece
from dlm_dist.training.quantisation import BLOCK, dequantise, quantise
from tests.training.conftest import run_steps, save_checkpoint, tiny_engine

REPOSITORY = Path(__file__).resolve().parents[2]

LAYOUTS = {
    "stage 0": ("zero.stage=0",),
    "stage 1": ("zero.stage=1",),
    "stage 2": ("zero.stage=2",),
    "stage 3": ("zero.stage=3",),
    "stage 3, sub-groups": ("zero.stage=3", "deepspeed.zero_optimization.sub_group_size=2000"),
}


def save(engine, folder):
    return save_checkpoint(engine, folder, {"global_step": 2})


def values(engine):
    """Masters and decoded states of every parameter as whole fp32 vectors, and the step counts."""
    found = {}
    for shard in zero_state.shards(engine):
        state = zero_state.optimizer_state(engine, shard)
        flat = {"master": shard.flat}
        for name, value in state.items():
            if name == "step":
                flat["step"] = torch.full_like(shard.flat, float(value))
            elif name in ("exp_avg", "exp_avg_sq") or (name in ("state1", "state2") and value.dtype == torch.float32):
                flat[name] = value.reshape(-1)
            elif name in ("state1", "state2"):
                number = name[-1]
                scales = state[f"absmax{number}"].repeat_interleave(256)[: value.numel()]
                flat[name] = dequantise(value.reshape(-1), scales, state[f"qmap{number}"])
        for piece, (name, value) in itertools.product(shard.pieces, flat.items()):
            whole = found.setdefault((piece.name, name), {})
            whole[piece.start] = value[piece.offset : piece.offset + piece.numel].clone()
    return {key: torch.cat([parts[start] for start in sorted(parts)]) for key, parts in found.items()}


def take_over(path, options):
    """An engine with these settings that went on from `path`, and how it was loaded."""
    engine, _ = tiny_engine(*options, model=models.load(path, dtype=torch.float32))
    return engine, checkpoint.load_shards(engine, path)


@pytest.mark.parametrize(
    ("precision", "optimizer"),
    [
        ("bf16", "adamw8bit"),
        ("fp32", "lion8bit"),
        ("fp32", "adamw"),
        pytest.param("fp32", "adamw8bit", marks=pytest.mark.slow),
        pytest.param("bf16", "lion8bit", marks=pytest.mark.slow),
        pytest.param("bf16", "adamw", marks=pytest.mark.slow),
        pytest.param("bf16", "lion", marks=pytest.mark.slow),
    ],
)
def test_a_chain_through_all_stages_changes_nothing(precision, optimizer, tmp_path):
    """Weights, masters and states of every kind: this model's matrices are whole blocks of 256 in each of them."""
    options = (f"train.precision={precision}", f"optimizer.name={optimizer}")
    engine, _ = tiny_engine(*options, *LAYOUTS["stage 0"])
    run_steps(engine, 0, 2)
    saved, path = values(engine), save(engine, tmp_path / "start")
    loss = run_steps(engine, 2, 1)[0][0]
    chain = ["stage 3", "stage 1", "stage 2", "stage 3, sub-groups", "stage 0"]
    for source, target in itertools.pairwise(["stage 0", *chain]):
        engine, report = take_over(path, (*options, *LAYOUTS[target]))
        here = values(engine)
        assert here.keys() == saved.keys()
        for key, value in saved.items():
            assert torch.equal(here[key], value), (source, target, key)
        assert report.requantised_blocks == 0
        assert (report.converted_shards > 0) == ((source, target) != ("stage 1", "stage 2"))
        path = save(engine, tmp_path / target)
        assert run_steps(engine, 2, 1)[0][0] == loss, (source, target)


# --- reading by range --------------------------------------------------------------------------------------------

SIGNED = bitsandbytes.functional.create_dynamic_map(signed=True)
UNSIGNED = bitsandbytes.functional.create_dynamic_map(signed=False)


def cut_group(sizes, ranks, alignment=2):
    """ZeRO-1 and 2: parameters end to end, the whole cut into equal partitions, the last ones padded."""
    total = sum(sizes.values())
    part = -(-total // (alignment * ranks)) * alignment
    layout = []
    for rank in range(ranks):
        pieces, begin = [], 0
        for name, size in sizes.items():
            first, last = max(begin, rank * part), min(begin + size, (rank + 1) * part)
            if first < last:
                pieces.append(Piece(name, first - begin, first - rank * part, last - first))
            begin += size
        layout.append((tuple(pieces), part))
    return layout


def cut_parameters(sizes, ranks, together=2):
    """ZeRO-3: each parameter cut into equal parts, padded, `together` of them one behind another in a sub-group."""
    layout = []
    names = list(sizes)
    for rank in range(ranks):
        for first in range(0, len(names), together):
            pieces, filled = [], 0
            for name in names[first : first + together]:
                part = -(-sizes[name] // ranks)
                numel = min(part, sizes[name] - rank * part)
                if numel > 0:
                    pieces.append(Piece(name, rank * part, filled, numel))
                filled += part
            layout.append((tuple(pieces), filled))
    return layout


def cut_anyhow(sizes, draw):
    """Pieces of drawn lengths with gaps between them, in drawn company."""
    shards = [([], 0) for _ in range(draw(st.integers(1, 4)))]
    for name, size in sizes.items():
        reached = 0
        while reached < size:
            numel = draw(st.integers(1, size - reached))
            number = draw(st.integers(0, len(shards) - 1))
            pieces, filled = shards[number]
            offset = filled + draw(st.integers(0, 300))
            pieces.append(Piece(name, reached, offset, numel))
            shards[number] = (pieces, offset + numel)
            reached += numel
    return [(tuple(pieces), filled) for pieces, filled in shards if pieces]


def drawn_layout(sizes, draw):
    kind = draw(st.sampled_from(["whole", "group", "parameters", "anyhow"]))
    if kind == "whole":
        return [((Piece(name, 0, 0, size),), size) for name, size in sizes.items()]
    if kind == "anyhow":
        return cut_anyhow(sizes, draw)
    ranks = draw(st.integers(1, 5))
    return cut_group(sizes, ranks) if kind == "group" else cut_parameters(sizes, ranks, draw(st.integers(1, 3)))


def write_layout(folder, layout, state_of):
    """A checkpoint of one rank's file per shard; state_of(pieces, numel) -> tensors of a shard, its master included."""
    names = {TRAINER_STATE: {"size": 0, "sha256": ""}}
    for number, (pieces, numel) in enumerate(layout):
        tensors = state_of(pieces, numel)
        key = f"shard{number}"
        entry = {
            "key": key,
            "pieces": [[p.name, p.start, p.offset, p.numel] for p in pieces],
            "tensors": [name for name in tensors if name != "master"],
            "numbers": {"step": 3},
        }
        file = folder / "tensors" / f"rank-{number:05d}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({f"{key}/{name}": value.contiguous() for name, value in tensors.items()}, file)
        file.with_suffix(".json").write_text(json.dumps([entry]))
        names |= {f"tensors/{name}": {"size": 0, "sha256": ""} for name in (file.name, f"{file.stem}.json")}
    (folder / "manifest.json").write_text(json.dumps({"format_version": FORMAT_VERSION, "files": names}))


def drawn_block_states(numel, generator, book):
    """Codes and scales as an optimizer leaves them: the largest magnitude of each block is its scale."""
    blocks = -(-numel // BLOCK)
    scales = 10.0 ** torch.empty(blocks).uniform_(-6, 1, generator=generator)
    values = torch.randn(blocks * BLOCK, generator=generator) * scales.repeat_interleave(BLOCK)
    codes, scales = quantise((values if book[0] < 0 else values.abs()).view(-1, BLOCK), book)
    return codes.view(-1)[:numel].clone(), scales


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_layout_is_read_into_any_other(data):
    draw = data.draw
    sizes = {f"p{i}": n for i, n in enumerate(draw(st.lists(st.integers(1, 1500), min_size=1, max_size=5)))}
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**30)))
    wanted = {name: {"master": torch.randn(n, generator=generator)} for name, n in sizes.items()}
    for name, size in sizes.items():
        wanted[name]["exp_avg"] = torch.randn(size, generator=generator)

    def state_of(pieces, numel):
        tensors = {"master": torch.full((numel,), torch.nan), "exp_avg": torch.full((numel,), torch.nan)}
        for number, book in (("1", SIGNED), ("2", UNSIGNED)):
            codes, scales = drawn_block_states(numel, generator, book)
            tensors |= {f"state{number}": codes, f"absmax{number}": scales, f"qmap{number}": book}
        for piece in pieces:
            place = slice(piece.offset, piece.offset + piece.numel)
            for name in ("master", "exp_avg"):
                tensors[name][place] = wanted[piece.name][name][piece.start : piece.start + piece.numel]
            for number in "12":
                whole = wanted[piece.name].setdefault(f"state{number}", torch.full((sizes[piece.name],), torch.nan))
                scales = tensors[f"absmax{number}"].repeat_interleave(BLOCK)[:numel]
                decoded = dequantise(tensors[f"state{number}"], scales, tensors[f"qmap{number}"])
                whole[piece.start : piece.start + piece.numel] = decoded[place]
        if draw(st.booleans()):  # as stage 0 has them
            tensors["exp_avg"] = tensors["exp_avg"].view(-1, 2 if numel % 2 == 0 else 1)
        return tensors

    with tempfile.TemporaryDirectory() as folder:
        write_layout(Path(folder), drawn_layout(sizes, draw), state_of)
        saved = SavedShards(Path(folder), sizes)
        elastic_window = draw(st.sampled_from([BLOCK, 4 * BLOCK, elastic.WINDOW]))
        for pieces, numel in drawn_layout(sizes, draw):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(elastic, "WINDOW", elastic_window)
                check_shard(saved, pieces, numel, wanted)


def check_shard(saved, pieces, numel, wanted):
    """Bit-equal where it must be; the rest no farther off than half the widest step of the book."""
    like = torch.full((numel,), 7.0)
    runs = saved.runs(pieces)
    saved.copy_weights(runs, "master", like)
    before = saved.blocks.requantised
    state = saved.state(runs, like)
    if not pieces:
        assert state == {}
        return
    assert list(state) == ["exp_avg", *(f"{kind}{n}" for n in "12" for kind in ("state", "absmax", "qmap")), "step"]
    assert state["step"] == 3
    again = saved.blocks.requantised - before
    decoded = {}
    for number in "12":
        scales = state[f"absmax{number}"].repeat_interleave(BLOCK)[:numel]
        book = state[f"qmap{number}"]
        decoded[f"state{number}"] = dequantise(state[f"state{number}"], scales, book)
        widest = (book[1:] - book[:-1]).max() * scales / 2
        for piece in pieces:
            place = slice(piece.offset, piece.offset + piece.numel)
            want = wanted[piece.name][f"state{number}"][piece.start : piece.start + piece.numel]
            error = (decoded[f"state{number}"][place] - want).abs()
            assert not (error > widest[place] * 1.001).any()
            assert again or not error.any()
    covered = torch.zeros(numel, dtype=torch.bool)
    for piece in pieces:
        place = slice(piece.offset, piece.offset + piece.numel)
        covered[place] = True
        for name, value in (("master", like), ("exp_avg", state["exp_avg"])):
            assert torch.equal(value[place], wanted[piece.name][name][piece.start : piece.start + piece.numel])
    assert (like[~covered] == 7.0).all(), "what no parameter owns stays as it was"
    for value in (state["exp_avg"], decoded["state1"], decoded["state2"]):
        assert not value[~covered].any(), "padding has no state"


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_blocks_stay_whole_where_parts_are_whole_blocks(ranks, tmp_path):
    """Parameters of a multiple of 256 x ranks elements: 8-bit states keep their codes between all layouts."""
    sizes = {"a": 12 * BLOCK, "b": 24 * BLOCK, "c": 36 * BLOCK}
    generator = torch.Generator().manual_seed(ranks)
    layouts = [[((Piece(n, 0, 0, s),), s) for n, s in sizes.items()], cut_group(sizes, ranks), cut_parameters(sizes, 2)]

    def state_of(pieces, numel):
        codes, scales = drawn_block_states(numel, generator, SIGNED)
        return {"master": torch.zeros(numel), "state1": codes, "absmax1": scales, "qmap1": SIGNED}

    for number, (source, target) in enumerate(itertools.permutations(layouts, 2)):
        folder = tmp_path / str(number)
        write_layout(folder, source, state_of)
        saved = SavedShards(folder, sizes)
        for pieces, numel in target:
            saved.state(saved.runs(pieces), torch.zeros(numel))
        assert saved.blocks == elastic.Blocks(sum(sizes.values()) // BLOCK, 0)


@pytest.mark.parametrize("config", ["qwen3-0.6b", "rwkv7-0.1b", "rwkv7-1.5b"])
def test_published_sizes_keep_their_blocks_whole(config):
    """What docs/checkpoint-format.md says of powers of two, by DeepSpeed's rules of cutting."""
    section = load_config(REPOSITORY / "configs" / f"{config}.yaml").model
    described = models.configuration(section.backbone, mask_token_id=1, **{**section.sizes(), "vocab_size": 1024})
    with torch.device("meta"):
        model = models.skeleton(described)
    roles = model.parameter_roles()
    sizes = {name: p.numel() for name, p in model.named_parameters() if ROLE_RULES[roles[name]].eight_bit}
    assert all(size % BLOCK == 0 for size in sizes.values())
    for ranks in (1, 2, 4, 32, 256):
        cuts = cut_group(sizes, ranks) + (cut_parameters(sizes, ranks, len(sizes)) if ranks < 64 else [])
        assert all((piece.start % BLOCK, piece.offset % BLOCK) == (0, 0) for pieces, _ in cuts for piece in pieces)
    assert any(piece.start % BLOCK for pieces, _ in cut_group(sizes, 11) for piece in pieces)
    assert all((size / BLOCK / 256).is_integer() for size in sizes.values())


def index_entry(key, *pieces, numbers=None, tensors=("exp_avg",)):
    return {"key": key, "pieces": list(pieces), "tensors": list(tensors), "numbers": numbers or {}}


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([index_entry("x", ["p", 0, 0, 4]), index_entry("y", ["p", 6, 0, 4])], "elements 4 to 6 of p are in it not at"),
        ([index_entry("x", ["p", 0, 0, 6]), index_entry("y", ["p", 4, 0, 6])], "elements 4 to 6 of p are in it more"),
        ([index_entry("x", ["p", 0, 0, 6])], "holds 6 elements of p, which has 10"),
        ([index_entry("x", ["p", 0, 0, 12])], "holds 12 elements of p, which has 10"),
        ([index_entry("x", ["q", 0, 0, 10])], "holds q, which is no trained parameter"),
        ([], "holds 0 elements of p, which has 10"),
    ],
)
def test_gaps_and_overlaps_name_the_parameter(entries, said, tmp_path):
    (tmp_path / "tensors").mkdir()
    (tmp_path / "tensors" / "rank-00000.json").write_text(json.dumps(entries))
    files = {name: {"size": 0, "sha256": ""} for name in (TRAINER_STATE, "tensors/rank-00000.json")}
    (tmp_path / "manifest.json").write_text(json.dumps({"format_version": FORMAT_VERSION, "files": files}))
    with pytest.raises(CheckpointError, match=said):
        SavedShards(tmp_path, {"p": 10})


@pytest.mark.parametrize("difference", ["step", "kind", "count tensor"])
def test_states_that_do_not_belong_together_are_refused(difference, tmp_path):
    sizes = {"a": 8, "b": 8}
    layout = [((Piece(name, 0, 0, 8),), 8) for name in sizes]
    counts = iter([1.0, 2.0 if difference == "count tensor" else 1.0])

    def state_of(pieces, numel):
        first = pieces[0].name == "a"
        kind = "exp_avg" if first or difference != "kind" else "other"
        return {"master": torch.zeros(8), kind: torch.zeros(8), "step": torch.tensor(next(counts))}

    write_layout(tmp_path, layout, state_of)
    if difference == "step":
        index = tmp_path / "tensors" / "rank-00001.json"
        index.write_text(index.read_text().replace('"step": 3', '"step": 4'))
    saved = SavedShards(tmp_path, sizes)
    with pytest.raises(CheckpointError, match="shard0 and shard1, which belong together here"):
        saved.state(saved.runs([Piece("a", 0, 0, 8), Piece("b", 0, 8, 8)]), torch.zeros(16))


def test_parameters_without_a_state_get_zeros(tmp_path):
    """Stage 0 makes no state for a parameter that never had a gradient; the flat shards of other stages have one."""
    sizes = {"a": 8, "b": 8}

    def state_of(pieces, numel):
        extra = {"exp_avg": torch.ones(8)} if pieces[0].name == "a" else {}
        return {"master": torch.zeros(8), **extra}

    write_layout(tmp_path, [((Piece(name, 0, 0, 8),), 8) for name in sizes], state_of)
    saved = SavedShards(tmp_path, sizes)
    both = saved.state(saved.runs([Piece("b", 0, 0, 8), Piece("a", 0, 8, 8)]), torch.zeros(2, 8))
    assert torch.equal(both["exp_avg"], torch.tensor([[0.0] * 8, [1.0] * 8]))
    assert saved.state(saved.runs([Piece("b", 0, 0, 8)]), torch.zeros(8)) == {}


# --- the quantiser -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit"])
def test_what_bitsandbytes_quantised_comes_back(name):
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(64, BLOCK, generator=generator))
    optimizer = getattr(bitsandbytes.optim, name)([parameter], lr=1e-3, min_8bit_size=0)
    for _ in range(3):
        parameter.grad = torch.randn(64, BLOCK, generator=generator) * torch.logspace(-6, 2, 64)[:, None]
        optimizer.step()
    state = optimizer.state[parameter]
    for number in "12" if name == "AdamW8bit" else "1":
        codes, scales, book = (state[f"{kind}{number}"] for kind in ("state", "absmax", "qmap"))
        assert not (codes.view(64, BLOCK).amax(1) == 255).all() or number == "2", "some block ends below zero"
        again, new_scales = quantise(dequantise(codes.view(64, BLOCK), scales[:, None], book), book)
        assert torch.equal(again, codes.view(64, BLOCK))
        torch.testing.assert_close(new_scales, scales, rtol=1.2e-7, atol=0)


@pytest.mark.parametrize("book", [SIGNED, UNSIGNED])
def test_the_quantiser_is_that_of_bitsandbytes_where_that_one_is_right(book):
    values = torch.randn(64, BLOCK, generator=torch.Generator().manual_seed(1))
    values[:, 7] = values.abs().amax(1) * 1.5
    values = values if book[0] < 0 else values.abs()
    codes, scales = quantise(values, book)
    theirs, state = bitsandbytes.functional.quantize_blockwise(values, code=book, blocksize=BLOCK)
    assert torch.equal(scales, state.absmax)
    # Theirs rounds to the nearest of a coarser grid on a CPU: ours is never farther off, and mostly the same.
    ours, other = (dequantise(found, scales[:, None], book) for found in (codes, theirs))
    assert ((ours - values).abs() <= (other - values).abs() * (1 + 1e-6))[ours.abs() > 1e-5 * scales[:, None]].all()
    assert torch.equal(ours.sign(), values.sign()), "nothing is lost"
    assert (codes == theirs).float().mean() > 0.99


def test_a_block_whose_largest_value_is_negative_does_not_shrink():
    values = torch.linspace(-3.0, 1.0, BLOCK)[None]
    codes, scales = quantise(values, SIGNED)
    for _ in range(5):
        once = dequantise(codes, scales[:, None], SIGNED)
        codes, scales = quantise(once, SIGNED)
        torch.testing.assert_close(dequantise(codes, scales[:, None], SIGNED), once, rtol=2e-7, atol=0)
    assert once.min() == pytest.approx(-3.0, rel=1e-6)
    tiny, scale = quantise(torch.cat([torch.ones(1), torch.full((BLOCK - 1,), 1e-20)])[None], UNSIGNED)
    assert (dequantise(tiny, scale[:, None], UNSIGNED) > 0).all(), "no second moment is lost"
    zeros, none = quantise(torch.zeros(1, BLOCK), SIGNED)
    assert not none.any()
    assert not dequantise(zeros, none[:, None], SIGNED).any()
