"""What a job asks SLURM for: submitit's executor, and the batch script around its srun."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from submitit import Job, SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError

from crate_dist.config import ClusterSection, Recipe, RecipeError
from crate_dist.run.exit_status import LOST_THE_RUN, NEEDS_A_PERSON, STOPPED
from crate_dist.run.faults import DEVICE_FAULT
from crate_dist.run.folder import STOP_REQUEST
from crate_dist.run.snapshot import START
from crate_dist.slurm.nodes import nodes_used
from crate_dist.slurm.options import USUAL, JobOptions, outvoted
from crate_dist.slurm.verdict import Settings, refusal
from crate_dist.world import VARIABLES

BATCH = Path(__file__).with_name("batch.sh")
"""The part of the batch script that acts when the ranks end."""
TELL = BATCH.with_name("tell.sh")
"""The part before the set-up lines, which tells of those that fail."""


class Executor(SlurmExecutor):
    """submitit's executor, but a dry run works where there is no SLURM."""

    @classmethod
    def affinity(cls) -> int:
        """Claims that srun is there, else submitit makes no executor; sbatch is looked for before submitting."""
        return 2

    def send(self, jobs: Sequence[Callable[[], Any]], settings: Settings = MappingProxyType({})) -> list[Job[Any]]:
        """Submits the jobs, several as one array. Raises RecipeError when sbatch does not take them.

        settings: with their origins, for the error to name the one that sbatch complains of

        This process keeps the environment that sbatch is given.
        """
        os.environ.update(environment := environment_for(self.script(len(jobs))))
        for name in os.environ.keys() - environment:
            del os.environ[name]
        try:
            return self.submit_array(jobs)
        except FailedJobError as error:
            raise RecipeError(refusal(str(error), settings, os.environ)) from error
        except FailedSubmissionError as error:
            raise RecipeError(f"sbatch took the job, but not as expected; look at squeue: {error}") from error

    def script(self, jobs: int) -> str:
        """Returns the text that sbatch will be given."""
        if jobs == 1:
            return self._make_submission_file_text(self._submitit_command_str, "")
        array = Executor(self.folder, self.max_num_timeout, python=self.python)
        array.parameters = {**self.parameters, "map_count": jobs}
        return array.script(1)


def environment_for(script: str) -> dict[str, str]:
    """Returns the environment in which sbatch takes a script as it is.

    Left out are the ranks and, inside a job, the job that this process belongs to, which the new one would believe; and
    variables by which sbatch would do otherwise than the script says.
    """
    job = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_") if "SLURM_JOB_ID" in os.environ else ()
    out = {name for name in os.environ if name.startswith(job) and name != "SLURM_CONF"}
    out |= {*VARIABLES, *outvoted(script, os.environ)}
    return {name: value for name, value in os.environ.items() if name not in out}


