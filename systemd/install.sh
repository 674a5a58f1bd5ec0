#!/bin/sh
# install.sh install|uninstall|purge: install or upgrade the service lnd-backup, or remove it.
#
# It runs as root (sudo make install), and prints each step before it takes it.
#
# reads     this checkout; the files named below; the list of users; mode, owner and mount of a
#           directory that you name; whether /etc/credstore/aws-credentials exists
# writes    /opt/lnd-backup, which is the program and its venv; /usr/local/bin/lnd-backup;
#           /etc/systemd/system/lnd-backup*; /etc/sysusers.d/lnd-backup.conf, which creates the user
#           lnd-backup; /etc/default/lnd-backup*, the settings;
#           LND_USER: /etc/tmpfiles.d/lnd-backup*.conf, which creates /var/lib/lnd-scb*;
#           LND_DIRECTORY: its ACL; COPY_DIRECTORY: its owner, if it is root's and empty
# removes   what it wrote, but never /var/lib/lnd-scb*; and /var/lib/lnd-backup-alert and
#           /run/lnd-backup-alert. Only purge removes the settings, the staged versions in
#           /var/lib/lnd-backup*, and the user
# connects  to pip's package index, for wheels whose hashes are in requirements.txt; to nothing else
# never     opens, changes or deletes a file of LND's or of any other user; changes a setting;
#           overwrites or deletes an installed file that somebody changed; deletes a version that
#           was never sent, unless FORCE=1; takes a secret from the command line; asks a question
# order     refuse what cannot work; build the new version beside the old one; write the settings;
#           put the units in place; switch to the new version, or back; say what is left to do
# begin     at install_all. Each function stands below the one that calls it, the tools above all.
#
# Its input are variables of make's command line, whose names are in GIVEN: settings, and
#   LND_USER       the user that runs LND: it may write channel.backup to /var/lib/lnd-scb
#   LND_DIRECTORY  LND's own directory, if channel.backup stays there: the service may read it
#   COPY_DIRECTORY a setting: the service may write there; it is also added to existing settings
#   NODE           another node on this host: its service is lnd-backup@NODE, with its own settings
#   FORCE          1: purge also deletes versions that were never sent
#   PYTHON         the Python to use
#   DESTDIR        the root of a package that is being built: nothing outside it is touched
set -eu
umask 022
unset TMPDIR PYTHONDONTWRITEBYTECODE PYTHONPATH PYTHONHOME
cd "$(dirname "$0")/.."

# --- Tools ---

say() { printf '%s\n' "$*"; }

give_up() { # MESSAGE HINT
    printf 'cannot %s: %s\nhint: %s\n' "$verb" "$1" "$2" >&2
    exit 1
}

# Prints a step and takes it.
step() {
    printf '+ %s\n' "$*"
    "$@"
}

# A step for this machine's systemd and users. Of a package, its own scripts take it later.
here() {
    [ -n "$DESTDIR" ] || step "$@"
}

given() { # NAME: its value on make's command line
    case " ${GIVEN-} " in
    *" $1 "*) printenv "$1" ;;
    esac
}

setting() { # NAME FILE: its value, without quotes
    sed -n "s/^[[:space:]]*$1[[:space:]]*=[[:space:]]*//p" "$2" | tail -n 1 |
        sed -e 's/[[:space:]]*$//' -e 's/^"\(.*\)"$/\1/' -e "s/^'\(.*\)'\$/\1/"
}

all_settings() { # the files of all nodes, one a line
    for each in "$DESTDIR"/etc/default/lnd-backup-env "$DESTDIR"/etc/default/lnd-backup@*-env; do
        [ ! -e "$each" ] || say "$each"
    done
}

running() { # the services that run, one a line
    systemctl list-units --plain --no-legend --state=active,activating \
        lnd-backup.service 'lnd-backup@*.service' | cut -d' ' -f1
}

# --- Names ---

verb=${1-}
DESTDIR=${DESTDIR-}
PYTHON=${PYTHON-python3}
home=/opt/lnd-backup            # NUMBER/ is a version; "current" is a link to the one in use
work=$DESTDIR$home/.work        # what is not whole yet
manifest=$DESTDIR$home/manifest # the SHA-256 of each file outside $home, as it was installed
units=/etc/systemd/system
node=$(given NODE)
service=lnd-backup${node:+"@$node"}
settings=$DESTDIR/etc/default/$service-env
settings_name=${settings#"$DESTDIR"}
drop_in=$units/$service.service.d
scb=/var/lib/lnd-scb${node:+"@$node"}
tmpfiles=/etc/tmpfiles.d/$service.conf
lnd_user=$(given LND_USER)
lnd_directory=$(given LND_DIRECTORY)
copy=$(given COPY_DIRECTORY)
newline='
'

# --- Install ---

install_all() {
    check_node
    check_machine
    check_python
    check_given
    check_lnd_user
    check_lnd_directory
    check_monitored
    check_copy
    check_user
    check_files
    say "installing ${DESTDIR:+into }${DESTDIR:-on this machine}"
    begin_work
    build_version
    check_existing_settings
    write_settings # the last step that may refuse
    put_files
    switch_version
    say_what_is_left
}

# --- Refusals, before anything is changed ---

check_node() {
    case $node in
    *[!A-Za-z0-9_.-]*)
        give_up "NODE=$node is not a valid name for a node" 'use letters, digits, and _ . -' ;;
    esac
}

