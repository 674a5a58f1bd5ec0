#!/bin/bash
# A real systemd as PID 1 of a container, on a host whose own PID 1 may be something else. Needs root.
#   box.sh check                     install what is missing on this machine, and fail if something still is
#   box.sh build SUITE DIRECTORY     make DIRECTORY, a minimal Debian of this suite, unless it is there
#   box.sh up DIRECTORY [ARG...]     boot it, with more arguments for systemd-nspawn, and return when it is up;
#                                    what the box changes stays in $BOX/changes for its next boot, never in DIRECTORY
#   box.sh run COMMAND [ARG...]      run a command as root inside
#   box.sh down                      shut it down in order
#   box.sh off                       cut its power
# $BOX is the directory of this one box; several may run at a time. The box has the host's network.
set -euo pipefail

packages=systemd,systemd-sysv,dbus,libnss-systemd,python3,python3-venv,ca-certificates,procps,util-linux,acl,make

# Sets missing: the packages of what is not there.
look_for_commands() {
    missing=()
    for need in systemd-nspawn:systemd-container mmdebstrap:mmdebstrap promtool:prometheus nsenter:util-linux \
        unshare:util-linux pgrep:procps mkfs.ext4:e2fsprogs losetup:mount; do
        command -v "${need%:*}" >/dev/null || missing+=("${need#*:}")
    done
}

check() {
    if [ "$(id -u)" != 0 ]; then
        echo "cannot test on a real systemd: only root can start one in a container: sudo make test-systemd" >&2
        exit 1
    fi
    look_for_commands
    if [ "${#missing[@]}" -gt 0 ] && command -v apt-get >/dev/null; then
        echo "installing ${missing[*]}" >&2
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -qq >/dev/null || :
        apt-get install -qq -y --no-install-recommends "${missing[@]}" >/dev/null || :
        look_for_commands
    fi
    if [ "${#missing[@]}" -gt 0 ]; then
        echo "cannot test on a real systemd: missing: install ${missing[*]}" >&2
        exit 1
    fi
    unshare --mount --propagation private mount -t cgroup2 cgroup2 /mnt || {
        echo "cannot test on a real systemd: this machine lets nobody mount control groups (itself a container?)" >&2
        exit 1
    }
}

build() { # SUITE DIRECTORY
    [ -e "$2/.whole" ] && return
    rm -rf "$2"
    mkdir -p "$(dirname "$2")"
    mmdebstrap --quiet --variant=minbase --include="$packages" "$1" "$2"
    touch "$2/.whole"
}

up() { # DIRECTORY [ARG...]
    mkdir -p "$BOX/changes" "$BOX/work" "$BOX/tree"
    # shellcheck disable=SC2016 # the bash inside expands it
    unshare --mount --propagation private -- bash -euc '
        box=$1 directory=$2
        shift 2
        mount -t overlay -o "lowerdir=$directory,upperdir=$box/changes,workdir=$box/work" overlay "$box/tree"
        mount -t tmpfs -o mode=755 tmpfs /run # nspawn does not clean up a /run that is on disk
        umount -R /sys/fs/cgroup 2>/dev/null || :
        mount -t cgroup2 cgroup2 /sys/fs/cgroup # version 2 alone, as on Debian
        mkdir -p "/sys/fs/cgroup/box.$$"
        echo $$ >"/sys/fs/cgroup/box.$$/cgroup.procs"
        # The capabilities and bpf are for IPAddressDeny=.
        exec systemd-nspawn --boot --directory="$box/tree" --machine="box-$$" --hostname=box --console=pipe \
            --register=no --keep-unit --resolv-conf=off --timezone=off \
            --capability=CAP_BPF,CAP_NET_ADMIN,CAP_PERFMON --system-call-filter=bpf "$@"
    ' up "$BOX" "$@" </dev/null >"$BOX/console" 2>&1 &
    echo $! >"$BOX/pid"
    disown
    for _ in $(seq 300); do
        if leader=$(pgrep -P "$(<"$BOX/pid")"); then
            head -1 <<<"$leader" >"$BOX/leader"
            case $(run systemctl is-system-running 2>/dev/null) in
            running | degraded) return ;;
            esac
        fi
        sleep 0.1
    done
    echo "the box did not come up:" >&2
    tail -30 "$BOX/console" >&2
    off
    return 1
}

run() {
    exec_in_box=(nsenter -t "$(<"$BOX/leader")" -m -u -i -n -p -C -r -w -- /usr/bin/env -i
        PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
        TERM=dumb SYSTEMD_PAGER= SYSTEMD_COLORS=0)
    "${exec_in_box[@]}" "$@"
}

# The orderly shutdown takes as long as the slowest stop job.
down() {
    [ -e "$BOX/pid" ] || return 0
    kill "$(<"$BOX/pid")" 2>/dev/null || :
    for _ in $(seq 900); do
        kill -0 "$(<"$BOX/pid")" 2>/dev/null || break
        sleep 0.1
    done
    off
}

off() {
    [ -e "$BOX/pid" ] || return 0
    pid=$(<"$BOX/pid")
    kill -KILL "$pid" 2>/dev/null || :
    if [ -e "$BOX/leader" ] && [ "$(cat "/proc/$(<"$BOX/leader")/comm" 2>/dev/null)" = systemd ]; then
        kill -KILL "$(<"$BOX/leader")" || : # it outlives a killed nspawn
    fi
    rm -f "$BOX/pid" "$BOX/leader"
    for _ in $(seq 50); do # its control groups are empty a moment later
        find /sys/fs/cgroup/unified/box."$pid" /sys/fs/cgroup/box."$pid" -depth -type d -exec rmdir {} + 2>/dev/null || :
        [ -e "/sys/fs/cgroup/unified/box.$pid" ] || [ -e "/sys/fs/cgroup/box.$pid" ] || break
        sleep 0.1
    done
}

case ${1-} in
check | build | up | run | down | off)
    command=$1
    shift
    "$command" "$@"
    ;;
*)
    sed -n '2,11s/^# //p' "$0"
    exit 2
    ;;
esac
