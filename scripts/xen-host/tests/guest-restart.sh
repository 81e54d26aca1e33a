# tapdisk of two busy disks ended twenty times by SIGKILL, once by SIGTERM, and started again: the guest only waits
. /xen-host/lib.sh

cat > guest.sh <<'GUEST'
. /guest-lib.sh
disk_wait xvda
disk_wait xvdb
# # Open at both ends, so that neither side waits for the other.
mkfifo /tmp/stop
exec 3<> /tmp/stop
disk-load verify /dev/xvdb --depth 2 --until-told --seed 2 < /tmp/stop > /tmp/other 2>&1 &
other=$!
disk-load verify /dev/xvda --depth 8 --until-told
echo stop >&3
wait "$other" || { tail -n 20 /tmp/other; exit 1; }
tail -n 1 /tmp/other
disk_hash xvda
disk_hash xvdb
GUEST

# # Requests that the guest's load has done, from its last report; 0 before the first.
done_requests() {
    local done
    done=$(guest_log restart | sed -n 's/^@load goes on: requests \([0-9]*\),.*/\1/p' | tail -n 1)
    echo "${done:-0}"
}
has_done_more_than() { [ "$(done_requests)" -gt "$1" ]; }

tap-img create -f qcow disk.qcow 64M
truncate -s 32M other.raw
trap 'guest_clean_up restart' EXIT
blkback off
guest_create restart guest.sh
vbd_make "$GUEST_ID" xvdb
vbd_make "$GUEST_ID" xvda
disks=("$GUEST_ID/xvda=qcow:$PWD/disk.qcow" "$GUEST_ID/xvdb=raw:$PWD/other.raw")
tapdisk_start "${disks[@]}"
xl unpause restart

for n in $(seq 21); do
    if [ $((n % 4)) != 0 ]; then
        # # The first report after a restart may be from before it; the second one shows that the load continues.
        for word in 1 2; do
            wait_for 100 has_done_more_than "$(done_requests)"
        done
    fi
    # # Up to a third of a second, without waiting for a report: some are killed while they take over the ring.
    usleep $((RANDOM * 10))
    signal=KILL status=137
    if [ "$n" = 11 ]; then
        signal=TERM status=0
    fi
    kill -s "$signal" "$TAPDISK"
    tapdisk_wait "$status"
    echo "tapdisk ended by SIG$signal, $n of 21, after $(done_requests) requests"
    tapdisk_start "${disks[@]}"
done
wait_for 100 has_done_more_than "$(done_requests)"
guest_tell restart stop
wait_for 100 guest_gone restart
guest_log restart | grep -v 'goes on'
[ "$(guest_log restart | grep -c '^@load compared .*MISMATCHES 0$')" = 2 ] || fail "the guest's load"
guest_said restart '^@guest exit 0$' || fail "the guest's script"
tapdisk_wait
xenstore-rm -t "/local/domain/0/backend/vbd/$GUEST_ID"
grep -v 'back end in state' tapdisk.log

# Clusters whose write was under way when tapdisk was killed may be lost to the file, which is harmless: status 3.
tap-img check disk.qcow || [ $? = 3 ] || fail "the image is damaged"
tap-img convert disk.qcow disk.raw
for disk in xvda:disk.raw xvdb:other.raw; do
    image=${disk#*:}
    [ "$(guest_hash restart "${disk%:*}")" = "$(hash_of "$image")" ] || fail "$image has other data than the guest saw"
done
