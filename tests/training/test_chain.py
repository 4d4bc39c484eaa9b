"""What the attempts of a chain come to: when it gives up, and which node is to blame."""

import json

import pytest

from dlm_dist.training.chain import Attempt, Chain, NodeResult, Outcome, fell_silent, judge, read_results
from dlm_dist.training.checkpoint_files import MANIFEST

TWO = ("a", "b")


def results(**statuses):
    return [NodeResult(node, status, "out of memory") for node, status in statuses.items()]


def blamed(nodes, found, silent=(), status=1):
    return set(judge(nodes, found, silent, status).blamed)


def test_the_command_finished():
    assert judge(TWO, results(a=0, b=0), [], 0) == Outcome(0)
    assert judge(TWO, results(a=0, b=0), [], 137) == Outcome(0)  # srun did not hear of it
    assert judge(TWO, results(a=0, b=None), [], 137) == Outcome(137)


def test_srun_ends_the_other_launchers_of_a_run_that_stopped_early():
    assert judge(TWO, results(a=75, b=None), [], 143) == Outcome(75)
    assert judge(TWO, results(a=75, b=75), [], 75) == Outcome(75)


def test_who_fails_while_another_does_not_is_blamed():
    outcome = judge(TWO, results(a=74, b=1), [], 137)
    assert outcome == Outcome(1, {"b": "a rank ended with status 1: out of memory"})
    assert blamed(TWO, results(a=None, b=2)) == {"b"}


def test_what_fails_alike_everywhere_is_nobodys_fault():
    assert judge(TWO, results(a=2, b=2), [], 2) == Outcome(2)
    assert judge(TWO, results(a=1, b=139), [], 139).blamed == {}


def test_of_those_that_fail_the_first_is_blamed():
    found = [NodeResult(node, 1, "x", failed) for node, failed in (("a", 9.0), ("b", 5.0), ("c", 7.0), ("d", None))]
    assert blamed("abcde", found) == {"b"}
    lost = NodeResult("a", 134, "ncclRemoteError: A call failed possibly due to a network error", 3.0)
    assert blamed("abcde", [lost, *found[1:]]) == {"b"}


def test_nobody_is_blamed_where_the_job_was_told_to_end():
    assert judge(TWO, results(a=None, b=1), [], 1, told=True) == Outcome(1)
    assert judge(TWO, results(a=None), [], 143, told=True) == Outcome(143)


def test_of_a_node_alone_a_crash_counts_and_a_mistake_of_the_user_does_not():
    assert blamed(("a",), results(a=2)) == set()
    assert blamed(("a",), results(a=135)) == {"a"}
    assert blamed(("a",), results(a=1)) == set()
    assert blamed(("a",), [NodeResult("a", 1, "CUDA error: uncorrectable ECC error encountered")]) == {"a"}


def test_a_node_on_which_nothing_starts_is_blamed():
    assert judge(TWO, results(a=None), [], 127) == Outcome(127, {"b": "no launcher started there"})
    assert judge(TWO, [], [], 1) == Outcome(1)  # srun itself, or every node
    many = [f"g{i}" for i in range(64)]
    assert blamed(many, results(**dict.fromkeys(many[:63]))) == {"g63"}
    assert blamed(many, results(**dict.fromkeys(many[:10]))) == set()  # srun ended before they began


def test_watchdogs_name_the_nodes_that_hold_the_others_up():
    assert judge(TWO, results(a=76, b=None), ["b"], 137) == Outcome(
        76, {"b": "it held the others up until their watchdogs ended them"}
    )
    assert judge(TWO, results(a=76, b=76), [], 76) == Outcome(76)


def checkpoint(run, step):
    folder = run / "checkpoints" / f"step-{step}"
    folder.mkdir(parents=True)
    (folder / MANIFEST).touch()


def attempt(chain, name, outcome=None, told=False, nodes=TWO):
    chain.begin(name, nodes)
    if outcome is not None:
        chain.end(name, outcome, told)


