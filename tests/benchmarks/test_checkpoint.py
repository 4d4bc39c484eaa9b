import json

from benchmarks import checkpoint


def test_the_script_runs_and_its_last_line_says_what_it_must(tmp_path, capsys):
    assert checkpoint.main(["--quick", "--folder", str(tmp_path), "--output", str(tmp_path / "out.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert lines[-1] == (tmp_path / "out.json").read_text().strip()
    assert {
        "ours",
        "raw write + fsync",
        "torch.save + fsync",
        "DCP",
        "copy",
        "ours async stall",
        "DCP async stall",
    } <= (result["seconds"].keys())
    assert result["bytes"] == 8_000_000
    assert result["save_over_raw"] > 0
    assert result["stall_in_copies"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_goals_are_judged_by_medians_of_ratios_within_a_round():
    times = {
        name: [1.0, 1.0, 9.0]
        for name in (
            *("raw write + fsync", "ours", "torch.save + fsync", "DCP", "copy", "ours async stall", "DCP async stall"),
            *("verify ours", "read ours", "load torch", "load DCP"),
        )
    }
    result = checkpoint.summary(times | {"ours": [1.25, 0.1, 18.0]}, 10**9)
    assert result["save_over_raw"] == 0.8
    assert result["load_over_torch"] == 0.5
    assert not result["save_goal_met"]
    assert result["stall_goal_met"]
