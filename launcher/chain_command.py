"""`dlm chain`: one job's part of a run that many jobs finish. slurm/pretrain.sbatch calls it; see docs/slurm.md."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from dlm_dist.training.chain import FINISHED, Chain, NodeResult, fell_silent, judge, read_results
from dlm_dist.training.switches import DONE, STOP
from launcher.node import Place
from launcher.slurm import Job

if TYPE_CHECKING:
    from dlm_dist.config import RunConfig
    from dlm_dist.training.lease import Lease

MAX_FRUITLESS = 3

_STOPPED = 3
"""Exit status where STOP, another chain or a bad node kept the job from starting the run."""


_SECONDS_AFTER_THE_FIRST = 120.0
"""More than srun --wait and SLURM's KillWait together."""

_SECONDS_BETWEEN_LOOKS = 15.0

_SECONDS_AROUND_THE_LIMIT = 60.0
"""SLURM looks at time limits about once a minute."""


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
    chain.add_argument(
        "--command",
        nargs=argparse.REMAINDER,
        required=True,
        help="starts the ranks; the last option. {nodes} and {nodelist} in it become those that the run is to use",
    )
    chain.set_defaults(run=run_chain)


def run_chain(options: argparse.Namespace) -> int:
    """Go on with the run if there is anything to do, and decide what comes after it."""
    from dlm_dist.config import load_config
    from dlm_dist.training.lease import LeaseError

    config = load_config(options.config, options.overrides)
    run_dir = config.run.dir
    job = Job.this(os.environ)
    marked = _status_by_marker(run_dir)
    if marked is not None:
        return marked
    chain = Chain(run_dir)
    try:
        lease = _take(chain.folder, chain, job)
    except LeaseError as error:
        _tell(f"not started, another chain is at work: {error}")
        return _STOPPED
    try:
        # A run that was started by hand; also, the ranks need not wait for a sign of an owner whose node is gone.
        _take(run_dir, chain, job).release()
        # Who was at work until now may have finished.
        marked = _status_by_marker(run_dir)
        return marked if marked is not None else _attempt(options, config, job, chain)
    except LeaseError as error:
        _tell(f"not started: {error}")
        return _STOPPED
    finally:
        lease.release()


def _take(folder: Path, chain: Chain, job: Job) -> Lease:
    """The lease of `folder`. Waits for an owner of this job's own array, of which SLURM believes that it has ended.

    That happens where a node is cut off from SLURM and goes on. To end would use up the tasks of the array.
    """
    from dlm_dist.training.lease import Lease, LeaseError

    waited = False
    while True:
        try:
            return Lease(folder, tell=_tell)
        except LeaseError as error:
            last = chain.attempts()[-1:]
            if not last or last[0].status is not None or _array(last[0].name) != _array(job.name):
                raise
            if not waited:
                _tell(f"an earlier job of this array is still at work, waiting for its end: {error}")
            waited = True
            time.sleep(_SECONDS_BETWEEN_LOOKS)


def _array(name: str) -> str:
    return name.partition("_")[0].partition("-")[0]


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


def _attempt(options: argparse.Namespace, config: RunConfig, job: Job, chain: Chain) -> int:
    run_dir = config.run.dir
    _explain_the_last(run_dir, chain)
    if _gives_up(chain, options.max_fruitless, run_dir) or _sits_on_a_bad_node(chain, job):
        return _STOPPED
    nodes = _nodes_that_fit(config, job)
    logs = run_dir / "logs" / job.attempt
    started = time.time()
    chain.begin(job.attempt, nodes)
    _tell(f"attempt {job.attempt} on {','.join(nodes)}, newest checkpoint: {chain.newest()}; logs in {logs}")
    places = {"{nodes}": str(len(nodes)), "{nodelist}": ",".join(nodes)}
    command = [_filled(word, places) for word in options.command]
    arguments = ["--config", str(options.config), "--resume", "auto", *options.overrides]
    status, told = _run([*command, *arguments], logs, job, chain)
    results = _results(logs)
    outcome = judge(nodes, results, _laggard_nodes(run_dir, started, results), status, told)
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


