"""Fixtures that every kind of test may use: above all the one machine that a run boots."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import trustme
from sandbox import Sandbox

from wherry.config.layout import Layout
from wherry.platform import current
from wherry.vm.image import Image, installed

# A shell's background jobs ignore it, and so would all that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def guest_image() -> Image:
    """The newest installed image for this computer; `packaging/test.sh` builds one."""
    platform = current()
    for image in installed(Layout.current(platform)):
        if image.architecture == platform.architecture():
            return image
    pytest.fail("no guest image is installed: run packaging/test.sh, or wherry image build")


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    """The one authority for certificates that the sandbox's computer trusts."""
    return trustme.CA()


@pytest.fixture(scope="session")
def sandbox(tmp_path_factory: pytest.TempPathFactory, authority: trustme.CA) -> Iterator[Sandbox]:
    """One sandbox for the run."""
    made = Sandbox(tmp_path_factory.mktemp("wherry"), authority.cert_pem.bytes())
    yield made
    made.stop_all()


@pytest.fixture(scope="session")
def machine(sandbox: Sandbox, guest_image: Image) -> Sandbox:
    """The one machine, named ``default``, that all tests share; it runs and has busybox."""
    sandbox.wherry("start", "--cpus", "2", "--memory", "2GiB")
    sandbox.add_busybox()
    return sandbox
