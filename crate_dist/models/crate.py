"""CRATE, the white-box transformer: each layer is one step of an algorithm whose objective is known.

Yu et al., "White-Box Transformers via Sparse Rate Reduction" (arXiv 2306.01129; longer: 2311.13110). Tokens
Z = [z_1 … z_n] are moved towards a mixture of K low-dimensional subspaces U_1 … U_K while they become sparse in
a dictionary D. A layer alternates the two parts:

    Z' = Z + MSSA(LN(Z))        compresses: a step that lowers the coding rate R^c(Z; U_1 … U_K)
    Z  = ISTA(LN(Z'))           sparsifies: a step of iterative shrinkage-thresholding in D

with R^c(Z; U_1 … U_K) = Σ_k R(U_kᵀ Z) and R(W) = ½ log det(I + p / (n ε²) Wᵀ W) for W of shape (p, n).

Shapes in this module: b images, n tokens (the class token first), d features, h heads or subspaces, p = d / h
features per subspace.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crate_dist.models.matmul import Linear, addmm, linear
from crate_dist.models.positions import interpolate_positions
from crate_dist.models.sizes import ista_in_one_product

Pool = Literal["cls", "mean"]
CHANNELS = 3


@dataclass(frozen=True, kw_only=True)
class CrateConfig:
    """Everything that decides the function which a CRATE computes, up to its weights.

    image_size, patch_size: side in pixels; pool: what the head reads, the class token or the mean of all tokens;
    dropout: of the attention and its output; emb_dropout: of the embedded tokens; ista_step: η; ista_threshold: λ.
    Raises ValueError when patches do not tile the image or heads do not divide the width.
    """

    image_size: int
    patch_size: int
    num_classes: int
    dim: int
    depth: int
    heads: int
    pool: Pool = "cls"
    dropout: float = 0.0
    emb_dropout: float = 0.0
    ista_step: float = 0.1
    ista_threshold: float = 0.1

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}")
        if self.dim % self.heads:
            fitting = [str(n) for n in range(1, min(self.dim, 32) + 1) if self.dim % n == 0]
            raise ValueError(
                f"width {self.dim} does not divide into {self.heads} heads; it does into {', '.join(fitting)}"
            )
        if self.pool not in ("cls", "mean"):
            raise ValueError(f'pool is "cls" or "mean", not {self.pool!r}')

    @property
    def num_tokens(self) -> int:
        """Tokens per image: the patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclass(frozen=True)
class Intermediates:
    """The values of one forward pass that white-box measures read; tuples have one entry per layer.

    logits: (b, classes)
    projections: w = Uᵀ LN(z), what MSSA compresses and the coding rate is taken of, (b, h, n, p)
    features: the tokens after the layer, which are ISTA's sparse codes, (b, n, d)
    grid: rows and columns of patches
    """

    logits: Tensor
    projections: tuple[Tensor, ...]
    features: tuple[Tensor, ...]
    grid: tuple[int, int]

    def attention(self, layer: int) -> Tensor:
        """Returns the self-attention map softmax(w wᵀ / √p) of one layer in fp32, (b, h, n, n); rows sum to one."""
        w = self.projections[layer].float()
        return (w @ w.mT * w.shape[-1] ** -0.5).softmax(dim=-1)

    def class_attention(self, layer: int) -> Tensor:
        """Returns where the class token of each head looks in one layer, by patch: fp32 (b, h, rows, cols).

        What a map lacks to a sum of 1 the class token pays itself.
        """
        w = self.projections[layer].float()
        looks = (w[..., :1, :] @ w.mT * w.shape[-1] ** -0.5).softmax(dim=-1)
        return looks[..., 0, 1:].unflatten(-1, self.grid)


