# shellcheck shell=bash
# Sourced by try.sh and test.sh: what both need, installed only where it is missing.

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$top/.venv

say() { printf '\n== %s\n' "$*" >&2; }
die() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 1
}

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        die "installing packages needs root, and there is no sudo: run as root: $*"
    fi
}

# Install the named Debian packages that are not there yet.
need_packages() {
    local missing=() package
    for package in "$@"; do
        dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed ||
            missing+=("$package")
    done
    [ ${#missing[@]} = 0 ] && return
    say "Installing ${missing[*]}"
    as_root apt-get -qq update || true # one unreachable source must not hide the others
    as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get -qq install --no-install-recommends "${missing[@]}" >/dev/null
}

qemu_packages() {
    case $(uname -m) in
        x86_64) echo qemu-system-x86 qemu-utils ;;
        aarch64) echo qemu-system-arm qemu-utils ;;
        *) die "wherry runs on x86_64 and arm64, not on $(uname -m)" ;;
    esac
}

# What running wherry needs of the system.
prepare_system() {
    case $(uname -s) in
        Linux)
            command -v apt-get >/dev/null ||
                die "this script knows Debian and macOS; elsewhere install QEMU 7.2 or newer, mmdebstrap, Python 3.11 and OpenSSH, then: pip install ."
            # shellcheck disable=SC2046 # a list of words
            need_packages $(qemu_packages) mmdebstrap openssh-client curl ca-certificates
            python3 -c 'import ensurepip, venv' 2>/dev/null || need_packages python3-venv
            ;;
        Darwin)
            command -v brew >/dev/null || die "Homebrew is needed to install QEMU: https://brew.sh"
            command -v qemu-img >/dev/null || brew install qemu
            python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || brew install python@3.13
            ;;
        *) die "this script runs on Debian and macOS" ;;
    esac
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "Python 3.11 or newer is needed; python3 is $(python3 --version)"
}

# Install wherry, with the extras named in $1, into a virtual environment in the checkout.
prepare_python() {
    [ -x "$venv/bin/python" ] || python3 -m venv "$venv"
    local wanted
    wanted="$1 $(cksum <"$top/pyproject.toml")"
    if [ "$(cat "$venv/.prepared" 2>/dev/null)" != "$wanted" ]; then
        say "Installing wherry into $venv"
        "$venv/bin/pip" install -q --disable-pip-version-check -e "$top$1"
        echo "$wanted" >"$venv/.prepared"
    fi
    PATH=$venv/bin:$PATH
}

# Have the guest image of this checkout: built here on Linux, the released one elsewhere.
prepare_image() {
    if [ "$(uname -s)" = Linux ]; then
        say "The guest image (the first build takes 2 to 3 minutes)"
        wherry image build >&2
    elif [ "$(wherry image list --json)" = "[]" ]; then
        say "Fetching the guest image"
        wherry image pull >&2
    fi
}

# Put the docker CLI of the guest image on PATH when there is no other.
prepare_docker_cli() {
    command -v docker >/dev/null && return
    local clients
    clients=$(wherry image list --json |
        python3 -c 'import json, sys; print(json.load(sys.stdin)[0]["directory"] + "/clients")')
    [ -x "$clients/docker" ] ||
        die "there is no docker CLI on PATH; on macOS: brew install docker docker-buildx"
    PATH=$clients:$PATH
}

# Fetch what the tests with real Docker clients use, into the user's cache, once.
prepare_clients() {
    say "Docker clients for the tests (the first time takes a minute)"
    python "$top/tests/support/downloads.py"
}
