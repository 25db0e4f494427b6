"""``python -m tests.program CODE ARGUMENTS``: as ``python -c CODE ARGUMENTS``, for :mod:`tests.processes`."""

import sys
import types

_code = sys.argv[1]
sys.argv = ["-c", *sys.argv[2:]]
sys.path[0] = ""
sys.modules["__main__"] = types.ModuleType("__main__")
exec(compile(_code, "<string>", "exec"), vars(sys.modules["__main__"]))
