"""Makes the run that is stored here anew, with the code that this is started from.

    python -m tests.stored_run.make /data/stored

The folder is new, and gets what stands beside this file; its name comes to stand in TensorBoard's files.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.chaos.faults import Fault
from tests.chaos.ranks import Ranks
from tests.data_prep import class_tree, convert
from tests.ranks import REPOSITORY, train_to_the_end

HERE = Path(__file__).parent
_TINY = """
from crate_dist.config.archs import ARCHS, Arch
from crate_dist.train import main
ARCHS["crate_demo"] = Arch(dim=8, depth=2, heads=2)
main()
"""


def make(out: Path) -> None:
    """Shards, a run that kill -9 ended in its step 11, the curves of the same run undisturbed, a tiny export."""
    out.mkdir()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        class_tree(work / "pictures", classes=3, images=11, size=(10, 9))
        convert("image_folder.py", work / "pictures", out / "shards", "--val-fraction", 0.25, "--shard-samples", 10)
        arguments = ["--config", HERE / "recipe.toml", "--data", out / "shards", "--run-dir"]
        train_to_the_end([*arguments, work / "undisturbed"], world_size=2)
        shutil.copy(work / "undisturbed" / "metrics.jsonl", out / "undisturbed.jsonl")
        with Ranks([*arguments, out / "run"], work / "notes", faults={0: Fault("taking a step", nth=11)}) as ranks:
            ranks.wait_for_fault(0)
        assert json.loads((out / "run" / "published.json").read_text()) == {"step": 8}
        tiny = [sys.executable, "-c", _TINY, *map(str, arguments), str(work / "tiny")]
        subprocess.run(tiny, cwd=REPOSITORY, check=True)
        shutil.copy(work / "tiny" / "model-best.pt", out)
        found = {
            model: evaluate(out / model, out / "shards", work / "found.json") for model in ("run", "model-best.pt")
        }
        (out / "evaluations.json").write_text(json.dumps(found, indent=1) + "\n")
    forget_the_machine(out / "run")


def evaluate(model: Path, shards: Path, found: Path) -> dict[str, float]:
    """Accuracy, loss and number of samples, as the command gives them."""
    line = [sys.executable, "-m", "crate_dist.evaluate", model, "--data", shards, "--json", found]
    subprocess.run(list(map(str, line)), cwd=REPOSITORY, check=True)
    said = json.loads(found.read_text())
    return {key: said[key] for key in ("top1", "top5", "loss", "samples")}


def forget_the_machine(run: Path) -> None:
    """Takes out of a run folder what names this machine, and the numbers of the lock but the newest."""
    shutil.rmtree(run / "logs")
    for path in (run / "tensorboard").iterdir():
        path.rename(path.with_name(".".join([*path.name.split(".")[:4], "elsewhere", "1", "0"])))
    *older, newest = sorted((run / "lock").iterdir())
    for path in older:
        path.unlink()
    for path in (run / "run.json", newest):
        text = re.sub(r'"machine": "[^"]*"', '"machine": "another"', path.read_text())
        path.write_text(re.sub(r'"host": "[^"]*"', '"host": "elsewhere"', text))


if __name__ == "__main__":
    make(Path(sys.argv[1]).absolute())
