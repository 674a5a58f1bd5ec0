#!/bin/sh
# install.sh install|uninstall|purge: does `sudo make install` and the like. It prints each step before it takes it.
#
# Its input are the variables of make's command line, whose names are in GIVEN: settings of the program, and
#   LND_USER       the user that runs LND: creates /var/lib/lnd-scb for LND's backupfilepath=
#   LND_DIRECTORY  LND's own directory, if channel.backup stays there: lets the service read it
#   COPY_DIRECTORY the setting: lets the service write there; it is also added to settings that exist
#   NODE           another node on this host: its service is lnd-backup@NODE, with settings of its own
#   FORCE          1 lets purge delete versions that were never sent
#   PYTHON         the Python to use
#   DESTDIR        the root of a package that is being built: nothing outside it is touched
#
# /opt/lnd-backup/<number>  one version: script, venv, compiled byte code; <number> is a hash of its contents
# /opt/lnd-backup/current   a link to the version in use; it is switched when the new one is complete, and back if that fails
# /opt/lnd-backup/manifest  the SHA-256 of each file installed elsewhere: a file that somebody changed is left alone
set -eu
umask 022
unset TMPDIR PYTHONDONTWRITEBYTECODE PYTHONPATH PYTHONHOME
cd "$(dirname "$0")/.."

DESTDIR=${DESTDIR-}
PYTHON=${PYTHON-python3}
home=/opt/lnd-backup
manifest=$DESTDIR$home/manifest
units=/etc/systemd/system

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

node=$(given NODE)
service=lnd-backup${node:+"@$node"}
settings=$DESTDIR/etc/default/$service-env
drop_in=$units/$service.service.d
scb=/var/lib/lnd-scb${node:+"@$node"}
tmpfiles=/etc/tmpfiles.d/$service.conf

all_settings() { # those of each node, one a line
    for each in "$DESTDIR"/etc/default/lnd-backup-env "$DESTDIR"/etc/default/lnd-backup@*-env; do
        [ ! -e "$each" ] || say "$each"
    done
}

setting() { # NAME FILE: its value
    sed -n "s/^$1=//p" "$2" | tail -n 1 | sed 's/^\(["'"'"']\)\(.*\)\1$/\2/'
}

# --- Refusals, before anything is changed ---

check_machine() {
    if [ -z "$DESTDIR" ]; then
        [ "$(id -u)" = 0 ] || give_up 'only root can do this' "sudo make $verb"
        [ -d /run/systemd/system ] ||
            give_up 'systemd is not running here' 'run it by hand or under another supervisor: README.md, "Run it by hand"'
        version=$(systemctl --version | sed -n '1s/^systemd \([0-9]*\).*/\1/p')
        [ "${version:-0}" -ge 250 ] ||
            give_up "systemd ${version:-?} is too old: the unit needs 250 or newer" 'use Debian 12, Ubuntu 24.04 or newer'
    fi
}

