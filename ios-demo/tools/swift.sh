#!/usr/bin/env bash
# Runs a command of Swift's toolchain in the current folder: that of this machine, or Debian's in a folder of its own,
# which `swift.sh --get` fills (root, debootstrap, 3.1 GB). There the command sees the temporary folder and the repository
# at their own paths, in a mount namespace of its own, of which nothing stays behind.
set -euo pipefail
demo=$(cd "$(dirname "$0")/.." && pwd)
root=${SWIFT_ROOT:-$demo/build/swift}

if [ "${1:-}" = --get ]; then
    if command -v swift >/dev/null || [ -x "$root/usr/libexec/swift/bin/swift" ]; then exit; fi
    command -v debootstrap >/dev/null || { apt-get update -qq && apt-get install -y --no-install-recommends debootstrap; }
    mirror=$(awk '/^URIs:/{print $2}' /etc/apt/sources.list.d/debian.sources 2>/dev/null | grep -v security | head -1)
    rm -rf "$root.partial"
    mkdir -p "$(dirname "$root")"
    debootstrap --variant=minbase --include=swiftlang,libc6-dev,ca-certificates trixie "$root.partial" \
        "${mirror:-http://deb.debian.org/debian}"
    mv "$root.partial" "$root"
    exit
fi

command -v swift >/dev/null && exec "$@"
[ -x "$root/usr/libexec/swift/bin/swift" ] || { echo "Swift is not installed: make test-ios" >&2; exit 3; }
exec unshare --mount --propagation private bash -c '
    set -e
    root=$1 demo=$2 here=$PWD; shift 2
    for place in /proc /dev "${TMPDIR:-/tmp}" "${demo%/*}"; do
        mkdir -p "$root$place"
        mount --rbind "$place" "$root$place"
    done
    exec chroot "$root" /usr/bin/env HOME=/root PATH=/usr/bin:/bin:/usr/libexec/swift/bin bash -c "cd \"\$0\" && exec \"\$@\"" "$here" "$@"
' - "$root" "$demo" "$@"
