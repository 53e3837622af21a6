"""Chooses which of torch's kernels a GPU may compute the model with, once per process, against torch's defaults.

They change with its versions and the card, and by variables of the environment: torch 2.13 takes cuDNN's attention on
Hopper, which plans anew for 20 to 40 ms at every new batch size, such as the last one of an evaluation.
"""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend

from crate_dist.models.transformer import Transformer


def choose_kernels() -> None:
    """Sets for this process: products sum in fp32, fp32 is not rounded to TF32, attention is flash's.

    Without the first, bf16 products of a few tall blocks may be summed in bf16. Of the second, containers may set
    products otherwise by NVIDIA's variables, and convolutions have a flag of their own, which torch sets: the stems of
    ToST and CBT would compute in TF32. Neither concerns what reads bf16, by weights or by autocast. Attention falls
    back to the memory-efficient kernel where flash's does not fit (fp32, cards before Ampere, heads of more than 256
    features), and to plain products where neither does. Does nothing to a CPU.

    Where a program has set torch.backends.fp32_precision to "tf32" before, convolutions keep that: these older names
    do not undo it, and torch refuses to answer what is set by both. Nothing here sets it.
    """
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False  # torch's older names, as above: it refuses a mixture with the newer
    torch.backends.cuda.enable_cudnn_sdp(False)


def attention_kernel(model: Transformer, device: torch.device, dtype: torch.dtype) -> str:
    """Names the kernel that torch takes for the model's attention: "flash", "efficient" or "math"; a CPU has its own.

    dtype: of the products
    """
    config = model.config
    shape = (1, config.heads, config.num_tokens, config.dim // config.heads)
    w = torch.empty(shape, dtype=dtype, device=device, requires_grad=True)
    chosen = SDPBackend(torch._fused_sdp_choice(w, w, w, dropout_p=config.dropout))
    return str(chosen.name).lower().removesuffix("_attention")
