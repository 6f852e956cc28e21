"""All that kconv uses of PyTorch beyond its public names, which may change with any release.

There with the same meaning in PyTorch 2.5 to 2.15, the versions of :mod:`kconv._versions`. For a
new release, look here first. (Only ``_sharding`` has one more, of ``torch.distributed``, which is
imported where the first DTensor comes along.)
"""

from torch._C import (
    _AutoDispatchBelowAutograd,
    _dispatch_keys,
    _from_dlpack,
    _get_tracing_state,
    _is_tracing,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
    _to_dlpack,
)
from torch._C._autograd import _profiler_enabled
from torch._C._functorch import is_legacy_batchedtensor, peek_interpreter_stack
from torch._functorch.autograd_function import (  # type: ignore[attr-defined]
    enable_single_level_autograd_function,
)
from torch._utils import _flatten_dense_tensors
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

__all__ = [
    "DeviceContext",
    "SingleLevelFunction",
    "below_autograd",
    "dispatch_keys",
    "dispatch_mode_stack",
    "enable_single_level_autograd_function",
    "flatten_dense_tensors",
    "from_dlpack",
    "function_mode_stack",
    "has_any_global_hook",
    "is_legacy_batchedtensor",
    "is_tracing",
    "len_dispatch_stack",
    "len_function_stack",
    "peek_interpreter_stack",
    "profiler_enabled",
    "set_fwd_grad_enabled",
    "to_dlpack",
    "tracing_state",
]

SingleLevelFunction = _SingleLevelFunction
"""An ``autograd.Function`` of one level: without the transforms of ``torch.func``."""
below_autograd = _AutoDispatchBelowAutograd
dispatch_keys = _dispatch_keys
dispatch_mode_stack = _get_current_dispatch_mode_stack
flatten_dense_tensors = _flatten_dense_tensors
function_mode_stack = _get_current_function_mode_stack
has_any_global_hook = _has_any_global_hook
is_tracing = _is_tracing
"""Whether ``torch.jit`` traces."""
len_dispatch_stack = _len_torch_dispatch_stack
len_function_stack = _len_torch_function_stack
profiler_enabled = _profiler_enabled
set_fwd_grad_enabled = _set_fwd_grad_enabled
tracing_state = _get_tracing_state
from_dlpack, to_dlpack = _from_dlpack, _to_dlpack
"""Without the checks of ``torch.utils.dlpack``: 2 us less a call."""
