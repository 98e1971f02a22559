#!/usr/bin/env bash
# A real S3 server for the tests marked `ceph`: one Ceph monitor, one OSD that keeps its objects in memory, one RADOS
# gateway, all on loopback. The packages are unpacked into $CEPH_DIR; nothing is installed, and no root is needed.
#
#   tests/support/scripts/ceph_rgw.sh install    once: about 70 MB to fetch, 280 MB on disk (Debian or Ubuntu)
#   tests/support/scripts/ceph_rgw.sh start      waits until the gateway answers; what an earlier one held is gone
#   tests/support/scripts/ceph_rgw.sh stop
#
# CEPH_DIR (default build/ceph) is where it lives, CEPH_PORT (default 9501) where the gateway listens; the monitor takes
# the port 10000 above. The one user has the key TESTKEY and the secret TESTSECRET.
set -euo pipefail

CEPH_DIR=$(realpath -m "${CEPH_DIR:-$(dirname "$0")/../../../build/ceph}")
CEPH_PORT=${CEPH_PORT:-9501}
ROOT=$CEPH_DIR/root
# Sockets live here, and their paths must be short.
RUN=/tmp/ceph-rgw-$CEPH_PORT-$(id -u)
PACKAGES="radosgw ceph-mon ceph-osd ceph-common"

say() { echo "ceph_rgw.sh: $*" >&2; }
die() { say "$*"; exit 1; }
# shellcheck source=tests/support/scripts/debian_packages.sh
. "$(dirname "$0")/debian_packages.sh"

environment() {
    local lib
    lib=$(libraries "$ROOT")
    export LD_LIBRARY_PATH=$lib:$lib/ceph:$ROOT/lib/${lib##*/} PYTHONPATH=$ROOT/usr/lib/python3/dist-packages
    export CEPH_CONF=$RUN/ceph.conf PATH=$ROOT/usr/bin:$PATH
}

install() {
    [ -e "$CEPH_DIR/.installed" ] && return
    # shellcheck disable=SC2086
    unpack "$CEPH_DIR" "apt-get knows no packages to install: is Ceph installed here already?" $PACKAGES
    touch "$CEPH_DIR/.installed"
}

configuration() {
    local lib
    lib=$(libraries "$ROOT")
    cat <<CONFIGURATION
[global]
fsid = $1
mon initial members = a
mon host = [v1:127.0.0.1:$((CEPH_PORT + 10000))]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind msgr2 = false
# Loopback only, for minutes: the cluster's own members trust each other. S3 users do not get in without their secret.
auth cluster required = none
auth service required = none
auth client required = none
# One copy of everything in few placement groups.
mon allow pool size one = true
mon max pg per osd = 1000
mon data avail crit = 0
mon data avail warn = 0
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
osd pool default erasure code profile =
osd crush chooseleaf type = 0
osd objectstore = memstore
memstore device bytes = ${CEPH_BYTES:-4294967296}
rgw frontends = beast endpoint=127.0.0.1:$CEPH_PORT
# The programs look for their parts where a system installation would have them.
osd class dir = $lib/rados-classes
plugin dir = $lib/ceph
erasure code dir = $lib/ceph/erasure-code
mon data = $RUN/mon
osd data = $RUN/osd
rgw data = $RUN/rgw
run dir = $RUN
admin socket = $RUN/\$name.asok
log file = $RUN/\$name.log
mon cluster log file = $RUN/cluster.log
pid file = $RUN/\$name.pid
CONFIGURATION
}

answers() { (exec 3<>"/dev/tcp/127.0.0.1/$CEPH_PORT") 2>/dev/null; }

start() {
    [ -e "$CEPH_DIR/.installed" ] || die "not installed: run $0 install"
    answers && die "something listens on port $CEPH_PORT already: stop it, or set CEPH_PORT"
    rm -rf "$RUN"
    mkdir -p "$RUN"/{mon,osd,rgw}
    local fsid osd number
    fsid=$(cat /proc/sys/kernel/random/uuid)
    osd=$(cat /proc/sys/kernel/random/uuid)
    configuration "$fsid" >"$RUN/ceph.conf"
    environment
    # What is up when a later step fails must not stay.
    trap 'say "start failed; the logs:"; tail -n 5 "$RUN"/*.log >&2; stop' ERR
    monmaptool --create --clobber --fsid "$fsid" --addv a "[v1:127.0.0.1:$((CEPH_PORT + 10000))]" "$RUN/monmap" \
        >/dev/null
    ceph-mon --mkfs -i a --monmap "$RUN/monmap"
    ceph-mon -i a
    number=$(/usr/bin/python3 "$ROOT/usr/bin/ceph" --connect-timeout 30 osd new "$osd")
    ceph-osd -i "$number" --mkfs --osd-uuid "$osd"
    local tries=0
    # On a busy machine it may ask the monitor for its place before it has learned which cluster that is of.
    until ceph-osd -i "$number"; do
        tries=$((tries + 1))
        [ $tries -lt 5 ] || { say "the OSD did not start"; false; }
        sleep 1
    done
    radosgw -n client.rgw.a
    tries=0
    until answers; do
        tries=$((tries + 1))
        [ $tries -lt 300 ] || { say "the gateway did not answer within a minute"; false; }
        sleep 0.2
    done
    radosgw-admin user create --uid test --display-name test --access-key TESTKEY --secret-key TESTSECRET >/dev/null
    trap - ERR
    say "ready at http://127.0.0.1:$CEPH_PORT"
}

stop() {
    local file pid
    for file in "$RUN"/client.rgw.a.pid "$RUN"/osd.*.pid "$RUN"/mon.a.pid; do
        [ -e "$file" ] || continue
        pid=$(cat "$file")
        # The file may be old and the number somebody else's by now.
        if grep -qs "$ROOT" "/proc/$pid/cmdline" || grep -qsE 'ceph-(mon|osd)|radosgw' "/proc/$pid/comm"; then
            kill "$pid" 2>/dev/null || true
            for _ in $(seq 50); do [ -e "/proc/$pid" ] || break; sleep 0.1; done
            kill -9 "$pid" 2>/dev/null || true
        fi
    done
    rm -rf "$RUN"
}

case ${1:-} in
    install | start | stop) "$1" ;;
    *) sed -n '2,10p' "$0" >&2; exit 2 ;;
esac
