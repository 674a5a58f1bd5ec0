# A peer: inotifywait tells of each rename, and a tool is started to put the file, as the guides for
# node operators have it, at its best: it watches the directory, and goes on while it uploads.
# Arguments: directory, where to put it, and the tool's command up to that.

directory=$1 target=$2
shift 2
inotifywait --monitor --event moved_to --format %f "$directory" |
while read -r name; do
    [ "$name" = channel.backup ] || continue
    if "$@" "$target$(date +%s%N).backup"; then echo uploaded; else echo failed; fi
done
