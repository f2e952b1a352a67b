"""etcd3's messages are made from the descriptors in its generated code, by whatever protobuf runtime there is."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from events.etcd import etcdrpc
from events.etcd_messages import NEEDS, serialized_descriptor

SHOW_RUNTIME = """
from events.etcd import etcdrpc
from google.protobuf.internal import api_implementation
put = etcdrpc.RequestOp(request_put=etcdrpc.PutRequest(key=b"k", value=b"v", lease=3))
compare = etcdrpc.Compare(key=b"k", result=etcdrpc.Compare.EQUAL, target=etcdrpc.Compare.MOD, mod_revision=7)
request = etcdrpc.TxnRequest(compare=[compare], success=[put])
print(api_implementation.Type(), request.SerializeToString().hex())
"""


def shown(**environment: str) -> tuple[str, bytes]:
    """The runtime that a fresh process uses, and a transaction as it writes it."""
    words = subprocess.run(
        [sys.executable, "-c", SHOW_RUNTIME],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    return words[0], bytes.fromhex(words[1])


def test_every_runtime_writes_the_same_and_the_compiled_one_is_used_where_it_is() -> None:
    usual, written = shown()
    assert usual == "upb"
    assert shown(PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION="python") == ("python", written)
    assert written == bytes.fromhex("0a07 1002 1a01 6b 3007 120a 1208 0a01 6b 1201 76 1803".replace(" ", ""))


def test_fields_of_a_newer_etcd_survive_in_a_message_that_does_not_know_them() -> None:
    unknown = b"\x38\x05\x40\x01"
    request = etcdrpc.WatchCreateRequest.FromString(etcdrpc.WatchCreateRequest(key=b"k").SerializeToString() + unknown)
    assert etcdrpc.WatchRequest(create_request=request).SerializeToString().endswith(unknown)


@pytest.mark.parametrize("name", NEEDS)
def test_the_descriptor_is_found_in_the_code_of_each_module(name: str) -> None:
    spec = importlib.util.find_spec("etcd3")
    assert spec is not None and spec.submodule_search_locations
    path = f"{spec.submodule_search_locations[0]}/etcdrpc/{name.rpartition('.')[2]}.py"
    with open(path, "rb") as file:
        code = compile(file.read(), path, "exec")
    found = serialized_descriptor(name, code)
    assert found is not None and found.startswith(b"\n")
    assert found == importlib.import_module(name).DESCRIPTOR.serialized_pb


def test_code_without_such_a_descriptor_is_left_alone() -> None:
    code = compile("DESCRIPTOR = AddSerializedFile(b'\\n\\x08kv.proto')", "kv_pb2.py", "exec")
    assert serialized_descriptor("etcd3.etcdrpc.kv_pb2", code) is None
