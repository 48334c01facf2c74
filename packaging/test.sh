#!/usr/bin/env bash
# Everything the tests need, then every test. Arguments go to pytest, for example:
#   packaging/test.sh tests/unit          packaging/test.sh -m 'not vm'
# Those of Windows run under Wine, and only when they are asked for:
#   packaging/test.sh -m windows          packaging/test.sh -m windows -k pipes
set -euo pipefail
# shellcheck source=packaging/prepare.sh
. "$(dirname "$0")/prepare.sh"

if [ "${1-} ${2-}" = "-m windows" ]; then
    prepare_python "[test]"
    prepare_wine
    cd "$top"
    exec python tests/support/wine.py -m pytest "$@" tests/windows
fi

prepare_system
if [ "$(uname -s)" = Linux ]; then
    need_packages openssh-server qemu-system-x86 qemu-system-arm zsh fish
    prepare_subordinate_users
fi
prepare_python "[test]"

# Machines of the tests live apart from the user's; images are shared, being expensive.
prepare_image
prepare_docker_cli
prepare_clients

cd "$top"
exec python -m pytest "$@"