check_machine() {
    [ -z "$DESTDIR" ] || return 0
    [ "$(id -u)" = 0 ] || give_up 'only root can do this' "sudo make $verb"
    [ -d /run/systemd/system ] || give_up 'systemd is not running here' \
        'run it by hand or under another supervisor: README.md, "Run it by hand"'
    version=$(systemctl --version | sed -n '1s/^systemd \([0-9]*\).*/\1/p')
    [ "${version:-0}" -ge 250 ] || give_up \
        "systemd ${version:-?} is too old: the unit needs 250 or newer" \
        'use Debian 12, Ubuntu 24.04 or newer'
}

check_python() {
    command -v "$PYTHON" >/dev/null ||
        give_up "there is no $PYTHON" 'apt install python3 python3-venv'
    "$PYTHON" -I -c 'import sys; sys.exit(sys.version_info < (3, 11))' || give_up \
        "$("$PYTHON" --version 2>&1) is too old: 3.11 or newer is needed" \
        'name a newer one: make install PYTHON=python3.11'
    "$PYTHON" -I -c 'import ensurepip, venv; ensurepip.version()' 2>/dev/null || give_up \
        "$PYTHON has no venv module" \
        'apt install python3-venv (elsewhere: the package that has ensurepip)'
    case $("$PYTHON" -I -c 'import os, sys; print(os.path.realpath(sys.executable))') in
    /usr/*) ;;
    *) give_up "$PYTHON is not in /usr, and the service can execute nothing else" \
        'name another one: make install PYTHON=…' ;;
    esac
}

check_given() {
    for name in ${GIVEN-}; do
        is_setting "$name" || continue
        value=$(printenv "$name") || value=''
        check_name "$name"
        check_value "$name" "$value"
        check_that_it_agrees "$name" "$value"
    done
}

is_setting() { # NAME
    case $1 in
    PYTHON | DESTDIR | LND_USER | LND_DIRECTORY | NODE) return 1 ;;
    esac
}

# A secret on a command line stays in the shell's history, and every user sees it in the list of
# processes.
check_name() { # NAME
    case $1 in
    *SECRET* | *TOKEN* | *PASSWORD* | AWS_ACCESS_KEY_ID | HEARTBEAT_URL)
        give_up "$1 is a secret and must not be on a command line" \
            "leave it out, and write it into $settings_name" ;;
    AWS_*[!A-Z0-9_]* | *[!A-Za-z0-9_]*) ;;
    AWS_* | HTTPS_PROXY | HTTP_PROXY | NO_PROXY | https_proxy | http_proxy | no_proxy) return 0 ;;
    *) if grep -q -e "^$1=" -e "^#$1=" lnd-backup-env.example; then return 0; fi ;;
    esac
    give_up "there is no setting $1" 'lnd-backup-env.example has all names'
}

check_value() { # NAME VALUE
    case $2 in
    *://*@*)
        give_up "$1 holds a password, which must not be on a command line" \
            "leave it out, and write it into $settings_name" ;;
    *"$newline"*) give_up "$1 has more than one line" 'write it as one line' ;;
    esac
}

check_that_it_agrees() { # NAME VALUE
    [ -e "$settings" ] || return 0
    if [ "$1" = COPY_DIRECTORY ] && [ -z "$(setting COPY_DIRECTORY "$settings")" ]; then
        return 0 # it will be added
    fi
    # The unit changes with COPY_DIRECTORY, so this is needed again.
    then="leave out $1"
    [ "$1" != COPY_DIRECTORY ] || then='run this again'
    grep -qxF -e "$1=$2" -- "$settings" || give_up \
        "there is no line $1=$2 in $settings_name, which is never changed" \
        "edit the file: sudoedit $settings_name, and $then"
}

check_lnd_user() {
    show_user='this shows the user that runs LND: ps -o user= -C lnd'
    case $lnd_user in
    *[!A-Za-z0-9_.-]*) give_up "LND_USER=$lnd_user is not a valid user name" "$show_user" ;;
    esac
    if [ -n "$lnd_user" ] && [ -z "$DESTDIR" ]; then
        getent passwd "$lnd_user" >/dev/null || give_up "there is no user $lnd_user" "$show_user"
    fi
}

check_lnd_directory() {
    [ -n "$lnd_directory" ] || return 0
    [ -z "$lnd_user" ] ||
        give_up 'LND_USER and LND_DIRECTORY exclude each other' 'choose one: docs/access.md'
    [ -d "$lnd_directory" ] ||
        give_up "$lnd_directory is not a directory" 'name the directory that holds channel.backup'
    lnd_directory=$(realpath -- "$lnd_directory")
    case $lnd_directory in
    *[!A-Za-z0-9_./@+-]*)
        give_up "a unit file would read the name $lnd_directory differently" 'use LND_USER' ;;
    esac
    command -v setfacl >/dev/null || give_up 'there is no setfacl' 'apt install acl'
}

# Otherwise LND would write one file, and the service would back up another that no longer changes.
check_monitored() {
    expected=${lnd_directory:-${lnd_user:+"$scb"}}
    set_to=$(given MONITOR_FILE_PATH)
    has="make's command line"
    if [ -z "$set_to" ] && [ -e "$settings" ]; then
        set_to=$(setting MONITOR_FILE_PATH "$settings")
        has=$settings_name
    fi
    [ -n "$expected" ] && [ -n "$set_to" ] || return 0
    [ "$(realpath -m -- "$(dirname -- "$set_to")")" = "$(realpath -m -- "$expected")" ] || give_up \
        "$has has MONITOR_FILE_PATH=$set_to, which is not in $expected" \
        "sudoedit $settings_name, and write MONITOR_FILE_PATH=$expected/channel.backup;\
 or leave out ${lnd_user:+LND_USER}${lnd_directory:+LND_DIRECTORY}"
}

check_copy() {
    [ -n "$copy" ] || return 0
    case $copy in
    /home/* | /root/* | /run/user/* | /tmp/* | /var/tmp/*)
        give_up "the service cannot see home directories, and has a /tmp of its own: $copy" \
            'name a directory elsewhere: docs/second-copy.md' ;;
    *[!A-Za-z0-9_./@+-]*)
        give_up "a unit file would read this name differently: $copy" \
            'use a path of letters, digits, and _ . / @ + -' ;;
    esac
    [ -d "$copy" ] || give_up "there is no directory $copy" \
        "mount the device first, then create the directory: sudo mkdir $copy"
    # A link could lead somewhere else tomorrow.
    real=$(realpath -- "$copy")
    [ "$real" = "$copy" ] ||
        give_up "the real path of $copy is $real" "make install COPY_DIRECTORY=$real"
    find_what_to_open
    refuse_what_others_use
}

# The program would not start with the first ones. Of the others, nobody could tell which file is
# of which node.
refuse_what_others_use() {
    [ -n "$lnd_directory" ] || [ -z "$watched" ] || watched=$(dirname -- "$watched")
    for each in ${watched:+"$watched"} ${lnd_user:+"$scb"} "/var/lib/$service"; do
        case $copy/ in
        "$each"/*)
            give_up "$copy is LND's, or the staging directory: $each" 'name another directory' ;;
        esac
    done
    all_settings | while read -r each; do
        [ "$each" = "$settings" ] || [ "$(setting COPY_DIRECTORY "$each")" != "$copy" ] ||
            give_up "$copy is COPY_DIRECTORY in ${each#"$DESTDIR"}, too" \
                'create a directory for each node: docs/several-nodes.md'
    done
}

# Sets opened, what the service may write to: the mount point, not the directory on it. systemd
# would mount that directory for the service alone. An unmounted stick would stay in use, and the
# service would not see the stick that comes next.
find_what_to_open() {
    opened=$(stat -c %m -- "$copy")
    [ "$opened" != "$copy" ] || give_up \
        "$copy is the mount point, which also exists when nothing is mounted" \
        "create a directory on the device: sudo mkdir $copy/lnd-backup"
    watched=${lnd_directory:-$(given MONITOR_FILE_PATH)}
    if [ -z "$watched" ] && [ -e "$settings" ]; then
        watched=$(setting MONITOR_FILE_PATH "$settings")
    fi
    # On a disk that is never unmounted, and on LND's own disk, the directory alone is opened.
    case "$opened $watched" in
    '/ '* | '/var '* | /var/* | '/srv '* | '/opt '* | "$opened $opened/"*) opened=$copy ;;
    esac
}

# The service would share its files with a person who logs in as lnd-backup.
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

check_files() {
    foreign=''
    while read -r source path _; do
        cmp -s "$source" "$DESTDIR$path" || is_free "$path" || foreign=$path
    done <<END
$(files)
END
    for path in ${lnd_user:+"$tmpfiles"} ${lnd_directory:+"$drop_in/lnd-directory.conf"} \
        ${copy:+"$drop_in/copy-directory.conf"} $(drop_ins_for_checks); do
        is_free "$path" || foreign=$path
    done
    for directory in "$home" /etc/default "$units" "$drop_in"; do
        [ ! -e "$DESTDIR$directory" ] || [ -d "$DESTDIR$directory" ] || foreign=$directory
    done
    [ -z "$foreign" ] || give_up \
        "$foreign exists, and the installer did not create it, or somebody has changed it" \
        "move it away; put your own changes into a drop-in: systemctl edit $service"
}

# The files outside /opt/lnd-backup: source, path, mode.
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
    # systemd 252 would warn of settings that it does not know.
    if [ -n "$DESTDIR" ] || [ "$version" -ge 254 ]; then
        say "systemd/restart-steps.conf $units/lnd-backup.service.d/restart-steps.conf 0644"
        say "systemd/restart-steps.conf $units/lnd-backup@.service.d/restart-steps.conf 0644"
    fi
}

is_free() { # PATH: nothing is there, or what an earlier installation put there
    if [ -e "$DESTDIR$1" ] || [ -L "$DESTDIR$1" ]; then
        is_ours "$1"
    fi
}

is_ours() { # PATH: the file is as it was installed
    [ -f "$DESTDIR$1" ] || return 1
    sum=$(sha256sum "$DESTDIR$1" | cut -d' ' -f1)
    grep -qsxF "$sum  $1" "$manifest"
}

# --- The new version, in /opt/lnd-backup ---

begin_work() {
    changed='' # yes: something that runs has to be restarted
    created='' # not empty: the settings are new, and somebody wants this node
    mkdir -p "$DESTDIR$home"
    exec 9<"$DESTDIR$home"
    flock -n 9 || give_up 'another installation is at work' 'wait until it is over'
    trap clean_up EXIT
    rm -rf "$work"
    install -d -m 0700 "$work" "$work/replaced"
}

clean_up() {
    rm -rf "$work" "$settings.new"
    rmdir "$DESTDIR$home" 2>/dev/null || : # it goes only if it is empty
}

build_version() {
    program='s3_backup_lnd_channels.py requirements.txt lnd-backup-env.example'
    program="$program systemd/alert.py systemd/check-twice systemd/remount-if-replaced"
    program="$program docs/operations.md docs/recovery.md docs/access.md docs/second-copy.md"
    program="$program docs/several-nodes.md docs/containers.md docs/reference.md docs/alerts.yml"
    program="$program docs/stores.md docs/aws-bucket.yaml docs/aws-bucket.sh"
    number=$(version_number)
    new=$DESTDIR$home/$number
    if [ -d "$new" ]; then
        say "$home/$number is already installed"
        return
    fi
    partial=$work/version
    make_venv
    copy_program
    compile_program
    "$partial/venv/bin/python" -I -m s3_backup_lnd_channels --version >/dev/null ||
        give_up 'the new version does not start' 'see the message above; nothing has changed'
    step mv "$partial" "$new"
}

# The same sources and the same Python have the same number.
version_number() {
    {
        # shellcheck disable=SC2086 # $program is a list of files
        cat $program
        "$PYTHON" -I -c 'import os, sys; print(sys.version, os.path.realpath(sys.executable))'
    } | sha256sum | cut -c1-12
}

# Only wheels, and only those whose hashes are pinned: pip runs no code of a package.
make_venv() {
    step "$PYTHON" -I -m venv "$partial/venv"
    step "$partial/venv/bin/python" -I -m pip install --quiet --disable-pip-version-check \
        --no-compile --no-input --only-binary :all: --require-hashes -r requirements.txt ||
        give_up 'the packages could not be installed' \
            "see pip's message above; nothing has changed, and what was running still runs"
    # The service needs neither of them, and what is not there cannot be misused.
    step "$partial/venv/bin/python" -I -m pip --quiet --quiet --disable-pip-version-check \
        uninstall --yes setuptools pip
    # These name the directory in which the version is built. The interpreter is a link, and stays.
    find "$partial/venv/bin" -type f -delete
    sed -i '/^command = /d' "$partial/venv/pyvenv.cfg"
}

copy_program() {
    for file in $program; do
        install -D -m 0644 "$file" "$partial/${file#systemd/}"
    done
    chmod 0755 "$partial/check-twice" "$partial/remount-if-replaced"
}

compile_program() {
    # `python -m` starts the compiled program only from here.
    ln -s ../../../../s3_backup_lnd_channels.py "$partial"/venv/lib/python3*/site-packages/
    step "$partial/venv/bin/python" -I -m compileall -q -s "$partial" -p "$home/current" \
        "$partial/venv/lib"
}

