"""The published code's side of a comparison: its model, or its formulation in plain PyTorch, in its loop.

The model is imported from a checkout of the published code, where there is one (checkouts.py). `PlainForm` writes
CRATE's mathematics down once more in the plainest operations: it shares no code with models/, and is what that is held
against.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from lion_pytorch import Lion
from torch import Tensor, nn

from crate_dist.config import Recipe
from crate_dist.models.transformer import Transformer

CPU = torch.device("cpu")


class PlainForm(nn.Module):
    """A CRATE's function as published, in plain operations on its weights: softmax written out, ISTA in three products.

    Z' = Z + W softmax(Wₖ Wₖᵀ / √p) Wₖ,  Wₖ = LN(Z) Uₖ        Z⁺ = ReLU(X + η (Dᵀ X - Dᵀ D X - λ)),  X = LN(Z')
    """

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (b, classes) of images (b, 3, image_size, image_size)."""
        config, weight = self.model.config, dict(self.model.named_parameters())
        side, count = config.patch_size, len(images)

        def norm(x: Tensor, name: str) -> Tensor:
            return F.layer_norm(x, x.shape[-1:], weight[f"{name}.weight"], weight[f"{name}.bias"])

        def affine(x: Tensor, name: str) -> Tensor:
            return F.linear(x, weight[f"{name}.weight"], weight[f"{name}.bias"])

        patches = images.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
        tokens = norm(affine(norm(patches, "patch_embed.norm_in"), "patch_embed.proj"), "patch_embed.norm_out")
        z = torch.cat((weight["cls_token"].expand(count, -1, -1), tokens), dim=1) + weight["pos_embedding"]
        for number in range(config.depth):
            layer = f"layers.{number}"
            w = F.linear(norm(z, f"{layer}.mssa_norm"), weight[f"{layer}.mssa.subspaces.weight"])
            w = w.unflatten(-1, (config.heads, -1)).transpose(1, 2)
            attention = (w @ w.mT * w.shape[-1] ** -0.5).softmax(dim=-1)
            mixed = (attention @ w).transpose(1, 2).flatten(2)
            z = z + (affine(mixed, f"{layer}.mssa.out") if config.heads > 1 else mixed)
            x, dictionary = norm(z, f"{layer}.ista_norm"), weight[f"{layer}.ista.dictionary"]
            shared, own = F.linear(F.linear(x, dictionary), dictionary.t()), F.linear(x, dictionary.t())
            z = F.relu(x + config.ista_step * (own - shared) - config.ista_step * config.ista_threshold)
        return affine(norm(z.mean(dim=1) if config.pool == "mean" else z[:, 0], "head.norm"), "head.linear")


class Loop:
    """Its loop around a model, with the recipe's optimizer and its scheduler: plain fp32, on a GPU under autocast."""

    def __init__(self, model: nn.Module, recipe: Recipe, device: torch.device = CPU) -> None:
        optim, epochs = recipe.optim, recipe.train.epochs
        self.model, self._smoothing, self._on_gpu = model.to(device), optim.label_smoothing, device.type == "cuda"
        kind: Callable[..., torch.optim.Optimizer] = Lion if optim.name == "lion" else torch.optim.AdamW
        self.optimizer = kind(model.parameters(), lr=optim.lr, weight_decay=optim.weight_decay)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda epoch: min((epoch + 1) / (optim.warmup_epochs + 1e-8), (math.cos(math.pi * epoch / epochs) + 1) / 2),
        )
        self._scaler = torch.amp.GradScaler("cuda", enabled=self._on_gpu)

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Takes a step on normalised images (n, 3, side, side), and returns the loss before it."""
        self.model.train()
        with torch.autocast("cuda", enabled=self._on_gpu):
            loss = F.cross_entropy(self.model(images), labels, label_smoothing=self._smoothing)
        self.optimizer.zero_grad()
        self._scaler.scale(loss).backward()
        self._scaler.step(self.optimizer)
        self._scaler.update()
        return loss.detach()

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Returns (n, classes) of normalised images (n, 3, side, side)."""
        self.model.eval()
        logits: Tensor = self.model(images)
        return logits
