"""Fixtures that every kind of test may use: above all the one machine that a run boots."""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterator

import pytest
import trustme
from sandbox import Sandbox

from wherry.config.layout import Layout
from wherry.platform import current
from wherry.vm.image import Image, installed

_SHOWN_LINES = 30

# A shell's background jobs ignore it, and so would all that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport]:
    """Show what the run's machine and its QEMU have said when a test that uses it fails."""
    report = yield
    sandbox = getattr(item, "funcargs", {}).get("sandbox")
    if report.failed and isinstance(sandbox, Sandbox):
        for path in sorted((sandbox.home / "machines" / "default").glob("*.log")):
            lines = path.read_text(errors="replace").splitlines()[-_SHOWN_LINES:]
            report.sections.append((f"{path.name}, its end", "\n".join(lines)))
    return report


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
