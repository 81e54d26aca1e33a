# stock xl with script=block-tapdisk: create, reboot, block-attach and -detach, destroy; a missing image is explained
. /xen-host/lib.sh

cat > guest.sh <<'GUEST'
. /guest-lib.sh
disk_wait xvda
if [ -z "$(dd if=/dev/xvda bs=64k count=1 2> /dev/null | tr -d '\000')" ]; then
    echo "@guest boots for the first time"
    disk_new_fs xvda
    reboot -f
fi
disk_old_fs xvda
disk_hash xvda
echo "@guest wants another disk"
disk_wait xvdb
disk_old_fs xvda
disk_write_read xvdb
disk_hash xvdb
echo "@guest is done with the other disk"
disk_gone xvdb
echo "@guest waits for its end"
sleep 1000
GUEST

tap-img create -f qcow first.qcow 32M
tap-img create -f qcow second.qcow 16M
trap 'guest_clean_up stock' EXIT
blkback off
tapdisk_start --watch

disk() { echo "script=block-tapdisk,vdev=$1,access=w,target=$2"; }

# A missing image: xl says why, and nothing is left.
if (guest_create stock guest.sh "disk = [ '$(disk xvda "qcow:$PWD/missing.qcow")' ]") > xl.log 2>&1; then
    fail "xl made a guest on an image that is not there"
fi
cat xl.log
grep -q 'missing.qcow: no such file' xl.log || fail "xl does not say which image is missing"
if xl domid stock 2> /dev/null; then fail "the guest is there all the same"; fi

# The kernel's back end would take the disk: xl reports that.
blkback on
if (guest_create stock guest.sh "disk = [ '$(disk xvda "qcow:$PWD/first.qcow")' ]") > xl.log 2>&1; then
    fail "xl made a guest beside the kernel's back end"
fi
grep -q 'xen-blkback is loaded' xl.log || { cat xl.log; fail "xl does not say that xen-blkback is loaded"; }
blkback off

guest_create stock guest.sh "disk = [ '$(disk xvda "qcow:$PWD/first.qcow")' ]"
first_id=$GUEST_ID
xl unpause stock
guest_wait stock 200 '^@guest wants another disk$'
[ "$(xl domid stock)" != "$first_id" ] || fail "the guest was not made anew"

# The daemon dies, and the next one finds the guest's disk by itself.
kill -9 "$TAPDISK"
tapdisk_wait 137
tapdisk_start --watch

# A second daemon, and one that is given another image: the guest's disk stays with the first.
timeout 4 tapdisk xen --watch --run-dir /run/second > second.log 2>&1 || true
grep -q 'in use' second.log || { cat second.log; fail "the second daemon does not say that the image is in use"; }
if tapdisk xen --run-dir /run/second "$(xl domid stock)/xvda=qcow:$PWD/second.qcow" > second.log 2>&1; then
    fail "another image was served to a guest that has one"
fi
cat second.log
[ "$(xenstore-read "/local/domain/0/backend/vbd/$(xl domid stock)/51712/state")" = 4 ] || fail "the disk was disturbed"

xl block-attach stock "$(disk xvdb "qcow:$PWD/second.qcow")"
guest_wait stock 60 '^@guest is done with the other disk$'
xl block-detach stock xvdb
guest_wait stock 60 '^@guest waits for its end$'
tap-img check second.qcow
tap-img convert second.qcow second.raw
[ "$(guest_hash stock xvdb)" = "$(hash_of second.raw)" ] || fail "the second image has other data than the guest saw"

xl destroy stock
guest_log stock
tap-img check first.qcow
tap-img convert first.qcow first.raw
e2fsck -fn first.raw
[ "$(guest_hash stock xvda)" = "$(hash_of first.raw)" ] || fail "the first image has other data than the guest saw"

kill "$TAPDISK"
tapdisk_wait
cat tapdisk.log
if xenstore-exists /local/domain/0/backend/vbd; then fail "nodes are left"; fi
