"""Debian's docker-registry on this computer's loopback, with TLS."""

from __future__ import annotations

import socket
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trustme
from downloads import debian_root
from sandbox import wait_until

HOST = "host.docker.internal"
"""This computer, as the engine in the guest sees it."""

_CONFIG = """\
version: 0.1
log: {{level: warn, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {directory}/blobs}}}}
http:
  addr: 127.0.0.1:{port}
  tls: {{certificate: {directory}/server.pem, key: {directory}/server.key{clients}}}
"""


@contextmanager
def tls_registry(
    directory: Path, authority: trustme.CA, *, clients: trustme.CA | None = None
) -> Iterator[str]:
    """Run a registry; yield its name as the engine has to use it, ``HOST:PORT``.

    :param directory: an empty one.
    :param authority: whose certificate it shows.
    :param clients: an authority that has to have signed the certificate of each client.
    """
    with tarfile.open(debian_root()) as debian:
        debian.extract("./usr/bin/docker-registry", directory, filter="data")
    certificate = authority.issue_cert(HOST)
    certificate.private_key_pem.write_to_path(directory / "server.key")
    for part in certificate.cert_chain_pems:
        part.write_to_path(directory / "server.pem", append=True)
    asked = ""
    if clients is not None:
        clients.cert_pem.write_to_path(directory / "clients.pem")
        asked = f", clientcas: [{directory}/clients.pem]"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = directory / "registry.yml"
    config.write_text(_CONFIG.format(directory=directory, port=port, clients=asked))
    with (directory / "registry.log").open("wb") as log:
        process = subprocess.Popen(
            [directory / "usr/bin/docker-registry", "serve", config], stdout=log, stderr=log
        )
        try:

            def listens() -> bool:
                assert process.poll() is None, (directory / "registry.log").read_text()
                with socket.socket() as probe:
                    return probe.connect_ex(("127.0.0.1", port)) == 0

            wait_until(listens, 20, "the registry listens")
            yield f"{HOST}:{port}"
        finally:
            process.terminate()
            process.wait(10)
