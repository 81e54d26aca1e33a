# tapdisk of two busy disks ended twenty times by SIGKILL, once by SIGTERM, and started again: the guest only waits
. /xen-host/lib.sh

cat > guest.sh <<'GUEST'
. /guest-lib.sh
disk_wait xvda
disk_wait xvdb
disks_load xvda xvdb
GUEST

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

guest_waits() { guest_goes_on restart; }
tapdisk_killed_often guest_waits tapdisk_start "${disks[@]}"
guest_tell restart stop
wait_for 100 guest_gone restart
guest_load_right restart 2
tapdisk_wait
xenstore-rm -t "/local/domain/0/backend/vbd/$GUEST_ID"
grep -v 'back end in state' tapdisk.log

qcow_same "$(guest_hash restart xvda)"
[ "$(guest_hash restart xvdb)" = "$(hash_of other.raw)" ] || fail "other.raw has other data than the guest saw"