check_python() {
    command -v "$PYTHON" >/dev/null || give_up "there is no $PYTHON" 'apt install python3 python3-venv'
    "$PYTHON" -I -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        give_up "$("$PYTHON" --version 2>&1) is too old: 3.11 or newer is needed" 'name a newer one: make install PYTHON=python3.11'
    "$PYTHON" -I -c 'import ensurepip, venv; ensurepip.version()' 2>/dev/null ||
        give_up "$PYTHON has no venv module" 'apt install python3-venv (elsewhere: the package with ensurepip)'
    case $("$PYTHON" -I -c 'import os, sys; print(os.path.realpath(sys.executable))') in
    /usr/*) ;;
    *) give_up "$PYTHON is not in /usr, and the service can execute nothing else" 'name another one: make install PYTHON=…' ;;
    esac
}

# A secret on a command line is in the shell's history, and for everybody in the list of processes.
check_given() {
    for name in ${GIVEN-}; do
        value=$(printenv "$name") || value=''
        case $name in
        PYTHON | DESTDIR | LND_USER | LND_DIRECTORY | NODE) continue ;;
        *SECRET* | *TOKEN* | *PASSWORD* | AWS_ACCESS_KEY_ID | HEARTBEAT_URL)
            give_up "$name is a secret and must not be on a command line" "leave it out, and write it into ${settings#"$DESTDIR"}" ;;
        AWS_*[!A-Z0-9_]*) give_up "there is no setting $name" 'lnd-backup-env.example has all names' ;;
        AWS_* | HTTPS_PROXY | HTTP_PROXY | NO_PROXY | https_proxy | http_proxy | no_proxy) ;;
        *)
            grep -q "^#\{0,1\}$name=" lnd-backup-env.example ||
                give_up "there is no setting $name" 'lnd-backup-env.example has all names' ;;
        esac
        case $value in
        *://*@*) give_up "$name holds a password, which must not be on a command line" \
            "leave it out, and write it into ${settings#"$DESTDIR"}" ;;
        *'
'*) give_up "$name has more than one line" 'write it as one line' ;;
        esac
        if [ "$name" = COPY_DIRECTORY ] && [ -e "$settings" ] && [ -z "$(setting COPY_DIRECTORY "$settings")" ]; then
            continue
        elif [ -e "$settings" ] && ! grep -qxF -e "$name=$value" -- "$settings"; then
            give_up "$name=$value differs from ${settings#"$DESTDIR"}, which is never changed" \
                "edit the file: sudoedit ${settings#"$DESTDIR"}, and leave out $name"
        fi
    done
    check_lnd
    check_copy
}

check_node() {
    case $node in
    *[!A-Za-z0-9_.-]*) give_up "NODE=$node is not a valid name for a node" 'use letters, digits, and _ . -' ;;
    esac
}

check_lnd() {
    lnd_user=$(given LND_USER) lnd_directory=$(given LND_DIRECTORY)
    case $lnd_user in
    *[!A-Za-z0-9_.-]*) give_up "LND_USER=$lnd_user is not a valid user name" 'this shows the user that runs LND: ps -o user= -C lnd' ;;
    esac
    if [ -n "$lnd_user" ] && [ -z "$DESTDIR" ]; then
        getent passwd "$lnd_user" >/dev/null || give_up "there is no user $lnd_user" 'this shows the user that runs LND: ps -o user= -C lnd'
    fi
    if [ -n "$lnd_directory" ]; then
        [ -z "$lnd_user" ] || give_up 'LND_USER and LND_DIRECTORY exclude each other' 'choose one: docs/access.md'
        [ -d "$lnd_directory" ] || give_up "$lnd_directory is not a directory" 'name the directory that holds channel.backup'
        lnd_directory=$(realpath -- "$lnd_directory")
        case $lnd_directory in
        *[!A-Za-z0-9_./@+-]*) give_up "$lnd_directory: a unit file would read this name differently" 'use LND_USER' ;;
        esac
        command -v setfacl >/dev/null || give_up 'there is no setfacl' 'apt install acl'
    fi
}

# Sets opened: what the service has to be let write to. This is the mount point, and not the directory on it: that would
# become a mount of the service's own, which keeps a stick busy that was unmounted, and hides the one that comes next.
check_copy() {
    copy=$(given COPY_DIRECTORY)
    [ -n "$copy" ] || return 0
    case $copy in
    /home/* | /root/* | /run/user/* | /tmp/* | /var/tmp/*)
        give_up "COPY_DIRECTORY=$copy: the service cannot see home directories, and has a /tmp of its own" \
            'name a directory elsewhere: docs/second-copy.md' ;;
    *[!A-Za-z0-9_./@+-]*)
        give_up "COPY_DIRECTORY=$copy: a unit file would read this name differently" \
            'use a path of letters, digits, and _ . / @ + -' ;;
    esac
    [ -d "$copy" ] || give_up "there is no directory $copy" "mount the device first, then create the directory: sudo mkdir $copy"
    real=$(realpath -- "$copy")
    [ "$real" = "$copy" ] || give_up "the real path of $copy is $real" "make install COPY_DIRECTORY=$real"
    opened=$(stat -c %m -- "$copy")
    [ "$opened" != "$copy" ] ||
        give_up "$copy is the mount point, which also exists when nothing is mounted" \
            "create a directory on the device: sudo mkdir $copy/lnd-backup"
    watched=$(given MONITOR_FILE_PATH)
    [ -n "$watched" ] || [ ! -e "$settings" ] || watched=$(setting MONITOR_FILE_PATH "$settings")
    # What is never unmounted, and LND's own disk, stay read-only but for the directory itself.
    case "$opened ${lnd_directory:-$watched}" in
    '/ '* | '/var '* | /var/* | '/srv '* | '/opt '* | "$opened $opened/"*) opened=$copy ;;
    esac
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
    give_up "a user lnd-backup (uid $uid, shell $shell) exists, and is not a system user" \
        'rename that user (usermod --login): the service would share its files with it'
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
systemd/lnd-backup-check@.service $units/lnd-backup-check@.service 0644
systemd/lnd-backup-check@.timer $units/lnd-backup-check@.timer 0644
systemd/lnd-backup-mounts@.service $units/lnd-backup-mounts@.service 0644
systemd/lnd-backup-mounts@.timer $units/lnd-backup-mounts@.timer 0644
systemd/lnd-backup.sysusers /etc/sysusers.d/lnd-backup.conf 0644
systemd/lnd-backup /usr/local/bin/lnd-backup 0755
END
    if [ -n "$DESTDIR" ] || [ "$version" -ge 254 ]; then
        say "systemd/restart-steps.conf $units/lnd-backup.service.d/restart-steps.conf 0644"
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
    for path in ${lnd_user:+"$tmpfiles"} ${lnd_directory:+"$drop_in/lnd-directory.conf"} \
        ${copy:+"$drop_in/copy-directory.conf"}; do
        [ ! -e "$DESTDIR$path" ] || is_ours "$path" || foreign=$path
    done
    for directory in "$home" /etc/default "$units" "$drop_in"; do
        [ ! -e "$DESTDIR$directory" ] || [ -d "$DESTDIR$directory" ] || foreign=$directory
    done
    [ -z "${foreign-}" ] || give_up "$foreign exists, and the installer did not create it, or somebody has changed it" \
        "move it away; put your own changes into a drop-in: systemctl edit $service"
}

# --- Steps ---

# Builds the version beside the one in use, under another name until it is whole.
build() {
    what='s3_backup_lnd_channels.py requirements.txt lnd-backup-env.example'
    what="$what systemd/alert.py systemd/check-twice systemd/remount-if-replaced"
    what="$what docs/operations.md docs/recovery.md docs/access.md docs/second-copy.md docs/several-nodes.md"
    what="$what docs/containers.md docs/reference.md docs/alerts.yml"
    # shellcheck disable=SC2086 # many files
    number=$({ cat $what && "$PYTHON" -I -c 'import os, sys; print(sys.version, os.path.realpath(sys.executable))'; } |
        sha256sum | cut -c1-12)
    new=$DESTDIR$home/$number
    if [ -d "$new" ]; then
        say "= $home/$number is already installed"
        return
    fi
    partial=$DESTDIR$home/.partial
    step install -d "$DESTDIR$home"
    rm -rf "$partial"
    trap 'rm -rf "$partial"; rmdir "$DESTDIR$home" 2>/dev/null || :' EXIT
    step "$PYTHON" -I -m venv "$partial/venv"
    step "$partial/venv/bin/python" -I -m pip install --quiet --disable-pip-version-check --no-compile --no-input \
        --only-binary :all: --require-hashes -r requirements.txt ||
        give_up 'the packages could not be installed' "see pip's message above; nothing has changed, and what was running still runs"
    step "$partial/venv/bin/python" -I -m pip --quiet --disable-pip-version-check uninstall --yes setuptools pip
    find "$partial/venv/bin" -type f -delete # scripts that name this directory; the interpreter is a link
    sed -i '/^command = /d' "$partial/venv/pyvenv.cfg"
    for file in $what; do
        case $file in
        docs/*) install -D -m 0644 "$file" "$partial/$file" ;;
        systemd/check-twice | systemd/remount-if-replaced) install -m 0755 "$file" "$partial/${file#systemd/}" ;;
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
        give_up 'the new version does not start' 'see the message above; nothing has changed'
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
    [ -n "$DESTDIR" ] || put S3_BACKUP_PREFIX "$(uname -n)${node:+"-$node"}/"
    for name in ${GIVEN-}; do
        case $name in
        PYTHON | DESTDIR | LND_USER | LND_DIRECTORY | NODE) ;;
        *) put "$name" "$(printenv "$name")" ;;
        esac
    done
    found=$(faults "$filled")
    misread=$(say "$found" | sed -n 's/^cannot read --env-file: .*: line \([0-9]*\).*/\1/p')
    if [ -n "$misread" ]; then
        line=$(sed -n "${misread}p" "$filled")
        give_up "systemd would read the value of ${line%%=*} differently: ${line#*=}" 'write it without quotes, # and backslashes'
    fi
    refuse_what_the_program_refuses
    step install -D -m 0600 "$filled" "$settings"
    rm -f "$filled"
    trap - EXIT
}

