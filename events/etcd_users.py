"""etcd's users and roles: who may touch which keys. Its messages are etcd3's, by way of ``events/etcd.py``.

Users have no password: who they are, their client certificate's common name says. Everything here may be repeated:
what is there already, or is gone already, is fine. All of it takes a user with the role ``root``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from events.errors import StoreUnavailableError
from events.etcd import EtcdStore, etcdrpc
from events.keyspace import key_bytes, key_text
from events.permissions import Mode, Permission

ROOT = "root"
"""etcd's own name for the user and the role that may do anything."""
_NO_PASSWORD = b"\x1a\x02\x08\x01"
"""AuthUserAddRequest's ``options { no_password: true }``, since etcd 3.4; etcd3's older messages lack it."""
_MODES: tuple[Mode, ...] = ("read", "write", "readwrite")
"""In the order of etcd's Permission.Type."""


class EtcdUsers:
    """The users and roles of the etcd behind ``store``. Every method may raise StoreUnavailableError."""

    def __init__(self, store: EtcdStore) -> None:
        self._store = store

    def names(self) -> list[str]:
        """All users."""
        return list(self._ask("UserList", etcdrpc.AuthUserListRequest()).users)

    def roles(self) -> list[str]:
        """All roles."""
        return list(self._ask("RoleList", etcdrpc.AuthRoleListRequest()).roles)

    def permissions(self, role: str) -> frozenset[Permission]:
        """What ``role`` may touch; nothing when there is no such role."""
        answer = self._ask("RoleGet", etcdrpc.AuthRoleGetRequest(role=role), "role name not found")
        if answer is None:
            return frozenset()
        return frozenset(
            Permission(key_text(one.key), key_text(one.range_end), _MODES[one.permType]) for one in answer.perm
        )

    def make_user(self, name: str, role: str, permissions: Iterable[Permission] = ()) -> None:
        """The user ``name`` with the one role ``role``, which has at least ``permissions``."""
        self._ask("RoleAdd", etcdrpc.AuthRoleAddRequest(name=role), "role name already exists")
        for permission in permissions:
            self.grant(role, permission)
        request = etcdrpc.AuthUserAddRequest(name=name).SerializeToString() + _NO_PASSWORD
        self._ask("UserAdd", etcdrpc.AuthUserAddRequest.FromString(request), "user name already exists")
        self._ask("UserGrantRole", etcdrpc.AuthUserGrantRoleRequest(user=name, role=role), "already granted")

    def drop_user(self, name: str) -> None:
        """Away with the user, and with the role of the same name."""
        self._ask("UserDelete", etcdrpc.AuthUserDeleteRequest(name=name), "user name not found")
        self._ask("RoleDelete", etcdrpc.AuthRoleDeleteRequest(role=name), "role name not found")

    def grant(self, role: str, permission: Permission) -> None:
        """Let ``role`` touch that, too."""
        request = etcdrpc.AuthRoleGrantPermissionRequest(name=role)
        request.perm.permType = _MODES.index(permission.mode)
        request.perm.key = key_bytes(permission.key)
        request.perm.range_end = key_bytes(permission.end)
        self._ask("RoleGrantPermission", request)

    def revoke(self, role: str, permission: Permission) -> None:
        """Do not let ``role`` touch that any more."""
        request = etcdrpc.AuthRoleRevokePermissionRequest(role=role, key=permission.key, range_end=permission.end)
        self._ask("RoleRevokePermission", request, "permission is not granted", "role name not found")

    def enable(self) -> None:
        """From now on nobody may do anything without a user. Needs the user ``root`` to exist."""
        self._ask("AuthEnable", etcdrpc.AuthEnableRequest())

    def server_version(self) -> str:
        """Of the member that answers."""

        def ask(client: Any, options: dict[str, Any]) -> Any:
            return client.maintenancestub.Status(etcdrpc.StatusRequest(), **options)

        version: str = self._call(ask).version
        return version

    def _ask(self, method: str, request: Any, *fine: str) -> Any:
        """One call, repeated while it goes unanswered; None for a refusal in words that are ``fine``."""

        def ask(client: Any, options: dict[str, Any]) -> Any:
            return getattr(etcdrpc.AuthStub(client.channel), method)(request, **options)

        try:
            return self._call(ask)
        except StoreUnavailableError as error:
            if any(words in str(error) for words in fine):
                return None
            raise

    def _call(self, ask: Callable[[Any, dict[str, Any]], Any]) -> Any:
        store = self._store
        return store._reading(functools.partial(store._call, store._connections, ask, ordered=False))
