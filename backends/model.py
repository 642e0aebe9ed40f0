"""The acoustic model, once: its shape, its weights from a seed, its lowering to ONNX, and what it has to compute.

A small speech encoder: a window of log-mel frames in, token scores out. It keeps no state between calls; what it
needs of the past is a fixed left context inside the window, so a window computed again gives the same scores.

    python -m backends.model OUT.onnx [--seed N] [--channels N] [--width N] [--layers N]
    python -m backends.model OUT.pt2 [...]

Writing an ONNX file needs the ``onnx`` package, writing a torch program ``torch``. Reading one of these ONNX files
needs neither. The default file, ``backends/data/acoustic.onnx``, is committed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from backends.contract import FloatArray, ModelError

Weights = dict[str, FloatArray]

DATA = Path(__file__).parent / "data"
DEFAULT_MODEL = DATA / "acoustic.onnx"
BLOCK_MODEL = DATA / "block.onnx"
PROBE_MODEL = DATA / "probe.onnx"
CRASH_MODEL = DATA / "crash.onnx"
HANG_MODEL = DATA / "hang.onnx"

#: The audio that the model was made for.
SAMPLE_RATE_HZ = 16_000
#: One log-mel frame every 10 ms ...
HOP_SAMPLES = 160
#: ... made from the 25 ms that end with it.
FRAME_SAMPLES = 400
N_MELS = 80

_GRAPH_NAME = "plimsoll-acoustic"
#: What ONNX adds to a variance, where a node does not say otherwise.
NORM_EPSILON = 1e-5


@dataclass(frozen=True)
class ModelSpec:
    """The shape of an acoustic model.

    Input ``features``: float32 [batch, context_frames + chunk_frames, 80], natural log of mel energies.
    Output ``scores``: float32 [batch, (context_frames + chunk_frames) / 2, vocabulary], unnormalised.
    """

    seed: int = 20_261
    context_frames: int = 50
    chunk_frames: int = 100
    channels: int = 32
    width: int = 128
    heads: int = 4
    layers: int = 3
    vocabulary: int = 32

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{field.name} is {value!r}: expected a whole number of at least 0")
        if self.context_frames % 2 or self.chunk_frames % 2 or self.chunk_frames == 0:
            raise ValueError(
                f"context_frames {self.context_frames} and chunk_frames {self.chunk_frames}: expected even numbers "
                "(the model halves the frame rate), and at least one chunk frame pair"
            )
        for name in ("channels", "width", "heads", "vocabulary"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least 1")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")

    @property
    def window_frames(self) -> int:
        """Frames in one input window: left context, then the chunk."""
        return self.context_frames + self.chunk_frames

    @property
    def chunk_samples(self) -> int:
        """Audio samples that one chunk answers for."""
        return self.chunk_frames * HOP_SAMPLES

    @property
    def context_samples(self) -> int:
        """Audio samples before a chunk that its window needs (the first frame looks back 15 ms further)."""
        return self.context_frames * HOP_SAMPLES + FRAME_SAMPLES - HOP_SAMPLES

    @property
    def chunk_scores(self) -> int:
        """Score rows that belong to the chunk, the last ones of the output."""
        return self.chunk_frames // 2


def _weights_of(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """Name every weight in the order in which they are made: name, shape, and how many inputs one sum of it has.

    0 inputs: it is not random, but the ones and zeros of a normalisation.
    """
    c, d = spec.channels, spec.width
    flat = c * N_MELS // 2
    yield "conv1.weight", (c, 1, 3, 3), 9
    yield "conv1.bias", (c,), c
    yield "conv2.weight", (c, c, 3, 3), 9 * c
    yield "conv2.bias", (c,), c
    yield "project.weight", (flat, d), flat
    yield "project.bias", (d,), d
    yield "position", (spec.window_frames // 2, d), d
    for i in range(spec.layers):
        yield f"layer{i}.norm1.scale", (d,), 0
        yield f"layer{i}.norm1.bias", (d,), 0
        yield f"layer{i}.query", (d, d), d
        yield f"layer{i}.key", (d, d), d
        yield f"layer{i}.value", (d, d), d
        yield f"layer{i}.out", (d, d), d
        yield f"layer{i}.norm2.scale", (d,), 0
        yield f"layer{i}.norm2.bias", (d,), 0
        yield f"layer{i}.up.weight", (d, 4 * d), d
        yield f"layer{i}.up.bias", (4 * d,), 4 * d
        yield f"layer{i}.down.weight", (4 * d, d), 4 * d
        yield f"layer{i}.down.bias", (d,), d
    yield "norm.scale", (d,), 0
    yield "norm.bias", (d,), 0
    yield "head.weight", (d, spec.vocabulary), d
    yield "head.bias", (spec.vocabulary,), spec.vocabulary


def weights(spec: ModelSpec) -> Weights:
    """Make every weight of the model from ``spec.seed``: name -> float32 array.

    ``RandomState`` and not ``default_rng``: NumPy freezes only the former's stream across versions (NEP 19).
    """
    random = np.random.RandomState(spec.seed)
    made: Weights = {}
    for name, shape, fan_in in _weights_of(spec):
        if fan_in:
            made[name] = (random.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)
        else:
            made[name] = np.full(shape, name.endswith("scale"), np.float32)
    return made


class _Node(NamedTuple):
    """One operation of the graph. ``output`` is its name too."""

    op: str
    inputs: tuple[str, ...]
    output: str
    attributes: dict[str, Any]


def _graph(spec: ModelSpec) -> tuple[list[_Node], dict[str, npt.NDArray[Any]]]:
    """Describe the graph: its operations in order, and its constants besides the weights."""
    nodes: list[_Node] = []
    constants: dict[str, npt.NDArray[Any]] = {}

    def node(op: str, *inputs: str, out: str, **attributes: int | list[int]) -> str:
        nodes.append(_Node(op, inputs, out, attributes))
        return out

    def shape(name: str, *dims: int) -> str:
        constants[name] = np.array(dims, np.int64)
        return name

    d, heads, steps = spec.width, spec.heads, spec.window_frames // 2
    constants["attention.scale"] = np.array(1.0 / np.sqrt(d // heads), np.float32)
    # A dimension of 0 in a Reshape copies the input's: the batch stays free.
    image = node("Reshape", "features", shape("shape.image", 0, 1, spec.window_frames, N_MELS), out="image")
    x = node("Conv", image, "conv1.weight", "conv1.bias", out="conv1", pads=[1, 1, 1, 1])
    x = node("Relu", x, out="conv1.relu")
    x = node("Conv", x, "conv2.weight", "conv2.bias", out="conv2", pads=[1, 1, 1, 1], strides=[2, 2])
    x = node("Relu", x, out="conv2.relu")
    x = node("Transpose", x, out="by_step", perm=[0, 2, 1, 3])
    x = node("Reshape", x, shape("shape.steps", 0, steps, spec.channels * N_MELS // 2), out="steps")
    x = node("MatMul", x, "project.weight", out="projected")
    x = node("Add", x, "project.bias", out="projected.bias")
    x = node("Add", x, "position", out="embedded")

    def split_heads(source: str, weight: str, name: str, perm: list[int]) -> str:
        y = node("MatMul", source, weight, out=f"{name}.flat")
        y = node("Reshape", y, shape(f"{name}.shape", 0, steps, heads, d // heads), out=f"{name}.split")
        return node("Transpose", y, out=name, perm=perm)

    for i in range(spec.layers):
        layer = f"layer{i}"
        y = node("LayerNormalization", x, f"{layer}.norm1.scale", f"{layer}.norm1.bias", out=f"{layer}.norm1")
        query = split_heads(y, f"{layer}.query", f"{layer}.q", [0, 2, 1, 3])
        key = split_heads(y, f"{layer}.key", f"{layer}.k", [0, 2, 3, 1])
        value = split_heads(y, f"{layer}.value", f"{layer}.v", [0, 2, 1, 3])
        y = node("MatMul", query, key, out=f"{layer}.qk")
        y = node("Mul", y, "attention.scale", out=f"{layer}.qk.scaled")
        y = node("Softmax", y, out=f"{layer}.attention", axis=-1)
        y = node("MatMul", y, value, out=f"{layer}.mixed")
        y = node("Transpose", y, out=f"{layer}.mixed.by_step", perm=[0, 2, 1, 3])
        y = node("Reshape", y, shape(f"{layer}.merge", 0, steps, d), out=f"{layer}.merged")
        y = node("MatMul", y, f"{layer}.out", out=f"{layer}.attended")
        x = node("Add", x, y, out=f"{layer}.residual1")
        y = node("LayerNormalization", x, f"{layer}.norm2.scale", f"{layer}.norm2.bias", out=f"{layer}.norm2")
        y = node("MatMul", y, f"{layer}.up.weight", out=f"{layer}.up")
        y = node("Add", y, f"{layer}.up.bias", out=f"{layer}.up.biased")
        y = node("Relu", y, out=f"{layer}.relu")
        y = node("MatMul", y, f"{layer}.down.weight", out=f"{layer}.down")
        y = node("Add", y, f"{layer}.down.bias", out=f"{layer}.down.biased")
        x = node("Add", x, y, out=f"{layer}.residual2")

    x = node("LayerNormalization", x, "norm.scale", "norm.bias", out="norm")
    x = node("MatMul", x, "head.weight", out="head")
    node("Add", x, "head.bias", out="scores")
    return nodes, constants


def to_onnx(spec: ModelSpec) -> Any:
    """Lower the model to an ``onnx.ModelProto`` (opset 17). Raises ImportError without the ``onnx`` package."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes, constants = _graph(spec)
    steps = spec.window_frames // 2
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node(op, inputs, [out], name=out, **attributes) for op, inputs, out, attributes in nodes],
            _GRAPH_NAME,
            [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", spec.window_frames, N_MELS])],
            [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", steps, spec.vocabulary])],
            [numpy_helper.from_array(array, name) for name, array in {**weights(spec), **constants}.items()],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=9,
        producer_name="plimsoll",
    )
    helper.set_model_props(model, {"plimsoll.spec": json.dumps(dataclasses.asdict(spec))})
    onnx.checker.check_model(model, full_check=True)
    return model


def _small(name: str, nodes: list[Any], inputs: list[Any], outputs: list[Any]) -> Any:
    from onnx import helper

    graph = helper.make_graph(nodes, name, inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9, producer_name="plimsoll")


def block_to_onnx() -> Any:
    """Lower the block maker to ONNX: ``shape`` int64 [1] in, ``block`` float32 [shape] of ones out.

    With its output bound to the runtime's own allocator it is a real allocation on the device, every page touched.
    """
    from onnx import TensorProto, helper

    one = helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])
    return _small(
        "plimsoll-block",
        [helper.make_node("ConstantOfShape", ["shape"], ["block"], value=one)],
        [helper.make_tensor_value_info("shape", TensorProto.INT64, [1])],
        [helper.make_tensor_value_info("block", TensorProto.FLOAT, ["elements"])],
    )


