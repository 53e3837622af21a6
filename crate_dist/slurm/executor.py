"""What a job asks SLURM for: submitit's executor, and the batch script around its srun."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from submitit import Job, SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError

import crate_dist
from crate_dist.config import ClusterSection, Recipe, RecipeError
from crate_dist.run.exit_status import LOST_THE_RUN, NEEDS_A_PERSON, STOPPED
from crate_dist.run.faults import DEVICE_FAULT
from crate_dist.run.folder import STOP_REQUEST

CLONE = Path(crate_dist.__file__).resolve().parents[1]

BATCH = Path(__file__).with_name("batch.sh")
"""The part of the batch script that acts when the ranks end."""


class Executor(SlurmExecutor):
    """submitit's executor, but a dry run works where there is no SLURM."""

    @classmethod
    def affinity(cls) -> int:
        """Claims that srun is there, else submitit makes no executor; sbatch is looked for before submitting."""
        return 2

    def send(self, jobs: Sequence[Callable[[], Any]]) -> list[Job[Any]]:
        """Submits the jobs, several as one array. Raises RecipeError when sbatch does not take them."""
        try:
            return self.submit_array(jobs)
        except FailedJobError as error:
            raise RecipeError("sbatch refused the job, for the reason above; nothing is queued") from error
        except FailedSubmissionError as error:
            raise RecipeError(f"sbatch took the job, but not as expected; look at squeue: {error}") from error

    def script(self, jobs: int) -> str:
        """Returns the text that sbatch will be given."""
        if jobs == 1:
            return self._make_submission_file_text(self._submitit_command_str, "")
        array = Executor(self.folder, self.max_num_timeout, python=self.python)
        array.parameters = {**self.parameters, "map_count": jobs}
        return array.script(1)


def make_executor(
    recipe: Recipe,
    folder: Path,
    run_dirs: Sequence[Path],
    weights: Path | None = None,
    *,
    notify: str | None = None,
    stuck_after_min: int = 30,
    mail: str | None = None,
) -> Executor:
    """Returns the executor that asks SLURM for the recipe's cluster; writes nothing.

    Parameters
    ----------
    folder: where submitit writes, %j in it standing for the job id
    run_dirs: one for each task of an array; a container sees them beside the data and this clone
    weights: folder of those that the run begins from, for the container too
    notify, stuck_after_min: the user's command for when a run is done, failed or stuck, and after how long it is that
    mail: to whom SLURM writes
    """
    cluster = recipe.cluster
    # Since 22.05 srun no longer takes over sbatch's --cpus-per-task, and a rank without cores starves its loader.
    srun_args = ["--kill-on-bad-exit=1", f"--cpus-per-task={cluster.cpus_per_task}"]
    python = shlex.quote(sys.executable)
    if cluster.container:
        places = [CLONE, recipe.data.find_root(), weights, *(run_dir.parent for run_dir in run_dirs)]
        seen = dict.fromkeys(place for place in places if isinstance(place, Path))  # a URL needs no mount
        if odd := next((path for path in seen if re.search("[:,]", str(path))), None):
            raise RecipeError(f"a container cannot be shown {odd}: in --container-mounts, `:` and `,` part the paths")
        srun_args += [
            f"--container-image={cluster.container}",
            f"--container-mounts={','.join(f'{path}:{path}' for path in seen)}",
            f"--container-workdir={CLONE}",
        ]
        python = "python3"  # the image's own
    # First, so that a set-up line of the user's can say otherwise.
    hidden = [] if cluster.gpus_per_node else ["export CUDA_VISIBLE_DEVICES="]
    wanted: dict[str, Any] = {
        "job_name": recipe.name,
        "nodes": cluster.nodes,
        "ntasks_per_node": cluster.ranks_per_node,
        "cpus_per_task": cluster.cpus_per_task,
        "gpus_per_node": cluster.gpus_per_node or None,
        "mem": f"{cluster.mem_gb}GB" if cluster.mem_gb else "0",  # 0: all that the node has
        "time": cluster.time_min,
        "signal_delay_s": cluster.signal_delay_s,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "setup": [
            *hidden,
            *cluster.setup,
            *_settings(cluster, folder, run_dirs),
            f"crate_notify={shlex.quote(notify or '')} crate_stuck_after={stuck_after_min}",
            BATCH.read_text(encoding="utf-8").strip(),
        ],
        "srun_args": srun_args,
        "stderr_to_stdout": True,
        "additional_parameters": {"requeue": True},
    }
    if mail:
        wanted["additional_parameters"] |= {"mail_user": mail, "mail_type": "END,FAIL,REQUEUE"}
    if "%" in str(folder.parent):
        # SLURM fills in patterns, and this path is none. Its programs take the last of two options, after submitit's.
        log = str(folder.parent).replace("%", "%%") + "/%j/%j_%t_log.out"
        log = log if len(run_dirs) == 1 else log.replace("%j", "%A_%a")
        wanted["additional_parameters"]["output"] = log.replace("%t", "0")
        srun_args.append(f"--output={log}")
    executor = Executor(folder, max_num_timeout=cluster.requeues, python=python)
    given = {key: value for key, value in wanted.items() if value is not None}
    # submitit's own wckey would be refused where accounting knows no such key.
    executor.update_parameters(**given, wckey=None)
    return executor


def _settings(cluster: ClusterSection, folder: Path, run_dirs: Sequence[Path]) -> list[str]:
    """Returns the shell lines that batch.sh expects before it."""
    values: dict[str, object] = {
        "requeues": cluster.requeues,
        "restarts_in_place": cluster.restarts_in_place,
        "signal_delay_s": cluster.signal_delay_s,
        "submissions": folder.parent,
        "device_fault": DEVICE_FAULT,
        "stopped": STOPPED,
        "needs_a_person": NEEDS_A_PERSON,
        "lost_the_run": LOST_THE_RUN,
        "stop_request": STOP_REQUEST,
        "python": sys.executable,
    }
    lines = [f"crate_{name}={shlex.quote(str(value))}" for name, value in values.items()]
    return [*lines, f"crate_run_dirs=({' '.join(shlex.quote(str(run_dir)) for run_dir in run_dirs)})"]
