"""The specification of a container: made from ``docker inspect`` on the source, turned into a create
request on the target.

``Config`` and ``HostConfig`` are carried *verbatim*: the Engine API takes in ``/containers/create`` the
same fields that ``inspect`` shows, so options that this module has never heard of pass too. Only what would
mean something else on another host, or on a second creation, is changed; the list is here and in the tests:

- the host name that Docker made from the container's id is left out (an explicit one is kept);
- an empty entrypoint is written as ``[""]``, or Docker would put the image's in its place;
- published ports get the host ports they *have*: one that Docker chose at random, from a range or by
  ``--publish-all`` is asked for by its number, so that whoever found the container there still does;
- volumes without a name, and those from ``--volumes-from``, are asked for by the names they have;
- the restart policy is the caller's (``no`` while a migration runs; the original is in the spec);
- labels ``cargo.migration`` and ``cargo.source`` are added;
- a volume on shared storage is not to be filled from the image (``nocopy``): the source's container is using it;
- of a network endpoint only what a person chose is kept (aliases, fixed addresses, driver options).

The specification holds environment values, which may be secrets: it is written only to files of mode 0600
(hostd/spec_file.py) and never into an event or a log. Pure: no I/O, no clock.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping, Sequence, Set
from typing import Any

import msgspec

from events.errors import PermanentError
from events.schema import Mount, PortBinding
from hostd.docker_json import (
    ConfigView,
    ContainerView,
    EndpointView,
    HostConfigView,
    ImageView,
    MountView,
    PortMap,
    PortView,
    VolumeView,
    require_shallow,
    section,
    view,
)
from hostd.gate import PLAIN_RUNTIME, RUNTIME
from hostd.image_identity import identity_of
from hostd.networks import BUILT_IN_NETWORKS, definition, network_names
from hostd.shared_storage import SharedPlace
from hostd.spec_rules import DATA_KINDS, source_findings

SPEC_VERSION = 1
MAX_SPEC_BYTES = 4 * 1024 * 1024
"""Environment and labels together stay far below; the kernel limits the former to about 2 MiB."""
MIGRATION_LABEL = "cargo.migration"
SOURCE_LABEL = "cargo.source"
SHORT_ID_LENGTH = 12
DEFAULT_STOP_TIMEOUT_SECONDS = 10
"""Docker's own, where neither the container nor the caller says otherwise."""
CONTAINER_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+")
"""https://github.com/moby/moby/blob/v20.10.24/daemon/names/names.go"""


class ContainerSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything needed to create the container again on another host."""

    version: int = SPEC_VERSION
    name: str
    container_id: str
    """On the source."""
    image_id: str
    image_reference: str
    """What the image was called when the container was created; may be an id."""
    image_tags: tuple[str, ...]
    image_digests: tuple[str, ...] = ()
    """By which registries know it: ``name@sha256:…``."""
    image_layers: tuple[str, ...] = ()
    """Diff ids, lowest first."""
    image_identity: dict[str, Any] = {}
    """By which the image is known where it has another id (hostd/image_identity.py)."""
    architecture: str = ""
    """As images say it (``amd64``); empty when unknown."""
    process_label: str = ""
    """Of SELinux, where the source enforces it."""
    apparmor_profile: str = ""
    """In force on the source; empty where nothing enforces one."""
    user_namespace: str = ""
    """Owners of ids 0, as ``uid.gid``, where the source's Docker remaps users for this container."""
    config: dict[str, Any]
    """``Config`` of inspect, verbatim but for the host name."""
    host_config: dict[str, Any]
    """``HostConfig`` of inspect, verbatim but for volumes, ports and network mode (see above)."""
    networks: dict[str, dict[str, Any]]
    """Endpoint configuration by network name, user-defined networks only."""
    network_definitions: dict[str, dict[str, Any]] = {}
    """What it takes to create those networks on a host that lacks them (hostd/networks.py)."""
    volume_labels: dict[str, dict[str, str]] = {}
    """A person's labels on the volumes, by the volumes' names."""
    mounts: tuple[Mount, ...]
    """Those whose data moves."""
    shared: tuple[SharedPlace, ...] = ()
    """Those on shared storage, with what it takes to attach them, secrets included."""
    ports: tuple[PortBinding, ...]
    """In force on the source when the specification was made."""
    restart_policy: str
    restart_max_retries: int

    @property
    def network_mode(self) -> str:
        """Name of the network that the container starts in, or ``host``, ``none``, ``default``."""
        return str(self.host_config.get("NetworkMode") or "default")

    @property
    def subpaths(self) -> tuple[str, ...]:
        """Destinations of mounts that show only a part of their volume."""
        requests = [mount for mount in self.host_config.get("Mounts") or () if isinstance(mount, dict)]
        return tuple(str(m.get("Target")) for m in requests if (m.get("VolumeOptions") or {}).get("Subpath"))

    @property
    def device_paths(self) -> tuple[str, ...]:
        """Devices of the host that the container wants."""
        devices = self.host_config.get("Devices") or ()
        return tuple(d["PathOnHost"] for d in devices if isinstance(d, dict) and d.get("PathOnHost"))

    def __repr__(self) -> str:
        # The default would print the environment into logs and tracebacks.
        return f"ContainerSpec(name={self.name[:100]!r}, container_id={self.container_id[:12]!r})"