def probe_to_onnx() -> Any:
    """Lower the health probe to ONNX: ``x`` float32 [n, n] in, ``y = x @ x`` float32 [n, n] out."""
    from onnx import TensorProto, helper

    return _small(
        "plimsoll-probe",
        [helper.make_node("MatMul", ["x", "x"], ["y"])],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", "n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "n"])],
    )


def crash_to_onnx() -> Any:
    """Lower a division to ONNX: ``a``, ``b`` int32 [1] in, ``y = a / b`` out.

    The smallest integer over −1 has no quotient: on x86 the runtime's own kernel dies of SIGFPE. (Division by zero is
    refused with an error.)
    """
    from onnx import TensorProto, helper

    one = [1]
    return _small(
        "plimsoll-crash",
        [helper.make_node("Div", ["a", "b"], ["y"])],
        [helper.make_tensor_value_info(name, TensorProto.INT32, one) for name in ("a", "b")],
        [helper.make_tensor_value_info("y", TensorProto.INT32, one)],
    )


def hang_to_onnx() -> Any:
    """Lower an endless loop to ONNX: ``go`` bool [], ``x`` float32 [1] in; while ``go`` is true nothing comes out."""
    from onnx import TensorProto, helper

    one = [1]
    body = helper.make_graph(
        [helper.make_node("Identity", ["go_in"], ["go_out"]), helper.make_node("Add", ["v_in", "v_in"], ["v_out"])],
        "plimsoll-hang-body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_in", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v_in", TensorProto.FLOAT, one),
        ],
        [
            helper.make_tensor_value_info("go_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v_out", TensorProto.FLOAT, one),
        ],
    )
    return _small(
        "plimsoll-hang",
        [helper.make_node("Loop", ["", "go", "x"], ["y"], body=body)],
        [
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, one),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, one)],
    )