# --- The settings ---

# An upgrade must not stop a node whose settings systemd and the program read differently.
check_existing_settings() {
    all_settings | while read -r each; do
        if misread=$(faults "$each" | grep -A1 '^cannot read --env-file'); then
            give_up "${misread%%"$newline"*}" "${misread##*hint: }; nothing has changed"
        fi
    done
}

# Lists what the new version finds wrong with settings. This HEARTBEAT_URL is always wrong, so that
# the program looks no further than its settings. That one fault is left out here. It hides the
# same one in the file, which no command line can have brought there.
faults() { # FILE
    env -i PATH="$PATH" HEARTBEAT_URL=- \
        "$new/venv/bin/python" -I "$new/s3_backup_lnd_channels.py" --env-file "$1" check 2>&1 |
        sed -e 's/^[-0-9]* [:0-9]* error: //' -e '/: HEARTBEAT_URL=/,/^hint: /d'
}

write_settings() {
    filled=$work/settings
    if [ ! -e "$settings" ]; then
        fill_in_the_example
        refuse_what_is_wrong
        step install -D -m 0600 "$filled" "$settings"
        created=${node:-${lnd_user:-${lnd_directory:-$(given S3_BUCKET_NAME)}}}
    elif [ -n "$copy" ] && [ -z "$(setting COPY_DIRECTORY "$settings")" ]; then
        add_copy_directory
    fi
    [ -e "$DESTDIR/etc/default/lnd-backup-alert" ] || step install -m 0600 \
        systemd/lnd-backup-alert.example "$DESTDIR/etc/default/lnd-backup-alert"
}

