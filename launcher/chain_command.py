"""`dlm chain`: one job's part of a run that many jobs finish. slurm/pretrain.sbatch calls it; see docs/slurm.md."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from dlm_dist.training.chain import FINISHED, Chain, NodeResult, judge, read_results
from dlm_dist.training.switches import DONE, STOP
from launcher.slurm import Job

MAX_FRUITLESS = 3

_STOPPED = 3
"""Exit status where STOP, another chain or a bad node kept the job from starting the run."""


_SECONDS_AFTER_THE_FIRST = 120.0
"""More than srun --wait and SLURM's KillWait together."""

_SECONDS_BETWEEN_LOOKS = 15.0


def add_chain_command(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `dlm chain`."""
    chain = subparsers.add_parser(
        "chain",
        help="go on with a run inside a job of SLURM (slurm/pretrain.sbatch does)",
        description="Run COMMAND --config FILE --resume auto OVERRIDES, unless RUN/DONE or RUN/STOP is there, another "
        "chain works on the run, or this job was given a node that is known to be bad. Afterwards mark a finished run, "
        "keep the jobs that wait off a node that failed twice, stop the chain when attempts make no new "
        "checkpoint, and put the job into the queue again where no other is left to go on.",
        epilog="The exit status is that of the run: 0 finished, 75 stopped early with a checkpoint, 76 ended by its "
        "watchdog; and 3 where it was not started.",
    )
    chain.add_argument("--config", type=Path, required=True, help="YAML file of the run")
    chain.add_argument(
        "--max-fruitless",
        type=int,
        default=MAX_FRUITLESS,
        metavar="N",
        help="attempts in a row without a new checkpoint before the chain stops (default: %(default)s)",
    )
    chain.add_argument("overrides", nargs="*", metavar="key.sub=value", help="values that replace those of the file")
    chain.add_argument("--command", nargs=argparse.REMAINDER, required=True, help="starts the ranks; the last option")
    chain.set_defaults(run=run_chain)


def run_chain(options: argparse.Namespace) -> int:
    """Go on with the run if there is anything to do, and decide what comes after it."""
    from dlm_dist.config import load_config
    from dlm_dist.training.lease import Lease, LeaseError

    config = load_config(options.config, options.overrides)
    run_dir = config.run.dir
    job = Job.this(os.environ)
    marked = _status_by_marker(run_dir)
    if marked is not None:
        return marked
    chain = Chain(run_dir)
    try:
        lease = Lease(chain.folder, tell=_tell)
    except LeaseError as error:
        _tell(f"not started, another chain is at work: {error}")
        return _STOPPED
    try:
        # A run that was started by hand; also, the ranks need not wait for a sign of an owner whose node is gone.
        Lease(run_dir, tell=_tell).release()
        # Who was at work until now may have finished.
        marked = _status_by_marker(run_dir)
        return marked if marked is not None else _attempt(options, run_dir, job, chain)
    except LeaseError as error:
        _tell(f"not started: {error}")
        return _STOPPED
    finally:
        lease.release()


def _status_by_marker(run_dir: Path) -> int | None:
    """The exit status where a marker file says that there is nothing to start; else None."""
    done, stop = run_dir / DONE, run_dir / STOP
    if done.exists():
        _tell(f"{done}: {done.read_text().strip()}; nothing is left to do")
        return FINISHED
    if stop.exists():
        _tell(f"not started, {stop} is there: {stop.read_text().strip() or 'it says no reason'}")
        return _STOPPED
    return None


def _attempt(options: argparse.Namespace, run_dir: Path, job: Job, chain: Chain) -> int:
    if _gives_up(chain, options.max_fruitless, run_dir) or _sits_on_a_bad_node(chain, job):
        return _STOPPED
    logs = run_dir / "logs" / job.attempt
    started = time.time()
    chain.begin(job.attempt, job.nodes)
    _tell(f"attempt {job.attempt} on {','.join(job.nodes)}, newest checkpoint: {chain.newest()}; logs in {logs}")
    arguments = ["--config", str(options.config), "--resume", "auto", *options.overrides]
    status, told = _run([*options.command, *arguments], logs)
    results = read_results(logs)
    outcome = judge(job.nodes, results, _laggard_nodes(run_dir, started, results), status)
    chain.end(job.attempt, outcome, told)
    _tell(f"attempt {job.attempt} ended with status {outcome.status}, newest checkpoint: {chain.newest()}")
    for node, why in outcome.blamed.items():
        _tell(f"node {node} failed: {why}")
    if outcome.status == FINISHED:
        (run_dir / DONE).write_text(f"job {job.name} reached the last step, {chain.newest()}\n", encoding="utf-8")
        return FINISHED
    if not (run_dir / STOP).exists() and not _gives_up(chain, options.max_fruitless, run_dir) and not told:
        _pass_on(chain, job)
    return outcome.status


def _run(command: Sequence[str], logs: Path) -> tuple[int, bool]:
    """Run `command` -> (exit status, whether this job was asked to end meanwhile).

    Of SIGTERM the ranks have heard as well. SIGUSR1 comes to this process alone with `sbatch --signal=B:USR1@T`. The
    command is ended when the launcher of a node has long ended: srun waits for ever for tasks whose end it was not
    told, since a network between the nodes was cut.
    """
    told: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        told.append(number)
        if number == signal.SIGUSR1:
            process.send_signal(number)

    process = subprocess.Popen(command, env={**os.environ, "DLM_LOG_DIR": str(logs)})
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    deadline: float | None = None
    look = time.monotonic()
    try:
        while process.poll() is None:
            if deadline is None and time.monotonic() > look:
                # Not more often: a large job has a thousand files on a file system of many users.
                look = time.monotonic() + _SECONDS_BETWEEN_LOOKS
                if any(result.status is not None for result in read_results(logs)):
                    deadline = time.monotonic() + _SECONDS_AFTER_THE_FIRST
            if deadline is not None and time.monotonic() > deadline:
                _tell(f"{command[0]} has not ended {_SECONDS_AFTER_THE_FIRST:g} s after the first node: killed")
                process.kill()
                break
            time.sleep(0.5)
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return (status if status >= 0 else 128 - status), any(number != signal.SIGUSR1 for number in told)


def _gives_up(chain: Chain, limit: int, run_dir: Path) -> bool:
    reason = chain.why_give_up(limit)
    if reason is None:
        return False
    chain.give_up(f"{reason}: see {run_dir / 'logs'}, mend it, and remove this file")
    _tell(f"the chain stops: {reason}")
    return True


def _sits_on_a_bad_node(chain: Chain, job: Job) -> bool:
    """Leave an allocation with a node that has failed before to the next job, if there is one."""
    excluded = chain.excluded()
    bad = [node for node in job.nodes if node in excluded]
    if not bad:
        return False
    waiting = job.waiting()
    if not waiting:
        _tell(f"warning: {', '.join(bad)} failed before, and no other job waits: trying again")
        return False
    job.exclude(waiting, excluded)
    _tell(f"not started: {', '.join(bad)} failed before; {len(waiting)} jobs that wait are now kept off it")
    return True


def _pass_on(chain: Chain, job: Job) -> None:
    """See to it that somebody goes on, and not on nodes that are bad."""
    waiting, excluded = job.waiting(), chain.excluded()
    if not waiting:
        _tell(f"no other job waits: {job.name} goes back into the queue")
        # SLURM ends this job for it, and grants the time that the rest here takes.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        job.requeue()
    if excluded:
        job.exclude(waiting or [job.name], excluded)
        _tell(f"{', '.join(excluded)}: the jobs to come are kept off it")


def _laggard_nodes(run_dir: Path, since: float, results: Sequence[NodeResult]) -> set[str]:
    """Nodes that held the others up when a watchdog ended the run.

    Those that gave no sign of life; else those whose ranks were behind in a phase that needs no other rank.
    """
    from dlm_dist.training.watchdog import is_silent, laggards, read_heartbeats

    beats = [beat for beat in read_heartbeats(run_dir / "heartbeats") if beat["time"] >= since]
    if not beats:
        return set()
    ended = {result.node for result in results if result.status is not None}
    last = max(beat["time"] for beat in beats)
    silent = {_node(beat) for beat in beats if is_silent(beat, last)} - ended
    return silent or {_node(beat) for beat in laggards(beats, 0.0) if beat["phase"] in ("data", "forward")}


def _node(beat: Mapping[str, Any]) -> str:
    name: str = beat["host"].partition(".")[0]
    return name


def _tell(sentence: str) -> None:
    print(f"chain: {sentence}", file=sys.stderr, flush=True)
