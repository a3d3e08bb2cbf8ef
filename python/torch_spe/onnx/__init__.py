"""Export to ONNX, with the operator LinearAttention of opset 27; see docs/onnx.md.

Needs the packages of ``pip install ".[onnx]"``, in the source tree.
"""

try:
    import onnxscript as _onnxscript  # noqa: F401
except ImportError as error:
    raise ImportError(
        "torch_spe.onnx needs the packages onnx and onnxscript: pip install 'onnx>=1.23' onnxscript"
    ) from error

from torch_spe.onnx.exporting import export
from torch_spe.onnx.finish import set_opset
from torch_spe.onnx.folding import fold_constants
from torch_spe.onnx.nodes import UnsupportedError
from torch_spe.onnx.states import MemoryState
from torch_spe.onnx.table import translation_table

__all__ = [
    "MemoryState",
    "UnsupportedError",
    "export",
    "fold_constants",
    "set_opset",
    "translation_table",
]
