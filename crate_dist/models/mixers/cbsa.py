"""CBSA, the token mixer of CBT: a few representatives are compressed, and carry it to all tokens."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from crate_dist.models.config import ModelConfig
from crate_dist.models.initial import drawn
from crate_dist.models.matmul import Linear
from crate_dist.models.mixers.mixer import SubspaceMixer
from crate_dist.models.rates import Measures, coding_rate


class CBSA(SubspaceMixer):
    """Contract-and-broadcast self-attention (arXiv 2509.16875, NeurIPS 2025), linear in the number of tokens.

        R   = mean of w over each cell of an 8 x 8 grid over the patches, w = Uᵀ z
        R⁺  = R + κ A w           contracts: A = softmax(R wᵀ / √p) over the tokens
        ΔR  = B R⁺                compresses the representatives alone: B = softmax(R⁺ R⁺ᵀ / √p)
        out = W [η Aᵀ ΔR]         broadcasts it to the tokens, by the weights that contracted them

    in each of h subspaces, with learned steps κ and η of each. This is the published operator, whose grid is shifted
    by one: its cells lie over the first ⌊√n⌋² of n tokens, so that the class token stands where the first patch should,
    every patch one place further on, and the last one in no cell. It takes square grids alone. The 8 is `cells` of the
    recipe's [model.options].
    """

    key = "cbsa"
    square_alone = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.cells = config.heads, int(config.option("cells"))
        self.subspaces = Linear(config.dim, config.dim, bias=False)
        self.step_x = nn.Parameter(drawn(config.heads, 1, 1))
        self.step_rep = nn.Parameter(drawn(config.heads, 1, 1))
        self.out = Linear(config.dim, config.dim, bias=config.out_bias)
        self.dropout = nn.Dropout(config.dropout)

    def project(self, z: Tensor) -> Tensor:
        """Projects tokens (b, n, d) to the coordinates of each subspace: w = Uᵀ z, (b, h, n, p)."""
        # By heads in memory, as four products read it: autograd keeps one copy, not one for each.
        return rearrange(self.subspaces(z), "b n (h p) -> b h n p", h=self.heads).contiguous()

    def attend(self, w: Tensor) -> Tensor:
        """Contracts representatives of projections (b, h, n, p) and broadcasts their change to tokens (b, n, d)."""
        contraction, contracted = self._contract(w)
        contracted = contracted.to(w.dtype)  # with autocast once, not for each of three
        change = F.scaled_dot_product_attention(contracted, contracted, contracted)
        broadcast = contraction.mT @ (self.step_x * change)  # η on 64 representatives is less than on all tokens
        return self.dropout(self.out(rearrange(broadcast, "b h n p -> b n (h p)")))

    def attention(self, w: Tensor, queries: slice = slice(None)) -> Tensor:
        """Returns the published map AᵀA of projections (b, h, n, p): fp32 (b, h, n, n).

        It says how much two tokens share their representatives, and is symmetric: rows do not sum to one.
        """
        contraction = self.contraction(w)
        return contraction[..., queries].mT @ contraction

    def contraction(self, w: Tensor) -> Tensor:
        """Returns A, what each representative takes of each token: fp32 (b, h, 64, n); rows sum to one."""
        return _attention(self.pool(w.float()), w.float())

    def representatives(self, w: Tensor) -> Tensor:
        """Returns R⁺, the contracted representatives: fp32 (b, h, 64, p), row by row of their grid."""
        return self._contract(w.float())[1]

    def representative_attention(self, w: Tensor) -> Tensor:
        """Returns B, what the contracted representatives take of each other: fp32 (b, h, 64, 64); rows sum to one."""
        contracted = self.representatives(w)
        return _attention(contracted, contracted)

    def way_back(self) -> Tensor:
        """Returns [η_1 W_1 … η_K W_K], (d, d): W and η are weights of their own, and act as their product alone."""
        weight = super().way_back().unflatten(1, (self.heads, -1))
        return (weight * self.step_x.view(-1, 1)).flatten(1)

    def measures(self, w: Tensor) -> Measures:
        """Returns the coding rate of the representatives, what contraction makes of it, and that of CBT's paper.

        coding_rate_with_lengths is R^c with tokens as long as they are, as the published code measures it.
        """
        pooled, contracted = coding_rate(self.pool(w.float())), coding_rate(self.representatives(w))
        return super().measures(w) | {
            "representatives_rate": pooled,
            "representatives_rate_change": contracted - pooled,
            "coding_rate_with_lengths": coding_rate(w, scaled=False),
        }

    def pool(self, w: Tensor) -> Tensor:
        """Returns R, the mean of projections (b, h, n, p) over each cell: (b, h, 64, p).

        Raises ValueError when the tokens form no grid that the operator takes.
        """
        grid = rearrange(self.on_grid(w), "b h row col p -> (b h) p row col")
        return F.adaptive_avg_pool2d(grid, self.cells).flatten(2).mT.unflatten(0, w.shape[:2])

    def set_grid(self, rows: int, cols: int) -> None:
        """Raises ValueError where rows and columns are not as many: the published code is wrong there, or fails."""
        if rows != cols:
            raise ValueError(
                f'mixer = "cbsa", as published, takes a square grid of patches, not {rows} x {cols}; take square '
                'images, or mixer = "cbsa_aligned"'
            )

    def on_grid(self, w: Tensor) -> Tensor:
        """Lays the tokens of projections (b, h, n, p) out as the cells find them: (b, h, rows, columns, p)."""
        side = math.isqrt(w.shape[2])
        if side * side + 1 != w.shape[2]:
            raise ValueError(
                f'mixer = "cbsa", as published, takes a class token and a square grid of patches, not {w.shape[2]} '
                'tokens; mixer = "cbsa_aligned" takes others'
            )
        return w[:, :, :-1].unflatten(2, (side, side))

    def _contract(self, w: Tensor) -> tuple[Tensor, Tensor]:
        pooled = self.pool(w)
        contraction = _attention(pooled, w)
        return contraction, torch.addcmul(pooled, self.step_rep, contraction @ w)


class AlignedCBSA(CBSA):
    """CBSA with its cells where the patches lie: without the class token, and on a grid of any shape."""

    square_alone = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.grid = (config.image_size // config.patch_size,) * 2

    def set_grid(self, rows: int, cols: int) -> None:
        """Lays the cells over so many rows and columns of patches, from now on."""
        self.grid = (rows, cols)

    def on_grid(self, w: Tensor) -> Tensor:
        """Lays the patches of projections (b, h, n, p) out as they lie in the image: (b, h, rows, columns, p)."""
        patches = math.prod(self.grid)
        if not patches <= w.shape[2] <= patches + 1:
            raise ValueError(f"{w.shape[2]} tokens are not those of {self.grid[0]} x {self.grid[1]} patches")
        return w[:, :, -patches:].unflatten(2, self.grid)


def _attention(queries: Tensor, keys: Tensor) -> Tensor:
    """Returns softmax(queries keysᵀ / √p) over the keys: (…, m, p) and (…, n, p) -> (…, m, n)."""
    logits = (queries * keys.shape[-1] ** -0.5) @ keys.mT
    return logits.softmax(dim=-1, dtype=logits.dtype)  # autocast would return, and keep, fp32
