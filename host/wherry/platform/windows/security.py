"""Who may open what: security descriptors that admit this user alone.

In the language of descriptors (SDDL): ``P`` keeps what the parent would add away, ``A`` allows,
``GA`` and ``FA`` are all rights, and ``OICI`` hands an entry on to what is made inside.
"""

from __future__ import annotations

import errno
import functools
import sys
from pathlib import Path
from typing import Any

import pywintypes
import win32api
import win32con
import win32file
import win32security
import winerror

assert sys.platform == "win32"  # Type checkers look on for Windows alone.

PIPE = "O:{sid}D:P(A;;GA;;;{sid})"
DIRECTORY = "O:{sid}D:P(A;OICI;FA;;;{sid})"

_SDDL_REVISION_1 = 1


@functools.cache
def user_sid() -> str:
    """Return the security identifier of the user of this process."""
    return _token_sid(win32security.TokenUser)


@functools.cache
def own_sids() -> frozenset[str]:
    """Return who may be named as the owner of what this user made.

    It is the group of administrators where an administrator made it with raised rights.
    """
    return frozenset((user_sid(), _token_sid(win32security.TokenOwner)))


def attributes(template: str) -> Any:
    """Return SECURITY_ATTRIBUTES for something new of this user's: a PIPE or a DIRECTORY."""
    made = pywintypes.SECURITY_ATTRIBUTES()
    made.SECURITY_DESCRIPTOR = _descriptor(template)
    return made


def owner(handle: Any, kind: int) -> str:
    """Return the owner of an open object."""
    found = win32security.GetSecurityInfo(handle, kind, win32security.OWNER_SECURITY_INFORMATION)
    return _text(found.GetSecurityDescriptorOwner())


def make_private_directory(path: Path) -> None:
    """See :meth:`wherry.platform.base.Platform.make_private_directory`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = str(path)
    try:
        try:
            win32file.CreateDirectory(name, attributes(DIRECTORY))
            return
        except pywintypes.error as error:
            if error.winerror != winerror.ERROR_ALREADY_EXISTS or not path.is_dir():
                raise
        _narrow(name)
    except pywintypes.error as error:
        raise OSError(0, error.strerror, name, error.winerror) from error


def _narrow(name: str) -> None:
    """Take an existing directory from all but its owner, who must be this user."""
    parts = win32security.OWNER_SECURITY_INFORMATION | win32security.DACL_SECURITY_INFORMATION
    found = win32security.GetNamedSecurityInfo(name, win32security.SE_FILE_OBJECT, parts)
    if _text(found.GetSecurityDescriptorOwner()) not in own_sids():
        raise PermissionError(errno.EPERM, "the directory belongs to another user", name)
    wanted = _descriptor(DIRECTORY).GetSecurityDescriptorDacl()
    now = found.GetSecurityDescriptorDacl()
    if now is not None and _entries(now) == _entries(wanted):
        return
    win32security.SetNamedSecurityInfo(
        name,
        win32security.SE_FILE_OBJECT,
        win32security.DACL_SECURITY_INFORMATION | win32security.PROTECTED_DACL_SECURITY_INFORMATION,
        None,
        None,
        wanted,
        None,
    )


def _entries(acl: Any) -> list[Any]:
    return [acl.GetAce(number) for number in range(acl.GetAceCount())]


def _descriptor(template: str) -> Any:
    return win32security.ConvertStringSecurityDescriptorToSecurityDescriptor(
        template.format(sid=user_sid()), _SDDL_REVISION_1
    )


def _token_sid(part: int) -> str:
    token = win32security.OpenProcessToken(win32api.GetCurrentProcess(), win32con.TOKEN_QUERY)
    try:
        found = win32security.GetTokenInformation(token, part)
    finally:
        token.Close()
    # TOKEN_USER has attributes beside the identifier, TOKEN_OWNER has not.
    sid = found[0] if isinstance(found, tuple) else found
    return _text(sid)


def _text(sid: Any) -> str:
    return str(win32security.ConvertSidToStringSid(sid))
