"""Whatever of the targets on this machine is measured to run the result fastest."""

from __future__ import annotations

from fxsparse.backend.inductor import Inductor


class Auto(Inductor):
    """Inductor; on a CPU ONNX Runtime, where it is installed, and on a GPU eager.

    ONNX Runtime's kernels for small layers are faster on some CPUs; eager in channels_last can be the fastest on a GPU.
    Without measuring, Inductor.
    """

    name = "auto"
    runners = ("inductor", "onnx", "eager")
