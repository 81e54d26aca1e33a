# tapdisk under a real blkfront: a qcow image, and a second guest that finds what the first wrote; checked in dom0
. /xen-host/lib.sh

cat > first.sh <<'GUEST'
. /guest-lib.sh
disk_wait xvda
disk_write_read xvda
disk_new_fs xvda
disk_hash xvda
GUEST
cat > second.sh <<'GUEST'
. /guest-lib.sh
disk_wait xvda
disk_old_fs xvda
disk_hash xvda
GUEST

tap-img create -f qcow disk.qcow 32M
trap 'guest_clean_up first' EXIT
guest_on_image first first.sh "qcow:$PWD/disk.qcow" 150
tap-img check disk.qcow
tap-img convert disk.qcow disk.raw
e2fsck -fn disk.raw

trap 'guest_clean_up second' EXIT
guest_on_image second second.sh "qcow:$PWD/disk.qcow" 150
tap-img check disk.qcow

[ "$(guest_hash first xvda)" = "$(hash_of disk.raw)" ] || fail "the image has other data than the guest saw"
# Mounted read-only: nothing has changed.
[ "$(guest_hash second xvda)" = "$(hash_of disk.raw)" ] || fail "the second guest saw other data"
