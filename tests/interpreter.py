"""Runs Triton kernels on a CPU, under Triton's interpreter, whoever imported Triton before and however."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest


@contextmanager
def interpreted(*kernels: ModuleType) -> Iterator[None]:
    """While this is open the kernels in the modules `kernels` are interpreted; afterwards all is as it was.

    `TRITON_INTERPRET` is read when a function is decorated, Triton's own library included, which is before any test
    runs. So what `triton.jit` made then is replaced by what it would have made under that variable.
    """
    import triton
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setattr(interpreter, "_patch_lang_tensor", _with_index(interpreter._patch_lang_tensor))
        for module in (tl, tl.standard, *kernels):
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction):
                    patch.setattr(module, name, interpreter.InterpretedFunction(value.fn))
        assert triton.knobs.runtime.interpret
        yield


def _with_index(patch_tensor: Any) -> Any:
    """Loop bounds are arrays of one element, which numpy 2.4 no longer takes for whole numbers."""

    def patched(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patched
