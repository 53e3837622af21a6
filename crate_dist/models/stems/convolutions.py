"""The stem of ToST and CBT: convolutions that halve the image, with batch norm (after XCiT, arXiv 2106.09681)."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crate_dist.models.batch_norm import GroupedBatchNorm
from crate_dist.models.config import CHANNELS, ModelConfig
from crate_dist.models.sizes import halving_widths
from crate_dist.models.stems.stem import Stem


class ConvolutionStem(Stem):
    """3 x 3 convolutions of stride 2 without bias, each with batch norm, and GELU between: one for each halving.

    Widths double up to d: d/8, d/4, d/2, d for patches of 16 pixels, d/4, d/2, d for 8, d/2, d for 4. A token is
    therefore not of its patch alone: with patches of 16 pixels it sees 31 x 31 of them.
    Both published codes have SyncBatchNorm. ToST's runs in a process for each GPU, and its group is the global batch;
    CBT's published command has one process for all GPUs, where nothing is synchronised: its group is a GPU's share.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        widths = halving_widths(config.dim, config.patch_size)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
            for before, after in pairwise((CHANNELS, *widths))
        )
        self.norms = nn.ModuleList(GroupedBatchNorm(width) for width in widths)

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, height, width) -> (b, patches, d)"""
        # With the channels last all steps are faster, and the tokens lie as the layers read them.
        x = images.contiguous(memory_format=torch.channels_last)
        for number, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            x = norm(convolution(F.gelu(x) if number else x))
        return x.flatten(2).transpose(1, 2)
