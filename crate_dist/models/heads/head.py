"""What every head offers."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Head(nn.Module, ABC):
    """From the tokens after the last layer to logits: a linear map, `self.linear`, of their `features`."""

    norm: nn.Module
    linear: nn.Linear

    def forward(self, z: Tensor) -> Tensor:
        """(b, n, d) -> (b, classes)"""
        logits: Tensor = self.linear(self.features(z))
        return logits

    @abstractmethod
    def features(self, z: Tensor) -> Tensor:
        """Returns what the linear map reads of tokens, (b, n, d) -> (b, d)."""

    def attention(self, z: Tensor) -> Tensor | None:
        """Returns where a class token of the head's own looks in its blocks, fp32 (blocks, b, h, 1 + n); None: nowhere.

        It comes first among the tokens that it looks at. z: (b, n, d)
        """
        return None