def test_attempts_without_a_new_checkpoint_end_the_chain(tmp_path):
    chain = Chain(tmp_path)
    for name in ("1_0", "1_1"):
        attempt(chain, name, Outcome(1))
    assert chain.why_give_up(3) is None
    checkpoint(tmp_path, 7)
    assert chain.why_give_up(3) is None
    attempt(chain, "1_2")
    chain.begin("1_3", TWO)
    checkpoint(tmp_path, 9)
    chain.end("1_3", Outcome(1), False)
    assert chain.why_give_up(1) is None
    attempt(chain, "1_4", Outcome(76))
    attempt(chain, "1_5", Outcome(143), told=True)  # SLURM's wish, and no crash
    attempt(chain, "1_6")
    assert chain.why_give_up(3) is None
    reason = chain.why_give_up(2)
    assert reason == (
        "2 attempts in a row made no new checkpoint (1_4 on a,b: status 76, 1_6 on a,b: killed, or its node died)"
    )
    chain.give_up(reason)
    assert (tmp_path / "STOP").read_text() == f"{reason}\n"
    # Who removes STOP has mended something.
    assert Chain(tmp_path).why_give_up(1) is None


def test_a_killed_attempt_that_saved_was_not_fruitless(tmp_path):
    chain = Chain(tmp_path)
    attempt(chain, "1_0")
    checkpoint(tmp_path, 3)
    attempt(chain, "1_1")
    assert [(found.checkpoint, found.reached) for found in chain.attempts()] == [(-1, 3), (3, 3)]
    assert chain.why_give_up(2) is None
    assert chain.why_give_up(1) is not None


def test_a_node_is_excluded_after_its_second_failure(tmp_path):
    chain = Chain(tmp_path)
    attempt(chain, "1_0", Outcome(1, {"b": "x"}))
    assert chain.excluded() == []
    attempt(chain, "1_1", Outcome(1, {"a": "x"}))
    attempt(chain, "1_2", Outcome(1, {"b": "y"}))
    assert chain.excluded() == ["b"]
    assert (tmp_path / "chain" / "excluded_nodes").read_text() == "b\n"


def test_what_a_node_did_before_a_good_attempt_is_forgotten(tmp_path):
    chain = Chain(tmp_path)
    attempt(chain, "1_0", Outcome(1, {"b": "x"}))
    chain.begin("1_1", TWO)
    checkpoint(tmp_path, 5)
    chain.end("1_1", Outcome(1, {"a": "x"}), False)
    attempt(chain, "1_2", Outcome(1, {"b": "y"}))
    assert chain.excluded() == []
    attempt(chain, "1_3", Outcome(1, {"b": "y"}))
    assert chain.excluded() == ["b"]
    attempt(chain, "1_4", Outcome(1, {"c": "y"}), nodes=("a", "c"))
    assert chain.excluded() == ["b"]  # it had no part


def test_an_attempt_that_was_told_to_end_and_then_killed_is_no_failure(tmp_path):
    chain = Chain(tmp_path)
    for name in ("1_0", "1_1", "1_2"):
        chain.begin(name, TWO)
        chain.asked_to_end(name)
    assert [(found.status, found.told) for found in chain.attempts()] == [(None, True)] * 3
    assert chain.why_give_up(1) is None


def test_a_node_that_fell_silent_is_blamed_afterwards(tmp_path):
    def beat(host, time):
        return {"host": host, "time": time, "interval": 15.0}

    attempt = Attempt("1_0", ("a", "b", "c"), -1, -1, begun=1000.0)
    beats = [beat("a", 2000.0), beat("b.cluster", 1700.0), beat("c", 1995.0), beat("d", 1500.0)]
    assert fell_silent(attempt, beats) == {"b": "it fell silent 300 s before the others"}
    assert fell_silent(attempt, [beat("a", 2000.0), beat("c", 900.0)]) == {}  # of an earlier attempt
    assert fell_silent(attempt, []) == {}
    chain = Chain(tmp_path)
    for name in ("1_0", "1_1"):
        chain.begin(name, TWO)
        chain.died(name, {"b": "it fell silent"})
    assert chain.excluded() == ["b"]
    assert [found.status for found in chain.attempts()] == [None, None]
    assert chain.why_give_up(2) is not None


def test_a_line_that_a_kill_has_torn_is_replaced(tmp_path):
    chain = Chain(tmp_path)
    attempt(chain, "1_0", Outcome(1))
    path = tmp_path / "chain" / "attempts.jsonl"
    path.write_bytes(path.read_bytes() + b'{"event": "beg')
    assert [found.name for found in chain.attempts()] == ["1_0"]
    attempt(chain, "1_1")
    assert [found.name for found in chain.attempts()] == ["1_0", "1_1"]
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 3


@pytest.mark.parametrize("status", [None, 75])
def test_results_are_read(tmp_path, status):
    (tmp_path / "node-a.json").write_text(json.dumps({"node": "a", "status": status, "told": "x", "cpus": []}))
    assert read_results(tmp_path) == [NodeResult("a", status, "x")]
