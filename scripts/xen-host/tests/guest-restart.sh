# tapdisk ended twenty times by SIGKILL and once by SIGTERM under a guest's load, and started again: the guest only waits
. /xen-host/lib.sh

cat > guest.sh <<'GUEST'
. /guest-lib.sh
disk_wait xvda
disk-load verify /dev/xvda --depth 8 --until-told
disk_hash xvda
GUEST

# Requests that the guest's load has done; the last word of it, 0 before the first.
done_requests() {
    local done
    done=$(guest_log restart | sed -n 's/^@load goes on: requests \([0-9]*\),.*/\1/p' | tail -n 1)
    echo "${done:-0}"
}
has_done_more_than() { [ "$(done_requests)" -gt "$1" ]; }

tap-img create -f qcow disk.qcow 64M
trap 'guest_clean_up restart' EXIT
blkback off
guest_create restart guest.sh
vbd_make "$GUEST_ID" xvda
spec=$GUEST_ID/xvda=qcow:$PWD/disk.qcow
tapdisk_start "$spec"
xl unpause restart

for n in $(seq 21); do
    if [ $((n % 4)) != 0 ]; then
        # The first word after a restart may be of before it; from the second on the load goes on.
        for word in 1 2; do
            wait_for 100 has_done_more_than "$(done_requests)"
        done
    fi
    # Up to a third of a second: without words before, some are killed while they take the ring up.
    usleep $((RANDOM * 10))
    signal=KILL status=137
    if [ "$n" = 11 ]; then
        signal=TERM status=0
    fi
    kill -s "$signal" "$TAPDISK"
    tapdisk_wait "$status"
    echo "tapdisk ended by SIG$signal, $n of 21, after $(done_requests) requests"
    tapdisk_start "$spec"
done
wait_for 100 has_done_more_than "$(done_requests)"
guest_tell restart stop
wait_for 100 guest_gone restart
guest_log restart | grep -v 'goes on'
guest_said restart '^@load compared .*MISMATCHES 0$' || fail "the guest's load"
guest_said restart '^@guest exit 0$' || fail "the guest's script"
tapdisk_wait
vbd_remove
grep -v 'back end in state' tapdisk.log

# Clusters whose write was under way when tapdisk was killed may be lost to the file, which is harmless: status 3.
tap-img check disk.qcow || [ $? = 3 ] || fail "the image is damaged"
tap-img convert disk.qcow disk.raw
[ "$(guest_hash restart xvda)" = "$(hash_of disk.raw)" ] || fail "the image has other data than the guest saw"