def make_executor(
    recipe: Recipe,
    folder: Path,
    run_dirs: Sequence[Path],
    code: Path,
    weights: Sequence[Path] = (),
    options: JobOptions = USUAL,
) -> Executor:
    """Returns the executor that asks SLURM for the recipe's cluster; writes nothing.

    Parameters
    ----------
    folder: where submitit writes, %j in it standing for the job id
    run_dirs: one for each task of an array; a container sees them beside the data
    code: the snapshot that the ranks run from, in or beside the run folders
    weights: folders of those that the runs begin from, for the container too
    options: what the job asks for beside the recipe's table
    """
    cluster = recipe.cluster
    # Since 22.05 srun no longer takes over sbatch's --cpus-per-task, and a rank without cores starves its loader.
    srun_args = ["--kill-on-bad-exit=1", f"--cpus-per-task={cluster.cpus_per_task}"]
    python = shlex.quote(sys.executable)
    if cluster.container:
        folders = *weights, *(run_dir.parent for run_dir in run_dirs)
        places = [recipe.data.find_root(), recipe.checkpoint.find_mirror(), *folders]
        seen = dict.fromkeys(place for place in places if isinstance(place, Path))  # a URL needs no mount
        if odd := next((path for path in seen if re.search("[:,]", str(path))), None):
            raise RecipeError(f"a container cannot be shown {odd}: in --container-mounts, `:` and `,` part the paths")
        srun_args += [
            f"--container-image={cluster.container}",
            f"--container-mounts={','.join(f'{path}:{path}' for path in seen)}",
            f"--container-workdir={code}",
        ]
        python = "python3"  # the image's own
    # First, so that a set-up line of the user's can say otherwise.
    hidden = [] if cluster.gpus_per_node else ["export CUDA_VISIBLE_DEVICES="]
    wanted: dict[str, Any] = {
        "job_name": recipe.name,
        "nodes": cluster.node_counts[-1],
        "ntasks_per_node": cluster.ranks_per_node,
        "cpus_per_task": cluster.cpus_per_task,
        **(_for_any_number_of_nodes(cluster) if len(cluster.node_counts) > 1 else {}),
        "time": cluster.time_min,
        "signal_delay_s": cluster.signal_delay_s,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "setup": [
            *_settings(recipe, folder, run_dirs, code, options),
            TELL.read_text(encoding="utf-8").strip(),
            *hidden,
            *cluster.setup,
            BATCH.read_text(encoding="utf-8").strip(),
        ],
        "srun_args": srun_args,
        "stderr_to_stdout": True,
        # submitit's nodes are no range
        "additional_parameters": {**options.of(cluster), "nodes": cluster.nodes, "requeue": True},
    }
    if "%" in str(folder.parent):
        # SLURM fills in patterns, and this path is none. Its programs take the last of two options, after submitit's.
        log = str(folder.parent).replace("%", "%%") + "/%j/%j_%t_log.out"
        log = log if len(run_dirs) == 1 else log.replace("%j", "%A_%a")
        wanted["additional_parameters"]["output"] = log.replace("%t", "0")
        srun_args.append(f"--output={log}")
    # submitit's `-u -m MODULE` goes to this program, which takes -m as Python does.
    python = f"{python} -u {shlex.quote(str(code / START))}"
    executor = Executor(folder, max_num_timeout=cluster.requeues, python=python)
    given = {key: value for key, value in wanted.items() if value is not None}
    # submitit's own wckey would be refused where accounting knows no such key.
    executor.update_parameters(**given, wckey=None)
    return executor


def _for_any_number_of_nodes(cluster: ClusterSection) -> dict[str, Any]:
    """Returns what a job with a range of nodes asks for instead: the cores of each as those of one task.

    Of the tasks of a node SLURM would count those of the fewest nodes, and give no more nodes than these fill. The
    batch script tells srun the tasks.
    """
    return {"ntasks_per_node": None, "cpus_per_task": cluster.ranks_per_node * cluster.cpus_per_task}


def _settings(recipe: Recipe, folder: Path, run_dirs: Sequence[Path], code: Path, options: JobOptions) -> list[str]:
    """Returns the shell lines that tell.sh and batch.sh expect before them."""
    cluster, used = recipe.cluster, nodes_used(recipe)
    values: dict[str, object] = {
        "fewest_nodes": cluster.node_counts[0],
        "ranks_per_node": cluster.ranks_per_node,
        "requeues": cluster.requeues,
        "restarts_in_place": cluster.restarts_in_place,
        "signal_delay_s": cluster.signal_delay_s,
        "submissions": folder.parent,
        "device_fault": DEVICE_FAULT,
        "stopped": STOPPED,
        "needs_a_person": NEEDS_A_PERSON,
        "lost_the_run": LOST_THE_RUN,
        "stop_request": STOP_REQUEST,
        "notify": options.notify,
        "stuck_after": options.stuck_after_min,
        "python": sys.executable,
        "start_py": code / START,
    }
    lines = [f"crate_{name}={shlex.quote(str(value))}" for name, value in values.items()]
    return [
        *lines,
        f"crate_nodes_used=({' '.join(f'[{given}]={number}' for given, number in used.items())})",
        f"crate_run_dirs=({' '.join(shlex.quote(str(run_dir)) for run_dir in run_dirs)})",
    ]