# What was given and cannot be, in the program's own words, which are in found.
refuse_what_the_program_refuses() {
    for name in ${GIVEN-}; do
        refused=$(say "$found" | grep -A1 "^configuration: $name=") || continue
        give_up "${refused%%
*}" "${refused##*hint: }"
    done
}

# The one setting that is put into settings that are there: beside it the unit has to be changed.
add_copy_directory() {
    filled=$DESTDIR$home/.settings
    trap 'rm -f "$filled" "$settings.new"' EXIT
    install -m 0600 "$settings" "$filled"
    put COPY_DIRECTORY "$copy"
    found=$(faults "$filled")
    refuse_what_the_program_refuses
    say "+ COPY_DIRECTORY=$copy >> $settings"
    cp --preserve=mode,ownership "$settings" "$settings.new"
    cat "$filled" >"$settings.new"
    mv "$settings.new" "$settings"
    rm -f "$filled"
    trap - EXIT
    changed=yes
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
    awk -v path="$1" '$2 != path' "$manifest.new" >"$manifest.others"
    mv "$manifest.others" "$manifest.new"
    say "$(sha256sum "$DESTDIR$1" | cut -d' ' -f1)  $1" >>"$manifest.new"
}

# The directory for LND's backupfilepath=, made now and at every boot.
open_scb() {
    made=$DESTDIR$home/.made
    sed -e "s/ bitcoin / $lnd_user /" -e "s|/var/lib/lnd-scb|$scb|" systemd/lnd-backup.tmpfiles >"$made"
    put_file "$made" "$tmpfiles" 0644
    rm -f "$made"
    here systemd-tmpfiles --create "$tmpfiles"
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

# What a service sees of LND's directory, its check has to see. Those of earlier installations had none.
open_for_checks() {
    made=$DESTDIR$home/.made
    for each in "$DESTDIR$units"/lnd-backup.service.d "$DESTDIR$units"/lnd-backup@?*.service.d; do
        [ -e "$each/lnd-directory.conf" ] || continue
        each=${each##*/}
        sed -n '/^\[Service\]/,$p' "$DESTDIR$units/$each/lnd-directory.conf" >"$made"
        put_file "$made" "$units/lnd-backup-check@$each/lnd-directory.conf" 0644
    done
    rm -f "$made"
}

# The second place: written to by the service, and by `once`, which takes what the service has.
open_copy_directory() {
    made=$DESTDIR$home/.made
    say "# Of COPY_DIRECTORY=$copy. \"-\": without it the service starts all the same.
[Service]
ReadWritePaths=-$opened" >"$made"
    put_file "$made" "$drop_in/copy-directory.conf" 0644
    rm -f "$made"
    [ -z "$DESTDIR" ] || return 0
    # Only what is new, and nobody else's.
    if [ "$(stat -c %u "$copy")" = 0 ] && [ -z "$(ls -A "$copy")" ]; then
        step chown lnd-backup:lnd-backup "$copy" || :
    fi
}

may_write() { # DIRECTORY: the service's user
    setpriv --reuid=lnd-backup --regid=lnd-backup --clear-groups test -w "$1"
}

# A second copy that cannot be made is told by the service as well; here it is told at once.
say_of_the_copy() {
    set_to=$(setting COPY_DIRECTORY "$settings")
    [ -n "$set_to" ] || return 0
    if [ ! -e "$DESTDIR$drop_in/copy-directory.conf" ]; then
        say "left to do: let the service write to $set_to: sudo make install ${node:+"NODE=$node "}COPY_DIRECTORY=$set_to"
    elif [ -d "$set_to" ] && ! may_write "$set_to"; then
        say "left to do: let the user lnd-backup write to $set_to: docs/second-copy.md"
    fi
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
        say "left to do, so that LND writes its file to $scb (docs/access.md has the lines for your platform):
  stop LND, and copy the old file as $lnd_user:  sudo -u $lnd_user cp OLD/channel.backup $scb/
  add to lnd.conf below [Application Options]:  backupfilepath=$scb/channel.backup
  start LND"
    fi
    if [ ! -e /etc/credstore/aws-credentials ] && ! grep -q '^AWS_SECRET_ACCESS_KEY=.' "$settings"; then
        say 'left to do, unless this machine has an instance role: write the put-only key into one of these files
  /etc/credstore/aws-credentials  (0600; [default], aws_access_key_id = ..., aws_secret_access_key = ...)
'"  $settings"
    fi
    say_of_the_copy
    if ! systemctl --quiet is-active "$service.service"; then
        say "then:   sudo systemctl start $service"
    fi
    command="sudo lnd-backup${node:+" @$node"}"
    say "check:  systemctl status $service; $command check"
    say "alerts: sudoedit /etc/default/lnd-backup-alert; sudo lnd-backup test-alert"
    say "print:  $command card   (to keep with the seed)"
}

running() { # names of the services that run now
    systemctl list-units --plain --no-legend --state=active,activating 'lnd-backup.service' 'lnd-backup@*.service' |
        cut -d' ' -f1
}

# Puts a version in the place of the one in use, with no moment without any.
use() { # NUMBER
    ln -sfn "$1" "$DESTDIR$home/.current"
    mv -T "$DESTDIR$home/.current" "$DESTDIR$home/current"
}

# Restarts what runs; a version that does not start again makes way for the one before.
restart() {
    running=$(running)
    [ -n "$running" ] || return 0
    # shellcheck disable=SC2086 # several services
    # Its start waits for nothing, so a minute is long even on a small board.
    if step timeout 60 systemctl restart $running; then
        return 0
    fi
    if [ -n "$before" ] && [ "$before" != "$number" ] && [ -d "$home/$before" ]; then
        step use "$before"
        # shellcheck disable=SC2086 # several services
        step systemctl reset-failed $running
        # shellcheck disable=SC2086
        step systemctl restart $running || :
    fi
    journalctl --unit=lnd-backup --unit='lnd-backup@*' --lines=20 --no-pager >&2 || :
    give_up 'the new version did not start' 'see the log above; the previous version was started again, if there was one'
}

check_settings() {
    all_settings | while read -r each; do
        if misread=$(faults "$each" | grep -A1 '^cannot read --env-file'); then
            give_up "${misread%%
*}" "${misread##*hint: }; nothing has changed"
        fi
    done
}

put_files() {
    # What an earlier installation was told to make stays its own.
    grep -s -e '  /etc/tmpfiles\.d/' -e '/lnd-directory\.conf$' -e '/copy-directory\.conf$' "$manifest" >"$manifest.new" || :
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
    [ -z "$copy" ] || open_copy_directory
    open_for_checks
}

install_all() {
    check_node
    check_machine
    check_python
    check_given
    check_user
    check_files
    say "installing ${DESTDIR:+into }${DESTDIR:-on this machine}"
    build
    changed=''
    check_settings
    if [ ! -e "$settings" ]; then
        write_settings
    elif [ -n "$copy" ] && [ -z "$(setting COPY_DIRECTORY "$settings")" ]; then
        add_copy_directory
    fi # the last that may refuse
    before=$(readlink "$DESTDIR$home/current") || before=''
    put_files
    [ -e "$DESTDIR/etc/default/lnd-backup-alert" ] ||
        step install -m 0600 systemd/lnd-backup-alert.example "$DESTDIR/etc/default/lnd-backup-alert"
    mv "$manifest.new" "$manifest"
    if [ "$before" != "$number" ]; then
        step use "$number"
        changed=yes
    fi
    [ -z "$changed" ] || here systemctl daemon-reload
    if [ -z "$before" ] || [ -n "$node" ]; then
        here systemctl --quiet enable "$service.service"
    fi
    [ -z "$changed" ] || [ -n "$DESTDIR" ] || restart
    if [ -n "$before" ] && [ "$before" != "$number" ]; then
        step rm -rf "$DESTDIR$home/$before"
    fi
    say_what_is_left
}

services() { # of all nodes, whether they run or not
    all_settings | sed 's|.*/\(.*\)-env$|\1.service|'
    find "$units" -path '*.wants/lnd-backup@*.service' -printf '%f\n'
    running
}

staging_directories() { # of all nodes, one a line
    for each in "$DESTDIR"/var/lib/lnd-backup "$DESTDIR"/var/lib/lnd-backup@*; do
        [ ! -d "$each" ] || say "$each"
    done
    all_settings | while read -r each; do
        own=$(setting BACKUP_DIRECTORY "$each")
        case $own in
        '' | /var/lib/lnd-backup | /var/lib/lnd-backup@*) ;;
        *) [ ! -d "$DESTDIR$own" ] || say "$DESTDIR$own" ;;
        esac
    done
}

