"""Deferred imports: a command imports the libraries without the optional packages that it never uses.

Importing the models, PEFT and accelerate takes several seconds, more than half of them for a compiler,
distributed training, statistics and 8-bit layers that an edit never uses. `load_libraries` defers these.
While it runs, modules of the packages in `UNUSED` are stand-ins; afterwards none is left in `sys.modules`, and
a name that a library imported from one loads the real package when it is first used. Only the command line
does this, in its own process: importing lora_unitune leaves the libraries unchanged.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from lora_unitune import families

UNUSED = (
    "bitsandbytes",
    "scipy.integrate",
    "scipy.optimize",
    "scipy.stats",
    "torch._dynamo",
    "torch.distributed._composable",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.nn.attention.flex_attention",
    "transformers.distributed.expert_parallel",
    "transformers.distributed.tensor_parallel",
)
"""The deferred packages. Those of torch include all that import one another, so that torch itself never holds a
stand-in; the two of transformers use what they import immediately."""

LIBRARIES = (*families.LIBRARIES, "diffusers.schedulers.scheduling_ddim", "peft.tuners.lora", "accelerate")


def load_libraries() -> None:
    """Imports the libraries that a fit and an edit use, and nothing of `UNUSED`."""
    import torch  # noqa: F401  # completely, before parts of it are deferred

    # PEFT reads torch.distributed.tensor without importing it: parts of torch are stand-ins from the start
    with deferring(UNUSED):
        for name in (*(part for part in UNUSED if part.startswith("torch.")), *LIBRARIES):
            # a failing import is repeated, and its error reported, where the module is used
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        with contextlib.suppress(Exception):
            from diffusers.schedulers.scheduling_ddim import DDIMScheduler

            _ = DDIMScheduler().compatibles  # loading a scheduler imports all compatible ones


@contextlib.contextmanager
def deferring(packages: Sequence[str]) -> Iterator[None]:
    """Inside the `with` block, packages that aren't imported yet are imported as stand-ins.

    Args:
        packages: Dotted names of the packages; those that aren't installed are skipped.
    """
    wanted = [name for name in packages if name not in sys.modules and _is_installed(name)]
    finder = _Finder(wanted)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        finder.release()
        sys.meta_path.remove(finder)


def _is_installed(name: str) -> bool:
    top = name.partition(".")[0]
    return top in sys.modules or importlib.util.find_spec(top) is not None


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds stand-ins for the deferred packages."""

    def __init__(self, packages: Sequence[str]) -> None:
        self._held = list(packages)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        held = any(f"{fullname}.".startswith(f"{name}.") for name in self._held)
        return ModuleSpec(fullname, self, is_package=True) if held else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name, self)

    def exec_module(self, module: ModuleType) -> None:
        """Does nothing: a stand-in has no code."""

    def real(self, module: str, name: str) -> Any:
        """Returns an attribute of the real module; from then on nothing is deferred."""
        self.release()
        return getattr(importlib.import_module(module), name)

    def release(self) -> None:
        """Removes all stand-ins from `sys.modules`, so that the next import of each is a real one.

        Until then each stays an attribute of its parent package, as its module would, unless that package
        imports its attributes lazily.
        """
        self._held.clear()
        for name, module in list(sys.modules.items()):
            if isinstance(module, _StandIn) and module._finder is self:
                parent, _, last = name.rpartition(".")
                above = vars(sys.modules.get(parent, sys))
                if "__getattr__" in above and above.get(last) is module:
                    delattr(sys.modules[parent], last)
                del sys.modules[name]


def _is_loaded(module: str) -> bool:
    loaded = sys.modules.get(module)
    return loaded is not None and not isinstance(loaded, _StandIn)


class _StandIn(ModuleType):
    """A placeholder for a module; the real one is imported when one of its attributes is used."""

    def __init__(self, name: str, finder: _Finder) -> None:
        super().__init__(name)
        self._finder = finder
        self.__dict__.update(_DECORATORS.get(name, {}))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module '{self.__name__}' is deferred and has no '{name}' yet")
        if _is_loaded(self.__name__):
            return getattr(sys.modules[self.__name__], name)
        return _Name(self._finder, self.__name__, name)


class _Name:
    """A placeholder for a function, class or module of a deferred package."""

    def __init__(self, finder: _Finder, module: str, name: str) -> None:
        self._finder, self._module, self._name = finder, module, name

    def _real(self) -> Any:
        return self._finder.real(self._module, self._name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._real()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._real(), name)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._real(),)

    def __instancecheck__(self, thing: object) -> bool:
        """Returns whether an object is of this class: none is before its module is imported."""
        return _is_loaded(self._module) and isinstance(thing, self._real())

    def __subclasscheck__(self, kind: type[Any]) -> bool:
        return _is_loaded(self._module) and issubclass(kind, self._real())

    def __or__(self, other: Any) -> Any:
        """Supports `X | None` in a type hint."""
        return self

    __ror__ = __or__


def _disable(fn: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Acts as `torch._dynamo.disable` once the compiler is imported; before, there is nothing to disable."""
    if fn is None:
        return lambda fn: _disable(fn, *args, **kwargs)
    shielded: list[Any] = []

    @functools.wraps(fn)
    def call(*inputs: Any, **options: Any) -> Any:
        disable = getattr(sys.modules.get("torch._dynamo"), "disable", _disable)
        if disable is _disable:
            return fn(*inputs, **options)
        if not shielded:
            shielded.append(disable(fn, *args, **kwargs))
        return shielded[0](*inputs, **options)

    return call


def _assume_constant_result(fn: Any) -> Any:
    fn._dynamo_marked_constant = True  # as torch's implementation does
    return fn


_DECORATORS: dict[str, dict[str, Any]] = {
    "torch._dynamo": {
        "disable": _disable,
        "assume_constant_result": _assume_constant_result,
        "allow_in_graph": lambda thing: thing,  # as diffusers does without a compiler
    }
}
"""Functions that libraries call during their import, by module."""
