"""Makes etcd3's messages from the descriptors that its generated code carries, with whatever protobuf is installed.

etcd3 0.12.0 ships code of a protobuf compiler of 2019, which builds every message and field by calls that only the
pure-Python runtime still takes, and that one is several times slower than the compiled one: it took over a third of an
append's processor time, and half of what an idle watch costs. But the same code holds the serialized descriptor of each file, which
is all that a compiler of today writes out. So these three modules are loaded from that instead, in the way that
generated code of today does it, which every runtime takes. A module that holds no such descriptor, as one that
somebody generated anew may, is loaded as it is.

``made_here`` surrounds the first import of etcd3. Imports no etcd3, and knows nothing of Cargo.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import InspectLoader, Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import CodeType, ModuleType
from typing import Any

from google.protobuf import descriptor_pool  # type: ignore[import-untyped]
from google.protobuf.internal import builder  # type: ignore[import-untyped]

PACKAGE = "etcd3.etcdrpc"
NEEDS = {
    f"{PACKAGE}.kv_pb2": (),
    f"{PACKAGE}.auth_pb2": (),
    f"{PACKAGE}.rpc_pb2": ("kv_pb2", "auth_pb2"),
}
"""The generated modules, each with those that its descriptor refers to."""


@contextlib.contextmanager
def made_here() -> Iterator[None]:
    """While this lasts, an import of etcd3 gets messages that are made here."""
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


def serialized_descriptor(name: str, code: CodeType) -> bytes | None:
    """The serialized FileDescriptorProto in the generated module ``name``; None when it holds none."""
    file = name.rpartition(".")[2].removesuffix("_pb2") + ".proto"
    beginning = f"\n{chr(len(file))}{file}"  # field 1, its length, and the name of the file
    for constant in code.co_consts:
        if isinstance(constant, str) and constant.startswith(beginning):
            return constant.encode("latin-1")
    return None


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in NEEDS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, InspectLoader):
            code = spec.loader.get_code(fullname)
            descriptor = None if code is None else serialized_descriptor(fullname, code)
            if descriptor is not None:
                spec.loader = _Loader(descriptor)
        return spec


class _Loader(Loader):
    def __init__(self, descriptor: bytes) -> None:
        self._descriptor = descriptor

    def exec_module(self, module: ModuleType) -> None:
        for needed in NEEDS[module.__name__]:
            importlib.import_module(f"{PACKAGE}.{needed}")
        names: dict[str, Any] = vars(module)
        made = descriptor_pool.Default().AddSerializedFile(self._descriptor)
        names["DESCRIPTOR"] = made
        builder.BuildMessageAndEnumDescriptors(made, names)
        builder.BuildTopDescriptorsAndMessages(made, module.__name__, names)