# The way back: an acoustic model's file, read without the ``onnx`` package.


class _Damaged(ValueError):
    """The bytes are not those of a whole ONNX file."""


class _Other(ValueError):
    """It may be a good ONNX file, but it is not one of this project's acoustic models."""


def read_onnx(path: Path) -> tuple[ModelSpec, Weights]:
    """Read the shape and the float32 weights of an acoustic model from its ONNX file, for a runtime that reads none.

    Taken is only a graph that is node for node what ``to_onnx`` makes of its shape: whoever computes this model with
    these weights computes what the file says. Raises ModelError for any other file, OSError if it cannot be read.
    """
    try:
        model = _Message(memoryview(path.read_bytes()))
        spec = _spec_in(model)
        return spec, _weights_in(model.only(7, "graph"), spec)
    except _Damaged as error:
        raise ModelError(
            f"{path} is not a whole ONNX file ({error}): expected one that `python -m backends.model OUT.onnx` writes"
        ) from error
    except _Other as error:
        raise ModelError(
            f"{path} is not an acoustic model of this project ({error}): torch runs those, and exported programs "
            "(FILE.pt2, see torch.export); for another ONNX file, choose a backend of ONNX Runtime"
        ) from error


def _spec_in(model: _Message) -> ModelSpec:
    model.only(7, "graph")
    properties = {each.text(1): each.text(2) for each in model.messages(14)}
    if "plimsoll.spec" not in properties:
        raise _Other("its metadata have no key plimsoll.spec")
    try:
        return ModelSpec(**json.loads(properties["plimsoll.spec"]))
    except (ValueError, TypeError, RecursionError) as error:
        raise _Other(f"its metadata plimsoll.spec are unusable: {error}") from error