def _explain_the_last(run_dir: Path, chain: Chain) -> None:
    """Blame the node that died where the last attempt has no end: its heart stopped long before the others' did."""
    from dlm_dist.training.watchdog import read_heartbeats

    attempts = chain.attempts()
    if not attempts or attempts[-1].status is not None or attempts[-1].told or attempts[-1].blamed:
        return
    blamed = fell_silent(attempts[-1], read_heartbeats(run_dir / "heartbeats"))
    if blamed:
        chain.died(attempts[-1].name, blamed)
        for node, why in blamed.items():
            _tell(f"node {node} failed in attempt {attempts[-1].name}: {why}")


def _nodes_that_fit(config: RunConfig, job: Job) -> tuple[str, ...]:
    """The most of the job's nodes whose ranks divide the global batch; all where no number does: the run says why."""
    from dlm_dist.config import ConfigError, resolve_batch

    ranks = Place.here(os.environ).ranks
    for count in range(len(job.nodes), 0, -1):
        try:
            resolve_batch(config.train, count * ranks)
        except ConfigError:
            continue
        if count < len(job.nodes):
            _tell(
                f"warning: {len(job.nodes)} nodes of {ranks} ranks do not divide train.global_batch_size = "
                f"{config.train.global_batch_size}: goes on with {count}, {','.join(job.nodes[count:])} idle"
            )
        return job.nodes[:count]
    return job.nodes


def _filled(word: str, places: Mapping[str, str]) -> str:
    for place, value in places.items():
        word = word.replace(place, value)
    return word


def _results(logs: Path) -> list[NodeResult]:
    """`read_results`, once more where a shared file system fails for a moment; nothing where it goes on."""
    for _ in range(5):
        try:
            return read_results(logs)
        except (OSError, ValueError) as error:
            failure = error
            time.sleep(2.0)
    _tell(f"warning: what the nodes have recorded cannot be read: {failure}")
    return []


def _run(command: Sequence[str], logs: Path, job: Job, chain: Chain) -> tuple[int, bool]:
    """Run `command` -> (exit status, whether this job was asked to end before its time limit).

    Of SIGTERM the ranks have heard as well. SIGUSR1 comes to this process alone with `sbatch --signal=B:USR1@T`. The
    command is ended when the launcher of a node has long ended: srun waits for ever for tasks whose end it was not
    told, since a network between the nodes was cut.
    """
    signals: list[int] = []
    told = False

    def note(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        if number == signal.SIGUSR1:
            process.send_signal(number)

    process = subprocess.Popen(command, env={**os.environ, "DLM_LOG_DIR": str(logs)})
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    deadline: float | None = None
    look = time.monotonic()
    try:
        while process.poll() is None:
            if not told and _asked_to_end(signals, job):
                told = True
                chain.asked_to_end(job.attempt)  # SLURM may kill this process before the ranks have saved
            if deadline is None and time.monotonic() > look:
                # Not more often: a large job has a thousand files on a file system of many users.
                look = time.monotonic() + _SECONDS_BETWEEN_LOOKS
                with suppress(OSError, ValueError):
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
    return (status if status >= 0 else 128 - status), told or _asked_to_end(signals, job)


def _asked_to_end(signals: Sequence[int], job: Job) -> bool:
    """Whether SLURM or a person wants the job's end; not where its time is up, for which SIGUSR1 has come before."""
    at_its_limit = job.ends is not None and time.time() > job.ends - _SECONDS_AROUND_THE_LIMIT
    return not at_its_limit and any(number != signal.SIGUSR1 for number in signals)


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
    if not waiting or not job.exclude(waiting, excluded):
        why = "too few others work" if waiting else "no other job waits"
        _tell(f"warning: {', '.join(bad)} failed before, and {why}: trying again")
        return False
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
        kept_off = job.exclude(waiting or [job.name], excluded)
        what = "the jobs to come are kept off it" if kept_off else "not excluded, since too few others work"
        _tell(f"{', '.join(excluded)}: {what}")


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
