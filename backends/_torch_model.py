"""The acoustic model in torch: the weights and the steps of its ONNX graph, or any program that torch exported.

Needs ``torch``. Nothing here chooses a device or a number of threads: a module runs where its weights are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from backends.contract import ModelError
from backends.errors import ErrorKind, classify
from backends.model import N_MELS, NORM_EPSILON, ModelSpec, Weights

_SPEC_KEY = "plimsoll.spec"


def build(spec: ModelSpec, weights: Weights) -> torch.nn.Module:
    """Make the model of a spec: float32 [batch, window_frames, 80] to [batch, window_frames / 2, vocabulary].

    Its weights are copies, on the CPU, and want no gradient.
    """
    return _Acoustic(spec, weights).eval()


class _Acoustic(torch.nn.Module):
    def __init__(self, spec: ModelSpec, weights: Weights) -> None:
        super().__init__()
        self.spec = spec
        for name, array in weights.items():
            # A copy: torch aligns it, and a kernel may add in an order that depends on that. Channels of kernels last.
            weight = torch.tensor(array.transpose(0, 2, 3, 1).copy() if array.ndim == 4 else array)
            self.register_parameter(_attribute(name), torch.nn.Parameter(weight, requires_grad=False))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Compute what the ONNX graph computes, in plain steps; in place where a step's input is not needed again."""
        spec, steps = self.spec, self.spec.window_frames // 2

        def weight(name: str) -> torch.Tensor:
            found: torch.Tensor = getattr(self, _attribute(name))
            return found

        def norm(x: torch.Tensor, name: str) -> torch.Tensor:
            return functional.layer_norm(
                x, (spec.width,), weight(f"{name}.scale"), weight(f"{name}.bias"), NORM_EPSILON
            )

        def heads(x: torch.Tensor, name: str) -> torch.Tensor:
            return (x @ weight(name)).view(-1, steps, spec.heads, spec.width // spec.heads).transpose(1, 2)

        def conv(x: torch.Tensor, name: str, stride: int) -> torch.Tensor:
            kernels = weight(f"{name}.weight").permute(0, 3, 1, 2)
            return functional.conv2d(x, kernels, weight(f"{name}.bias"), stride, padding=1).relu_()

        # The one channel lies last, and so do all that come of it. With channels first, oneDNN makes each image twice,
        # once in its own layout: nearly twice the peak, and twice the time.
        image = features.unsqueeze(-1).permute(0, 3, 1, 2)
        x = conv(conv(image, "conv1", stride=1), "conv2", stride=2)
        x = x.transpose(1, 2).reshape(-1, steps, spec.channels * N_MELS // 2)
        x = (x @ weight("project.weight")).add_(weight("project.bias")).add_(weight("position"))
        for i in range(spec.layers):
            layer = f"layer{i}"
            y = norm(x, f"{layer}.norm1")
            query, key, value = (heads(y, f"{layer}.{name}") for name in ("query", "key", "value"))
            attention = (query @ key.transpose(2, 3)).mul_((spec.width // spec.heads) ** -0.5).softmax(-1)
            mixed = (attention @ value).transpose(1, 2).reshape(-1, steps, spec.width)
            x = x + mixed @ weight(f"{layer}.out")
            y = norm(x, f"{layer}.norm2") @ weight(f"{layer}.up.weight")
            y = y.add_(weight(f"{layer}.up.bias")).relu_() @ weight(f"{layer}.down.weight")
            x = x + y.add_(weight(f"{layer}.down.bias"))
        return (norm(x, "norm") @ weight("head.weight")).add_(weight("head.bias"))


def _attribute(name: str) -> str:
    # A parameter's name may have no dot in it.
    return name.replace(".", "_")


def export(spec: ModelSpec, weights: Weights, path: Path) -> None:
    """Write the model as a torch program, FILE.pt2, with a free batch and its spec beside it. Raises OSError."""
    example = torch.zeros(2, spec.window_frames, N_MELS)
    free = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(build(spec, weights), (example,), dynamic_shapes=free)
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={_SPEC_KEY: json.dumps(dataclasses.asdict(spec))})


def load_exported(path: Path) -> tuple[torch.nn.Module, ModelSpec]:
    """Load a program that ``torch.export.save`` wrote, FILE.pt2, and the shape of its windows.

    Load only a file that you trust: torch unpickles parts of it. The shape is that of the extra file plimsoll.spec, or
    the default one. Raises ModelError for a file that is no such program, or one of another shape.
    """
    extra = {_SPEC_KEY: ""}
    with _warnings_of_export() as reasons:
        try:
            program = torch.export.load(path, extra_files=extra)
            module = program.module()
        except Exception as error:
            # What torch raises at the end is often less than what it logged before.
            for each in (error, *reasons):
                if isinstance(each, OSError) or classify(each) is not ErrorKind.OTHER:
                    raise each from None
            reason = reasons[0] if reasons else error
            raise ModelError(
                f"{path} is not a program that torch {torch.__version__} loads ({type(reason).__name__}: "
                f"{str(reason)[:300]}): expected a file of torch.export.save, of this torch or one a little older"
            ) from error
    spec = _spec_in(extra[_SPEC_KEY], path)
    _check_inputs(program, spec, path)
    return module, dataclasses.replace(spec, vocabulary=_vocabulary(module, spec, path))


@contextlib.contextmanager
def _warnings_of_export() -> Iterator[list[BaseException]]:
    """Keep the errors that torch logs while it tries one format after another: nothing is logged meanwhile."""
    kept: list[BaseException] = []

    def keep(record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1]:
            kept.append(record.exc_info[1])
        return False

    logger = logging.getLogger("torch.export")
    logger.addFilter(keep)
    try:
        yield kept
    finally:
        logger.removeFilter(keep)


def _spec_in(text: str | bytes, path: Path) -> ModelSpec:
    if not text:
        return ModelSpec()
    try:
        return ModelSpec(**json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise ModelError(f"{path} has an unusable extra file {_SPEC_KEY}: {error}") from error


def _check_inputs(program: torch.export.ExportedProgram, spec: ModelSpec, path: Path) -> None:
    from torch.utils._sympy.numbers import int_oo

    names = set(program.graph_signature.user_inputs)
    taken = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    shape: tuple[Any, ...] = tuple(taken[0].shape) if len(taken) == 1 and isinstance(taken[0], torch.Tensor) else ()
    fits = len(shape) == 3 and taken[0].dtype == torch.float32 and list(shape[1:]) == [spec.window_frames, N_MELS]
    # A free dimension is no int, but a symbol without an upper bound.
    if not fits or isinstance(shape[0], int) or program.range_constraints[shape[0].node.expr].upper is not int_oo:
        found = ", ".join(f"{x.dtype} {list(x.shape)}" if isinstance(x, torch.Tensor) else repr(x) for x in taken)
        raise ModelError(
            f"{path} takes {found or 'nothing'}: expected one input, torch.float32 "
            f"[batch, {spec.window_frames}, {N_MELS}], exported with a batch that is free and has no upper bound "
            f"(a program says its windows in the extra file {_SPEC_KEY})"
        )


def _vocabulary(module: torch.nn.Module, spec: ModelSpec, path: Path) -> int:
    """Give the last dimension of the scores, as a run finds it. Raises ModelError."""
    rows = spec.window_frames // 2
    try:
        _, scores = _counted(module, spec, 1)
    except Exception as error:
        if classify(error) is not ErrorKind.OTHER:
            raise
        raise ModelError(f"{path} does not run: {type(error).__name__}: {str(error)[:300]}") from error
    if isinstance(scores, torch.Tensor):
        if scores.dtype == torch.float32 and scores.ndim == 3 and scores.shape[:2] == (1, rows):
            return scores.shape[2]
        found = f"{scores.dtype} {list(scores.shape)}"
    else:
        found = f"a {type(scores).__name__}"
    raise ModelError(f"{path} gives {found} for one window: expected torch.float32 [1, {rows}, vocabulary]")


def peak_bytes(module: torch.nn.Module, spec: ModelSpec, batch: int) -> int:
    """Run a batch of zeros, and count how many bytes it holds at its peak: its input and every tensor that it makes.

    Weights are not counted. It is a real run, where the module is: it needs that memory itself, and leaves none behind
    but in torch's cache. What a kernel takes for itself is not seen. On the CPU that is 3 % of this project's model at
    most, but nearly as much again for a convolution with channels first; on CUDA, what cuDNN and cuBLAS work in.
    Raises what the module raises, and ValueError for a batch of less than 1.
    """
    if batch < 1:
        raise ValueError(f"batch is {batch}: expected at least 1")
    return _counted(module, spec, batch)[0]


def _counted(module: torch.nn.Module, spec: ModelSpec, batch: int) -> tuple[int, Any]:
    """Run a batch of zeros; give how many bytes it held at its peak, and the output."""
    device = next((each.device for each in itertools.chain(module.parameters(), module.buffers())), None)
    # Under inference_mode, composite operations would be seen as one, without the tensors made inside.
    with torch.inference_mode(False), torch.no_grad(), _Peak() as peak:
        scores = module(torch.zeros(batch, spec.window_frames, N_MELS, device=device))
    return peak.highest_bytes, scores


class _Peak(TorchDispatchMode):
    """Count the storages that operations make, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.highest_bytes = self._held_bytes = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # To keep its compiler away from this class, torch would import it: a second, for nothing.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        # A view, or a change in place, makes no memory.
        if not any(each.alias_info for each in func._schema.returns):
            for each in tree_leaves(made):
                if isinstance(each, torch.Tensor):
                    self._count(each.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        size_bytes = storage.nbytes()
        self._held_bytes += size_bytes
        self.highest_bytes = max(self.highest_bytes, self._held_bytes)
        weakref.finalize(storage, self._freed, size_bytes)

    def _freed(self, size_bytes: int) -> None:
        self._held_bytes -= size_bytes