# What was not given stays empty, so that nobody runs with an example.
fill_in_the_example() {
    cat lnd-backup-env.example >"$filled"
    put MONITOR_FILE_PATH ''
    put S3_BUCKET_NAME ''
    if [ -n "$lnd_directory" ]; then
        put MONITOR_FILE_PATH "$lnd_directory/channel.backup"
    elif [ -n "$lnd_user" ]; then
        put MONITOR_FILE_PATH "$scb/channel.backup"
    fi
    # Two nodes must not share a prefix. The machine that builds a package is none of them.
    [ -n "$DESTDIR" ] || put S3_BACKUP_PREFIX "$(uname -n)${node:+"-$node"}/"
    for name in ${GIVEN-}; do
        ! is_setting "$name" || put "$name" "$(printenv "$name")"
    done
}

put() { # NAME VALUE: in place of the line that has it, commented or not, or at the end
    NAME=$1 VALUE=$2 awk '
        BEGIN { name = ENVIRON["NAME"]; line = name "=" ENVIRON["VALUE"] }
        !done && (index($0, name "=") == 1 || index($0, "#" name "=") == 1) { $0 = line; done = 1 }
        { print }
        END { if (!done) print line }' "$filled" >"$filled.new"
    mv "$filled.new" "$filled"
}

