# a guest of xen-blkback over a device of tapdisk attach, which is killed twenty times under load: the guest only waits
. /xen-host/lib.sh

cat > guest.sh <<'GUEST'
. /guest-lib.sh
disk_wait xvda
disk-load verify /dev/xvda --depth 16 --until-told
disk_hash xvda
GUEST

DEVICE=/dev/nbd5
trap 'guest_clean_up behind tapdisk detach --force "$DEVICE"' EXIT
: > tapdisk.log
modprobe nbd
tap-img create -f qcow disk.qcow 32M
start() { attach_start --device "$DEVICE" "qcow:$PWD/disk.qcow"; }
start
attach_wait
blkback on
guest_create behind guest.sh "disk = [ 'phy:$DEVICE,xvda,w' ]"
xl unpause behind
guest_waits() { guest_goes_on behind; }
guest_waits

echo "# the guest's device is not taken away"
in_use="in use by xen-blkback (vbd-$GUEST_ID-51712)"
refused 16 "$in_use" tapdisk detach "$DEVICE"
guest_waits
tapdisk_again TERM true
# Nobody serves it now, and the guest has it all the same.
refused 16 "$in_use" tapdisk detach "$DEVICE"
[ -e "/sys/block/${DEVICE#/dev/}/pid" ] || fail "$DEVICE has gone with its tapdisk"
start

echo "# killed under load"
tapdisk_killed_often guest_waits start
guest_tell behind stop
wait_for 100 guest_gone behind
guest_said behind '^@guest sectors of xvda: 65536$' || fail "the disk has another size"
guest_load_right behind 1
[ "$(sort -u tapdisk.log | grep -c '^/dev/nbd[0-9]*$')" = 1 ] || fail "it had several devices: $(cat tapdisk.log)"

echo "# nothing is left"
wait_for 20 blkback_serves_none
tapdisk detach "$DEVICE"
tapdisk_wait 0
attach_gone
qcow_same "$(guest_hash behind xvda)"
