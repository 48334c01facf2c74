"""The two Ed25519 key pairs of a machine: the user's and the guest's.

We make both: the host key goes into the guest with its first boot, so from the
first connection on exactly one key is accepted, and nothing is trusted on first use.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

from wherry.core.errors import TunnelError
from wherry.core.files import write_atomic

USER_KEY = "user_ed25519"
HOST_KEY = "host_ed25519"

_DAMAGED_HINT = "restore the file from a backup, or delete the machine and make it anew"


@dataclass(frozen=True)
class KeyPair:
    """An Ed25519 key pair in OpenSSH's formats.

    :param private: the private key (``-----BEGIN OPENSSH PRIVATE KEY-----``).
    :param public: the public key as in ``authorized_keys``, without comment or newline.
    """

    private: bytes
    public: str

    def __repr__(self) -> str:
        """Without the private half, which must not reach a log."""
        return f"KeyPair({self.public!r})"


@dataclass(frozen=True)
class MachineKeys:
    """The keys of one machine.

    :param user: authenticates us to the guest.
    :param host: authenticates the guest to us.
    :param user_path: the file of the user's private key, for OpenSSH's ``IdentityFile``.
    """

    user: KeyPair
    host: KeyPair
    user_path: Path


def make_keys(directory: Path) -> MachineKeys:
    """Make a machine's keys, keeping those that exist; ``directory`` exists and is private.

    Each private key is a file of mode 0600 with its public half beside it, ``.pub``.

    :raises OSError: the directory cannot be written.
    :raises TunnelError: a key that exists cannot be used.
    """
    for name, comment in ((USER_KEY, "wherry user"), (HOST_KEY, "wherry guest")):
        path = directory / name
        if not path.exists():
            private = Ed25519PrivateKey.generate()
            write_atomic(
                path, private.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
            )
        pair = _load(path)
        # Written also when the private key exists: a crash may have come between.
        write_atomic(path.with_suffix(".pub"), f"{pair.public} {comment}\n".encode(), mode=0o644)
    return load_keys(directory)


def load_keys(directory: Path) -> MachineKeys:
    """Load what :func:`make_keys` made.

    :raises TunnelError: a key is missing or cannot be read as an Ed25519 key.
    """
    user_path = directory / USER_KEY
    return MachineKeys(_load(user_path), _load(directory / HOST_KEY), user_path)


def known_hosts_line(host: str, port: int, public: str) -> str:
    """Return the line that makes OpenSSH accept the guest's key, and no other.

    The form with brackets is for any port but 22 (sshd(8), SSH_KNOWN_HOSTS FILE FORMAT).
    """
    name = host if port == 22 else f"[{host}]:{port}"
    return f"{name} {public}"


def _public(private: Ed25519PrivateKey) -> str:
    return private.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def _load(path: Path) -> KeyPair:
    try:
        content = path.read_bytes()
        private = load_ssh_private_key(content, password=None)
    except OSError as error:
        raise TunnelError(
            f"the key {path} cannot be read: {error.strerror}", hint=_DAMAGED_HINT
        ) from error
    except Exception as error:  # The library names no common base of what parsing raises.
        raise TunnelError(f"the key {path} is damaged: {error}", hint=_DAMAGED_HINT) from error
    if not isinstance(private, Ed25519PrivateKey):
        raise TunnelError(f"the key {path} is not an Ed25519 key", hint=_DAMAGED_HINT)
    return KeyPair(content, _public(private))
