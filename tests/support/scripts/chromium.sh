#!/usr/bin/env bash
# A headless Chromium for the tests marked `browser`: Debian's, unpacked into $CHROMIUM_DIR; nothing is installed, and no
# root is needed.
#
#   tests/support/scripts/chromium.sh install    once: about 65 MB to fetch, 300 MB on disk (Debian 12 or newer)
#
# CHROMIUM_DIR (default build/chromium) is where it lives; $CHROMIUM_DIR/chromium starts it.
set -euo pipefail

CHROMIUM_DIR=$(realpath -m "${CHROMIUM_DIR:-$(dirname "$0")/../../../build/chromium}")
ROOT=$CHROMIUM_DIR/root
PACKAGE=chromium-headless-shell

say() { echo "chromium.sh: $*" >&2; }
die() { say "$*"; exit 1; }
# shellcheck source=tests/support/scripts/debian_packages.sh
. "$(dirname "$0")/debian_packages.sh"

install() {
    local lib
    [ -e "$CHROMIUM_DIR/.installed" ] && return
    # Its own package in any case, and what it needs that is not installed here.
    unpack "$CHROMIUM_DIR" "apt-get knows no package $PACKAGE: this needs Debian 12 or newer" --reinstall $PACKAGE
    lib=$(libraries "$ROOT")
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
