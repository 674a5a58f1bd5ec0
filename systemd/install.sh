#!/bin/sh
# install.sh install|uninstall|purge: what `sudo make install` and the like do. Each step is printed before it is done.
#
# What it is told comes by variables of make's command line, whose names are in GIVEN: settings of the program, and
#   LND_USER       the user that runs LND: makes /var/lib/lnd-scb for LND's backupfilepath=
#   LND_DIRECTORY  where channel.backup stays instead, in LND's own directory: opens that for the service, read-only
#   PYTHON         the Python to use, DESTDIR the root of a package that is being built (nothing outside it is touched)
#
# /opt/lnd-backup/<number>  one version: script, venv, compiled byte code; <number> is a hash of what went into it
# /opt/lnd-backup/current   a link to the one in use; switched only when the new one is whole, and back if it fails
# /opt/lnd-backup/manifest  the SHA-256 of each file put elsewhere: what others changed is neither overwritten nor removed
set -eu
umask 022
unset TMPDIR PYTHONDONTWRITEBYTECODE PYTHONPATH PYTHONHOME
cd "$(dirname "$0")/.."

DESTDIR=${DESTDIR-}
PYTHON=${PYTHON-python3}
home=/opt/lnd-backup
manifest=$DESTDIR$home/manifest
settings=$DESTDIR/etc/default/lnd-backup-env
units=/etc/systemd/system
drop_in=$units/lnd-backup.service.d
scb=/var/lib/lnd-scb

say() { printf '%s\n' "$*"; }

give_up() { # MESSAGE HINT
    printf 'cannot %s: %s\nhint: %s\n' "$verb" "$1" "$2" >&2
    exit 1
}

# Prints a step and does it.
step() {
    printf '+ %s\n' "$*"
    "$@"
}

# Does a step on this machine's systemd and users; a package's scripts have to do it when it is installed.
here() {
    if [ -z "$DESTDIR" ]; then
        step "$@"
    fi
}

given() { # NAME: its value on the command line
    case " ${GIVEN-} " in
    *" $1 "*) printenv "$1" ;;
    esac
}

# --- Refusals, before anything is changed ---

check_machine() {
    if [ -z "$DESTDIR" ]; then
        [ "$(id -u)" = 0 ] || give_up 'only root may' "sudo make $verb"
        [ -d /run/systemd/system ] ||
            give_up 'no systemd runs here' 'run it by hand or by another supervisor: README.md, "Run it by hand"'
        version=$(systemctl --version | sed -n '1s/^systemd \([0-9]*\).*/\1/p')
        [ "${version:-0}" -ge 250 ] ||
            give_up "systemd ${version:-?} is too old: the unit needs 250" 'use Debian 12, Ubuntu 24.04 or newer'
    fi
}

