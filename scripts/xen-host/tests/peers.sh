# what a request costs dom0: the same guest on xen-blkback, QEMU's qdisk and tapdisk, dom0's CPU time side by side
## dom0 ms is everything that dom0 used, process ms the part of it used by the back end's process (the kernel's has
# none).
. /xen-host/lib.sh

cat > guest.sh <<'GUEST'
. /guest-lib.sh
for disk in xvda xvdb xvdc xvdd; do
    disk_wait $disk
    # Requests rewrite existing data: no back end has to allocate space.
    dd if=/dev/zero of=/dev/$disk bs=128k oflag=direct 2> /dev/null || true
done
echo "@guest is ready"
while read -r disk depth requests && [ "$depth" != 0 ]; do
    disk-load measure "/dev/$disk" --depth "$depth" --requests "$requests"
    echo "@guest did $disk at depth $depth"
done
GUEST
mkfifo never

# until_said TEXT SECONDS: as guest_wait, but without a process: a waiting process would be measured too.
until_said() {
    local said= left=$(($2 * 2))
    until [[ $said = *"$1"* ]]; do
        [ "$left" -gt 0 ] || fail "waited too long for the guest to say $1"
        left=$((left - 1))
        read -r -t 0.5 <> never || true
        IFS= read -r -d '' said < /var/log/xen/guest-peers.log || true
    done
}

# CPU time of dom0 so far, in milliseconds, as reported by Xen with a resolution of 100 ms. Linux, which samples at
# ticks, was seen to miss half of short bursts.
dom0_ms() {
    local seconds
    seconds=$(xl list 0 | awk 'END { print $NF }')
    echo "${seconds/./}00"
}

# The cost of the measurement itself.
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

# measure BACK_END DISK [PID]: PID is the process that serves the disk.
measure() {
    local depth count dom0 process
    # At the larger depth a request costs less.
    for depth in 1 16; do
        count=$((depth == 1 ? 4000 : 8000))
        dom0=$(dom0_ms) process=$(process_ms "${3-}")
        echo "$2 $depth $count" > "$tty"
        until_said "@guest did $2 at depth $depth" 100
        dom0=$(($(dom0_ms) - dom0 - asking_ms)) process=$(($(process_ms "${3-}") - process))
        printf '%-12s %5d %9d %8d %11d %15d %14d\n' "$1" "$depth" "$count" "$dom0" "$process" \
            $((dom0 * 1000 / count)) $((count * 1000 / (dom0 + 1))) >> table
    done
}

for name in loop qdisk tapdisk; do
    dd if=/dev/zero of=$name.raw bs=1M count=16 2> /dev/null
done
tap-img create -f qcow tapdisk.qcow 16M
loop=$(losetup -f)
losetup "$loop" loop.raw
trap 'guest_clean_up peers losetup -d "$loop"' EXIT
blkback on
guest_create peers guest.sh "disk = [ 'phy:$loop,xvda,w',
    'format=raw,vdev=xvdb,access=rw,backendtype=qdisk,target=$PWD/qdisk.raw' ]"
# A directory that xen-blkback does not watch.
vbd_make "$GUEST_ID" xvdc tap
vbd_make "$GUEST_ID" xvdd tap
tapdisk_start --type tap "$GUEST_ID/xvdc=raw:$PWD/tapdisk.raw" "$GUEST_ID/xvdd=qcow:$PWD/tapdisk.qcow"
tty=$(guest_tty peers)
xl unpause peers
guest_wait peers 150 '^@guest is ready$'

printf '%-12s %5s %9s %8s %11s %15s %14s\n' \
    "back end" depth requests "dom0 ms" "process ms" "dom0 us/request" "requests/CPU s" > table
measure xen-blkback xvda
measure qdisk xvdb "$(pidof xen-qemu-system-i386)"
measure tapdisk-raw xvdc "$TAPDISK"
measure tapdisk-qcow xvdd "$TAPDISK"
guest_tell peers "none 0 0"
wait_for 60 guest_gone peers
tapdisk_wait
guest_said peers '^@guest exit 0$' || fail "the guest's script"
cat table
