"""Proxies of this computer, from the environment of a start to what the engine is given."""

from __future__ import annotations

import json

from fake_host import FakeHost


def test_a_start_gives_the_engine_the_environment_s(host: FakeHost) -> None:
    """With this computer's own address as the guest has to call it."""
    for name in [name for name in host.env if name.lower().endswith("_proxy")]:
        del host.env[name]
    host.good("start", https_proxy="http://localhost:3128", no_proxy="one.test,two.test")
    given = json.loads((host.paths.directory / "daemon.json").read_bytes())["proxies"]
    assert given["https-proxy"] == "http://10.0.2.2:3128"
    assert given["no-proxy"].startswith("one.test,two.test,")
    assert "http-proxy" not in given
    host.good("stop")
    host.good("start")
    assert json.loads((host.paths.directory / "daemon.json").read_bytes()) == {}
