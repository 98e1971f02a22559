#!/usr/bin/env bash
# A real Slurm cluster for the tests marked `slurm`: one controller and two nodes of one processor each, all of them on
# this machine. The packages are unpacked into $SLURM_DIR; nothing is installed, and no root, systemd or cgroup is needed.
#
#   tests/support/scripts/slurm.sh install     once: about 4 MB to fetch, 15 MB on disk (Debian or Ubuntu)
#   tests/support/scripts/slurm.sh start       waits until both nodes are idle; what an earlier one ran is gone
#   tests/support/scripts/slurm.sh stop        ends the cluster and whatever its jobs have left running
#   eval "$(tests/support/scripts/slurm.sh env)"    then sbatch and the others work in this shell
#
# SLURM_DIR (default build/slurm) is where it lives, SLURM_PORT (default 9601) where the controller listens; the nodes
# take the two ports after it. Jobs run as whoever started the cluster, who alone can use it.
set -euo pipefail

SLURM_DIR=$(realpath -m "${SLURM_DIR:-$(dirname "$0")/../../../build/slurm}")
SLURM_PORT=${SLURM_PORT:-9601}
ROOT=$SLURM_DIR/root
# The path of Munge's socket must be short, and nobody else may be able to write to any folder above it.
RUN=/tmp/slurm-$SLURM_PORT-$(id -u)
PACKAGES="slurmctld slurmd slurm-client munge"
NODES="node1 node2"

say() { echo "slurm.sh: $*" >&2; }
die() { say "$*"; exit 1; }
# shellcheck source=tests/support/scripts/debian_packages.sh
. "$(dirname "$0")/debian_packages.sh"

