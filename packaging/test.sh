#!/usr/bin/env bash
# Everything the tests need, then every test but those marked endurance. Arguments go to pytest, for example:
#   packaging/test.sh tests/unit          packaging/test.sh -m 'not vm'
# Those of Windows run under Wine, and only when they are asked for:
#   packaging/test.sh -m windows          packaging/test.sh -m windows -k pipes
set -euo pipefail
# shellcheck source=packaging/prepare.sh
. "$(dirname "$0")/prepare.sh"

# Print what differs from what was committed; nothing where this is no checkout of git's.
changes() {
    if [ -e "$top/.git" ] && command -v git >/dev/null; then
        git -C "$top" status --porcelain || true # as where it is another user's
    fi
}
before=$(changes)

# Exit with a status, or fail if what has run since has changed the checkout.
leave() {
    local after
    after=$(changes)
    if [ "$after" != "$before" ]; then
        say "The tests have left changes in the checkout; git status, before and after:"
        diff <(printf '%s\n' "$before") <(printf '%s\n' "$after") >&2 || true
        exit 1
    fi
    exit "$1"
}

if [ "${1-} ${2-}" = "-m windows" ]; then
    prepare_python "[test]"
    prepare_wine
    cd "$top"
    status=0
    python tests/support/wine.py -m pytest "$@" tests/windows || status=$?
    leave "$status"
fi

prepare_system
if [ "$(uname -s)" = Linux ]; then
    need_packages openssh-server qemu-system-x86 qemu-system-arm e2fsprogs zsh fish
    prepare_subordinate_users
fi
prepare_python "[test]"

# Machines of the tests live apart from the user's; images are shared, being expensive.
prepare_image
prepare_docker_cli
prepare_clients

cd "$top"
status=0
if [ $# -gt 0 ]; then
    python -m pytest "$@" || status=$?
    leave "$status"
fi

# Two runs side by side: one with a machine, and one without, which waits for much and says what
# it has to say when the first has ended. Neither is killed: what tests have made, they remove.
work=$(mktemp -d)
others=
finish() {
    if [ -n "$others" ]; then
        wait "$others" || true
        cat "$work/others"
    fi
    rm -rf "$work"
}
trap finish EXIT
# A shell's background jobs ignore an interrupt, unless they are told otherwise.
(
    trap - INT
    exec python -m pytest -p no:cacheprovider tests/unit tests/integration
) >"$work/others" 2>&1 &
others=$!
python -m pytest tests/vm tests/clients || status=$?
say "The tests without a machine"
wait "$others" || status=$?
others=
cat "$work/others"
leave "$status"
