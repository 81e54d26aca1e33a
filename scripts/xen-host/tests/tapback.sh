# xl's guest and a vbd3 guest on disks of tap-ctl: paused, snapshot, merged, killed and replaced under load
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

# # Ours are started by hand here, where a host has a service for each type.
tapback_start() {
    tapback >> tapback.log 2>&1 &
    TAPBACK3=$!
    tapback --type vbd --script block-tap >> tapback.log 2>&1 &
    TAPBACK=$!
}
tapback_end() {
    kill -s "$1" "$TAPBACK" "$TAPBACK3"
    wait "$TAPBACK" "$TAPBACK3" 2> /dev/null || true
}
# pid_of MINOR
pid_of() { tap-ctl list -m "$1" | sed -n 's/^pid=\([0-9]*\) .*/\1/p'; }
# # disk_of BACK: the minor number and the tapdisk of a device.
disk_of() {
    MINOR=$(xenstore-read "$1/physical-device-path")
    MINOR=${MINOR##*.}
    PID=$(pid_of "$MINOR")
}
# # again BACK IMAGE: the tapdisk of a device is killed, and another opens its image.
again() {
    disk_of "$1"
    kill -9 "$PID"
    PID=$(tap-ctl spawn)
    tap-ctl attach -p "$PID" -m "$MINOR"
    tap-ctl open -p "$PID" -m "$MINOR" -a "$2" -D
    guest_goes_on given
    [ "$(xenstore-read "$1/kthread-pid")" = "$PID" ] || fail "kthread-pid names another process"
}

tap-img create -f qcow disk.qcow 64M
truncate -s 32M other.raw
clean_up() {
    local status=$?
    if [ "$status" != 0 ]; then cat tapback.log; tap-ctl list || true; fi
    tapback_end KILL 2> /dev/null || true
    pkill -9 tapdisk 2> /dev/null || killall -9 tapdisk 2> /dev/null || true
    (exit "$status")
    guest_clean_up given
}
trap clean_up EXIT
blkback off
tapback_start

# # What cannot be opened is explained by xl.
if (guest_create given guest.sh "disk = [ 'script=block-tap,vdev=xvda,access=w,target=qcow:$PWD/missing.qcow' ]") > xl.log 2>&1
then
    fail "xl made a guest on an image that is not there"
fi
grep -q 'missing.qcow' xl.log || { cat xl.log; fail "xl does not say which image is missing"; }

guest_create given guest.sh "disk = [ 'script=block-tap,vdev=xvda,access=w,target=qcow:$PWD/disk.qcow' ]"
FIRST=/local/domain/0/backend/vbd/$GUEST_ID/51712
# # The other disk is of the type of tapback, which xl of this version does not make.
vbd_make "$GUEST_ID" xvdb vbd3
SECOND=$BACK
vbd_wait "$SECOND" 2 30
xenstore-write "$SECOND/params" "raw:$PWD/other.raw"
XENBUS_PATH=$SECOND sh /etc/xen/scripts/block-tap add
xl unpause given
vbd_wait "$FIRST" 4 100
vbd_wait "$SECOND" 4 100
guest_goes_on given

# # A disk in use is not closed.
disk_of "$FIRST"
status=0
tap-ctl close -p "$PID" -m "$MINOR" 2> err || status=$?
[ "$status" = 16 ] && grep -q 'uses it' err || fail "a disk in use was closed, or that was refused otherwise: $(cat err)"

for round in 1 2 3; do
    for back in "$FIRST" "$SECOND"; do
        disk_of "$back"
        tap-ctl pause -p "$PID" -m "$MINOR"
        usleep 500000
        tap-ctl unpause -p "$PID" -m "$MINOR"
        guest_goes_on given
    done
    disk_of "$FIRST"
    tap-ctl snapshot -p "$PID" -m "$MINOR" -k "$PWD/below-$round.qcow"
    guest_goes_on given
    again "$FIRST" "qcow:$PWD/disk.qcow"
    again "$SECOND" "raw:$PWD/other.raw"
    # # No data passes through it: the guest goes on without one.
    tapback_end $([ "$round" = 2 ] && echo TERM || echo KILL)
    guest_goes_on given
    tapback_start
    guest_goes_on given
done
# # The oldest images are merged below the running disk: 2 into 1, and what is left stays.
disk_of "$FIRST"
tap-ctl commit -p "$PID" -m "$MINOR" -a "qcow:$PWD/below-2.qcow" -b "$PWD/below-1.qcow" -w
guest_goes_on given

guest_tell given stop
wait_for 200 guest_gone given
guest_load_right given 2
vbd_wait "$SECOND" 6 30
XENBUS_PATH=$SECOND sh /etc/xen/scripts/block-tap remove
vbd_remove
wait_for 30 test -z "$(tap-ctl list)" || true
[ -z "$(tap-ctl list)" ] || fail "disks are left: $(tap-ctl list)"
tapback_end TERM
cat tapback.log
[ -z "$(ls /run/tapdisk | grep ^ring-)" ] || fail "records are left: $(ls /run/tapdisk)"

tap-img check disk.qcow || [ $? = 3 ] || fail "the image is damaged"
tap-img convert --backing probe disk.qcow disk.raw
[ "$(guest_hash given xvda)" = "$(hash_of disk.raw)" ] || fail "the image has other data than the guest saw"
[ "$(guest_hash given xvdb)" = "$(hash_of other.raw)" ] || fail "other.raw has other data than the guest saw"
