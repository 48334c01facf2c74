#!/usr/bin/env bash
# From a clean machine to a container that answers: installs what is missing, builds or
# fetches the guest image, starts a machine, builds a small web service and asks it.
# Run again, it does only what is left to do.
set -euo pipefail
# shellcheck source=packaging/prepare.sh
. "$(dirname "$0")/prepare.sh"

port=${WHERRY_DEMO_PORT:-8080}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

prepare_system
prepare_python ""
prepare_image
prepare_docker_cli
[ -z "$plugins" ] || link_docker_plugins "$plugins"

say "Starting the machine"
wherry start
DOCKER_HOST=$(wherry status --json | python3 -c 'import json, sys; print(json.load(sys.stdin)["docker_host"])')
export DOCKER_HOST

ask() { curl -sS --fail --max-time 60 "$@" "http://localhost:$port/cgi-bin/hello"; }

if [ "$(docker inspect -f '{{.State.Running}}' wherry-demo 2>/dev/null)" != true ] || ! ask >/dev/null 2>&1; then
    say "docker build"
    cp -R "$top/packaging/demo/." "$scratch"
    # The guest has a static busybox, so the demo needs no registry.
    wherry shell -- cat /usr/bin/busybox >"$scratch/busybox"
    chmod +x "$scratch/busybox"
    docker build -t wherry-demo "$scratch"

    say "docker run"
    docker rm -f wherry-demo >/dev/null 2>&1 || true
    docker run -d --name wherry-demo -p "$port:80" wherry-demo
fi

say "http://localhost:$port/"
ask --retry 20 --retry-all-errors --retry-delay 1

cat >&2 <<END

The machine goes on running. Use it with any Docker client:
  export PATH=${clients:+$clients:}$venv/bin:\$PATH
  docker --context wherry ps        or: eval "\$(wherry env)"
  wherry stop                       ends it; wherry delete removes it with all its data
END