# Refuses what was given and cannot be, in the program's own words.
refuse_what_is_wrong() {
    found=$(faults "$filled")
    misread=$(say "$found" | sed -n 's/^cannot read --env-file: .*: line \([0-9]*\).*/\1/p')
    if [ -n "$misread" ]; then
        line=$(sed -n "${misread}p" "$filled")
        give_up "systemd would read the value of ${line%%=*} differently: ${line#*=}" \
            'write it without quotes, # and backslashes'
    fi
    for name in ${GIVEN-}; do
        refused=$(say "$found" | grep -A1 "^configuration: $name=") || continue
        give_up "${refused%%"$newline"*}" "${refused##*hint: }"
    done
}

# The only setting that is added to existing ones, because the unit must change with it.
add_copy_directory() {
    cat "$settings" >"$filled"
    put COPY_DIRECTORY "$copy"
    refuse_what_is_wrong
    say "+ COPY_DIRECTORY=$copy >> $settings"
    cp --preserve=mode,ownership "$settings" "$settings.new"
    cat "$filled" >"$settings.new"
    mv "$settings.new" "$settings"
    changed=yes
}

# --- Units, the user, and what the service may see ---

put_files() {
    # Keeps the lines of files that an earlier installation made by LND_USER and the like.
    grep -s -e '  /etc/tmpfiles\.d/' -e '/lnd-directory\.conf$' -e '/copy-directory\.conf$' \
        "$manifest" >"$work/manifest" || :
    while read -r source path mode; do
        put_file "$source" "$path" "$mode" </dev/null
    done <<END
$(files)
END
    here systemd-sysusers /etc/sysusers.d/lnd-backup.conf
    [ -z "$lnd_user" ] || open_scb
    [ -z "$lnd_directory" ] || open_lnd_directory
    [ -z "$copy" ] || open_copy_directory
    open_for_checks
    [ ! -e "$manifest" ] || cp "$manifest" "$work/manifest.before"
    mv "$work/manifest" "$manifest"
}