def _weights_in(graph: _Message, spec: ModelSpec) -> Weights:
    """Take the weights of a graph. What the shape demands is counted as it is found: a false one demands no memory."""
    tensors = {each.text(8): each for each in graph.messages(5)}
    made = {name: _array(tensors, name, np.dtype("<f4"), shape) for name, shape, _ in _weights_of(spec)}
    nodes, constants = _graph(spec)
    for name, expected in constants.items():
        if not np.array_equal(_array(tensors, name, expected.dtype, expected.shape), expected):
            raise _Other(f"its constant {name} is another")
    if extra := sorted(tensors.keys() - made.keys() - constants.keys()):
        raise _Other(f"it has a constant {extra[0]}")
    taken, given = ([each.text(1) for each in graph.messages(number)] for number in (11, 12))
    if (taken, given) != (["features"], ["scores"]):
        raise _Other(f"it takes {taken} and gives {given}, expected features and scores")
    found = [_node_in(each) for each in graph.messages(1)]
    if found != nodes:
        at = next((i for i, pair in enumerate(zip(found, nodes, strict=False)) if pair[0] != pair[1]), len(nodes))
        raise _Other(
            f"its node {at} of {len(found)} is {found[at].op if at < len(found) else 'missing'}, or is used differently"
        )
    return made


