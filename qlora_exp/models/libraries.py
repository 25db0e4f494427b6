"""bitsandbytes, imported without TorchInductor.

At import it wraps kernels in ``torch.compile``, which brings in TorchInductor: a fifth of all that a training imports.
The wrapped kernels are those for devices that have none of their own; CPU and CUDA have, and never call them.
"""

import os

_variable = "TORCHDYNAMO_DISABLE"
_before = os.environ.get(_variable)
os.environ[_variable] = "1"
import bitsandbytes as bitsandbytes  # noqa: E402

if _before is None:
    del os.environ[_variable]
else:
    os.environ[_variable] = _before
