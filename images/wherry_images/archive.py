"""The Debian archive: choosing packages with apt, and fetching the ones that are locked.

apt runs on directories of its own, so it needs no root and sees nothing of the host's packages;
of the host's configuration it keeps the proxy, and the mirror when the host is a Debian.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from wherry.core.errors import WherryError
from wherry.core.files import sha256
from wherry.core.processes import run
from wherry_images.lock import UPDATE_LOCK, LockedPackage

DEFAULT_MIRROR = "http://deb.debian.org/debian"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
# apt's own downloader: it follows the host's proxy settings and checks the hash it is given.
APT_HELPER = "/usr/lib/apt/apt-helper"
APT_TIMEOUT_S = 600
# Enough to hide the round trips of small packages, few enough to be a polite client.
PARALLEL_DOWNLOADS = 4
DOWNLOAD_ATTEMPTS = 3


# A line of sources.list or the URIs field of a .sources file.
_MIRROR = re.compile(r"(?:deb\s+(?:\[[^]]*\]\s+)?|URIs:\s*)(https?://\S+/debian)/?(?:\s|$)")


def mirror_in(sources: Iterable[str]) -> str:
    """Return the first Debian mirror in the texts of apt's source files, or the default one.

    Reads both formats of sources.list(5).
    """
    for text in sources:
        for line in text.splitlines():
            match = _MIRROR.match(line)
            if match:
                return match[1]
    return DEFAULT_MIRROR


def host_mirror() -> str:
    """Return the Debian mirror the host uses."""
    directory = Path("/etc/apt")
    files = [directory / "sources.list", *sorted((directory / "sources.list.d").glob("*"))]
    return mirror_in(file.read_text() for file in files if file.is_file())


def archive_url(archive: str, mirror: str) -> str:
    """Return the address of `archive`, which is "debian" or "debian-security", beside `mirror`."""
    return mirror.removesuffix("/debian") + "/" + archive


class Apt:
    """apt for one architecture in a directory of its own."""

    def __init__(
        self,
        directory: Path,
        *,
        mirror: str,
        architecture: str,
        suite: str,
        pinned_suite: str,
        pinned: Sequence[str],
    ) -> None:
        """Prepare `directory`; `architecture` is Debian's name. `update` comes next."""
        for name in ("etc/preferences.d", "lists/partial", "cache/archives/partial"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        (directory / "status").touch()
        security = archive_url("debian-security", mirror)
        # The Release file of a testing suite on a mirror can be past its Valid-Until; what is
        # chosen ends in the lock by sha256 and is read by a person, so that suite's date is let go.
        (directory / "etc/sources.list").write_text(
            f"deb [signed-by={KEYRING}] {mirror} {suite} main\n"
            f"deb [signed-by={KEYRING}] {mirror} {suite}-updates main\n"
            f"deb [signed-by={KEYRING}] {security} {suite}-security main\n"
            f"deb [signed-by={KEYRING} check-valid-until=no] {mirror} {pinned_suite} main\n"
        )
        (directory / "etc/preferences").write_text(
            f"Package: *\nPin: release n={pinned_suite}\nPin-Priority: 100\n\n"
            f"Package: {' '.join(pinned)}\nPin: release n={pinned_suite}\nPin-Priority: 900\n"
        )
        settings = {
            "Dir::State": directory,
            "Dir::State::lists": directory / "lists",
            "Dir::State::status": directory / "status",
            "Dir::Cache": directory / "cache",
            "Dir::Etc": directory / "etc",
            "APT::Architecture": architecture,
            "APT::Architectures": architecture,
            "APT::Install-Recommends": "false",
            "Acquire::Languages": "none",
        }
        self._options = [f"-o{key}={value}" for key, value in settings.items()]

    def update(self) -> None:
        """Fetch the suites' indexes. Raises WherryError."""
        _apt(["apt-get", *self._options, "--error-on=any", "update"])

    def resolve(self, names: Sequence[str]) -> list[LockedPackage]:
        """Return the packages that installing `names` on an empty system brings.

        Raises WherryError when apt finds no solution.
        """
        plan = _apt(["apt-get", *self._options, "--simulate", "install", *names])
        chosen = re.findall(r"^Inst (\S+) \((\S+) ", plan, re.MULTILINE)
        records = _apt(
            [
                "apt-cache",
                *self._options,
                "show",
                *(f"{name}={version}" for name, version in chosen),
            ]
        )
        return parse_records(records)


def _apt(argv: Sequence[str]) -> str:
    hint = "apt and debian-archive-keyring have to be installed, and the mirror reachable"
    return run(argv, timeout_s=APT_TIMEOUT_S, hint=hint).stdout.decode()


def parse_records(text: str) -> list[LockedPackage]:
    """Return the packages in `text`, stanzas as `apt-cache show` prints them (deb-control(5))."""
    packages = {}
    for stanza in text.strip().split("\n\n"):
        fields = dict(re.findall(r"^([\w-]+): (.*)$", stanza, re.MULTILINE))
        path = fields["Filename"]
        packages[fields["Package"]] = LockedPackage(
            name=fields["Package"],
            version=fields["Version"],
            # The security archive keeps its pool under updates/.
            archive="debian-security" if path.startswith("pool/updates/") else "debian",
            path=path,
            size=int(fields["Size"]),
            sha256=fields["SHA256"],
        )
    return sorted(packages.values())


def fetch(
    packages: Sequence[LockedPackage],
    cache: Path,
    *,
    mirror: str,
    progress: Callable[[str], None],
) -> None:
    """Make sure that `cache` holds every one of `packages`, by its sha256.

    Raises WherryError, which names every locked package the archive no longer has.
    """
    cache.mkdir(parents=True, exist_ok=True)
    missing = [package for package in packages if not _is_cached(package, cache)]
    if not missing:
        return
    megabytes = sum(package.size for package in missing) / 1e6
    progress(f"fetching {len(missing)} packages, {megabytes:.0f} MB")

    def fetch_some(part: Sequence[LockedPackage]) -> list[LockedPackage]:
        return [package for package in part if not _fetch_one(package, cache, mirror)]

    parts = [missing[start::PARALLEL_DOWNLOADS] for start in range(PARALLEL_DOWNLOADS)]
    with ThreadPoolExecutor(PARALLEL_DOWNLOADS) as pool:
        lost = [package for part in pool.map(fetch_some, parts) for package in part]
    if lost:
        raise WherryError(lost_message(lost, mirror), hint=UPDATE_LOCK)


_GONE = re.compile(r"\S  (404|410)\b")
"""How apt reports that a server no longer has a file: after the address, which may hold numbers
too, and before the server's own words."""


def lost_message(lost: Iterable[LockedPackage], mirror: str) -> str:
    """Return one line that says which locked packages `mirror` does not have."""
    names = ", ".join(f"{package.name} {package.version}" for package in sorted(lost))
    return f"{mirror} no longer has these locked packages: {names}"


def _is_cached(package: LockedPackage, cache: Path) -> bool:
    file = cache / package.file_name
    return file.is_file() and file.stat().st_size == package.size and sha256(file) == package.sha256


def _fetch_one(package: LockedPackage, cache: Path, mirror: str) -> bool:
    url = f"{archive_url(package.archive, mirror)}/{package.path}"
    target = cache / package.file_name
    partial = target.with_suffix(".partial")
    command = [APT_HELPER, "download-file", url, str(partial), f"SHA256:{package.sha256}"]
    # apt 3 cannot try again by itself: it refuses the file that its first attempt has left.
    command += ["-o", "Acquire::Retries=0"]
    for left in reversed(range(DOWNLOAD_ATTEMPTS)):
        try:
            _apt(command)
            break
        except WherryError as error:
            partial.unlink(missing_ok=True)
            if _GONE.search(error.message):
                return False
            if not left:
                raise
    partial.replace(target)
    return True
