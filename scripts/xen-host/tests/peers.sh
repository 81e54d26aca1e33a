# what a request costs dom0: the same guest on xen-blkback, QEMU's qdisk and tapdisk, dom0's CPU time side by side
#
# dom0 ms is all that dom0 used, process ms what the process of the back end did of it (the kernel's has none).
. /xen-host/lib.sh

# At the larger depth a request costs less, and Xen tells CPU time to 100 ms only.
declare -A requests=([1]=4000 [16]=8000)
cat > guest.sh <<'GUEST'
. /guest-lib.sh
disk_wait xvda
# Requests rewrite what is there: no back end has to find room.
dd if=/dev/zero of=/dev/xvda bs=128k oflag=direct 2> /dev/null || true
echo "@guest is ready"
while read -r depth requests && [ "$depth" != 0 ]; do
    disk-load measure /dev/xvda --depth "$depth" --requests "$requests"
    echo "@guest did depth $depth"
done
GUEST
mkfifo never

# until_said NAME TEXT SECONDS: as guest_wait, but without a process: what waits would be measured too.
until_said() {
    local said= left=$(($3 * 2))
    until [[ $said = *"$2"* ]]; do
        [ "$left" -gt 0 ] || fail "waited too long for guest $1 to say $2"
        left=$((left - 1))
        read -r -t 0.5 <> never || true
        IFS= read -r -d '' said < "/var/log/xen/guest-$1.log" || true
    done
}

# CPU time of dom0 so far, in milliseconds, as Xen gives it to the last 100 ms. Linux, which looks at a tick who is
# running, was seen to miss half of short bursts.
dom0_ms() {
    local seconds
    seconds=$(xl list 0 | awk 'END { print $NF }')
    echo "${seconds/./}00"
}

# What asking costs itself.
asking_ms=$(dom0_ms)
for n in 1 2 3 4 5 6 7 8 9; do dom0_ms; done > /dev/null
asking_ms=$((($(dom0_ms) - asking_ms) / 10))

# CPU time of a process so far, 0 without one. Its name, which may have spaces, ends with the last parenthesis.
process_ms() {
    local stat fields
    [ -n "$1" ] || { echo 0; return; }
    stat=$(< "/proc/$1/stat")
    read -r -a fields <<< "${stat##*) }"
    echo $(((fields[11] + fields[12]) * 10))
}

# measure NAME [PID]: the guest is paused, its disk is there; PID is the process that serves it.
measure() {
    local name=$1 depth count dom0 process tty
    tty=$(guest_tty "$name")
    xl unpause "$name"
    guest_wait "$name" 60 '^@guest is ready$'
    for depth in 1 16; do
        count=${requests[$depth]}
        dom0=$(dom0_ms) process=$(process_ms "${2-}")
        echo "$depth $count" > "$tty"
        until_said "$name" "@guest did depth $depth" 100
        dom0=$(($(dom0_ms) - dom0 - asking_ms)) process=$(($(process_ms "${2-}") - process))
        printf '%-12s %5d %9d %8d %11d %15d %14d\n' "$name" "$depth" "$count" "$dom0" "$process" \
            $((dom0 * 1000 / count)) $((count * 1000 / (dom0 + 1))) >> table
    done
    guest_tell "$name" "0 0"
    wait_for 30 guest_gone "$name"
    guest_log "$name" | grep '^@load ends'
    guest_said "$name" '^@guest exit 0$' || fail "the guest's script on $name"
}

printf '%-12s %5s %9s %8s %11s %15s %14s\n' \
    "back end" depth requests "dom0 ms" "process ms" "dom0 us/request" "requests/CPU s" > table
dd if=/dev/zero of=disk.raw bs=1M count=16 2> /dev/null

loop=$(losetup -f)
losetup "$loop" disk.raw
trap 'losetup -d "$loop"' EXIT
blkback on
guest_create xen-blkback guest.sh "disk = [ 'phy:$loop,xvda,w' ]"
measure xen-blkback

guest_create qdisk guest.sh "disk = [ 'format=raw,vdev=xvda,access=rw,backendtype=qdisk,target=$PWD/disk.raw' ]"
measure qdisk "$(pidof xen-qemu-system-i386)"
losetup -d "$loop"

blkback off
for format in raw qcow; do
    [ "$format" = raw ] || tap-img convert -O "$format" disk.raw "disk.$format"
    trap 'guest_clean_up "tapdisk-$format"' EXIT
    guest_create "tapdisk-$format" guest.sh
    vbd_make "$GUEST_ID" xvda
    tapdisk_start "$GUEST_ID/xvda=$format:$PWD/disk.$format"
    measure "tapdisk-$format" "$TAPDISK"
    tapdisk_wait
    vbd_remove
done
cat table
