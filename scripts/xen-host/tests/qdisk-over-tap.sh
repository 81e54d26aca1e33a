# a guest of QEMU's qdisk over a device of tapdisk attach, which is killed three times under load: the guest only waits
. /xen-host/lib.sh

cat > guest.sh <<'GUEST'
. /guest-lib.sh
disk_wait xvda
disk-load verify /dev/xvda --depth 8 --until-told
disk_hash xvda
GUEST

DEVICE=/dev/nbd6
trap 'guest_clean_up behind tapdisk detach --force "$DEVICE"' EXIT
: > tapdisk.log
modprobe nbd
tap-img create -f qcow disk.qcow 16M
start() { attach_start --device "$DEVICE" "qcow:$PWD/disk.qcow"; }
start
attach_wait
guest_create behind guest.sh "disk = [ 'format=raw,vdev=xvda,access=rw,backendtype=qdisk,target=$DEVICE' ]"
xl unpause behind
guest_goes_on behind
refused 16 'in use by process [0-9]* (xen-qemu-system' tapdisk detach "$DEVICE"
for n in 1 2 3; do
    tapdisk_again KILL start
    guest_goes_on behind
done
guest_tell behind stop
wait_for 100 guest_gone behind
guest_load_right behind 1
no_qemu() { ! pidof xen-qemu-system-i386; }
wait_for 20 no_qemu
tapdisk detach "$DEVICE"
tapdisk_wait 0
attach_gone
qcow_same "$(guest_hash behind xvda)"
