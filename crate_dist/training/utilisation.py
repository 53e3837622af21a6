"""What a run makes of its devices: operations per second, their share of the published peak (MFU), and peak memory.

Model FLOPs utilisation is the definition of PaLM (arXiv 2204.02311, appendix B): the operations that the mathematics
needs, see models/costs.py, over those that the devices could do in the same time. What is computed again counts once.
The denominator is the dense bf16 rate that the GPU's maker publishes, of the whole device at its full power, which no
program reaches; a large matrix product comes to some 0.7 of it. Nobody publishes one for a CPU, and a recipe in fp32
computes by another rate: there MFU is left out, and operations per second are told alone.
"""

from __future__ import annotations

import logging
import re
import resource

import torch

from crate_dist.config import Recipe
from crate_dist.distributed import gather_objects
from crate_dist.models.config import ModelConfig
from crate_dist.models.costs import NotKnown, step_flops

logger = logging.getLogger(__name__)

BF16_FLOP_S = {
    r"GB200": 2.5e15,  # nvidia.com/en-us/data-center/gb200-nvl72
    r"B200": 2.25e15,  # nvidia.com/en-us/data-center/dgx-b200, an eighth of it
    r"H[12]00 NVL": 835e12,  # nvidia.com/en-us/data-center/h100 and /h200
    r"H100 PCIe": 756e12,  # the same page of 2022, and the Hopper white paper
    r"G?H[12]00|H800": 989e12,  # the same pages, SXM; /grace-hopper-superchip
    r"A[18]00": 312e12,  # nvidia.com/en-us/data-center/a100
    r"A40": 149.7e12,  # …/a40
    r"A30": 165e12,  # …/products/a30-gpu
    r"A10": 125e12,  # …/products/a10-gpu
    r"L40S": 362e12,  # …/l40s
    r"L40": 181e12,  # …/l40
    r"L4": 121e12,  # …/l4
    r"RTX 4090$": 165.2e12,  # the Ada white paper's table of GeForce cards, sums in fp32
    r"RTX 3090$": 71e12,  # the Ampere GA102 white paper's, sums in fp32
}
"""A GPU's name, as the driver has it, matched by whole words in this order -> its dense bf16 operations per second.

The pages state most rates with sparsity, of which these are the half."""


def published_flop_s(name: str) -> float | None:
    """Returns the dense bf16 FLOP/s that are published of a GPU; None for another, and for a slice of one (MIG)."""
    if re.search(r"\bMIG\b", name):
        return None
    return next((rate for known, rate in BF16_FLOP_S.items() if re.search(rf"\b(?:{known})\b", name)), None)


class Utilisation:
    """Turns images per second into operations per second, and into a share of the peak where one is published.

    Made on all ranks together: the peak is the sum of theirs, and unknown where one is.
    """

    def __init__(self, config: ModelConfig, recipe: Recipe, micro_batch: int, device: torch.device) -> None:
        self._work, self._peak = 0.0, None
        try:
            self._work = step_flops(config, micro_batch) / micro_batch
        except NotKnown as unknown:
            logger.info("operations per second and MFU are left out: %s", unknown)
            return
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        peaks = gather_objects(published_flop_s(name) if recipe.train.precision != "fp32" else None)
        known = [peak for peak in peaks if peak]
        self._ranks, self._peak = len(peaks), sum(known) if len(known) == len(peaks) else None
        if self._peak:
            logger.info("MFU: the share of %.4g TFLOP/s, the published dense bf16 rate of all GPUs", self._peak / 1e12)
        elif device.type == "cuda":
            logger.info("MFU is left out: no peak is known of %s in %s", name, recipe.train.precision)

    def scalars(self, images_per_s: float) -> dict[str, float]:
        """Returns TFLOP/s per rank and, where the peak is known, MFU from 0 to 1; nothing of a model that is not known.

        images_per_s: of all ranks
        """
        if not self._work:
            return {}
        rate = images_per_s * self._work
        values = {"speed/tflop_s_per_rank": rate / self._ranks / 1e12}
        return {**values, "speed/mfu": rate / self._peak} if self._peak else values


def peak_memory_gb(device: torch.device) -> dict[str, float]:
    """Returns the most memory of this rank in 1e9 bytes: its process's, and on a GPU tensors' and the allocator's.

    The process's since its start, without its loader workers; the GPU's since the last call.
    """
    peaks = {"memory/host_peak_gb": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9}
    if device.type == "cuda":
        peaks["memory/device_peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        peaks["memory/device_reserved_gb"] = torch.cuda.max_memory_reserved(device) / 1e9
        torch.cuda.reset_peak_memory_stats(device)
    return peaks
