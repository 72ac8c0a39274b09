"""`torch.compile(model, backend="fxsparse", options={"masks": masks})`: the compiler as a back end of TorchDynamo.

Dynamo hands over one graph at a time, weights among its inputs. The graph is traced again into the compiler's dialect
(`ir.retrace`), its weights become constants, and from there `compiler.build` does what it does for `compile`: the same
passes, contest and verification. Weights are told by identity and looked at before every call: when one has changed (an
optimizer step, load_state_dict), the graph is built again. A graph this compiler is not for stays dense, on Inductor,
and the logger "fxsparse" says why.
"""

from fxsparse.dynamo.backend import backend

__all__ = ["backend"]