_encoder = msgspec.json.Encoder(order="deterministic")
_decoder = msgspec.json.Decoder(ContainerSpec)


def encode_spec(spec: ContainerSpec) -> bytes:
    """``spec`` as JSON. Raises PermanentError when it is too large or holds text that is not Unicode."""
    try:
        raw = _encoder.encode(spec)
    except (UnicodeEncodeError, msgspec.MsgspecError, RecursionError) as error:
        raise PermanentError(
            f"the specification of the container {spec.name!r} cannot be written ({type(error).__name__}); "
            "nothing was changed"
        ) from error
    if len(raw) > MAX_SPEC_BYTES:
        raise PermanentError(
            f"the specification of {spec.name!r} has {len(raw)} bytes, over the limit of {MAX_SPEC_BYTES}"
        )
    return raw


def decode_spec(raw: bytes) -> ContainerSpec:
    """The specification in ``raw``. Raises PermanentError for anything else, without quoting its values."""
    if len(raw) > MAX_SPEC_BYTES:
        raise PermanentError("a container's specification is over the size limit; it was not used")
    try:
        spec = _decoder.decode(raw)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise PermanentError(f"a container's specification cannot be read: {error}") from error
    if spec.version != SPEC_VERSION:
        raise PermanentError(f"a container's specification has the unknown version {spec.version}")
    if not CONTAINER_NAME.fullmatch(spec.name):
        raise PermanentError(f"a container's specification has the impossible name {spec.name[:80]!r}")
    _require_sound(spec)
    return spec


def _require_sound(spec: ContainerSpec) -> None:
    for part in (spec.config, spec.host_config, spec.networks, spec.network_definitions, spec.image_identity):
        require_shallow(part, f"the container {spec.name[:80]!r}")
    view(HostConfigView, spec.host_config, f"the container {spec.name[:80]!r}")


# --- from inspect --------------------------------------------------------------------------------


