"""Images for the lab's containers, made from installed Debian packages, as no registry may be in reach.

A recipe names programs; the image is those, the shared libraries they load, busybox with a link for each of
its applets, and a few files of /etc. Tars are cached below /var/cache/cargo-lab under a digest of everything
that went in.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labkit.errors import CommandFailedError, LabError
from labkit.network import command
from labkit.process import PATH
from labkit.spec import CACHE

if TYPE_CHECKING:
    from labkit.host import Host


@dataclass(frozen=True)
class Recipe:
    """How an image is made."""

    programs: tuple[str, ...] = ()
    """Found by PATH, put where they are, with the libraries that ldd names."""
    changes: tuple[str, ...] = ()
    """Dockerfile instructions for ``docker import --change``."""
    directories: tuple[tuple[str, int, int], ...] = ()
    """Further directories: path, mode, owner."""
    trees: tuple[str, ...] = ()
    """Directories of this machine that are taken with everything in them, and what their shared objects load."""
    left_out: tuple[str, ...] = ()
    """Names below ``trees`` that nobody needs in an image."""
    texts: tuple[tuple[str, str], ...] = ()
    """Further files: path, contents."""


POSTGRESQL = "/usr/lib/postgresql/15"
"""Where Debian 12 puts the server's programs."""
SERVICE_USER = 999

_NGINX_CONFIGURATION = """
daemon off;
pid /tmp/nginx.pid;
error_log stderr;
worker_processes 2;
events {}
http {
    access_log off;
    client_body_temp_path /site/incoming;
    proxy_temp_path /tmp/proxy;
    fastcgi_temp_path /tmp/fastcgi;
    uwsgi_temp_path /tmp/uwsgi;
    scgi_temp_path /tmp/scgi;
    server {
        listen 8080;
        root /site;
        location /records/ {
            dav_methods PUT;
            create_full_put_path on;
            autoindex on;
            autoindex_format json;
        }
    }
}
"""
"""Files of /site are served; what is PUT below /records/ becomes one, by a rename from /site/incoming."""

_POSTGRESQL_START = """#!/bin/sh
set -e
if [ ! -e /data/PG_VERSION ]; then
    initdb --pgdata=/data --auth=trust --encoding=UTF8 --locale=C --username=service --data-checksums >&2
    echo "host all all all trust" >> /data/pg_hba.conf
fi
mkdir -p /data/socket
exec postgres -D /data -c listen_addresses=* -c unix_socket_directories=/data/socket -c jit=off "$@"
"""
"""As the well-known image does it: the first start makes the cluster, in the volume."""

RECIPES = {
    "busybox": Recipe(changes=('CMD ["/bin/sh"]',)),
    "redis": Recipe(
        programs=("redis-server", "redis-cli"),
        directories=(("data", 0o755, 999),),
        changes=(
            "WORKDIR /data",
            "VOLUME /data",
            "EXPOSE 6379/tcp",
            'CMD ["redis-server","--dir","/data","--protected-mode","no","--appendonly","yes",'
            '"--appendfsync","always"]',
        ),
    ),
    "nginx": Recipe(
        programs=("nginx",),
        directories=(
            ("site", 0o755, 0),
            ("var/lib/nginx", 0o755, 0),
            ("var/log/nginx", 0o755, 0),
        ),
        texts=(("etc/nginx/lab.conf", _NGINX_CONFIGURATION),),
        changes=("EXPOSE 8080/tcp", 'CMD ["nginx","-c","/etc/nginx/lab.conf","-g","user root;"]'),
    ),
    "postgresql": Recipe(
        programs=tuple(
            f"{POSTGRESQL}/bin/{name}" for name in ("postgres", "initdb", "psql", "pg_dump", "pg_amcheck", "pg_isready")
        ),
        trees=(f"{POSTGRESQL}/lib", "/usr/share/postgresql/15", "/usr/share/zoneinfo/Etc"),
        left_out=("bitcode", "pgxs", "man", "llvmjit.so", "sepgsql.so", "pgxml.so", "llvmjit_types.bc"),
        directories=(("data", 0o700, SERVICE_USER),),
        texts=(("bin/start-postgresql", _POSTGRESQL_START),),
        changes=(
            f"ENV PATH={POSTGRESQL}/bin:{PATH} PGHOST=/data/socket PGUSER=service PGDATABASE=postgres TZ=Etc/UTC",
            "USER service",
            "VOLUME /data",
            "EXPOSE 5432/tcp",
            'ENTRYPOINT ["sh","/bin/start-postgresql"]',
        ),
    ),
    "python": Recipe(
        programs=("/usr/bin/python3.11",),
        trees=("/usr/lib/python3.11",),
        left_out=(
            "__pycache__",
            "test",
            "idlelib",
            "ensurepip",
            "lib2to3",
            "tkinter",
            "pydoc_data",
            "config-3.11-x86_64-linux-gnu",
        ),
        changes=("ENV PYTHONDONTWRITEBYTECODE=1", 'CMD ["python3.11"]'),
    ),
}