check_python() {
    command -v "$PYTHON" >/dev/null || give_up "there is no $PYTHON" 'apt install python3 python3-venv'
    "$PYTHON" -I -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        give_up "$("$PYTHON" --version 2>&1) is too old: 3.11 is needed" 'name a newer one: make install PYTHON=python3.11'
    "$PYTHON" -I -c 'import ensurepip, venv; ensurepip.version()' 2>/dev/null ||
        give_up "$PYTHON has no venv module" 'apt install python3-venv (elsewhere: the package with ensurepip)'
    case $("$PYTHON" -I -c 'import os, sys; print(os.path.realpath(sys.executable))') in
    /usr/*) ;;
    *) give_up "$PYTHON is not in /usr, and the service may execute nothing else" 'name another: make install PYTHON=…' ;;
    esac
}

# A secret on a command line is in the shell's history, and for everybody in the list of processes.
check_given() {
    for name in ${GIVEN-}; do
        value=$(printenv "$name") || value=''
        case $name in
        PYTHON | DESTDIR | LND_USER | LND_DIRECTORY) continue ;;
        *SECRET* | *TOKEN* | *PASSWORD* | AWS_ACCESS_KEY_ID | HEARTBEAT_URL)
            give_up "$name is a secret, and a command line is not" "leave it off, and put it into ${settings#"$DESTDIR"}" ;;
        AWS_*[!A-Z0-9_]*) give_up "there is no setting $name" 'their names are in lnd-backup-env.example' ;;
        AWS_* | HTTPS_PROXY | HTTP_PROXY | NO_PROXY | https_proxy | http_proxy | no_proxy) ;;
        *)
            grep -q "^#\{0,1\}$name=" lnd-backup-env.example ||
                give_up "there is no setting $name" 'their names are in lnd-backup-env.example' ;;
        esac
        case $value in
        *://*@*) give_up "$name holds a password, and a command line is no place for it" \
            "leave it off, and put it into ${settings#"$DESTDIR"}" ;;
        *'
'*) give_up "$name has more than one line" 'write one line' ;;
        esac
        if [ -e "$settings" ] && ! grep -qxF -e "$name=$value" -- "$settings"; then
            give_up "$name=$value: ${settings#"$DESTDIR"} is there, does not say so, and is never changed" \
                "edit it: sudoedit ${settings#"$DESTDIR"}, and leave $name off"
        fi
    done
    lnd_user=$(given LND_USER) lnd_directory=$(given LND_DIRECTORY)
    case $lnd_user in
    *[!A-Za-z0-9_.-]*) give_up "LND_USER=$lnd_user is no user's name" 'ps -o user= -C lnd' ;;
    esac
    if [ -n "$lnd_user" ] && [ -z "$DESTDIR" ]; then
        getent passwd "$lnd_user" >/dev/null || give_up "there is no user $lnd_user" 'ps -o user= -C lnd'
    fi
    if [ -n "$lnd_directory" ]; then
        [ -z "$lnd_user" ] || give_up 'LND_USER and LND_DIRECTORY are two ways' 'choose one: docs/access.md'
        [ -d "$lnd_directory" ] || give_up "$lnd_directory is no directory" 'name the one that holds channel.backup'
        lnd_directory=$(realpath -- "$lnd_directory")
        case $lnd_directory in
        *[!A-Za-z0-9_./@+-]*) give_up "$lnd_directory: a name that a unit file would read differently" 'use LND_USER' ;;
        esac
        command -v setfacl >/dev/null || give_up 'there is no setfacl' 'apt install acl'
    fi
}

# A user of that name must be a system user that nobody logs in as.
check_user() {
    [ -z "$DESTDIR" ] || return 0
    entry=$(getent passwd lnd-backup) || return 0
    uid=$(printf '%s' "$entry" | cut -d: -f3)
    shell=$(printf '%s' "$entry" | cut -d: -f7)
    case $shell in
    */nologin | */false) [ "$uid" -eq 0 ] || [ "$uid" -ge 1000 ] || return 0 ;;
    esac
    give_up "a user lnd-backup (uid $uid, shell $shell) is there, and is no system user" \
        'the service would share its files with whoever uses it: rename it (usermod --login)'
}

# The files that stand elsewhere: source, path, mode.
files() {
    cat <<END
lnd-backup.service $units/lnd-backup.service 0644
systemd/lnd-backup@.service $units/lnd-backup@.service 0644
systemd/lnd-backup.timer $units/lnd-backup.timer 0644
systemd/lnd-backup@.timer $units/lnd-backup@.timer 0644
systemd/lnd-backup-retry@.service $units/lnd-backup-retry@.service 0644
systemd/lnd-backup-alert@.service $units/lnd-backup-alert@.service 0644
systemd/lnd-backup-mounts@.service $units/lnd-backup-mounts@.service 0644
systemd/lnd-backup-mounts@.timer $units/lnd-backup-mounts@.timer 0644
systemd/lnd-backup.sysusers /etc/sysusers.d/lnd-backup.conf 0644
systemd/lnd-backup /usr/local/bin/lnd-backup 0755
END
    if [ -n "$DESTDIR" ] || [ "$version" -ge 254 ]; then
        say "systemd/restart-steps.conf $drop_in/restart-steps.conf 0644"
        say "systemd/restart-steps.conf $units/lnd-backup@.service.d/restart-steps.conf 0644"
    fi
}

