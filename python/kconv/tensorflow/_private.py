"""All that kconv uses of TensorFlow beyond its public names, which may change with any release.

There with the same meaning in TensorFlow 2.16 to 2.21, the versions of :mod:`kconv._versions`. For
a new release, look here first.
"""

from tensorflow.core.framework.op_def_pb2 import OpList
from tensorflow.python.framework._pywrap_python_op_gen import GetPythonWrappers
from tensorflow.python.framework.op_def_registry import get as op_definition
from tensorflow.python.framework.ops import get_default_graph
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

__all__ = ["OpList", "in_xla_context", "op_definition", "python_wrappers"]

python_wrappers = GetPythonWrappers
"""The source of Python functions that call operations, from their definitions."""


def in_xla_context() -> bool:
    """Whether the graph that is made now is compiled by XLA."""
    return bool(GraphOrParentsInXlaContext(get_default_graph()))
