"""torch.compile for the layers of a CRATE, where it works; one line in the log where it does not.

The layers are compiled, not the model: they are one graph for all of them, so a compile takes seconds, and their
gradients are ready one layer after the other, so that ZeRO can send the first while the last are computed. What
happens outside a training step runs eager, batches of any size without a graph of their own: see `eagerly`.

torch keeps what it compiled in $TORCHINDUCTOR_CACHE_DIR, by default a folder of the user's in the node's temporary
folder: a restart on the same node finds it there. Set it to a folder that outlives the job to keep it for all.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator

import torch

from crate_dist.config import Compile
from crate_dist.distributed import gather_objects
from crate_dist.models.crate import CRATE

logger = logging.getLogger(__name__)


def should_compile(compile: Compile, device: torch.device) -> bool:
    """Says whether to compile; "auto": on a GPU that Triton knows, since its step is bound by memory between products.

    On a CPU products and attention take nine tenths of the step, and compiling the rest of CRATE-B's gained nothing.
    """
    if compile != "auto":
        return compile
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)


def compile_layers(model: CRATE, device: torch.device, dtype: torch.dtype, micro_batch: int) -> float | None:
    """Compiles the layers' training pass for one micro-batch, and tries it. A collective.

    Returns the seconds that it took; None when some rank could not, and then all ranks stay eager: ranks that disagreed
    would have their gradients ready in different orders.
    """
    began = time.monotonic()
    import torch._inductor.config

    # In this process alone: a signal to the whole job would end helpers, and the compiling with them.
    torch._inductor.config.compile_threads = 1
    problem = None
    try:
        for layer in model.layers:
            layer.compile(dynamic=False, fullgraph=True)
        _try(model, device, dtype, micro_batch)
    except Exception as error:  # what compilers, drivers and missing headers raise has no common type
        problem = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    problems = [said for said in gather_objects(problem) if said]
    if problems:
        for layer in model.layers:
            layer._compiled_call_impl = None
        logger.warning("torch.compile does not work here, training goes on without it (%s)", problems[0])
        return None
    return time.monotonic() - began


def _try(model: CRATE, device: torch.device, dtype: torch.dtype, micro_batch: int) -> None:
    """Runs the first layer, whose graph is every layer's, forward and backward; changes no gradient and no weight."""
    training = model.training
    model.train()
    layer = model.layers[0]
    shape = (micro_batch, model.config.num_tokens, model.config.dim)
    tokens = torch.zeros(shape, dtype=dtype, device=device, requires_grad=True)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), model.products(device):
        torch.autograd.grad(layer(tokens).sum(), [tokens, *layer.parameters()])
    model.train(training)


def eagerly() -> contextlib.AbstractContextManager[object]:
    """Returns a context in which compiled code runs as Python: hooks see every module, no batch size needs a graph."""
    stance: contextlib.AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


@contextlib.contextmanager
def decorators_ignored() -> Iterator[None]:
    """Opens a context in which @torch.compile leaves functions as they are, for imports that need none compiled."""
    real = torch.compile
    torch.compile = lambda function=None, **_: function or (lambda decorated: decorated)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = real
