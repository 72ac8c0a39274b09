"""Running an ONNX model in ONNX Runtime, tensors in and tensors out."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fxsparse.deploy.onnx_model import SINGLE_FILE_BYTES, OnnxModel, save
from fxsparse.deploy.standard import filled
from fxsparse.errors import InputError, TargetError, first_line


class OnnxSession:
    """Flattened inputs -> flattened outputs, on the CPU with as many threads as torch has now.

    Threads do not spin while they wait: torch's own, or another session's, may need the cores in the next moment.
    Raises TargetError for a model that ONNX Runtime has no kernels for (bfloat16).
    """

    def __init__(self, model: OnnxModel) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        try:
            self.session = _load(model, options)
        except Exception as error:  # noqa: BLE001 - whatever the runtime raises
            raise _refused(error) from None
        self.outputs = model.graph.outputs  # not the graph, which holds weights that the session has of its own
        self.names = [i.name for i in self.session.get_inputs()]
        self.taken = _taken(model, self.names)

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        """All flattened inputs of the graph in; its flattened outputs, in memory of their own."""
        feed = {name: inputs[i].detach().cpu().contiguous().numpy() for name, i in self.taken}
        try:
            outputs = self.session.run(None, feed)
        except Exception as error:  # noqa: BLE001 - whatever the runtime raises
            raise _failed(error) from None
        return filled(self.outputs, [torch.from_numpy(y) for y in outputs])

    def __deepcopy__(self, memo: object) -> OnnxSession:
        """Itself: it holds no state, and its runs may overlap."""
        return self


def _taken(model: OnnxModel, names: Sequence[str]) -> list[tuple[str, int]]:
    """Which flattened input each of the session's is; an input that nothing reads may be gone."""
    placeholders = [i.name for i in model.proto.graph.input]
    numbers = dict(zip(placeholders, model.graph.inputs, strict=True))
    return [(name, numbers[name]) for name in names]


def _load(model: OnnxModel, options: Any) -> Any:
    """From memory; through a file where protobuf ends."""
    import onnxruntime

    providers = ["CPUExecutionProvider"]
    if model.bytes < SINGLE_FILE_BYTES:
        return onnxruntime.InferenceSession(model.proto.SerializeToString(), options, providers=providers)
    with tempfile.TemporaryDirectory() as folder:
        path = save(model, Path(folder) / "model.onnx")[0]
        return onnxruntime.InferenceSession(str(path), options, providers=providers)


def _failed(error: Exception) -> InputError:
    return InputError("inputs of a model in ONNX Runtime", expected="values that every operator takes",
                      got=first_line(error),
                      do="Is an index beyond its table? target='eager' runs the same graph in PyTorch.")  # fmt: skip


def _refused(error: Exception) -> TargetError:
    return TargetError(
        "target 'onnx'",
        expected="operators that ONNX Runtime's CPU kernels compute",
        got=first_line(error),
        do="Use float32 or float16; for the file alone: fxsparse.export_onnx(sparse, path, verify=False).",
    )