is_ours() { # PATH: as this put it there
    line=$(sha256sum "$DESTDIR$1" | cut -d' ' -f1)
    grep -qsxF "$line  $1" "$manifest"
}

check_files() {
    while read -r source path mode; do
        [ -e "$DESTDIR$path" ] || [ -L "$DESTDIR$path" ] || continue
        [ -f "$DESTDIR$path" ] && { cmp -s "$source" "$DESTDIR$path" || is_ours "$path"; } || foreign="$path"
    done <<END
$(files)
END
    for path in ${lnd_user:+/etc/tmpfiles.d/lnd-backup.conf} ${lnd_directory:+"$drop_in/lnd-directory.conf"}; do
        [ ! -e "$DESTDIR$path" ] || is_ours "$path" || foreign=$path
    done
    for directory in "$home" /etc/default "$units" "$drop_in"; do
        [ ! -e "$DESTDIR$directory" ] || [ -d "$DESTDIR$directory" ] || foreign=$directory
    done
    [ -z "${foreign-}" ] || give_up "$foreign is there, and this did not make it, or somebody changed it since" \
        'move it away; changes of your own belong in a drop-in: systemctl edit lnd-backup'
}

# --- Steps ---

# Builds the version beside the one in use, under another name until it is whole.
build() {
    what='s3_backup_lnd_channels.py requirements.txt lnd-backup-env.example systemd/alert.py systemd/remount-if-replaced'
    what="$what docs/operations.md docs/recovery.md docs/access.md docs/alerts.yml"
    number=$({ cat $what && "$PYTHON" -I -c 'import os, sys; print(sys.version, os.path.realpath(sys.executable))'; } |
        sha256sum | cut -c1-12)
    new=$DESTDIR$home/$number
    if [ -d "$new" ]; then
        say "= $home/$number is whole already"
        return
    fi
    partial=$DESTDIR$home/.partial
    step install -d "$DESTDIR$home"
    rm -rf "$partial"
    trap 'rm -rf "$partial"; rmdir "$DESTDIR$home" 2>/dev/null || :' EXIT
    step "$PYTHON" -I -m venv "$partial/venv"
    step "$partial/venv/bin/python" -I -m pip install --quiet --disable-pip-version-check --no-compile --no-input \
        --only-binary :all: --require-hashes -r requirements.txt ||
        give_up 'the packages did not come' "see pip's message; nothing has changed, what was running still runs"
    step "$partial/venv/bin/python" -I -m pip --quiet --disable-pip-version-check uninstall --yes setuptools pip
    find "$partial/venv/bin" -type f -delete # scripts that name this directory; the interpreter is a link
    sed -i '/^command = /d' "$partial/venv/pyvenv.cfg"
    for file in $what; do
        case $file in
        docs/*) install -D -m 0644 "$file" "$partial/$file" ;;
        systemd/remount-if-replaced) install -m 0755 "$file" "$partial/${file#systemd/}" ;;
        *) install -m 0644 "$file" "$partial/${file##*/}" ;;
        esac
    done
    # Where `python -m` finds it, and compiles it.
    ln -s ../../../../s3_backup_lnd_channels.py "$partial"/venv/lib/python3*/site-packages/
    step "$partial/venv/bin/python" -I -m compileall -q -s "$partial" -p "$home/current" "$partial/venv/lib"
    check_runs "$partial"
    step mv "$partial" "$new"
    trap - EXIT
}

