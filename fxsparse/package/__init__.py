"""A compiled model in one file that is data alone: tensors, and JSON that names operators. See docs/saving.md."""

from fxsparse.package.saved import Saved, read, write

__all__ = ["Saved", "read", "write"]
