#!/usr/bin/env bash
# A headless Chromium for the tests marked `browser`: Debian's, unpacked into $CHROMIUM_DIR; nothing is installed, and no
# root is needed.
#
#   tests/chromium.sh install    once: about 65 MB to fetch, 300 MB on disk (Debian 12 or newer)
#
# CHROMIUM_DIR (default build/chromium) is where it lives; $CHROMIUM_DIR/chromium starts it.
set -euo pipefail

CHROMIUM_DIR=$(realpath -m "${CHROMIUM_DIR:-$(dirname "$0")/../build/chromium}")
ROOT=$CHROMIUM_DIR/root
PACKAGE=chromium-headless-shell

say() { echo "chromium.sh: $*" >&2; }
die() { say "$*"; exit 1; }

install() {
    [ -e "$CHROMIUM_DIR/.installed" ] && return
    command -v apt-get dpkg >/dev/null || die "install needs apt-get and dpkg"
    mkdir -p "$CHROMIUM_DIR/packages" "$ROOT"
    # Lists of packages may be missing in a container; without root they cannot be updated, and need not be.
    apt-get update -qq 2>/dev/null || say "the package lists could not be updated; going on with those there are"
    local wanted lib
    # Its own package in any case, and what it needs that is not installed here.
    wanted=$(apt-get install --simulate --reinstall --no-install-recommends $PACKAGE | awk '$1 == "Inst" { print $2 }')
    [ -n "$wanted" ] || die "apt-get knows no package $PACKAGE: this needs Debian 12 or newer"
    # shellcheck disable=SC2086
    (cd "$CHROMIUM_DIR/packages" && apt-get download -qq -o APT::Sandbox::User=root $wanted)
    for package in "$CHROMIUM_DIR"/packages/*.deb; do dpkg -x "$package" "$ROOT"; done
    rm -r "$CHROMIUM_DIR/packages"
    lib=$(cd "$ROOT/usr/lib" && echo "$PWD/$(ls -d -- *-linux-gnu | head -n 1)")
    # Some of these libraries keep their own parts in a folder of theirs.
    cat >"$CHROMIUM_DIR/chromium" <<PROGRAM
#!/bin/sh
export LD_LIBRARY_PATH='$lib:$lib/pulseaudio:$ROOT/lib/${lib##*/}'
exec '$ROOT/usr/lib/chromium/$PACKAGE' "\$@"
PROGRAM
    chmod +x "$CHROMIUM_DIR/chromium"
    touch "$CHROMIUM_DIR/.installed"
}

case ${1:-} in
    install) install ;;
    *) sed -n '2,7p' "$0" >&2; exit 2 ;;
esac