put_file() { # SOURCE PATH MODE
    if ! cmp -s "$1" "$DESTDIR$2"; then
        keep_for_a_way_back "$2"
        step install -D -m "$3" "$1" "$DESTDIR$2"
        changed=yes
    fi
    awk -v path="$2" '$2 != path' "$work/manifest" >"$work/manifest.new"
    say "$(sha256sum "$DESTDIR$2" | cut -d' ' -f1)  $2" >>"$work/manifest.new"
    mv "$work/manifest.new" "$work/manifest"
}

keep_for_a_way_back() { # PATH
    mkdir -p "$work/replaced${1%/*}"
    if [ -e "$DESTDIR$1" ]; then
        cp --preserve=mode "$DESTDIR$1" "$work/replaced$1"
    else
        say "$1" >>"$work/added"
    fi
}

# The directory for LND's backupfilepath=, created now and at every boot.
open_scb() {
    sed -e "s/ bitcoin / $lnd_user /" -e "s|/var/lib/lnd-scb|$scb|" \
        systemd/lnd-backup.tmpfiles >"$work/made"
    put_file "$work/made" "$tmpfiles" 0644
    here systemd-tmpfiles --create "$tmpfiles"
}

# The service sees LND's own directory, and nothing else of the outermost directory around it that
# is closed to others. So it needs no permission on those.
open_lnd_directory() {
    hidden='' above=$(dirname "$lnd_directory")
    while [ "$above" != / ]; do
        case $(stat -c %A "$above") in
        *[xt]) ;;
        *) hidden=$above ;;
        esac
        above=$(dirname "$above")
    done
    case $lnd_directory in
    /home/* | /root/*) hide='ProtectHome=tmpfs' ;;
    *) hide=${hidden:+"TemporaryFileSystem=$hidden:ro"} ;;
    esac
    sed -e "s|^ProtectHome=tmpfs|$hide|" -e "s|^\(BindReadOnlyPaths=-\).*|\1$lnd_directory|" \
        systemd/lnd-directory.conf >"$work/made"
    put_file "$work/made" "$drop_in/lnd-directory.conf" 0644
    here setfacl -m u:lnd-backup:rx "$lnd_directory"
}

# The service may write to the second place. `once` takes over what the service may do.
open_copy_directory() {
    say "# Of COPY_DIRECTORY=$copy. \"-\": the service also starts without it.
[Service]
ReadWritePaths=-$opened" >"$work/made"
    put_file "$work/made" "$drop_in/copy-directory.conf" 0644
    # A directory that is new belongs to root and is empty. Any other one is somebody else's.
    if [ "$(stat -c %u "$copy")" = 0 ] && [ -z "$(ls -A "$copy")" ]; then
        here chown lnd-backup:lnd-backup "$copy" || : # FAT has no owners
    fi
}

# The hourly check sees what the service sees of LND's directory, also on a node that was installed
# before there was a check.
open_for_checks() {
    for path in $(drop_ins_for_checks); do
        sed -n '/^\[Service\]/,$p' "$DESTDIR$(of_the_service "$path")" >"$work/made"
        put_file "$work/made" "$path" 0644
    done
}

drop_ins_for_checks() { # of all nodes that have one, one a line
    for each in "$DESTDIR$units"/lnd-backup.service.d "$DESTDIR$units"/lnd-backup@?*.service.d; do
        [ ! -e "$each/lnd-directory.conf" ] ||
            say "$units/lnd-backup-check@${each##*/}/lnd-directory.conf"
    done
}

of_the_service() { # DROP-IN OF A CHECK
    printf '%s/%s' "$units" "${1#"$units"/lnd-backup-check@}"
}

# --- The switch ---

switch_version() {
    before=$(readlink "$DESTDIR$home/current") || before=''
    if [ "$before" != "$number" ]; then
        use "$number"
        changed=yes
    fi
    [ -z "$changed" ] || here systemctl daemon-reload
    # A node that was here before is not enabled again: somebody may have disabled it.
    if [ -z "$before" ] || [ -n "$created" ]; then
        here systemctl --quiet enable "$service.service"
    fi
    [ -z "$changed" ] || [ -n "$DESTDIR" ] || restart
    if [ -n "$before" ] && [ "$before" != "$number" ]; then
        step rm -rf "$DESTDIR$home/$before"
    fi
}

