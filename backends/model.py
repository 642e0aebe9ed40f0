"""The acoustic model, once: its shape, its weights from a seed, and its lowering to ONNX.

A small speech encoder: a window of log-mel frames in, token scores out. It keeps no state between calls; what it
needs of the past is a fixed left context inside the window, so a window computed again gives the same scores.

    python -m backends.model OUT.onnx [--seed N] [--channels N] [--width N] [--layers N]

Writing a file needs the ``onnx`` package; the default file, ``backends/data/acoustic.onnx``, is committed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Sequence

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
        for name in ("channels", "width", "heads", "layers", "vocabulary"):
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


def weights(spec: ModelSpec) -> dict[str, npt.NDArray[np.float32]]:
    """Make every weight of the model from ``spec.seed``: name -> float32 array.

    ``RandomState`` and not ``default_rng``: NumPy freezes only the former's stream across versions (NEP 19).
    """
    random = np.random.RandomState(spec.seed)

    def normal(*shape: int, fan_in: int) -> npt.NDArray[np.float32]:
        made: npt.NDArray[np.float32] = (random.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)
        return made

    c, d = spec.channels, spec.width
    made: dict[str, npt.NDArray[np.float32]] = {
        "conv1.weight": normal(c, 1, 3, 3, fan_in=9),
        "conv1.bias": normal(c, fan_in=c),
        "conv2.weight": normal(c, c, 3, 3, fan_in=9 * c),
        "conv2.bias": normal(c, fan_in=c),
        "project.weight": normal(c * N_MELS // 2, d, fan_in=c * N_MELS // 2),
        "project.bias": normal(d, fan_in=d),
        "position": normal(spec.window_frames // 2, d, fan_in=d),
    }
    for i in range(spec.layers):
        made |= {
            f"layer{i}.norm1.scale": np.ones(d, np.float32),
            f"layer{i}.norm1.bias": np.zeros(d, np.float32),
            f"layer{i}.query": normal(d, d, fan_in=d),
            f"layer{i}.key": normal(d, d, fan_in=d),
            f"layer{i}.value": normal(d, d, fan_in=d),
            f"layer{i}.out": normal(d, d, fan_in=d),
            f"layer{i}.norm2.scale": np.ones(d, np.float32),
            f"layer{i}.norm2.bias": np.zeros(d, np.float32),
            f"layer{i}.up.weight": normal(d, 4 * d, fan_in=d),
            f"layer{i}.up.bias": normal(4 * d, fan_in=4 * d),
            f"layer{i}.down.weight": normal(4 * d, d, fan_in=4 * d),
            f"layer{i}.down.bias": normal(d, fan_in=d),
        }
    made |= {
        "norm.scale": np.ones(d, np.float32),
        "norm.bias": np.zeros(d, np.float32),
        "head.weight": normal(d, spec.vocabulary, fan_in=d),
        "head.bias": normal(spec.vocabulary, fan_in=spec.vocabulary),
    }
    return made


def to_onnx(spec: ModelSpec) -> Any:
    """Lower the model to an ``onnx.ModelProto`` (opset 17). Raises ImportError without the ``onnx`` package."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    graph_nodes: list[Any] = []
    constants = dict[str, npt.NDArray[Any]](weights(spec))

    def node(op: str, *inputs: str, out: str, **attributes: Any) -> str:
        graph_nodes.append(helper.make_node(op, list(inputs), [out], name=out, **attributes))
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

    model = helper.make_model(
        helper.make_graph(
            graph_nodes,
            "plimsoll-acoustic",
            [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", spec.window_frames, N_MELS])],
            [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", steps, spec.vocabulary])],
            [numpy_helper.from_array(array, name) for name, array in constants.items()],
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


#: What is written beside the acoustic model: option, file, and how it is made.
SMALL_MODELS: dict[str, tuple[Path, Callable[[], Any], str]] = {
    "block": (BLOCK_MODEL, block_to_onnx, "the block maker that allocations are made with"),
    "probe": (PROBE_MODEL, probe_to_onnx, "the health probe"),
    "crash": (CRASH_MODEL, crash_to_onnx, "the division that the runtime dies of"),
    "hang": (HANG_MODEL, hang_to_onnx, "the loop that the runtime never leaves"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Write an acoustic model (or, with an option such as ``--block``, one of the small ones) as an ONNX file."""
    default = ModelSpec()
    parser = argparse.ArgumentParser(prog="python -m backends.model", description=main.__doc__)
    parser.add_argument("out", type=Path, help="the ONNX file to write")
    for name, (_, _, text) in SMALL_MODELS.items():
        parser.add_argument(f"--{name}", dest="small", action="store_const", const=name, help=f"write {text}")
    for field in dataclasses.fields(ModelSpec):
        option = "--" + field.name.replace("_", "-")
        parser.add_argument(option, type=int, default=getattr(default, field.name), metavar="N")
    options = parser.parse_args(argv)
    try:
        spec = ModelSpec(**{field.name: getattr(options, field.name) for field in dataclasses.fields(ModelSpec)})
        model = SMALL_MODELS[options.small][1]() if options.small else to_onnx(spec)
        options.out.write_bytes(model.SerializeToString(deterministic=True))
    except ImportError as error:
        parser.error(f"writing a model needs the onnx package ({error}): pip install onnx")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{options.out}: {options.out.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
