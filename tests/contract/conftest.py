"""One bench per kind of store: the contract tests run on each of them."""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator

import pytest

from events.keyspace import Keyspace
from events.memory import Fault, MemoryStore
from events.store import Store
from tests.support.etcd import EtcdCluster, etcd_cluster
from tests.support.faulty_etcd import FaultyEtcdStore


class Bench(ABC):
    """A store under test, and what can be done to it. Each test has a prefix of its own."""

    store: Store
    keys: Keyspace

    @abstractmethod
    def another(self) -> Store:
        """The same data seen by another process."""

    @abstractmethod
    def fail_next(self, fault: Fault, times: int = 1) -> None:
        """Lose the replies of the next transactions of ``store``."""

    @abstractmethod
    def compact(self) -> None:
        """Forget everything before the present."""

    @abstractmethod
    def close(self) -> None:
        """Let go of everything."""


class MemoryBench(Bench):
    def __init__(self) -> None:
        self._memory = MemoryStore(Keyspace("/contract"))
        self.store, self.keys = self._memory, self._memory.keys

    def another(self) -> Store:
        return self.store

    def fail_next(self, fault: Fault, times: int = 1) -> None:
        self._memory.fail_next(fault, times=times)

    def compact(self) -> None:
        self._memory.compact()

    def close(self) -> None:
        self.store.close()


class EtcdBench(Bench):
    def __init__(self, cluster: EtcdCluster) -> None:
        self._cluster = cluster
        self.keys = Keyspace(f"/contract/{secrets.token_hex(4)}")
        self._faulty = FaultyEtcdStore(cluster.endpoints, self.keys)
        self.store = self._faulty
        self._stores: list[Store] = [self.store]

    def another(self) -> Store:
        self._stores.append(FaultyEtcdStore(self._cluster.endpoints, self.keys))
        return self._stores[-1]

    def fail_next(self, fault: Fault, times: int = 1) -> None:
        self._faulty.fail_next(fault, times=times)

    def compact(self) -> None:
        done = self._cluster.etcdctl("compact", str(self.store.revision()))
        assert done.returncode == 0, done.stderr

    def close(self) -> None:
        for store in self._stores:
            store.close()


@pytest.fixture(scope="session")
def contract_etcd() -> Iterator[EtcdCluster]:
    with etcd_cluster() as cluster:
        yield cluster


@pytest.fixture(params=["memory", pytest.param("etcd", marks=pytest.mark.etcd)])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    in_memory = request.param == "memory"
    made: Bench = MemoryBench() if in_memory else EtcdBench(request.getfixturevalue("contract_etcd"))
    yield made
    made.close()