def from_inspect(
    inspect: Mapping[str, Any],
    image: Mapping[str, Any],
    *,
    volumes: Mapping[str, Mapping[str, Any]] | None = None,
    networks: Mapping[str, Mapping[str, Any]] | None = None,
    shared: Mapping[str, SharedPlace] | None = None,
    host_name: str = "",
    user_namespace: str = "",
    others: Sequence[Mapping[str, Any]] = (),
) -> tuple[ContainerSpec, list[str], list[str]]:
    """The specification, what a person should know (warnings), and why it must not be moved (refusals).

    ``inspect`` and ``image`` are Docker's JSON of the container and of its image; ``volumes`` of its named
    volumes, by name, to find mount options; ``networks`` of the host's networks, by name; ``shared`` its mounts on
    shared storage, by destination; ``host_name`` is the source host's, to recognise a name that Docker took from there
    (``--net=host``); ``user_namespace`` is what its Docker remaps users to; ``others`` are the host's other containers,
    for namespaces that are shared. Raises PermanentError when the JSON is not as documented.
    """
    what = "the container"
    container = view(ContainerView, inspect, what)
    picture = view(ImageView, image, "its image")
    found = source_findings(
        container,
        {name: view(VolumeView, raw, f"the volume {name!r}") for name, raw in (volumes or {}).items()},
        shared or {},
        [view(ContainerView, raw, "another container") for raw in others],
    )
    name = container.name.removeprefix("/")
    if not CONTAINER_NAME.fullmatch(name):
        raise PermanentError(f"the container has the impossible name {name[:80]!r}; nothing was changed")
    if container.image != picture.id:
        raise PermanentError("the image is not the one that the container was created from")
    policy = container.host_config.restart_policy
    config = section(inspect, "Config", what)
    config["Hostname"] = _kept_host_name(container, host_name, found.warnings)
    if not config.get("MacAddress") and (mac := _kept_mac(container)):
        config["MacAddress"] = mac
    host_config = section(inspect, "HostConfig", what)
    host_config["PortBindings"] = _fixed_ports(container, found.warnings)
    host_config["PublishAllPorts"] = False
    if host_config.get("Runtime") == RUNTIME:  # the plain one behind a gate, which is this host's own affair
        host_config["Runtime"] = PLAIN_RUNTIME
    host_config["VolumesFrom"] = None
    host_config["NetworkMode"] = _network_mode(container)
    _name_all_mounts(container, host_config)
    spec = ContainerSpec(
        name=name,
        container_id=container.id,
        image_id=picture.id,
        image_reference=container.config.image or picture.id,
        image_tags=picture.repo_tags or (),
        image_digests=tuple(dict.fromkeys(picture.repo_digests or ())),  # containerd's store lists some twice
        image_layers=(picture.root_fs.layers if picture.root_fs is not None else None) or (),
        image_identity=identity_of(image),
        architecture=picture.architecture,
        process_label=container.process_label or "",
        apparmor_profile=container.app_armor_profile or "",
        user_namespace="" if container.host_config.userns_mode == "host" else user_namespace,
        config=config,
        host_config=host_config,
        networks=_endpoints(container),
        network_definitions={
            name: definition(networks[name])
            for name in network_names(container.network_settings.networks or (), _network_mode(container))
            if networks is not None and name in networks
        },
        volume_labels={name: own for name, raw in (volumes or {}).items() if (own := _own_labels(raw.get("Labels")))},
        mounts=tuple(mount for mount in _data_mounts(container) if mount.destination not in (shared or {})),
        shared=tuple((shared or {}).values()),
        ports=_bindings(container),
        restart_policy=(policy.name if policy else None) or "no",
        restart_max_retries=(policy.maximum_retry_count if policy else None) or 0,
    )
    _require_sound(spec)
    encode_spec(spec)  # What cannot be written must be found here, while nothing depends on it.
    return spec, found.warnings, found.refusals


def data_mounts(inspect: Mapping[str, Any]) -> list[Mount]:
    """The container's volumes and binds, by destination; sizes are left 0. Raises PermanentError."""
    return _data_mounts(view(ContainerView, inspect, "the container"))


def port_bindings(inspect: Mapping[str, Any]) -> tuple[PortBinding, ...]:
    """The published ports in force; none for a container that does not run. Raises PermanentError."""
    return _bindings(view(ContainerView, inspect, "the container"))


def missing_ports(spec: ContainerSpec, inspect: Mapping[str, Any]) -> list[str]:
    """F7: published ports that the started container does not have, in words.

    Docker may start a container *without* its ports after an earlier start failed (moby 51758).
    Raises PermanentError.
    """
    actual = {(port.container_port, port.host_port) for port in port_bindings(inspect)}
    return [
        f"port {port.host_port} for {port.container_port}"
        for port in spec.ports
        if (port.container_port, port.host_port) not in actual
    ]


