"""Times what a person waits for at a prompt: --help and dry runs of every program, and the imports of a rank.

    python benchmarks/startup.py [--rounds 5] [--json FILE]

Each is a process of its own; they take turns. CPU seconds are those of all its threads.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import measuring  # isort: skip

CLONE = Path(__file__).parents[1]
MODULES = ("train", "evaluate", "probe", "figures", "doctor", "models.weights")
DRY_RUN = ["--arch", "demo", "--data", "nowhere", "--run-dir", "nowhere", "--no-site", "--dry-run"]
"""Of a launcher; that there are no such data is said at the end, with status 1."""


def main() -> int:
    """Prints one row for each command."""
    given = measuring.parser(__doc__, measuring.JSON, measuring.option("--rounds", type=int, default=5)).parse_args()
    programs = sorted(
        path.relative_to(CLONE) for folder in ("launch", "data_prep") for path in CLONE.glob(f"{folder}/*.py")
    )
    commands = {f"{program} --help": [str(program), "--help"] for program in programs}
    commands |= {f"-m crate_dist.{name} --help": ["-m", f"crate_dist.{name}", "--help"] for name in MODULES}
    commands |= {f"launch/{name}.py --dry-run": [f"launch/{name}.py", *DRY_RUN] for name in ("local", "slurm")}
    commands["a rank, imported"] = ["-c", "import crate_dist.train"]
    contestants = {
        name: partial(measuring.cost, partial(run, words), cpu_s=children_s) for name, words in commands.items()
    }
    results: dict[str, Any] = {"machine": measuring.machine("torch", "deepspeed")}
    print(f"{measuring.in_words(results['machine'])}\n")
    costs = measuring.in_turns(contestants, given.rounds, warm_up=1)
    results["seconds"] = {name: [cost._asdict() for cost in each] for name, each in costs.items()}
    rows = []
    for name, each in costs.items():
        low, median, high = measuring.quartiles([cost.wall_s for cost in each])
        cpu_s = measuring.quartiles([cost.cpu_s for cost in each])[1]
        rows.append([f"`{name}`", f"{median:.2f} ({low:.2f} to {high:.2f})", min(cost.wall_s for cost in each), cpu_s])
    measuring.print_table(["command", "seconds: median (quartiles)", "fastest", "CPU s"], rows, "s s .2f .2f")
    measuring.write_json(given.json, results)
    return 0


def run(words: list[str]) -> None:
    """Runs a program to its end, unseen."""
    subprocess.run([sys.executable, *words], cwd=CLONE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def children_s() -> float:
    """Returns the CPU seconds of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.exit(main())
