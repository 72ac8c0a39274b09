"""Whatever of the targets on this machine is measured to run the result fastest."""

from __future__ import annotations

from fxsparse.backend.inductor import Inductor


class Auto(Inductor):
    """Inductor, eager and, where it is installed, ONNX Runtime, whose kernels for small layers are faster on some CPUs.

    Without measuring, Inductor. On a GPU eager in channels_last can be the fastest, and ONNX Runtime does not run.
    """

    name = "auto"
    runners = ("inductor", "onnx", "eager")
