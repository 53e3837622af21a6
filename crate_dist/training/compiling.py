"""torch.compile for the parts of a CRATE, where it works; one line in the log where it does not.

The parts are compiled, not the model: its layers are one graph for all of them (under autocast the first one of ToST is
another, since it reads bf16 and the rest fp32), so a compile takes seconds, and their gradients are ready one layer
after the other, so that ZeRO can send the first while the last are computed. Two passes are compiled, each for batches
of one size, and both before the first step: the training's, and the evaluation's. Everything else runs eager, batches
of any size without a graph of their own: see `eagerly`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType

import torch

from crate_dist.config import Compile
from crate_dist.distributed import gather_objects
from crate_dist.models.transformer import Transformer
from crate_dist.training.lion import Lion

logger = logging.getLogger(__name__)

LIMIT_S = 900.0
"""What compiling may take; seconds. It takes one or two minutes where nothing is cached."""

COMPILED = "compiled the model in %.1f s"
"""What the log says of it, at each start."""

_SAY_EVERY_S = 60.0
_TRITON_FROM = 7, 0
"""The oldest GPUs that it knows, by compute capability."""
_METHODS = "embed", "classify"


class CannotCompile(Exception):
    """Why this machine cannot compile, or has not done so in time."""


def should_compile(compile: Compile, device: torch.device) -> bool:
    """Says whether to compile, the same on all ranks; "auto": on GPUs, whose step is bound by memory between products.

    Whether a GPU can is found out when it is tried. On a CPU products and attention take nine tenths of the step, and
    compiling the rest of CRATE-B's gained nothing.
    """
    if compile != "auto":
        return compile
    return device.type == "cuda"


def compile_model(model: Transformer, passes: Callable[[], object], device: torch.device) -> bool:
    """Compiles the model's parts, and tries them. A collective.

    passes: runs all passes that are to be compiled, forward and backward, and changes no gradient and no weight; called
        while the model has no more layers than it takes to see every graph

    Returns
    -------
    False when some rank could not, and then all ranks stay eager: ranks that disagreed would have their gradients ready
    in different orders
    """
    began = time.monotonic()

    def compile_and_try() -> None:
        for layer in model.layers:
            layer.compile(dynamic=False, fullgraph=True)
        for name in _METHODS:
            setattr(model, name, torch.compile(getattr(model, name), dynamic=False, fullgraph=True))
        with _few_layers(model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            passes()

    problem = _on_all_ranks(compile_and_try, device)
    if problem:
        for layer in model.layers:
            layer._compiled_call_impl = None
        for name in _METHODS:
            vars(model).pop(name, None)
        logger.warning("torch.compile does not work here, training goes on without it (%s)", problem)
        return False
    logger.info(COMPILED, time.monotonic() - began)
    return True


def compile_lion(optimizer: Lion, clips: bool, device: torch.device) -> None:
    """Compiles the optimizer's update and tries it on each of its vectors, which stay as they are. A collective."""

    @torch.no_grad()  # as the optimizer calls it: in another mode, or on other tensors, it would be compiled again
    def compile_and_try() -> None:
        optimizer.compile()
        optimizer.found_inf = torch.ones((), device=device)
        optimizer.grad_scale = torch.ones((), device=device) if clips else None
        for group in optimizer.param_groups:
            for p in group["params"]:
                gradient, momentum = torch.zeros_like(p.data), torch.zeros_like(p.data)
                optimizer.update_fn(p, gradient, momentum, 0.0, group["weight_decay"], *group["betas"])

    eager = optimizer.update_fn
    problem = _on_all_ranks(compile_and_try, device)
    optimizer.found_inf = optimizer.grad_scale = None
    if problem:
        optimizer.update_fn = eager
        logger.warning("torch.compile does not work for Lion, which goes on without it (%s)", problem)


@contextlib.contextmanager
def _few_layers(model: Transformer) -> Iterator[None]:
    """Leaves a model its first layer and its last, of which only the first may be computed again when it is trained."""
    training, layers = model.training, model.layers
    model.layers = torch.nn.ModuleList(dict.fromkeys([layers[0], layers[-1]]))
    try:
        yield
    finally:
        model.layers = layers
        model.train(training)


def _on_all_ranks(work: Callable[[], None], device: torch.device) -> str:
    """Does compiling work on every rank, where all have what it takes. Returns which rank could not and why, or ""."""

    def compile() -> None:
        import torch._inductor.config

        if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
            # In this process alone: a signal to the whole job would end helpers, and the compiling with them.
            torch._inductor.config.compile_threads = 1
        with _limited(LIMIT_S), _backward_at_once():
            work()

    for part in (partial(_check_tools, device), compile):
        problem = ""
        try:
            part()
        except Exception as error:  # what compilers, drivers and missing headers raise has no common type
            error = getattr(error, "inner_exception", error)  # torch says what a compiler raised in later lines
            first = next(iter(str(error).strip().splitlines()), "")
            problem = first if isinstance(error, CannotCompile) else f"{type(error).__name__}: {first}"
        said = [f"rank {rank}: {each}" for rank, each in enumerate(gather_objects(problem)) if each]
        if said:
            return said[0]
    return ""


def _check_tools(device: torch.device) -> None:
    """Raises CannotCompile where something is missing that torch would miss at the end of a long traceback."""
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < _TRITON_FROM:
        has, needs = (".".join(map(str, each)) for each in (capability, _TRITON_FROM))
        raise CannotCompile(f"Triton needs a GPU of compute capability {needs}, and this one has {has}")
    if device.type == "cuda" and not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        raise CannotCompile("Triton needs a C compiler: there is no gcc and no clang, and CC is not set")
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").is_file():
        raise CannotCompile(f"there is no Python.h in {headers}: the headers of Python are not installed")


def _backward_at_once() -> contextlib.AbstractContextManager[object]:
    """Returns a context in which the backward pass is compiled with the forward pass, in the thread that has a limit.

    torch would compile it when it is first called, on a GPU in a thread of autograd's, while this one waits for it and
    hears no signal.
    """
    import torch._functorch.config as config

    setting = "force_non_lazy_backward_lowering"
    patched: contextlib.AbstractContextManager[object] = (
        config.patch(setting, True) if hasattr(config, setting) else contextlib.nullcontext()
    )
    return patched


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raises CannotCompile in what it surrounds after `seconds`, between two calls of Python, and says that it lasts.

    Only a process's main thread can be interrupted so; in another there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    began = time.monotonic()

    def look(_: int, __: FrameType | None) -> None:
        passed = time.monotonic() - began
        if passed >= seconds:
            raise CannotCompile(f"not compiled within {seconds:.0f} s")
        logger.info("still compiling after %.0f s; at %.0f s training goes on without", passed, seconds)

    before = signal.signal(signal.SIGALRM, look)
    interval = min(_SAY_EVERY_S, seconds)
    signal.setitimer(signal.ITIMER_REAL, interval, interval)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def eagerly() -> contextlib.AbstractContextManager[object]:
    """Returns a context in which compiled code runs as Python: hooks see every module, no batch size needs a graph."""
    if "torch._dynamo" not in sys.modules:  # which takes a second to import; without it nothing is compiled
        return contextlib.nullcontext()
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