waiting() { # the versions that were never sent, one a line
    staging_directories | while read -r each; do
        find "$each" -maxdepth 1 -type f -name '[0-9]*T[0-9]*Z-*' | sort
    done
}

refuse_if_versions_wait() { # WHAT HAS HAPPENED, HOW TO SEND THEM
    [ "$(given FORCE)" != 1 ] || return 0
    waiting=$(waiting)
    [ -n "$waiting" ] || return 0
    say "$waiting" >&2
    give_up "the versions named above never reached the bucket; $1" \
        "$2, or copy them elsewhere; to delete them: sudo make purge FORCE=1"
}

uninstall_all() {
    [ -z "$node" ] || give_up "NODE=$node: this is for all nodes at once" \
        "to remove this node alone: sudo systemctl disable --now $service, then see docs/several-nodes.md"
    check_machine
    [ "$verb" != purge ] || refuse_if_versions_wait 'nothing has changed' \
        'let the service send them (systemctl status says why it does not)'
    stop_all
    close_directories
    remove_files
    for each in "$DESTDIR$units"/lnd-backup*.service.d; do
        rmdir "$each" 2>/dev/null || :
    done
    step rm -rf "$DESTDIR$home" "$DESTDIR/var/lib/lnd-backup-alert"
    here systemctl daemon-reload
    if [ "$verb" = purge ]; then
        purge
    else
        say "kept: settings and staged versions: $(kept); to remove them as well: sudo make purge"
    fi
    for each in "$DESTDIR"/var/lib/lnd-scb "$DESTDIR"/var/lib/lnd-scb@*; do
        [ ! -e "$each" ] || say "kept, because it is LND's: $each (do not delete it while lnd.conf names it in backupfilepath=)"
    done
}

