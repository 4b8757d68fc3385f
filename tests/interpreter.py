"""Runs Triton kernels on a CPU, under Triton's interpreter, whoever imported Triton before and however."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from torch import Tensor


@contextmanager
def interpreted(*kernels: ModuleType) -> Iterator[None]:
    """While this is open the kernels in the modules `kernels` are interpreted; afterwards all is as it was.

    `TRITON_INTERPRET` is read when a function is decorated, Triton's own library included, which is before any test
    runs. So what `triton.jit` made then is replaced by what it would have made under that variable.
    """
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        try:
            # Loop bounds are arrays of one element, which numpy 2.4 no longer takes for whole numbers.
            scope.set_attr(tl.tensor, "__index__", lambda self: int(self.handle.data.item()))
            # A kernel that calls another would patch the library again for each call and leave it so.
            patch.setattr(interpreter, "_patch_lang", lambda function: interpreter._LangPatchScope())
            for module in (tl, tl.standard, *kernels):
                for name, value in list(vars(module).items()):
                    if isinstance(value, JITFunction):
                        patch.setattr(module, name, interpreter.InterpretedFunction(value.fn))
            yield
        finally:
            scope.restore()


def compile_for_h100(launch: Callable[[], object], kernels: ModuleType, **instead: Any) -> list[str]:
    """Compiles each kernel of `kernels` that `launch` asks for, down to the machine code of an H100; their names.

    Needs no GPU: the kernels are not run. `instead` are constants and options that would be others on a GPU.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction, mangle_type

    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set: nothing can be compiled")
    calls: list[_Call] = []
    with pytest.MonkeyPatch.context() as patch:
        for name, value in list(vars(kernels).items()):
            if isinstance(value, JITFunction):
                patch.setattr(kernels, name, _Noted(value, calls))
        launch()
    for kernel, arguments, named in calls:
        named = {**named, **{name: value for name, value in instead.items() if name in named}}
        constants = {name: named.pop(name) for name in kernel.arg_names if name in named}
        names = [name for name in kernel.arg_names if name not in constants]
        types = {name: mangle_type(value) for name, value in zip(names, arguments, strict=True)}
        signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
        aligned = [
            kernel.arg_names.index(name) for name, value in zip(names, arguments, strict=True) if _aligned(value)
        ]
        hints = {(index,): [["tt.divisibility", 16]] for index in aligned}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=hints)
        assert triton.compile(source, target=GPUTarget("cuda", 90, 32), options=named).asm["cubin"]
    return [kernel.__name__ for kernel, _, _ in calls]


def _aligned(argument: Any) -> bool:
    """Whether a launch would promise the compiler a multiple of 16: true of every tensor that the allocator made."""
    return isinstance(argument, Tensor) or (isinstance(argument, int) and argument % 16 == 0)


_Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


class _Noted:
    """Stands where a kernel stands and notes with what it would have been launched."""

    def __init__(self, kernel: Any, calls: list[_Call]) -> None:
        self.kernel = kernel
        self.calls = calls

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **named: self.calls.append((self.kernel, arguments, named))
