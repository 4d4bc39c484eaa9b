"""The report of a campaign: every case with its outcome, as JSON and as Markdown."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from tests.faults.campaign import PHASES, Setting

SEED = int(os.environ.get("FAULT_SEED", "20261121"))


@dataclass
class Report:
    """What the tests of a session have done; `path` gets the JSON, and .md beside it the same for people."""

    path: Path
    chains: list[dict[str, Any]] = field(default_factory=list)
    cases: list[dict[str, Any]] = field(default_factory=list)
    """Everything but kills: {"group", "case", "outcome"}, in one sentence each."""
    failed: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def case(self, group: str, case: str, outcome: str) -> None:
        """One more case that went as it should."""
        self.cases.append({"group": group, "case": case, "outcome": outcome})

    def kills(self) -> list[dict[str, Any]]:
        """See `kills_of`."""
        return kills_of(self.chains)

    def content(self) -> dict[str, Any]:
        """What goes into the files."""
        here = machine.describe(torch.device("cpu"))
        seconds = round(time.monotonic() - self.started)
        return {"benchmark": "faults", **here, "seed": SEED, "seconds": seconds} | summary(
            self.failed, self.chains, self.cases
        )

    def write(self) -> str:
        """Write both files -> the Markdown."""
        return write(self.content(), self.path)


def kills_of(chains: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """All kills that hit a living run, each with the setting of its chain."""
    return [{**chain["setting"], **kill} for chain in chains for kill in chain["kills"] if kill["phase"] != "finished"]


def summary(
    failed: Sequence[str], chains: Sequence[Mapping[str, Any]], cases: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What was done, and its sums."""
    kills = kills_of(chains)
    return {
        "kills": len(kills),
        "kills_by_phase": count(kills, "phase"),
        "resumes_checked": sum(chain["resumes"] for chain in chains),
        "steps_repeated": sum(kill["repeated"] for kill in kills),
        "failed": list(failed),
        "chains": list(chains),
        "cases": list(cases),
    }


def joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The report of a campaign that was run in parts, on one machine with one seed and the same versions.

    What failed in one part and went well in another is told as `repeated`.
    """
    assert len({(part["seed"], str(part["hardware"]), str(part["versions"])) for part in parts}) == 1
    whole: dict[str, list[Any]] = {
        key: [one for part in parts for one in part[key]] for key in ("failed", "chains", "cases")
    }
    done = {name_of_test(chain["setting"]) for chain in whole["chains"]}
    repeated = [name for name in whole["failed"] if name in done]
    whole["failed"] = [name for name in whole["failed"] if name not in done]
    texts = {key: "; ".join(dict.fromkeys(part[key] for part in parts)) for key in ("commit", "command")}
    seconds = sum(part["seconds"] for part in parts)
    return {**parts[0], **texts, "seconds": seconds} | summary(**whole) | {"repeated": repeated}


def name_of_test(setting: Mapping[str, Any]) -> str:
    """The test of a chain."""
    return f"test_kills_at_random_moments[{Setting(**setting)}]"


def write(content: Mapping[str, Any], path: Path) -> str:
    """Write `content` to `path` as JSON, and beside it as Markdown -> the Markdown."""
    text = markdown(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    path.with_suffix(".md").write_text(text)
    return text


def count(kills: Iterable[Mapping[str, Any]], key: str) -> dict[str, int]:
    """How many kills have each value of `key`."""
    return dict(Counter(str(kill[key]) for kill in kills))


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)]


def markdown(content: Mapping[str, Any]) -> str:
    """The report for people."""
    kills = kills_of(content["chains"])
    hardware, versions = content["hardware"], content["versions"]
    lines = [
        "# Fault campaign",
        "",
        f"{content['date']}, commit {content['commit']}, `{content['command']}`, seed {content['seed']}, "
        f"{content['seconds'] / 60:.0f} minutes on {hardware['cores']} cores "
        f"({hardware['cpu']}, {hardware['system']}); "
        + ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None)
        + ".",
        "",
        f"**{len(content['failed'])} failures.**" + "".join(f"\n- FAILED {name}" for name in content["failed"]),
        "",
    ]
    if content.get("note"):
        lines += [content["note"], ""]
    if content.get("repeated"):
        names = ", ".join(dict.fromkeys(content["repeated"]))
        lines += [f"Stopped by hand or by a limit of time in one part, and done in another: {names}.", ""]
    if kills:
        lines += [
            f"## {len(kills)} SIGKILLs in {len(content['chains'])} runs",
            "",
            "Every run was started again with `--resume auto` until it was done. "
            f"{content['resumes_checked']} starts were seen to go on from the newest published checkpoint, each of "
            f"which was intact; {content['steps_repeated']} recorded steps had to be done again and are all in "
            "`metrics.replaced.jsonl`; metrics and last checkpoint of every run are bit-equal to those of the same run "
            "left alone.",
            "",
        ]
        by_phase, one = Counter(kill["phase"] for kill in kills), [kill for kill in kills if kill["target"] != "all"]
        modes = {False: "synchronous", True: "asynchronous"}
        lines += table(
            ["moment that was hit", *modes.values(), "all"],
            [
                [
                    name,
                    *(sum(k["phase"] == name and k["asynchronous"] is m for k in kills) for m in modes),
                    by_phase[name],
                ]
                for name in PHASES
            ],
        )
        optimizers = sorted({kill["optimizer"] for kill in kills})
        lines += ["", *table(["ZeRO", *optimizers, "of these on 2 ranks"], stage_rows(kills, optimizers)), ""]
        launched = sum(kill["kind"] == "launched" for kill in kills)
        lines += [
            f"{len(one)} kills hit one of two ranks only: the other one ended by itself, or by the launcher. "
            f"{launched} starts were by the real launcher (`deepspeed`, or `python launcher/pretrain.py`), the others "
            "were forked from a process that had imported the program.",
            "",
        ]
    for group in dict.fromkeys(case["group"] for case in content["cases"]):
        rows = [[case["case"], case["outcome"]] for case in content["cases"] if case["group"] == group]
        lines += [f"## {group}", "", *table(["case", "outcome"], rows), ""]
    return "\n".join(lines)


def stage_rows(kills: Sequence[Mapping[str, Any]], optimizers: Sequence[str]) -> list[list[object]]:
    """Kills by ZeRO stage and optimizer."""
    rows: list[list[object]] = []
    for stage in sorted({kill["stage"] for kill in kills}):
        here = [kill for kill in kills if kill["stage"] == stage]
        two = sum(kill["ranks"] == 2 for kill in here)
        rows.append([stage, *(sum(kill["optimizer"] == name for kill in here) for name in optimizers), two])
    return rows


if __name__ == "__main__":
    # python -m tests.faults.report NOTE PART.json... WHOLE.json
    note, *sources, target = sys.argv[1:]
    whole = joined([json.loads(Path(name).read_text()) for name in sources])
    print(write(whole | {"note": note}, Path(target)))
