"""`dlm chain` and the launcher of a node, with SLURM's commands replaced by scripts; tests/slurm has the real ones."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dlm_dist.training.chain import Chain, Outcome, read_results
from dlm_dist.training.lease import Lease, LeaseError
from launcher import chain_command, slurm
from launcher.node import cores_by_place, shares
from launcher.slurm import adopt_srun_task, first_host, rendezvous_port
from tests.distributed import runs

CONFIG = "tests/distributed/tiny.yaml"
RUN = """\
import sys, pathlib, os, signal, time
run = pathlib.Path([word for word in sys.argv if word.startswith("run.dir=")][0][8:])
(run / "called").write_text(" ".join(sys.argv[1:]))
if {saves}:
    (run / "checkpoints" / "step-5").mkdir(parents=True)
    (run / "checkpoints" / "step-5" / "manifest.json").touch()
{more}
sys.exit({status})
"""


@pytest.fixture
def chain(tmp_path):
    """Call `dlm chain` as a task of array 7 -> (status, what it said, what it asked of SLURM)."""
    programs = tmp_path / "bin"
    programs.mkdir()
    asked = tmp_path / "asked"
    for name in ("scontrol", "squeue", "sinfo"):
        (programs / name).write_text(
            f'#!/bin/sh\necho "{name} $@" >> {asked}\ncase "{name} $2" in\n'
            f'"scontrol hostnames") echo "$3" | tr , "\\n" ;;\n"scontrol job") echo "ExcNodeList=z" ;;\n'
            f"squeue*) cat {tmp_path}/waiting ;;\nsinfo*) cat {tmp_path}/working ;;\nesac\n"
        )
        (programs / name).chmod(0o755)

    def call(status=0, saves=False, waiting="7_1\n7_2\n", working="a b c", nodes="a,b", more="", ends=None):
        asked.write_text("")
        (tmp_path / "waiting").write_text(waiting)
        (tmp_path / "working").write_text(working.replace(" ", "\n"))
        (tmp_path / "run.py").write_text(RUN.format(status=status, saves=saves, more=more))
        done = subprocess.run(
            [
                *(sys.executable, "-m", "launcher.cli", "chain", "--config", CONFIG),
                *runs.overrides(tmp_path / "data", tmp_path / "run"),
                *("--command", sys.executable, str(tmp_path / "run.py"), "nodes={nodelist}/{nodes}"),
            ],
            cwd=runs.REPOSITORY,
            env=os.environ
            | {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "8", "SLURM_JOB_NODELIST": nodes}
            | {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0", "SLURM_JOB_PARTITION": "main"}
            | ({"SLURM_JOB_END_TIME": str(ends)} if ends is not None else {}),
            capture_output=True,
            text=True,
            timeout=60,
        )
        wanted = [line for line in asked.read_text().splitlines() if "update" in line or "requeue" in line]
        return done.returncode, done.stderr, wanted

    (tmp_path / "run").mkdir()
    call.run = tmp_path / "run"
    return call


def test_a_finished_run_is_marked_and_not_started_again(chain):
    assert chain(0, saves=True)[::2] == (0, [])
    assert (chain.run / "DONE").read_text() == "job 7_0 reached the last step, 5\n"
    called = (chain.run / "called").read_text()
    assert called.startswith(f"nodes=a,b/2 --config {CONFIG} --resume auto model.backbone=rwkv7")
    (chain.run / "called").unlink()
    status, said, _ = chain(1)
    assert status == 0
    assert "job 7_0 reached the last step, 5; nothing is left to do" in said
    assert not (chain.run / "called").exists()


def test_a_stopped_run_is_not_started(chain):
    (chain.run / "STOP").write_text("the disk is being moved")
    status, said, _ = chain(0)
    assert status == 3
    assert "STOP is there: the disk is being moved" in said
    assert not (chain.run / "called").exists()


def test_the_next_job_of_the_array_goes_on_or_this_one_once_more(chain):
    assert chain(75, saves=True)[::2] == (75, [])
    assert chain(75, waiting="")[::2] == (75, ["scontrol requeue 7_0"])


def test_of_a_sweep_nobody_else_goes_on_with_a_run(chain, monkeypatch):
    monkeypatch.setenv("DLM_SWEEP", "1")
    assert chain(75, saves=True)[::2] == (75, ["scontrol requeue 7_0"])


def test_three_attempts_without_a_checkpoint_stop_the_chain(chain):
    for _ in range(2):
        assert chain(1, waiting="")[::2] == (1, ["scontrol requeue 7_0"])
    status, _, asked = chain(1, waiting="")
    assert (status, asked) == (1, [])
    assert "3 attempts in a row made no new checkpoint" in (chain.run / "STOP").read_text()
    assert chain(0)[0] == 3


def test_jobs_are_kept_off_a_node_that_failed_twice(chain):
    for name in ("6_0", "6_1"):
        Chain(chain.run).begin(name, ["a", "b"])
        Chain(chain.run).end(name, Outcome(1, {"b": "x"}), False)
    status, said, asked = chain(0)
    assert (status, asked) == (3, ["scontrol update JobId=7_1,7_2 ExcNodeList=z,b"])
    assert "b failed before" in said
    # Nobody else is there to go on: better on that node than not at all. It gets on, and all is forgotten.
    assert chain(75, saves=True, waiting="")[::2] == (75, ["scontrol requeue 7_0"])


def test_a_job_that_goes_back_into_the_queue_is_kept_off_a_bad_node(chain):
    Chain(chain.run).begin("6_0", ["a", "b"])
    Chain(chain.run).end("6_0", Outcome(1, {"b": "x"}), False)
    fails_on_b = (
        "import json; logs = pathlib.Path(os.environ['DLM_LOG_DIR']); logs.mkdir(parents=True)\n"
        "for node, status in (('a', 74), ('b', 9)):\n"
        "    (logs / f'node-{node}.json').write_text(json.dumps({'node': node, 'status': status, 'told': 'x'}))"
    )
    assert chain(1, more=fails_on_b, waiting="")[::2] == (
        9,
        ["scontrol requeue 7_0", "scontrol update JobId=7_0 ExcNodeList=z,b"],
    )


def test_a_node_is_not_excluded_where_the_jobs_would_wait_for_ever(chain):
    for name in ("6_0", "6_1"):
        Chain(chain.run).begin(name, ["a", "b"])
        Chain(chain.run).end(name, Outcome(1, {"b": "x"}), False)
    status, said, asked = chain(75, saves=True, working="a b")
    assert (status, asked) == (75, [])
    assert "b failed before, and too few others work: trying again" in said
    # It got on: what b did before is forgotten.
    assert (chain.run / "chain" / "excluded_nodes").read_text() == ""


def test_it_takes_as_many_nodes_as_divide_the_batch(chain):
    status, said, _ = chain(75, saves=True, nodes="a,b,c,d,e")
    assert status == 75
    assert "5 nodes of 1 ranks do not divide train.global_batch_size = 8: goes on with 4, e idle" in said
    assert (chain.run / "called").read_text().startswith("nodes=a,b,c,d/4 ")
    assert [attempt.nodes for attempt in Chain(chain.run).attempts()] == [("a", "b", "c", "d")]


ENDED = "os.kill(os.getppid(), signal.SIGTERM); time.sleep(2)"


def test_who_is_told_to_end_has_not_failed_but_at_a_time_limit(chain):
    status, _, asked = chain(1, more=ENDED, waiting="")
    assert (status, asked) == (1, [])
    assert Chain(chain.run).attempts()[-1].told
    status, _, asked = chain(1, more=ENDED, waiting="", ends=time.time() + 30)
    assert (status, asked) == (1, ["scontrol requeue 7_0"])
    assert not Chain(chain.run).attempts()[-1].told


def test_a_chain_that_is_killed_has_noted_that_it_was_told_to_end(chain):
    kill = "os.kill(os.getppid(), signal.SIGTERM); time.sleep(2); os.kill(os.getppid(), signal.SIGKILL)"
    assert chain(1, more=kill)[0] == -signal.SIGKILL
    (attempt,) = Chain(chain.run).attempts()
    assert (attempt.status, attempt.told) == (None, True)


def test_a_node_that_died_is_named_by_the_next_job(chain):
    assert chain(1, more="os.kill(os.getppid(), signal.SIGKILL)")[0] == -signal.SIGKILL
    beats = chain.run / "heartbeats"
    beats.mkdir()
    for rank, (host, seconds) in enumerate((("a", 300), ("b", 20))):
        beat = {"rank": rank, "host": host, "time": time.time() + seconds, "interval": 15.0}
        (beats / f"rank-{rank:05d}.json").write_text(json.dumps(beat))
    _, said, _ = chain(75, saves=True)
    assert "node b failed in attempt 7_0: it fell silent 280 s before the others" in said


def test_a_job_waits_for_an_earlier_one_of_its_array_that_slurm_has_lost(tmp_path, monkeypatch, capsys):
    """Its node is cut off from SLURM and goes on: to end at once would use up the array."""
    chain = Chain(tmp_path)
    owner = Lease(chain.folder)
    job = slurm.Job(9, 7, "7_1", 0, ("a",), "main", None, 1)
    with pytest.raises(LeaseError):  # of another array, or started by hand
        chain_command._take(chain.folder, chain, job)
    chain.begin("7_0", ["b"])
    monkeypatch.setattr(chain_command.time, "sleep", lambda seconds: owner.release())
    chain_command._take(chain.folder, chain, job).release()
    assert "an earlier job of this array is still at work, waiting for its end" in capsys.readouterr().err
    owner = Lease(chain.folder)
    chain.end("7_0", Outcome(75), False)
    with pytest.raises(LeaseError):
        chain_command._take(chain.folder, chain, job)
    owner.release()


def test_slurm_is_asked_again_where_its_controller_is_away(tmp_path, monkeypatch):
    (tmp_path / "scontrol").write_text(
        f"#!/bin/sh\necho x >> {tmp_path}/calls\n"
        f"[ $(wc -l < {tmp_path}/calls) -gt 2 ] && echo n1 && exit 0\n"
        'echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2; exit 1\n'
    )
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm.time, "sleep", lambda seconds: None)
    job = slurm.Job.this({"SLURM_JOB_ID": "3", "SLURM_JOB_NODELIST": "n1"})
    assert job.nodes == ("n1",)
    assert (tmp_path / "calls").read_text().count("x") == 3
    (tmp_path / "scontrol").write_text('#!/bin/sh\necho "Invalid job id specified" >&2; exit 1\n')
    with pytest.raises(OSError, match="Invalid job id"):
        job.requeue()


def test_outside_of_a_job_it_says_how_to_get_one(tmp_path):
    plain = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "launcher.cli", "chain", "--config", CONFIG),
            *runs.overrides(tmp_path, tmp_path),
            *("--command", "true"),
        ],
        cwd=runs.REPOSITORY,
        env=plain,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "sbatch slurm/pretrain.sbatch" in done.stderr


@pytest.fixture
def node(tmp_path):
    """Run a program as the ranks of a node -> (status, the node's record, standard error)."""

    def call(program, **environment):
        (tmp_path / "program.py").write_text(program)
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "RANK"))}
        done = subprocess.run(
            [sys.executable, "-m", "launcher.node", str(tmp_path / "program.py")],
            cwd=runs.REPOSITORY,
            env=plain | {"DLM_LOG_DIR": str(tmp_path / "logs"), "SLURMD_NODENAME": "a", **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, json.loads((tmp_path / "logs" / "node-a.json").read_text()), done

    call.logs = tmp_path / "logs"
    return call


def test_every_rank_knows_its_place_and_has_a_log(node):
    program = "import os; print(*(os.environ[n] for n in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE')))"
    status, record, done = node(
        program, RANKS_PER_NODE="2", SLURM_NODEID="1", SLURM_STEP_NUM_NODES="3", WANDB_API_KEY="secret"
    )
    assert status == 0, done.stderr
    assert (node.logs / "rank-00002.a.log").read_text() == "2 0 6\n"
    assert (node.logs / "rank-00003.a.log").read_text() == "3 1 6\n"
    assert record["ranks"] == {"2": 0, "3": 0}
    assert record["environment"]["RANKS_PER_NODE"] == "2"
    assert "secret" not in json.dumps(record)
    assert done.stdout == ""


def test_rank_0_is_heard_on_the_console_too(node):
    status, _, done = node("print('step 1')")
    assert status == 0
    assert done.stdout == (node.logs / "rank-00000.a.log").read_text() == "step 1\n"


def test_the_first_rank_that_fails_is_told_and_the_others_are_ended(node):
    program = "import os, time; os.environ['RANK'] == '1' and (print('no such device'), exit(9)); time.sleep(1000)"
    status, record, done = node(program, RANKS_PER_NODE="2", CPU_BIND="none")
    assert status == 9
    assert record["status"] == 9
    assert abs(record["failed"] - time.time()) < 60
    assert record["told"] == "no such device"
    assert record["ranks"] == {"0": 137, "1": 9}
    assert "node a: rank 1 ended with status 9" in done.stderr


def test_an_early_stop_is_no_failure_to_srun(node):
    """Which would end the launchers of the other nodes."""
    status, record, _ = node("exit(75)", RANKS_PER_NODE="2", CPU_BIND="none")
    assert (status, record["status"], record["ranks"]) == (0, 75, {"0": 75, "1": 75})


def test_the_second_node_without_python_holds_the_array(tmp_path):
    """By then the environment is more likely to be wrong than the nodes. What the user excluded stays excluded."""
    shown = "[ $1 != show ] || echo 'Reason=None ExcNodeList=z NodeList=a'"
    for name, text in (("python", "exit 1"), ("scontrol", f'echo "$@" >> {tmp_path}/asked\n{shown}')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)

    def start(node):
        (tmp_path / "asked").write_text("")
        environment = {"PATH": f"{tmp_path}:{os.defpath}", "SLURMD_NODENAME": node, "DLM_VENV": "none"}
        environment |= {"SLURM_JOB_ID": "8", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"}
        command = ["bash", "-euo", "pipefail", "-c", f"source {runs.REPOSITORY}/slurm/environment.sh"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        return done.stderr, [line for line in (tmp_path / "asked").read_text().splitlines() if "show" not in line]

    excluded = ["requeue 7_0", "update JobId=7 ExcNodeList=z,a", "update JobId=7_0 ExcNodeList=z,a"]
    for _ in range(2):  # the same node again is no second one
        said, asked = start("a")
        assert asked == excluded, said
    said, asked = start("b")
    assert asked == ["requeuehold 7_0", "hold 7"], said
    assert "scontrol release 7" in said


@pytest.mark.parametrize(
    ("python", "status", "found"), [("exit 126", 126, ["a"]), ("kill -TERM $PPID; kill -TERM $$", 143, [])]
)
def test_a_node_without_python_leaves_a_record(tmp_path, python, status, found):
    """But none where it was ended from outside before Python could leave one."""
    (tmp_path / "python").write_text(f"#!/bin/sh\n{python}\n")
    (tmp_path / "python").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.defpath}", "SLURMD_NODENAME": "a", "DLM_LOG_DIR": str(tmp_path / "logs")}
    command = ["bash", "slurm/node.sh", "launcher/pretrain.py"]
    done = subprocess.run(command, cwd=runs.REPOSITORY, env=environment, capture_output=True, timeout=60)
    results = read_results(tmp_path / "logs")
    assert done.returncode == status
    assert [result.node for result in results] == found
    assert all(result.status == status and "the launcher does not start" in result.told for result in results)


def test_ranks_that_share_a_core_are_warned_of(node):
    ranks = str(len(cores_by_place(os.sched_getaffinity(0))) + 1)
    _, _, done = node("print(1)", RANKS_PER_NODE=ranks)
    assert f"node a: warning: {ranks} ranks share " in done.stderr


def test_a_rank_that_is_ended_from_outside_has_not_failed(node):
    """SLURM signals every process of a step."""
    program = "import os, signal\nos.kill(os.getppid(), signal.SIGTERM)\nos.kill(os.getpid(), signal.SIGTERM)"
    status, record, done = node(program)
    assert status == 143
    assert record["status"] is None
    assert record["ranks"] == {"0": 143}
    assert done.stderr == ""


def fake_cpu(system: Path, cpu: int, numa: int, first_sibling: int) -> None:
    folder = system / "cpu" / f"cpu{cpu}"
    (folder / f"node{numa}").mkdir(parents=True)
    (folder / "topology").mkdir()
    (folder / "topology" / "thread_siblings_list").write_text(f"{first_sibling},{first_sibling + 4}\n")


def test_ranks_get_whole_cores_of_one_numa_node(tmp_path):
    for cpu in range(8):  # four cores of two threads; cores 0, 2 belong to the first socket
        fake_cpu(tmp_path, cpu, cpu % 2, cpu % 4)
    cores = cores_by_place(set(range(8)), tmp_path)
    assert cores == [[0, 4], [2, 6], [1, 5], [3, 7]]
    assert shares(cores, 2) == [{0, 4, 2, 6}, {1, 5, 3, 7}]
    assert shares(cores, 3) == [{0, 4}, {2, 6}, {1, 5, 3, 7}]
    assert shares(cores, 5) is None
    assert cores_by_place({1, 6}, tmp_path) == [[6], [1]]


@pytest.mark.parametrize(
    ("nodes", "first"), [("n1", "n1"), ("gpu[03-05,7],login1", "gpu03"), ("gpu-a[7,9]", "gpu-a7"), ("b,a", "b")]
)
def test_the_first_host_of_a_list(nodes, first):
    assert first_host(nodes) == first


def test_ports_are_those_of_the_script():
    assert rendezvous_port(20123) == 10123
    assert "MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))" in Path(runs.REPOSITORY, "slurm/pretrain.sbatch").read_text()


def test_a_task_of_srun_is_a_rank():
    task = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}
    task |= {"SLURM_JOB_ID": "3", "SLURM_JOB_NODELIST": "n[1-2]"}
    adopted = task | {"SLURM_STEP_ID": "0"}
    adopt_srun_task(adopted)
    assert (adopted["RANK"], adopted["WORLD_SIZE"]) == ("5", "8")
    assert (adopted["LOCAL_RANK"], adopted["LOCAL_WORLD_SIZE"]) == ("1", "4")
    assert (adopted["MASTER_ADDR"], adopted["MASTER_PORT"]) == ("n1", "10003")
    for other in (task, task | {"SLURM_STEP_ID": "0", "RANK": "0"}, task | {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "1"}):
        before = dict(other)
        adopt_srun_task(other)
        assert other == before
