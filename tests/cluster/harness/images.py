"""Images without a registry to pull from: a base made of Debian packages, ours from the Dockerfile.

The Dockerfile takes its base as an argument; only the test base carries this machine's certificate
authorities, since the package index may be reached through one of them. `TOKA_BASE_IMAGE` names another base.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

from tests.cluster.harness.errors import CommandFailed
from tests.cluster.harness.node import PAUSE_IMAGE
from tests.cluster.harness.paths import REPOSITORY, cluster_cache, only_one
from tests.cluster.harness.trees import run_checked

TEST_BASE_IMAGE = "localhost/python-base:test"
TARGETS = ("engine", "operator", "client")
_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")

_PAUSE_SOURCE = """\
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>
static void on_signal(int number) {
    if (number == SIGCHLD) { while (waitpid(-1, 0, WNOHANG) > 0); }
    else { _exit(0); }
}
int main(void) {
    signal(SIGINT, on_signal); signal(SIGTERM, on_signal); signal(SIGCHLD, on_signal);
    for (;;) pause();
}
"""


def image_name(target: str) -> str:
    """The local name of one of the project's images."""
    return f"localhost/toka-{target}:dev"


def buildah(*arguments: str) -> list[str]:
    """A buildah command line. Its images are kept apart from the machine's, so that they can be purged."""
    storage = cluster_cache() / "buildah"
    return ["buildah", "--root", str(storage / "root"), "--runroot", str(storage / "run"), *arguments]


def ensure_pause_image() -> None:
    """Make the image that holds a pod's namespaces, as a file that each node imports."""
    archive = _folder() / "pause.tar"
    if archive.exists():
        return
    build = _folder() / "pause"
    build.mkdir(exist_ok=True)
    (build / "pause.c").write_text(_PAUSE_SOURCE)
    subprocess.run(["gcc", "-O2", "-static", "-o", "pause", "pause.c"], check=True, cwd=build)
    dockerfile = 'FROM scratch\nCOPY pause /pause\nUSER 65535:65535\nENTRYPOINT ["/pause"]\n'
    (build / "Dockerfile").write_text(dockerfile)
    run_build([str(build)], PAUSE_IMAGE)
    new = archive.with_suffix(".new")
    new.unlink(missing_ok=True)
    subprocess.run(buildah("push", "-q", PAUSE_IMAGE, f"docker-archive:{new}:{PAUSE_IMAGE}"), check=True)
    new.rename(archive)


def ensure_base_image() -> str:
    """The base of our images: the one that the environment names, else one made of Debian packages."""
    named = os.environ.get("TOKA_BASE_IMAGE")
    if named:
        return named
    inspect = buildah("inspect", "--type", "image", TEST_BASE_IMAGE)
    if subprocess.run(inspect, capture_output=True).returncode != 0:
        _build_base_image()
    return TEST_BASE_IMAGE


def _build_base_image() -> None:
    build = _folder() / "base"
    build.mkdir(exist_ok=True)
    packages = "ca-certificates,python3,python3-venv,libgomp1"
    command = [
        "mmdebstrap",
        "--quiet",
        "--variant=minbase",
        f"--include={packages}",
        _debian_release(),
        "base.tar",
    ]
    subprocess.run(command, check=True, cwd=build)
    shutil.copy(_CERTIFICATES, build / "ca-certificates.crt")
    (build / "Dockerfile").write_text(
        "FROM scratch\nADD base.tar /\n"
        f"COPY ca-certificates.crt {_CERTIFICATES}\n"
        "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "
        f"SSL_CERT_FILE={_CERTIFICATES} PIP_CERT={_CERTIFICATES}\n"
        'CMD ["python3"]\n'
    )
    run_build([str(build)], TEST_BASE_IMAGE)
    shutil.rmtree(build)


def build_image(target: str, extras: str = "") -> str:
    """Build one target of the Dockerfile; layers that have not changed are taken from the last build."""
    arguments = ["--build-arg", f"BASE_IMAGE={ensure_base_image()}", "--build-arg", f"EXTRAS={extras}"]
    started = time.monotonic()
    run_build(["--layers", "--target", target, *arguments, str(REPOSITORY)], image_name(target))
    print(f"image {target}: {time.monotonic() - started:.0f} s", flush=True)
    return image_name(target)


def run_build(arguments: list[str], name: str) -> None:
    """Build `name` as the Dockerfile says that `arguments` lead to. Raises CommandFailed with what buildah wrote.

    chroot isolation: a sandbox may not be allowed to mount a container's own filesystems. One build at a time, because
    each removes all containers at its end: buildah leaves those whose files a step of another stage has mounted.
    """
    argv = buildah("bud", "--isolation=chroot", "--tag", name, *arguments)
    log_file = _folder() / "build.log"
    with only_one(_folder() / ".lock"):
        with log_file.open("w") as log:
            done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        if done.returncode != 0:
            raise CommandFailed(argv, done.returncode, "", log_file.read_text())
        run_checked(buildah("rm", "--all"))


def _folder() -> Path:
    folder = cluster_cache() / "images"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _debian_release() -> str:
    """The machine's own release, since its package lists and keys are at hand."""
    for line in Path("/etc/os-release").read_text().splitlines():
        key, _, value = line.partition("=")
        if key == "VERSION_CODENAME":
            return value.strip('"')
    return "bookworm"
