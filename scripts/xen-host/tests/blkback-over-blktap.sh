# a guest of xen-blkback over a device of a blktap2 module: under load, tapdisk asked to end meanwhile (--blktap-module)
. /xen-host/lib.sh

if [ ! -f /xen-host/blktap.ko ]; then
    echo "there is no module: name one with --blktap-module"
    exit 77
fi
cat > guest.sh <<'GUEST'
. /guest-lib.sh
disk_wait xvda
disk-load verify /dev/xvda --depth 16 --until-told
disk_hash xvda
GUEST

# The guest is destroyed first: OpenXT's module follows a null pointer if the device of a dead tapdisk is used.
undo() {
    sleep 1
    rmmod blktap
}
trap 'guest_clean_up behind undo' EXIT
: > tapdisk.log
# A module that has kept a number cannot be unloaded.
[ -d /sys/module/blktap ] || insmod /xen-host/blktap.ko
kept=$(ls /sys/class/blktap2 2> /dev/null | grep -c '^blktap[0-9]' || true)
tap-img create -f qcow disk.qcow 32M
attach_start --via blktap "qcow:$PWD/disk.qcow"
attach_wait
blkback on
guest_create behind guest.sh "disk = [ 'phy:$DEVICE,xvda,w' ]"
xl unpause behind
guest_goes_on behind

echo "# tapdisk that is asked to end serves the guest to its end"
kill "$TAPDISK"
wait_for 10 grep -q 'in use; it is served until' tapdisk.log
guest_goes_on behind
guest_tell behind stop
wait_for 100 guest_gone behind
guest_said behind '^@guest sectors of xvda: 65536$' || fail "the disk has another size"
guest_load_right behind 1

echo "# nothing is left"
wait_for 20 blkback_serves_none
tapdisk_wait 0
attach_gone
minors=$(ls /sys/class/blktap2 2> /dev/null | grep -c '^blktap[0-9]' || true)
[ "$minors" = "$kept" ] || fail "a minor is left"
qcow_same "$(guest_hash behind xvda)"