class MSSA(nn.Module):
    """Multi-head subspace self-attention (arXiv 2306.01129, section 2.3).

        SSA(Z | U_k) = (U_kᵀ Z) softmax((U_kᵀ Z)ᵀ (U_kᵀ Z))
        MSSA(Z)      = W [SSA(Z | U_1); …; SSA(Z | U_K)]

    One projection serves as query, key and value, so this is attention with Q = K = V. As in the published code,
    the softmax is scaled by 1 / √p and W is learned with a bias, where the derivation has a multiple of [U_1 … U_K];
    with a single head there is no W.
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.attention_dropout = dropout
        self.subspaces = Linear(dim, dim, bias=False)
        self.out = nn.Identity() if heads == 1 else Linear(dim, dim)
        self.dropout = nn.Dropout(0.0 if heads == 1 else dropout)

    def project(self, z: Tensor) -> Tensor:
        """Projects tokens (b, n, d) to the coordinates of each subspace: w = Uᵀ z, (b, h, n, p)."""
        return rearrange(self.subspaces(z), "b n (h p) -> b h n p", h=self.heads)

    def attend(self, w: Tensor) -> Tensor:
        """Compresses projections (b, h, n, p) against each other and mixes them back to tokens (b, n, d)."""
        # Three views of the tokens: their gradients are summed where the tokens lie, those of w would be copied there.
        tokens = w.transpose(1, 2)
        q, k, v = (tokens.transpose(1, 2) for _ in range(3))
        compressed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attention_dropout if self.training else 0.0)
        return self.dropout(self.out(rearrange(compressed, "b h n p -> b n (h p)")))

    def forward(self, z: Tensor) -> Tensor:
        """(b, n, d) -> (b, n, d)"""
        return self.attend(self.project(z))


class ISTA(nn.Module):
    """One step of iterative shrinkage-thresholding for non-negative sparse codes (arXiv 2306.01129, section 2.4).

        Z⁺ = ReLU(Z + η Dᵀ(Z - D Z) - η λ)

    which descends λ‖A‖₁ + ½‖Z - D A‖² over A ≥ 0 from A = Z. With tokens as the rows of z there are two ways to it:

        z + η ((z - z Dᵀ) D - λ)     two products of the tokens
        z + η (z (D - DᵀD) - λ)      one_product: one of the tokens, and one of the dictionary with itself in each pass

    `sizes.ista_in_one_product` says which takes fewer operations. D - DᵀD is summed in fp32 and rounded once, so that
    in bf16 its outputs and gradients are as near to the exact ones as the first way's, those of the tokens nearer.
    """

    one_product = False

    def __init__(self, dim: int, step: float = 0.1, threshold: float = 0.1) -> None:
        super().__init__()
        self.step = step
        self.threshold = threshold
        self.dictionary = nn.Parameter(torch.empty(dim, dim))
        nn.init.kaiming_uniform_(self.dictionary)

    def forward(self, z: Tensor) -> Tensor:
        """(b, n, d) -> (b, n, d), no entry below zero"""
        d = self.dictionary
        one = self.one_product
        gradient = linear(z, addmm(d, d.t(), d, alpha=-1).t()) if one else linear(z - linear(z, d), d.t())
        # In place where nothing needs the value before: one tensor of the tokens' size is made, not four. The threshold
        # goes first: ηλ is about one step of bf16 at 1, and taken from the sum it would be rounded to all or nothing.
        return torch.add(z, gradient.sub_(self.threshold), alpha=self.step).relu_()

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"dim={len(self.dictionary)}, step={self.step}, threshold={self.threshold}"


class CrateLayer(nn.Module):
    """Compress, then sparsify; each reads normalised tokens, and only MSSA has a residual branch."""

    def __init__(self, config: CrateConfig) -> None:
        super().__init__()
        self.mssa_norm = nn.LayerNorm(config.dim)
        self.mssa = MSSA(config.dim, config.heads, config.dropout)
        self.ista_norm = nn.LayerNorm(config.dim)
        self.ista = ISTA(config.dim, config.ista_step, config.ista_threshold)

    def project(self, z: Tensor) -> Tensor:
        """Returns the projections that `update` needs: (b, n, d) -> (b, h, n, p)."""
        return self.mssa.project(self.mssa_norm(z))

    def update(self, z: Tensor, w: Tensor) -> Tensor:
        """Returns the layer's output, (b, n, d), from its input z and w = project(z)."""
        return self.ista(self.ista_norm(z + self.mssa.attend(w)))

    def forward(self, z: Tensor) -> Tensor:
        """(b, n, d) -> (b, n, d)"""
        return self.update(z, self.project(z))