def _data_mounts(container: ContainerView) -> list[Mount]:
    # Docker shows them in another order each time it starts.
    mounts = [_data_mount(mount) for mount in container.mounts or () if mount.type in DATA_KINDS]
    return sorted(mounts, key=lambda mount: mount.destination)


def _data_mount(mount: MountView) -> Mount:
    tree = mount.source or ""
    return Mount(
        kind="volume" if mount.type == "volume" else "bind",
        name=(mount.name or "") if mount.type == "volume" else tree,
        destination=mount.destination,
        tree=tree,
        read_only=mount.rw is False,
    )


def _port_number(text: str | None) -> int | None:
    """The port in ``text``; None for none, 0 or a range, which all let Docker choose."""
    number = int(text) if text and text.isascii() and text.isdigit() and len(text) < 6 else 0
    return number if 0 < number < 65536 else None


def _bindings(container: ContainerView) -> tuple[PortBinding, ...]:
    ports = container.network_settings.ports or {}
    return tuple(
        PortBinding(container_port=inner, host_ip=entry.host_ip or "", host_port=number)
        for inner, entries in sorted(ports.items())
        for entry in entries or ()
        if (number := _port_number(entry.host_port)) is not None
    )


def _kept_host_name(container: ContainerView, host_name: str, warnings: list[str]) -> str:
    config: ConfigView = container.config
    name = config.hostname or ""
    if name and name == container.id[:SHORT_ID_LENGTH]:
        warnings.append(
            f"the host name inside the container, {name}, was made from its id and will be another one on "
            "the target; give the container a --hostname if its software depends on it"
        )
        return ""
    if container.host_config.network_mode == "host" and name == host_name:
        return ""
    return name


def _network_mode(container: ContainerView) -> str:
    """The network's name, also when the container was started with the network's id."""
    mode = container.host_config.network_mode or "default"
    networks = container.network_settings.networks or {}
    if mode in networks or mode in BUILT_IN_NETWORKS:
        return mode
    for name, endpoint in networks.items():
        network_id = endpoint.network_id if endpoint is not None else None
        if network_id and network_id.startswith(mode):
            return name
    return mode


def _endpoints(container: ContainerView) -> dict[str, dict[str, Any]]:
    networks = container.network_settings.networks or {}
    return {
        name: _endpoint(endpoint or EndpointView(), container.id)
        for name, endpoint in networks.items()
        if name not in BUILT_IN_NETWORKS
    }


def _endpoint(endpoint: EndpointView, container_id: str) -> dict[str, Any]:
    aliases = [alias for alias in endpoint.aliases or () if alias != container_id[:SHORT_ID_LENGTH]]
    kept: dict[str, Any] = {}
    if aliases:
        kept["Aliases"] = aliases
    if endpoint.ipam_config is not None:
        addresses = {
            "IPv4Address": endpoint.ipam_config.ipv4_address,
            "IPv6Address": endpoint.ipam_config.ipv6_address,
        }
        kept["IPAMConfig"] = {key: value for key, value in addresses.items() if value}
        if endpoint.ipam_config.link_local_ips:
            kept["IPAMConfig"]["LinkLocalIPs"] = list(endpoint.ipam_config.link_local_ips)
    if endpoint.driver_opts:
        kept["DriverOpts"] = dict(endpoint.driver_opts)
    if endpoint.gw_priority:
        kept["GwPriority"] = endpoint.gw_priority
    if mac := _fixed_mac(endpoint):
        kept["MacAddress"] = mac
    return kept


def _fixed_mac(endpoint: EndpointView) -> str:
    """The endpoint's MAC address, unless Docker made it from the IP address: ``02:42`` and its four bytes.

    Engines from API 1.44 on keep a fixed one here, and show one that they chose themselves in the same place.
    """
    mac = endpoint.mac_address or ""
    try:
        made = "02:42:" + ":".join(f"{int(part):02x}" for part in (endpoint.ip_address or "").split("."))
    except ValueError:
        return mac
    return "" if mac == made else mac