BASE_CHANGES = (f"ENV PATH={PATH}",)
BASE_DIRECTORIES = (
    ("bin", 0o755, 0),
    ("dev", 0o755, 0),
    ("etc", 0o755, 0),
    ("proc", 0o755, 0),
    ("root", 0o700, 0),
    ("run", 0o755, 0),
    ("sys", 0o755, 0),
    ("tmp", 0o1777, 0),
    ("var", 0o755, 0),
)
BASE_FILES = {
    "etc/passwd": (
        "root:x:0:0:root:/root:/bin/sh\nservice:x:999:999:service:/:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n"
    ),
    "etc/group": "root:x:0:\nservice:x:999:\nnogroup:x:65534:\n",
    "etc/nsswitch.conf": "hosts: files dns\n",
}

_LDD = re.compile(r"(?:^|=> )\s*(/\S+)", re.MULTILINE)


def _program(name: str) -> Path:
    found = shutil.which(name, path=PATH)
    if found is None:
        raise LabError(f"the program {name} is not installed, so no image can be made of it; scripts/setup installs it")
    return Path(found)


def libraries(*programs: Path) -> list[str]:
    """Paths of the shared objects that ``programs`` load, the loader included; none for a static one."""
    if not programs:
        return []
    try:
        found = _LDD.findall(command(["ldd", *map(str, programs)]))
        return sorted({path for path in found if not path.endswith(":")})
    except CommandFailedError:  # "not a dynamic executable"
        return []


def _tree(top: str, left_out: Sequence[str]) -> Iterator[Path]:
    """Every regular file below ``top``, links resolved when read. Raises LabError when there is none."""
    if not Path(top).is_dir():
        raise LabError(f"{top} is not installed, so no image can be made of it; scripts/setup installs it")
    for place, directories, names in os.walk(top):
        directories[:] = sorted(set(directories) - set(left_out))
        yield from (Path(place, name) for name in sorted(set(names) - set(left_out)) if Path(place, name).is_file())


def _contents(recipe: Recipe) -> dict[str, Path]:
    """Path in the image (relative): the installed file."""
    busybox = _program("busybox")
    files = {"bin/busybox": busybox}
    files |= {path.lstrip("/"): Path(path) for path in libraries(busybox)}
    for name in recipe.programs:
        program = _program(name)
        files[str(program).lstrip("/")] = program
        files |= {path.lstrip("/"): Path(path) for path in libraries(program)}
    found = [path for top in recipe.trees for path in _tree(top, recipe.left_out)]
    files |= {str(path).lstrip("/"): path for path in found}
    files |= {path.lstrip("/"): Path(path) for path in libraries(*(path for path in found if path.suffix == ".so"))}
    return files


def _entry(name: str, kind: bytes, mode: int, owner: int = 0) -> tarfile.TarInfo:
    """A tar header with nothing in it that changes from one build to the next."""
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.uid, info.gid, info.mtime = kind, mode, owner, owner, 0
    return info