check_runs() { # DIRECTORY: what was built there starts
    "$1/venv/bin/python" -I -m s3_backup_lnd_channels --version >/dev/null ||
        give_up 'what was installed does not start' 'see the message above; nothing has changed'
}

# Lists what the program finds wrong with an environment file. RESCAN_SECONDS=0, which it always refuses, keeps it from
# going any further than its settings.
faults() { # FILE
    env -i PATH="$PATH" RESCAN_SECONDS=0 "$new/venv/bin/python" -I "$new/s3_backup_lnd_channels.py" --env-file "$1" check \
        2>&1 | sed -e 's/^[-0-9]* [:0-9]* error: //' -e '/RESCAN_SECONDS=0:/,/^hint: /d'
}

# Writes the settings: the example with what was given, and what was not given left empty.
write_settings() {
    filled=$DESTDIR$home/.settings
    trap 'rm -f "$filled"' EXIT
    install -m 0600 lnd-backup-env.example "$filled"
    sed -i -e 's/^MONITOR_FILE_PATH=.*/MONITOR_FILE_PATH=/' -e 's/^S3_BUCKET_NAME=.*/S3_BUCKET_NAME=/' "$filled"
    if [ -n "$lnd_directory" ]; then
        put MONITOR_FILE_PATH "$lnd_directory/channel.backup"
    elif [ -n "$lnd_user" ]; then
        put MONITOR_FILE_PATH "$scb/channel.backup"
    fi
    # Two nodes in one bucket must never mix. A package is built on a machine that has nothing to do with it.
    [ -n "$DESTDIR" ] || put S3_BACKUP_PREFIX "$(uname -n)/"
    for name in ${GIVEN-}; do
        case $name in
        PYTHON | DESTDIR | LND_USER | LND_DIRECTORY) ;;
        *) put "$name" "$(printenv "$name")" ;;
        esac
    done
    found=$(faults "$filled")
    misread=$(say "$found" | sed -n 's/^cannot read --env-file: .*: line \([0-9]*\).*/\1/p')
    if [ -n "$misread" ]; then
        line=$(sed -n "${misread}p" "$filled")
        give_up "${line%%=*} holds what systemd would read differently: ${line#*=}" 'write it without quotes, # and \\'
    fi
    for name in ${GIVEN-}; do
        refused=$(say "$found" | grep -A1 "^configuration: $name=") || continue
        give_up "${refused%%
*}" "${refused##*hint: }"
    done
    step install -D -m 0600 "$filled" "$settings"
    rm -f "$filled"
    trap - EXIT
}

put() { # NAME VALUE: in the place of the line that has it, commented or not
    NAME=$1 VALUE=$2 awk '
        BEGIN { name = ENVIRON["NAME"]; line = name "=" ENVIRON["VALUE"] }
        !done && (index($0, name "=") == 1 || index($0, "#" name "=") == 1) { print line; done = 1; next }
        { print }
        END { if (!done) print line }' "$filled" >"$filled.new"
    cat "$filled.new" >"$filled"
    rm -f "$filled.new"
}

put_file() { # SOURCE PATH MODE
    if ! cmp -s "$1" "$DESTDIR$2"; then
        step install -D -m "$3" "$1" "$DESTDIR$2"
        changed=yes
    fi
    note_file "$2"
}

note_file() { # PATH
    say "$(sha256sum "$DESTDIR$1" | cut -d' ' -f1)  $1" >>"$manifest.new"
}

# The directory for LND's backupfilepath=, made now and at every boot.
open_scb() {
    made=$DESTDIR$home/.made
    sed "s/ bitcoin / $lnd_user /" systemd/lnd-backup.tmpfiles >"$made"
    put_file "$made" /etc/tmpfiles.d/lnd-backup.conf 0644
    rm -f "$made"
    here systemd-tmpfiles --create /etc/tmpfiles.d/lnd-backup.conf
}