environment() {
    local lib
    lib=$(libraries "$ROOT")
    export LD_LIBRARY_PATH=$lib:$lib/slurm-wlm:$ROOT/lib/${lib##*/} PATH=$ROOT/usr/bin:$PATH
    export SLURM_CONF=$RUN/slurm.conf
}

install() {
    [ -e "$SLURM_DIR/.installed" ] && return
    # shellcheck disable=SC2086
    unpack "$SLURM_DIR" "apt-get knows no packages to install: is Slurm installed here already?" $PACKAGES
    touch "$SLURM_DIR/.installed"
}

configuration() {
    local node port=$SLURM_PORT
    cat <<CONFIGURATION
ClusterName=test
# The controller compares this name with the machine's own; where the name leads to is no matter.
SlurmctldHost=$(uname -n)(127.0.0.1)
SlurmctldPort=$SLURM_PORT
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
PluginDir=$(libraries "$ROOT")/slurm-wlm
StateSaveLocation=$RUN/state
SlurmdSpoolDir=$RUN/spool/%n
SlurmctldPidFile=$RUN/slurmctld.pid
SlurmdPidFile=$RUN/slurmd.%n.pid
SlurmctldLogFile=$RUN/slurmctld.log
SlurmdLogFile=$RUN/slurmd.%n.log
AuthType=auth/munge
# A requeued job starts again only when its old credential is certain to be out of date: two minutes if nothing is said.
AuthInfo=socket=$RUN/munge.socket,cred_expire=5
# What needs no cgroups.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# Jobs are short here, and tests wait for them.
SchedulerParameters=batch_sched_delay=1,sched_interval=1,bf_interval=1
JobRequeue=1
ReturnToService=2
KillWait=10
SlurmdTimeout=20
# Nodes have what is written here, whatever the machine has.
SlurmdParameters=config_overrides
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONFIGURATION
    for node in $NODES; do
        port=$((port + 1))
        echo "NodeName=$node NodeHostname=$(uname -n) NodeAddr=127.0.0.1 Port=$port CPUs=1 RealMemory=16384 State=UNKNOWN"
    done
}

listens() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

failed() {
    say "start failed; the logs:"
    tail -n 5 "$RUN"/*.log >&2 || true
    stop
}

start() {
    [ -e "$SLURM_DIR/.installed" ] || die "not installed: run $0 install"
    local port node program
    for port in "$SLURM_PORT" $((SLURM_PORT + 1)) $((SLURM_PORT + 2)); do
        listens "$port" && die "something listens on port $port already: stop it, or set SLURM_PORT"
    done
    stop
    mkdir -p "$RUN"/{sbin,state,spool}
    chmod 755 "$RUN"
    # What is up when a later step fails, or when this is interrupted, must not stay.
    trap failed EXIT
    # `stop` knows this cluster's programs by where they are, so they are copies of its own.
    for program in slurmctld slurmd slurmstepd; do cp "$ROOT/usr/sbin/$program-wlm" "$RUN/sbin/$program"; done
    cp "$ROOT/usr/sbin/munged" "$RUN/sbin"
    configuration >"$RUN/slurm.conf"
    environment
    (umask 077 && head -c 1024 /dev/urandom >"$RUN/munge.key")
    "$RUN/sbin/munged" --key-file="$RUN/munge.key" --socket="$RUN/munge.socket" --pid-file="$RUN/munge.pid" \
        --log-file="$RUN/munge.log" --seed-file="$RUN/munge.seed" --origin=127.0.0.1
    "$RUN/sbin/slurmctld" -c
    for node in $NODES; do "$RUN/sbin/slurmd" -N "$node" -d "$RUN/sbin/slurmstepd"; done
    local deadline=$((SECONDS + 60))
    until [ "$(sinfo --noheader --states=idle --format=%D 2>/dev/null)" = 2 ]; do
        [ $SECONDS -lt $deadline ] || die "the nodes were not idle within a minute"
        sleep 0.2
    done
    trap - EXIT
    say "ready: two nodes; their logs are in $RUN"
}

# This cluster's own programs, whatever one of its jobs has started, and the children of all of these.
processes() {
    local -A ours=() parent=()
    local entry pid found
    for entry in /proc/[0-9]*; do
        pid=${entry#/proc/}
        [[ $(cat "$entry/status" 2>/dev/null) =~ PPid:[[:space:]]*([0-9]+) ]] || continue
        parent[$pid]=${BASH_REMATCH[1]}
        # A shell that uses this cluster has the first of the two variables, a job has both.
        if [[ $(readlink "$entry/exe") == "$RUN/sbin/"* ]] || {
            grep -qszxF "SLURM_CONF=$RUN/slurm.conf" "$entry/environ" && grep -qsz '^SLURM_JOB_ID=' "$entry/environ"
        }; then
            ours[$pid]=1
        fi
    done
    found=1
    while [ "$found" ]; do
        found=
        for pid in "${!parent[@]}"; do
            if [ -z "${ours[$pid]:-}" ] && [ "${ours[${parent[$pid]}]:-}" ]; then ours[$pid]=1 found=1; fi
        done
    done
    echo "${!ours[@]}"
}

stop() {
    local pids tries=0
    # Nothing in it outlives the cluster, so nothing need end in good order. What ends may have started something else
    # just before: hence again until nothing is found.
    while pids=$(processes) && [ -n "$pids" ]; do
        tries=$((tries + 1))
        [ $tries -lt 100 ] || die "these processes do not end:" $pids
        # shellcheck disable=SC2086
        kill -9 $pids 2>/dev/null || true
        sleep 0.1
    done
    rm -rf "$RUN"
}

exports() {
    [ -e "$SLURM_DIR/.installed" ] || die "not installed: run $0 install"
    local name
    environment
    for name in LD_LIBRARY_PATH PATH SLURM_CONF; do printf 'export %s=%q\n' "$name" "${!name}"; done
}

case ${1:-} in
    install | start | stop) "$1" ;;
    env) exports ;;
    *) sed -n '2,13p' "$0" >&2; exit 2 ;;
esac