def write_tar(
    place: Path,
    files: Mapping[str, Path],
    directories: Iterable[tuple[str, int, int]],
    texts: Iterable[tuple[str, str]] = (),
) -> None:
    """The image's tree as a tar: busybox, its applets, ``files`` (symlinks resolved), ``directories``, ``texts``."""
    made = {name for name, _, _ in BASE_DIRECTORIES}
    with tarfile.open(place, "w", format=tarfile.PAX_FORMAT) as tar:

        def add_parents(name: str) -> None:
            for parent in reversed(Path(name).parents[:-1]):
                if str(parent) not in made:
                    made.add(str(parent))
                    tar.addfile(_entry(str(parent), tarfile.DIRTYPE, 0o755))

        for name, mode, owner in (*BASE_DIRECTORIES, *directories):
            made.add(name)
            tar.addfile(_entry(name, tarfile.DIRTYPE, mode, owner))
        for name, installed in sorted(files.items()):
            add_parents(name)
            data = installed.read_bytes()
            info = _entry(name, tarfile.REGTYPE, installed.stat().st_mode & 0o755)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, text in (*BASE_FILES.items(), *texts):
            add_parents(name)
            info = _entry(name, tarfile.REGTYPE, 0o644)
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
        for applet in command(["busybox", "--list"]).split():
            if applet != "busybox" and f"bin/{applet}" not in files:
                link = _entry(f"bin/{applet}", tarfile.SYMTYPE, 0o777)
                link.linkname = "busybox"
                tar.addfile(link)


def tar_of(name: str) -> Path:
    """The cached tar of the image ``name``, made if something that goes in has changed. Raises LabError."""
    recipe = RECIPES.get(name)
    if recipe is None:
        raise LabError(f"the lab has no image {name!r}; it has {', '.join(RECIPES)}")
    files = _contents(recipe)
    texts = [recipe.texts] if recipe.texts else []
    digest = hashlib.sha256(json.dumps([BASE_FILES, BASE_DIRECTORIES, recipe.directories, *texts]).encode())
    for inside, installed in sorted(files.items()):
        facts = installed.stat()
        digest.update(f"{inside}\0{installed.resolve()}\0{facts.st_size}\0{facts.st_mtime_ns}\0".encode())
    place = CACHE / f"{name}-{digest.hexdigest()[:16]}.tar"
    if not place.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        partial = place.with_suffix(f".{os.getpid()}")
        try:
            write_tar(partial, files, recipe.directories, recipe.texts)
            partial.replace(place)
        finally:
            partial.unlink(missing_ok=True)
        for stale in CACHE.glob(f"{name}-*.tar"):
            if stale != place:
                stale.unlink(missing_ok=True)
    return place


def load(host: Host, name: str) -> str:
    """Make sure that the image is on the host; returns its tag, ``cargo-lab/<name>:<digest>``.

    The tag says what is in it, so an image that is there already is not imported again.
    """
    import docker  # noqa: PLC0415 - the rest of the lab works without the SDK

    place = tar_of(name)
    version = place.stem.rpartition("-")[2]
    repository = f"cargo-lab/{name}"
    client = host.docker_client()
    try:
        try:
            client.images.get(f"{repository}:{version}")
        except docker.errors.ImageNotFound:
            said = client.api.import_image_from_file(
                str(place), repository, version, changes=[*BASE_CHANGES, *RECIPES[name].changes]
            )
            if '"error"' in said:
                raise LabError(f"dockerd on {host.spec.name} did not take the image {name}: {said}") from None
        client.api.tag(f"{repository}:{version}", repository, "latest")
    except (docker.errors.DockerException, OSError) as error:
        raise LabError(f"the image {name} cannot be loaded on {host.spec.name}: {error}") from error
    finally:
        client.close()
    return f"{repository}:{version}"


def share(name: str, hosts: Sequence[Host]) -> str:
    """The very same image on all ``hosts``: imported on the first, carried to the others. Returns its tag.

    An import makes another image on each host, because it notes the time; Cargo moves a container only onto the
    very image it runs on.
    """
    first, *others = hosts
    tag = load(first, name)
    image = first.docker_client().images.get(tag)
    for host in others:
        client = host.docker_client()
        # Not by the id, which is another one in another kind of store.
        if not any(_moment(known.attrs) == _moment(image.attrs) for known in client.images.list()):
            client.images.load(b"".join(image.save(named=tag)))
    return tag


def _moment(inspected: dict[str, Any]) -> tuple[Any, Any]:
    return inspected["Created"], inspected["RootFS"]["Layers"]
