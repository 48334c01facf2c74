"""``testcontainers`` of PyPI and npm, each in a program of its own as their users write it.

Their reaper, Ryuk, is left out: it is published as an image on Docker Hub alone
(``testcontainers/ryuk``), in no package registry, so the documented
``TESTCONTAINERS_RYUK_DISABLED=true`` takes its place, and the programs remove their
containers themselves. What Ryuk needs of an engine, the mounted socket and a published
port, other tests have. Where it can be pulled, it needs
``TESTCONTAINERS_DOCKER_SOCKET_OVERRIDE=/var/run/docker.sock``, the engine's socket as
containers see it, since the endpoint's own path exists on the host alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from docker_clients import Clients

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]

SETTINGS = {
    "TESTCONTAINERS_RYUK_DISABLED": "true",
    # Where the tests run in a container themselves, both look for published ports on the
    # engine's bridge, as a container beside them would; wherry's are on localhost.
    "TESTCONTAINERS_HOST_OVERRIDE": "localhost",
    "TESTCONTAINERS_CONNECTION_MODE": "docker_host",
}

PYTHON = """
import urllib.request
from testcontainers.core.container import DockerContainer
from testcontainers.core.network import Network
from testcontainers.core.wait_strategies import HttpWaitStrategy, LogMessageWaitStrategy

server = (
    DockerContainer("busybox")
    .with_command(["sh", "-c", "echo served >/index.html; echo is-ready; exec httpd -f -h /"])
    .with_exposed_ports(80)
    .with_network_aliases("server")
)
with Network() as network, server.with_network(network).waiting_for(
    LogMessageWaitStrategy("is-ready")
):
    HttpWaitStrategy(80).for_status_code(200).wait_until_ready(server)
    host, port = server.get_container_host_ip(), server.get_exposed_port(80)
    with urllib.request.urlopen(f"http://{host}:{port}/", timeout=20) as answer:
        assert answer.read() == b"served\\n"
    assert server.exec(["cat", "/index.html"]) == (0, b"served\\n")
    assert b"is-ready" in server.get_logs()[0]
    with DockerContainer("busybox").with_network(network).with_command("sleep 1000") as other:
        assert other.exec("wget -qO- http://server") == (0, b"served\\n")
print("passed")
"""

NODE = """
const { GenericContainer, Wait, Network } = require("testcontainers");
const assert = require("node:assert");

(async () => {
  const network = await new Network().start();
  const server = await new GenericContainer("busybox")
    .withCommand(["sh", "-c", "echo served >/index.html; echo is-ready; exec httpd -f -h /"])
    .withExposedPorts(80)
    .withNetwork(network)
    .withCopyContentToContainer([{ content: "copied", target: "/tmp/copied" }])
    .withWaitStrategy(Wait.forAll([
      Wait.forLogMessage("is-ready"),
      Wait.forHttp("/", 80),
    ]).withDeadline(120000))
    .withStartupTimeout(120000)
    .start();
  const answer = await fetch(`http://${server.getHost()}:${server.getMappedPort(80)}/`);
  assert.equal(await answer.text(), "served\\n");
  const { output, exitCode } = await server.exec(["cat", "/tmp/copied"]);
  assert.deepEqual([output, exitCode], ["copied", 0]);
  await server.stop({ timeout: 1000 });
  await network.stop();
  console.log("passed");
})().catch((error) => { console.error(error); process.exit(1); });
"""

DEFAULT_WAIT = """
const { GenericContainer } = require("testcontainers");

(async () => {
  const server = await new GenericContainer("busybox")
    .withCommand(["httpd", "-f"])
    .withExposedPorts(80)
    .withStartupTimeout(120000)
    .start();
  await server.stop({ timeout: 1000 });
  console.log("passed");
})().catch((error) => { console.error(error); process.exit(1); });
"""


def test_python(clients: Clients, tmp_path: Path) -> None:
    """A server is awaited by its log and by HTTP, asked on its port, and gone afterwards."""
    program = tmp_path / "program.py"
    program.write_text(PYTHON)
    done = clients.run([sys.executable, program], timeout=200, **SETTINGS)
    assert done.stdout.splitlines()[-1] == b"passed"
    assert clients.said("ps", "-aq") == ""


@pytest.mark.parametrize("text", [NODE, DEFAULT_WAIT], ids=["log and http", "default wait"])
def test_node(clients: Clients, node: dict[str, str], tmp_path: Path, text: str) -> None:
    program = tmp_path / "program.cjs"
    program.write_text(text)
    done = clients.run([node["NODE"], program], timeout=200, **node, **SETTINGS)
    assert done.stdout.splitlines()[-1] == b"passed"
    assert clients.said("ps", "-aq") == ""
