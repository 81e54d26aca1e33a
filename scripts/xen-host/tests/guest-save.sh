# a guest saved and restored by xl under load, and a checkpoint that it goes on after: every read is right
. /xen-host/lib.sh

cat > guest.sh <<'GUEST'
. /guest-lib.sh
disk_wait xvda
disk-load verify /dev/xvda --depth 4 --until-told
disk_hash xvda
GUEST

tap-img create -f qcow disk.qcow 16M
# All of a guest's memory, which is more than dom0's own file system can hold.
saved=/dev/shm/guest-save
trap 'guest_clean_up moved rm -f "$saved"' EXIT
blkback off
tapdisk_start --watch
guest_create moved guest.sh "disk = [ 'script=block-tapdisk,vdev=xvda,access=w,target=qcow:$PWD/disk.qcow' ]"
first_id=$GUEST_ID
xl unpause moved

# load_goes_on: waits until the guest's load has reported progress twice.
load_words() { guest_log moved | grep -c '^@load goes on'; }
has_more_words_than() { [ "$(load_words)" -gt "$1" ]; }
load_goes_on() { wait_for 60 has_more_words_than $(($(load_words) + 1)); }

load_goes_on
xl save -c moved "$saved" 2> xl.log
load_goes_on
xl save moved "$saved" 2>> xl.log
if xl domid moved 2> /dev/null; then fail "the guest is there after it was saved"; fi
xl restore "$saved" 2>> xl.log
[ "$(xl domid moved)" != "$first_id" ] || fail "the guest was not made anew"
load_goes_on

guest_tell moved stop
wait_for 60 guest_gone moved
guest_log moved | grep -v 'goes on'
guest_said moved '^@load compared .*MISMATCHES 0$' || fail "the guest's load"
guest_said moved '^@guest exit 0$' || fail "the guest's script"
kill "$TAPDISK"
tapdisk_wait
cat tapdisk.log

tap-img check disk.qcow
tap-img convert disk.qcow disk.raw
[ "$(guest_hash moved xvda)" = "$(hash_of disk.raw)" ] || fail "the image has other data than the guest saw"