def _array(tensors: dict[str, _Message], name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Copy a tensor out of the file, if it is of this type and shape."""
    tensor = tensors.get(name)
    if tensor is None:
        raise _Other(f"it has no weight {name}")
    if tensor.messages(13) or any(tensor.numbers(14)):
        raise _Other(f"its weight {name} is in another file")
    found, raw = tuple(tensor.numbers(1)), b"".join(tensor.pieces(9))
    if found != shape or tensor.numbers(2) != [{"f": 1, "i": 7}[dtype.kind]]:
        raise _Other(
            f"its weight {name} has shape {list(found)} and type {tensor.numbers(2)}, expected {dtype} {list(shape)}"
        )
    if len(raw) != dtype.itemsize * math.prod(shape):
        raise _Damaged(f"{name} of shape {list(shape)} has {len(raw)} bytes")
    made: npt.NDArray[Any] = np.frombuffer(raw, dtype).reshape(shape).copy()
    return made


def _node_in(node: _Message) -> _Node:
    """Read a node. An operator of another domain, or an attribute of a type that ours have not, equals none of ours."""
    attributes: dict[str, Any] = {}
    for each in node.messages(5):
        kind, one = each.numbers(20), each.numbers(3)
        attributes[each.text(1)] = each.numbers(8) if kind == [7] else one[0] if kind == [2] and one else None
    domain = node.text(7)
    op = f"{domain}.{node.text(4)}" if domain else node.text(4)
    return _Node(op, tuple(str(each, "utf-8", "replace") for each in node.pieces(1)), node.text(2), attributes)


class _Message:
    """A message in protobuf's wire format: its fields by number, as ``onnx.proto`` numbers them.

    A field of another wire type than asked for counts as absent, which is protobuf's own rule. Raises _Damaged.
    """

    def __init__(self, data: memoryview) -> None:
        self._fields: dict[int, list[int | memoryview]] = {}
        at = 0
        while at < len(data):
            key, at = _varint(data, at)
            value: int | memoryview
            if key & 7 == 0:
                value, at = _varint(data, at)
            else:
                size = {1: 8, 5: 4}.get(key & 7)
                if key & 7 == 2:
                    size, at = _varint(data, at)
                if size is None:
                    raise _Damaged(f"byte {at} begins no field")
                if size > len(data) - at:
                    raise _Damaged(f"{size} bytes are to follow, and {len(data) - at} do")
                value, at = data[at : at + size], at + size
            self._fields.setdefault(key >> 3, []).append(value)

    def pieces(self, number: int) -> list[memoryview]:
        """Give the values of a field that holds bytes."""
        return [each for each in self._fields.get(number, ()) if isinstance(each, memoryview)]

    def messages(self, number: int) -> list[_Message]:
        """Give the values of a field that holds messages."""
        return [_Message(each) for each in self.pieces(number)]

    def only(self, number: int, name: str) -> _Message:
        """Give the one message of a field that has to be there."""
        found = self.messages(number)
        if len(found) != 1:
            raise _Damaged(f"it has {len(found)} fields {name}")
        return found[0]

    def text(self, number: int) -> str:
        """Give the last value of a field that holds text; empty where there is none."""
        found = self.pieces(number)
        return str(found[-1], "utf-8", "replace") if found else ""

    def numbers(self, number: int) -> list[int]:
        """Give the values of a field that holds int64 values, packed into bytes or not."""
        found: list[int] = []
        for each in self._fields.get(number, ()):
            at = 0
            while isinstance(each, memoryview) and at < len(each):
                value, at = _varint(each, at)
                found.append(value)
            if isinstance(each, int):
                found.append(each)
        return [each - (1 << 64) if each >> 63 else each for each in found]


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """Read a number of 64 bits, seven to a byte, from there on; give it and where it ends."""
    value = 0
    for i, byte in enumerate(data[at : at + 10]):
        value |= (byte & 127) << (7 * i)
        if byte < 128:
            return value & (1 << 64) - 1, at + i + 1
    raise _Damaged(f"the number at byte {at} does not end")


def reference(
    spec: ModelSpec, weights: Mapping[str, npt.NDArray[Any]], features: npt.NDArray[Any]
) -> npt.NDArray[np.float64]:
    """Compute the model in double precision: [batch, window_frames, 80] to [batch, window_frames / 2, vocabulary].

    Written apart from the graph and with NumPy alone: what every runtime's scores are compared with.
    """
    if len(features) > 8:
        # The patches that a convolution sums are nine images of double precision: 7 MB for a window.
        parts = (features[at : at + 8] for at in range(0, len(features), 8))
        return np.concatenate([reference(spec, weights, part) for part in parts])
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    batch, steps = len(features), spec.window_frames // 2

    def conv(x: npt.NDArray[Any], name: str, stride: int) -> npt.NDArray[Any]:
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        patches = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))[:, :, ::stride, ::stride]
        summed = np.tensordot(patches, w[f"{name}.weight"], axes=((1, 4, 5), (1, 2, 3))) + w[f"{name}.bias"]
        return np.maximum(summed, 0.0).transpose(0, 3, 1, 2)

    def norm(x: npt.NDArray[Any], name: str) -> npt.NDArray[Any]:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + NORM_EPSILON)
        return np.asarray(scaled * w[f"{name}.scale"] + w[f"{name}.bias"])

    def heads(x: npt.NDArray[Any], name: str) -> npt.NDArray[Any]:
        return (x @ w[name]).reshape(batch, steps, spec.heads, -1).transpose(0, 2, 1, 3)

    x = conv(conv(features.astype(np.float64)[:, None], "conv1", 1), "conv2", 2)
    x = x.transpose(0, 2, 1, 3).reshape(batch, steps, -1)
    x = x @ w["project.weight"] + w["project.bias"] + w["position"]
    for i in range(spec.layers):
        layer = f"layer{i}"
        y = norm(x, f"{layer}.norm1")
        query, key, value = (heads(y, f"{layer}.{name}") for name in ("query", "key", "value"))
        logits = query @ key.transpose(0, 1, 3, 2) / np.sqrt(spec.width // spec.heads)
        share = np.exp(logits - logits.max(-1, keepdims=True))
        mixed = share / share.sum(-1, keepdims=True) @ value
        x = x + mixed.transpose(0, 2, 1, 3).reshape(batch, steps, -1) @ w[f"{layer}.out"]
        y = norm(x, f"{layer}.norm2") @ w[f"{layer}.up.weight"] + w[f"{layer}.up.bias"]
        x = x + np.maximum(y, 0.0) @ w[f"{layer}.down.weight"] + w[f"{layer}.down.bias"]
    scores: npt.NDArray[np.float64] = norm(x, "norm") @ w["head.weight"] + w["head.bias"]
    return scores


#: What is written beside the acoustic model: option, file, and how it is made.
SMALL_MODELS: dict[str, tuple[Path, Callable[[], Any], str]] = {
    "block": (BLOCK_MODEL, block_to_onnx, "the block maker that allocations are made with"),
    "probe": (PROBE_MODEL, probe_to_onnx, "the health probe"),
    "crash": (CRASH_MODEL, crash_to_onnx, "the division that the runtime dies of"),
    "hang": (HANG_MODEL, hang_to_onnx, "the loop that the runtime never leaves"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Write an acoustic model as an ONNX file, or as a torch program where OUT ends in .pt2.

    With an option such as ``--block``: one of the small ONNX files.
    """
    default = ModelSpec()
    parser = argparse.ArgumentParser(prog="python -m backends.model", description=main.__doc__)
    parser.add_argument("out", type=Path, help="the file to write: OUT.onnx or OUT.pt2")
    for name, (_, _, text) in SMALL_MODELS.items():
        parser.add_argument(f"--{name}", dest="small", action="store_const", const=name, help=f"write {text}")
    for field in dataclasses.fields(ModelSpec):
        option = "--" + field.name.replace("_", "-")
        parser.add_argument(option, type=int, default=getattr(default, field.name), metavar="N")
    options = parser.parse_args(argv)
    for_torch = options.out.suffix == ".pt2"
    if for_torch and options.small:
        parser.error(f"--{options.small} writes an ONNX file: expected OUT.onnx, not {options.out}")
    try:
        spec = ModelSpec(**{field.name: getattr(options, field.name) for field in dataclasses.fields(ModelSpec)})
        if for_torch:
            from backends import _torch_model

            _torch_model.export(spec, weights(spec), options.out)
        else:
            model = SMALL_MODELS[options.small][1]() if options.small else to_onnx(spec)
            options.out.write_bytes(model.SerializeToString(deterministic=True))
    except ImportError as error:
        package = "torch" if for_torch else "onnx"
        parser.error(f"writing {options.out.name} needs the {package} package ({error}): pip install {package}")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{options.out}: {options.out.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