stop_all() {
    [ -z "$DESTDIR" ] || return 0
    # The timers first: a tick would start what is going away.
    step systemctl stop 'lnd-backup*.timer'
    step systemctl stop 'lnd-backup-check@*.service'
    [ -e "$units/lnd-backup.service" ] || return 0
    for unit in $({ echo lnd-backup.service && services; } | sort -u); do
        step systemctl --quiet disable --now "$unit"
    done
    # They were started again with the services, if one of these was restarted meanwhile.
    step systemctl stop 'lnd-backup*.timer'
}

# Takes back the right to enter LND's directories.
close_directories() {
    for each in "$DESTDIR$units"/lnd-backup.service.d "$DESTDIR$units"/lnd-backup@?*.service.d; do
        bind=$(sed -n 's/^BindReadOnlyPaths=-//p' "$each/lnd-directory.conf" 2>/dev/null) || bind=''
        if [ -n "$bind" ] && [ -d "$bind" ]; then
            here setfacl -x u:lnd-backup "$bind"
        fi
    done
}

remove_files() {
    [ -e "$manifest" ] || return 0
    while read -r _ path; do
        if [ ! -e "$DESTDIR$path" ]; then
            continue
        elif is_ours "$path"; then
            step rm -f "$DESTDIR$path"
        else
            say "kept, because somebody changed it: $path"
        fi
    done <"$manifest"
}

kept() {
    for path in "$DESTDIR"/etc/default/lnd-backup-env "$DESTDIR"/etc/default/lnd-backup@*-env \
        "$DESTDIR"/etc/default/lnd-backup-alert "$DESTDIR"/var/lib/lnd-backup "$DESTDIR"/var/lib/lnd-backup@*; do
        [ ! -e "$path" ] || printf '%s ' "${path#"$DESTDIR"}"
    done
}

purge() {
    # LND may have written while the service stopped.
    refuse_if_versions_wait 'the service was removed, its settings and these versions were kept' \
        'let the service send them (sudo make install)'
    waiting=$(waiting)
    [ -z "$waiting" ] || say "deleting what never reached the bucket:
$waiting"
    for path in $(kept); do
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
