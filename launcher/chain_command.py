"""`dlm chain`: one job's part of a run that many jobs finish. slurm/pretrain.sbatch calls it; see docs/slurm.md."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from dlm_dist.training.chain import FINISHED, Chain, judge, read_results
from dlm_dist.training.switches import DONE, STOP
from launcher.slurm import Job

MAX_FRUITLESS = 3

_STOPPED = 3
"""Exit status where STOP, another chain or a bad node kept the job from starting the run."""


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
    if (run_dir / DONE).exists():
        _tell(f"{run_dir / DONE}: {(run_dir / DONE).read_text().strip()}; nothing is left to do")
        return 0
    if (run_dir / STOP).exists():
        _tell(f"not started, {run_dir / STOP} is there: {(run_dir / STOP).read_text().strip() or 'it says no reason'}")
        return _STOPPED
    chain = Chain(run_dir)
    try:
        lease = Lease(chain.folder, tell=_tell)
    except LeaseError as error:
        _tell(f"not started, another chain is at work: {error}")
        return _STOPPED
    try:
        # A run that was started by hand; also, the ranks need not wait for a sign of an owner whose node is gone.
        Lease(run_dir, tell=_tell).release()
        return _attempt(options, run_dir, job, chain)
    except LeaseError as error:
        _tell(f"not started: {error}")
        return _STOPPED
    finally:
        lease.release()


def _attempt(options: argparse.Namespace, run_dir: Path, job: Job, chain: Chain) -> int:
    if _gives_up(chain, options.max_fruitless, run_dir) or _sits_on_a_bad_node(chain, job):
        return _STOPPED
    logs = run_dir / "logs" / job.attempt
    started = time.time()
    chain.begin(job.attempt, job.nodes)
    _tell(f"attempt {job.attempt} on {','.join(job.nodes)}, newest checkpoint: {chain.newest()}; logs in {logs}")
    arguments = ["--config", str(options.config), "--resume", "auto", *options.overrides]
    status, told = _run([*options.command, *arguments], {**os.environ, "DLM_LOG_DIR": str(logs)})
    silent = _silent_nodes(run_dir, started)
    outcome = judge(job.nodes, read_results(logs), silent, status)
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


def _run(command: Sequence[str], environment: dict[str, str]) -> tuple[int, bool]:
    """Run `command` -> (exit status, whether this job was asked to end meanwhile).

    Of SIGTERM the ranks have heard as well. SIGUSR1 comes to this process alone with `sbatch --signal=B:USR1@T`.
    """
    told: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        told.append(number)
        if number == signal.SIGUSR1:
            process.send_signal(number)

    process = subprocess.Popen(command, env=environment)
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
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


def _silent_nodes(run_dir: Path, since: float) -> list[str]:
    """Nodes whose ranks did not get on when a watchdog ended the run."""
    from dlm_dist.training.watchdog import laggards, read_heartbeats

    beats = [beat for beat in read_heartbeats(run_dir / "heartbeats") if beat["time"] >= since]
    if not beats:
        return []
    return sorted({beat["host"].partition(".")[0] for beat in laggards(beats, max(beat["time"] for beat in beats))})


def _tell(sentence: str) -> None:
    print(f"chain: {sentence}", file=sys.stderr, flush=True)
