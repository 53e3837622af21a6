"""Holds the data that there are now against those of a checkpoint: the same, or a refusal."""

from __future__ import annotations

import logging
from dataclasses import replace

from crate_dist.checkpoint.format import CheckpointError, Progress, other_head
from crate_dist.checkpoint.loading import Checkpoint
from crate_dist.data.identity import DataIdentity, changed_data_refusal
from crate_dist.distributed import gather_objects
from crate_dist.run.folder import RunFolder
from crate_dist.world import World

logger = logging.getLogger(__name__)


def progress_on(
    data: DataIdentity, found: Checkpoint, folder: RunFolder, world: World, accept_changed: bool | str
) -> Progress:
    """Returns the progress of a checkpoint, without a best accuracy that is of another validation split. A collective.

    accept_changed: whether other data than the checkpoint's are good enough; a digest: those data alone. What was
    accepted is put down in the run folder, and then holds for every start from the same checkpoint.

    Raises CheckpointError: on every rank, when the data are others, naming the difference, or have another number of
    classes.
    """
    if refusal := other_head(folder.path, found.manifest, len(data.classes)):
        raise CheckpointError(refusal)
    if not found.manifest.data:
        logger.info("%s is from before checkpoints knew their data, so these are taken for the same", found.path)
    changed = data.differences(found.manifest.data, found.manifest.classes)
    if not changed:
        return found.progress
    accepted = False
    if world.is_main:
        noted = folder.record.data_was_accepted(found.step, data.digest)
        accepted = noted or accept_changed in (True, data.digest)
        if accepted and not noted:
            folder.record.note_changed_data(found.step, data.digest, changed)
    if not gather_objects(accepted)[0]:
        raise CheckpointError(changed_data_refusal(found.path, changed))
    what = "; ".join(f"{split}: {words}" for split, words in changed.items())
    logger.warning("going on from step %d with OTHER DATA, as accepted: %s", found.step, what)
    if not changed.keys() & {"val", "classes"}:
        return found.progress
    logger.warning("the best accuracy so far was that of another validation split, and counts no more")
    return replace(found.progress, evaluated_at=-1, best_top1=-1.0, best_step=-1, metrics={})