# A rename, so that there is no moment without a version.
use() { # NUMBER
    ln -sfn "$1" "$DESTDIR$home/.current"
    step mv -T "$DESTDIR$home/.current" "$DESTDIR$home/current"
}

# shellcheck disable=SC2086 # $services is a list
restart() {
    services=$(running)
    [ -n "$services" ] || return 0
    # Restarts by hand count towards the start limit, and would make this one fail.
    step systemctl reset-failed $services || :
    # A stop lasts as long as the settings allow. A start waits for nothing, so a minute is long
    # even on a small board.
    step systemctl stop $services || :
    if step timeout 60 systemctl start $services; then
        return
    fi
    journalctl --unit=lnd-backup --unit='lnd-backup@*' --lines=20 --no-pager >&2 || :
    put_back
    then='the previous version does not start either'
    ! step timeout 60 systemctl start $services || then='the previous version runs again'
    give_up 'the new version did not start' "see the log above; $then"
}

# The program and the units are as before. The settings stay as they are.
# shellcheck disable=SC2086 # $services is a list
put_back() {
    if [ "$before" != "$number" ] && [ -d "$home/$before" ]; then
        use "$before"
        step rm -rf "${home:?}/$number"
    fi
    if [ -e "$work/manifest.before" ]; then
        mv "$work/manifest.before" "$manifest"
        [ ! -e "$work/added" ] || xargs -d '\n' rm -f <"$work/added"
        find "$work/replaced" -type f | while read -r each; do
            step cp --preserve=mode "$each" "${each#"$work/replaced"}"
        done
    fi
    step systemctl daemon-reload
    step systemctl reset-failed $services || :
}

# --- What is left to do ---

say_what_is_left() {
    say ''
    say "installed: $home/current -> $number; to upgrade, run make install again"
    wrong=$(faults "$settings")
    if [ -n "$wrong" ]; then
        say "left to do: fill in the settings: sudoedit $settings_name"
        say "$wrong" | sed 's/^/  /'
    fi
    [ -z "$DESTDIR" ] || return 0
    say_where_the_key_belongs
    [ -z "$lnd_user" ] || say_what_lnd_lacks
    say_what_the_copy_lacks
    say_what_comes_next
}

say_where_the_key_belongs() {
    [ ! -e /etc/credstore/aws-credentials ] || return 0
    ! grep -q '^AWS_SECRET_ACCESS_KEY=.' "$settings" || return 0
    say "left to do, unless this machine has an instance role: write the put-only key into
  $settings_name
  or, with mode 0600, into /etc/credstore/aws-credentials:
    [default]
    aws_access_key_id = ...
    aws_secret_access_key = ..."
}

say_what_lnd_lacks() {
    if [ -e "$drop_in/lnd-directory.conf" ]; then
        seen=$(sed -n 's/^BindReadOnlyPaths=-//p' "$drop_in/lnd-directory.conf")
        say "left to do: take back what an earlier LND_DIRECTORY= opened to the service:
  sudo setfacl -x u:lnd-backup '$seen'
  sudo rm $drop_in/lnd-directory.conf $units/lnd-backup-check@$service.service.d/lnd-directory.conf
  sudo systemctl daemon-reload"
    fi
    say "left to do, unless LND writes to $scb already: let it write there, and see that it does" \
        "before you start the service: steps 2 to 4 of method 1 in docs/access.md"
}

# The service says so as well, but later.
say_what_the_copy_lacks() {
    set_to=$(setting COPY_DIRECTORY "$settings")
    [ -n "$set_to" ] || return 0
    if [ ! -e "$drop_in/copy-directory.conf" ]; then
        say "left to do: let the service write to $set_to:" \
            "sudo make install ${node:+"NODE=$node "}COPY_DIRECTORY=$set_to"
    elif [ -d "$set_to" ] && ! setpriv --reuid=lnd-backup --regid=lnd-backup \
        --clear-groups test -w "$set_to"; then
        say "left to do: let the user lnd-backup write to $set_to: docs/second-copy.md"
    fi
}

say_what_comes_next() {
    command="sudo lnd-backup${node:+" @$node"}"
    systemctl --quiet is-active "$service.service" ||
        say "start:  sudo systemctl start $service"
    say "check:  systemctl status $service; $command check"
    say "alerts: sudoedit /etc/default/lnd-backup-alert; sudo lnd-backup test-alert"
    say "print:  $command card (to keep with the seed)"
    all_settings | sed 's|.*/\(.*\)-env$|\1|' | while read -r each; do
        systemctl --quiet is-enabled "$each.service" ||
            say "note:   $each does not start at boot; to change that: sudo systemctl enable $each"
    done
}

