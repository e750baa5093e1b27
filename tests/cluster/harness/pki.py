"""Certificates and kubeconfigs of one cluster: an authority and a certificate per component, by openssl.

Elliptic keys, because a cluster's ten RSA keys would take longer than its API server's start. Valid 30 days.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.harness.errors import CommandFailed

_DAYS = "30"
_NEW_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]


@dataclass(frozen=True, slots=True)
class Pki:
    """The keys of one cluster, all in one folder. `server` is the API server's address for clients."""

    folder: Path
    server: str

    def create(self, server_names: list[str]) -> None:
        """Make the authorities, the service accounts' key and the API server's and administrator's keys."""
        self.folder.mkdir(parents=True)
        for authority in ("ca", "front"):
            subject = f"/CN=toka-{authority}"
            files = ["-keyout", self.file(f"{authority}.key"), "-out", self.file(f"{authority}.crt")]
            _openssl("req", "-x509", *_NEW_KEY, "-days", _DAYS, *files, "-subj", subject)
        _openssl("ecparam", "-genkey", "-name", "prime256v1", "-noout", "-out", self.file("sa.key"))
        _openssl("ec", "-in", self.file("sa.key"), "-pubout", "-out", self.file("sa.pub"))
        self.issue("apiserver", "/CN=kube-apiserver", server_names)
        self.issue("admin", "/O=system:masters/CN=admin")
        self.issue("aggregator", "/CN=aggregator", authority="front")

    def issue(self, name: str, subject: str, alternative_names: list[str] | None = None, authority: str = "ca") -> Path:
        """Make NAME.crt, NAME.key and NAME.kubeconfig for a component; returns the kubeconfig."""
        extension = self.folder / f"{name}.extension"
        names = ",".join(alternative_names or [f"DNS:{name}"])
        extension.write_text(f"subjectAltName={names}\nextendedKeyUsage=serverAuth,clientAuth\n")
        request = self.file(f"{name}.request")
        _openssl("req", *_NEW_KEY, "-keyout", self.file(f"{name}.key"), "-out", request, "-subj", subject)
        signer = [
            "-CA",
            self.file(f"{authority}.crt"),
            "-CAkey",
            self.file(f"{authority}.key"),
            "-CAcreateserial",
            "-days",
            _DAYS,
        ]
        output = ["-out", self.file(f"{name}.crt"), "-extfile", str(extension)]
        _openssl("x509", "-req", "-in", request, *signer, *output)
        user = f"{{client-certificate: {self.file(name + '.crt')}, client-key: {self.file(name + '.key')}}}"
        return self.write_kubeconfig(name, user)

    def write_kubeconfig(self, name: str, user: str) -> Path:
        """Write NAME.kubeconfig for a user given in YAML's flow style."""
        kubeconfig = self.folder / f"{name}.kubeconfig"
        cluster = f'{{server: "{self.server}", certificate-authority: {self.file("ca.crt")}}}'
        kubeconfig.write_text(
            "apiVersion: v1\nkind: Config\n"
            f"clusters: [{{name: c, cluster: {cluster}}}]\n"
            f"users: [{{name: u, user: {user}}}]\n"
            "contexts: [{name: c, context: {cluster: c, user: u}}]\n"
            "current-context: c\n"
        )
        kubeconfig.chmod(0o600)
        return kubeconfig

    def file(self, name: str) -> str:
        """The path of one of its files."""
        return str(self.folder / name)


def _openssl(*arguments: str) -> None:
    argv = ["openssl", *arguments]
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode != 0:
        raise CommandFailed(argv, done.returncode, done.stdout, done.stderr)
