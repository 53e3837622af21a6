"""The image classifier: a stem, positions, layers of a token mixer and a token-wise part, and a head.

CRATE (Yu et al., "White-Box Transformers via Sparse Rate Reduction", arXiv 2306.01129; longer: 2311.13110) is one:
each of its layers is one step of an algorithm whose objective is known. Tokens Z = [z_1 … z_n] are moved towards a
mixture of K low-dimensional subspaces U_1 … U_K while they become sparse in a dictionary D. A layer alternates the two:

    Z' = Z + MSSA(LN(Z))        compresses: a step that lowers the coding rate R^c(Z; U_1 … U_K)
    Z  = ISTA(LN(Z'))           sparsifies: a step of iterative shrinkage-thresholding in D

with R^c(Z; U_1 … U_K) = Σ_k R(U_kᵀ Z) and R(W) = ½ log det(I + p / (n ε²) Wᵀ W) for W of shape (p, n). Its family has
other mixers, token-wise parts and residuals, which config/parts.py lists.

Shapes: b images, n tokens (the class token first, where there is one), d features, h heads or subspaces, p = d / h
features per subspace.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crate_dist.config.parts import HEADS, INITS, RESIDUALS, STEMS
from crate_dist.models.batch_norm import GroupedBatchNorm
from crate_dist.models.config import CHANNELS, ModelConfig
from crate_dist.models.heads.head import Head
from crate_dist.models.initial import drawn
from crate_dist.models.mixers.mixer import Mixer
from crate_dist.models.parts import find_part
from crate_dist.models.positions import FourierPositions, interpolate_positions
from crate_dist.models.residuals.layer import Layer


@dataclass(frozen=True)
class Intermediates:
    """The values of one forward pass that white-box measures read; tuples have one entry per layer.

    logits: (b, classes)
    projections: what each mixer reads; where it has subspaces, w = Uᵀ LN(z), of which the coding rate is taken,
    (b, h, n, p)
    features: the tokens after the layer, which are CRATE's sparse codes, (b, n, d)
    grid: rows and columns of patches
    mixers: which say what they do with the projections
    """

    logits: Tensor
    projections: tuple[Tensor, ...]
    features: tuple[Tensor, ...]
    grid: tuple[int, int]
    mixers: tuple[Mixer, ...]

    def attention(self, layer: int) -> Tensor:
        """Returns the attention map of one layer in fp32, (b, h, n, n), such as MSSA's softmax(w wᵀ / √p).

        Rows sum to one. Raises ValueError when the layer's mixer has no such map.
        """
        return self._map(layer, slice(None))

    def class_attention(self, layer: int) -> Tensor:
        """Returns where the class token of each head looks in one layer, by patch: fp32 (b, h, rows, cols).

        What a map lacks to a sum of 1 the class token pays itself. Raises ValueError as `attention` does, and when
        there is no class token in the layers.
        """
        looks = self._map(layer, slice(1))[..., 0, :]
        patches = math.prod(self.grid)
        if looks.shape[-1] == patches:
            raise ValueError("there is no class token in the layers of this model")
        return looks[..., -patches:].unflatten(-1, self.grid)

    def _map(self, layer: int, queries: slice) -> Tensor:
        mixer, w = self.mixers[layer], self.projections[layer]
        single = self.logits.ndim == 1
        found = mixer.attention(w[None] if single else w, queries)
        if found is None:
            raise ValueError(f"{type(mixer).__name__} has no map of tokens that look at each other")
        return found[0] if single else found


class Transformer(nn.Module):
    """An image classifier of the family: CRATE, or what a recipe puts in the place of its parts.

    Parameters are created, hence drawn, in the order of CRATE's published code: the same state of torch's generator
    gives the same weights. `build.build_model` seeds it.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = find_part(STEMS, config.stem)(config)
        if config.positions == "learned":
            self.pos_embedding = nn.Parameter(drawn(1, config.num_tokens, config.dim))
        else:
            side = config.image_size // config.patch_size
            self.positions = FourierPositions(config.dim, (side, side))
        if config.class_token:
            self.cls_token = nn.Parameter(drawn(1, 1, config.dim))
        self.emb_dropout = nn.Dropout(config.emb_dropout)
        layer = find_part(RESIDUALS, config.residual)
        self.layers = nn.ModuleList([layer(config) for _ in range(config.depth)])
        self.head: Head = find_part(HEADS, config.head)(config)
        self._mixers_grid = (config.image_size // config.patch_size,) * 2
        if not next(self.parameters()).is_meta:
            find_part(INITS, config.init)(self)
        self.set_execution()

    def set_execution(
        self, *, recompute: int = 0, autocast: bool = False, images: int = 1, group: int | None = None
    ) -> None:
        """Decides how `forward` computes its function, which is no part of the architecture.

        recompute: layers, from the first, that keep only their input for the backward pass, and are computed again
        autocast: products in bf16 though weights and tokens are fp32, as torch.autocast has it
        images: how many there are at a time, which decides between equal ways to compute for all passes to come
        group: neighbouring images of which batch norm takes its statistics in training; None: all that there are
        """
        self._recompute, self._autocast = recompute, autocast
        for layer in self._layers():
            layer.tokenwise.plan(images * self.config.num_tokens)
        for module in self.modules():
            if isinstance(module, GroupedBatchNorm):
                module.group = group

    def products(self, device: torch.device) -> AbstractContextManager[object]:
        """Returns the context in which `forward` computes: torch.autocast to bf16, or none."""
        return torch.autocast(device.type, torch.bfloat16) if self._autocast else nullcontext()

    def embed(self, images: Tensor) -> Tensor:
        """Turns images (b, 3, image_size, image_size), floating point, of any memory format, to tokens (b, n, d).

        Raises ValueError when the images have another shape.
        """
        side = self.config.image_size
        if images.ndim != 4 or images.shape[1:] != (CHANNELS, side, side):
            raise ValueError(f"expected images of shape (b, {CHANNELS}, {side}, {side}), got {tuple(images.shape)}")
        return self._place(images)

    def embed_any_size(self, images: Tensor) -> Tensor:
        """Does as `embed` to images (b, 3, height, width) whose sides are whole patches: positions are interpolated.

        Raises ValueError when the sides are no multiples of the patch.
        """
        patch = self.config.patch_size
        if images.ndim != 4 or images.shape[1] != CHANNELS or images.shape[2] % patch or images.shape[3] % patch:
            raise ValueError(
                f"expected images of shape (b, {CHANNELS}, height, width) with sides that are multiples of {patch}, "
                f"got {tuple(images.shape)}"
            )
        return self._place(images)

    def _place(self, images: Tensor) -> Tensor:
        """Embeds images whose sides are whole patches, and gives the tokens their positions."""
        grid = self._grid(images)
        if grid != self._mixers_grid:
            for layer in self._layers():
                layer.mixer.set_grid(*grid)
            self._mixers_grid = grid
        patches = self.patch_embed(images)
        if self.config.class_token:
            patches = torch.cat((self.cls_token.expand(len(patches), -1, -1), patches), dim=1)
        return self.emb_dropout(patches + self._positions(*grid))

    def _positions(self, rows: int, cols: int) -> Tensor:
        """Returns what is added to the tokens of rows x cols patches, (1, n, d)."""
        if self.config.positions == "learned":
            return interpolate_positions(self.pos_embedding, (rows, cols))
        positions: Tensor = self.positions((rows, cols))
        return F.pad(positions, (0, 0, int(self.config.class_token), 0))  # a class token has no place

    def _grid(self, images: Tensor) -> tuple[int, int]:
        return images.shape[2] // self.config.patch_size, images.shape[3] // self.config.patch_size

    def _layers(self) -> Iterator[Layer]:
        return (cast(Layer, layer) for layer in self.layers)

    def classify(self, z: Tensor) -> Tensor:
        """Turns tokens after the last layer (b, n, d) to logits (b, classes)."""
        logits: Tensor = self.head(z)
        return logits

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Returns logits (b, classes) of images (b, 3, image_size, image_size) in the dtype of the weights.

        keep: drop path's factors, fp32 (2 * depth, b): of each layer's mixer and of its token-wise part, 0 or
        1 / (1 - rate); None: all ones
        Raises ValueError when the images have another shape.
        """
        again = self._recompute if torch.is_grad_enabled() else 0
        with self.products(images.device):
            z = self.embed(images)
            for number, layer in enumerate(self.layers):
                factors = None if keep is None else keep[2 * number : 2 * number + 2]
                z = checkpoint(layer, z, factors, use_reentrant=False) if number < again else layer(z, factors)
            return self.classify(z)

    def forward_intermediates(self, images: Tensor) -> Intermediates:
        """Does the same pass and keeps what white-box measures read, for images of any size in whole patches.

        Holds two tensors of the size of the tokens per layer; call it on few images, under no_grad to measure.
        Raises ValueError when the sides are no multiples of the patch.
        """
        z = self.embed_any_size(images)
        projections, features = [], []
        for layer in self._layers():
            w = layer.project(z)
            z = layer.update(z, w)
            projections.append(w)
            features.append(z)
        mixers = tuple(layer.mixer for layer in self._layers())
        return Intermediates(self.classify(z), tuple(projections), tuple(features), self._grid(images), mixers)
