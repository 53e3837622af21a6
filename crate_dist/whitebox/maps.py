"""Where a model looks, patch by patch: the maps that pictures are made of.

Where there is a class token, how it looks at the patches; where there is none, how all patches do, in the mean. A mixer
in which no token looks at another shows instead how much of each patch each of its heads takes (ToST's membership Π).
Shapes: L layers, b images, h heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from crate_dist.errors import UserError
from crate_dist.models.residuals.layer import Layer
from crate_dist.models.transformer import Transformer
from crate_dist.whitebox.measures import evaluating


@dataclass(frozen=True)
class Maps:
    """The maps of all layers, and those of the head of the model where it looks itself. fp32.

    kind: of `layers`; what: in words
    layers: (L, b, h, rows, cols); even: what each patch would have if all tokens had the same, (L, b, h)
    head: where the class token looks in the head's blocks, (blocks, b, h, rows, cols), sums of one with its own share
    """

    kind: Literal["attention", "membership"]
    what: str
    layers: Tensor
    even: Tensor
    head: Tensor | None = None

    def over_heads(self, maps: Tensor) -> Tensor:
        """Returns one map of all heads, (…, h, rows, cols) -> (…, rows, cols): the mean, of memberships the largest."""
        return maps.mean(dim=-3) if self.kind == "attention" else maps.amax(dim=-3)

    @property
    def over_heads_name(self) -> str:
        """What `over_heads` takes."""
        return "mean over the heads" if self.kind == "attention" else "largest of the heads"

    def looks(self, layer: int) -> Tensor:
        """Returns where the model looks in a layer, (b, h, rows, cols): the head's last block where no layer looks.

        Raises UserError when nothing in the model looks anywhere.
        """
        if self.kind == "attention":
            return self.layers[layer]
        if self.head is None:
            raise UserError(f"neither layers nor head of this model have attention; there is its {self.what} alone")
        return self.head[-1]


@torch.no_grad()
def token_maps(model: Transformer, images: Tensor) -> Maps:
    """Returns the maps of all layers on images (b, 3, height, width).

    Raises UserError when the layers' mixer has neither an attention map nor a membership.
    """
    rows, cols = (side // model.config.patch_size for side in images.shape[2:])
    first = int(model.config.class_token)
    maps, even = list[Tensor](), list[Tensor]()
    kind: Literal["attention", "membership"] = "attention"
    with evaluating(model):
        z = model.embed_any_size(images)
        for layer in model.layers:
            assert isinstance(layer, Layer)
            w = layer.project(z)
            seen = layer.mixer.attention(w, slice(first or None))
            if seen is not None:
                seen = seen.mean(dim=-2)
                even.append(seen.mean(dim=-1))
            else:
                kind, seen = "membership", layer.mixer.membership(w)
                if seen is None:
                    name = type(layer.mixer).__name__
                    raise UserError(f"{name} has neither an attention map nor a membership: there is nothing to show")
                even.append(torch.full(seen.shape[:2], 1 / seen.shape[1], device=seen.device))
            maps.append(seen[..., first:].unflatten(-1, (rows, cols)))
            z = layer.update(z, w)
        head = model.head.attention(z)
    looks = "attention of the class token" if first else "attention of all patches"
    what = looks if kind == "attention" else "membership of the patches"
    shown = None if head is None else head[..., 1:].unflatten(-1, (rows, cols))
    return Maps(kind, what, torch.stack(maps), torch.stack(even), shown)


@torch.no_grad()
def patch_keys(model: Transformer, images: Tensor, layer: int) -> Tensor:
    """Returns what one layer's mixer knows patches by, heads side by side, as fp32: (b, 3, height, width) ->
    (b, rows, cols, d).

    MSSA's w = Uᵀ LN(z) is query, key and value at once, hence these are the keys that the published pictures are made
    of; those of attention are its keys.
    """
    rows, cols = (side // model.config.patch_size for side in images.shape[2:])
    with evaluating(model):
        inside = model.forward_intermediates(images)
    keys = inside.mixers[layer].keys(inside.projections[layer])[:, :, int(model.config.class_token) :]
    return keys.float().transpose(1, 2).flatten(2).unflatten(1, (rows, cols))