# LND's own directory, for the service alone. What surrounds it is hidden, from the first directory that is closed to
# others: so it needs no permission there.
open_lnd_directory() {
    hidden=$(dirname "$lnd_directory") above=$hidden
    while [ "$above" != / ]; do
        case $(stat -c %A "$above") in
        *[xt]) ;;
        *) hidden=$above ;;
        esac
        above=$(dirname "$above")
    done
    made=$DESTDIR$home/.made
    case $lnd_directory in
    /home/* | /root/*) hide='ProtectHome=tmpfs' ;;
    *) hide="TemporaryFileSystem=$hidden:ro" ;;
    esac
    sed -e "s|^ProtectHome=tmpfs|$hide|" -e "s|^\(BindReadOnlyPaths=-\).*|\1$lnd_directory|" \
        systemd/lnd-directory.conf >"$made"
    put_file "$made" "$drop_in/lnd-directory.conf" 0644
    rm -f "$made"
    here setfacl -m u:lnd-backup:rx "$lnd_directory"
}

# What a first installation left to the operator, and what is wrong in the settings of an old one.
say_what_is_left() {
    wrong=$(faults "$settings")
    say ''
    say "installed: $home/current -> $number"
    if [ -n "$wrong" ]; then
        say "left to fill in: sudoedit ${settings#"$DESTDIR"}"
        say "$wrong" | sed 's/^/  /'
    fi
    if [ -n "$DESTDIR" ]; then
        return
    fi
    if [ -n "$lnd_user" ]; then
        say "left to do, so that LND writes its file to $scb (docs/access.md has the lines for your system):
  stop LND, copy the old file as $lnd_user:  sudo -u $lnd_user cp OLD/channel.backup $scb/
  add to lnd.conf below [Application Options]:  backupfilepath=$scb/channel.backup
  start LND"
    fi
    if [ ! -e /etc/credstore/aws-credentials ] && ! grep -q '^AWS_SECRET_ACCESS_KEY=.' "$settings"; then
        say 'left to do, unless this machine has an instance role: the put-only key, in one of
  /etc/credstore/aws-credentials  (0600; [default], aws_access_key_id = ..., aws_secret_access_key = ...)
'"  $settings"
    fi
    if ! systemctl --quiet is-active lnd-backup.service; then
        say 'then:   sudo systemctl start lnd-backup'
    fi
    say 'check:  systemctl status lnd-backup; sudo lnd-backup check'
}

running() { # names of the services that run now
    systemctl list-units --plain --no-legend --state=active,activating 'lnd-backup.service' 'lnd-backup@*.service' |
        cut -d' ' -f1
}

# Restarts what runs; a version that does not start again makes way for the one before.
restart() {
    running=$(running)
    [ -n "$running" ] || return 0
    # Its start waits for nothing, so a minute is long even on a small board.
    if step timeout 60 systemctl restart $running; then
        return 0
    fi
    if [ -n "$before" ] && [ "$before" != "$number" ] && [ -d "$home/$before" ]; then
        step ln -sfn "$before" "$home/current"
        step systemctl reset-failed $running
        step systemctl restart $running || :
    fi
    journalctl --unit=lnd-backup --lines=20 --no-pager >&2 || :
    give_up 'the new version did not start' 'see the log above; the version before it was started again, if there was one'
}

install_all() {
    check_machine
    check_python
    check_given
    check_user
    check_files
    say "installing into ${DESTDIR:-this machine}"
    build
    if [ -e "$settings" ] && misread=$(faults "$settings" | grep -A1 '^cannot read --env-file'); then
        give_up "${misread%%
*}" "${misread##*hint: }; nothing has changed"
    fi
    [ -e "$settings" ] || write_settings # the last that may refuse
    before=$(readlink "$DESTDIR$home/current") || before=''
    changed=''
    # What an earlier installation was told to make stays its own.
    : >"$manifest.new"
    [ -n "$lnd_user" ] || grep -s '  /etc/tmpfiles.d/lnd-backup.conf$' "$manifest" >>"$manifest.new" || :
    [ -n "$lnd_directory" ] || grep -s "  $drop_in/lnd-directory.conf\$" "$manifest" >>"$manifest.new" || :
    while read -r source path mode; do
        put_file "$source" "$path" "$mode" </dev/null
    done <<END
$(files)
END
    here systemd-sysusers /etc/sysusers.d/lnd-backup.conf
    if [ -n "$lnd_user" ]; then
        open_scb
    elif [ -n "$lnd_directory" ]; then
        open_lnd_directory
    fi
    [ -e "$DESTDIR/etc/default/lnd-backup-alert" ] ||
        step install -m 0600 systemd/lnd-backup-alert.example "$DESTDIR/etc/default/lnd-backup-alert"
    mv "$manifest.new" "$manifest"
    if [ "$before" != "$number" ]; then
        step ln -sfn "$number" "$DESTDIR$home/current"
        changed=yes
    fi
    if [ -n "$changed" ]; then
        here systemctl daemon-reload
        [ -n "$before" ] || here systemctl --quiet enable lnd-backup.service
        [ -n "$DESTDIR" ] || restart
    fi
    if [ -n "$before" ] && [ "$before" != "$number" ]; then
        step rm -rf "$DESTDIR$home/$before"
    fi
    say_what_is_left
}

uninstall_all() {
    check_machine
    if [ -z "$DESTDIR" ]; then
        for unit in lnd-backup.service $(running); do
            [ ! -e "$units/lnd-backup.service" ] || step systemctl --quiet disable --now "$unit"
        done
        step systemctl stop 'lnd-backup*.timer'
    fi
    bind=$(sed -n 's/^BindReadOnlyPaths=-//p' "$DESTDIR$drop_in/lnd-directory.conf" 2>/dev/null) || bind=''
    if [ -n "$bind" ] && [ -d "$bind" ]; then
        here setfacl -x u:lnd-backup "$bind"
    fi
    if [ -e "$manifest" ]; then
        while read -r _ path; do
            if [ ! -e "$DESTDIR$path" ]; then
                continue
            elif is_ours "$path"; then
                step rm -f "$DESTDIR$path"
            else
                say "kept, because somebody changed it: $path"
            fi
        done <"$manifest"
    fi
    for directory in "$drop_in" "$units/lnd-backup@.service.d"; do
        rmdir "$DESTDIR$directory" 2>/dev/null || :
    done
    step rm -rf "$DESTDIR$home"
    here systemctl daemon-reload
    if [ "$verb" = purge ]; then
        purge
    else
        say "kept: settings and staged versions: $(kept); to remove them as well: sudo make purge"
    fi
    [ ! -e "$DESTDIR$scb" ] || say "kept, because it is LND's: $scb, as long as lnd.conf names it in backupfilepath="
}

kept() {
    for path in "$DESTDIR"/etc/default/lnd-backup-env "$DESTDIR"/etc/default/lnd-backup@*-env \
        "$DESTDIR"/etc/default/lnd-backup-alert "$DESTDIR"/var/lib/lnd-backup "$DESTDIR"/var/lib/lnd-backup@*; do
        [ ! -e "$path" ] || printf '%s ' "${path#"$DESTDIR"}"
    done
}

purge() {
    for path in $(kept); do
        case $path in
        /var/lib/*) say "$(find "$DESTDIR$path" -maxdepth 1 -type f ! -name '.*' | wc -l) versions that never reached the bucket are in $path" ;;
        esac
        step rm -rf "$DESTDIR$path"
    done
    [ -n "$DESTDIR" ] || ! getent passwd lnd-backup >/dev/null || step userdel lnd-backup
}

verb=${1-}
case $verb in
install) install_all ;;
uninstall | purge) uninstall_all ;;
*)
    sed -n '2s/^# //p' "$0" >&2
    exit 2
    ;;
esac