def _kept_mac(container: ContainerView) -> str:
    """What engines before API 1.44 take, and those since then still accept: one MAC address for the container.

    Docker refuses another one than the endpoint's, so it is the one of the network that the container starts in.
    """
    networks = container.network_settings.networks or {}
    endpoint = networks.get("bridge" if _network_mode(container) == "default" else _network_mode(container))
    return _fixed_mac(endpoint) if endpoint is not None else ""


def _fixed_ports(container: ContainerView, warnings: list[str]) -> dict[str, list[dict[str, str]]]:
    """``PortBindings`` in which every host port is a number, wherever Docker has chosen one."""
    asked: PortMap = container.host_config.port_bindings or {}
    actual: PortMap = container.network_settings.ports or {}
    names = set(asked)
    if container.host_config.publish_all_ports:
        names |= {name for name, entries in actual.items() if entries}
    fixed: dict[str, list[dict[str, str]]] = {}
    for name in sorted(names):
        wanted = asked.get(name) or ()
        static = [entry for entry in wanted if _port_number(entry.host_port) is not None]
        dynamic = [entry for entry in wanted if _port_number(entry.host_port) is None]
        entries = [{"HostIp": entry.host_ip or "", "HostPort": entry.host_port or ""} for entry in static]
        if dynamic or not wanted:
            chosen = _chosen_ports(static, dynamic, actual.get(name) or ())
            if not chosen:
                warnings.append(f"the host port for {name} is chosen at random and is not known now")
                chosen = [{"HostIp": e.host_ip or "", "HostPort": e.host_port or ""} for e in dynamic]
            entries.extend(chosen)
        fixed[name] = entries
    return fixed


def _chosen_ports(
    static: list[PortView], dynamic: list[PortView], actual: tuple[PortView, ...]
) -> list[dict[str, str]]:
    """The bindings that make Docker choose again what it chose for ``dynamic``."""
    taken = {_port_number(entry.host_port) for entry in static}
    chosen = [entry for entry in actual if _port_number(entry.host_port) not in (None, *taken)]
    numbers = sorted({entry.host_port or "" for entry in chosen})
    asked_ips = {entry.host_ip or "" for entry in dynamic} or {""}
    if len(numbers) == 1 and len(asked_ips) == 1:
        return [{"HostIp": asked_ips.pop(), "HostPort": numbers[0]}]
    return [{"HostIp": entry.host_ip or "", "HostPort": entry.host_port or ""} for entry in chosen]


def _name_all_mounts(container: ContainerView, host_config: dict[str, Any]) -> None:
    """Ask by name for every volume that Docker named itself, so that the target gets that very one."""
    actual = {mount.destination: mount for mount in container.mounts or ()}
    # "/destination" alone is a volume without a name: it is asked for by its name below.
    binds = [bind for bind in container.host_config.binds or () if _bind_parts(bind)[0]]
    asked = {posixpath.normpath(_bind_parts(bind)[1]) for bind in binds}
    requests = []
    for raw, request in zip(host_config.get("Mounts") or (), container.host_config.mounts or (), strict=True):
        mount = actual.get(posixpath.normpath(request.target))
        asked.add(posixpath.normpath(request.target))
        if request.type == "volume" and not request.source and mount is not None and mount.name:
            requests.append({**raw, "Source": mount.name})
        else:
            requests.append(raw)
    for destination, mount in actual.items():
        place = mount.name if mount.type == "volume" else mount.source
        if destination in asked or mount.type not in DATA_KINDS or not place:
            continue
        if ":" in destination:  # which the short form cannot say
            requests.append({"Type": mount.type, "Source": place, "Target": destination, "ReadOnly": mount.rw is False})
        else:
            binds.append(f"{place}:{destination}" + (":ro" if mount.rw is False else ""))
    host_config["Binds"] = binds or host_config.get("Binds")
    host_config["Mounts"] = requests or host_config.get("Mounts")


