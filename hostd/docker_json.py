"""Typed views of the parts of Docker's JSON that decisions are taken on.

``docker inspect`` of a container, an image or a volume comes from a daemon, and, on the target, through
a file that another host wrote: nothing in it is trusted to have its documented type. ``view`` checks the
types once, so the code behind it needs no guards. What is only passed through is not modelled here; it
stays in the raw dictionaries (see hostd/spec.py).

Pure: no I/O. Field names follow the Engine API, https://docs.docker.com/engine/api/.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import msgspec

from events.errors import PermanentError

Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
"""Docker's numbers; Python's have no end, and arithmetic with fractions has."""
MAX_NESTING = 64
"""Deeper JSON than this is not a description of a container."""


class View(msgspec.Struct, rename="pascal", frozen=True, kw_only=True):
    """Base of all views: unknown fields are ignored, Docker's nulls are None."""


class PortView(View, frozen=True, kw_only=True):
    """One entry of ``PortBindings`` (asked for) or ``Ports`` (in force)."""

    host_ip: str | None = None
    host_port: str | None = None


PortMap = dict[str, tuple[PortView, ...] | None]


class MountView(View, frozen=True, kw_only=True):
    """One entry of ``Mounts`` of an inspected container: what is mounted in fact."""

    type: str = ""
    name: str | None = None
    source: str | None = None
    destination: str
    driver: str | None = None
    rw: bool | None = msgspec.field(name="RW", default=True)
    propagation: str | None = None


class VolumeOptionsView(View, frozen=True, kw_only=True):
    """``VolumeOptions`` of a mount asked for with ``--mount``."""

    subpath: str | None = None


class MountRequestView(View, frozen=True, kw_only=True):
    """One entry of ``HostConfig.Mounts``: what was asked for with ``--mount``."""

    type: str = ""
    source: str | None = None
    target: str
    volume_options: VolumeOptionsView | None = None


class RestartPolicyView(View, frozen=True, kw_only=True):
    """``HostConfig.RestartPolicy``."""

    name: str | None = None
    maximum_retry_count: int | None = None


class DeviceView(View, frozen=True, kw_only=True):
    """One entry of ``HostConfig.Devices``."""

    path_on_host: str | None = None


class HostConfigView(View, frozen=True, kw_only=True):
    """``HostConfig``."""

    auto_remove: bool | None = None
    binds: tuple[str, ...] | None = None
    mounts: tuple[MountRequestView, ...] | None = None
    network_mode: str | None = None
    pid_mode: str | None = None
    ipc_mode: str | None = None
    userns_mode: str | None = None
    privileged: bool | None = None
    links: tuple[str, ...] | None = None
    volumes_from: tuple[str, ...] | None = None
    port_bindings: PortMap | None = None
    publish_all_ports: bool | None = None
    restart_policy: RestartPolicyView | None = None
    devices: tuple[DeviceView, ...] | None = None
    device_requests: tuple[dict[str, Any], ...] | None = None
    security_opt: tuple[str, ...] | None = None
    runtime: str | None = None
    init: bool | None = None
    cgroupns_mode: str | None = None
    cgroup_parent: str | None = None
    memory: Int64 | None = None
    memory_swap: Int64 | None = None
    nano_cpus: Int64 | None = None
    cpuset_cpus: str | None = None
    sysctls: dict[str, str] | None = None


class ConfigView(View, frozen=True, kw_only=True):
    """``Config``."""

    hostname: str | None = None
    image: str | None = None
    entrypoint: tuple[str, ...] | None = None
    labels: dict[str, str] | None = None
    stop_signal: str | None = None
    stop_timeout: int | None = None


class IpamConfigView(View, frozen=True, kw_only=True):
    """``IPAMConfig`` of an endpoint: addresses that a person fixed."""

    ipv4_address: str | None = msgspec.field(name="IPv4Address", default=None)
    ipv6_address: str | None = msgspec.field(name="IPv6Address", default=None)
    link_local_ips: tuple[str, ...] | None = msgspec.field(name="LinkLocalIPs", default=None)


class EndpointView(View, frozen=True, kw_only=True):
    """One entry of ``NetworkSettings.Networks``."""

    ipam_config: IpamConfigView | None = msgspec.field(name="IPAMConfig", default=None)
    links: tuple[str, ...] | None = None
    aliases: tuple[str, ...] | None = None
    network_id: str | None = msgspec.field(name="NetworkID", default=None)
    ip_address: str | None = msgspec.field(name="IPAddress", default=None)
    mac_address: str | None = None
    gw_priority: int | None = None
    driver_opts: dict[str, str] | None = None