# --- Uninstall and purge ---

uninstall_all() {
    [ -z "$node" ] || give_up "NODE=$node: this removes all nodes at once" \
        "to remove this one: sudo systemctl disable --now $service, then see docs/several-nodes.md"
    check_machine
    [ "$verb" != purge ] || refuse_if_versions_wait 'nothing has changed' \
        'let the service send them (systemctl status says why it does not)'
    stop_all
    close_lnd_directories
    remove_files
    step rm -rf "$DESTDIR$home" "$DESTDIR/var/lib/lnd-backup-alert" \
        "$DESTDIR/run/lnd-backup-alert"
    here systemctl daemon-reload
    if [ "$verb" = purge ]; then
        purge
    else
        say "kept: settings and staged versions: $(kept); to remove them as well: sudo make purge"
    fi
    for each in "$DESTDIR"/var/lib/lnd-scb "$DESTDIR"/var/lib/lnd-scb@*; do
        [ ! -e "$each" ] || say "kept, because it is LND's: $each" \
            "(do not delete it while lnd.conf names it in backupfilepath=)"
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

waiting() { # the versions that were never sent, one a line
    staging_directories | while read -r each; do
        find "$each" -type f -regextype posix-extended \
            -regex '.*/[0-9]{8}T[0-9]{6}\.[0-9]{6}Z-[0-9a-f]{6}' | sort
    done | sort -u
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

stop_all() {
    [ -z "$DESTDIR" ] || return 0
    # The timers first: one of them would start what is going away.
    step systemctl stop 'lnd-backup*.timer'
    step systemctl stop 'lnd-backup-check@*.service'
    [ -e "$units/lnd-backup.service" ] || return 0
    for unit in $(all_services | sort -u); do
        step systemctl --quiet disable --now "$unit"
    done
    # A service that was restarted meanwhile has started its timers again.
    step systemctl stop 'lnd-backup*.timer'
}

all_services() { # of all nodes, whether they run or not
    say lnd-backup.service
    all_settings | sed 's|.*/\(.*\)-env$|\1.service|'
    find "$units" -path '*.wants/lnd-backup@*.service' -printf '%f\n'
    running
}

# Takes back the right to enter LND's directories.
close_lnd_directories() {
    for each in "$DESTDIR$units"/lnd-backup.service.d "$DESTDIR$units"/lnd-backup@?*.service.d; do
        [ -e "$each/lnd-directory.conf" ] || continue
        sed -n 's/^BindReadOnlyPaths=-//p' "$each/lnd-directory.conf" | while read -r directory; do
            [ ! -d "$directory" ] || here setfacl -x u:lnd-backup "$directory"
        done
    done
}

remove_files() {
    [ -e "$manifest" ] || return 0
    while read -r _ path; do
        if is_ours "$path"; then
            step rm -f "$DESTDIR$path"
        elif [ -e "$DESTDIR$path" ]; then
            say "kept, because somebody changed it: $path"
        fi
    done <"$manifest"
    for each in "$DESTDIR$units"/lnd-backup*.service.d; do
        rmdir "$each" 2>/dev/null || : # it holds a drop-in of the operator's
    done
}

purge() {
    # LND may have written a version while the service stopped.
    refuse_if_versions_wait 'the service was removed, its settings and these versions were kept' \
        'let the service send them (sudo make install)'
    waiting | while read -r each; do
        case ${each#"$DESTDIR"} in
        /var/lib/lnd-backup*) say "deleting what never reached the bucket: $each" ;;
        *) say "kept, although it never reached the bucket: $each" ;;
        esac
    done
    for path in $(kept); do
        step rm -rf "$DESTDIR$path"
    done
    [ -n "$DESTDIR" ] || ! getent passwd lnd-backup >/dev/null || step userdel lnd-backup
}

kept() { # what uninstall leaves, in one line
    for path in "$DESTDIR"/etc/default/lnd-backup-env "$DESTDIR"/etc/default/lnd-backup@*-env \
        "$DESTDIR"/etc/default/lnd-backup-alert "$DESTDIR"/var/lib/lnd-backup \
        "$DESTDIR"/var/lib/lnd-backup@*; do
        [ ! -e "$path" ] || printf '%s ' "${path#"$DESTDIR"}"
    done
}

# --- Begin ---

case $verb in
install) install_all ;;
uninstall | purge) uninstall_all ;;
*)
    sed -n '2s/^# //p' systemd/install.sh >&2
    exit 2
    ;;
esac