def _bind_parts(bind: str) -> tuple[str, str, str]:
    """Source, destination and options of ``source:destination[:options]``; neither path may hold a colon."""
    parts = bind.split(":", 2)
    if len(parts) < 2:
        return "", parts[0], ""
    return parts[0], parts[1], parts[2] if len(parts) == 3 else ""


# --- to a create request -------------------------------------------------------------------------


def to_create_body(
    spec: ContainerSpec,
    *,
    image: str,
    places: Mapping[str, str] | None = None,
    restart_policy: str = "no",
    restart_max_retries: int = 0,
    labels: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The body of ``POST /containers/create`` that makes the container of ``spec`` again.

    ``image`` is a reference or id that the target's Docker knows. ``places`` maps names of volumes and
    paths of binds on the source (``Mount.name``) to those on the target; what is not in it keeps its name.
    ``labels`` come on top of the container's own. Only the network named by ``NetworkMode`` is in the
    body, because engines before API 1.44 accept a single one; connect the others afterwards.
    Raises PermanentError when the specification is not usable.
    """
    moved = places or {}
    config = dict(spec.config)
    config["Image"] = image
    config["Labels"] = {**_text_map(config.get("Labels")), **(labels or {})}
    if not config.get("Entrypoint"):
        config["Entrypoint"] = [""]
    host_config = dict(spec.host_config)
    policy: dict[str, Any] = {"Name": restart_policy}
    if restart_policy == "on-failure":
        policy["MaximumRetryCount"] = restart_max_retries
    host_config["RestartPolicy"] = policy
    volumes = {place.name for place in spec.shared if place.kind == "volume"}
    host_config["Binds"] = [_moved_bind(bind, moved, volumes) for bind in _list(host_config.get("Binds"))]
    host_config["Mounts"] = [_moved_mount(mount, moved, volumes) for mount in _list(host_config.get("Mounts"))]
    endpoint = spec.networks.get(spec.network_mode)
    networking = {"EndpointsConfig": {spec.network_mode: endpoint}} if endpoint is not None else {}
    return {**config, "HostConfig": host_config, "NetworkingConfig": networking}


def further_networks(spec: ContainerSpec) -> dict[str, dict[str, Any]]:
    """The networks, with endpoint configuration, to connect after the creation."""
    return {name: dict(config) for name, config in spec.networks.items() if name != spec.network_mode}


def _list(value: Any) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise PermanentError("the container's specification has a list of mounts that is none")
    return value


def _own_labels(labels: Any) -> dict[str, str]:
    """Without those that an earlier migration left."""
    marks = (MIGRATION_LABEL, SOURCE_LABEL)
    return {name: str(value) for name, value in _text_map(labels).items() if name not in marks}


def _text_map(value: Any) -> dict[str, str]:
    return dict(value) if isinstance(value, dict) else {}


# Docker fills a volume that is empty at the creation of a container with what the image has at its place. That must not
# happen to a share, which the source's container is still using: ``nocopy``.


def _moved_bind(bind: Any, places: Mapping[str, str], shared_volumes: Set[str]) -> str:
    if not isinstance(bind, str):
        raise PermanentError("the container's specification has a bind that is no text")
    source, destination, options = _bind_parts(bind)
    if not source:
        return bind
    target = places.get(source, source)
    if ":" in target:
        raise PermanentError(f"Docker cannot bind a path with a colon: {target!r}")
    if source in shared_volumes and "nocopy" not in options.split(","):
        options = f"{options},nocopy" if options else "nocopy"
    return f"{target}:{destination}" + (f":{options}" if options else "")


def _moved_mount(mount: Any, places: Mapping[str, str], shared_volumes: Set[str]) -> Any:
    if not isinstance(mount, dict):
        raise PermanentError("the container's specification has a mount that is no object")
    source, options = mount.get("Source"), mount.get("VolumeOptions") or {}
    if not isinstance(source, str):
        return mount
    if source in shared_volumes:
        if not isinstance(options, dict):
            raise PermanentError("the container's specification has options of a volume that are no object")
        mount = {**mount, "VolumeOptions": {**options, "NoCopy": True}}
    return {**mount, "Source": places.get(source, source)}
