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
    local packages
    case $(uname -s) in
        Linux)
            command -v apt-get >/dev/null ||
                die "this script knows Debian and macOS; elsewhere install QEMU 7.2 or newer, mmdebstrap, Python 3.11 and OpenSSH, then: pip install ."
            packages=$(qemu_packages)
            # shellcheck disable=SC2086 # a list of words
            need_packages $packages mmdebstrap openssh-client curl ca-certificates
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
    # pip comes last, so what an interruption or an upgrade of Python left is made anew.
    "$venv/bin/pip" --version >/dev/null 2>&1 || python3 -m venv --clear "$venv"
    local wanted
    wanted="$1 $(cksum <"$top/pyproject.toml")"
    if [ "$(cat "$venv/.prepared" 2>/dev/null)" != "$wanted" ]; then
        say "Installing wherry into $venv"
        "$venv/bin/pip" install -q --disable-pip-version-check -e "$top$1"
        echo "$wanted" >"$venv/.prepared"
    fi
    PATH=$venv/bin:$PATH
}

# Print the directory of the newest guest image for this computer; nothing if there is none.
image_directory() {
    wherry image list --json | python3 -c '
import json, sys
here = {"arm64": "aarch64"}.get(sys.argv[1], sys.argv[1])
found = [image["directory"] for image in json.load(sys.stdin) if image["architecture"] == here]
print(*found[:1])' "$(uname -m)"
}

# What runs the tests of Windows: Wine, and a compiler for one function that it lacks.
prepare_wine() {
    [ "$(uname -sm)" = "Linux x86_64" ] || die "Wine runs Windows' programs on x86_64 Linux alone"
    need_packages wine64 gcc-mingw-w64-x86-64-win32
    say "Windows' Python under Wine (the first time takes a minute)"
    python "$top/tests/support/wine.py" -c pass
}

# Have the guest image of this checkout: built here on Linux, the released one elsewhere.
prepare_image() {
    local present
    if [ "$(uname -s)" = Linux ]; then
        say "The guest image (the first build takes 2 to 3 minutes)"
        wherry image build >&2
        return
    fi
    present=$(image_directory)
    if [ -z "$present" ]; then
        say "Fetching the guest image"
        wherry image pull >&2
    fi
}

# Put a docker CLI on PATH when there is none: Homebrew's, or the one of the guest image.
# Sets $clients to the directory of the latter if it is used, and $plugins to where its
# plugins are; both are empty when there was a docker already.
prepare_docker_cli() {
    clients='' plugins=''
    command -v docker >/dev/null && return
    if [ "$(uname -s)" = Darwin ]; then
        say "Installing the docker CLI"
        brew install docker docker-buildx docker-compose
        plugins=$(brew --prefix)/lib/docker/cli-plugins
        return
    fi
    clients=$(image_directory)/clients
    if [ ! -x "$clients/docker" ]; then
        say "Building the guest image anew, as this one came without a docker CLI"
        wherry image build --force >&2
        clients=$(image_directory)/clients
    fi
    plugins=$clients/cli-plugins
    PATH=$clients:$PATH
}

# Link the plugins in directory $1 to where the docker CLI looks for the user's. A link of an
# earlier run follows the image; what the user put there stays.
link_docker_plugins() {
    local directory=${DOCKER_CONFIG:-$HOME/.docker}/cli-plugins name present
    mkdir -p "$directory"
    for name in docker-buildx docker-compose; do
        present=$(readlink "$directory/$name" || true)
        if [ ! -e "$directory/$name" ] || [ "$present" != "${present%"/clients/cli-plugins/$name"}" ]; then
            ln -sfn "$1/$name" "$directory/$name"
        fi
    done
}

# Let this user unpack whole systems without root, which takes a range of subordinate users
# (subuid(5)). adduser gives one to new users; some, such as those of a directory service, lack it.
prepare_subordinate_users() {
    need_packages uidmap
    [ "$(id -u)" = 0 ] && return
    local name file first
    name=$(id -un)
    for file in /etc/subuid /etc/subgid; do
        grep -q "^$name:" "$file" 2>/dev/null && continue
        first=$(cat "$file" 2>/dev/null | awk -F: '
            BEGIN { first = 100000 }
            $2 + $3 > first { first = $2 + $3 }
            END { print first }' || true)
        as_root usermod "--add-${file##*/}s" "$first-$((first + 65535))" "$name"
    done
}

# Fetch what the tests with real Docker clients use, into the user's cache, once.
prepare_clients() {
    say "Docker clients for the tests (the first time takes a minute)"
    python "$top/tests/support/downloads.py"
}