class PatchEmbedding(nn.Module):
    """Square patches, each flattened row by row with the channel fastest, to tokens: LayerNorm, Linear, LayerNorm."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.norm_in = nn.LayerNorm(CHANNELS * patch_size**2)
        self.proj = Linear(CHANNELS * patch_size**2, dim)
        self.norm_out = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, height, width) -> (b, patches, d)"""
        s = self.patch_size
        patches = rearrange(images, "b c (row y) (col x) -> b (row col) (y x c)", y=s, x=s)
        return self.norm_out(self.proj(self.norm_in(patches)))


class ClassifierHead(nn.Module):
    """Normalised features to class scores."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.linear = nn.Linear(dim, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """(b, d) -> (b, classes)"""
        return self.linear(self.norm(features))


def _drawn(*shape: int) -> Tensor:
    """Draws what torch.randn would; nothing on the device "meta", where torch imports sympy for it, half a second."""
    empty = torch.empty(shape)
    return empty if empty.is_meta else empty.normal_()


class CRATE(nn.Module):
    """The image classifier: patch embedding, class token, positions, CRATE layers, linear head.

    Parameters are created, hence drawn, in the order of the published code: the same state of torch's generator
    gives the same weights. `build.build_model` seeds it.
    """

    def __init__(self, config: CrateConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbedding(config.patch_size, config.dim)
        self.pos_embedding = nn.Parameter(_drawn(1, config.num_tokens, config.dim))
        self.cls_token = nn.Parameter(_drawn(1, 1, config.dim))
        self.emb_dropout = nn.Dropout(config.emb_dropout)
        self.layers = nn.ModuleList([CrateLayer(config) for _ in range(config.depth)])
        self.head = ClassifierHead(config.dim, config.num_classes)
        self.set_execution()

    def set_execution(self, *, recompute: int = 0, autocast: bool = False, images: int = 1) -> None:
        """Decides how `forward` computes its function, which is no part of the architecture.

        recompute: layers, from the first, that keep only their input for the backward pass, and are computed again
        autocast: products in bf16 though weights and tokens are fp32, as torch.autocast has it
        images: how many there are at a time, which decides between the two ways to compute ISTA for all passes to come
        """
        self._recompute, self._autocast = recompute, autocast
        for layer in self.layers:
            assert isinstance(layer, CrateLayer)
            layer.ista.one_product = ista_in_one_product(images * self.config.num_tokens, self.config.dim)

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
        return self._place(self.patch_embed(images), self.pos_embedding)

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
        grid = (images.shape[2] // patch, images.shape[3] // patch)
        return self._place(self.patch_embed(images), interpolate_positions(self.pos_embedding, grid))

    def _place(self, patches: Tensor, positions: Tensor) -> Tensor:
        tokens = torch.cat((self.cls_token.expand(len(patches), -1, -1), patches), dim=1)
        return self.emb_dropout(tokens + positions)

    def classify(self, z: Tensor) -> Tensor:
        """Turns tokens after the last layer (b, n, d) to logits (b, classes)."""
        return self.head(z.mean(dim=1) if self.config.pool == "mean" else z[:, 0])

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (b, classes) of images (b, 3, image_size, image_size) in the dtype of the weights.

        Raises ValueError when the images have another shape.
        """
        again = self._recompute if torch.is_grad_enabled() else 0
        with self.products(images.device):
            z = self.embed(images)
            for number, layer in enumerate(self.layers):
                z = checkpoint(layer, z, use_reentrant=False) if number < again else layer(z)
            return self.classify(z)

    def forward_intermediates(self, images: Tensor) -> Intermediates:
        """Does the same pass and keeps what white-box measures read, for images of any size in whole patches.

        Holds two tensors of the size of the tokens per layer; call it on few images, under no_grad to measure.
        Raises ValueError when the sides are no multiples of the patch.
        """
        z = self.embed_any_size(images)
        rows, cols = (side // self.config.patch_size for side in images.shape[2:])
        projections, features = [], []
        for layer in self.layers:
            assert isinstance(layer, CrateLayer)
            w = layer.project(z)
            z = layer.update(z, w)
            projections.append(w)
            features.append(z)
        return Intermediates(self.classify(z), tuple(projections), tuple(features), (rows, cols))
