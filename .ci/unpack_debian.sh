#!/usr/bin/env bash
# Unpacks packages of a Debian, maybe of another machine's, into a folder, and installs nothing:
# FOLDER SUITE ARCHITECTURE PACKAGE... The mirror is this machine's own.
set -euo pipefail
folder=$1 suite=$2 architecture=$3
shift 3
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$folder" "$work/lists/partial" "$work/cache/archives/partial"
mirror=$(awk '/^URIs:/{print $2}' /etc/apt/sources.list.d/debian.sources 2>/dev/null | grep -v security | head -1)
echo "deb ${mirror:-http://deb.debian.org/debian} $suite main" >"$work/sources.list"
apt=(-o "APT::Architecture=$architecture" -o "APT::Architectures=$architecture" -o "Dir::Etc::sourcelist=$work/sources.list"
    -o Dir::Etc::sourceparts=- -o "Dir::State::lists=$work/lists" -o Dir::State::status=/dev/null -o "Dir::Cache=$work/cache"
    -o APT::Sandbox::User=root)
apt-get "${apt[@]}" update -qq
(cd "$work" && apt-get "${apt[@]}" download -qq "$@")
for package in "$work"/*.deb; do dpkg -x "$package" "$folder"; done
