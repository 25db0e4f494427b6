"""bitsandbytes, imported without TorchInductor.

On import it wraps kernels in ``torch.compile``, which imports TorchInductor: a fifth of all imports of a training. The
wrapped kernels serve devices without their own kernels. CPU and CUDA have their own, and never call them.
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