class NetworkSettingsView(View, frozen=True, kw_only=True):
    """``NetworkSettings``."""

    ports: PortMap | None = None
    networks: dict[str, EndpointView | None] | None = None


class StateView(View, frozen=True, kw_only=True):
    """``State``."""

    status: str = ""
    running: bool = False
    paused: bool = False
    restarting: bool = False
    dead: bool = False
    oom_killed: bool = msgspec.field(name="OOMKilled", default=False)
    pid: int = 0
    exit_code: int = 0
    error: str = ""
    started_at: str = ""
    finished_at: str = ""


class ContainerView(View, frozen=True, kw_only=True):
    """``docker inspect`` of a container."""

    id: str
    name: str
    image: str
    restart_count: int = 0
    app_armor_profile: str | None = None
    process_label: str | None = None
    state: StateView = StateView()
    config: ConfigView
    host_config: HostConfigView
    mounts: tuple[MountView, ...] | None = None
    network_settings: NetworkSettingsView = NetworkSettingsView()


class RootFsView(View, frozen=True, kw_only=True):
    """``RootFS`` of an image."""

    layers: tuple[str, ...] | None = None


class ImageView(View, frozen=True, kw_only=True):
    """``docker image inspect``."""

    id: str
    repo_tags: tuple[str, ...] | None = None
    repo_digests: tuple[str, ...] | None = None
    root_fs: RootFsView | None = msgspec.field(name="RootFS", default=None)
    architecture: str = ""
    os: str = ""


class VolumeView(View, frozen=True, kw_only=True):
    """``docker volume inspect``."""

    name: str
    driver: str = ""
    mountpoint: str = ""
    labels: dict[str, str] | None = None
    options: dict[str, str] | None = None


class VersionView(View, frozen=True, kw_only=True):
    """``docker version`` of the engine."""

    version: str = ""
    api_version: str = ""


class PluginsView(View, frozen=True, kw_only=True):
    """``Plugins`` of the engine."""

    log: tuple[str, ...] | None = None


class InfoView(View, frozen=True, kw_only=True):
    """``docker info``."""

    driver: str = ""
    driver_status: tuple[list[str], ...] | None = None
    security_options: tuple[str, ...] | None = None
    cgroup_version: str = "1"
    cgroup_driver: str = ""
    live_restore_enabled: bool | None = None
    docker_root_dir: str = ""
    plugins: PluginsView | None = None
    ncpu: int = msgspec.field(name="NCPU", default=0)
    name: str = ""
    kernel_version: str = ""
    architecture: str = ""
    runtimes: dict[str, Any] | None = None


class RowMountView(View, frozen=True, kw_only=True):
    """One entry of ``Mounts`` of a listed container."""

    name: str | None = None


class RowPortView(View, frozen=True, kw_only=True):
    """One entry of ``Ports`` of a listed container."""

    private_port: int = 0
    public_port: int | None = None
    type: str = ""
    ip: str | None = msgspec.field(name="IP", default=None)


class RowView(View, frozen=True, kw_only=True):
    """One row of ``docker ps --all``."""

    id: str
    names: tuple[str, ...] | None = None
    image: str
    image_id: str = msgspec.field(name="ImageID")
    state: str
    labels: dict[str, str] | None = None
    mounts: tuple[RowMountView, ...] | None = None
    ports: tuple[RowPortView, ...] | None = None


_ViewT = TypeVar("_ViewT", bound=View)


def view(kind: type[_ViewT], raw: Mapping[str, Any], what: str) -> _ViewT:
    """``raw`` seen as ``kind``. Raises PermanentError, naming ``what``, when a type is not as documented."""
    try:
        return msgspec.convert(raw, kind)
    except (msgspec.ValidationError, RecursionError, UnicodeEncodeError) as error:
        raise PermanentError(
            f"Docker's description of {what} is not one that this version understands ({error}); nothing was changed"
        ) from error


def require_shallow(raw: Any, what: str) -> None:
    """Raise PermanentError, naming ``what``, when JSON is nested deeper than whoever looks into it would bear."""
    level, depth = [raw], 0
    while level:
        depth += 1
        if depth > MAX_NESTING:
            raise PermanentError(f"the description of {what} is nested too deeply to be one; nothing was changed")
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list | tuple)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list | tuple)
        ]


def section(raw: Mapping[str, Any], name: str, what: str) -> dict[str, Any]:
    """A copy of the JSON object ``raw[name]``. Raises PermanentError when there is none."""
    value = raw.get(name)
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise PermanentError(f"Docker's description of {what} has no usable {name}; nothing was changed")
    return dict(value)
