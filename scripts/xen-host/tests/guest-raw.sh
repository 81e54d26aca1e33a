# tapdisk under a real blkfront: a raw image, the vbd made by hand; data, a file system, hot-unplug, the image in dom0
. /xen-host/lib.sh

cat > guest.sh <<'GUEST'
. /guest-lib.sh
disk_wait xvda
disk_write_read xvda
disk_new_fs xvda
disk_hash xvda
echo "@guest is done with the disk"
disk_gone xvda
echo "@guest has no disk"
GUEST

truncate -s 32M disk.raw
trap 'guest_clean_up raw' EXIT
blkback off
guest_create raw guest.sh
vbd_make "$GUEST_ID" xvda
tapdisk_start "$GUEST_ID/xvda=raw:$PWD/disk.raw"
xl unpause raw
guest_wait raw 100 '^@guest is done with the disk$'
vbd_unplug
tapdisk_wait
# The guest loses its disk when its nodes are removed.
vbd_remove
wait_for 60 guest_gone raw
guest_log raw
guest_said raw '^@guest exit 0$' || fail "the guest's script"
cat tapdisk.log

guest_said raw '^@guest sectors of xvda: 65536$' || fail "the disk has another size"
[ "$(guest_hash raw xvda)" = "$(hash_of disk.raw)" ] || fail "the image has other data than the guest saw"
e2fsck -fn disk.raw
